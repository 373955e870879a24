//! Finds the token of each row of a node.
//!
//! llama.cpp splits a batch into micro-batches, may reorder its tokens, and computes the last block only for tokens
//! whose logits are needed.
//!
//! - If each sequence has its own stream in the KV cache, tokens are reordered, but those of one sequence keep their
//!   order. The cache row that a token's key is written to gives its sequence, and the order gives the token.
//! - If all sequences share one stream, the batch is split in its own order.

use std::collections::VecDeque;

use super::place::Phase;

/// The layout of a context's KV cache. It decides the order of tokens in a micro-batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Streams {
    /// One stream per sequence, all of the same length, one after the other (`kv_unified = false`).
    PerSequence,
    /// One stream for all sequences (`kv_unified = true`, or a context with one sequence).
    One,
}

/// A token of an announced batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Announced {
    pub(crate) sequence: usize,
    pub(crate) is_output: bool,
    /// `None` if unknown.
    pub(crate) phase: Option<Phase>,
}

/// A token of the current micro-batch.
#[derive(Debug, Clone, Copy)]
pub(super) struct Row {
    /// `None` if unknown.
    pub(super) sequence: Option<usize>,
    /// Index in the batch, or in the micro-batch if no batch was announced.
    pub(super) index: usize,
    pub(super) phase: Option<Phase>,
    /// `None` if unknown.
    pub(super) is_output: Option<bool>,
}

/// More tokens than any micro-batch has. Nothing is allocated for a larger number.
pub(crate) const MOST_TOKENS: usize = 1 << 20;

/// The tokens of the current decode, and which of them are in the current micro-batch.
#[derive(Debug, Default)]
pub(super) struct Rows {
    /// The batch, `[n_tokens]`; empty if none was announced.
    pub(super) batch: Vec<Announced>,
    /// For each sequence, the batch indices of its tokens that have not been in a micro-batch yet.
    queues: Vec<VecDeque<usize>>,
    /// Number of tokens that have been in a micro-batch.
    n_taken: usize,
    /// The current micro-batch, in the graph's order; empty until it is known.
    pub(super) rows: Vec<Row>,
}

impl Rows {
    /// Starts a decode of these tokens.
    pub(super) fn begin(&mut self, batch: Vec<Announced>, n_seq_max: usize) {
        let mut queues = vec![VecDeque::new(); n_seq_max];
        for (index, token) in batch.iter().enumerate() {
            queues[token.sequence].push_back(index);
        }
        *self = Rows { batch, queues, n_taken: 0, rows: Vec::new() };
    }

    /// Whether some announced tokens have not been in a micro-batch yet.
    pub(super) fn is_pending(&self) -> bool {
        self.n_left() > 0
    }

    /// Number of announced tokens that have not been in a micro-batch yet.
    pub(super) fn n_left(&self) -> usize {
        self.batch.len() - self.n_taken
    }

    /// Stops expecting the announced tokens that have not been in a micro-batch yet.
    pub(super) fn drop_rest(&mut self) {
        self.n_taken = self.batch.len();
    }

    fn row(&self, index: usize) -> Row {
        let Announced { sequence, is_output, phase } = self.batch[index];
        Row { sequence: Some(sequence), index, phase, is_output: Some(is_output) }
    }

    /// Starts a micro-batch of the next `n` tokens, in the batch's order.
    pub(super) fn take_in_order(&mut self, n: usize) -> Result<(), String> {
        let left = self.n_left();
        if n > left {
            return Err(format!("a micro-batch has {n} tokens, but only {left} announced tokens are left"));
        }
        self.rows = (self.n_taken..self.n_taken + n).map(|index| self.row(index)).collect();
        self.n_taken += n;
        Ok(())
    }

    /// Starts a micro-batch, given the rows of the cache (out of `n_cells`) that its keys are written to.
    pub(super) fn take_by_keys(&mut self, targets: &[i64], n_cells: usize) -> Result<(), String> {
        let unknown = || "cannot tell which tokens are in a micro-batch".to_owned();
        // All streams have the same length and lie one after the other.
        let n_streams = self.queues.len();
        if n_cells == 0 || !n_cells.is_multiple_of(n_streams) {
            return Err(unknown());
        }
        let cells = n_cells / n_streams;
        self.rows.clear();
        for &target in targets {
            let sequence = usize::try_from(target).map_err(|_| unknown())? / cells;
            let queue = self.queues.get_mut(sequence).ok_or_else(unknown)?;
            let index = queue.pop_front().ok_or_else(unknown)?;
            self.rows.push(self.row(index));
        }
        self.n_taken += targets.len();
        Ok(())
    }

