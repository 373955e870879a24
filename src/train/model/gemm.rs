//! The three matrix products that the passes use.

use crate::train::device::Gemm;

/// `C = A B`, with C `[m][n]`, A `[m][k]` and B `[k][n]`.
pub fn a_b([m, n, k]: [usize; 3]) -> Gemm {
    Gemm { m, n, k, transpose_a: false, transpose_b: false, alpha: 1.0, beta: 0.0 }
}

/// `C = A Bᵀ`, with C `[m][n]`, A `[m][k]` and B `[n][k]`.
pub fn a_bt(sizes: [usize; 3]) -> Gemm {
    Gemm { transpose_b: true, ..a_b(sizes) }
}

/// `C = Aᵀ B`, with C `[m][n]`, A `[k][m]` and B `[k][n]`.
pub fn at_b(sizes: [usize; 3]) -> Gemm {
    Gemm { transpose_a: true, ..a_b(sizes) }
}

/// `gemm` with `C +=` in place of `C =`.
pub fn accumulate(gemm: Gemm) -> Gemm {
    Gemm { beta: 1.0, ..gemm }
}
