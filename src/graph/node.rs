//! The interface to one node of a running graph, as the eval callback receives it.

/// Type and size of a node's values, in ggml's order: fastest axis first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Whether the values are of type F32.
    pub is_f32: bool,
    /// Number of values along each axis (`ne`).
    pub ne: [i64; 4],
    /// Stride of each axis in bytes (`nb`).
    pub nb: [usize; 4],
}

impl Shape {
    /// Number of values in a row.
    pub fn width(&self) -> usize {
        usize::try_from(self.ne[0]).unwrap_or(0)
    }

    /// Number of rows, over all axes but the first.
    pub fn n_rows(&self) -> usize {
        let of_axis = |&n: &i64| usize::try_from(n).unwrap_or(0);
        self.ne[1..].iter().map(of_axis).fold(1, usize::saturating_mul)
    }

    /// Number of values.
    pub fn n_values(&self) -> usize {
        self.width().saturating_mul(self.n_rows())
    }

    /// Whether the values are F32 and contiguous.
    pub fn is_plain_matrix(&self) -> bool {
        let is_contiguous = |i: usize| {
            let row = usize::try_from(self.ne[i]).ok().and_then(|n| n.checked_mul(self.nb[i]));
            self.ne[i + 1] == 1 || row == Some(self.nb[i + 1])
        };
        self.is_f32 && self.nb[0] == size_of::<f32>() && (0..3).all(is_contiguous)
    }
}

/// One node of a running graph, valid only during the callback.
///
/// The engine implements it over its own llama.cpp, and the C plugin over a host's table of functions. A Rust program
/// with its own llama.cpp implements it over that; [`crate::plugin`] has an example.
pub trait Node {
    /// Its name, such as `l_out-3`, without the final NUL.
    fn name(&self) -> &[u8];

    /// Type and size of its values.
    fn shape(&self) -> Shape;

    /// Copies its `shape().n_values()` values into `values`.
    ///
    /// Called only after the node was computed, and only if [`Shape::is_plain_matrix`].
    ///
    /// # Errors
    /// A message, if the values cannot be read.
    fn get(&self, values: &mut [f32]) -> Result<(), String>;

    /// Replaces its values; called under the same conditions as [`Node::get`].
    ///
    /// # Errors
    /// A message, if the values cannot be written.
    fn set(&mut self, values: &[f32]) -> Result<(), String>;

    /// Its values in place, if they are in host memory. This saves the copies of `get` and `set`.
    fn values_mut(&mut self) -> Option<&mut [f32]> {
        None
    }

    /// Whether it writes rows into a tensor (`GGML_OP_SET_ROWS`), as graphs write their KV cache.
    fn writes_rows(&self) -> bool {
        false
    }

    /// For a node that writes rows: the target row of each, and the number of rows of the target tensor.
    ///
    /// The rows identify the sequences of a cache with one stream per sequence. `None` if unknown.
    fn row_targets(&self) -> Option<(Vec<i64>, usize)> {
        None
    }
}

/// Most values that are copied from a node: 4 GiB of F32, more than any real node has.
const MOST_VALUES: usize = 1 << 30;

/// Allocates `n` zeros; fails if `n` is over [`MOST_VALUES`] or memory runs out.
fn allocate(n: usize) -> Result<Vec<f32>, String> {
    let mut values = Vec::new();
    if n > MOST_VALUES || values.try_reserve_exact(n).is_err() {
        return Err(format!("cannot allocate memory for the {n} values of a node"));
    }
    values.resize(n, 0.0);
    Ok(values)
}

/// Passes a node's values to `edit`, shape `[n_rows][width]`, and writes them back if `write`.
pub(super) fn with_values<N: Node, R>(
    node: &mut N,
    write: bool,
    edit: impl FnOnce(&mut [f32]) -> R,
) -> Result<R, String> {
    let shape = node.shape();
    if !shape.is_plain_matrix() {
        return Err(format!(
            "expected node {} to be a contiguous matrix of f32, as in the supported versions of llama.cpp",
            String::from_utf8_lossy(node.name())
        ));
    }
    if shape.n_values() == 0 {
        return Ok(edit(&mut []));
    }
    if let Some(values) = node.values_mut() {
        return Ok(edit(values));
    }
    let mut values = allocate(shape.n_values())?;
    node.get(&mut values)?;
    let result = edit(&mut values);
    if write {
        node.set(&values)?;
    }
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_matrix_with_gaps_or_of_another_type_is_not_a_plain_matrix() {
        let plain = Shape { is_f32: true, ne: [8, 3, 1, 1], nb: [4, 32, 96, 96] };
        assert!(plain.is_plain_matrix());
        assert_eq!((plain.width(), plain.n_rows(), plain.n_values()), (8, 3, 24));
        assert!(!Shape { is_f32: false, ..plain }.is_plain_matrix());
        assert!(!Shape { nb: [4, 64, 192, 192], ..plain }.is_plain_matrix());
        assert!(!Shape { nb: [2, 16, 48, 48], ..plain }.is_plain_matrix());
        // The stride of an axis of length 1 does not matter.
        assert!(Shape { ne: [8, 1, 1, 1], nb: [4, 7, 9, 1], ..plain }.is_plain_matrix());
    }

    #[test]
    fn a_nonsensical_shape_has_no_values_and_does_not_overflow() {
        let shape = Shape { is_f32: true, ne: [-1, i64::MAX, i64::MAX, 2], nb: [4, 4, 4, 4] };
        assert_eq!((shape.width(), shape.n_rows(), shape.n_values()), (0, usize::MAX, 0));
        assert!(!shape.is_plain_matrix());
    }

    #[test]
    fn nothing_is_allocated_for_a_nonsensical_shape() {
        assert_eq!(allocate(3), Ok(vec![0.0; 3]));
        assert!(allocate(usize::MAX).is_err() && allocate(MOST_VALUES + 1).is_err());
    }
}
