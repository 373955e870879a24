//! Products with operands rounded to 8 bits in blocks of 32, as ggml rounds them, by AVX-512's instruction for
//! sums of products of bytes.
//!
//! One kernel serves both directions: `C[m][n] = A[m][k] B[k][n]`, where the numbers of a block of 32 along k share
//! a scale. A's rows lie as they are; B lies in panels of 32 columns with each four of k side by side. Forward, A is
//! the matrix and B the transposed input; backward, A is the gradient and B the matrix. The instruction takes
//! unsigned bytes on one side: A's are raised by 128, and what that adds is taken away at the start of each block.

use std::arch::x86_64::*;

use rayon::prelude::*;

use super::dense::Target;

/// Numbers that share a scale.
const BLOCK: usize = 32;

/// Words of four bytes in a block.
const WORDS: usize = BLOCK / 4;

/// Columns in a panel: two registers.
const PANEL: usize = 32;

/// Rows that the kernel computes at a time: 12 registers of whole sums and 12 of f32 ones leave 8 of 32.
const ROWS: usize = 6;

/// Rows of the matrix in one task forward.
const TASK_ROWS: usize = 16 * ROWS;

/// Adding and taking away 1.5 * 2^23 rounds to a whole number, which then is in the low bits.
const ROUNDER: f32 = 12_582_912.0;

/// Rows of bytes, raised by 128.
#[derive(Debug, Default)]
struct Rows {
    /// `[rows][blocks][WORDS]`.
    words: Vec<u32>,
    /// `[rows][blocks]`.
    scales: Vec<f32>,
    n_blocks: usize,
}

/// Columns of bytes.
#[derive(Debug, Default)]
struct Panel {
    /// `[blocks][WORDS][PANEL]`.
    words: Vec<u32>,
    /// `[blocks][PANEL]`.
    scales: Vec<f32>,
    /// -128 times the sum of a column's block, `[blocks][PANEL]`.
    starts: Vec<i32>,
}

/// Whether the CPU has the instructions.
pub fn is_supported() -> bool {
    is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni")
}

/// A matrix `[n_out][n_in]` in both orders: 1.125 bytes a number forward and 1.25 backward.
#[derive(Debug)]
pub struct Rounded {
    n_in: usize,
    n_out: usize,
    /// The matrix's own rows.
    rows: Rows,
    /// Its columns: blocks along the rows' numbers.
    panels: Vec<Panel>,
}

impl Rounded {
    /// Rounds a matrix whose rows `first..` are written by `read(first, values[rows][n_in])`.
    pub fn new([n_out, n_in]: [usize; 2], read: impl Fn(usize, &mut [f32]) + Sync) -> Rounded {
        let mut rows = Rows::default();
        let n_blocks = n_in.div_ceil(BLOCK);
        rows.resize(n_out.next_multiple_of(ROWS), n_blocks);
        let words = rows.words.par_chunks_exact_mut(n_blocks * WORDS);
        words.zip(rows.scales.par_chunks_exact_mut(n_blocks)).take(n_out).enumerate().for_each(
            |(row, (words, scales))| {
                let mut values = vec![0.0; n_blocks * BLOCK];
                read(row, &mut values[..n_in]);
                round_row(&values, words, scales);
            },
        );
        let (n_panels, depth_blocks) = (n_in.div_ceil(PANEL), n_out.div_ceil(BLOCK));
        let mut panels: Vec<Panel> = Vec::new();
        panels.resize_with(n_panels, Panel::default);
        panels.iter_mut().for_each(|panel| panel.resize(depth_blocks));
        // A block of rows at a time, so that the matrix is never whole in f32.
        let stride = n_panels * PANEL;
        let mut values = vec![0.0; BLOCK * stride];
        for block in 0..depth_blocks {
            values.fill(0.0);
            let outs = block * BLOCK..((block + 1) * BLOCK).min(n_out);
            let rows = values.par_chunks_exact_mut(stride).zip(outs.into_par_iter());
            rows.for_each(|(values, out)| read(out, &mut values[..n_in]));
            let values = &values;
            panels.par_iter_mut().enumerate().for_each(|(p, panel)| {
                panel.round(block, |k| {
                    let at = k * stride + p * PANEL;
                    values[at..at + PANEL].first_chunk().expect("a slice of a panel's length")
                });
            });
        }
        Rounded { n_in, n_out, rows, panels }
    }

