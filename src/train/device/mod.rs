//! The operations of a transformer that a device computes for the trainer, forward and backward.
//!
//! - [`cpu`] is the reference, with the naive formulas and ggml's or this program's 8-bit products.
//! - `cuda` runs the kernels of `vendor/cuda`. Its tests hold it to the CPU's results.
//! - [`counting`] computes nothing and counts the memory a GPU would allocate.
//!
//! Shapes are written slowest axis first, in these letters: `R` rows of a batch (one per token), `C` columns, `I` and
//! `O` inputs and outputs of a matrix, `H` query heads, `K` key and value heads, `D` size of a head, `V` vocabulary.

pub mod counting;
pub mod cpu;
#[cfg(any(feature = "cuda", feature = "cuda-emulation"))]
pub mod cuda;
pub mod limits;
pub mod name;
#[cfg(test)]
mod tests;

use std::fmt::Debug;
use std::ops::Range;

use crate::error::Result;
use crate::gguf::TensorType;

use crate::train::data::pack::Packed;
use crate::train::recipe::dpo::{AnswerLogps, PairLoss, Preference};

/// A frozen matrix as the file stores it, `[O][I]`.
#[derive(Debug, Clone)]
pub struct HostMatrix {
    /// Name of the tensor, for errors.
    pub name: String,
    /// How its numbers are stored.
    pub tensor_type: TensorType,
    /// Numbers per row, I.
    pub n_in: usize,
    /// Rows, O.
    pub n_out: usize,
    /// The blocks of every row, one row after the other.
    pub bytes: Vec<u8>,
    /// Whether [`Device::embed`] reads rows of it, as of token embeddings. Other matrices are only multiplied by.
    pub is_table: bool,
}

/// `C = beta C + alpha op(A) op(B)`, with C of shape `[m][n]`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gemm {
    /// Rows of C.
    pub m: usize,
    /// Columns of C.
    pub n: usize,
    /// Terms of each sum, at least one.
    pub k: usize,
    /// A is stored as `[k][m]` instead of `[m][k]`.
    pub transpose_a: bool,
    /// B is stored as `[n][k]` instead of `[k][n]`.
    pub transpose_b: bool,
    /// Scales the product.
    pub alpha: f32,
    /// Scales the previous content of C. If 0, C is not read and may hold NaN.
    pub beta: f32,
}

/// The table row that each row of a batch reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Index {
    /// Row `tokens[r]`.
    Token,
    /// Row `positions[r]`.
    Position,
    /// Row `outputs[o].row`, for every output `o` in this range.
    Output(Range<usize>),
}

/// What a norm divides by.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum NormKind {
    /// Root mean square (arXiv 1910.07467).
    Rms,
    /// Standard deviation, after subtracting the mean (arXiv 1607.06450).
    Layer,
}

/// A norm over each row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Norm {
    /// What it divides by.
    pub kind: NormKind,
    /// Added to the mean square or variance, under the root.
    pub epsilon: f32,
}

/// Which two numbers of a head form a pair that RoPE rotates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopePairs {
    /// 2i and 2i + 1 (llama.cpp's "norm").
    Adjacent,
    /// i and i + n_rot / 2 (llama.cpp's "neox").
    Halves,
}

/// Rotary position embedding (arXiv 2104.09864).
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Which numbers form a pair.
    pub pairs: RopePairs,
    /// Radians per position for each pair, `[n_rot / 2]`. Numbers of a head from n_rot on are not rotated.
    pub frequencies: Vec<f32>,
}

/// Causal attention: a row sees its segment's prefix, and its segment up to itself.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Attention {
    /// Query heads, H.
    pub n_head: usize,
    /// Key and value heads, K. Each serves H / K consecutive query heads.
    pub n_head_kv: usize,
    /// Size of a head, D.
    pub head_dim: usize,
    /// Scales the scores.
    pub scale: f32,
    /// A row sees only the last `window` positions, its own included; `None` for no limit.
    pub window: Option<usize>,
    /// Largest slope exponent of ALiBi (arXiv 2108.12409); 0 for no ALiBi.
    pub max_alibi_bias: f32,
}

