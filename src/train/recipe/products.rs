//! How the CPU multiplies by frozen matrices.

use serde::{Deserialize, Serialize};

/// Precision of products with frozen matrices on the CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Products {
    /// Dequantised, in f32.
    Exact,
    /// Quantised matrices only: the other operand is rounded to 8 bits in blocks of 32. On CPUs with AVX-512 VNNI this
    /// program's kernels run, which round the matrix too; elsewhere ggml's kernels run, and the backward pass uses a
    /// transposed copy in Q8_0.
    Fast,
}