    /// `y[R][O] = x[R][I] Wᵀ`.
    ///
    /// # Panics
    /// Where [`is_supported`] is false.
    pub fn product(&self, x: &[f32], n_rows: usize, y: &mut [f32]) {
        let (n_in, n_out) = (self.n_in, self.n_out);
        assert!(is_supported(), "a processor without AVX-512 VNNI");
        assert!(x.len() == n_rows * n_in && y.len() == n_rows * n_out, "operands of their shapes");
        let panels: Vec<Panel> = (0..n_rows.div_ceil(PANEL))
            .into_par_iter()
            .map(|p| {
                let rows = p * PANEL..((p + 1) * PANEL).min(n_rows);
                Panel::of_rows(&x[rows.start * n_in..rows.end * n_in], n_in)
            })
            .collect();
        let target = Target::new(y);
        (0..n_out.div_ceil(TASK_ROWS)).into_par_iter().for_each(|task| {
            let outs = task * TASK_ROWS..((task + 1) * TASK_ROWS).min(n_out);
            let mut tile = [[0.0f32; PANEL]; ROWS];
            for (p, panel) in panels.iter().enumerate() {
                let in_panel = p * PANEL..((p + 1) * PANEL).min(n_rows);
                for first in outs.clone().step_by(ROWS) {
                    let n = ROWS.min(outs.end - first);
                    // SAFETY: the CPU has the instructions, as asserted.
                    unsafe { kernel(&self.rows, first, panel, &mut tile) };
                    for (i, row) in in_panel.clone().enumerate() {
                        for (j, tile_row) in tile[..n].iter().enumerate() {
                            // SAFETY: tasks write to different columns of y, and y lives longer than they.
                            unsafe { target.write(row * n_out + first + j, tile_row[i]) };
                        }
                    }
                }
            }
        });
    }

    /// `dx[R][I] += dy[R][O] W`.
    ///
    /// # Panics
    /// Where [`is_supported`] is false.
    pub fn product_back(&self, dy: &[f32], n_rows: usize, dx: &mut [f32]) {
        let (n_in, n_out) = (self.n_in, self.n_out);
        assert!(is_supported(), "a processor without AVX-512 VNNI");
        assert!(dy.len() == n_rows * n_out && dx.len() == n_rows * n_in, "operands of their shapes");
        let gradient = Rows::of(dy, n_rows, n_out);
        let target = Target::new(dx);
        self.panels.par_iter().enumerate().for_each(|(p, panel)| {
            let mut tile = [[0.0f32; PANEL]; ROWS];
            let n_cols = PANEL.min(n_in - p * PANEL);
            for first in (0..n_rows).step_by(ROWS) {
                // SAFETY: the CPU has the instructions, as asserted.
                unsafe { kernel(&gradient, first, panel, &mut tile) };
                for (i, tile_row) in tile.iter().enumerate().take(n_rows - first) {
                    for (j, &x) in tile_row[..n_cols].iter().enumerate() {
                        // SAFETY: tasks write to different columns of dx, and dx lives longer than they.
                        unsafe { target.add((first + i) * n_in + p * PANEL + j, x) };
                    }
                }
            }
        });
    }
}

/// The scale of a block whose largest number is `most`, and what its numbers are multiplied by.
fn scale_of(most: f32) -> (f32, f32) {
    if most > 0.0 { (most / 127.0, 127.0 / most) } else { (0.0, 0.0) }
}

/// The whole number next to x, as a byte.
fn byte(x: f32) -> u8 {
    (x + ROUNDER).to_bits() as u8
}

impl Rows {
    fn resize(&mut self, n_rows: usize, n_blocks: usize) {
        self.words.resize(n_rows * n_blocks * WORDS, 0);
        self.scales.resize(n_rows * n_blocks, 0.0);
        self.n_blocks = n_blocks;
    }

    /// All rows of `x[n_rows][n]`, and as many more as fill the last group.
    fn of(x: &[f32], n_rows: usize, n: usize) -> Rows {
        let mut rows = Rows::default();
        let n_blocks = n.div_ceil(BLOCK);
        rows.resize(n_rows.next_multiple_of(ROWS), n_blocks);
        let words = rows.words.par_chunks_exact_mut(n_blocks * WORDS);
        let all = words.zip(rows.scales.par_chunks_exact_mut(n_blocks)).zip(x.par_chunks_exact(n));
        all.for_each(|((words, scales), row)| {
            let mut padded = vec![0.0; n_blocks * BLOCK];
            padded[..n].copy_from_slice(row);
            round_row(&padded, words, scales);
        });
        rows
    }
}

/// Raised by 128.
fn round_row(values: &[f32], words: &mut [u32], scales: &mut [f32]) {
    let (blocks, _) = values.as_chunks::<BLOCK>();
    let (words, _) = words.as_chunks_mut::<WORDS>();
    for ((block, words), scale) in blocks.iter().zip(words).zip(scales) {
        let (bytes, block_scale) = round_block(block);
        *scale = block_scale;
        let (quads, _) = bytes.as_chunks::<4>();
        for (word, quad) in words.iter_mut().zip(quads) {
            // + 128 flips the highest bit of a byte in two's complement.
            *word = u32::from_le_bytes(*quad) ^ 0x8080_8080;
        }
    }
}

fn round_block(block: &[f32; BLOCK]) -> ([u8; BLOCK], f32) {
    let mut most = [0.0f32; 16];
    for half in block.as_chunks::<16>().0 {
        for i in 0..16 {
            most[i] = most[i].max(half[i].abs());
        }
    }
    let (scale, inverse) = scale_of(most.iter().fold(0.0, |a: f32, &b| a.max(b)));
    let mut bytes = [0; BLOCK];
    for (byte_of, &x) in bytes.iter_mut().zip(block) {
        *byte_of = byte(x * inverse);
    }
    (bytes, scale)
}

