//! Norms over rows.

use crate::train::device::{Norm, NormKind};

use crate::train::device::cpu::elementwise;
use crate::train::device::cpu::math::{sum_of, sum_of_pairs};
use crate::train::device::cpu::parallel::{for_rows, sum_over_rows};

/// The mean to subtract, and the inverse of the deviation.
fn statistics(norm: Norm, x: &[f32]) -> (f32, f32) {
    let n = x.len() as f32;
    let mean = match norm.kind {
        NormKind::Rms => 0.0,
        NormKind::Layer => sum_of(x, |x| x) / n,
    };
    let square = sum_of(x, |x| (x - mean) * (x - mean)) / n;
    (mean, 1.0 / (square + norm.epsilon).sqrt())
}

/// `y[R][C] = norm(x[R][C]) weight[C] + bias[C]`.
pub fn norm(norm: Norm, x: &[f32], weight: &[f32], bias: Option<&[f32]>, n_cols: usize, y: &mut [f32]) {
    for_rows(y, n_cols, |first, rows| {
        for (row, y) in rows.chunks_exact_mut(n_cols).enumerate() {
            let at = (first + row) * n_cols;
            let x = &x[at..at + n_cols];
            let (mean, inverse) = statistics(norm, x);
            for ((y, &x), &w) in y.iter_mut().zip(x).zip(weight) {
                *y = (x - mean) * inverse * w;
            }
            if let Some(bias) = bias {
                y.iter_mut().zip(bias).for_each(|(y, &b)| *y += b);
            }
        }
    });
}

/// Gradients of [`norm()`].
///
/// With r the inverse deviation, n = (x - mean) r and g = dy weight: dx = r (g - mean(g) - n mean(g n)). RMS norm,
/// which subtracts no mean, has no middle term.
#[allow(clippy::too_many_arguments, reason = "one operation's operands and gradients")]
pub fn norm_back(
    norm: Norm,
    x: &[f32],
    weight: &[f32],
    dy: &[f32],
    n_cols: usize,
    dx: &mut [f32],
    dweight: Option<&mut [f32]>,
    dbias: Option<&mut [f32]>,
) {
    for_rows(dx, n_cols, |first, rows| {
        let mut g = Vec::with_capacity(n_cols);
        for (row, dx) in rows.chunks_exact_mut(n_cols).enumerate() {
            let at = (first + row) * n_cols;
            let (x, dy) = (&x[at..at + n_cols], &dy[at..at + n_cols]);
            let (mean, inverse) = statistics(norm, x);
            g.clear();
            g.extend(dy.iter().zip(weight).map(|(&dy, &w)| dy * w));
            let n = n_cols as f32;
            let mean_g = match norm.kind {
                NormKind::Rms => 0.0,
                NormKind::Layer => sum_of(&g, |g| g) / n,
            };
            let mean_gn = sum_of_pairs(&g, x, |g, x| g * ((x - mean) * inverse)) / n;
            for ((dx, &x), &g) in dx.iter_mut().zip(x).zip(&g) {
                *dx += inverse * (g - mean_g - (x - mean) * inverse * mean_gn);
            }
        }
    });
    let n_rows = x.len() / n_cols;
    if let Some(dweight) = dweight {
        sum_over_rows(n_rows, n_cols, dweight, |row, sums| {
            let at = row * n_cols;
            let x = &x[at..at + n_cols];
            let (mean, inverse) = statistics(norm, x);
            for ((sum, &x), &dy) in sums.iter_mut().zip(x).zip(&dy[at..at + n_cols]) {
                *sum += dy * (x - mean) * inverse;
            }
        });
    }
    if let Some(dbias) = dbias {
        elementwise::sum_rows(dy, n_cols, dbias);
    }
}
