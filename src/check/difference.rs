//! The difference between two sets of logits.

use serde::{Deserialize, Serialize};

/// How far two sets of logits for the same tokens are apart.
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
        self.largest_kl = self.largest_kl.max(kl);
        let largest = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        self.largest_logit_difference = self.largest_logit_difference.max(largest);
        self.n_tokens += 1;
    }

    /// The difference over all tokens added so far; zeros if there are none.
    pub(super) fn difference(self) -> Difference {
        Difference {
            mean_kl: self.kl / self.n_tokens.max(1) as f64,
            largest_kl: self.largest_kl,
            largest_logit_difference: self.largest_logit_difference,
            n_tokens: self.n_tokens,
        }
    }
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
    // Rounding can push a sum of almost 0 below 0.
    terms.sum::<f64>().max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_divergence_is_that_of_the_softmaxes() {
        assert_eq!(kl(&[1.0, 2.0], &[1.0, 2.0]), 0.0);
        assert!(kl(&[1.0, 2.0], &[101.0, 102.0]) < 1e-12);
        // (1/2, 1/2) from (1/4, 3/4): 1/2 ln 2 + 1/2 ln 2/3 = 1/2 ln 4/3.
        let expected = 0.5 * (4f64 / 3.0).ln();
        assert!((kl(&[0.0, 0.0], &[0.0, 3f32.ln()]) - expected).abs() < 1e-7);
    }
}
