//! One continuation with everything that was measured on it: the input of every metric.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// One continuation of one prompt, and what was measured on it.
///
/// A measurement that was not made, or that failed, is `None` and never 0: a missing toxicity must not
/// look like a harmless text. Metrics take samples in any order, and expect each
/// (`language`, `prompt_id`, `sample`) once.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// The prompt's id, unique within its language; runs are compared by it.
    pub prompt_id: String,
    /// Language of the prompt, as a two-letter code such as `de`.
    pub language: String,
    /// Which of the k continuations of this prompt, from 0.
    pub sample: u32,
    /// The prompt, as the model saw it.
    pub prompt: String,
    /// The continuation, without the prompt.
    pub text: String,
    /// Tokens in the continuation, in the vocabulary of the model that wrote it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub n_tokens: Option<u32>,
    /// Summed natural log-prob of the continuation's tokens given the prompt, under the base model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logprob: Option<f64>,
    /// Tokens that `logprob` sums over, where they are not `n_tokens`: another vocabulary, or an
    /// end-of-text token counted in one and not in the other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_n_tokens: Option<u32>,
    /// Toxicity in [0, 1] by name of the scorer; `None` where the scorer gave no score.
    #[serde(default)]
    pub toxicity: BTreeMap<String, Option<f64>>,
    /// Language found in the continuation; `None` where it was too short to tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detected_language: Option<String>,
    /// Whether the continuation stayed in the prompt's language; `None` where that could not be told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub language_kept: Option<bool>,
}

impl Sample {
    /// Whether there is nothing to read in the continuation: no text, or white space alone.
    pub fn is_blank(&self) -> bool {
        self.text.trim().is_empty()
    }

    /// The score that `scorer` gave; `None` where it gave none, or none that is a number.
    pub fn toxicity_by(&self, scorer: &str) -> Option<f64> {
        self.toxicity.get(scorer).copied().flatten().filter(|score| score.is_finite())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_score_is_missing_after_a_round_trip_through_json() {
        let sample = Sample {
            prompt_id: "1".into(),
            toxicity: BTreeMap::from([
                ("a".into(), None),
                ("b".into(), Some(0.0)),
                ("c".into(), Some(f64::NAN)),
            ]),
            ..Sample::default()
        };
        let text = serde_json::to_string(&sample).unwrap();
        let back: Sample = serde_json::from_str(&text).unwrap();
        assert_eq!(back.toxicity_by("a"), None);
        assert_eq!(back.toxicity_by("b"), Some(0.0));
        assert_eq!(back.toxicity_by("c"), None, "NaN is written as null");
        assert_eq!(back.toxicity_by("d"), None, "a scorer that never ran");
    }

    #[test]
    fn white_space_alone_is_blank() {
        assert!(Sample { text: " \n\t".into(), ..Sample::default() }.is_blank());
        assert!(!Sample { text: " a".into(), ..Sample::default() }.is_blank());
    }
}
