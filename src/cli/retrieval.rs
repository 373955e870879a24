//! `retrieval`: how alike a model represents translations, and whether toxicity fell with it.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use clap::Args;

use crate::engine::residual::ResidualPlace;
use crate::error::{Error, Result};
use crate::eval::compare::{self, Side};
use crate::eval::metric;
use crate::eval::result::find_difference;
use crate::eval::run;
use crate::interp::retrieval::{Retrieval, pearson, read_aligned, retrieve};
use crate::report::interp::{LanguageRetrieval, NamedCorrelation, RetrievalReport};
use crate::report::json;
use crate::text::language;

use super::arguments::EngineArguments;
use super::eval::write_reports;
use super::probe::mean_residual_streams;
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
        if !aligned.sentences.contains_key(&self.pivot) {
            let found: Vec<&String> = aligned.sentences.keys().collect();
            return Err(Error::setting(
                "--pivot",
                format!("expected one of {found:?}, found {:?}", self.pivot),
            ));
        }
        let falls = match (&self.before, &self.after) {
            (Some(before), Some(after)) => Some(toxicity_falls(before, after)?),
            _ => None,
        };
        if self.max_tokens == 0 {
            return Err(Error::setting("--max-tokens", "expected a number from 1 up, found 0"));
        }
        if let Some(n) = self.limit.filter(|&n| n < 2) {
            return Err(Error::setting("--limit", format!("expected two sentences or more, found {n}")));
        }
        let model = self.steering.open(&self.model, &self.engine)?;
        // As Hugging Face counts layers: the embeddings, and after each block, the last after the final norm.
        let mut places = ResidualPlace::all(model.n_layer());
        places.remove(model.n_layer());
        let vectors = |sentences: &[String]| -> Result<Vec<Vec<Vec<f32>>>> {
            let limit = self.limit.unwrap_or(usize::MAX);
            let texts: Vec<&str> = sentences.iter().take(limit).map(String::as_str).collect();
            mean_residual_streams(&model, &self.engine, &texts, &places, self.max_tokens, interrupt)
        };
        crate::file::create_folder(&self.output)?;
        let pivot = vectors(&aligned.sentences[&self.pivot])?;
        let mut languages = Vec::new();
        for (language, sentences) in aligned.sentences.iter().filter(|(l, _)| **l != self.pivot) {
            eprintln!("{language}");
            let other = vectors(sentences)?;
            let at = |vectors: &[Vec<Vec<f32>>], place: usize| -> Vec<Vec<f32>> {
                vectors.iter().map(|places| places[place].clone()).collect()
            };
            let of_places = (0..places.len()).map(|i| retrieve(&at(&pivot, i), &at(&other, i)));
            let of_places: Vec<Retrieval> = of_places.collect::<Result<_>>()?;
            let mean =
                |of: &dyn Fn(&Retrieval) -> f64| of_places.iter().map(of).sum::<f64>() / places.len() as f64;
            languages.push(LanguageRetrieval {
                language: language.clone(),
                mean_accuracy: mean(&|r| (r.forward_accuracy + r.backward_accuracy) / 2.0),
                mean_cosine: mean(&|r| r.mean_cosine),
                toxicity_fall: falls
                    .as_ref()
                    .and_then(|falls| falls.iter().find(|(l, _)| l == language).map(|&(_, fall)| fall)),
                places: of_places,
            });
        }
        let correlate = |of: &dyn Fn(&LanguageRetrieval) -> f64| {
            let (x, y): (Vec<f64>, Vec<f64>) =
                languages.iter().filter_map(|l| Some((of(l), l.toxicity_fall?))).unzip();
            pearson(&x, &y)
        };
        let correlations = match falls {
            None => Vec::new(),
            Some(_) => vec![
                NamedCorrelation {
                    of: "top-1 accuracy".into(),
                    correlation: correlate(&|l| l.mean_accuracy),
                },
                NamedCorrelation { of: "mean cosine".into(), correlation: correlate(&|l| l.mean_cosine) },
            ],
        };
        let report = RetrievalReport {
            model: crate::file::base_name(&self.model),
            pivot: self.pivot.clone(),
            n_sentences: pivot.len(),
            places: places.iter().map(|place| name_of(*place)).collect(),
            languages,
            correlations,
        };
        let files = [("json", json::to_json(&report)), ("csv", report.to_csv()), ("html", report.to_html())];
        write_reports(&self.output, "retrieval", &files)?;
        print(&report.to_terminal(may_colour(&std::io::stdout())))?;
        eprintln!("report: {}", self.output.join("retrieval.html").display());
        Ok(())
    }
}

fn name_of(place: ResidualPlace) -> String {
    match place {
        ResidualPlace::Embedding => "embedding".into(),
        ResidualPlace::AfterBlock(il) => format!("layer {il}"),
        ResidualPlace::AfterFinalNorm => "final norm".into(),
    }
}

/// By language, the share of expected maximum toxicity that is gone in the second run.
fn toxicity_falls(before: &Path, after: &Path) -> Result<Vec<(String, f64)>> {
    let (a, b) = (run::read(before)?, run::read(after)?);
    let (tokens_a, tokens_b) = (|text: &str| a.tokens[text].clone(), |text: &str| b.tokens[text].clone());
    let scorer = a.info.scorers.first().map(|s| s.name.clone()).unwrap_or_default();
    let comparison = compare::compare(
        Side { label: "before", run: &a.info, samples: &a.samples, tokenize: &tokens_a },
        Side { label: "after", run: &b.info, samples: &b.samples, tokenize: &tokens_b },
    )?;
    let name = metric::join(Some(&scorer), "expected_maximum_toxicity");
    let falls = comparison.languages.iter().filter_map(|l| {
        let found = find_difference(&l.metrics, &name)?;
        (found.a.value > 0.0).then(|| (l.language.clone(), 1.0 - found.b.value / found.a.value))
    });
    Ok(falls.collect())
}
