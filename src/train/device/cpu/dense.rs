//! Products of dense f32 matrices, by the crate `gemm`.

use crate::train::device::Gemm;

/// The strides of a matrix in a slice.
#[derive(Debug, Clone, Copy)]
pub struct Layout {
    row_stride: usize,
    col_stride: usize,
}

impl Layout {
    /// Row by row, with `stride` numbers from one row's start to the next.
    pub fn rows(stride: usize) -> Layout {
        Layout { row_stride: stride, col_stride: 1 }
    }

    /// Column by column, with `stride` numbers from one column's start to the next.
    pub fn columns(stride: usize) -> Layout {
        Layout { row_stride: 1, col_stride: stride }
    }

    /// Length of the slice that an `n_rows` by `n_cols` matrix covers.
    fn span(self, n_rows: usize, n_cols: usize) -> usize {
        (n_rows - 1) * self.row_stride + (n_cols - 1) * self.col_stride + 1
    }
}

/// A slice that several tasks write to, each to its own numbers.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    first: *mut f32,
    len: usize,
}

// SAFETY: a pointer into a slice of plain numbers. Its unsafe functions require that no two tasks write to the same
// number.
unsafe impl Send for Target {}
// SAFETY: as above.
unsafe impl Sync for Target {}

impl Target {
    /// A target over `slice`. The caller keeps it borrowed, and lets no task outlive it.
    pub fn new(slice: &mut [f32]) -> Target {
        Target { first: slice.as_mut_ptr(), len: slice.len() }
    }

    /// The `n` numbers from `at` on.
    ///
    /// # Safety
    /// - The slice lives while the result is used, and nothing else reads or writes these numbers meanwhile.
    pub unsafe fn row<'a>(self, at: usize, n: usize) -> &'a mut [f32] {
        assert!(at <= self.len && n <= self.len - at, "numbers beyond their slice");
        // SAFETY: within the slice, as asserted, and only the caller uses them.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(at), n) }
    }

    /// The part from `offset` on, with its layout.
    pub fn at(self, offset: usize, layout: Layout) -> (Target, Layout) {
        assert!(offset <= self.len, "a part that starts beyond its slice");
        // SAFETY: within the slice or one past its end, as asserted.
        (Target { first: unsafe { self.first.add(offset) }, len: self.len - offset }, layout)
    }
}

/// Who computes a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Threads {
    /// The calling thread only, which is one of several.
    One,
    /// All threads of the caller's pool.
    Pool,
}

/// `C = beta C + alpha A B` for `[m, n, k]`.
///
/// # Safety
/// - The slice of `c` lives, and nothing else reads or writes the numbers of C during the call.
pub unsafe fn gemm_into(
    [m, n, k]: [usize; 3],
    (alpha, a, a_layout): (f32, &[f32], Layout),
    (b, b_layout): (&[f32], Layout),
    beta: f32,
    (c, c_layout): (Target, Layout),
    threads: Threads,
) {
    if m == 0 || n == 0 {
        return;
    }
    assert!(k > 0, "a sum of at least one term");
    assert!(a_layout.span(m, k) <= a.len() && b_layout.span(k, n) <= b.len(), "an operand beyond its slice");
    assert!(c_layout.span(m, n) <= c.len, "a result beyond its slice");
    let parallelism = match threads {
        Threads::One => gemm::Parallelism::None,
        Threads::Pool => gemm::Parallelism::Rayon(0),
    };
    let strides = |layout: Layout| (layout.col_stride as isize, layout.row_stride as isize);
    let ((a_cs, a_rs), (b_cs, b_rs), (c_cs, c_rs)) =
        (strides(a_layout), strides(b_layout), strides(c_layout));
    // SAFETY: all three spans lie within their slices, as asserted. By contract only the caller uses C, and A and B
    // cannot overlap it, since they are shared borrows.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.first,
            c_cs,
            c_rs,
            beta != 0.0,
            a.as_ptr(),
            a_cs,
            a_rs,
            b.as_ptr(),
            b_cs,
            b_rs,
            beta,
            alpha,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// `C[m][n] = beta C + alpha op(A) op(B)`, all dense.
pub fn gemm(gemm: Gemm, a: &[f32], b: &[f32], c: &mut [f32]) {
    let Gemm { m, n, k, transpose_a, transpose_b, alpha, beta } = gemm;
    let a_layout = if transpose_a { Layout::columns(m) } else { Layout::rows(k) };
    let b_layout = if transpose_b { Layout::columns(k) } else { Layout::rows(n) };
    let target = Target::new(c);
    let c = target.at(0, Layout::rows(n));
    // SAFETY: `c` is borrowed mutably for the whole call.
    unsafe { gemm_into([m, n, k], (alpha, a, a_layout), (b, b_layout), beta, c, Threads::Pool) }
}
