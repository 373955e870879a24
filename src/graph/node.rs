//! One node of a graph that is being computed, as the eval callback gets it.

/// The type and the extent of a node's values, in ggml's order: fastest axis first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Whether the values are of type F32.
    pub is_f32: bool,
    /// Values along each axis (`ne`).
    pub ne: [i64; 4],
    /// Bytes from one value to the next along each axis (`nb`).
    pub nb: [usize; 4],
}

impl Shape {
    /// Numbers in a row.
    pub fn width(&self) -> usize {
        usize::try_from(self.ne[0]).unwrap_or(0)
    }

    /// Rows, all axes but the first together.
    pub fn n_rows(&self) -> usize {
        let of_axis = |&n: &i64| usize::try_from(n).unwrap_or(0);
        self.ne[1..].iter().map(of_axis).fold(1, usize::saturating_mul)
    }

    /// Numbers in all.
    pub fn n_values(&self) -> usize {
        self.width().saturating_mul(self.n_rows())
    }

    /// Whether it is a plain matrix: F32, one row after the other, without gaps.
    pub fn is_plain_matrix(&self) -> bool {
        let follows = |i: usize| {
            let row = usize::try_from(self.ne[i]).ok().and_then(|n| n.checked_mul(self.nb[i]));
            self.ne[i + 1] == 1 || row == Some(self.nb[i + 1])
        };
        self.is_f32 && self.nb[0] == size_of::<f32>() && (0..3).all(follows)
    }
}

/// One node, valid while the callback that got it runs.
///
/// The engine implements it over its own llama.cpp, and the plugin over a host's table of functions. A Rust
/// program with a llama.cpp of its own implements it over that, see [`crate::plugin`].
pub trait Node {
    /// Its name, such as `l_out-3`, without a final NUL.
    fn name(&self) -> &[u8];

    /// Type and extent.
    fn shape(&self) -> Shape;

    /// Copies its values, `shape().n_values()` numbers of F32. Called after it was computed, and only for a
    /// plain matrix.
    ///
    /// # Errors
    /// In words, where they cannot be had.
    fn get(&self, values: &mut [f32]) -> Result<(), String>;

    /// Replaces its values, as many as [`Node::get`] gives.
    ///
    /// # Errors
    /// In words, where they cannot be written.
    fn set(&mut self, values: &[f32]) -> Result<(), String>;

    /// The same values where they lie, if that is in the memory of this process: spares two copies.
    fn values_mut(&mut self) -> Option<&mut [f32]> {
        None
    }

    /// Whether it writes rows into a tensor (`GGML_OP_SET_ROWS`), as the KV cache is written.
    fn writes_rows(&self) -> bool {
        false
    }

    /// Of a node that writes rows: the row of each, and how many rows the written tensor has. What tells
    /// the sequences of a cache with a stream for each apart; `None` where it is not known.
    fn row_targets(&self) -> Option<(Vec<i64>, usize)> {
        None
    }
}

/// More numbers than a node has whose values are copied here: 4 GiB of them.
const MOST_VALUES: usize = 1 << 30;

/// Room for `n` numbers; an error, where a shape of nonsense asks for more than there is.
fn room(n: usize) -> Result<Vec<f32>, String> {
    let mut values = Vec::new();
    if n > MOST_VALUES || values.try_reserve_exact(n).is_err() {
        return Err(format!("there is no room for the {n} numbers of a node"));
    }
    values.resize(n, 0.0);
    Ok(values)
}

/// Lets `edit` see, and if `write` change, a node's values, shape `[n_rows][width]`.
pub(super) fn with_values<N: Node, R>(
    node: &mut N,
    write: bool,
    edit: impl FnOnce(&mut [f32]) -> R,
) -> Result<R, String> {
    let shape = node.shape();
    if !shape.is_plain_matrix() {
        return Err(format!(
            "node {} is no plain matrix of f32, as llama.cpp was known to make it",
            String::from_utf8_lossy(node.name())
        ));
    }
    if shape.n_values() == 0 {
        return Ok(edit(&mut []));
    }
    if let Some(values) = node.values_mut() {
        return Ok(edit(values));
    }
    let mut values = room(shape.n_values())?;
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
    fn a_matrix_with_gaps_or_of_another_type_is_not_plain() {
        let plain = Shape { is_f32: true, ne: [8, 3, 1, 1], nb: [4, 32, 96, 96] };
        assert!(plain.is_plain_matrix());
        assert_eq!((plain.width(), plain.n_rows(), plain.n_values()), (8, 3, 24));
        assert!(!Shape { is_f32: false, ..plain }.is_plain_matrix());
        assert!(!Shape { nb: [4, 64, 192, 192], ..plain }.is_plain_matrix());
        assert!(!Shape { nb: [2, 16, 48, 48], ..plain }.is_plain_matrix());
        // The stride of an axis of one does not matter.
        assert!(Shape { ne: [8, 1, 1, 1], nb: [4, 7, 9, 1], ..plain }.is_plain_matrix());
    }

    #[test]
    fn a_shape_of_nonsense_has_no_values_and_overflows_nothing() {
        let shape = Shape { is_f32: true, ne: [-1, i64::MAX, i64::MAX, 2], nb: [4, 4, 4, 4] };
        assert_eq!((shape.width(), shape.n_rows(), shape.n_values()), (0, usize::MAX, 0));
        assert!(!shape.is_plain_matrix());
    }

    #[test]
    fn for_a_shape_of_nonsense_nothing_is_allocated() {
        assert_eq!(room(3), Ok(vec![0.0; 3]));
        assert!(room(usize::MAX).is_err() && room(MOST_VALUES + 1).is_err());
    }
}
