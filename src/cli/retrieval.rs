//! `retrieval`: how alike a model represents translations, and whether toxicity fell with it.

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use clap::Args;

use crate::error::{Error, Result};
use crate::interp::retrieval::read_aligned;
use crate::report::json;
use crate::study::retrieval::{self, RetrievalOptions};
use crate::text::language;

use super::arguments::EngineArguments;
use super::eval::write_reports;
use super::progress::Shown;
use super::steering::SteeringArguments;
use super::{may_colour, print};

/// Arguments of `retrieval`.
#[derive(Debug, Args)]
pub struct RetrievalCommand {
    /// Model (GGUF)
    #[arg(short, long, value_name = "FILE")]
    model: PathBuf,
    /// Folder of aligned sentences, {language}.jsonl
    #[arg(long, value_name = "DIR")]
    aligned: PathBuf,
    /// Folder for the report
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// The language that all others are paired with
    #[arg(long, value_name = "L", default_value = "en")]
    pivot: String,
    /// Languages, comma separated [default: all that there are]
    #[arg(long, value_name = "L,…", value_delimiter = ',')]
    lang: Vec<String>,
    /// Sentences, the first ones
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Most tokens of a sentence that are read
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_tokens: usize,
    /// An `eval` run before a change, to correlate with
    #[arg(long, value_name = "DIR", requires = "after")]
    before: Option<PathBuf>,
    /// The `eval` run after it
    #[arg(long, value_name = "DIR", requires = "before")]
    after: Option<PathBuf>,
    #[command(flatten)]
    steering: SteeringArguments,
    #[command(flatten)]
    engine: EngineArguments,
}

impl RetrievalCommand {
    /// Measures, prints and writes.
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
            eprintln!(
                "warning: {n} sentences of {language} hold HTML entities such as &quot;, which the model reads as they are"
            );
        }
        let options =
            RetrievalOptions { pivot: self.pivot.clone(), limit: self.limit, max_tokens: self.max_tokens };
        options.check(&aligned)?;
        let falls = match (&self.before, &self.after) {
            (Some(before), Some(after)) => Some(retrieval::toxicity_falls(before, after)?),
            _ => None,
        };
        let model = self.steering.open(&self.model, &self.engine)?;
        crate::file::create_folder(&self.output)?;
        let report = retrieval::measure(
            &model,
            &self.engine.session_options(),
            &aligned,
            &options,
            falls.as_ref(),
            &mut Shown::new(),
            interrupt,
        )?;
        let files = [("json", json::to_json(&report)), ("csv", report.to_csv()), ("html", report.to_html())];
        write_reports(&self.output, "retrieval", &files)?;
        print(&report.to_terminal(may_colour(&std::io::stdout())))?;
        eprintln!("report: {}", self.output.join("retrieval.html").display());
        Ok(())
    }
}
