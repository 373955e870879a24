//! Sampling: from logits to a token, greedy or by temperature, top-k, top-p and min-p.
//!
//! The order is vLLM's, which the paper used: temperature first, then top-k, then top-p over the tokens that
//! top-k kept, then min-p. llama.cpp applies the temperature last; at temperature 1 the two agree.
//!
//! - `nucleus` applies top-k, top-p and min-p, and draws a token, without sorting the vocabulary.
//! - `softmax` has the fast sums of exponentials that both need.

mod nucleus;
mod softmax;

use rand_chacha::ChaCha8Rng;

use crate::error::{Error, Result};

use super::Token;
use super::random::uniform;
use nucleus::Nucleus;
use softmax::{Peaks, log_sum_exp};

/// How the next token is chosen.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Sampling {
    /// Divides the logits; 0 means greedy.
    pub temperature: f32,
    /// Keep this many of the most probable tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of most probable tokens with at least this mass; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens whose probability is below this fraction of the most probable one's; 0 keeps all.
    pub min_p: f32,
}

impl Sampling {
    /// Temperature 0.9, top-p 0.8, no top-k, no min-p (arXiv 2406.16235, section 3.1).
    pub const PAPER: Sampling = Sampling { temperature: 0.9, top_k: 0, top_p: 0.8, min_p: 0.0 };

    /// Always the most probable token; ties go to the smallest id.
    pub const GREEDY: Sampling = Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0 };

    /// Checks that every value is in its range; errors name the flag.
    pub fn validate(&self) -> Result<()> {
        let Sampling { temperature, top_p, min_p, .. } = *self;
        if !(temperature.is_finite() && temperature >= 0.0) {
            return Err(Error::setting(
                "--temp",
                format!("expected a number from 0 up, found {temperature}"),
            ));
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return Err(Error::setting(
                "--top-p",
                format!("expected a number above 0 and at most 1, found {top_p}"),
            ));
        }
        if !(0.0..=1.0).contains(&min_p) {
            return Err(Error::setting("--min-p", format!("expected a number from 0 to 1, found {min_p}")));
        }
        Ok(())
    }
}

/// A chosen token with its log-probability.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Choice {
    /// The token.
    pub token: Token,
    /// Its natural log-probability under the model itself: at temperature 1, with nothing cut.
    pub logprob: f64,
}

/// Chooses a token from one row of logits, shape `[n_vocab]`.
///
/// Returns `None` if the row contains NaN or has no finite value.
pub fn choose(logits: &[f32], sampling: &Sampling, random: &mut ChaCha8Rng) -> Option<Choice> {
    let peaks = Peaks::of(logits)?;
    let log_sum = log_sum_exp(logits, peaks.top);
    let logprob = |token: usize| f64::from(logits[token]) - log_sum;

    if sampling.temperature == 0.0 {
        let token = logits.iter().position(|&l| l == peaks.top)?;
        return Some(Choice { token: token as Token, logprob: logprob(token) });
    }

    let token = Nucleus::new(logits, &peaks, sampling).draw(uniform(random))?;
    Some(Choice { token: token as Token, logprob: logprob(token as usize) })
}

/// The natural log-probability of `token` under one row of logits, shape `[n_vocab]`.
///
/// Returns `None` if the token is out of range, or if the row contains NaN or has no finite value.
pub fn logprob(logits: &[f32], token: Token) -> Option<f64> {
    let logit = *logits.get(usize::try_from(token).ok()?)?;
    Some(f64::from(logit) - log_sum_exp(logits, Peaks::of(logits)?.top))
}

/// The natural log-probabilities of all tokens under one row of logits, shape `[n_vocab]`.
///
/// Returns `None` as [`logprob`] does.
pub fn log_softmax(logits: &[f32]) -> Option<Vec<f32>> {
    let sum = log_sum_exp(logits, Peaks::of(logits)?.top);
    Some(logits.iter().map(|&logit| (f64::from(logit) - sum) as f32).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::random::random_stream;

    /// Seeded logits, spread like a language model's.
    pub(super) fn logits(n: usize, seed: u64) -> Vec<f32> {
        let mut random = random_stream(seed, "logits", 0);
        (0..n)
            .map(|_| {
                ((uniform(&mut random) + uniform(&mut random) + uniform(&mut random)) * 12.0 - 18.0) as f32
            })
            .collect()
    }

    #[test]
    fn chosen_tokens_follow_the_distribution() {
        // Tokens 0 and 1 are kept, with probabilities 0.5 and 0.3: renormalised, 0.625 and 0.375.
        let row: Vec<f32> = [0.5f32, 0.3, 0.15, 0.05].iter().map(|p| p.ln()).collect();
        let sampling = Sampling { temperature: 1.0, top_p: 0.79, ..Sampling::PAPER };
        let n = 20_000;
        let zeros = (0..n)
            .filter(|&i| choose(&row, &sampling, &mut random_stream(1, "p", i)).unwrap().token == 0)
            .count();
        // The standard error of the share is sqrt(0.625 * 0.375 / 20000) = 0.0034; the bound is four of them.
        assert!((zeros as f64 / f64::from(n) - 0.625).abs() < 0.014, "{zeros} of {n}");
    }

    #[test]
    fn the_logprob_does_not_depend_on_the_temperature() {
        let row: Vec<f32> = [0.5f32, 0.3, 0.15, 0.05].iter().map(|p| p.ln() + 3.0).collect();
        for temperature in [0.0, 0.5, 2.0] {
            let sampling = Sampling { temperature, top_p: 0.4, ..Sampling::PAPER };
            let choice = choose(&row, &sampling, &mut random_stream(1, "p", 0)).unwrap();
            assert_eq!(choice.token, 0);
            assert!((choice.logprob - 0.5f64.ln()).abs() < 1e-6);
        }
    }

    #[test]
    fn greedy_breaks_ties_by_the_smallest_id() {
        let choice = choose(&[1.0, 5.0, 5.0, 2.0], &Sampling::GREEDY, &mut random_stream(0, "", 0)).unwrap();
        assert_eq!(choice.token, 1);
    }

    #[test]
    fn no_token_is_chosen_from_a_row_with_nan_or_without_a_finite_value() {
        let mut nan = logits(100, 3);
        nan[50] = f32::NAN;
        let none = vec![f32::NEG_INFINITY; 100];
        for row in [nan, none, vec![]] {
            assert_eq!(choose(&row, &Sampling::PAPER, &mut random_stream(0, "", 0)), None);
        }
    }

    #[test]
    fn a_token_with_a_logit_of_minus_infinity_is_never_chosen() {
        let row = [f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY];
        let open = Sampling { top_p: 1.0, ..Sampling::PAPER };
        for sampling in [Sampling::PAPER, open] {
            for sample in 0..100 {
                assert_eq!(choose(&row, &sampling, &mut random_stream(0, "", sample)).unwrap().token, 1);
            }
        }
    }

    #[test]
    fn rejects_settings_outside_their_ranges() {
        let bad = [
            Sampling { temperature: -1.0, ..Sampling::PAPER },
            Sampling { temperature: f32::NAN, ..Sampling::PAPER },
            Sampling { top_p: 0.0, ..Sampling::PAPER },
            Sampling { top_p: 1.5, ..Sampling::PAPER },
            Sampling { min_p: -0.1, ..Sampling::PAPER },
        ];
        for sampling in bad {
            assert!(sampling.validate().unwrap_err().is_usage());
        }
        assert!(Sampling::PAPER.validate().is_ok() && Sampling::GREEDY.validate().is_ok());
    }
}
