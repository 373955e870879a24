//! A device that computes nothing and counts the bytes a GPU would allocate.
//!
//! One training step on this device finds the GPU's peak memory. The step allocates every buffer as on a GPU. At each
//! operation, this device adds the temporary buffers that `vendor/cuda` allocates there. Its buffers have a length but
//! no values, so weights are not read either ([`Device::reads_values`]).

use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::error::Result;

use crate::train::data::pack::Packed;
use crate::train::device::limits;
use crate::train::device::name::Frozen;
use crate::train::device::{
    Activation, AdamwStep, Attention, Device, Gemm, HostMatrix, Index, Norm, RmspropStep, Rope,
};
use crate::train::recipe::dpo::{AnswerLogps, PairLoss, Preference};

/// Bytes of a number, and of its bf16 copy.
const F32: usize = size_of::<f32>();
const BF16: usize = 2;

/// Bytes per pair in `detox_cuda_preference_loss`: two references, and the five numbers of `detox_cuda_pair_cost`.
const PAIR_COST: usize = 7 * size_of::<f64>();

/// The counting device.
#[derive(Debug)]
pub struct Counting {
    frozen: Frozen,
    workspace_bytes: usize,
    count: Arc<Mutex<Count>>,
}

#[derive(Debug, Default)]
struct Count {
    /// Bytes allocated now.
    n_bytes: u64,
    /// The most bytes allocated at once.
    peak: u64,
}

/// An allocation, counted until it is dropped.
#[derive(Debug)]
struct Memory {
    count: Arc<Mutex<Count>>,
    n_bytes: u64,
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.count.lock().unwrap_or_else(PoisonError::into_inner).n_bytes -= self.n_bytes;
    }
}

/// A buffer's length; its bytes are counted until it is dropped.
#[derive(Debug)]
pub struct Buffer {
    len: usize,
    _memory: Memory,
}

/// A frozen matrix's sizes, and the bytes of its copies.
#[derive(Debug)]
pub struct Matrix {
    n_in: usize,
    n_out: usize,
    /// The file's blocks, if products or embeddings read them.
    _blocks: Option<Memory>,
    /// The bf16 copy. A table gets it with its first product.
    rounded: OnceLock<Memory>,
}

/// A batch's sizes, and its bytes.
#[derive(Debug)]
pub struct Rows {
    n_rows: usize,
    n_outputs: usize,
    n_pairs: usize,
    _memory: Memory,
}

impl Counting {
    /// A GPU that keeps frozen matrices as `frozen`.
    pub fn new(frozen: Frozen) -> Counting {
        Counting { frozen, workspace_bytes: limits::WORKSPACE_BYTES, count: Arc::default() }
    }

    /// The emulated GPU, whose products need no workspace.
    pub fn emulated(frozen: Frozen) -> Counting {
        Counting { workspace_bytes: 0, ..Counting::new(frozen) }
    }

    /// The most bytes that were allocated at once.
    pub fn peak_bytes(&self) -> u64 {
        self.count.lock().unwrap_or_else(PoisonError::into_inner).peak
    }

    fn allocate(&self, n_bytes: usize) -> Memory {
        // As in `allocate` of vendor/cuda/device.cu: an empty buffer takes a byte.
        let n_bytes = n_bytes.max(1) as u64;
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        count.n_bytes += n_bytes;
        count.peak = count.peak.max(count.n_bytes);
        Memory { count: self.count.clone(), n_bytes }
    }

    fn buffer(&self, len: usize) -> Buffer {
        Buffer { len, _memory: self.allocate(len * F32) }
    }

    /// Counts the workspace of one product with cuBLASLt, which is freed at once (`vendor/cuda/multiply.cu`).
    fn multiply(&self) {
        if self.workspace_bytes > 0 {
            drop(self.allocate(self.workspace_bytes));
        }
    }

    /// Makes the bf16 copy of `matrix` that its products read, if it is kept.
    fn round(&self, matrix: &Matrix) {
        if self.frozen == Frozen::Bf16 {
            matrix.rounded.get_or_init(|| self.allocate(matrix.n_in * matrix.n_out * BF16));
        }
    }

