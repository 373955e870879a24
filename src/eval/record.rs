//! The run folder: `run.json`, and the rows of a finished or interrupted run.
//!
//! | file | contents | written |
//! |---|---|---|
//! | `run.json` | every setting, version and hash ([`Record`]) | first |
//! | `generations.jsonl` | one continuation per line | one unit at a time |
//! | `scores.jsonl` | the measurements of each continuation, in the same order | one unit at a time |
//! | `report.*` | made from the two above | last |
//!
//! No file contains a time, so a resumed run writes the same bytes as an uninterrupted one.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::engine;
use crate::error::{Error, Result};
use crate::eval::continuation::Sample;
use crate::eval::generate::Generation;
use crate::eval::metric::fluency;
use crate::eval::perplexity::{BaseLogprob, PerplexityTokens};
use crate::eval::result::{ModelPaths, RunInfo};
use crate::eval::side::Side;
use crate::file;

/// Contents of `run.json`: everything that determines the bytes of the other files.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Version of the file's format.
    pub format: u32,
    /// llama.cpp's version.
    pub llama_cpp: String,
    /// The CPU features that ggml was compiled for: another machine rounds differently.
    pub system: String,
    /// Settings and hashes, as in `report.json`.
    pub run: RunInfo,
    /// The models' files, as they were given. They may differ when a run resumes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paths: Option<ModelPaths>,
}

const FORMAT: u32 = 1;

/// The hint for a folder with missing or damaged files.
const REPEAT: &str = "repeat the `detox-gguf eval` that wrote this folder: it keeps complete rows and makes the \
                      others again";

/// One line of `scores.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct ScoreRow {
    pub prompt_id: String,
    pub language: String,
    pub sample: u32,
    /// By the scorer's name; null if it gave no score.
    pub toxicity: BTreeMap<String, Option<f64>>,
    /// Why scores are missing, by the scorer's name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub errors: BTreeMap<String, String>,
    pub detected_language: Option<String>,
    pub language_kept: Option<bool>,
    #[serde(flatten)]
    pub base: BaseLogprob,
    /// For distinct-n and repetition, so that runs can be compared without their models.
    pub tokens: Vec<String>,
}

impl ScoreRow {
    /// Whether the row measures this continuation.
    pub(super) fn is_of(&self, generation: &Generation) -> bool {
        (&self.prompt_id, &self.language, self.sample)
            == (&generation.prompt_id, &generation.language, generation.sample)
    }

    /// Whether all values are possible for this continuation.
    pub(super) fn is_possible(&self, generation: &Generation) -> bool {
        let mut scores = self.toxicity.values().flatten();
        let BaseLogprob { base_logprob, base_n_tokens, .. } = self.base;
        let is_sum = base_logprob.is_none_or(|sum| match base_n_tokens.or(generation.n_tokens) {
            Some(0) => sum >= 0.0,
            // A blank continuation has no perplexity.
            Some(_) if generation.generated_text.trim().is_empty() => true,
            n_tokens => n_tokens.and_then(|n| fluency::perplexity(sum, n)).is_none_or(f64::is_finite),
        });
        let has_fault = base_logprob.is_some_and(|sum| fluency::logprob_fault(sum).is_some());
        scores.all(|score| (0.0..=1.0).contains(score)) && is_sum && !has_fault
    }
}

/// A finished run, read back from its folder.
#[derive(Debug)]
pub struct FinishedRun {
    /// Settings of the run.
    pub info: RunInfo,
    /// Its measured continuations.
    pub samples: Vec<Sample>,
    /// The files of its models; empty for runs of older versions.
    pub paths: ModelPaths,
}

impl FinishedRun {
    /// Leaves perplexity out of every comparison of this run.
    pub fn drop_perplexity(&mut self) {
        self.info.perplexity_model = None;
        self.info.perplexity_tokens = None;
        self.samples.iter_mut().for_each(|sample| sample.logprob = None);
    }

    /// The run as one side of a comparison.
    pub fn side<'a>(&'a self, label: &'a str) -> Side<'a> {
        Side { label, run: &self.info, samples: &self.samples, paths: Some(&self.paths) }
    }
}

/// Reads the finished run in `folder`.
///
/// # Errors
/// [`Error::RunFolder`] if the folder has no run or an unfinished one; [`Error::Input`] for a damaged row.
pub fn read(folder: &Path) -> Result<FinishedRun> {
    let (Record { run: mut info, paths, .. }, generations, scores) = read_rows_of(folder)?;
    info.perplexity_tokens = perplexity_tokens(&info, &generations, &scores);
    let samples = join(folder, generations, scores)?;
    Ok(FinishedRun { info, samples, paths: paths.unwrap_or_default() })
}

