//! What a device does for the trainer: the operations of a transformer, forward and backward.
//!
//! Letters of shapes, slowest axis first: `R` rows of a batch (one a token), `C` columns, `I` and `O` a
//! matrix's inputs and outputs, `H` heads, `K` key and value heads, `D` a head's size, `V` the vocabulary.
//! A buffer holds f32 numbers, densely. Gradients are *added* to what a buffer holds, since a value may be
//! used more than once; everything else overwrites.

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

/// A frozen matrix as it lies in the file, `[O][I]`.
#[derive(Debug, Clone)]
pub struct HostMatrix {
    /// The tensor's name, for errors.
    pub name: String,
    /// How its numbers are stored.
    pub tensor_type: TensorType,
    /// Numbers in a row.
    pub n_in: usize,
    /// Rows.
    pub n_out: usize,
    /// The rows' blocks, one row after the other.
    pub bytes: Vec<u8>,
    /// Whether rows of it are read one by one, as token embeddings are; else it is multiplied with alone.
    pub is_table: bool,
}

/// `C = beta C + alpha op(A) op(B)`, where C is `[m][n]`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gemm {
    /// Rows of C.
    pub m: usize,
    /// Columns of C.
    pub n: usize,
    /// Products in a sum.
    pub k: usize,
    /// A is `[k][m]`, not `[m][k]`.
    pub transpose_a: bool,
    /// B is `[n][k]`, not `[k][n]`.
    pub transpose_b: bool,
    /// Multiplies the product.
    pub alpha: f32,
    /// Multiplies what C held; at 0 it is not read.
    pub beta: f32,
}

/// Which row of a table a row of a batch looks at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Index {
    /// Row `tokens[r]`.
    Token,
    /// Row `positions[r]`.
    Position,
    /// Row `outputs[o].row`, for the outputs `o` of this range.
    Output(Range<usize>),
}

/// What a norm divides by.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum NormKind {
    /// The root of the mean square (arXiv 1910.07467).
    Rms,
    /// The standard deviation, after the mean was taken away (arXiv 1607.06450).
    Layer,
}

/// A norm over rows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Norm {
    /// What it divides by.
    pub kind: NormKind,
    /// Added to the mean square or the variance under the root.
    pub epsilon: f32,
}

/// Which two numbers of a head a rotation mixes.
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
    /// Which numbers make a pair.
    pub pairs: RopePairs,
    /// Radians a position for each pair, `[n_rot / 2]`; numbers of a head from n_rot on stay as they are.
    pub frequencies: Vec<f32>,
}

/// Causal attention, in which a row sees the prefix of its segment and its segment up to itself.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Attention {
    /// Query heads, H.
    pub n_head: usize,
    /// Key and value heads, K; each serves H / K query heads that follow one another.
    pub n_head_kv: usize,
    /// Numbers in a head, D.
    pub head_dim: usize,
    /// Multiplies the scores.
    pub scale: f32,
    /// A row sees positions that are less than so many before its own.
    pub window: Option<usize>,
    /// Largest slope exponent of ALiBi (arXiv 2108.12409); 0 for none.
    pub max_alibi_bias: f32,
}

impl Attention {
    /// ALiBi's slope of a head: a score falls by it for each position between query and key.
    pub fn slope(&self, head: usize) -> f32 {
        if self.max_alibi_bias == 0.0 {
            return 0.0;
        }
        // For a number of heads that is no power of two, the heads beyond the last power take every
        // other slope of the next one (section 3, footnote 7 of the paper).
        let power = 1usize << self.n_head.ilog2();
        let exponent = if head < power {
            self.max_alibi_bias / power as f32 * (head + 1) as f32
        } else {
            self.max_alibi_bias / (2 * power) as f32 * (2 * (head - power) + 1) as f32
        };
        (-exponent).exp2()
    }
}

/// The FFN's non-linearity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x sigmoid(x).
    Silu,
    /// Gaussian error linear unit, by tanh (arXiv 1606.08415).
    Gelu,
}

/// One step of RMSprop, as PyTorch's `torch.optim.RMSprop` with momentum 0 counts it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RmspropStep {
    /// Learning rate.
    pub learning_rate: f32,
    /// How much of the mean square stays.
    pub alpha: f32,
    /// Added to the root of the mean square.
    pub epsilon: f32,
    /// Multiplies the gradient first: what clipping left of it.
    pub gradient_scale: f32,
}

/// One step of AdamW, as PyTorch's `torch.optim.AdamW` counts it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamwStep {
    /// Learning rate.
    pub learning_rate: f32,
    /// How much of the mean stays.
    pub beta1: f32,
    /// How much of the mean square stays.
    pub beta2: f32,
    /// Added to the root of the mean square.
    pub epsilon: f32,
    /// Share of a weight, times the learning rate, that is taken away.
    pub weight_decay: f32,
    /// Steps so far, this one included.
    pub step: u64,
    /// Multiplies the gradient first: what clipping left of it.
    pub gradient_scale: f32,
}

