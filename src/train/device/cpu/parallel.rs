//! Rows shared out among threads, in parts that do not depend on who takes them: sums stay the same to the bit.

use rayon::prelude::*;

/// Numbers that are worth a task of their own.
const TASK_LEN: usize = 1 << 14;

/// Rows of `n_cols` numbers in one task.
pub fn rows_per_task(n_cols: usize) -> usize {
    (TASK_LEN / n_cols.max(1)).max(1)
}

/// Calls `f(first row, rows)` for parts of `y`, rows of `n_cols` numbers.
pub fn for_rows(y: &mut [f32], n_cols: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
    let n = rows_per_task(n_cols);
    y.par_chunks_mut(n * n_cols).enumerate().for_each(|(i, part)| f(i * n, part));
}

/// The sum over the rows of what `add(row, sums)` adds to `sums[n_sums]`, for `n_rows` rows.
///
/// Parts are of fixed length and are added up in their order.
pub fn sum_over_rows(n_rows: usize, n_cols: usize, sums: &mut [f32], add: impl Fn(usize, &mut [f32]) + Sync) {
    let n = rows_per_task(n_cols);
    let parts: Vec<Vec<f32>> = (0..n_rows.div_ceil(n))
        .into_par_iter()
        .map(|part| {
            let mut sums_of_part = vec![0.0; sums.len()];
            for row in part * n..((part + 1) * n).min(n_rows) {
                add(row, &mut sums_of_part);
            }
            sums_of_part
        })
        .collect();
    for part in parts {
        sums.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
    }
}
