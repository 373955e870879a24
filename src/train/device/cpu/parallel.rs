//! Splits rows among threads.
//!
//! The parts do not depend on the threads that take them, so that sums have the same bits every time.

use rayon::prelude::*;

/// Numbers that make a task worthwhile.
const TASK_LEN: usize = 1 << 14;

/// Rows of `n_cols` numbers per task.
pub fn rows_per_task(n_cols: usize) -> usize {
    (TASK_LEN / n_cols.max(1)).max(1)
}

/// Calls `f(first row, rows)` for each part of `y`, whose rows have `n_cols` numbers.
pub fn for_rows(y: &mut [f32], n_cols: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
    let n = rows_per_task(n_cols);
    y.par_chunks_mut(n * n_cols).enumerate().for_each(|(i, part)| f(i * n, part));
}

/// Calls `add(row, sums)` for `n_rows` rows, to add each to `sums`.
///
/// Each part of fixed length has its own sums; these are added in order.
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
