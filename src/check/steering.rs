//! Compares two ways of steering one model, and measures its noise floor.

use crate::check::difference::{Difference, Sums};
use crate::check::logits::{nudge, open_for};
use crate::engine::{Model, SessionOptions, Steering, Token};
use crate::error::Result;
use crate::graph::steering::{Change, Edit};

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
    let mut sums = Sums::default();
    for text in texts {
        let (rows_a, rows_b) = (session_a.logits(text)?, session_b.logits(text)?);
        rows_a.iter().zip(&rows_b).for_each(|(a, b)| sums.add(a, b));
    }
    Ok(sums.difference())
}

/// The smallest difference that a comparison on this model can resolve.
///
/// Adds 0.001 to every neuron that `steering` edits, or to one neuron of the middle layer if it edits none. Without
/// quantisation the effect is close to 0. Products with quantised weights round activations to 8 bits, so even the
/// smallest change moves some of them by a whole step.
///
/// # Errors
/// Those of [`difference`]; also if the eval callback does not support the architecture.
pub fn noise_floor(
    model: &Model,
    steering: &Steering,
    texts: &[Vec<Token>],
    options: &SessionOptions,
) -> Result<Difference> {
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
