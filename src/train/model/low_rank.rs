//! The trained low-rank change of a matrix: LoRA (arXiv 2106.09685).
//!
//! W becomes `W + s B A` with `s = alpha / rank` ([`lora::scale`](crate::steer::lora::scale)). This file is the
//! only one of the trainer that multiplies by s.

use rand_chacha::ChaCha8Rng;
use rand_core::Rng;

use crate::error::Result;

use crate::train::device::{Device, Gemm};
use crate::train::model::gemm::{a_b, a_bt, accumulate, at_b};
use crate::train::model::parameters::ParameterId;
use crate::train::model::pass::Pass;

/// The two factors of a change.
///
/// For the token embeddings, whose rows are looked up, A is `[n_vocab][rank]` and B `[n_embd][rank]`: the row
/// of token t changes by `s B A[t]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LowRank {
    /// Rows of A and columns of B.
    pub rank: usize,
    /// A, `[rank][n_in]`.
    pub a: ParameterId,
    /// B, `[n_out][rank]`.
    pub b: ParameterId,
}

impl LowRank {
    /// `y += s xa Bᵀ`: the second product of the forward pass.
    ///
    /// `xa` is the input times Aᵀ, `[n_rows][rank]`, and `y` `[n_rows][n_out]`.
    ///
    /// # Errors
    /// Those of the device.
    pub fn forward<D: Device>(
        &self,
        pass: &Pass<'_, D>,
        s: f32,
        [n_rows, n_out]: [usize; 2],
        xa: &D::Buffer,
        y: &mut D::Buffer,
    ) -> Result<()> {
        let gemm = Gemm { alpha: s, ..accumulate(a_bt([n_rows, n_out, self.rank])) };
        pass.device.gemm(gemm, xa, &pass.values[self.b], y)
    }

    /// The derivatives of [`LowRank::forward`]: adds B's, `dB += s dyᵀ xa`, and returns the input's,
    /// `dxa = s dy B`, `[n_rows][rank]`.
    ///
    /// # Errors
    /// Those of the device.
    pub fn backward<D: Device>(
        &self,
        pass: &Pass<'_, D>,
        s: f32,
        [n_rows, n_out]: [usize; 2],
        gradients: &mut [D::Buffer],
        xa: &D::Buffer,
        dy: &D::Buffer,
    ) -> Result<D::Buffer> {
        let db = Gemm { alpha: s, ..accumulate(at_b([n_out, self.rank, n_rows])) };
        pass.device.gemm(db, dy, xa, &mut gradients[self.b])?;
        let mut dxa = pass.device.space(n_rows * self.rank)?;
        let product = Gemm { alpha: s, ..a_b([n_rows, self.rank, n_out]) };
        pass.device.gemm(product, dy, &pass.values[self.b], &mut dxa)?;
        Ok(dxa)
    }
}

/// Initial values of A, `[n_rows][n_cols]`: uniform in ±1 / sqrt(fan_in).
///
/// This is what PEFT's `kaiming_uniform_(a=sqrt(5))` amounts to.
pub(super) fn initial_a(random: &mut ChaCha8Rng, n_rows: usize, n_cols: usize, fan_in: usize) -> Vec<f32> {
    let bound = 1.0 / (fan_in as f32).sqrt();
    // The upper 24 bits: an f32 holds them exactly.
    let unit = |bits: u32| (bits >> 8) as f32 / (1u32 << 24) as f32;
    (0..n_rows * n_cols).map(|_| bound * (2.0 * unit(random.next_u32()) - 1.0)).collect()
}
