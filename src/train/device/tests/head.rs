//! Log-probabilities of the predicted tokens.

use std::ops::Range;

use crate::train::data::pack::Packed;
use crate::train::device::tests::{
    HELD, Random, SUMS, Tested, assert_close, assert_gradient, oracle, packed,
};

/// Nine outputs, of tokens below 5.
const LENGTHS: [[usize; 3]; 2] = [[2, 3, 2], [1, 1, 3]];

/// Runs [`Device::logprobs`] for the outputs of `range`, and checks that the other numbers stay.
fn logprobs<D: Tested>(
    device: &D,
    packed: &Packed,
    range: Range<usize>,
    (scale, n_vocab): (f32, usize),
    gradient: bool,
    logits: &mut Vec<f32>,
) -> Vec<f32> {
    let rows = device.rows(packed).unwrap();
    let mut logps = vec![HELD; packed.outputs.len()];
    logps[range.clone()].fill(f32::NAN);
    device.logprobs(&rows, range.clone(), scale, n_vocab, gradient, logits, &mut logps).unwrap();
    let others = logps[..range.start].iter().chain(&logps[range.end..]);
    assert!(others.into_iter().all(|x| *x == HELD), "{range:?}: numbers of other outputs");
    logps[range].to_vec()
}

const RANGES: [Range<usize>; 4] = [0..9, 0..1, 4..7, 8..9];

fn expected(packed: &Packed, range: Range<usize>, scale: f32, n_vocab: usize, logits: &[f32]) -> Vec<f64> {
    let rows = logits.chunks_exact(n_vocab).zip(&packed.outputs[range]);
    rows.map(|(row, output)| {
        let scaled: Vec<f64> = row.iter().map(|&x| f64::from(x) * f64::from(scale)).collect();
        let most = scaled.iter().copied().fold(f64::MIN, f64::max);
        let sum: f64 = scaled.iter().map(|x| (x - most).exp()).sum();
        scaled[output.token as usize] - most - sum.ln()
    })
    .collect()
}

pub fn log_probabilities_match_a_log_softmax<D: Tested>(device: &D) {
    let (packed, mut random) = (packed(&LENGTHS), Random::new(7));
    for range in RANGES {
        for (n_vocab, scale) in [(5, 1.0), (33, 0.0625), (5000, 1.0), (9001, 3.0)] {
            let mut logits: Vec<f32> =
                random.numbers(range.len() * n_vocab).into_iter().map(|x| 10.0 * x).collect();
            let (before, what) = (logits.clone(), format!("{range:?} of {n_vocab} tokens"));
            let kind = (scale, n_vocab);
            let logps = logprobs(device, &packed, range.clone(), kind, false, &mut logits);
            let expected = expected(&packed, range.clone(), scale, n_vocab, &before);
            assert_close(&logps, &expected, SUMS, &what);
            assert_eq!(logits, before, "{what}: only a gradient may overwrite logits");
            let with_gradient = logprobs(device, &packed, range.clone(), kind, true, &mut logits);
            assert_close(&with_gradient, &expected, SUMS, &what);
            for (row, output) in logits.chunks_exact(n_vocab).zip(&packed.outputs[range.clone()]) {
                let sum: f64 = row.iter().map(|&x| f64::from(x)).sum();
                assert!(sum.abs() < SUMS * f64::from(scale), "{what}: the gradient sums to {sum}");
                let (own, others) = (row[output.token as usize], row.iter().filter(|x| **x > 0.0).count());
                assert!(own > 0.0 && others == 1, "{what}: only the token's own logit raises it");
            }
        }
    }
}

pub fn gradients_of_log_probabilities_match_finite_differences<D: Tested>(device: &D) {
    let (packed, mut random) = (packed(&LENGTHS), Random::new(8));
    for range in RANGES {
        for (n_vocab, scale) in [(5, 1.0), (33, 0.5)] {
            let at = random.numbers(range.len() * n_vocab);
            let kind = (scale, n_vocab);
            let forward = |logits: &Vec<f32>| {
                logprobs(oracle(), &packed, range.clone(), kind, false, &mut logits.clone())
            };
            let mut gradient = at.clone();
            logprobs(device, &packed, range.clone(), kind, true, &mut gradient);
            gradient.iter_mut().for_each(|x| *x += HELD);
            assert_gradient(&gradient, &at, &vec![1.0; range.len()], forward, &format!("{range:?}"));
        }
    }
}

pub fn logits_far_apart_give_finite_log_probabilities_and_nan_gives_nan<D: Tested>(device: &D) {
    let packed = packed(&[[1, 1, 1]]);
    let token = packed.outputs[0].token as usize;
    let mut logits = vec![-3e4; 2 * 5];
    logits[token] = 3e4;
    logits[5 + (packed.outputs[1].token as usize + 1) % 5] = 3e4;
    let logps = logprobs(device, &packed, 0..2, (1.0, 5), true, &mut logits.clone());
    assert_eq!(logps, [0.0, -6e4]);
    logits[3] = f32::NAN;
    assert!(logprobs(device, &packed, 0..2, (1.0, 5), true, &mut logits)[0].is_nan());
}
