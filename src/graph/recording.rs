//! Values read from the graph: recorded as they are, or multiplied with a probe.

use super::place::Place;

/// Values recorded at one place during the last decode.
#[derive(Debug, Clone)]
pub(crate) struct Recording {
    pub(super) place: Place,
    /// The recorded columns; all if `None`.
    columns: Option<Vec<usize>>,
    /// Number of values in a recorded row.
    width: usize,
    /// `[n_tokens][width]`, in the batch's order.
    values: Vec<f32>,
    /// `[n_tokens]`: whether the token's row was seen. In the last block only outputs have rows.
    pub(super) seen: Vec<bool>,
}

impl Recording {
    pub(crate) fn new(place: Place, columns: Option<Vec<usize>>) -> Recording {
        Recording { place, columns, width: 0, values: Vec::new(), seen: Vec::new() }
    }

    /// Where the values are read.
    pub(crate) fn place(&self) -> Place {
        self.place
    }

    /// The values of token `index` of the last batch; `None` if its row was not seen.
    pub(crate) fn row(&self, index: usize) -> Option<&[f32]> {
        let is_seen = *self.seen.get(index)?;
        is_seen.then(|| &self.values[index * self.width..(index + 1) * self.width])
    }

    /// Records a row of the graph, which is token `index` of `n_tokens`.
    pub(super) fn take(&mut self, index: usize, n_tokens: usize, row: &[f32]) -> Result<(), String> {
        let width = self.columns.as_ref().map_or(row.len(), Vec::len);
        if self.seen.len() != n_tokens || self.width != width {
            self.width = width;
            self.values = vec![0.0; n_tokens * width];
            self.seen = vec![false; n_tokens];
        }
        let to = &mut self.values[index * width..(index + 1) * width];
        match &self.columns {
            None => to.copy_from_slice(row),
            Some(columns) => {
                for (to, &column) in to.iter_mut().zip(columns) {
                    *to = *row.get(column).ok_or_else(|| {
                        format!("no column {column} at {:?}, which has {} columns", self.place, row.len())
                    })?;
                }
            }
        }
        self.seen[index] = true;
        Ok(())
    }
}

/// A probe that reads every row at one place while the graph runs.
#[derive(Debug, Clone)]
pub(crate) struct Reader {
    /// The reader's number, which its readings carry.
    pub(crate) number: u64,
    pub(crate) place: Place,
    /// The probe vector, `[width]` of a row.
    pub(crate) weight: Vec<f32>,
}

/// A probe's reading of one token: the dot product of the probe and the token's residual stream.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Reading {
    pub(crate) reader: u64,
    pub(crate) sequence: usize,
    pub(crate) product: f64,
}

impl Reader {
    /// The dot product with a row; `None` if the widths differ.
    pub(super) fn read(&self, row: &[f32]) -> Option<f64> {
        (row.len() == self.weight.len())
            .then(|| self.weight.iter().zip(row).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum())
    }
}
