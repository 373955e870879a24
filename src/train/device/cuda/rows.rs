//! A batch on a GPU, and the rows that an index refers to.

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::error::Result;
use crate::train::data::pack::{Packed, Segment};
use crate::train::device::Index;

use crate::train::device::cuda::ffi;
use crate::train::device::cuda::handle::{Handle, assert_same};

/// A batch on a GPU.
#[derive(Debug)]
pub struct Rows {
    // Dropped before the handle, which closing it needs.
    raw: NonNull<ffi::detox_cuda_rows>,
    handle: Arc<Handle>,
    /// Number of rows.
    pub n_rows: usize,
    /// Number of outputs.
    pub n_outputs: usize,
    /// Number of pairs.
    pub n_pairs: usize,
    /// The largest input token.
    pub max_token: usize,
    /// The largest predicted token.
    pub max_output: usize,
    /// The largest position.
    pub max_position: usize,
}

// SAFETY: never changed after it was made, and only read by the GPU.
unsafe impl Send for Rows {}
// SAFETY: as above.
unsafe impl Sync for Rows {}

impl Rows {
    /// Copies `packed` to the GPU.
    pub fn new(handle: &Arc<Handle>, packed: &Packed) -> Result<Rows> {
        let number = |n: usize| i32::try_from(n).expect("a batch has fewer than 2^31 rows");
        let positions: Vec<i32> = packed.positions.iter().map(|&p| number(p)).collect();
        let segment = |segment: &Segment| ffi::detox_cuda_segment {
            first: number(segment.rows.start),
            end: number(segment.rows.end),
            prefix_first: number(segment.prefix.start),
            prefix_end: number(segment.prefix.end),
        };
        let segments: Vec<_> = packed.segments.iter().map(segment).collect();
        let output_rows: Vec<i32> = packed.outputs.iter().map(|o| number(o.row)).collect();
        let output_tokens: Vec<i32> = packed.outputs.iter().map(|o| o.token).collect();
        let answer_ends: Vec<i32> = packed.answers.iter().map(|answer| number(answer.end)).collect();
        let follow = packed.answers.windows(2).all(|two| two[0].end == two[1].start);
        assert!(follow && packed.answers.len().is_multiple_of(2), "pairs of consecutive answers");
        assert_eq!(positions.len(), packed.tokens.len(), "a position for each token");
        let batch = ffi::detox_cuda_batch {
            n_rows: packed.tokens.len() as i64,
            n_segments: segments.len() as i64,
            n_outputs: output_rows.len() as i64,
            n_answers: answer_ends.len() as i64,
            tokens: packed.tokens.as_ptr(),
            positions: positions.as_ptr(),
            segments: segments.as_ptr(),
            output_rows: output_rows.as_ptr(),
            output_tokens: output_tokens.as_ptr(),
            answer_ends: answer_ends.as_ptr(),
        };
        let mut raw = std::ptr::null_mut();
        // SAFETY: each array has the length in the batch and lives during the call; writes one pointer.
        handle.check(unsafe { ffi::detox_cuda_rows_open(handle.raw(), &batch, &mut raw) })?;
        let max = |tokens: &[i32]| tokens.iter().copied().max().unwrap_or(0) as usize;
        Ok(Rows {
            raw: NonNull::new(raw).expect("a batch that was opened has an address"),
            handle: handle.clone(),
            n_rows: packed.tokens.len(),
            n_outputs: output_rows.len(),
            n_pairs: answer_ends.len() / 2,
            max_token: max(&packed.tokens),
            max_output: max(&output_tokens),
            max_position: packed.positions.iter().copied().max().unwrap_or(0),
        })
    }

    /// Panics if it belongs to another handle.
    #[track_caller]
    pub(super) fn assert_of(&self, handle: &Arc<Handle>) {
        assert_same(&self.handle, handle);
    }

    /// The pointer for calls of the extension.
    pub fn raw(&self) -> *const ffi::detox_cuda_rows {
        self.raw.as_ptr()
    }

    /// The array that an index reads, its range, and the largest table row in it.
    pub fn lookup(&self, index: &Index) -> Lookup {
        let (kind, range, max) = match index {
            Index::Token => (ffi::DETOX_CUDA_TOKEN, 0..self.n_rows, self.max_token),
            Index::Position => (ffi::DETOX_CUDA_POSITION, 0..self.n_rows, self.max_position),
            Index::Output(range) => {
                self.assert_outputs(range);
                (ffi::DETOX_CUDA_OUTPUT, range.clone(), self.n_rows.saturating_sub(1))
            }
        };
        Lookup { kind, first: range.start as i64, n: range.len(), max }
    }

    /// Panics if `range` has outputs beyond the batch.
    #[track_caller]
    pub fn assert_outputs(&self, range: &Range<usize>) {
        assert!(range.start <= range.end && range.end <= self.n_outputs, "outputs beyond the batch");
    }
}

impl Drop for Rows {
    fn drop(&mut self) {
        // SAFETY: opened once and closed once, while the device is open.
        unsafe { ffi::detox_cuda_rows_close(self.raw.as_ptr()) }
    }
}

/// An [`Index`] in terms of the extension.
#[derive(Debug)]
pub struct Lookup {
    /// Which array of the batch.
    pub kind: ffi::detox_cuda_index,
    /// First entry.
    pub first: i64,
    /// Number of entries.
    pub n: usize,
    /// The largest table row that an entry refers to.
    pub max: usize,
}

impl Lookup {
    /// Panics unless `table` has every row and `values` a row of `n_cols` numbers for each entry.
    #[track_caller]
    pub fn assert_shapes(&self, table: usize, values: usize, n_cols: usize) {
        assert!(n_cols > 0 && table.is_multiple_of(n_cols), "a table of rows of {n_cols} numbers");
        assert!(self.n == 0 || self.max < table / n_cols, "an index beyond the table");
        assert_eq!(values, self.n * n_cols, "a row of C numbers for each index");
    }
}