    /// One product over the parts of `matrix` (`for_parts` in `vendor/cuda/product.cu`).
    fn multiply_parts(&self, matrix: &Matrix) {
        let part = matrix.rounded.get().is_none().then(|| {
            let whole_rows = limits::PART_BYTES / BF16 / matrix.n_in / limits::PART_ROWS * limits::PART_ROWS;
            self.allocate(whole_rows.max(limits::PART_ROWS).min(matrix.n_out) * matrix.n_in * BF16)
        });
        self.multiply();
        drop(part);
    }

    /// A sum over the rows of a batch (`vendor/cuda/sums.cuh`).
    fn sum_over_rows(&self, n_rows: usize, n_cols: usize) {
        drop(self.allocate(n_rows.div_ceil(limits::SUM_ROWS) * n_cols * F32));
    }
}

/// Integers of a batch on the GPU (`detox_cuda_rows_open` in `vendor/cuda/rows.cu`).
fn n_integers(packed: &Packed) -> usize {
    let (n_rows, n_outputs) = (packed.n_rows(), packed.outputs.len());
    // A chain has each index, and the entries before and after it with the same one.
    let chains = 3 * (2 * n_rows + n_outputs);
    let tiles = [limits::LARGE_TILE, limits::SMALL_TILE].map(|tile| n_tile_integers(packed, tile));
    3 * n_rows + n_outputs + packed.answers.len() + chains + tiles.iter().sum::<usize>()
}

/// Integers of attention's tiles of at most `tile` rows.
fn n_tile_integers(packed: &Packed, tile: usize) -> usize {
    let of_tile = |first: usize, end: usize| {
        let sees = packed.segments.iter().filter(|of| of.prefix.start < end && first < of.prefix.end);
        // Five for the queries, four for the keys, and two for each range of rows that sees them.
        5 + 4 + 2 * (1 + sees.count())
    };
    let rows = packed.segments.iter().map(|segment| &segment.rows);
    rows.flat_map(|rows| rows.clone().step_by(tile).map(|first| of_tile(first, (first + tile).min(rows.end))))
        .sum()
}

impl Device for Counting {
    type Buffer = Buffer;
    type Matrix = Matrix;
    type Rows = Rows;

    fn describe(&self) -> String {
        format!("counts a GPU's memory, {} weights", self.frozen.name())
    }

    fn reads_values(&self) -> bool {
        false
    }

    fn logit_bytes(&self) -> usize {
        limits::LOGIT_BYTES
    }

    fn zeros(&self, n: usize) -> Result<Buffer> {
        Ok(self.buffer(n))
    }

    fn upload(&self, values: &[f32]) -> Result<Buffer> {
        Ok(self.buffer(values.len()))
    }

    fn write(&self, _values: &[f32], _buffer: &mut Buffer) -> Result<()> {
        Ok(())
    }

    fn download(&self, buffer: &Buffer) -> Result<Vec<f32>> {
        Ok(vec![0.0; buffer.len])
    }

    fn clear(&self, _buffer: &mut Buffer) -> Result<()> {
        Ok(())
    }

    fn matrix(&self, matrix: HostMatrix) -> Result<Matrix> {
        let HostMatrix { n_in, n_out, bytes, is_table, .. } = matrix;
        let blocks = Some(self.allocate(bytes.len()));
        let mut made = Matrix { n_in, n_out, _blocks: blocks, rounded: OnceLock::new() };
        if self.frozen == Frozen::Bf16 && !is_table {
            self.round(&made);
            made._blocks = None;
        }
        Ok(made)
    }

    fn rows(&self, packed: &Packed) -> Result<Rows> {
        Ok(Rows {
            n_rows: packed.n_rows(),
            n_outputs: packed.outputs.len(),
            n_pairs: packed.answers.len() / 2,
            _memory: self.allocate(n_integers(packed) * size_of::<i32>()),
        })
    }

    fn product(&self, w: &Matrix, x: &Buffer, n_rows: usize, y: &mut Buffer) -> Result<()> {
        self.products(&[w], x, n_rows, std::slice::from_mut(y))
    }

    fn products(&self, ws: &[&Matrix], x: &Buffer, _n_rows: usize, _ys: &mut [Buffer]) -> Result<()> {
        ws.iter().for_each(|w| self.round(w));
        let rounded = self.allocate(x.len * BF16);
        ws.iter().for_each(|w| self.multiply_parts(w));
        drop(rounded);
        Ok(())
    }