    /// Starts a micro-batch of `n` tokens that were not announced.
    pub(super) fn take_unknown(&mut self, n: usize, n_seq_max: usize) -> Result<(), String> {
        if n > MOST_TOKENS {
            return Err(format!(
                "a micro-batch has {n} tokens, more than llama.cpp computes at once ({MOST_TOKENS} at most)"
            ));
        }
        self.batch.clear();
        self.n_taken = 0;
        // With a single sequence, no announcement is needed.
        let sequence = (n_seq_max == 1).then_some(0);
        self.rows = (0..n).map(|index| Row { sequence, index, phase: None, is_output: None }).collect();
        Ok(())
    }

    /// The rows of a node: all tokens, or only the outputs if `is_reduced`.
    pub(super) fn of_node(&self, is_reduced: bool, n_rows: usize) -> Result<Vec<Row>, String> {
        let rows: Vec<Row> = match (is_reduced, self.rows.first()) {
            // Nobody said which tokens are outputs; only their count is known.
            (true, Some(Row { is_output: None, .. })) => self.rows.iter().take(n_rows).copied().collect(),
            (true, _) => self.rows.iter().filter(|row| row.is_output == Some(true)).copied().collect(),
            (false, _) => self.rows.clone(),
        };
        match rows.len() == n_rows {
            true => Ok(rows),
            false => Err(format!("expected {} rows, found {n_rows}", rows.len())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(sequences: &[usize]) -> Vec<Announced> {
        sequences.iter().map(|&sequence| Announced { sequence, is_output: false, phase: None }).collect()
    }

    fn indices(rows: &Rows) -> Vec<usize> {
        rows.rows.iter().map(|row| row.index).collect()
    }

    #[test]
    fn tokens_are_found_by_the_rows_their_keys_are_written_to() {
        let mut rows = Rows::default();
        rows.begin(batch(&[0, 1, 0, 1, 1]), 2);
        // Two streams of 10 cells. The first micro-batch has two tokens of each sequence.
        rows.take_by_keys(&[3, 4, 10, 11], 20).unwrap();
        assert_eq!(indices(&rows), [0, 2, 1, 3]);
        assert!(rows.is_pending());
        rows.take_by_keys(&[12], 20).unwrap();
        assert_eq!(indices(&rows), [4]);
        assert!(!rows.is_pending());
    }

    #[test]
    fn a_batch_of_one_stream_is_split_in_its_order() {
        let mut rows = Rows::default();
        rows.begin(batch(&[0, 1, 0]), 2);
        rows.take_in_order(2).unwrap();
        assert_eq!(indices(&rows), [0, 1]);
        rows.take_in_order(1).unwrap();
        assert_eq!(indices(&rows), [2]);
        assert!(!rows.is_pending());
    }

    #[test]
    fn rejects_rows_that_were_not_announced() {
        let mut rows = Rows::default();
        rows.begin(batch(&[0, 1]), 2);
        assert!(rows.take_by_keys(&[25], 20).is_err(), "beyond the cache");
        assert!(rows.take_by_keys(&[-1], 20).is_err());
        assert!(rows.take_by_keys(&[0], 21).is_err(), "streams of different lengths");
        assert!(rows.take_by_keys(&[0], 0).is_err());
        rows.begin(batch(&[0, 1]), 2);
        assert!(rows.take_by_keys(&[0, 1], 20).is_err(), "two tokens of sequence 0, but one was announced");
        assert!(rows.take_in_order(3).unwrap_err().contains("3 tokens"));
    }

    #[test]
    fn without_an_announcement_only_a_single_sequence_is_known() {
        let mut rows = Rows::default();
        rows.take_unknown(2, 1).unwrap();
        assert!(rows.rows.iter().all(|row| row.sequence == Some(0)));
        rows.take_unknown(2, 4).unwrap();
        assert!(rows.rows.iter().all(|row| row.sequence.is_none()));
        assert_eq!(rows.of_node(true, 1).unwrap().len(), 1);
        assert!(rows.of_node(true, 3).is_err());
        assert!(rows.of_node(false, 1).is_err());
        assert!(rows.take_unknown(usize::MAX, 1).is_err());
    }
}
