//! Matrices of the model: frozen, frozen with a low-rank change that is trained, or trained themselves.

use std::sync::Arc;

use crate::error::Result;

use crate::train::device::{Device, Gemm};
use crate::train::model::parameters::ParameterId;

/// What a pass through the model reads: the device, the trained numbers, and whether the adapter counts.
#[derive(Debug)]
pub struct Pass<'a, D: Device> {
    /// Where it runs.
    pub device: &'a D,
    /// Of the parameters.
    pub values: &'a [D::Buffer],
    /// Multiplies low-rank changes: alpha / rank; `None` leaves them and directions out, as in the reference.
    pub adapter_scale: Option<f32>,
}

/// Numbers of a norm or a bias.
#[derive(Debug)]
pub enum Row<D: Device> {
    /// As in the file.
    Frozen(D::Buffer),
    /// A parameter.
    Trained(ParameterId),
}

impl<D: Device> Row<D> {
    /// Its numbers.
    pub fn get<'a>(&'a self, pass: &Pass<'a, D>) -> &'a D::Buffer {
        match self {
            Row::Frozen(buffer) => buffer,
            Row::Trained(id) => &pass.values[*id],
        }
    }

    /// Which parameter it is, if it is one.
    pub fn trained(&self) -> Option<ParameterId> {
        match self {
            Row::Frozen(_) => None,
            Row::Trained(id) => Some(*id),
        }
    }
}

/// A matrix's numbers, `[n_out][n_in]`.
#[derive(Debug)]
pub enum Weight<D: Device> {
    /// As in the file; the token embeddings may serve as the output too.
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

/// A trained change of rank r: W becomes W + scale B A (arXiv 2106.09685).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LowRank {
    /// r.
    pub rank: usize,
    /// A, `[r][n_in]`.
    pub a: ParameterId,
    /// B, `[n_out][r]`.
    pub b: ParameterId,
}

/// `y = x (W + scale B A)ᵀ + bias`.
#[derive(Debug)]
pub struct Linear<D: Device> {
    /// Numbers that it reads of a row.
    pub n_in: usize,
    /// Numbers that it makes.
    pub n_out: usize,
    /// W.
    pub weight: Weight<D>,
    /// Added to every row.
    pub bias: Option<Row<D>>,
    /// What is trained of it.
    pub low_rank: Option<LowRank>,
}

/// What the backward pass needs of a forward pass beside its input: `x Aᵀ`, `[R][r]`.
pub type Reduced<D> = Option<<D as Device>::Buffer>;

impl<D: Device> Linear<D> {
    /// `y[R][O]` from `x[R][I]`.
    ///
    /// # Errors
    /// Of the device.
    pub fn forward(
        &self,
        pass: &Pass<'_, D>,
        x: &D::Buffer,
        n_rows: usize,
    ) -> Result<(D::Buffer, Reduced<D>)> {
        let [of_this] = Self::forward_all(pass, [self], x, n_rows)?;
        Ok(of_this)
    }

    /// The same of several that read one input.
    ///
    /// # Errors
    /// Of the device.
    pub fn forward_all<const N: usize>(
        pass: &Pass<'_, D>,
        linears: [&Self; N],
        x: &D::Buffer,
        n_rows: usize,
    ) -> Result<[(D::Buffer, Reduced<D>); N]> {
        let Pass { device, values, .. } = pass;
        let mut ys =
            linears.iter().map(|linear| device.space(n_rows * linear.n_out)).collect::<Result<Vec<_>>>()?;
        let frozen = linears.iter().filter_map(|linear| match &linear.weight {
            Weight::Frozen(matrix) => Some(&**matrix),
            Weight::Trained(_) => None,
        });
        let frozen: Vec<&D::Matrix> = frozen.collect();
        assert!(frozen.is_empty() || frozen.len() == N, "all matrices frozen, or all trained");
        if !frozen.is_empty() {
            device.products(&frozen, x, n_rows, &mut ys)?;
        }
        let mut all = Vec::with_capacity(N);
        for (linear, mut y) in linears.into_iter().zip(ys) {
            let (n_in, n_out) = (linear.n_in, linear.n_out);
            if let Weight::Trained(id) = &linear.weight {
                device.gemm(by_transposed([n_rows, n_out, n_in]), x, &values[*id], &mut y)?;
            }
            let mut reduced = None;
            if let (Some(LowRank { rank, a, b }), Some(scale)) = (linear.low_rank, pass.adapter_scale) {
                let mut xa = device.space(n_rows * rank)?;
                device.gemm(by_transposed([n_rows, rank, n_in]), x, &values[a], &mut xa)?;
                let added = Gemm { alpha: scale, beta: 1.0, ..by_transposed([n_rows, n_out, rank]) };
                device.gemm(added, &xa, &values[b], &mut y)?;
                reduced = Some(xa);
            }
            if let Some(bias) = &linear.bias {
                device.add_to_rows(bias.get(pass), n_out, &mut y)?;
            }
            all.push((y, reduced));
        }
        Ok(all.try_into().unwrap_or_else(|_| unreachable!("one for each linear")))
    }

    /// Adds to the gradients of what is trained, and to `dx[R][I]`, given `dy[R][O]`.
    ///
    /// # Errors
    /// Of the device.
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
        let Pass { device, values, .. } = pass;
        let (n_in, n_out) = (self.n_in, self.n_out);
        if let Some(id) = self.bias.as_ref().and_then(Row::trained) {
            device.sum_rows(dy, n_out, &mut gradients[id])?;
        }
        match &self.weight {
            Weight::Frozen(matrix) => device.product_back(matrix, dy, n_rows, dx)?,
            Weight::Trained(id) => {
                device.gemm(added(plain([n_rows, n_in, n_out])), dy, &values[*id], dx)?;
                let dw = Gemm { transpose_a: true, ..plain([n_out, n_in, n_rows]) };
                device.gemm(added(dw), dy, x, &mut gradients[*id])?;
            }
        }
        if let (Some(LowRank { rank, a, b }), Some(scale), Some(xa)) =
            (self.low_rank, pass.adapter_scale, reduced)
        {
            let db = Gemm { transpose_a: true, alpha: scale, ..plain([n_out, rank, n_rows]) };
            device.gemm(added(db), dy, xa, &mut gradients[b])?;
            let mut dxa = device.space(n_rows * rank)?;
            device.gemm(Gemm { alpha: scale, ..plain([n_rows, rank, n_out]) }, dy, &values[b], &mut dxa)?;
            let da = Gemm { transpose_a: true, ..plain([rank, n_in, n_rows]) };
            device.gemm(added(da), &dxa, x, &mut gradients[a])?;
            device.gemm(added(plain([n_rows, n_in, rank])), &dxa, &values[a], dx)?;
        }
        Ok(())
    }

    /// Whether its weight or a low-rank change of it is trained.
    pub fn is_trained(&self) -> bool {
        self.low_rank.is_some() || matches!(self.weight, Weight::Trained(_))
    }
}

/// `C = A B`.
pub(super) fn plain([m, n, k]: [usize; 3]) -> Gemm {
    Gemm { m, n, k, transpose_a: false, transpose_b: false, alpha: 1.0, beta: 0.0 }
}

/// `C = A Bᵀ`.
pub(super) fn by_transposed(sizes: [usize; 3]) -> Gemm {
    Gemm { transpose_b: true, ..plain(sizes) }
}

/// The same, added to what C holds.
pub(super) fn added(gemm: Gemm) -> Gemm {
    Gemm { beta: 1.0, ..gemm }
}
