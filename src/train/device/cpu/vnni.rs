//! Products with both operands rounded to 8 bits, on AVX-512 VNNI.
//!
//! Operands are rounded in blocks of 32, as in ggml. One kernel serves both directions: `C[m][n] = A[m][k] B[k][n]`.
//! The 32 numbers of a block along k share a scale. A has the activations or their gradients, row by row. B is the
//! matrix in panels of 32 columns, with four consecutive k side by side. It is kept twice: forward its columns are the
//! matrix's outputs, backward its inputs.
//!
//! The instruction multiplies unsigned by signed bytes. So 128 is added to the bytes of B, and each block's sum starts
//! at -128 times the sum of the block of A, which cancels it.

use std::arch::x86_64::*;
use std::ops::Range;

use rayon::prelude::*;

use crate::train::device::cpu::dense::Target;
use crate::train::device::cpu::math::sum_of;
use crate::train::device::cpu::parallel;

/// Numbers that share a scale.
const BLOCK: usize = 32;

/// Words of four bytes in a block.
const WORDS: usize = BLOCK / 4;

/// Columns per panel: two registers.
const PANEL: usize = 32;

/// Rows per call of the kernel: 12 registers of integer sums and 12 of f32 sums leave 8 of 32.
const ROWS: usize = 6;

/// Blocks of a panel that are used for all rows before the next ones: 72 KiB, which stay in a core's cache. A whole
/// panel of an output matrix would not.
const DEPTH: usize = 64;

/// Adding 1.5 * 2^23 rounds to an integer, which is then in the low bits.
const ROUNDER: f32 = 12_582_912.0;

/// Whether the CPU has AVX-512 F and VNNI.
pub fn is_supported() -> bool {
    is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni")
}

/// A matrix `[n_out][n_in]` in both orders, each with 1.125 bytes per number.
#[derive(Debug)]
pub struct Rounded {
    /// Columns are outputs.
    forward: Panels,
    /// Columns are inputs.
    backward: Panels,
}

impl Rounded {
    /// Rounds a matrix; `read(row, values[n_in])` writes row `row`.
    pub fn new([n_out, n_in]: [usize; 2], read: impl Fn(usize, &mut [f32]) + Sync) -> Rounded {
        let (mut forward, mut backward) = (Panels::new([n_in, n_out]), Panels::new([n_out, n_in]));
        // A block of rows at a time, so that the whole matrix never exists in f32. The block is one panel forward, and
        // one block of every panel backward.
        const { assert!(BLOCK == PANEL) };
        let stride = n_in.next_multiple_of(PANEL);
        let mut values = vec![0.0; BLOCK * stride];
        for (block, panel) in forward.all.iter_mut().enumerate() {
            values.fill(0.0);
            let outs = block * BLOCK..((block + 1) * BLOCK).min(n_out);
            let rows = values.par_chunks_exact_mut(stride).zip(outs.into_par_iter());
            rows.for_each(|(values, out)| read(out, &mut values[..n_in]));
            let values = &values;
            panel.par_blocks().enumerate().for_each(|(b, target)| {
                target.round(|k| std::array::from_fn(|i| values[i * stride + b * BLOCK + k]));
            });
            backward.all.par_iter_mut().enumerate().for_each(|(p, panel)| {
                panel.block(block).round(|k| {
                    let at = k * stride + p * PANEL;
                    *values[at..at + PANEL].first_chunk().expect("a slice of a panel's length")
                });
            });
        }
        Rounded { forward, backward }
    }

    /// `y[R][O] = x[R][I] Wᵀ`.
    ///
    /// # Panics
    /// If [`is_supported`] is false.
    pub fn product(&self, x: &Rows, y: &mut [f32]) {
        self.forward.multiply(x, false, y);
    }

    /// `dx[R][I] += dy[R][O] W`.
    ///
    /// # Panics
    /// If [`is_supported`] is false.
    pub fn product_back(&self, dy: &Rows, dx: &mut [f32]) {
        self.backward.multiply(dy, true, dx);
    }
}

/// Rows rounded to bytes: the left side of a product, for any number of matrices.
#[derive(Debug)]
pub struct Rows {
    /// `[rows][blocks][WORDS]`.
    words: Vec<u32>,
    /// `[rows][blocks]`.
    scales: Vec<f32>,
    /// -128 times the sum of a block, `[rows][blocks]`.
    starts: Vec<i32>,
    n_rows: usize,
    n_cols: usize,
}