    fn product_back(&self, w: &Matrix, dy: &Buffer, _n_rows: usize, _dx: &mut Buffer) -> Result<()> {
        self.round(w);
        let rounded = self.allocate(dy.len * BF16);
        self.multiply_parts(w);
        drop(rounded);
        Ok(())
    }

    fn gemm(&self, _gemm: Gemm, _a: &Buffer, _b: &Buffer, _c: &mut Buffer) -> Result<()> {
        self.multiply();
        Ok(())
    }

    fn embed(&self, _w: &Matrix, _rows: &Rows, _scale: f32, _y: &mut Buffer) -> Result<()> {
        Ok(())
    }

    fn gather(
        &self,
        _table: &Buffer,
        _n_cols: usize,
        _index: &Index,
        _rows: &Rows,
        _scale: f32,
        _y: &mut Buffer,
    ) -> Result<()> {
        Ok(())
    }

    fn scatter_add(
        &self,
        _dy: &Buffer,
        _n_cols: usize,
        _index: &Index,
        _rows: &Rows,
        _scale: f32,
        _dtable: &mut Buffer,
    ) -> Result<()> {
        Ok(())
    }

    fn norm(
        &self,
        _norm: Norm,
        _x: &Buffer,
        _weight: &Buffer,
        _bias: Option<&Buffer>,
        _n_cols: usize,
        _y: &mut Buffer,
    ) -> Result<()> {
        Ok(())
    }

    fn norm_back(
        &self,
        _norm: Norm,
        x: &Buffer,
        _weight: &Buffer,
        _dy: &Buffer,
        n_cols: usize,
        _dx: &mut Buffer,
        dweight: Option<&mut Buffer>,
        dbias: Option<&mut Buffer>,
    ) -> Result<()> {
        let n_rows = x.len / n_cols;
        // The mean and the inverse deviation of each row.
        let statistics = self.allocate(if dweight.is_some() { 2 * n_rows * F32 } else { 0 });
        dweight.into_iter().chain(dbias).for_each(|_| self.sum_over_rows(n_rows, n_cols));
        drop(statistics);
        Ok(())
    }

    fn rope(&self, _rope: &Rope, _rows: &Rows, _head_dim: usize, _back: bool, _x: &mut Buffer) -> Result<()> {
        Ok(())
    }

    fn attention(
        &self,
        _attention: &Attention,
        _rows: &Rows,
        _q: &Buffer,
        _k: &Buffer,
        _v: &Buffer,
        _out: &mut Buffer,
        _lse: &mut Buffer,
    ) -> Result<()> {
        Ok(())
    }

    fn attention_back(
        &self,
        attention: &Attention,
        rows: &Rows,
        _q: &Buffer,
        _k: &Buffer,
        _v: &Buffer,
        _out: &Buffer,
        _lse: &Buffer,
        _dout: &Buffer,
        _dq: &mut Buffer,
        _dk: &mut Buffer,
        _dv: &mut Buffer,
    ) -> Result<()> {
        // The dot product of out and dout, per row and head.
        drop(self.allocate(rows.n_rows * attention.n_head * F32));
        Ok(())
    }

    fn activate(
        &self,
        _activation: Activation,
        _gate: &Buffer,
        _up: Option<&Buffer>,
        _y: &mut Buffer,
    ) -> Result<()> {
        Ok(())
    }

    fn activate_back(
        &self,
        _activation: Activation,
        _gate: &Buffer,
        _up: Option<&Buffer>,
        _dy: &Buffer,
        _dgate: &mut Buffer,
        _dup: Option<&mut Buffer>,
    ) -> Result<()> {
        Ok(())
    }

    fn add(&self, _scale: f32, _x: &Buffer, _y: &mut Buffer) -> Result<()> {
        Ok(())
    }

    fn add_to_rows(&self, _bias: &Buffer, _n_cols: usize, _y: &mut Buffer) -> Result<()> {
        Ok(())
    }

    fn sum_rows(&self, dy: &Buffer, n_cols: usize, _dbias: &mut Buffer) -> Result<()> {
        self.sum_over_rows(dy.len / n_cols, n_cols);
        Ok(())
    }

    fn scale_rows(&self, _factors: &Buffer, _first: usize, _n_cols: usize, _x: &mut Buffer) -> Result<()> {
        Ok(())
    }

