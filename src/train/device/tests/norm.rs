//! Norms over rows.

use crate::train::device::tests::{HELD, Random, SUMS, Tested, assert_close, assert_gradient, oracle};
use crate::train::device::{Norm, NormKind};

const KINDS: [NormKind; 2] = [NormKind::Rms, NormKind::Layer];

/// Rows and columns; the last are more than one task takes, so that sums over rows have two parts.
const SIZES: [[usize; 2]; 6] = [[1, 1], [1, 7], [5, 16], [3, 33], [2, 64], [600, 33]];

/// The norm in f64.
fn normed(norm: Norm, x: &[f32]) -> Vec<f64> {
    let n = x.len() as f64;
    let x: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
    let mean = if norm.kind == NormKind::Layer { x.iter().sum::<f64>() / n } else { 0.0 };
    let square = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
    x.iter().map(|x| (x - mean) / (square + f64::from(norm.epsilon)).sqrt()).collect()
}

fn forward(
    device: &impl Tested,
    norm: Norm,
    x: &Vec<f32>,
    weight: &Vec<f32>,
    bias: Option<&Vec<f32>>,
) -> Vec<f32> {
    let mut y = vec![f32::NAN; x.len()];
    device.norm(norm, x, weight, bias, weight.len(), &mut y).unwrap();
    y
}

pub fn norms_match_their_formulas<D: Tested>(device: &D) {
    let mut random = Random::new(12);
    for kind in KINDS {
        let norm = Norm { kind, epsilon: 1e-5 };
        for [n_rows, n_cols] in SIZES {
            // A mean that is large compared with the deviation, as in a residual stream.
            let x: Vec<f32> = random.numbers(n_rows * n_cols).into_iter().map(|x| 2.0 + x).collect();
            let (weight, bias) = (random.numbers(n_cols), random.numbers(n_cols));
            let of_rows = x.chunks_exact(n_cols).flat_map(|row| normed(norm, row));
            let weighted: Vec<f64> =
                of_rows.enumerate().map(|(i, x)| x * f64::from(weight[i % n_cols])).collect();
            let what = format!("{kind:?} of {n_rows} rows of {n_cols}");
            assert_close(&forward(device, norm, &x, &weight, None), &weighted, SUMS, &what);
            let shifted: Vec<f64> =
                weighted.iter().enumerate().map(|(i, y)| y + f64::from(bias[i % n_cols])).collect();
            assert_close(&forward(device, norm, &x, &weight, Some(&bias)), &shifted, SUMS, &what);
        }
    }
}

pub fn gradients_of_norms_match_finite_differences<D: Tested>(device: &D) {
    let mut random = Random::new(13);
    for kind in KINDS {
        // Not fewer columns: a norm of few numbers is nearly a step function of the only large one.
        let norm = Norm { kind, epsilon: 0.05 };
        for [n_rows, n_cols] in [[1, 7], [5, 16], [3, 33], [2, 64]] {
            let x = random.numbers(n_rows * n_cols);
            let (weight, bias) = (random.numbers(n_cols), random.numbers(n_cols));
            let dy = random.numbers(x.len());
            let (mut dx, mut dweight, mut dbias) =
                (vec![HELD; x.len()], vec![HELD; n_cols], vec![HELD; n_cols]);
            let of_weights = (Some(&mut dweight), Some(&mut dbias));
            device.norm_back(norm, &x, &weight, &dy, n_cols, &mut dx, of_weights.0, of_weights.1).unwrap();
            let what = |of: &str| format!("{of} of {kind:?} of {n_rows} rows of {n_cols}");
            assert_gradient(&dx, &x, &dy, |x| forward(oracle(), norm, x, &weight, Some(&bias)), &what("x"));
            assert_gradient(
                &dweight,
                &weight,
                &dy,
                |w| forward(oracle(), norm, &x, w, Some(&bias)),
                &what("weight"),
            );
            assert_gradient(
                &dbias,
                &bias,
                &dy,
                |b| forward(oracle(), norm, &x, &weight, Some(b)),
                &what("bias"),
            );
            let mut alone = vec![HELD; x.len()];
            device.norm_back(norm, &x, &weight, &dy, n_cols, &mut alone, None, None).unwrap();
            assert_eq!(alone, dx, "dweight and dbias do not change dx");
        }
    }
}

pub fn gradients_of_weights_are_sums_over_all_rows<D: Tested>(device: &D) {
    let (mut random, [n_rows, n_cols]) = (Random::new(14), [600, 33]);
    for kind in KINDS {
        let norm = Norm { kind, epsilon: 1e-5 };
        let (x, dy, weight) =
            (random.numbers(n_rows * n_cols), random.numbers(n_rows * n_cols), random.numbers(n_cols));
        let (mut dx, mut dweight, mut dbias) = (vec![0.0; x.len()], vec![HELD; n_cols], vec![HELD; n_cols]);
        let of_weights = (Some(&mut dweight), Some(&mut dbias));
        device.norm_back(norm, &x, &weight, &dy, n_cols, &mut dx, of_weights.0, of_weights.1).unwrap();
        let (mut of_weight, mut of_bias) = (vec![f64::from(HELD); n_cols], vec![f64::from(HELD); n_cols]);
        for (x, dy) in x.chunks_exact(n_cols).zip(dy.chunks_exact(n_cols)) {
            for (c, (n, &dy)) in normed(norm, x).into_iter().zip(dy).enumerate() {
                of_weight[c] += n * f64::from(dy);
                of_bias[c] += f64::from(dy);
            }
        }
        assert_close(&dweight, &of_weight, SUMS, "weight");
        assert_close(&dbias, &of_bias, SUMS, "bias");
    }
}

pub fn an_rms_norm_of_one_number_is_its_sign_and_a_layer_norm_is_zero<D: Tested>(device: &D) {
    let (x, weight) = (vec![-3.0, 0.5], vec![2.0]);
    // x / |x|, and 0 / sqrt(epsilon).
    let rms = forward(device, Norm { kind: NormKind::Rms, epsilon: 0.0 }, &x, &weight, None);
    assert_eq!(rms, [-2.0, 2.0]);
    let layer = forward(device, Norm { kind: NormKind::Layer, epsilon: 1e-5 }, &x, &weight, None);
    assert_eq!(layer, [0.0, 0.0]);
}