impl Rows {
    /// Rounds `x[n_rows][n_cols]`, and pads the rows to a multiple of [`ROWS`] with zeros.
    pub fn of(x: &[f32], n_rows: usize, n_cols: usize) -> Rows {
        assert!(x.len() == n_rows * n_cols, "x[n_rows][n_cols]");
        let n_blocks = n_cols.div_ceil(BLOCK);
        let n = n_rows.next_multiple_of(ROWS) * n_blocks;
        let (mut words, mut scales, mut starts) = (vec![0; n * WORDS], vec![0.0; n], vec![0; n]);
        let task = parallel::rows_per_task(n_cols);
        let parts = words.par_chunks_mut(task * n_blocks * WORDS).zip(scales.par_chunks_mut(task * n_blocks));
        let parts = parts.zip(starts.par_chunks_mut(task * n_blocks)).zip(x.par_chunks(task * n_cols));
        parts.for_each(|(((words, scales), starts), rows)| {
            let mut blocks = words.as_chunks_mut::<WORDS>().0.iter_mut().zip(scales).zip(starts);
            for row in rows.chunks_exact(n_cols) {
                let (whole, rest) = row.as_chunks::<BLOCK>();
                let mut last = [0.0; BLOCK];
                last[..rest.len()].copy_from_slice(rest);
                let last = if rest.is_empty() { None } else { Some(&last) };
                for (block, ((words, scale), start)) in whole.iter().chain(last).zip(&mut blocks) {
                    (*words, *scale, *start) = round_block(block);
                }
            }
        });
        Rows { words, scales, starts, n_rows, n_cols }
    }
}

/// The scale of a block with largest magnitude `most`, and its inverse.
fn scale_of(most: f32) -> (f32, f32) {
    if most > 0.0 { (most / 127.0, 127.0 / most) } else { (0.0, 0.0) }
}

/// The integer nearest to x, as a byte in two's complement.
fn byte(x: f32) -> u8 {
    (x + ROUNDER).to_bits() as u8
}

/// A block's words, its scale, and -128 times the sum of its bytes.
///
/// The scale is NaN if the block has a non-finite value. Bytes cannot hold it, and a run that has diverged would
/// continue.
fn round_block(block: &[f32; BLOCK]) -> ([u32; WORDS], f32, i32) {
    let mut most = [0.0f32; 16];
    for half in block.as_chunks::<16>().0 {
        for i in 0..16 {
            most[i] = most[i].max(half[i].abs());
        }
    }
    let (scale, inverse) = scale_of(most.iter().fold(0.0, |a: f32, &b| a.max(b)));
    // 0 times a finite number is 0. Unlike a search, a sum becomes vector code.
    let scale = scale + sum_of(block, |x| x * 0.0);
    let bytes = block.map(|x| byte(x * inverse));
    let sum: i32 = bytes.iter().map(|&q| i32::from(q as i8)).sum();
    let quads = bytes.as_chunks::<4>().0;
    (std::array::from_fn(|w| u32::from_le_bytes(quads[w])), scale, -128 * sum)
}

/// A matrix as panels of bytes, each plus 128.
#[derive(Debug)]
struct Panels {
    all: Vec<Panel>,
    n_blocks: usize,
    n_cols: usize,
}

/// Up to [`PANEL`] columns.
#[derive(Debug, Clone)]
struct Panel {
    /// `[blocks][WORDS][PANEL]`.
    words: Vec<u32>,
    /// `[blocks][PANEL]`.
    scales: Vec<f32>,
}

/// One block of every column of a panel.
struct PanelBlock<'a> {
    /// `[WORDS][PANEL]`.
    words: &'a mut [u32],
    /// `[PANEL]`.
    scales: &'a mut [f32],
}

impl Panel {
    fn par_blocks(&mut self) -> impl IndexedParallelIterator<Item = PanelBlock<'_>> {
        let words = self.words.par_chunks_exact_mut(WORDS * PANEL);
        words.zip(self.scales.par_chunks_exact_mut(PANEL)).map(|(words, scales)| PanelBlock { words, scales })
    }

    fn block(&mut self, block: usize) -> PanelBlock<'_> {
        let at = block * PANEL;
        PanelBlock {
            words: &mut self.words[at * WORDS..][..WORDS * PANEL],
            scales: &mut self.scales[at..][..PANEL],
        }
    }
}

impl PanelBlock<'_> {
    /// Rounds the block; `row(k)` returns the number of every column at k, from 0 to 31.
    fn round(self, row: impl Fn(usize) -> [f32; PANEL]) {
        let mut most = [0.0f32; PANEL];
        for k in 0..BLOCK {
            let row = row(k);
            for i in 0..PANEL {
                most[i] = most[i].max(row[i].abs());
            }
        }
        let mut inverses = [0.0f32; PANEL];
        for i in 0..PANEL {
            (self.scales[i], inverses[i]) = scale_of(most[i]);
        }
        for (w, words) in self.words.as_chunks_mut::<PANEL>().0.iter_mut().enumerate() {
            let four = [row(4 * w), row(4 * w + 1), row(4 * w + 2), row(4 * w + 3)];
            for i in 0..PANEL {
                let bytes = four.map(|row| byte(row[i] * inverses[i]));
                // + 128 flips the highest bit of a byte in two's complement.
                words[i] = u32::from_le_bytes(bytes) ^ 0x8080_8080;
            }
        }
    }
}

