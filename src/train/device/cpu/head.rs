//! Log-probabilities of the tokens that are predicted.

use rayon::prelude::*;

use crate::train::data::pack::Output;

use crate::train::device::cpu::math::{exp, sum_of};

/// Log-probabilities of `outputs` under `logits[outputs][n_vocab] * scale`; with `gradient`, the logits become
/// their gradients.
///
/// Sums are in f64: a vocabulary has a quarter of a million tokens.
pub fn logprobs(
    outputs: &[Output],
    scale: f32,
    n_vocab: usize,
    gradient: bool,
    logits: &mut [f32],
) -> Vec<f32> {
    logits
        .par_chunks_exact_mut(n_vocab)
        .zip(outputs)
        .map(|(row, output)| {
            let most = row.iter().fold(f32::NEG_INFINITY, |most, &x| most.max(x * scale));
            let mut sum = 0.0f64;
            let chosen = row[output.token as usize] * scale;
            for chunk in row.chunks_mut(4096) {
                if gradient {
                    chunk.iter_mut().for_each(|x| *x = exp(*x * scale - most));
                    sum += f64::from(sum_of(chunk, |x| x));
                } else {
                    sum += f64::from(sum_of(chunk, |x| exp(x * scale - most)));
                }
            }
            if gradient {
                let factor = (-f64::from(scale) / sum) as f32;
                row.iter_mut().for_each(|x| *x *= factor);
                row[output.token as usize] += scale;
            }
            (f64::from(chosen) - f64::from(most) - sum.ln()) as f32
        })
        .collect()
}
