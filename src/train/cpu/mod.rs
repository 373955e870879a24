//! The trainer's operations on the CPU: the reference for every other device.
//!
//! One file an operation, as plain functions over slices; [`Cpu`] runs them on threads of its own. Sums are
//! added up in an order that does not depend on which thread is faster, so that the same command gives the
//! same numbers to the bit.

mod attention;
mod dense;
mod elementwise;
mod ggml;
mod head;
mod math;
mod matrix;
mod norm;
mod optimizer;
mod parallel;
mod rope;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod vnni;

use std::ops::Range;

use rayon::ThreadPool;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

use super::device::{
    Activation, AdamwStep, Attention, Device, Gemm, HostMatrix, Index, Norm, RmspropStep, Rope,
};
use super::pack::Packed;

use ggml::Kernels;
pub use matrix::Matrix;

/// How products with frozen matrices are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Products {
    /// In f32, with the numbers that the blocks stand for.
    Exact,
    /// With quantised matrices, the other operand rounded to 8 bits in blocks of 32: by kernels of this program where
    /// the CPU has AVX-512 VNNI, which round the matrix too; else by ggml's, backward over a transposed copy in Q8_0.
    Fast,
}

impl Products {
    /// Fast where this program's kernels run and their copies of `n_weights` numbers fit into half the machine's
    /// memory: what they round moves losses less than another seed does (docs/training.md). Else exact.
    pub fn auto(n_weights: u64) -> Products {
        let copies = n_weights.saturating_mul(19) / 8;
        let fits = copies <= super::memory::total_bytes() / 2;
        if has_vnni() && fits { Products::Fast } else { Products::Exact }
    }
}

#[cfg(target_arch = "x86_64")]
fn has_vnni() -> bool {
    vnni::is_supported()
}

#[cfg(not(target_arch = "x86_64"))]
fn has_vnni() -> bool {
    false
}

/// A CPU's threads.
#[derive(Debug)]
pub struct Cpu {
    pool: ThreadPool,
    products: Products,
    /// There where fast products are ggml's.
    kernels: Option<Kernels>,
}

impl Cpu {
    /// Starts threads.
    ///
    /// # Errors
    /// [`Error::Setting`] where the system gives no threads.
    pub fn new(n_threads: usize, products: Products) -> Result<Cpu> {
        Cpu::with(n_threads, products, products == Products::Fast && !has_vnni())
    }

    /// As [`Cpu::new`]; with `by_ggml` fast products are ggml's whatever the CPU has.
    fn with(n_threads: usize, products: Products, by_ggml: bool) -> Result<Cpu> {
        let refuse = |reason: String| Error::setting("-t/--threads", reason);
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(n_threads.max(1))
            .thread_name(|i| format!("train-{i}"))
            .build()
            .map_err(|error| refuse(format!("cannot start {n_threads} threads: {error}")))?;
        let kernels = match by_ggml {
            false => None,
            true => {
                let kernels = Kernels::new(n_threads.max(1));
                Some(kernels.ok_or_else(|| refuse(format!("ggml cannot start {n_threads} threads")))?)
            }
        };
        Ok(Cpu { pool, products, kernels })
    }
}

impl Device for Cpu {
    type Buffer = Vec<f32>;
    type Matrix = Matrix;
    type Rows = Packed;

    fn describe(&self) -> String {
        let products = match self.products {
            Products::Exact => "exact",
            Products::Fast if self.kernels.is_some() => "fast (ggml)",
            Products::Fast => "fast (AVX-512 VNNI)",
        };
        let n = self.pool.current_num_threads();
        let threads = if n == 1 { "1 thread".to_owned() } else { format!("{n} threads") };
        format!("cpu, {threads}, {products} products")
    }