impl Attention {
    /// ALiBi's slope of a head: the score falls by it for each position between query and key.
    pub fn slope(&self, head: usize) -> f32 {
        if self.max_alibi_bias == 0.0 {
            return 0.0;
        }
        // If the number of heads is not a power of two, the heads beyond the last power take every other slope of
        // the next power (section 3, footnote 7 of the paper).
        let power = 1usize << self.n_head.ilog2();
        let exponent = if head < power {
            self.max_alibi_bias / power as f32 * (head + 1) as f32
        } else {
            self.max_alibi_bias / (2 * power) as f32 * (2 * (head - power) + 1) as f32
        };
        (-exponent).exp2()
    }
}

/// Non-linearity of the FFN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x sigmoid(x).
    Silu,
    /// Gaussian error linear unit, tanh approximation (arXiv 1606.08415).
    Gelu,
}

/// One step of RMSprop, as in PyTorch's `torch.optim.RMSprop` with momentum 0.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RmspropStep {
    /// Learning rate.
    pub learning_rate: f32,
    /// Decay of the mean square.
    pub alpha: f32,
    /// Added to the root of the mean square.
    pub epsilon: f32,
    /// Scales the gradient first (gradient clipping).
    pub gradient_scale: f32,
}

/// One step of AdamW, as in PyTorch's `torch.optim.AdamW`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamwStep {
    /// Learning rate.
    pub learning_rate: f32,
    /// Decay of the mean.
    pub beta1: f32,
    /// Decay of the mean square.
    pub beta2: f32,
    /// Added to the root of the mean square.
    pub epsilon: f32,
    /// Decoupled weight decay, scaled by the learning rate.
    pub weight_decay: f32,
    /// Number of this step, from 1.
    pub step: u64,
    /// Scales the gradient first (gradient clipping).
    pub gradient_scale: f32,
}

/// A trained tensor, as the optimizer sees it.
#[derive(Debug)]
pub struct Trained<'a, B> {
    /// Gradient of the loss.
    pub gradient: &'a B,
    /// The optimizer's state: the mean square, or the mean and the mean square.
    pub states: &'a mut [B],
    /// The trained numbers.
    pub value: &'a mut B,
}

/// Computes the transformer's operations on buffers of f32.
///
/// Rules for every operation, unless its documentation says otherwise:
///
/// - **Shapes.** Buffers are dense and exactly as long as their shape says. The caller guarantees it; a device may
///   panic if they are not.
/// - **Results.** Forward operations overwrite their result without reading it. Backward operations *add* to the
///   gradients (`dx += …`), since a value may be used more than once.
/// - **NaN.** NaN in a row of the input gives NaN in the rows of the result that depend on it, and in no other row.
///   A product turns a row of x with any non-finite number into a row of y without a finite one, although rounding to
///   8 bits would lose infinities. So a run that diverges is noticed.
/// - **Rounding.** Everything is f32, except products: see [`Device::product`] and [`Device::gemm`]. The same calls on
///   the same device give the same bits, whatever its threads do.
/// - **Errors.** Out of memory ([`crate::Error::DeviceMemory`]) or a failed driver ([`crate::Error::Device`]). The
///   results are then undefined.
pub trait Device: Debug + Send + Sync {
    /// f32 numbers on the device.
    type Buffer: Debug + Send + Sync;
    /// A frozen matrix on the device.
    type Matrix: Debug + Send + Sync;
    /// Tokens, positions, segments and outputs of a batch on the device.
    type Rows: Debug + Send + Sync;

    /// The device in words: "cpu, 2 threads, exact products".
    fn describe(&self) -> String;

