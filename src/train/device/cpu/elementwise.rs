//! Activations, sums, copies and table lookups.

use rayon::prelude::*;

use crate::train::device::Activation;

use crate::train::device::cpu::math::{sigmoid, tanh};
use crate::train::device::cpu::parallel::{for_rows, sum_over_rows};

/// Numbers per task.
const TASK_LEN: usize = 1 << 13;

/// sqrt(2 / pi).
const SQRT_2_OVER_PI: f32 = 0.797_884_6;
/// Coefficient of the cubic term in GELU's tanh approximation (arXiv 1606.08415).
const GELU_CUBIC: f32 = 0.044_715;

impl Activation {
    /// f(x).
    #[inline(always)]
    fn value(self, x: f32) -> f32 {
        match self {
            Activation::Silu => x * sigmoid(x),
            Activation::Gelu => 0.5 * x * (1.0 + gelu_tanh(x)),
        }
    }

    /// f(x) and f'(x).
    #[inline(always)]
    fn value_and_slope(self, x: f32) -> (f32, f32) {
        match self {
            Activation::Silu => {
                let s = sigmoid(x);
                (x * s, s * (1.0 + x * (1.0 - s)))
            }
            Activation::Gelu => {
                let t = gelu_tanh(x);
                let inner = SQRT_2_OVER_PI * (1.0 + 3.0 * GELU_CUBIC * x * x);
                (0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner)
            }
        }
    }
}

#[inline(always)]
fn gelu_tanh(x: f32) -> f32 {
    tanh(SQRT_2_OVER_PI * (x + GELU_CUBIC * x * x * x))
}

/// `y = f(gate) up`, or `f(gate)` without `up`.
pub fn activate(activation: Activation, gate: &[f32], up: Option<&[f32]>, y: &mut [f32]) {
    y.par_chunks_mut(TASK_LEN).enumerate().for_each(|(i, y)| {
        let at = i * TASK_LEN;
        let gate = &gate[at..at + y.len()];
        match up {
            Some(up) => {
                let up = &up[at..at + y.len()];
                for ((y, &g), &u) in y.iter_mut().zip(gate).zip(up) {
                    *y = activation.value(g) * u;
                }
            }
            None => y.iter_mut().zip(gate).for_each(|(y, &g)| *y = activation.value(g)),
        }
    });
}

/// Gradients of [`activate`]: `dgate += …`, `dup += …`.
pub fn activate_back(
    activation: Activation,
    gate: &[f32],
    up: Option<&[f32]>,
    dy: &[f32],
    dgate: &mut [f32],
    dup: Option<&mut [f32]>,
) {
    match (up, dup) {
        (Some(up), Some(dup)) => {
            let parts = dgate.par_chunks_mut(TASK_LEN).zip(dup.par_chunks_mut(TASK_LEN));
            parts.enumerate().for_each(|(i, (dgate, dup))| {
                let at = i * TASK_LEN;
                let end = at + dgate.len();
                let operands = gate[at..end].iter().zip(&up[at..end]).zip(&dy[at..end]);
                for ((dg, du), ((&g, &u), &dy)) in dgate.iter_mut().zip(dup).zip(operands) {
                    let (value, slope) = activation.value_and_slope(g);
                    *dg += dy * u * slope;
                    *du += dy * value;
                }
            });
        }
        _ => dgate.par_chunks_mut(TASK_LEN).enumerate().for_each(|(i, dgate)| {
            let at = i * TASK_LEN;
            let end = at + dgate.len();
            for (dg, (&g, &dy)) in dgate.iter_mut().zip(gate[at..end].iter().zip(&dy[at..end])) {
                *dg += dy * activation.value_and_slope(g).1;
            }
        }),
    }
}

/// `y = x` everywhere.
pub fn fill(x: f32, y: &mut [f32]) {
    y.par_chunks_mut(TASK_LEN).for_each(|y| y.fill(x));
}

/// `y = x`.
pub fn copy(x: &[f32], y: &mut [f32]) {
    y.par_chunks_mut(TASK_LEN).zip(x.par_chunks(TASK_LEN)).for_each(|(y, x)| y.copy_from_slice(x));
}

/// `y += scale x`.
pub fn add(scale: f32, x: &[f32], y: &mut [f32]) {
    y.par_chunks_mut(TASK_LEN).zip(x.par_chunks(TASK_LEN)).for_each(|(y, x)| {
        y.iter_mut().zip(x).for_each(|(y, &x)| *y += scale * x);
    });
}

/// `y[r] += bias` for every row.
pub fn add_to_rows(bias: &[f32], n_cols: usize, y: &mut [f32]) {
    for_rows(y, n_cols, |_, rows| {
        for row in rows.chunks_exact_mut(n_cols) {
            row.iter_mut().zip(bias).for_each(|(y, &b)| *y += b);
        }
    });
}

/// `dbias +=` the sum of all rows of `dy`.
pub fn sum_rows(dy: &[f32], n_cols: usize, dbias: &mut [f32]) {
    sum_over_rows(dy.len() / n_cols, n_cols, dbias, |row, sums| {
        let dy = &dy[row * n_cols..(row + 1) * n_cols];
        sums.iter_mut().zip(dy).for_each(|(sum, &x)| *sum += x);
    });
}

/// `x[r] *= factors[r]` for every row.
pub fn scale_rows(factors: &[f32], n_cols: usize, x: &mut [f32]) {
    for_rows(x, n_cols, |first, rows| {
        for (row, &factor) in rows.chunks_exact_mut(n_cols).zip(&factors[first..]) {
            row.iter_mut().for_each(|x| *x *= factor);
        }
    });
}

/// `dst[r][to .. to + n] += src[r][from .. from + n]` for every row.
pub fn add_columns(
    src: &[f32],
    src_cols: usize,
    from: usize,
    dst: &mut [f32],
    dst_cols: usize,
    to: usize,
    n: usize,
) {
    for_rows(dst, dst_cols, |first, rows| {
        for (row, dst) in rows.chunks_exact_mut(dst_cols).enumerate() {
            let at = (first + row) * src_cols + from;
            dst[to..to + n].iter_mut().zip(&src[at..at + n]).for_each(|(y, &x)| *y += x);
        }
    });
}

/// `y[r] = scale table[index(r)]`.
pub fn gather(
    table: &[f32],
    n_cols: usize,
    index: impl Fn(usize) -> usize + Sync,
    scale: f32,
    y: &mut [f32],
) {
    for_rows(y, n_cols, |first, rows| {
        for (row, y) in rows.chunks_exact_mut(n_cols).enumerate() {
            let at = index(first + row) * n_cols;
            y.iter_mut().zip(&table[at..at + n_cols]).for_each(|(y, &x)| *y = scale * x);
        }
    });
}

/// `dtable[index(r)] += scale dy[r]`, one row after the other, since two rows may have the same index.
pub fn scatter_add(
    dy: &[f32],
    n_cols: usize,
    index: impl Fn(usize) -> usize,
    scale: f32,
    dtable: &mut [f32],
) {
    for (row, dy) in dy.chunks_exact(n_cols).enumerate() {
        let at = index(row) * n_cols;
        dtable[at..at + n_cols].iter_mut().zip(dy).for_each(|(d, &x)| *d += scale * x);
    }
}

/// The sum of squares: over parts of fixed length, then over the parts in order.
pub fn square_sum(x: &[f32]) -> f64 {
    let parts: Vec<f64> =
        x.par_chunks(TASK_LEN).map(|part| part.iter().map(|&x| f64::from(x) * f64::from(x)).sum()).collect();
    parts.iter().sum()
}
