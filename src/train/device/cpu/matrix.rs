//! Products with frozen matrices, which stay in the file's blocks.
//!
//! An exact product dequantises a part of the matrix at a time, small enough to stay in a core's cache, multiplies by
//! it and drops it. Fast products use rounded copies (`vnni`) or ggml's kernels.

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::gguf::TensorType;
use crate::gguf::blocks::dequantize_raw;
use crate::gguf::blocks::product::{AlignedBytes, Blocks, Kernels};
use crate::train::device::HostMatrix;

use crate::train::device::cpu::buffer::Buffer;
use crate::train::device::cpu::dense::{self, Layout, Target};
use crate::train::device::cpu::math::sum_of;
#[cfg(target_arch = "x86_64")]
use crate::train::device::cpu::vnni;
use crate::train::device::cpu::{elementwise, parallel};

/// Bytes of a dequantised part: half of a core's second-level cache.
const PART_BYTES: usize = 512 << 10;

/// Unused numbers after each row of a part. Rows a power of two apart would compete for a few lines of the first-level
/// cache.
const ROW_GAP: usize = 16;

/// Most columns of a part for [`Matrix::product_back`]; a multiple of every block's length.
const PART_COLS: usize = 512;

thread_local! {
    static PART: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// The rows of a matrix as the file stores them.
#[derive(Debug)]
struct FileRows {
    tensor_type: TensorType,
    n_bytes: usize,
    bytes: AlignedBytes,
}

impl FileRows {
    /// Dequantises columns `cols` of row `row`; both bounds are multiples of the block's length.
    fn read(&self, row: usize, cols: Range<usize>, values: &mut [f32]) {
        let (len, n_bytes) = (self.tensor_type.block_len() as usize, self.tensor_type.block_bytes() as usize);
        let at = row * self.n_bytes;
        let bytes = &self.bytes.as_slice()[at + cols.start / len * n_bytes..at + cols.end / len * n_bytes];
        dequantize_raw(self.tensor_type, bytes, values)
            .expect("`Matrix::new` has read a row of this type and length");
    }

    /// Dequantises columns `cols` of `rows` into `part`, with `stride` numbers from row to row.
    fn fill(&self, rows: Range<usize>, cols: Range<usize>, stride: usize, part: &mut Vec<f32>) {
        part.resize(rows.len() * stride, 0.0);
        for (row, values) in rows.zip(part.chunks_exact_mut(stride)) {
            self.read(row, cols.clone(), &mut values[..cols.len()]);
        }
    }
}

/// A frozen matrix, `[n_out][n_in]`.
#[derive(Debug)]
pub struct Matrix {
    n_in: usize,
    n_out: usize,
    /// The file's rows; `None` if only the rounded copies are read.
    rows: Option<FileRows>,
    /// The transposed copy for ggml's products backward.
    transposed: Option<Blocks>,
    /// The rounded copies for products with AVX-512 VNNI.
    #[cfg(target_arch = "x86_64")]
    rounded: Option<vnni::Rounded>,
}

impl Matrix {
    /// Checks the sizes, and that the type can be read.
    ///
    /// # Errors
    /// [`Error::Setting`] if the bytes do not match the shape, or the type cannot be read.
    pub fn new(matrix: HostMatrix) -> Result<Matrix> {
        let HostMatrix { name, tensor_type, n_in, n_out, bytes, .. } = matrix;
        let refuse = |reason: String| Error::setting(name.clone(), reason);
        let n_bytes = tensor_type.row_bytes(n_in as u64).unwrap_or(0) as usize;
        if n_bytes == 0 || bytes.len() != n_bytes * n_out {
            return Err(refuse(format!(
                "expected {n_out} rows of {n_in} numbers of type {tensor_type}, found {} bytes",
                bytes.len()
            )));
        }
        let mut row = vec![0.0; n_in];
        dequantize_raw(tensor_type, &bytes[..n_bytes], &mut row).map_err(refuse)?;
        Ok(Matrix {
            n_in,
            n_out,
            rows: Some(FileRows { tensor_type, n_bytes, bytes: bytes.as_slice().into() }),
            transposed: None,
            #[cfg(target_arch = "x86_64")]
            rounded: None,
        })
    }

    fn rows(&self) -> &FileRows {
        self.rows.as_ref().expect("kept for tables, and if there are no rounded copies")
    }

    fn is_quantised(&self) -> bool {
        self.rows().tensor_type.block_len() > 1
    }

    /// `ys[i][R][O] = x[R][I] Wᵀ` for several matrices. If all have rounded copies, x is rounded once.
    pub fn products(matrices: &[&Matrix], x: &[f32], n_rows: usize, ys: &mut [Buffer]) {
        #[cfg(target_arch = "x86_64")]
        if let Some(rounded) = matrices.iter().map(|w| w.rounded.as_ref()).collect::<Option<Vec<_>>>() {
            let Some(first) = matrices.first() else { return };
            let x = vnni::Rows::of(x, n_rows, first.n_in);
            return rounded.iter().zip(ys).for_each(|(w, y)| w.product(&x, y));
        }
        matrices.iter().zip(ys).for_each(|(w, y)| w.product(x, n_rows, y));
    }

    /// `y[R][O] = x[R][I] Wᵀ`, with the rounded copy if there is one.
    pub fn product(&self, x: &[f32], n_rows: usize, y: &mut [f32]) {
        #[cfg(target_arch = "x86_64")]
        if let Some(rounded) = &self.rounded {
            return rounded.product(&vnni::Rows::of(x, n_rows, self.n_in), y);
        }
        let (n_in, n_out) = (self.n_in, self.n_out);
        let stride = n_in + ROW_GAP;
        let n = (PART_BYTES / 4 / stride).clamp(32, 256).next_multiple_of(32);
        let target = Target::new(y);
        (0..n_out.div_ceil(n)).into_par_iter().for_each(|i| {
            let outs = i * n..((i + 1) * n).min(n_out);
            PART.with_borrow_mut(|part| {
                self.rows().fill(outs.clone(), 0..n_in, stride, part);
                let (x_layout, part_layout) = (Layout::rows(n_in), Layout::columns(stride));
                // SAFETY: tasks write to different columns of y, and `outs` lies within its n_out columns.
                unsafe {
                    dense::gemm_into(
                        [n_rows, outs.len(), n_in],
                        (1.0, x, x_layout),
                        (part, part_layout),
                        0.0,
                        target.at(outs.start, Layout::rows(n_out)),
                        dense::Threads::One,
                    );
                }
            });
        });
    }

    /// `dx[R][I] += dy[R][O] W`, with the rounded copy if there is one.
    pub fn product_back(&self, dy: &[f32], n_rows: usize, dx: &mut [f32]) {
        #[cfg(target_arch = "x86_64")]
        if let Some(rounded) = &self.rounded {
            return rounded.product_back(&vnni::Rows::of(dy, n_rows, self.n_out), dx);
        }
        let (n_in, n_out) = (self.n_in, self.n_out);
        let n_cols = self.task_cols();
        let target = Target::new(dx);
        (0..n_in.div_ceil(n_cols)).into_par_iter().for_each(|i| {
            let cols = i * n_cols..((i + 1) * n_cols).min(n_in);
            let stride = cols.len() + ROW_GAP;
            let n = (PART_BYTES / 4 / stride).max(32);
            PART.with_borrow_mut(|part| {
                for first in (0..n_out).step_by(n) {
                    let outs = first..(first + n).min(n_out);
                    self.rows().fill(outs.clone(), cols.clone(), stride, part);
                    let dy_layout = Layout::rows(n_out);
                    // SAFETY: tasks write to different columns of dx, and `cols` lies within its n_in columns.
                    unsafe {
                        dense::gemm_into(
                            [n_rows, cols.len(), outs.len()],
                            (1.0, &dy[outs.start..], dy_layout),
                            (part, Layout::rows(stride)),
                            1.0,
                            target.at(cols.start, Layout::rows(n_in)),
                            dense::Threads::One,
                        );
                    }
                }
            });
        });
    }

    /// Makes the transposed copy for [`Matrix::fast_product_back`].
    ///
    /// Does nothing if the matrix is not quantised, since its products backward are exact.
    pub fn keep_transposed(&mut self) {
        if self.is_quantised() {
            let sizes = [self.n_out, self.n_in];
            self.transposed =
                Blocks::transposed(sizes, |row, cols, values| self.rows().read(row, cols, values));
        }
    }

    /// [`Matrix::product`] with ggml's kernels.
    pub fn fast_product(&self, kernels: &Kernels, x: &[f32], n_rows: usize, y: &mut [f32]) {
        let (sizes, rows) = ([self.n_out, self.n_in], self.rows());
        kernels.multiply(rows.tensor_type, sizes, rows.bytes.as_slice(), x, n_rows, y);
        spread_nan(x, self.n_in, y, self.n_out);
    }

    /// [`Matrix::product_back`] with ggml's kernels, if there is a transposed copy.
    pub fn fast_product_back(&self, kernels: &Kernels, dy: &[f32], n_rows: usize, dx: &mut [f32]) {
        let Some(transposed) = &self.transposed else { return self.product_back(dy, n_rows, dx) };
        let mut product = vec![0.0; n_rows * self.n_in];
        kernels.product(transposed, dy, n_rows, &mut product);
        elementwise::add(1.0, &product, dx);
        spread_nan(dy, self.n_out, dx, self.n_in);
    }

    /// Makes the rounded copies for AVX-512 VNNI. They replace the file's blocks, except for a table.
    ///
    /// Does nothing if the matrix is not quantised, since its products are exact.
    #[cfg(target_arch = "x86_64")]
    pub fn keep_rounded(&mut self, is_table: bool) {
        if self.is_quantised() {
            let read = |row: usize, values: &mut [f32]| self.rows().read(row, 0..self.n_in, values);
            self.rounded = Some(vnni::Rounded::new([self.n_out, self.n_in], read));
            if !is_table {
                self.rows = None;
            }
        }
    }

    /// Columns per task of a product backward.
    ///
    /// Tasks have separate columns, so that no sums over tasks are needed. There are at least two tasks per thread if
    /// the block length allows, and whole panels of the widest kernel.
    fn task_cols(&self) -> usize {
        let step = (self.rows().tensor_type.block_len() as usize).max(32);
        self.n_in.div_ceil(2 * rayon::current_num_threads()).min(PART_COLS).next_multiple_of(step)
    }

    /// `y[r] = scale W[index(r)]`.
    pub fn embed(&self, index: impl Fn(usize) -> usize + Sync, scale: f32, y: &mut [f32]) {
        parallel::for_rows(y, self.n_in, |first, rows| {
            for (i, y) in rows.chunks_exact_mut(self.n_in).enumerate() {
                self.rows().read(index(first + i), 0..self.n_in, y);
                y.iter_mut().for_each(|y| *y *= scale);
            }
        });
    }
}

/// Fills a row of `y[R][n_out]` with NaN if the same row of `x[R][n_in]` has a non-finite value.
///
/// Rounding to 8 bits loses such values, and a run that has diverged would continue.
fn spread_nan(x: &[f32], n_in: usize, y: &mut [f32], n_out: usize) {
    parallel::for_rows(y, n_out, |first, rows| {
        for (y, x) in rows.chunks_exact_mut(n_out).zip(x[first * n_in..].chunks_exact(n_in)) {
            // 0 times a finite number is 0. Unlike a search, a sum becomes vector code.
            if sum_of(x, |x| x * 0.0) != 0.0 {
                y.fill(f32::NAN);
            }
        }
    });
}
