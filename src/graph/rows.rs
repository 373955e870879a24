//! Which row of a node is which token.
//!
//! A batch reaches the graph in pieces (micro-batches), maybe with its tokens in another order, and the last
//! block sees only the tokens whose logits were asked for. Where every sequence has a stream of its own in
//! the KV cache, llama.cpp reorders, and each token is found by where the graph writes its keys: the tokens
//! of one sequence keep their order. Where all share one stream, the batch is cut in its own order.

use std::collections::VecDeque;

use super::place::Phase;

/// How a context's KV cache is laid out, which decides the order of tokens in a micro-batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Streams {
    /// One stream for each sequence, all of one length, one after the other (`kv_unified = false`).
    OfSequences,
    /// One for all sequences (`kv_unified = true`, or a context for one sequence alone).
    One,
}

/// A token of a batch, as it was announced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Announced {
    pub(crate) sequence: usize,
    pub(crate) is_output: bool,
    /// `None` where the caller does not tell.
    pub(crate) phase: Option<Phase>,
}

/// A token of the micro-batch in progress.
#[derive(Debug, Clone, Copy)]
pub(super) struct Row {
    /// `None` where it is not known.
    pub(super) sequence: Option<usize>,
    /// In the batch; of the micro-batch where no batch was announced.
    pub(super) index: usize,
    pub(super) phase: Option<Phase>,
    /// `None` where it is not known.
    pub(super) is_output: Option<bool>,
}

/// More tokens than a micro-batch has; what says otherwise is not believed, and nothing is allocated for it.
pub(crate) const MOST_TOKENS: usize = 1 << 20;

/// The tokens of the decode in progress, and the micro-batch that they have come to.
#[derive(Debug, Default)]
pub(super) struct Rows {
    /// The batch, `[n_tokens]`; empty where none was announced.
    pub(super) batch: Vec<Announced>,
    /// For each sequence the batch indices of its tokens that no micro-batch has had yet.
    queues: Vec<VecDeque<usize>>,
    /// Of one stream: the tokens that micro-batches have had.
    n_taken: usize,
    /// The micro-batch in progress, in the graph's order; empty until it is known.
    pub(super) rows: Vec<Row>,
}

impl Rows {
    /// A decode of these tokens begins.
    pub(super) fn begin(&mut self, batch: Vec<Announced>, n_seq_max: usize) {
        let mut queues = vec![VecDeque::new(); n_seq_max];
        for (index, token) in batch.iter().enumerate() {
            queues[token.sequence].push_back(index);
        }
        *self = Rows { batch, queues, n_taken: 0, rows: Vec::new() };
    }

    /// Whether tokens were announced that no micro-batch has had yet.
    pub(super) fn is_pending(&self) -> bool {
        self.n_left() > 0
    }

    /// Tokens that were announced and that no micro-batch has had yet.
    pub(super) fn n_left(&self) -> usize {
        self.batch.len() - self.n_taken
    }

    /// What was announced and has not come is not expected any more.
    pub(super) fn drop_rest(&mut self) {
        self.n_taken = self.batch.len();
    }

    fn row(&self, index: usize) -> Row {
        let Announced { sequence, is_output, phase } = self.batch[index];
        Row { sequence: Some(sequence), index, phase, is_output: Some(is_output) }
    }

    /// A micro-batch of `n` tokens begins, in the batch's order.
    pub(super) fn take_in_order(&mut self, n: usize) -> Result<(), String> {
        let left = self.n_left();
        if n > left {
            return Err(format!("a micro-batch has {n} tokens, and {left} of those announced are left"));
        }
        self.rows = (self.n_taken..self.n_taken + n).map(|index| self.row(index)).collect();
        self.n_taken += n;
        Ok(())
    }

    /// A micro-batch begins whose keys are written to these of `n_cells` rows of the cache.
    pub(super) fn take_by_keys(&mut self, targets: &[i64], n_cells: usize) -> Result<(), String> {
        let unknown = || "cannot tell the tokens of a micro-batch apart".to_owned();
        // All streams have one length and lie one after the other.
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

    /// A micro-batch of `n` tokens begins that nobody announced.
    pub(super) fn take_unknown(&mut self, n: usize, n_seq_max: usize) -> Result<(), String> {
        if n > MOST_TOKENS {
            return Err(format!(
                "a micro-batch has {n} tokens, more than llama.cpp was known to compute at once"
            ));
        }
        self.batch.clear();
        self.n_taken = 0;
        // One sequence alone needs no announcement.
        let sequence = (n_seq_max == 1).then_some(0);
        self.rows = (0..n).map(|index| Row { sequence, index, phase: None, is_output: None }).collect();
        Ok(())
    }

    /// The rows that a node has: all, or where only outputs have rows, those of the outputs.
    pub(super) fn of_node(&self, is_reduced: bool, n_rows: usize) -> Result<Vec<Row>, String> {
        let rows: Vec<Row> = match (is_reduced, self.rows.first()) {
            // Which tokens are outputs nobody said, so that all that is known is their number.
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
    fn tokens_are_found_by_where_their_keys_go() {
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
    fn of_one_stream_a_batch_is_cut_in_its_order() {
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
        assert!(rows.take_by_keys(&[0, 1], 20).is_err(), "two tokens of sequence 0, where one was announced");
        assert!(rows.take_in_order(3).unwrap_err().contains("3 tokens"));
    }

    #[test]
    fn without_an_announcement_only_one_sequence_alone_is_known() {
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
