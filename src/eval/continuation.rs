//! One continuation and its measurements: the input of every metric.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::eval::metric::fluency;

/// One continuation of one prompt, with its measurements.
///
/// A measurement that was not made or that failed is `None`, never 0: a missing toxicity must not look
/// like a harmless text. Metrics accept samples in any order and expect each
/// (`language`, `prompt_id`, `sample`) once.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// The prompt's id, unique within its language. Comparisons match prompts by it.
    pub prompt_id: String,
    /// Language of the prompt, as a two-letter code such as `de`.
    pub language: String,
    /// Which of the k continuations of this prompt, from 0.
    pub sample: u32,
    /// The prompt, as the model saw it.
    pub prompt: String,
    /// The continuation, without the prompt.
    pub text: String,
    /// The continuation's tokens as text, for distinct-n and repetition.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tokens: Vec<String>,
    /// Number of tokens in the vocabulary of the model that wrote the continuation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub n_tokens: Option<u32>,
    /// Sum of the natural log-probs of the continuation's tokens given the prompt, under the base model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logprob: Option<f64>,
    /// Number of tokens in `logprob` if it differs from `n_tokens`: the base model has another
    /// vocabulary, or only one of the two counts an end-of-text token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_n_tokens: Option<u32>,
    /// Toxicity in [0, 1] by the scorer's name; `None` if the scorer gave no score.
    #[serde(default)]
    pub toxicity: BTreeMap<String, Option<f64>>,
    /// Language identified in the continuation; `None` if the text is too short.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detected_language: Option<String>,
    /// Whether the continuation is in the prompt's language; `None` if that cannot be decided.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub language_kept: Option<bool>,
}

impl Sample {
    /// Whether the continuation is empty or white space alone.
    pub fn is_blank(&self) -> bool {
        self.text.trim().is_empty()
    }

    /// Its perplexity; `None` for a blank one, or without a log-prob. The largest number stands for a larger one.
    pub fn perplexity(&self) -> Option<f64> {
        let n_tokens = self.base_n_tokens.or(self.n_tokens);
        let (sum, n) = self.logprob.zip(n_tokens).filter(|_| !self.is_blank())?;
        fluency::perplexity(sum, n).map(|perplexity| perplexity.min(f64::MAX))
    }

    /// The score by `scorer`; `None` if it is missing.
    pub fn toxicity_by(&self, scorer: &str) -> Option<f64> {
        self.toxicity.get(scorer).copied().flatten()
    }
}

/// The tokenizer of tests: words between white space.
#[cfg(test)]
pub(crate) fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_score_stays_missing_after_a_round_trip_through_json() {
        let sample = Sample {
            prompt_id: "1".into(),
            toxicity: BTreeMap::from([("a".into(), None), ("b".into(), Some(0.0))]),
            ..Sample::default()
        };
        let text = serde_json::to_string(&sample).unwrap();
        let back: Sample = serde_json::from_str(&text).unwrap();
        assert_eq!(back.toxicity_by("a"), None);
        assert_eq!(back.toxicity_by("b"), Some(0.0));
        assert_eq!(back.toxicity_by("d"), None, "a scorer that never ran");
    }

    #[test]
    fn white_space_alone_is_blank() {
        assert!(Sample { text: " \n\t".into(), ..Sample::default() }.is_blank());
        assert!(!Sample { text: " a".into(), ..Sample::default() }.is_blank());
    }
}
