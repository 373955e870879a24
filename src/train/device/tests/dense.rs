//! Products of dense matrices.

use crate::train::device::Gemm;
use crate::train::device::tests::{Random, Tested, assert_within};

const SIZES: [[usize; 3]; 6] = [[1, 1, 1], [1, 7, 33], [5, 1, 16], [17, 9, 1], [16, 32, 64], [33, 70, 45]];

/// An element of a matrix `[n_rows][n_cols]`, which may be stored transposed.
fn at(matrix: &[f32], [row, col]: [usize; 2], [n_rows, n_cols]: [usize; 2], is_transposed: bool) -> f32 {
    if is_transposed { matrix[col * n_rows + row] } else { matrix[row * n_cols + col] }
}

pub fn dense_products_match_three_loops<D: Tested>(device: &D) {
    let mut random = Random::new(1);
    for [m, n, k] in SIZES {
        for (transpose_a, transpose_b) in [(false, false), (false, true), (true, false), (true, true)] {
            for (alpha, beta) in [(1.0, 0.0), (-0.5, 1.0), (2.0, 0.75)] {
                let (a, b, mut c) = (random.numbers(m * k), random.numbers(k * n), random.numbers(m * n));
                let (mut expected, mut bounds) = (Vec::new(), Vec::new());
                for row in 0..m {
                    for col in 0..n {
                        let a = (0..k).map(|i| at(&a, [row, i], [m, k], transpose_a));
                        let b = (0..k).map(|i| at(&b, [i, col], [k, n], transpose_b));
                        let held = f64::from(beta) * f64::from(c[row * n + col]);
                        let (dot, magnitude) = super::dot_and_magnitude(a, b);
                        expected.push(held + f64::from(alpha) * dot);
                        bounds.push(f64::from(alpha).abs() * super::rounding(D::DENSE) * magnitude);
                    }
                }
                let gemm = Gemm { m, n, k, transpose_a, transpose_b, alpha, beta };
                device.gemm(gemm, &a, &b, &mut c).unwrap();
                assert_within(&c, &expected, &bounds, &format!("{gemm:?}"));
            }
        }
    }
}

pub fn the_old_result_is_not_read_if_beta_is_zero<D: Tested>(device: &D) {
    let gemm = Gemm { m: 3, n: 5, k: 2, transpose_a: false, transpose_b: false, alpha: 1.0, beta: 0.0 };
    let mut c = vec![f32::NAN; 15];
    device.gemm(gemm, &vec![1.0; 6], &vec![2.0; 10], &mut c).unwrap();
    assert_eq!(c, [4.0; 15]);
}
