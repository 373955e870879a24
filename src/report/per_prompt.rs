//! `per_prompt.jsonl`: the values behind the metrics, one line per prompt.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::error::Result;
use crate::eval::continuation::Sample;
use crate::eval::metric::{fluency, per_prompt};
use crate::eval::result::RunInfo;
use crate::eval::stats::bootstrap::midpoint_quantile;
use crate::file::json_lines;

/// One prompt. The lists have one value per continuation, in the order of `sample`.
#[derive(Debug, Serialize)]
struct Row<'a> {
    language: &'a str,
    prompt_id: &'a str,
    n: usize,
    /// By the scorer's name; null without a score.
    toxicity: BTreeMap<&'a str, Vec<Option<f64>>>,
    /// The maximum of `toxicity`.
    maximum_toxicity: BTreeMap<&'a str, Option<f64>>,
    /// Null for a blank continuation, or if it was not measured.
    perplexity: Vec<Option<f64>>,
    /// Of the perplexities that are not dropped for being too high.
    perplexity_median: Option<f64>,
    distinct_1: Option<f64>,
    distinct_2: Option<f64>,
    distinct_3: Option<f64>,
    repetition: Vec<Option<f64>>,
    language_kept: Vec<Option<bool>>,
    blank: Vec<bool>,
}

/// Formats the values of every prompt, in ascending order of language and prompt id.
///
/// # Errors
/// [`crate::Error::Scorer`] for a score outside [0, 1].
pub fn to_json_lines(run: &RunInfo, samples: &[Sample]) -> Result<String> {
    let scorers: Vec<&str> = run.scorers.iter().map(|scorer| scorer.name.as_str()).collect();
    let values = per_prompt::by_language(samples, &scorers, run.toxicity_threshold)?;
    let mut prompts: BTreeMap<(&str, &str), Vec<&Sample>> = BTreeMap::new();
    for sample in samples {
        prompts.entry((&sample.language, &sample.prompt_id)).or_default().push(sample);
    }
    // Both are in ascending order of language and prompt id.
    let rows = prompts.into_iter().zip(values.values().flatten()).map(|((key, mut samples), values)| {
        samples.sort_by_key(|sample| sample.sample);
        let (language, prompt_id) = key;
        let distinct = |index: usize| values.distinct.map(|distinct| distinct[index]);
        let scores = |name: &&'_ str| samples.iter().map(|sample| sample.toxicity_by(name)).collect();
        Row {
            language,
            prompt_id,
            n: samples.len(),
            toxicity: scorers.iter().map(|name| (*name, scores(name))).collect(),
            maximum_toxicity: (scorers.iter().zip(&values.toxicity))
                .map(|(name, found)| (*name, found.map(|found| found.max)))
                .collect(),
            perplexity: samples.iter().map(|sample| sample.perplexity()).collect(),
            perplexity_median: (!values.perplexities.is_empty())
                .then(|| midpoint_quantile(&values.perplexities, 0.5)),
            distinct_1: distinct(0),
            distinct_2: distinct(1),
            distinct_3: distinct(2),
            repetition: (samples.iter())
                .map(|sample| fluency::repetition(&sample.tokens).filter(|_| !sample.is_blank()))
                .collect(),
            language_kept: samples.iter().map(|sample| sample.language_kept).collect(),
            blank: samples.iter().map(|sample| sample.is_blank()).collect(),
        }
    });
    let bytes = json_lines(&rows.collect::<Vec<_>>())?;
    Ok(String::from_utf8(bytes).expect("JSON is UTF-8"))
}
