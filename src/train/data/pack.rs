//! Packs preference pairs into one batch of rows: each prompt once, then both answers, without padding.
//!
//! ```text
//! rows       p0 p1 p2 | c0 c1 | r0 r1 r2 | (the next pair's) p0 …
//! position    0  1  2 |  3  4 |  3  4  5 |                    0
//! attends to causal  | the prompt and its own answer so far
//! ```
//!
//! The prompt's last row predicts the first token of both answers. An answer's last token is predicted but never
//! read, so it has no row.

use std::ops::Range;

use crate::engine::Token;

/// A run of rows from one text: a prompt or an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Its rows. Each attends to those before it and to itself.
    pub rows: Range<usize>,
    /// Earlier rows that all its rows attend to: an answer's prompt. Empty for a prompt.
    pub prefix: Range<usize>,
}

/// A predicted token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Output {
    /// The row that predicts it.
    pub row: usize,
    /// The token.
    pub token: Token,
}

/// Several pairs as rows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Packed {
    /// The tokens read, `[n_rows]`.
    pub tokens: Vec<Token>,
    /// The position of each in its text, `[n_rows]`.
    pub positions: Vec<usize>,
    /// Which rows attend to which. Every row is in exactly one segment.
    pub segments: Vec<Segment>,
    /// The tokens predicted, `[n_outputs]`.
    pub outputs: Vec<Output>,
    /// The outputs of each answer, `[2 * n_pairs]`: chosen and rejected of the first pair, then of the next.
    pub answers: Vec<Range<usize>>,
}

impl Packed {
    /// The number of rows.
    pub fn n_rows(&self) -> usize {
        self.tokens.len()
    }

    /// Appends a pair.
    ///
    /// # Panics
    /// If the prompt or an answer is empty. [`tokenize`](super::tokens::tokenize) skips such pairs.
    pub fn push(&mut self, prompt: &[Token], chosen: &[Token], rejected: &[Token]) {
        assert!(
            !prompt.is_empty() && !chosen.is_empty() && !rejected.is_empty(),
            "prompt and answers must not be empty"
        );
        let prefix = self.push_segment(prompt, 0, 0..0);
        for answer in [chosen, rejected] {
            let first = self.outputs.len();
            self.outputs.push(Output { row: prefix.end - 1, token: answer[0] });
            let rows = self.push_segment(&answer[..answer.len() - 1], prompt.len(), prefix.clone());
            self.outputs.extend(rows.zip(&answer[1..]).map(|(row, &token)| Output { row, token }));
            self.answers.push(first..self.outputs.len());
        }
    }

    /// The number of rows of one pair.
    pub fn n_rows_of(prompt: &[Token], chosen: &[Token], rejected: &[Token]) -> usize {
        prompt.len() + chosen.len().saturating_sub(1) + rejected.len().saturating_sub(1)
    }

    fn push_segment(
        &mut self,
        tokens: &[Token],
        first_position: usize,
        prefix: Range<usize>,
    ) -> Range<usize> {
        let rows = self.tokens.len()..self.tokens.len() + tokens.len();
        self.tokens.extend(tokens);
        self.positions.extend(first_position..first_position + tokens.len());
        if !rows.is_empty() {
            self.segments.push(Segment { rows: rows.clone(), prefix });
        }
        rows
    }

    /// Sums `of_outputs`, `[n_outputs]`, over each answer: `[2 * n_pairs]`.
    pub fn sum_by_answer(&self, of_outputs: &[f32]) -> Vec<f64> {
        let sum = |answer: &Range<usize>| of_outputs[answer.clone()].iter().map(|&x| f64::from(x)).sum();
        self.answers.iter().map(sum).collect()
    }

    /// Gives each output the value of its answer: from `[2 * n_pairs]` to `[n_outputs]`.
    pub fn spread_to_outputs(&self, of_answers: &[f64]) -> Vec<f32> {
        let spread = |(answer, &x): (&Range<usize>, &f64)| vec![x as f32; answer.len()];
        self.answers.iter().zip(of_answers).flat_map(spread).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_is_packed_once_and_predicts_the_first_token_of_both_answers() {
        let mut packed = Packed::default();
        packed.push(&[1, 2], &[5], &[7, 8, 9]);
        packed.push(&[3], &[5, 6], &[4]);
        assert_eq!(packed.tokens, [1, 2, 7, 8, 3, 5]);
        assert_eq!(packed.positions, [0, 1, 2, 3, 0, 1]);
        let segment = |rows, prefix| Segment { rows, prefix };
        assert_eq!(
            packed.segments,
            [segment(0..2, 0..0), segment(2..4, 0..2), segment(4..5, 0..0), segment(5..6, 4..5)]
        );
        let outputs: Vec<(usize, Token)> = packed.outputs.iter().map(|o| (o.row, o.token)).collect();
        assert_eq!(outputs, [(1, 5), (1, 7), (2, 8), (3, 9), (4, 5), (5, 6), (4, 4)]);
        assert_eq!(packed.answers, [0..1, 1..4, 4..6, 6..7]);
        assert_eq!(Packed::n_rows_of(&[1, 2], &[5], &[7, 8, 9]) + Packed::n_rows_of(&[3], &[5, 6], &[4]), 6);
    }

    #[test]
    fn output_values_are_summed_by_answer_and_answer_values_spread_to_outputs() {
        let mut packed = Packed::default();
        packed.push(&[1, 2], &[5], &[7, 8, 9]);
        assert_eq!(packed.sum_by_answer(&[0.5, 1.0, 2.0, 3.0]), [0.5, 6.0]);
        assert_eq!(packed.spread_to_outputs(&[2.0, -1.0]), [2.0, -1.0, -1.0, -1.0]);
    }
}