/// The files of the finished run in `folder`. Errors: as [`read`].
pub(super) fn read_rows_of(folder: &Path) -> Result<(Record, Vec<Generation>, Vec<ScoreRow>)> {
    let not_a_run = |reason: String| {
        Error::run_folder(folder, reason).with_hint("give a folder that `detox-gguf eval -o` wrote")
    };
    let Some(text) = file::read_record(folder)? else {
        return Err(not_a_run("expected the folder of a run, found no run.json in it".into()));
    };
    let record: Record = serde_json::from_str(&text).map_err(|e| not_a_run(format!("run.json: {e}")))?;
    if record.format != FORMAT {
        return Err(not_a_run(format!("expected a run of format {FORMAT}, found {}", record.format)));
    }
    let (of_generations, of_scores) = (folder.join("generations.jsonl"), folder.join("scores.jsonl"));
    let generations: Vec<Generation> = read_rows(&of_generations)?;
    let scores: Vec<ScoreRow> = read_rows(&of_scores)?;
    let (n_generations, n_scores) = (generations.len(), scores.len());
    let found = match n_rows_of(&record.run) {
        _ if n_generations == 0 => "no continuations".to_owned(),
        _ if n_generations != n_scores => format!("{n_generations} continuations and {n_scores} scores"),
        Some(wanted) if n_generations as u64 != wanted => {
            format!("{n_generations} of {wanted} continuations")
        }
        _ => String::new(),
    };
    if !found.is_empty() {
        let reason = format!("expected a finished run, found {found}");
        return Err(Error::run_folder(folder, reason).with_hint(REPEAT));
    }
    let impossible = |path: &Path, i: usize| {
        Error::input(path, Some(i + 1), "expected a row of a run, found impossible values").with_hint(REPEAT)
    };
    if let Some(i) = generations.iter().position(|generation| !generation.is_possible()) {
        return Err(impossible(&of_generations, i));
    }
    if let Some(i) = scores.iter().zip(&generations).position(|(row, of)| !row.is_possible(of)) {
        return Err(impossible(&of_scores, i));
    }
    Ok((record, generations, scores))
}

/// The continuations of a finished run with these settings; `None` if they do not say it.
fn n_rows_of(run: &RunInfo) -> Option<u64> {
    let number = |name: &str| run.settings.get(name)?.as_u64();
    number("n_generations").or_else(|| number("n_prompts")?.checked_mul(u64::from(run.k)))
}

/// The tokens behind the perplexity of a run; `None` if it has no perplexity.
pub(super) fn perplexity_tokens(
    info: &RunInfo,
    generations: &[Generation],
    scores: &[ScoreRow],
) -> Option<PerplexityTokens> {
    // An older version did not name them. It tokenised the text again if there was a base model.
    let has_base = info.settings.contains_key("base");
    let older = if has_base { PerplexityTokens::Retokenised } else { PerplexityTokens::WithoutIds };
    let of_row = |(generation, score): (&Generation, &ScoreRow)| {
        score.base.base_logprob?;
        Some(match score.base.perplexity_tokens {
            Some(PerplexityTokens::Sampled) if generation.token_ids.is_none() => PerplexityTokens::WithoutIds,
            Some(tokens) => tokens,
            None => older,
        })
    };
    let mut found = generations.iter().zip(scores).filter_map(of_row);
    let first = found.next()?;
    Some(if found.all(|tokens| tokens == first) { first } else { PerplexityTokens::WithoutIds })
}

/// The rows in the `scores.jsonl` of an interrupted run.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct ScoresThere {
    /// Rows before the first one that a crash tore.
    pub n_rows: usize,
    /// Whether a row has a base log-prob, and the tokens behind the first if its row names them.
    pub tokens: Option<Option<PerplexityTokens>>,
}

/// Looks into `scores.jsonl`, which need not exist.
pub(super) fn peek_scores(folder: &Path, generations: &[Generation]) -> Result<ScoresThere> {
    let path = folder.join("scores.jsonl");
    let bytes = match std::fs::read(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(ScoresThere::default()),
        bytes => bytes.map_err(Error::io("read", &path))?,
    };
    let mut there = ScoresThere::default();
    let lines = bytes.split_inclusive(|&byte| byte == b'\n').filter(|line| line.ends_with(b"\n"));
    let rows = lines.map_while(|line| serde_json::from_slice::<ScoreRow>(line).ok());
    for (row, _) in rows.zip(generations).take_while(|(row, of)| row.is_of(of) && row.is_possible(of)) {
        there.n_rows += 1;
        if there.tokens.is_none() && row.base.base_logprob.is_some() {
            there.tokens = Some(row.base.perplexity_tokens);
        }
    }
    Ok(there)
}

