//! Rotary position embedding.

use crate::train::device::tests::{
    HELD, Random, SUMS, Tested, assert_close, assert_gradient, oracle, packed,
};
use crate::train::device::{Device, Rope, RopePairs};

const LENGTHS: [&[[usize; 3]]; 2] = [&[[1, 1, 1]], &[[3, 4, 2], [1, 9, 6]]];

/// Number of heads, size of a head, and rotated numbers per head.
const HEADS: [[usize; 3]; 4] = [[1, 2, 2], [3, 8, 8], [2, 12, 6], [5, 7, 2]];

fn ropes(n_rot: usize) -> [Rope; 2] {
    let frequencies: Vec<f32> = (0..n_rot / 2).map(|i| 0.7 / (1.0 + i as f32)).collect();
    [RopePairs::Adjacent, RopePairs::Halves].map(|pairs| Rope { pairs, frequencies: frequencies.clone() })
}

/// Each pair as a complex number, multiplied by e^(i angle).
fn expected(rope: &Rope, positions: &[usize], head_dim: usize, x: &[f32]) -> Vec<f64> {
    let n_pairs = rope.frequencies.len();
    let n_cols = x.len() / positions.len();
    let mut y: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
    for (row, &position) in positions.iter().enumerate() {
        for head in (row * n_cols..(row + 1) * n_cols).step_by(head_dim) {
            for (i, &frequency) in rope.frequencies.iter().enumerate() {
                let (a, b) = match rope.pairs {
                    RopePairs::Adjacent => (head + 2 * i, head + 2 * i + 1),
                    RopePairs::Halves => (head + i, head + n_pairs + i),
                };
                let (sin, cos) = (position as f64 * f64::from(frequency)).sin_cos();
                (y[a], y[b]) = (y[a] * cos - y[b] * sin, y[a] * sin + y[b] * cos);
            }
        }
    }
    y
}

pub fn heads_are_rotated_by_their_positions_and_back<D: Tested>(device: &D) {
    let mut random = Random::new(16);
    for lengths in LENGTHS {
        let packed = packed(lengths);
        let rows = device.rows(&packed).unwrap();
        for [n_heads, head_dim, n_rot] in HEADS {
            for rope in ropes(n_rot) {
                let x = random.numbers(packed.n_rows() * n_heads * head_dim);
                let what = format!("{rope:?} of {n_heads} heads of {head_dim}");
                let forward = |x: &Vec<f32>| {
                    let mut y = x.clone();
                    device.rope(&rope, &rows, head_dim, false, &mut y).unwrap();
                    y
                };
                let y = forward(&x);
                assert_close(&y, &expected(&rope, &packed.positions, head_dim, &x), SUMS, &what);
                let first = &y[..n_heads * head_dim];
                assert_eq!(first, &x[..n_heads * head_dim], "{what}: position 0 is not rotated");
                for (y, x) in y.chunks_exact(head_dim).zip(x.chunks_exact(head_dim)) {
                    assert_eq!(y[n_rot..], x[n_rot..], "{what}: the rest of a head is unchanged");
                }
                let mut back = y.clone();
                device.rope(&rope, &rows, head_dim, true, &mut back).unwrap();
                let same: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
                assert_close(&back, &same, 1e-6, &format!("{what}, and back"));
                // Rotating back turns the result's gradient into the input's, in place.
                let dy = random.numbers(x.len());
                let mut dx = dy.clone();
                device.rope(&rope, &rows, head_dim, true, &mut dx).unwrap();
                dx.iter_mut().for_each(|dx| *dx += HELD);
                let oracle_rows = oracle().rows(&packed).unwrap();
                let of_oracle = |x: &Vec<f32>| {
                    let mut y = x.clone();
                    oracle().rope(&rope, &oracle_rows, head_dim, false, &mut y).unwrap();
                    y
                };
                assert_gradient(&dx, &x, &dy, of_oracle, &what);
            }
        }
    }
}

pub fn a_batch_without_rows_is_not_rotated<D: Tested>(device: &D) {
    let rows = device.rows(&packed(&[])).unwrap();
    device.rope(&ropes(2)[0], &rows, 2, false, &mut Vec::new()).unwrap();
}