    fn add_columns(
        &self,
        _src: &Buffer,
        _src_cols: usize,
        _from: usize,
        _dst: &mut Buffer,
        _dst_cols: usize,
        _to: usize,
        _n: usize,
    ) -> Result<()> {
        Ok(())
    }

    fn logprobs(
        &self,
        _rows: &Rows,
        _range: Range<usize>,
        _scale: f32,
        _n_vocab: usize,
        _gradient: bool,
        _logits: &mut Buffer,
        _logps: &mut Buffer,
    ) -> Result<()> {
        Ok(())
    }

    fn preference_loss(
        &self,
        _preference: Preference,
        rows: &Rows,
        references: &[AnswerLogps],
        _n_pairs: usize,
        logps: &Buffer,
        dlogps: &mut Buffer,
    ) -> Result<Vec<(AnswerLogps, PairLoss)>> {
        assert!(logps.len == rows.n_outputs && dlogps.len == rows.n_outputs, "a number for each output");
        drop(self.allocate(rows.n_pairs * PAIR_COST));
        let zero =
            PairLoss { loss: 0.0, dchosen: 0.0, drejected: 0.0, chosen_reward: 0.0, rejected_reward: 0.0 };
        Ok(references.iter().map(|reference| (*reference, zero)).collect())
    }

    fn square_sum(&self, x: &Buffer) -> Result<f64> {
        self.square_sum_all(std::slice::from_ref(x))
    }

    fn square_sum_all(&self, all: &[Buffer]) -> Result<f64> {
        drop(self.allocate(all.len() * limits::SQUARE_SUM_BLOCKS * size_of::<f64>()));
        Ok(0.0)
    }

    fn rmsprop(
        &self,
        _step: RmspropStep,
        _gradient: &Buffer,
        _mean_square: &mut Buffer,
        _value: &mut Buffer,
    ) -> Result<()> {
        Ok(())
    }

    fn adamw(
        &self,
        _step: AdamwStep,
        _gradient: &Buffer,
        _mean: &mut Buffer,
        _mean_square: &mut Buffer,
        _value: &mut Buffer,
    ) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Gemm =
        Gemm { m: 2, n: 2, k: 2, transpose_a: false, transpose_b: false, alpha: 1.0, beta: 0.0 };

    #[test]
    fn the_peak_counts_what_lives_at_the_same_time() {
        let device = Counting::emulated(Frozen::Bf16);
        let first = device.zeros(10).unwrap();
        drop(device.space(100).unwrap());
        let second = device.copy(&first, 10).unwrap();
        assert_eq!(device.peak_bytes(), 4 * 110, "the copy found room where the dropped buffer was");
        drop((first, second));
        drop(device.zeros(50).unwrap());
        assert_eq!(device.peak_bytes(), 4 * 110);
    }

    #[test]
    fn products_take_a_workspace_and_rounded_operands() {
        let matrix = || HostMatrix {
            name: "blk.0.ffn_up.weight".into(),
            tensor_type: crate::gguf::TensorType::F32,
            n_in: 8,
            n_out: 16,
            bytes: vec![0; 4 * 8 * 16],
            is_table: false,
        };
        // Blocks and bf16 copy while it loads; then the copy, x, y and x in bf16.
        for (frozen, loading, loaded) in [(Frozen::Bf16, 512 + 256, 256), (Frozen::Quantised, 512, 512 + 256)]
        {
            let device = Counting::emulated(frozen);
            let w = device.matrix(matrix()).unwrap();
            assert_eq!(device.peak_bytes(), loading);
            let (x, mut y) = (device.zeros(3 * 8).unwrap(), device.zeros(3 * 16).unwrap());
            device.product(&w, &x, 3, &mut y).unwrap();
            assert_eq!(device.peak_bytes(), loading.max(loaded + 4 * 24 + 4 * 48 + 2 * 24), "{frozen:?}");
        }
        let device = Counting::new(Frozen::Bf16);
        let (a, b, mut c) = (device.zeros(4).unwrap(), device.zeros(4).unwrap(), device.zeros(4).unwrap());
        device.gemm(PLAIN, &a, &b, &mut c).unwrap();
        assert_eq!(device.peak_bytes(), 3 * 16 + limits::WORKSPACE_BYTES as u64);
    }
}