fn read_rows<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<Vec<T>> {
    let text = match std::fs::read(path) {
        // An interrupted run may not have this file yet.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        bytes => bytes.map_err(Error::io("read", path))?,
    };
    let text = String::from_utf8_lossy(&text);
    let parse = |(i, line): (usize, &str)| {
        let fault =
            |e| Error::input(path, Some(i + 1), format!("expected a row of a run: {e}")).with_hint(REPEAT);
        serde_json::from_str(line).map_err(fault)
    };
    text.lines().enumerate().map(parse).collect()
}

/// Writes `run.json`; refuses a folder whose `run.json` has other settings.
pub(super) fn start(folder: &Path, info: &RunInfo, paths: ModelPaths) -> Result<()> {
    // The same models may be given by other paths when a run resumes.
    let there = file::peek_record(folder).and_then(|text| serde_json::from_str::<Record>(&text).ok());
    let paths = match there {
        Some(there) => there.paths,
        None => Some(paths).filter(|paths| *paths != ModelPaths::default()),
    };
    let record = Record {
        format: FORMAT,
        llama_cpp: engine::llama_version(),
        system: engine::system_info(),
        run: info.clone(),
        paths,
    };
    file::start_record(folder, &record)
}

/// Joins each continuation with its measurements.
pub(super) fn join(
    folder: &Path,
    generations: Vec<Generation>,
    scores: Vec<ScoreRow>,
) -> Result<Vec<Sample>> {
    let one = |(i, (g, s)): (usize, (Generation, ScoreRow))| {
        if !s.is_of(&g) {
            let reason = format!("expected sample {} of prompt {:?}", g.sample, g.prompt_id);
            let path = folder.join("scores.jsonl");
            return Err(Error::input(path, Some(i + 1), reason).with_hint(REPEAT));
        }
        Ok(Sample {
            prompt_id: g.prompt_id,
            language: g.language,
            sample: g.sample,
            prompt: g.prompt,
            text: g.generated_text,
            tokens: s.tokens,
            n_tokens: g.n_tokens,
            logprob: s.base.base_logprob,
            base_n_tokens: s.base.base_n_tokens,
            toxicity: s.toxicity,
            detected_language: s.detected_language,
            language_kept: s.language_kept,
        })
    };
    generations.into_iter().zip(scores).enumerate().map(one).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn impossible_values_are_found() {
        let generation = |n_tokens: u32, logprobs: &[f32]| -> Generation {
            let row = json!({"prompt": "p", "generated_text": "x y", "prompt_id": "0", "language": "en", "sample": 0});
            let row: Generation = serde_json::from_value(row).unwrap();
            let (token_ids, token_logprobs) = (Some(vec![1, 2]), Some(logprobs.to_vec()));
            let logprob = Some(logprobs.iter().map(|&l| f64::from(l)).sum());
            Generation { n_tokens: Some(n_tokens), logprob, token_ids, token_logprobs, ..row }
        };
        let good = generation(2, &[-1.0, -2.0]);
        assert!(good.is_possible());
        for bad in [generation(50_000, &[-1.0, -2.0]), generation(2, &[-1.0]), generation(2, &[0.5, -2.0])] {
            assert!(!bad.is_possible(), "{bad:?}");
        }
        let is_possible = |toxicity: f64, sum: f64, n: u32| {
            let base =
                BaseLogprob { base_logprob: Some(sum), base_n_tokens: Some(n), ..BaseLogprob::default() };
            let row = ScoreRow {
                prompt_id: "0".into(),
                language: "en".into(),
                sample: 0,
                toxicity: BTreeMap::from([("lexical".into(), Some(toxicity))]),
                errors: BTreeMap::new(),
                detected_language: None,
                language_kept: None,
                base,
                tokens: Vec::new(),
            };
            row.is_possible(&good)
        };
        assert!(is_possible(0.5, -3.0, 2) && is_possible(1.0, 0.0, 0));
        assert!(!is_possible(7.5, -3.0, 2) && !is_possible(0.5, 3.0, 2));
        assert!(!is_possible(0.5, -3.0, 0) && !is_possible(0.5, -9999.0, 2));
    }
}
