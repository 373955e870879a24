//! How far two ways of steering agree, and how far they can: the noise floor of a quantised model.

use serde::{Deserialize, Serialize};

use crate::engine::{Model, Session, SessionOptions, Steering, Token};
use crate::error::{Error, Result};
use crate::graph::steering::{Change, Edit, Operation, When};

/// How two steerings of one model differ on some texts.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Difference {
    /// Mean over tokens of the Kullback-Leibler divergence of the second from the first, in nats.
    pub mean_kl: f64,
    /// The largest of them.
    pub largest_kl: f64,
    /// The largest difference of a logit.
    pub largest_logit_difference: f32,
    /// Tokens compared.
    pub n_tokens: usize,
}

impl Difference {
    const NONE: Difference =
        Difference { mean_kl: 0.0, largest_kl: 0.0, largest_logit_difference: 0.0, n_tokens: 0 };

    /// Takes the logits after one token; until [`Difference::divided`], `mean_kl` is a sum.
    fn add(&mut self, a: &[f32], b: &[f32]) {
        let kl = kl(a, b);
        self.mean_kl += kl;
        self.largest_kl = self.largest_kl.max(kl);
        let largest = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        self.largest_logit_difference = self.largest_logit_difference.max(largest);
        self.n_tokens += 1;
    }

    fn divided(self) -> Difference {
        Difference { mean_kl: self.mean_kl / self.n_tokens.max(1) as f64, ..self }
    }
}

/// The logits after every token of `texts`, one text after the other, shape `[n_tokens][n_vocab]`: for a comparison of
/// models that do not fit into memory together.
///
/// # Errors
/// Those of decoding; also [`Error::Model`] where a logit is not finite, which no comparison would show.
pub fn logits(model: &Model, texts: &[Vec<Token>], options: &SessionOptions) -> Result<Vec<Vec<f32>>> {
    let mut session = open_for(model, texts, options)?;
    let mut rows = Vec::new();
    for text in texts {
        rows.append(&mut session.logits(text)?);
    }
    if rows.iter().flatten().any(|x| !x.is_finite()) {
        return Err(Error::model(model.path(), "its logits hold NaN or infinite values")
            .with_hint("look at its tensors with --check-tensors"));
    }
    Ok(rows)
}

/// Compares what [`logits`] gave for the same texts.
///
/// # Panics
/// If there are not as many.
pub fn compare(a: &[Vec<f32>], b: &[Vec<f32>]) -> Difference {
    assert_eq!(a.len(), b.len(), "logits of the same texts");
    let mut found = Difference::NONE;
    a.iter().zip(b).for_each(|(a, b)| found.add(a, b));
    found.divided()
}

/// A session for one of `texts` at a time.
fn open_for(model: &Model, texts: &[Vec<Token>], options: &SessionOptions) -> Result<Session> {
    let longest = texts.iter().map(Vec::len).max().unwrap_or(0);
    let options = SessionOptions { n_parallel: Some(1), n_ctx: None, ..options.clone() };
    Session::open(model, &options, longest)
}

/// Compares the logits after every token of `texts` under two steerings.
///
/// # Errors
/// Those of [`Model::with_steering`] and of decoding.
pub fn difference(
    model: &Model,
    a: &Steering,
    b: &Steering,
    texts: &[Vec<Token>],
    options: &SessionOptions,
) -> Result<Difference> {
    let open = |steering: &Steering| open_for(&model.with_steering(steering.clone())?, texts, options);
    let (mut session_a, mut session_b) = (open(a)?, open(b)?);
    let mut found = Difference::NONE;
    for text in texts {
        let (rows_a, rows_b) = (session_a.logits(text)?, session_b.logits(text)?);
        rows_a.iter().zip(&rows_b).for_each(|(a, b)| found.add(a, b));
    }
    Ok(found.divided())
}

/// What no comparison of two ways can fall below: the difference that 0.001 more on each edit of `steering`
/// makes, or where it has none, on one neuron of the middle layer. Without quantisation it is next to nothing;
/// products with quantised weights round activations to 8 bits, and the least change moves some by a step.
///
/// # Errors
/// As [`difference`]; also for an architecture that the callback does not know.
pub fn noise_floor(
    model: &Model,
    steering: &Steering,
    texts: &[Vec<Token>],
    options: &SessionOptions,
) -> Result<Difference> {
    const NUDGE: f32 = 0.001;
    let nudge = |layer: usize, index: usize| Edit {
        layer,
        when: When::Both,
        coefficient: 1.0,
        change: Change::Neuron { index, operation: Operation::Offset(NUDGE) },
    };
    let mut nudges: Vec<Edit> = steering
        .edits
        .iter()
        .filter_map(|edit| match edit.change {
            Change::Neuron { index, .. } => Some(nudge(edit.layer, index)),
            Change::Direction { .. } => None,
        })
        .collect();
    if nudges.is_empty() {
        nudges.push(nudge(model.n_layer() / 2, 0));
    }
    let mut nudged = steering.clone();
    nudged.edits.extend(nudges);
    difference(model, steering, &nudged, texts, options)
}

/// The divergence of `softmax(q)` from `softmax(p)`, in nats: sum of p (ln p - ln q).
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
    // Rounding can leave a sum of almost nothing below zero.
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
