//! Products with quantised matrices by ggml, which first rounds the other operand to 8 bits in blocks.
//!
//! A product backward needs blocks along the other axis. For it a transposed copy is kept in Q8_0: 34 bytes for 32
//! numbers. A matrix whose number of outputs is not a multiple of 32 has no such copy, and the caller multiplies
//! exactly.

use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::{Mutex, PoisonError};

use llama_cpp_sys_2 as sys;
use rayon::prelude::*;

use crate::gguf::TensorType;
use crate::gguf::quantize;

/// The type of transposed copies.
const TRANSPOSED: TensorType = TensorType::Q8_0;

/// Rows of a transposed copy made at a time; a multiple of every type's block length.
const PART_COLS: usize = 256;

/// Alignment that suffices for cache lines and the widest loads of any CPU.
const ALIGNMENT: usize = 64;

/// Bytes aligned to [`ALIGNMENT`], as ggml's kernels need.
#[derive(Debug, Default)]
pub struct AlignedBytes {
    lines: Vec<Line>,
    len: usize,
}

#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; ALIGNMENT]);

impl AlignedBytes {
    /// `len` zeros.
    pub fn zeros(len: usize) -> AlignedBytes {
        AlignedBytes { lines: vec![Line([0; ALIGNMENT]); len.div_ceil(ALIGNMENT)], len }
    }

    /// Makes room for at least `len` bytes; the content may be lost.
    fn reserve(&mut self, len: usize) {
        if len > self.len {
            *self = AlignedBytes::zeros(len);
        }
    }

    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: the lines are plain bytes without padding, at least `len` in total.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }

    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}

impl From<&[u8]> for AlignedBytes {
    fn from(bytes: &[u8]) -> AlignedBytes {
        let mut aligned = AlignedBytes::zeros(bytes.len());
        aligned.as_mut_slice().copy_from_slice(bytes);
        aligned
    }
}

/// A matrix `[n_out][n_in]` in blocks along its rows.
#[derive(Debug)]
pub struct Blocks {
    tensor_type: TensorType,
    n_in: usize,
    n_out: usize,
    bytes: AlignedBytes,
}

impl Blocks {
    /// The transpose of a matrix `[n_out][n_in]`; `read(row, cols, values)` writes columns `cols` of row `row`.
    ///
    /// `None` if `n_out` is not a whole number of blocks.
    pub fn transposed(
        [n_out, n_in]: [usize; 2],
        read: impl Fn(usize, std::ops::Range<usize>, &mut [f32]) + Sync,
    ) -> Option<Blocks> {
        let row_bytes = TRANSPOSED.row_bytes(n_out as u64)? as usize;
        let mut bytes = AlignedBytes::zeros(row_bytes * n_in);
        let parts = bytes.as_mut_slice().par_chunks_mut(PART_COLS * row_bytes).enumerate();
        parts.for_each(|(i, part)| {
            let cols = i * PART_COLS..((i + 1) * PART_COLS).min(n_in);
            let mut row = vec![0.0; cols.len()];
            let mut values = vec![0.0; cols.len() * n_out];
            for out in 0..n_out {
                read(out, cols.clone(), &mut row);
                row.iter().enumerate().for_each(|(col, &x)| values[col * n_out + out] = x);
            }
            let blocks = quantize(TRANSPOSED, &values, n_out).expect("Q8_0 takes rows of whole blocks");
            part.copy_from_slice(&blocks);
        });
        Some(Blocks { tensor_type: TRANSPOSED, n_in: n_out, n_out: n_in, bytes })
    }
}

/// ggml's threads, and scratch memory for its products.
#[derive(Debug)]
pub struct Kernels {
    pool: NonNull<sys::ggml_threadpool>,
    n_threads: i32,
    scratch: Mutex<Scratch>,
}

// SAFETY: the pool is only used under the lock of `scratch`.
unsafe impl Send for Kernels {}
// SAFETY: as above.
unsafe impl Sync for Kernels {}

#[derive(Debug, Default)]
struct Scratch {
    /// Holds the graph of one product.
    graph: AlignedBytes,
    /// Holds the rounded right-hand side.
    work: AlignedBytes,
}

/// Nodes and leaves in the graph of one product, and some room.
const GRAPH_SIZE: usize = 8;