impl Panel {
    fn resize(&mut self, n_blocks: usize) {
        self.words.resize(n_blocks * WORDS * PANEL, 0);
        self.scales.resize(n_blocks * PANEL, 0.0);
        self.starts.resize(n_blocks * PANEL, 0);
    }

    /// Up to [`PANEL`] rows of `x[rows][n]`, each as a column.
    fn of_rows(x: &[f32], n: usize) -> Panel {
        let n_blocks = n.div_ceil(BLOCK);
        let mut panel = Panel::default();
        panel.resize(n_blocks);
        let mut padded = vec![0.0; n_blocks * BLOCK];
        for (i, row) in x.chunks_exact(n).enumerate() {
            padded[..n].copy_from_slice(row);
            for (b, block) in padded.as_chunks::<BLOCK>().0.iter().enumerate() {
                let (bytes, scale) = round_block(block);
                panel.scales[b * PANEL + i] = scale;
                panel.starts[b * PANEL + i] = -128 * bytes.iter().map(|&q| i32::from(q as i8)).sum::<i32>();
                for (w, quad) in bytes.as_chunks::<4>().0.iter().enumerate() {
                    panel.words[(b * WORDS + w) * PANEL + i] = u32::from_le_bytes(*quad);
                }
            }
        }
        panel
    }

    /// Block `block` of every column; `row(k)` has the columns' numbers at k, from 0 to 31.
    fn round<'a>(&mut self, block: usize, row: impl Fn(usize) -> &'a [f32; PANEL]) {
        let mut most = [0.0f32; PANEL];
        for k in 0..BLOCK {
            let row = row(k);
            for i in 0..PANEL {
                most[i] = most[i].max(row[i].abs());
            }
        }
        let at = block * PANEL;
        let mut inverses = [0.0f32; PANEL];
        for i in 0..PANEL {
            (self.scales[at + i], inverses[i]) = scale_of(most[i]);
        }
        let mut sums = [0i32; PANEL];
        for w in 0..WORDS {
            let four = [row(4 * w), row(4 * w + 1), row(4 * w + 2), row(4 * w + 3)];
            let words = &mut self.words[at * WORDS + w * PANEL..][..PANEL];
            for i in 0..PANEL {
                let bytes = four.map(|row| byte(row[i] * inverses[i]));
                sums[i] += bytes.iter().map(|&q| i32::from(q as i8)).sum::<i32>();
                words[i] = u32::from_le_bytes(bytes);
            }
        }
        for (start, sum) in self.starts[at..].iter_mut().zip(sums) {
            *start = -128 * sum;
        }
    }
}

/// `tile[ROWS][PANEL]` = rows `first..first + ROWS` of A times a panel of B.
///
/// # Safety
/// - The CPU has AVX-512 F and VNNI.
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn kernel(a: &Rows, first: usize, b: &Panel, tile: &mut [[f32; PANEL]; ROWS]) {
    let n = a.n_blocks;
    assert!(a.scales.len() >= (first + ROWS) * n, "rows of A beyond their end");
    assert!(a.words.len() == a.scales.len() * WORDS, "a scale for each block of A");
    assert!(b.scales.len() == n * PANEL && b.starts.len() == n * PANEL, "as many blocks in B as in A");
    assert!(b.words.len() == n * PANEL * WORDS, "a scale for each block of B");
    // SAFETY: block `i` of the panel and of rows `first` to `first + ROWS - 1` lie within their vectors, as asserted;
    // loads of 16 numbers begin at multiples of 16 below a panel's 32.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
        for i in 0..n {
            let starts = b.starts.as_ptr().add(i * PANEL);
            let start = [_mm512_loadu_si512(starts.cast()), _mm512_loadu_si512(starts.add(16).cast())];
            let mut whole = [start; ROWS];
            let words = a.words.as_ptr().add((first * n + i) * WORDS);
            let columns = b.words.as_ptr().add(i * PANEL * WORDS);
            for w in 0..WORDS {
                let b0 = _mm512_loadu_si512(columns.add(w * PANEL).cast());
                let b1 = _mm512_loadu_si512(columns.add(w * PANEL + 16).cast());
                for (row, whole) in whole.iter_mut().enumerate() {
                    let four = _mm512_set1_epi32(*words.add(row * n * WORDS + w) as i32);
                    whole[0] = _mm512_dpbusd_epi32(whole[0], four, b0);
                    whole[1] = _mm512_dpbusd_epi32(whole[1], four, b1);
                }
            }
            let scales = b.scales.as_ptr().add(i * PANEL);
            let scale = [_mm512_loadu_ps(scales), _mm512_loadu_ps(scales.add(16))];
            for (row, (sums, whole)) in sums.iter_mut().zip(whole).enumerate() {
                let a_scale = _mm512_set1_ps(*a.scales.as_ptr().add((first + row) * n + i));
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
