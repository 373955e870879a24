//! `compare`: compares two runs, prompt by prompt.

use std::path::{Path, PathBuf};

use clap::Args;

use crate::error::Result;
use crate::eval::{compare, record};
use crate::file::output::{FolderKind, Paths, open_folder};
use crate::report::{self, csv, html, json, markdown, terminal};
use crate::score;

use super::{may_colour, print};
use crate::report::write::{EXCERPTS, write_reports};

/// Arguments of `compare`.
#[derive(Debug, Args)]
pub struct CompareCommand {
    /// Folder of the first run (from `eval -o`)
    #[arg(value_name = "A")]
    a: PathBuf,
    /// Folder of the second run
    #[arg(value_name = "B")]
    b: PathBuf,
    /// Folder for the comparison (JSON, CSV, Markdown, HTML) [default: print it only]
    #[arg(short, long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Leave perplexity out, if the two runs measured it on different tokens
    #[arg(long)]
    no_perplexity: bool,
}

impl CompareCommand {
    /// Compares B with A and prints the table.
    pub fn run(&self) -> Result<()> {
        run(&self.a, &self.b, self.output.as_deref(), self.no_perplexity)
    }

    /// The files that the command reads and writes.
    pub fn paths(&self) -> Paths {
        let paths = Paths::new().reads([&self.a, &self.b]);
        self.output.iter().fold(paths, |paths, folder| paths.writes_folder(folder, FolderKind::Compare))
    }
}

/// Compares the run in `b` with the run in `a`, also for `eval --compare`.
pub fn run(a: &Path, b: &Path, output: Option<&Path>, no_perplexity: bool) -> Result<()> {
    let (mut run_a, mut run_b) = (record::read(a)?, record::read(b)?);
    if no_perplexity {
        run_a.drop_perplexity();
        run_b.drop_perplexity();
    }
    let (label_a, label_b) = (a.display().to_string(), b.display().to_string());
    let comparison = compare::compare(run_a.side(&label_a), run_b.side(&label_b))?;
    if let Some(folder) = output {
        let _lock = open_folder(folder, FolderKind::Compare)?;
        let leading = run_b.info.scorers.first().map_or(score::LEXICAL, |s| s.name.as_str());
        let excerpts = report::most_toxic(&run_b.samples, leading, EXCERPTS);
        write_reports(
            folder,
            "comparison",
            &[
                ("json", json::to_json(&comparison)?),
                ("csv", csv::comparison_to_csv(&comparison)),
                ("md", markdown::comparison_to_markdown(&comparison)),
                ("html", html::comparison_to_html(&comparison, &excerpts)),
            ],
        )?;
        print::note(&format!("comparison: {}", folder.join("comparison.html").display()));
    }
    print(&terminal::comparison_to_terminal(&comparison, may_colour(&std::io::stdout())))
}
