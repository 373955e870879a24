//! Log-probabilities of the predicted tokens, and the loss.

use rayon::prelude::*;

use crate::train::data::pack::{Output, Packed};
use crate::train::recipe::dpo::{AnswerLogps, PairLoss, Preference};

use crate::train::device::cpu::math::{exp, sum_of};

/// Log-probabilities of `outputs` under `softmax(scale logits[outputs][n_vocab])`.
///
/// With `gradient`, the logits are overwritten with the log-probabilities' gradients. Sums are in f64, because a
/// vocabulary has up to a quarter of a million tokens.
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

/// Log-probabilities and loss of each pair; overwrites `dlogps[outputs]` with the gradient of the mean over `n_pairs`.
pub fn preference_loss(
    preference: Preference,
    packed: &Packed,
    references: &[AnswerLogps],
    n_pairs: usize,
    logps: &[f32],
    dlogps: &mut [f32],
) -> Vec<(AnswerLogps, PairLoss)> {
    assert_eq!(2 * references.len(), packed.answers.len(), "a reference for each pair");
    let sums = packed.sum_by_answer(logps);
    let pairs = sums.chunks_exact(2).zip(packed.answers.chunks_exact(2)).zip(references);
    let costs: Vec<(AnswerLogps, PairLoss)> = pairs
        .map(|((sums, answers), reference)| {
            let policy = AnswerLogps { chosen: sums[0], rejected: sums[1] };
            (policy, preference.of_pair(policy, *reference, answers[0].len(), answers[1].len()))
        })
        .collect();
    let n = n_pairs as f64;
    let slopes: Vec<f64> =
        costs.iter().flat_map(|(_, loss)| [loss.dchosen / n, loss.drejected / n]).collect();
    dlogps.copy_from_slice(&packed.spread_to_outputs(&slopes));
    costs
}