/// A trained tensor, as the optimizer sees it.
#[derive(Debug)]
pub struct Trained<'a, B> {
    /// What it is stepped against.
    pub gradient: &'a B,
    /// The optimizer's state.
    pub states: &'a mut [B],
    /// Its numbers.
    pub value: &'a mut B,
}

/// Where the numbers are, and what is done with them.
///
/// A caller keeps to the shapes that are given here; a device may end the process where they are not kept.
/// Errors are of the device: memory, or the driver.
pub trait Device: Debug + Send + Sync {
    /// f32 numbers on the device.
    type Buffer: Debug + Send + Sync;
    /// A frozen matrix on the device.
    type Matrix: Debug + Send + Sync;
    /// A batch's tokens, positions, segments and outputs on the device.
    type Rows: Debug + Send + Sync;

    /// What it is, for people: "cpu, 2 threads, exact products".
    fn describe(&self) -> String;

    /// Does `work`, which calls many operations, where calling them is cheapest.
    fn scope<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        work()
    }

    /// Whether it reads what is uploaded to it. If not, weights may be zeros instead of the file's numbers.
    fn reads_values(&self) -> bool {
        true
    }

    /// Bytes of logits that are computed at a time; more make larger products.
    fn logit_bytes(&self) -> usize {
        32 << 20
    }

    /// Gives back memory that it keeps for later operations, where it does.
    fn trim(&self) -> Result<()> {
        Ok(())
    }

    /// `n` zeros.
    fn zeros(&self, n: usize) -> Result<Self::Buffer>;
    /// `n` numbers that are overwritten before they are read.
    fn space(&self, n: usize) -> Result<Self::Buffer> {
        self.zeros(n)
    }
    /// The `n` numbers of `x` once more.
    fn copy(&self, x: &Self::Buffer, n: usize) -> Result<Self::Buffer> {
        let mut y = self.zeros(n)?;
        self.add(1.0, x, &mut y)?;
        Ok(y)
    }
    /// A copy of `values`.
    fn upload(&self, values: &[f32]) -> Result<Self::Buffer>;
    /// Overwrites `buffer`, which has as many numbers.
    fn write(&self, values: &[f32], buffer: &mut Self::Buffer) -> Result<()>;
    /// All numbers of `buffer`.
    fn download(&self, buffer: &Self::Buffer) -> Result<Vec<f32>>;
    /// Zeros in place of what `buffer` holds.
    fn clear(&self, buffer: &mut Self::Buffer) -> Result<()>;
    /// Takes a frozen matrix.
    fn matrix(&self, matrix: HostMatrix) -> Result<Self::Matrix>;
    /// Takes a batch.
    fn rows(&self, packed: &Packed) -> Result<Self::Rows>;

    /// `y[R][O] = x[R][I] Wᵀ`.
    fn product(&self, w: &Self::Matrix, x: &Self::Buffer, n_rows: usize, y: &mut Self::Buffer) -> Result<()>;
    /// `ys[i][R][O] = x[R][I] Wᵀ` for several matrices that read one input, so that it is prepared once.
    fn products(
        &self,
        ws: &[&Self::Matrix],
        x: &Self::Buffer,
        n_rows: usize,
        ys: &mut [Self::Buffer],
    ) -> Result<()> {
        ws.iter().zip(ys).try_for_each(|(w, y)| self.product(w, x, n_rows, y))
    }
    /// `dx[R][I] += dy[R][O] W`.
    fn product_back(
        &self,
        w: &Self::Matrix,
        dy: &Self::Buffer,
        n_rows: usize,
        dx: &mut Self::Buffer,
    ) -> Result<()>;
    /// `C[m][n] = beta C + alpha op(A) op(B)`.
    fn gemm(&self, gemm: Gemm, a: &Self::Buffer, b: &Self::Buffer, c: &mut Self::Buffer) -> Result<()>;

    /// `y[R][I] = scale W[token of the row]`, W being `[V][I]`.
    fn embed(&self, w: &Self::Matrix, rows: &Self::Rows, scale: f32, y: &mut Self::Buffer) -> Result<()>;
    /// `y[r] = scale table[index of r]`, rows of C numbers.
    fn gather(
        &self,
        table: &Self::Buffer,
        n_cols: usize,
        index: &Index,
        rows: &Self::Rows,
        scale: f32,
        y: &mut Self::Buffer,
    ) -> Result<()>;
    /// `dtable[index of r] += scale dy[r]`, rows of C numbers.
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
    /// The gradients of [`Device::norm`]: `dx[R][C] += …`, and where they are wanted `dweight[C] += …` and
    /// `dbias[C] += …`.
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

    /// Rotates each head of `x[R][heads][D]` by its row's position; back, by the opposite angle, which is
    /// the gradient.
    fn rope(
        &self,
        rope: &Rope,
        rows: &Self::Rows,
        head_dim: usize,
        back: bool,
        x: &mut Self::Buffer,
    ) -> Result<()>;

    /// `out[R][H][D]` from `q[R][H][D]`, `k[R][K][D]`, `v[R][K][D]`; `lse[R][H]` are the logarithms of the sums
    /// of exponentials, which [`Device::attention_back`] needs.
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
    /// `dq += …`, `dk += …`, `dv += …`, of the shapes of q, k and v.
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

    /// `y = f(gate) up`, or `f(gate)` without `up`; all of one shape.
    fn activate(
        &self,
        activation: Activation,
        gate: &Self::Buffer,
        up: Option<&Self::Buffer>,
        y: &mut Self::Buffer,
    ) -> Result<()>;
    /// `dgate += …`, `dup += …`; `dup` is there where `up` is.
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
    /// `y[R][C] += bias[C]` in every row.
    fn add_to_rows(&self, bias: &Self::Buffer, n_cols: usize, y: &mut Self::Buffer) -> Result<()>;
    /// `dbias[C] +=` the sum over the rows of `dy[R][C]`.
    fn sum_rows(&self, dy: &Self::Buffer, n_cols: usize, dbias: &mut Self::Buffer) -> Result<()>;
    /// Row r of `x[n][C]` times factor `first + r`, for all n rows.
    fn scale_rows(
        &self,
        factors: &Self::Buffer,
        first: usize,
        n_cols: usize,
        x: &mut Self::Buffer,
    ) -> Result<()>;
    /// `dst[r][to .. to + n] += src[r][from .. from + n]`, rows of `src` having `src_cols` numbers and those of
    /// `dst` `dst_cols`.
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

    /// `logps[o]`, for the outputs `o` of `range`, become their log-probabilities under `logits[outputs][V] * scale`;
    /// other numbers of `logps`, which has one for each output of the batch, stay. With `gradient`, `logits` become
    /// their gradients: `scale (onehot - softmax)`.
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
    /// What each pair of the batch costs, `[pairs]`, by the log-probabilities of its outputs, `logps[outputs]`, and those
    /// of its answers under the model as it was, `references[pairs]`. `dlogps[outputs]` become the derivatives of the mean
    /// loss over `n_pairs` pairs, of which the batch may be a part.
    fn preference_loss(
        &self,
        preference: Preference,
        rows: &Self::Rows,
        references: &[AnswerLogps],
        n_pairs: usize,
        logps: &Self::Buffer,
        dlogps: &mut Self::Buffer,
    ) -> Result<Vec<(AnswerLogps, PairLoss)>>;

    /// The sum of the squares of all numbers.
    fn square_sum(&self, x: &Self::Buffer) -> Result<f64>;
    /// The sum of the squares of all numbers of all buffers.
    fn square_sum_all(&self, all: &[Self::Buffer]) -> Result<f64> {
        all.iter().try_fold(0.0, |sum, x| Ok(sum + self.square_sum(x)?))
    }
    /// Steps `value` against `gradient`; `mean_square` is the optimizer's state.
    fn rmsprop(
        &self,
        step: RmspropStep,
        gradient: &Self::Buffer,
        mean_square: &mut Self::Buffer,
        value: &mut Self::Buffer,
    ) -> Result<()>;
    /// Steps `value` against `gradient`; `mean` and `mean_square` are the optimizer's state.
    fn adamw(
        &self,
        step: AdamwStep,
        gradient: &Self::Buffer,
        mean: &mut Self::Buffer,
        mean_square: &mut Self::Buffer,
        value: &mut Self::Buffer,
    ) -> Result<()>;
    /// [`Device::rmsprop`] of every tensor; each has one state.
    fn rmsprop_all(&self, step: RmspropStep, all: &mut [Trained<'_, Self::Buffer>]) -> Result<()> {
        all.iter_mut().try_for_each(|t| self.rmsprop(step, t.gradient, &mut t.states[0], t.value))
    }
    /// [`Device::adamw`] of every tensor; each has two states, the mean first.
    fn adamw_all(&self, step: AdamwStep, all: &mut [Trained<'_, Self::Buffer>]) -> Result<()> {
        all.iter_mut().try_for_each(|t| {
            let [mean, mean_square] = t.states else { unreachable!("AdamW has two states") };
            self.adamw(step, t.gradient, mean, mean_square, t.value)
        })
    }
}
