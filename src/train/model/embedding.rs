//! The token embeddings: a matrix whose rows are looked up.

use crate::error::Result;

use crate::train::device::{Device, Index};
use crate::train::model::linear::{Reduced, Weight};
use crate::train::model::low_rank::LowRank;
use crate::train::model::pass::Pass;

/// `x[i] = scale (E[token i] + s B A[token i])`.
#[derive(Debug)]
pub struct Embedding<D: Device> {
    /// Columns of E.
    pub n_embd: usize,
    /// Multiplies every row: Gemma's sqrt(n_embd), else 1.
    pub scale: f32,
    /// E, `[n_vocab][n_embd]`.
    pub weight: Weight<D>,
    /// A is `[n_vocab][rank]` here and B `[n_embd][rank]`.
    pub low_rank: Option<LowRank>,
}

impl<D: Device> Embedding<D> {
    /// Looks up the tokens of `rows`: `x`, `[n_rows][n_embd]`, and the rows of A, `[n_rows][rank]`.
    ///
    /// # Errors
    /// Those of the device.
    pub fn forward(
        &self,
        pass: &Pass<'_, D>,
        rows: &D::Rows,
        n_rows: usize,
    ) -> Result<(D::Buffer, Reduced<D>)> {
        let Pass { device, values, adapters } = pass;
        let mut x = device.space(n_rows * self.n_embd)?;
        match &self.weight {
            Weight::Frozen(matrix) => device.embed(matrix, rows, self.scale, &mut x)?,
            Weight::Trained(id) => {
                device.gather(&values[*id], self.n_embd, &Index::Token, rows, self.scale, &mut x)?;
            }
        }
        let mut reduced = None;
        if let (Some(low_rank), Some(s)) = (self.low_rank, adapters.lora_scale()) {
            let mut a = device.space(n_rows * low_rank.rank)?;
            device.gather(&values[low_rank.a], low_rank.rank, &Index::Token, rows, 1.0, &mut a)?;
            low_rank.forward(pass, self.scale * s, [n_rows, self.n_embd], &a, &mut x)?;
            reduced = Some(a);
        }
        Ok((x, reduced))
    }

    /// Adds the derivatives of [`Embedding::forward`] to `gradients`, given `dx`, `[n_rows][n_embd]`.
    ///
    /// - `dE[token i] += scale dx[i]`
    /// - `dB += scale s dxᵀ a`, and `dA[token i] += scale s dx[i] B`
    ///
    /// # Errors
    /// Those of the device.
    pub fn backward(
        &self,
        pass: &Pass<'_, D>,
        gradients: &mut [D::Buffer],
        rows: &D::Rows,
        reduced: &Reduced<D>,
        dx: &D::Buffer,
        n_rows: usize,
    ) -> Result<()> {
        let device = pass.device;
        if let Weight::Trained(id) = &self.weight {
            device.scatter_add(dx, self.n_embd, &Index::Token, rows, self.scale, &mut gradients[*id])?;
        }
        if let (Some(low_rank), Some(s), Some(a)) = (self.low_rank, pass.adapters.lora_scale(), reduced) {
            let LowRank { rank, a: id, .. } = low_rank;
            let da = low_rank.backward(pass, self.scale * s, [n_rows, self.n_embd], gradients, a, dx)?;
            device.scatter_add(&da, rank, &Index::Token, rows, 1.0, &mut gradients[id])?;
        }
        Ok(())
    }
}