impl Panels {
    /// Empty panels for a matrix of `depth` rows and `n_cols` columns.
    fn new([depth, n_cols]: [usize; 2]) -> Panels {
        let n_blocks = depth.div_ceil(BLOCK);
        let panel = Panel { words: vec![0; n_blocks * WORDS * PANEL], scales: vec![0.0; n_blocks * PANEL] };
        Panels { all: vec![panel; n_cols.div_ceil(PANEL)], n_blocks, n_cols }
    }

    /// `C[R][n_cols] = A[R][depth] B`, or `C += A B` with `adds`.
    fn multiply(&self, a: &Rows, adds: bool, c: &mut [f32]) {
        assert!(is_supported(), "the CPU has AVX-512 VNNI");
        assert!(a.n_cols.div_ceil(BLOCK) == self.n_blocks, "operands of the same depth");
        assert!(c.len() == a.n_rows * self.n_cols, "C[R][n_cols]");
        let n_cols = self.n_cols;
        let target = Target::new(c);
        self.all.par_iter().enumerate().for_each(|(p, panel)| {
            let mut tile = [[0.0f32; PANEL]; ROWS];
            let width = PANEL.min(n_cols - p * PANEL);
            for from in (0..self.n_blocks).step_by(DEPTH) {
                let blocks = from..(from + DEPTH).min(self.n_blocks);
                let adds = adds || from > 0;
                for first in (0..a.n_rows).step_by(ROWS) {
                    // SAFETY: the CPU has AVX-512 F and VNNI, as asserted.
                    unsafe { kernel(a, first, panel, blocks.clone(), &mut tile) };
                    for (row, sums) in (first..a.n_rows).zip(&tile) {
                        // SAFETY: tasks write to different columns of C, which outlives them.
                        let c = unsafe { target.row(row * n_cols + p * PANEL, width) };
                        match adds {
                            true => c.iter_mut().zip(sums).for_each(|(c, sum)| *c += sum),
                            false => c.copy_from_slice(&sums[..width]),
                        }
                    }
                }
            }
        });
    }
}

/// `tile[ROWS][PANEL]` = rows `first..first + ROWS` of A times a panel of B, over `blocks` of the depth.
///
/// # Safety
/// - The CPU has AVX-512 F and VNNI.
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn kernel(a: &Rows, first: usize, b: &Panel, blocks: Range<usize>, tile: &mut [[f32; PANEL]; ROWS]) {
    let n = a.n_cols.div_ceil(BLOCK);
    assert!(a.scales.len() >= (first + ROWS) * n && a.starts.len() == a.scales.len(), "rows within A");
    assert!(a.words.len() == a.scales.len() * WORDS, "a scale for each block of A");
    assert!(blocks.end <= n && b.scales.len() == n * PANEL, "as many blocks in B as in A");
    assert!(b.words.len() == n * PANEL * WORDS, "a scale for each block of B");
    // SAFETY: block `i` of the panel and of rows `first` to `first + ROWS - 1` lie within their vectors, as asserted.
    // Loads of 16 numbers start at 0 or 16 within a panel's 32.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
        for i in blocks {
            let of_a = |row: usize| (first + row) * n + i;
            let mut whole: [_; ROWS] = std::array::from_fn(|row| {
                let start = _mm512_set1_epi32(*a.starts.as_ptr().add(of_a(row)));
                [start, start]
            });
            let words = a.words.as_ptr().add(of_a(0) * WORDS);
            let columns = b.words.as_ptr().add(i * PANEL * WORDS);
            for w in 0..WORDS {
                let b0 = _mm512_loadu_si512(columns.add(w * PANEL).cast());
                let b1 = _mm512_loadu_si512(columns.add(w * PANEL + 16).cast());
                for (row, whole) in whole.iter_mut().enumerate() {
                    let four = _mm512_set1_epi32(*words.add(row * n * WORDS + w) as i32);
                    whole[0] = _mm512_dpbusd_epi32(whole[0], b0, four);
                    whole[1] = _mm512_dpbusd_epi32(whole[1], b1, four);
                }
            }
            let scales = b.scales.as_ptr().add(i * PANEL);
            let scale = [_mm512_loadu_ps(scales), _mm512_loadu_ps(scales.add(16))];
            for (row, (sums, whole)) in sums.iter_mut().zip(whole).enumerate() {
                let a_scale = _mm512_set1_ps(*a.scales.as_ptr().add(of_a(row)));
                for half in 0..2 {
                    let factor = _mm512_mul_ps(a_scale, scale[half]);
                    sums[half] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole[half]), factor, sums[half]);
                }
            }
        }
        for (row, sums) in tile.iter_mut().zip(sums) {
            _mm512_storeu_ps(row.as_mut_ptr(), sums[0]);
            _mm512_storeu_ps(row.as_mut_ptr().add(16), sums[1]);
        }
    }
}
