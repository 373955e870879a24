//! `retrieval`: measures how similarly a model represents translations, and correlates it with toxicity.

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use clap::Args;

use crate::error::{Error, Result};
use crate::file::output::{FolderKind, Paths, open_folder};
use crate::interp::retrieval::read_aligned;
use crate::report::json;
use crate::report::write::write_reports;
use crate::study::retrieval::{self, RetrievalOptions};
use crate::text::language;

use super::arguments::EngineArguments;
use super::progress::Shown;
use super::steering::SteeringArguments;
use super::{may_colour, print};

/// Arguments of `retrieval`.
#[derive(Debug, Args)]
pub struct RetrievalCommand {
    /// Model (GGUF)
    #[arg(short, long, value_name = "FILE")]
    model: PathBuf,
    /// Folder of aligned sentences, one {language}.jsonl per language
    #[arg(long, value_name = "DIR")]
    aligned: PathBuf,
    /// Folder for the report
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Compare every other language with this one
    #[arg(long, value_name = "L", default_value = "en")]
    pivot: String,
    /// Languages to use, separated by commas [default: all in the folder]
    #[arg(long, value_name = "L,…", value_delimiter = ',')]
    lang: Vec<String>,
    /// Use only the first N sentences
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Read at most N tokens of each sentence
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_tokens: usize,
    /// Run folder of `eval` before a change, to correlate retrieval with the fall of toxicity
    #[arg(long, value_name = "DIR", requires = "after")]
    before: Option<PathBuf>,
    /// Run folder of `eval` after the change
    #[arg(long, value_name = "DIR", requires = "before")]
    after: Option<PathBuf>,
    #[command(flatten)]
    steering: SteeringArguments,
    #[command(flatten)]
    engine: EngineArguments,
}

impl RetrievalCommand {
    /// Measures retrieval, and prints and writes the report.
    pub fn run(&self, interrupt: &AtomicBool) -> Result<()> {
        let mut languages = language::parse_languages(&self.lang)?;
        if !languages.is_empty() && !languages.contains(&self.pivot.as_str()) {
            let pivot = language::parse_languages(std::slice::from_ref(&self.pivot));
            languages.extend(pivot.map_err(|error| match error {
                Error::Setting { reason, hint, .. } => {
                    Error::Setting { setting: "--pivot".into(), reason, hint }
                }
                other => other,
            })?);
        }
        let aligned = read_aligned(&self.aligned, &languages)?;
        for (language, n) in aligned.n_with_entities.iter().filter(|(_, n)| **n > 0) {
            print::note(&format!(
                "warning: {n} sentences of {language} contain HTML entities such as &quot;, which the model reads \
                 literally"
            ));
        }
        let options =
            RetrievalOptions { pivot: self.pivot.clone(), limit: self.limit, max_tokens: self.max_tokens };
        options.check(&aligned)?;
        let falls = match (&self.before, &self.after) {
            (Some(before), Some(after)) => Some(retrieval::toxicity_falls(before, after)?),
            _ => None,
        };
        let model = self.steering.open(&self.model, &self.engine)?;
        let _lock = open_folder(&self.output, FolderKind::Retrieval)?;
        let report = retrieval::measure(
            &model,
            &self.engine.session_options(),
            &aligned,
            &options,
            falls.as_ref(),
            &mut Shown::new(),
            interrupt,
        )?;
        let files = [("json", json::to_json(&report)?), ("csv", report.to_csv()), ("html", report.to_html())];
        write_reports(&self.output, "retrieval", &files)?;
        print(&report.to_terminal(may_colour(&std::io::stdout())))?;
        print::note(&format!("report: {}", self.output.join("retrieval.html").display()));
        Ok(())
    }

    /// The files that the command reads and writes.
    pub fn paths(&self) -> Result<Paths> {
        let paths = Paths::new().reads([&self.model, &self.aligned]).reads(&self.before).reads(&self.after);
        Ok(paths.reads(self.steering.files()?).writes_folder(&self.output, FolderKind::Retrieval))
    }
}
