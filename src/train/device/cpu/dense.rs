//! Products of dense f32 matrices, by the crate `gemm`.

use crate::train::device::Gemm;

/// How a matrix's numbers follow one another in a slice.
#[derive(Debug, Clone, Copy)]
pub struct Layout {
    row_stride: usize,
    col_stride: usize,
}

impl Layout {
    /// Row by row, `stride` numbers from one row's start to the next.
    pub fn rows(stride: usize) -> Layout {
        Layout { row_stride: stride, col_stride: 1 }
    }

    /// Column by column, `stride` numbers from one column's start to the next.
    pub fn columns(stride: usize) -> Layout {
        Layout { row_stride: 1, col_stride: stride }
    }

    /// Numbers from the first to the last of an `n_rows` by `n_cols` matrix, both counted.
    fn span(self, n_rows: usize, n_cols: usize) -> usize {
        (n_rows - 1) * self.row_stride + (n_cols - 1) * self.col_stride + 1
    }
}

/// A slice that several tasks write to, each to numbers of its own.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    first: *mut f32,
    len: usize,
}

// SAFETY: a pointer into a slice of plain numbers; that two tasks do not write to the same number is a
// condition of its functions.
unsafe impl Send for Target {}
// SAFETY: as above.
unsafe impl Sync for Target {}

impl Target {
    /// The slice stays borrowed by the caller, who lets no task outlive it.
    pub fn new(slice: &mut [f32]) -> Target {
        Target { first: slice.as_mut_ptr(), len: slice.len() }
    }

    /// `n` numbers from `at` on.
    ///
    /// # Safety
    /// - The slice is alive while they are used, and nobody else reads or writes them meanwhile.
    pub unsafe fn row<'a>(self, at: usize, n: usize) -> &'a mut [f32] {
        assert!(at <= self.len && n <= self.len - at, "numbers beyond their slice");
        // SAFETY: within the slice, as asserted, and the caller's alone while they are used.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(at), n) }
    }

    /// The part from `offset` on.
    pub fn at(self, offset: usize, layout: Layout) -> (Target, Layout) {
        assert!(offset <= self.len, "a part that begins beyond its slice");
        // SAFETY: within the slice or one past its end, as asserted.
        (Target { first: unsafe { self.first.add(offset) }, len: self.len - offset }, layout)
    }
}

/// Who computes a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Threads {
    /// The caller alone, who is one of several.
    One,
    /// The threads of the pool that the caller runs in.
    Pool,
}

/// `C = beta C + alpha A B` for `[m, n, k]`.
///
/// # Safety
/// - The slice of `c` is alive, and nobody else reads or writes the numbers of C during the call.
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
    assert!(k > 0, "a product of nothing");
    assert!(a_layout.span(m, k) <= a.len() && b_layout.span(k, n) <= b.len(), "an operand beyond its slice");
    assert!(c_layout.span(m, n) <= c.len, "a result beyond its slice");
    let parallelism = match threads {
        Threads::One => gemm::Parallelism::None,
        Threads::Pool => gemm::Parallelism::Rayon(0),
    };
    let strides = |layout: Layout| (layout.col_stride as isize, layout.row_stride as isize);
    let ((a_cs, a_rs), (b_cs, b_rs), (c_cs, c_rs)) =
        (strides(a_layout), strides(b_layout), strides(c_layout));
    // SAFETY: the spans of all three were compared with their slices above; C is the caller's alone, by contract,
    // and no slice of A or B can overlap it, since they are shared borrows.
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

/// `C = beta C + alpha op(A) op(B)`, all dense.
pub fn gemm(gemm: Gemm, a: &[f32], b: &[f32], c: &mut [f32]) {
    let Gemm { m, n, k, transpose_a, transpose_b, alpha, beta } = gemm;
    let a_layout = if transpose_a { Layout::columns(m) } else { Layout::rows(k) };
    let b_layout = if transpose_b { Layout::columns(k) } else { Layout::rows(n) };
    let target = Target::new(c);
    let c = target.at(0, Layout::rows(n));
    // SAFETY: `c` is borrowed mutably for the whole call.
    unsafe { gemm_into([m, n, k], (alpha, a, a_layout), (b, b_layout), beta, c, Threads::Pool) }
}
