//! Rotary position embedding.

use crate::train::device::{Rope, RopePairs};

use crate::train::device::cpu::parallel::for_rows;

/// Rotates the heads of `x[R][heads][head_dim]` by their row's position, forward or back.
pub fn rope(rope: &Rope, positions: &[usize], head_dim: usize, back: bool, x: &mut [f32]) {
    if positions.is_empty() {
        return;
    }
    let n_cols = x.len() / positions.len();
    let n_pairs = rope.frequencies.len();
    for_rows(x, n_cols, |first, rows| {
        let mut turns = vec![(0.0f32, 0.0f32); n_pairs];
        for (row, x) in rows.chunks_exact_mut(n_cols).enumerate() {
            let position = positions[first + row] as f32;
            for (turn, &frequency) in turns.iter_mut().zip(&rope.frequencies) {
                let (sin, cos) = (position * frequency).sin_cos();
                *turn = (if back { -sin } else { sin }, cos);
            }
            for head in x.chunks_exact_mut(head_dim) {
                for (i, &(sin, cos)) in turns.iter().enumerate() {
                    let (a, b) = match rope.pairs {
                        RopePairs::Adjacent => (2 * i, 2 * i + 1),
                        RopePairs::Halves => (i, i + n_pairs),
                    };
                    let (x0, x1) = (head[a], head[b]);
                    head[a] = x0 * cos - x1 * sin;
                    head[b] = x0 * sin + x1 * cos;
                }
            }
        }
    });
}