    fn scope<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.pool.install(work)
    }

    fn zeros(&self, n: usize) -> Result<Vec<f32>> {
        Ok(vec![0.0; n])
    }

    fn upload(&self, values: &[f32]) -> Result<Vec<f32>> {
        Ok(values.to_vec())
    }

    fn write(&self, values: &[f32], buffer: &mut Vec<f32>) -> Result<()> {
        buffer.copy_from_slice(values);
        Ok(())
    }

    fn download(&self, buffer: &Vec<f32>) -> Result<Vec<f32>> {
        Ok(buffer.clone())
    }

    fn clear(&self, buffer: &mut Vec<f32>) -> Result<()> {
        buffer.fill(0.0);
        Ok(())
    }

    fn matrix(&self, matrix: HostMatrix) -> Result<Matrix> {
        let mut matrix = Matrix::new(matrix)?;
        if self.kernels.is_some() {
            self.pool.install(|| matrix.keep_transposed());
        }
        #[cfg(target_arch = "x86_64")]
        if self.products == Products::Fast && self.kernels.is_none() {
            self.pool.install(|| matrix.keep_rounded());
        }
        Ok(matrix)
    }

    fn rows(&self, packed: &Packed) -> Result<Packed> {
        Ok(packed.clone())
    }

    fn product(&self, w: &Matrix, x: &Vec<f32>, n_rows: usize, y: &mut Vec<f32>) -> Result<()> {
        self.pool.install(|| match &self.kernels {
            Some(kernels) => w.fast_product(kernels, x, n_rows, y),
            None => w.product(x, n_rows, y),
        });
        Ok(())
    }

    fn product_back(&self, w: &Matrix, dy: &Vec<f32>, n_rows: usize, dx: &mut Vec<f32>) -> Result<()> {
        self.pool.install(|| match &self.kernels {
            Some(kernels) => w.fast_product_back(kernels, dy, n_rows, dx),
            None => w.product_back(dy, n_rows, dx),
        });
        Ok(())
    }

    fn gemm(&self, gemm: Gemm, a: &Vec<f32>, b: &Vec<f32>, c: &mut Vec<f32>) -> Result<()> {
        self.pool.install(|| dense::gemm(gemm, a, b, c));
        Ok(())
    }

    fn embed(&self, w: &Matrix, rows: &Packed, scale: f32, y: &mut Vec<f32>) -> Result<()> {
        self.pool.install(|| w.embed(|row| rows.tokens[row] as usize, scale, y));
        Ok(())
    }

    fn gather(
        &self,
        table: &Vec<f32>,
        n_cols: usize,
        index: &Index,
        rows: &Packed,
        scale: f32,
        y: &mut Vec<f32>,
    ) -> Result<()> {
        self.pool.install(|| elementwise::gather(table, n_cols, |row| lookup(index, rows, row), scale, y));
        Ok(())
    }

    fn scatter_add(
        &self,
        dy: &Vec<f32>,
        n_cols: usize,
        index: &Index,
        rows: &Packed,
        scale: f32,
        dtable: &mut Vec<f32>,
    ) -> Result<()> {
        elementwise::scatter_add(dy, n_cols, |row| lookup(index, rows, row), scale, dtable);
        Ok(())
    }

    fn norm(
        &self,
        norm: Norm,
        x: &Vec<f32>,
        weight: &Vec<f32>,
        bias: Option<&Vec<f32>>,
        n_cols: usize,
        y: &mut Vec<f32>,
    ) -> Result<()> {
        self.pool.install(|| norm::norm(norm, x, weight, bias.map(Vec::as_slice), n_cols, y));
        Ok(())
    }

    fn norm_back(
        &self,
        norm: Norm,
        x: &Vec<f32>,
        weight: &Vec<f32>,
        dy: &Vec<f32>,
        n_cols: usize,
        dx: &mut Vec<f32>,
        dweight: Option<&mut Vec<f32>>,
        dbias: Option<&mut Vec<f32>>,
    ) -> Result<()> {
        let (dweight, dbias) = (dweight.map(Vec::as_mut_slice), dbias.map(Vec::as_mut_slice));
        self.pool.install(|| norm::norm_back(norm, x, weight, dy, n_cols, dx, dweight, dbias));
        Ok(())
    }

    fn rope(&self, rope: &Rope, rows: &Packed, head_dim: usize, back: bool, x: &mut Vec<f32>) -> Result<()> {
        self.pool.install(|| rope::rope(rope, &rows.positions, head_dim, back, x));
        Ok(())
    }

    fn attention(
        &self,
        attention: &Attention,
        rows: &Packed,
        q: &Vec<f32>,
        k: &Vec<f32>,
        v: &Vec<f32>,
        out: &mut Vec<f32>,
        lse: &mut Vec<f32>,
    ) -> Result<()> {
        self.pool.install(|| attention::attention(attention, rows, q, k, v, out, lse));
        Ok(())
    }

    fn attention_back(
        &self,
        attention: &Attention,
        rows: &Packed,
        q: &Vec<f32>,
        k: &Vec<f32>,
        v: &Vec<f32>,
        out: &Vec<f32>,
        lse: &Vec<f32>,
        dout: &Vec<f32>,
        dq: &mut Vec<f32>,
        dk: &mut Vec<f32>,
        dv: &mut Vec<f32>,
    ) -> Result<()> {
        self.pool.install(|| {
            attention::attention_back(attention, rows, q, k, v, out, lse, dout, dq, dk, dv);
        });
        Ok(())
    }

    fn activate(
        &self,
        activation: Activation,
        gate: &Vec<f32>,
        up: Option<&Vec<f32>>,
        y: &mut Vec<f32>,
    ) -> Result<()> {
        self.pool.install(|| elementwise::activate(activation, gate, up.map(Vec::as_slice), y));
        Ok(())
    }

    fn activate_back(
        &self,
        activation: Activation,
        gate: &Vec<f32>,
        up: Option<&Vec<f32>>,
        dy: &Vec<f32>,
        dgate: &mut Vec<f32>,
        dup: Option<&mut Vec<f32>>,
    ) -> Result<()> {
        let (up, dup) = (up.map(Vec::as_slice), dup.map(Vec::as_mut_slice));
        self.pool.install(|| elementwise::activate_back(activation, gate, up, dy, dgate, dup));
        Ok(())
    }

    fn add(&self, scale: f32, x: &Vec<f32>, y: &mut Vec<f32>) -> Result<()> {
        self.pool.install(|| elementwise::add(scale, x, y));
        Ok(())
    }

    fn add_to_rows(&self, bias: &Vec<f32>, n_cols: usize, y: &mut Vec<f32>) -> Result<()> {
        self.pool.install(|| elementwise::add_to_rows(bias, n_cols, y));
        Ok(())
    }

    fn sum_rows(&self, dy: &Vec<f32>, n_cols: usize, dbias: &mut Vec<f32>) -> Result<()> {
        self.pool.install(|| elementwise::sum_rows(dy, n_cols, dbias));
        Ok(())
    }

    fn scale_rows(&self, factors: &[f32], n_cols: usize, x: &mut Vec<f32>) -> Result<()> {
        self.pool.install(|| elementwise::scale_rows(factors, n_cols, x));
        Ok(())
    }

    fn add_columns(
        &self,
        src: &Vec<f32>,
        src_cols: usize,
        from: usize,
        dst: &mut Vec<f32>,
        dst_cols: usize,
        to: usize,
        n: usize,
    ) -> Result<()> {
        self.pool.install(|| elementwise::add_columns(src, src_cols, from, dst, dst_cols, to, n));
        Ok(())
    }

    fn logprobs(
        &self,
        rows: &Packed,
        range: Range<usize>,
        scale: f32,
        n_vocab: usize,
        gradient: bool,
        logits: &mut Vec<f32>,
    ) -> Result<Vec<f32>> {
        let outputs = &rows.outputs[range];
        Ok(self.pool.install(|| head::logprobs(outputs, scale, n_vocab, gradient, logits)))
    }

    fn square_sum(&self, x: &Vec<f32>) -> Result<f64> {
        Ok(self.pool.install(|| elementwise::square_sum(x)))
    }

    fn rmsprop(
        &self,
        step: RmspropStep,
        gradient: &Vec<f32>,
        mean_square: &mut Vec<f32>,
        value: &mut Vec<f32>,
    ) -> Result<()> {
        self.pool.install(|| optimizer::rmsprop(step, gradient, mean_square, value));
        Ok(())
    }

    fn adamw(
        &self,
        step: AdamwStep,
        gradient: &Vec<f32>,
        mean: &mut Vec<f32>,
        mean_square: &mut Vec<f32>,
        value: &mut Vec<f32>,
    ) -> Result<()> {
        self.pool.install(|| optimizer::adamw(step, gradient, mean, mean_square, value));
        Ok(())
    }
}

/// The row of the table that row `row` of a batch looks at.
fn lookup(index: &Index, rows: &Packed, row: usize) -> usize {
    match index {
        Index::Token => rows.tokens[row] as usize,
        Index::Position => rows.positions[row],
        Index::Output(range) => rows.outputs[range.start + row].row,
    }
}