impl Kernels {
    /// Starts `n_threads` threads; `None` if ggml cannot.
    pub fn new(n_threads: usize) -> Option<Kernels> {
        let n_threads = i32::try_from(n_threads).ok().filter(|&n| n > 0)?;
        // SAFETY: initialises ggml's tables once per process; later calls change nothing.
        unsafe { sys::ggml_cpu_init() };
        // SAFETY: returns a plain struct; the number is positive.
        let mut params = unsafe { sys::ggml_threadpool_params_default(n_threads) };
        // Other threads need the cores between two products: wait without spinning.
        params.poll = 0;
        // SAFETY: the parameters are ggml's defaults, except for `poll`, and live during the call.
        let pool = NonNull::new(unsafe { sys::ggml_threadpool_new(&mut params) })?;
        Some(Kernels { pool, n_threads, scratch: Mutex::default() })
    }

    /// `y[R][O] = x[R][I] Wᵀ`, x rounded to W's partner type.
    pub fn product(&self, w: &Blocks, x: &[f32], n_rows: usize, y: &mut [f32]) {
        self.multiply(w.tensor_type, [w.n_out, w.n_in], w.bytes.as_slice(), x, n_rows, y);
    }

    /// [`Kernels::product`] with the matrix's own bytes, aligned to [`ALIGNMENT`].
    ///
    /// # Panics
    /// If the bytes do not match the shape or are not aligned, or if x or y is shorter than its shape.
    pub fn multiply(
        &self,
        tensor_type: TensorType,
        [n_out, n_in]: [usize; 2],
        bytes: &[u8],
        x: &[f32],
        n_rows: usize,
        y: &mut [f32],
    ) {
        if n_rows == 0 {
            return;
        }
        let expected = tensor_type.row_bytes(n_in as u64).map(|n| n as usize * n_out);
        assert!(expected == Some(bytes.len()), "the bytes of the matrix match its shape");
        assert!(bytes.as_ptr().align_offset(ALIGNMENT) == 0, "the matrix is aligned");
        assert!(x.len() >= n_rows * n_in && y.len() >= n_rows * n_out, "x[R][I] and y[R][O]");
        let mut scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        let Scratch { graph: memory, work } = &mut *scratch;
        // SAFETY: both only compute sizes.
        let needed =
            unsafe { 8 * sys::ggml_tensor_overhead() + sys::ggml_graph_overhead_custom(GRAPH_SIZE, false) };
        memory.reserve(needed);
        let memory = memory.as_mut_slice();
        let params = sys::ggml_init_params {
            mem_size: memory.len(),
            mem_buffer: memory.as_mut_ptr().cast(),
            no_alloc: true,
        };
        // SAFETY: the context lives in `memory`, which has room for its four objects and stays borrowed until the
        // context is freed below. Its tensors point to W, x and y: the lengths match the shapes, as asserted above, W
        // and x are only read, and y is borrowed mutably. No assertion of ggml can fail: W and x agree in n_in, both
        // are contiguous, and every type of a `Blocks` or of a frozen matrix has a product with F32. The threads of the
        // pool are done when `ggml_graph_compute` returns.
        unsafe {
            let context = sys::ggml_init(params);
            assert!(!context.is_null(), "ggml makes a context in the given memory");
            let f32_type = TensorType::F32.id() as sys::ggml_type;
            let matrix = sys::ggml_new_tensor_2d(context, tensor_type.id() as _, n_in as i64, n_out as i64);
            let right = sys::ggml_new_tensor_2d(context, f32_type, n_in as i64, n_rows as i64);
            let result = sys::ggml_mul_mat(context, matrix, right);
            (*matrix).data = bytes.as_ptr().cast_mut().cast::<c_void>();
            (*right).data = x.as_ptr().cast_mut().cast();
            (*result).data = y.as_mut_ptr().cast();
            let graph = sys::ggml_new_graph_custom(context, GRAPH_SIZE, false);
            sys::ggml_build_forward_expand(graph, result);
            let mut plan = sys::ggml_graph_plan(graph, self.n_threads, self.pool.as_ptr());
            work.reserve(plan.work_size);
            plan.work_data = work.as_mut_slice().as_mut_ptr();
            let status = sys::ggml_graph_compute(graph, &mut plan);
            sys::ggml_free(context);
            assert!(status == sys::GGML_STATUS_SUCCESS, "ggml computes a product without an abort callback");
        }
    }
}

impl Drop for Kernels {
    fn drop(&mut self) {
        // SAFETY: made by `ggml_threadpool_new` and freed once. No product is running, since each borrows `self`.
        unsafe { sys::ggml_threadpool_free(self.pool.as_ptr()) }
    }
}
