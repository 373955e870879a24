//! Matrices of the model: frozen, frozen with a low-rank change, or trained.

use std::sync::Arc;

use crate::error::Result;

use crate::train::device::Device;
use crate::train::model::gemm::{a_b, a_bt, accumulate, at_b};
use crate::train::model::low_rank::LowRank;
use crate::train::model::parameters::ParameterId;
use crate::train::model::pass::Pass;

/// The values of a norm, a bias or a table.
#[derive(Debug)]
pub enum Row<D: Device> {
    /// As in the file.
    Frozen(D::Buffer),
    /// A parameter.
    Trained(ParameterId),
}

impl<D: Device> Row<D> {
    /// Its values.
    pub fn get<'a>(&'a self, pass: &Pass<'a, D>) -> &'a D::Buffer {
        match self {
            Row::Frozen(buffer) => buffer,
            Row::Trained(id) => &pass.values[*id],
        }
    }

    /// Its parameter, if it is trained.
    pub fn trained(&self) -> Option<ParameterId> {
        match self {
            Row::Frozen(_) => None,
            Row::Trained(id) => Some(*id),
        }
    }
}

/// The values of a matrix, `[n_out][n_in]`.
#[derive(Debug)]
pub enum Weight<D: Device> {
    /// As in the file. Shared, because the token embeddings may be the output matrix too.
    Frozen(Arc<D::Matrix>),
    /// A parameter.
    Trained(ParameterId),
}

impl<D: Device> Clone for Weight<D> {
    fn clone(&self) -> Self {
        match self {
            Weight::Frozen(matrix) => Weight::Frozen(matrix.clone()),
            Weight::Trained(id) => Weight::Trained(*id),
        }
    }
}

/// `y = x (W + s B A)ᵀ + bias`.
#[derive(Debug)]
pub struct Linear<D: Device> {
    /// Columns of W.
    pub n_in: usize,
    /// Rows of W.
    pub n_out: usize,
    /// W, `[n_out][n_in]`.
    pub weight: Weight<D>,
    /// `[n_out]`.
    pub bias: Option<Row<D>>,
    /// B and A.
    pub low_rank: Option<LowRank>,
}

/// `x Aᵀ`, `[n_rows][rank]`, kept from the forward for the backward pass; `None` without a low-rank change.
pub type Reduced<D> = Option<<D as Device>::Buffer>;

impl<D: Device> Linear<D> {
    /// Computes `y`, `[n_rows][n_out]`, from `x`, `[n_rows][n_in]`.
    ///
    /// # Errors
    /// Those of the device.
    pub fn forward(
        &self,
        pass: &Pass<'_, D>,
        x: &D::Buffer,
        n_rows: usize,
    ) -> Result<(D::Buffer, Reduced<D>)> {
        let [result] = Self::forward_all(pass, [self], x, n_rows)?;
        Ok(result)
    }

    /// Computes `y` of several matrices that read the same `x`.
    ///
    /// # Errors
    /// Those of the device.
    pub fn forward_all<const N: usize>(
        pass: &Pass<'_, D>,
        linears: [&Self; N],
        x: &D::Buffer,
        n_rows: usize,
    ) -> Result<[(D::Buffer, Reduced<D>); N]> {
        let Pass { device, values, adapters } = pass;
        let mut ys =
            linears.iter().map(|linear| device.space(n_rows * linear.n_out)).collect::<Result<Vec<_>>>()?;
        let frozen = linears.iter().filter_map(|linear| match &linear.weight {
            Weight::Frozen(matrix) => Some(&**matrix),
            Weight::Trained(_) => None,
        });
        let frozen: Vec<&D::Matrix> = frozen.collect();
        assert!(frozen.is_empty() || frozen.len() == N, "all matrices must be frozen, or all trained");
        if !frozen.is_empty() {
            device.products(&frozen, x, n_rows, &mut ys)?;
        }
        let mut results = Vec::with_capacity(N);
        for (linear, mut y) in linears.into_iter().zip(ys) {
            let (n_in, n_out) = (linear.n_in, linear.n_out);
            if let Weight::Trained(id) = &linear.weight {
                device.gemm(a_bt([n_rows, n_out, n_in]), x, &values[*id], &mut y)?;
            }
            let mut reduced = None;
            if let (Some(low_rank), Some(s)) = (linear.low_rank, adapters.lora_scale()) {
                let mut xa = device.space(n_rows * low_rank.rank)?;
                device.gemm(a_bt([n_rows, low_rank.rank, n_in]), x, &values[low_rank.a], &mut xa)?;
                low_rank.forward(pass, s, [n_rows, n_out], &xa, &mut y)?;
                reduced = Some(xa);
            }
            if let Some(bias) = &linear.bias {
                device.add_to_rows(bias.get(pass), n_out, &mut y)?;
            }
            results.push((y, reduced));
        }
        Ok(results.try_into().unwrap_or_else(|_| unreachable!("one result for each matrix")))
    }

    /// Adds the derivatives of [`Linear::forward`], given `dy`, `[n_rows][n_out]`.
    ///
    /// - `dbias += Σ dy` over the rows
    /// - `dx += dy W`, and `dW += dyᵀ x` if W is trained
    /// - `dB += s dyᵀ (x Aᵀ)`; with `dxa = s dy B`: `dA += dxaᵀ x` and `dx += dxa A`
    ///
    /// `dx` is `[n_rows][n_in]`; the others go to `gradients`.
    ///
    /// # Errors
    /// Those of the device.
    #[allow(clippy::too_many_arguments, reason = "one operation's operands and gradients")]
    pub fn backward(
        &self,
        pass: &Pass<'_, D>,
        gradients: &mut [D::Buffer],
        x: &D::Buffer,
        reduced: &Reduced<D>,
        dy: &D::Buffer,
        n_rows: usize,
        dx: &mut D::Buffer,
    ) -> Result<()> {
        let Pass { device, values, adapters } = pass;
        let (n_in, n_out) = (self.n_in, self.n_out);
        if let Some(id) = self.bias.as_ref().and_then(Row::trained) {
            device.sum_rows(dy, n_out, &mut gradients[id])?;
        }
        match &self.weight {
            Weight::Frozen(matrix) => device.product_back(matrix, dy, n_rows, dx)?,
            Weight::Trained(id) => {
                device.gemm(accumulate(a_b([n_rows, n_in, n_out])), dy, &values[*id], dx)?;
                device.gemm(accumulate(at_b([n_out, n_in, n_rows])), dy, x, &mut gradients[*id])?;
            }
        }
        if let (Some(low_rank), Some(s), Some(xa)) = (self.low_rank, adapters.lora_scale(), reduced) {
            let LowRank { rank, a, .. } = low_rank;
            let dxa = low_rank.backward(pass, s, [n_rows, n_out], gradients, xa, dy)?;
            device.gemm(accumulate(at_b([rank, n_in, n_rows])), &dxa, x, &mut gradients[a])?;
            device.gemm(accumulate(a_b([n_rows, n_in, rank])), &dxa, &values[a], dx)?;
        }
        Ok(())
    }

    /// Whether W is trained or has a low-rank change.
    pub fn is_trained(&self) -> bool {
        self.low_rank.is_some() || matches!(self.weight, Weight::Trained(_))
    }
}
