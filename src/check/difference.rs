//! The difference between two sets of logits.

use serde::{Deserialize, Serialize};

/// How far two sets of logits for the same tokens are apart. NaN if a logit is, or if no token was compared.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Difference {
    /// Mean over tokens of the KL divergence of the second set from the first, in nats.
    pub mean_kl: f64,
    /// The largest KL divergence of a token, in nats.
    pub largest_kl: f64,
    /// The largest absolute difference of a logit.
    pub largest_logit_difference: f32,
    /// Tokens compared.
    pub n_tokens: usize,
}

/// Compares the logits of two runs over the same tokens, each of shape `[n_tokens][n_vocab]`.
///
/// # Panics
/// If the numbers of tokens differ.
pub fn compare(a: &[Vec<f32>], b: &[Vec<f32>]) -> Difference {
    assert_eq!(a.len(), b.len(), "logits of the same tokens");
    let mut sums = Sums::default();
    a.iter().zip(b).for_each(|(a, b)| sums.add(a, b));
    sums.difference()
}

/// A [`Difference`] that is still being summed, one token at a time.
#[derive(Debug, Default)]
pub(super) struct Sums {
    kl: f64,
    largest_kl: f64,
    largest_logit_difference: f32,
    n_tokens: usize,
}

impl Sums {
    /// Adds the logits of one token, each of shape `[n_vocab]`.
    pub(super) fn add(&mut self, a: &[f32], b: &[f32]) {
        let kl = kl(a, b);
        self.kl += kl;
        self.largest_kl = larger(self.largest_kl, kl);
        let differences = a.iter().zip(b).map(|(a, b)| (a - b).abs());
        self.largest_logit_difference = differences.fold(self.largest_logit_difference, larger);
        self.n_tokens += 1;
    }

    /// The difference over all tokens added so far; its mean is NaN if there are none, so that no check passes.
    pub(super) fn difference(self) -> Difference {
        Difference {
            mean_kl: self.kl / self.n_tokens as f64,
            largest_kl: self.largest_kl,
            largest_logit_difference: self.largest_logit_difference,
            n_tokens: self.n_tokens,
        }
    }
}

/// The larger of two numbers, none of them negative; NaN if one is NaN, which `max` would drop.
fn larger<T: PartialOrd>(a: T, b: T) -> T {
    // A comparison with NaN is false: `a` stays if it is NaN, and `b` is taken if it is.
    if a >= b || !is_number(&a) { a } else { b }
}

fn is_number<T: PartialOrd>(x: &T) -> bool {
    x.partial_cmp(x).is_some()
}

/// The KL divergence of `softmax(q)` from `softmax(p)` in nats: the sum of p (ln p - ln q).
fn kl(p: &[f32], q: &[f32]) -> f64 {
    let log_sum = |row: &[f32]| {
        let highest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum = row.iter().map(|&x| f64::from(x - highest).exp()).sum::<f64>();
        f64::from(highest) + sum.ln()
    };
    let (sum_p, sum_q) = (log_sum(p), log_sum(q));
    let terms = p.iter().zip(q).map(|(&p, &q)| {
        let (log_p, log_q) = (f64::from(p) - sum_p, f64::from(q) - sum_q);
        log_p.exp() * (log_p - log_q)
    });
    let sum = terms.sum::<f64>();
    // Rounding can push a sum of almost 0 below 0. NaN stays NaN.
    if sum < 0.0 { 0.0 } else { sum }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nan_anywhere_makes_the_difference_nan() {
        let rows = [vec![1.0, 2.0], vec![3.0, 4.0]];
        for at in 0..2 {
            let mut other = rows.clone();
            other[at][1] = f32::NAN;
            for found in [compare(&rows, &other), compare(&other, &rows)] {
                assert!(found.mean_kl.is_nan() && found.largest_kl.is_nan(), "{found:?}");
                assert!(found.largest_logit_difference.is_nan(), "{found:?}");
            }
        }
        assert!(compare(&[], &[]).mean_kl.is_nan(), "no token was compared");
    }

    #[test]
    fn the_divergence_is_that_of_the_softmaxes() {
        assert_eq!(kl(&[1.0, 2.0], &[1.0, 2.0]), 0.0);
        assert!(kl(&[1.0, 2.0], &[101.0, 102.0]) < 1e-12);
        // (1/2, 1/2) from (1/4, 3/4): 1/2 ln 2 + 1/2 ln 2/3 = 1/2 ln 4/3.
        let expected = 0.5 * (4f64 / 3.0).ln();
        assert!((kl(&[0.0, 0.0], &[0.0, 3f32.ln()]) - expected).abs() < 1e-7);
    }
}
