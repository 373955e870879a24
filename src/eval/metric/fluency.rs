//! Conditional perplexity and repetition: signs of broken or degenerate text.

use std::collections::HashSet;

/// Perplexities at or above this are dropped from the quartiles ("for sanity" in the paper's code).
pub const MAX_PERPLEXITY: f64 = 1e4;

/// Length of the n-grams of [`repetition`].
pub const REPETITION_N: usize = 2;

/// Conditional perplexity of a continuation given its prompt: exp(-`logprob` / `n_tokens`).
///
/// `logprob` is the sum of the tokens' natural log-probs. `None` without tokens or if `logprob` is NaN; a
/// `logprob` of minus infinity gives infinity. arXiv 2406.16235, section 3, uses mT5-XL, an
/// encoder-decoder that sees the text it predicts. Here the model is causal, so the values are not
/// comparable with the paper's.
pub fn perplexity(logprob: f64, n_tokens: u32) -> Option<f64> {
    (n_tokens > 0 && !logprob.is_nan()).then(|| (-logprob / f64::from(n_tokens)).exp())
}

/// Describes a log-probability that no continuation can have; `None` if it is possible.
///
/// The log-probs of certain tokens may exceed 0 by rounding. Minus infinity is that of an impossible token.
pub fn logprob_fault(logprob: f64) -> Option<String> {
    let is_possible = logprob <= MAX_LOGPROB;
    (!is_possible).then(|| format!("expected a log-probability of at most 0, found {logprob}"))
}

/// The largest sum of log-probs: 0, and what rounding may add.
const MAX_LOGPROB: f64 = 1e-3;

/// Fraction of the 2-grams in one continuation that repeat an earlier one.
///
/// That is 1 - distinct 2-grams / 2-grams: seq-rep-n of Welleck et al. 2020 (arXiv 1908.04319) with
/// n = 2 instead of 4, because continuations here have about 20 tokens. `None` with fewer than two tokens.
pub fn repetition<T: AsRef<str>>(tokens: &[T]) -> Option<f64> {
    let tokens: Vec<&str> = tokens.iter().map(AsRef::as_ref).collect();
    let n_grams = tokens.len().checked_sub(REPETITION_N - 1).filter(|&n| n > 0)?;
    let distinct: HashSet<&[&str]> = tokens.windows(REPETITION_N).collect();
    Some(1.0 - distinct.len() as f64 / n_grams as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn perplexity_matches_values_computed_by_hand() {
        // Three tokens with probability 1/8 each: logprob 3 ln(1/8), perplexity 8.
        let found = perplexity(3.0 * (0.125f64).ln(), 3).unwrap();
        assert!((found - 8.0).abs() < 1e-12);
        assert_eq!(perplexity(0.0, 5), Some(1.0), "certain tokens");
        assert_eq!(perplexity(f64::NEG_INFINITY, 5), Some(f64::INFINITY), "an impossible token");
    }

    #[test]
    fn a_log_probability_above_0_or_nan_is_impossible() {
        for possible in [0.0, -0.1, 1e-9, f64::NEG_INFINITY] {
            assert_eq!(logprob_fault(possible), None);
        }
        for impossible in [5.0, 0.01, f64::NAN, f64::INFINITY] {
            assert!(logprob_fault(impossible).unwrap().contains("at most 0, found"), "{impossible}");
        }
    }

    #[test]
    fn perplexity_without_tokens_or_of_nan_is_none() {
        assert_eq!(perplexity(-1.0, 0), None);
        assert_eq!(perplexity(f64::NAN, 3), None);
    }

    #[test]
    fn repetition_matches_values_computed_by_hand() {
        // "a b a b": pairs ab, ba, ab; two distinct of three, so 1/3 repeats.
        assert!((repetition(&["a", "b", "a", "b"]).unwrap() - 1.0 / 3.0).abs() < 1e-15);
        // "a a a a a": pairs aa four times; one distinct of four.
        assert_eq!(repetition(&["a"; 5]), Some(0.75));
        assert_eq!(repetition(&["a", "b", "c"]), Some(0.0));
    }

    #[test]
    fn a_single_token_has_no_repetition() {
        assert_eq!(repetition(&["a"]), None);
        assert_eq!(repetition::<&str>(&[]), None);
    }
}