    /// Runs `work`, which calls many operations, where calls are cheapest: on a thread of the CPU's pool.
    fn scope<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        work()
    }

    /// Whether it reads the values it is given. If not, the caller may pass zeros instead of loading weights.
    fn reads_values(&self) -> bool {
        true
    }

    /// Bytes of logits to compute at a time; more make the products larger.
    fn logit_bytes(&self) -> usize {
        32 << 20
    }

    /// Frees memory that it keeps for reuse.
    fn trim(&self) -> Result<()> {
        Ok(())
    }

    /// Allocates `n` zeros.
    fn zeros(&self, n: usize) -> Result<Self::Buffer>;
    /// Allocates `n` numbers of undefined content, to be overwritten before they are read.
    fn space(&self, n: usize) -> Result<Self::Buffer> {
        self.zeros(n)
    }
    /// Copies the `n` numbers of `x` into a new buffer.
    fn copy(&self, x: &Self::Buffer, n: usize) -> Result<Self::Buffer> {
        let mut y = self.zeros(n)?;
        self.add(1.0, x, &mut y)?;
        Ok(y)
    }
    /// Copies `values` into a new buffer.
    fn upload(&self, values: &[f32]) -> Result<Self::Buffer>;
    /// Overwrites `buffer` with `values`, of the same length.
    fn write(&self, values: &[f32], buffer: &mut Self::Buffer) -> Result<()>;
    /// Copies all numbers of `buffer` to the host. Waits for the operations before it.
    fn download(&self, buffer: &Self::Buffer) -> Result<Vec<f32>>;
    /// Sets all numbers of `buffer` to 0.
    fn clear(&self, buffer: &mut Self::Buffer) -> Result<()>;
    /// Loads a frozen matrix.
    ///
    /// # Errors
    /// [`crate::Error::Setting`] if the bytes do not match the shape, or the device cannot read the type.
    fn matrix(&self, matrix: HostMatrix) -> Result<Self::Matrix>;
    /// Loads a batch.
    fn rows(&self, packed: &Packed) -> Result<Self::Rows>;

    /// `y[R][O] = x[R][I] Wᵀ`.
    ///
    /// The CPU computes it in f32 with the dequantised matrix (exact), or rounds the operands to 8 bits in blocks of 32
    /// (fast). A GPU rounds both operands to bf16 and sums in f32.
    fn product(&self, w: &Self::Matrix, x: &Self::Buffer, n_rows: usize, y: &mut Self::Buffer) -> Result<()>;
    /// `ys[i][R][O] = x[R][I] Wᵀ` for several matrices: [`Device::product`] that prepares x once.
    fn products(
        &self,
        ws: &[&Self::Matrix],
        x: &Self::Buffer,
        n_rows: usize,
        ys: &mut [Self::Buffer],
    ) -> Result<()> {
        ws.iter().zip(ys).try_for_each(|(w, y)| self.product(w, x, n_rows, y))
    }
    /// `dx[R][I] += dy[R][O] W`, rounded as [`Device::product`].
    fn product_back(
        &self,
        w: &Self::Matrix,
        dy: &Self::Buffer,
        n_rows: usize,
        dx: &mut Self::Buffer,
    ) -> Result<()>;
    /// `C[m][n] = beta C + alpha op(A) op(B)`, for trained matrices. A GPU rounds A and B to TF32.
    fn gemm(&self, gemm: Gemm, a: &Self::Buffer, b: &Self::Buffer, c: &mut Self::Buffer) -> Result<()>;

    /// `y[r][I] = scale W[tokens[r]]`, with W of shape `[V][I]` and loaded as a table.
    fn embed(&self, w: &Self::Matrix, rows: &Self::Rows, scale: f32, y: &mut Self::Buffer) -> Result<()>;
    /// `y[r][C] = scale table[index(r)]`.
    fn gather(
        &self,
        table: &Self::Buffer,
        n_cols: usize,
        index: &Index,
        rows: &Self::Rows,
        scale: f32,
        y: &mut Self::Buffer,
    ) -> Result<()>;
    /// `dtable[index(r)] += scale dy[r][C]`. Rows with the same index are added in order.
    fn scatter_add(
        &self,
        dy: &Self::Buffer,
        n_cols: usize,
        index: &Index,
        rows: &Self::Rows,
        scale: f32,
        dtable: &mut Self::Buffer,
    ) -> Result<()>;

    /// `y[R][C] = norm(x[R][C]) weight[C] + bias[C]`.
    fn norm(
        &self,
        norm: Norm,
        x: &Self::Buffer,
        weight: &Self::Buffer,
        bias: Option<&Self::Buffer>,
        n_cols: usize,
        y: &mut Self::Buffer,
    ) -> Result<()>;
    /// Gradients of [`Device::norm`]: `dx[R][C] += …`, and `dweight[C] += …` and `dbias[C] += …` if given.
    #[allow(clippy::too_many_arguments, reason = "one operation's operands and gradients")]
    fn norm_back(
        &self,
        norm: Norm,
        x: &Self::Buffer,
        weight: &Self::Buffer,
        dy: &Self::Buffer,
        n_cols: usize,
        dx: &mut Self::Buffer,
        dweight: Option<&mut Self::Buffer>,
        dbias: Option<&mut Self::Buffer>,
    ) -> Result<()>;

    /// Rotates each head of `x[R][heads][D]` in place, by its row's position.
    ///
    /// With `back` it rotates by the opposite angle. That turns the gradient of the result into the gradient of the
    /// input, in place: it does not add.
    fn rope(
        &self,
        rope: &Rope,
        rows: &Self::Rows,
        head_dim: usize,
        back: bool,
        x: &mut Self::Buffer,
    ) -> Result<()>;

    /// `out[R][H][D]` from `q[R][H][D]`, `k[R][K][D]` and `v[R][K][D]`.
    ///
    /// Also writes `lse[R][H]`, the logarithms of the softmax's sums, for [`Device::attention_back`].
    #[allow(clippy::too_many_arguments, reason = "one operation's operands")]
    fn attention(
        &self,
        attention: &Attention,
        rows: &Self::Rows,
        q: &Self::Buffer,
        k: &Self::Buffer,
        v: &Self::Buffer,
        out: &mut Self::Buffer,
        lse: &mut Self::Buffer,
    ) -> Result<()>;
    /// Gradients of [`Device::attention`]: `dq[R][H][D] += …`, `dk[R][K][D] += …`, `dv[R][K][D] += …`.
    #[allow(clippy::too_many_arguments, reason = "one operation's operands and gradients")]
    fn attention_back(
        &self,
        attention: &Attention,
        rows: &Self::Rows,
        q: &Self::Buffer,
        k: &Self::Buffer,
        v: &Self::Buffer,
        out: &Self::Buffer,
        lse: &Self::Buffer,
        dout: &Self::Buffer,
        dq: &mut Self::Buffer,
        dk: &mut Self::Buffer,
        dv: &mut Self::Buffer,
    ) -> Result<()>;

    /// `y = f(gate) up`, or `y = f(gate)` without `up`. All have the same shape.
    fn activate(
        &self,
        activation: Activation,
        gate: &Self::Buffer,
        up: Option<&Self::Buffer>,
        y: &mut Self::Buffer,
    ) -> Result<()>;
    /// Gradients of [`Device::activate`]: `dgate += …`, `dup += …`. `dup` is given if and only if `up` is.
    fn activate_back(
        &self,
        activation: Activation,
        gate: &Self::Buffer,
        up: Option<&Self::Buffer>,
        dy: &Self::Buffer,
        dgate: &mut Self::Buffer,
        dup: Option<&mut Self::Buffer>,
    ) -> Result<()>;

    /// `y += scale x`.
    fn add(&self, scale: f32, x: &Self::Buffer, y: &mut Self::Buffer) -> Result<()>;
    /// `y[r][C] += bias[C]` for every row.
    fn add_to_rows(&self, bias: &Self::Buffer, n_cols: usize, y: &mut Self::Buffer) -> Result<()>;
    /// `dbias[C] +=` the sum of all rows of `dy[R][C]`.
    fn sum_rows(&self, dy: &Self::Buffer, n_cols: usize, dbias: &mut Self::Buffer) -> Result<()>;
    /// `x[r][C] *= factors[first + r]` for every row of x.
    fn scale_rows(
        &self,
        factors: &Self::Buffer,
        first: usize,
        n_cols: usize,
        x: &mut Self::Buffer,
    ) -> Result<()>;
    /// `dst[r][to .. to + n] += src[r][from .. from + n]`, for every row of dst.
    ///
    /// Rows of src have `src_cols` numbers and rows of dst have `dst_cols`.
    #[allow(clippy::too_many_arguments, reason = "one operation's operands")]
    fn add_columns(
        &self,
        src: &Self::Buffer,
        src_cols: usize,
        from: usize,
        dst: &mut Self::Buffer,
        dst_cols: usize,
        to: usize,
        n: usize,
    ) -> Result<()>;

    /// `logps[o]` = the log-probability of output o under `softmax(scale logits[o])`, for the outputs in `range`.
    ///
    /// `logits[range][V]` has a row for each output in the range. `logps[outputs]` has a number for each output of the
    /// batch; those outside the range stay. With `gradient`, the logits are overwritten with the gradients of the
    /// log-probabilities: `scale (onehot - softmax)`. Otherwise they stay.
    #[allow(clippy::too_many_arguments, reason = "one operation's operands")]
    fn logprobs(
        &self,
        rows: &Self::Rows,
        range: Range<usize>,
        scale: f32,
        n_vocab: usize,
        gradient: bool,
        logits: &mut Self::Buffer,
        logps: &mut Self::Buffer,
    ) -> Result<()>;
    /// Log-probabilities and loss of each pair, `[pairs]`, in f64; overwrites `dlogps[outputs]` with the gradient.
    ///
    /// `logps[outputs]` are the policy's, `references[pairs]` the reference's. The gradient is of the mean loss over
    /// `n_pairs` pairs: those of the whole step, where this batch may be a part of it. NaN stays within its pair.
    fn preference_loss(
        &self,
        preference: Preference,
        rows: &Self::Rows,
        references: &[AnswerLogps],
        n_pairs: usize,
        logps: &Self::Buffer,
        dlogps: &mut Self::Buffer,
    ) -> Result<Vec<(AnswerLogps, PairLoss)>>;

    /// The sum of the squares of all numbers, in f64.
    fn square_sum(&self, x: &Self::Buffer) -> Result<f64>;
    /// The sum of [`Device::square_sum`] over all buffers.
    fn square_sum_all(&self, all: &[Self::Buffer]) -> Result<f64> {
        all.iter().try_fold(0.0, |sum, x| Ok(sum + self.square_sum(x)?))
    }
    /// One step of RMSprop: updates `value` and the state `mean_square` by `gradient`.
    fn rmsprop(
        &self,
        step: RmspropStep,
        gradient: &Self::Buffer,
        mean_square: &mut Self::Buffer,
        value: &mut Self::Buffer,
    ) -> Result<()>;
    /// One step of AdamW: updates `value` and the states `mean` and `mean_square` by `gradient`.
    fn adamw(
        &self,
        step: AdamwStep,
        gradient: &Self::Buffer,
        mean: &mut Self::Buffer,
        mean_square: &mut Self::Buffer,
        value: &mut Self::Buffer,
    ) -> Result<()>;
    /// [`Device::rmsprop`] for every tensor; each has one state.
    fn rmsprop_all(&self, step: RmspropStep, all: &mut [Trained<'_, Self::Buffer>]) -> Result<()> {
        all.iter_mut().try_for_each(|t| self.rmsprop(step, t.gradient, &mut t.states[0], t.value))
    }
    /// [`Device::adamw`] for every tensor; each has two states, the mean first.
    fn adamw_all(&self, step: AdamwStep, all: &mut [Trained<'_, Self::Buffer>]) -> Result<()> {
        all.iter_mut().try_for_each(|t| {
            let [mean, mean_square] = t.states else { unreachable!("AdamW has two states") };
            self.adamw(step, t.gradient, mean, mean_square, t.value)
        })
    }
}
