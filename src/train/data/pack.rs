//! Preference pairs as one batch of rows: each prompt once, then both its answers, and no padding.
//!
//! ```text
//! rows      p0 p1 p2 | c0 c1 | r0 r1 r2 | (the next pair's) p0 …
//! position   0  1  2 |  3  4 |  3  4  5 |                    0
//! sees       causally| prompt, own answer so far
//! ```
//!
//! An answer's last token is predicted and never read, so it has no row; the prompt's last row predicts the
//! first token of both answers.

use std::ops::Range;

use crate::engine::Token;

/// Rows that follow one another in one text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Its rows, each of which sees those before it.
    pub rows: Range<usize>,
    /// Rows before it that all of its rows see: the prompt of an answer.
    pub prefix: Range<usize>,
}

/// A token that is predicted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Output {
    /// The row that predicts it.
    pub row: usize,
    /// The token.
    pub token: Token,
}

/// The rows of several pairs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Packed {
    /// Tokens that are read, `[R]`.
    pub tokens: Vec<Token>,
    /// Their positions in their texts, `[R]`.
    pub positions: Vec<usize>,
    /// What sees what; together they hold every row once.
    pub segments: Vec<Segment>,
    /// What is predicted, `[outputs]`.
    pub outputs: Vec<Output>,
    /// The outputs of each answer, chosen and rejected in turn, `[2 pairs]`.
    pub answers: Vec<Range<usize>>,
}

impl Packed {
    /// Rows.
    pub fn n_rows(&self) -> usize {
        self.tokens.len()
    }

    /// Appends a pair.
    ///
    /// # Panics
    /// Where a prompt or an answer is empty: there would be nothing to predict, or nothing to predict it from.
    pub fn push(&mut self, prompt: &[Token], chosen: &[Token], rejected: &[Token]) {
        assert!(!prompt.is_empty() && !chosen.is_empty() && !rejected.is_empty(), "an empty text in a pair");
        let prefix = self.push_segment(prompt, 0, 0..0);
        for answer in [chosen, rejected] {
            let first = self.outputs.len();
            self.outputs.push(Output { row: prefix.end - 1, token: answer[0] });
            let rows = self.push_segment(&answer[..answer.len() - 1], prompt.len(), prefix.clone());
            self.outputs.extend(rows.zip(&answer[1..]).map(|(row, &token)| Output { row, token }));
            self.answers.push(first..self.outputs.len());
        }
    }

    /// Rows that a pair takes.
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

    /// The sums over each answer of `of_outputs`, `[outputs]`: shape `[2 pairs]`, chosen and rejected in turn.
    pub fn sum_by_answer(&self, of_outputs: &[f32]) -> Vec<f64> {
        let sum = |answer: &Range<usize>| of_outputs[answer.clone()].iter().map(|&x| f64::from(x)).sum();
        self.answers.iter().map(sum).collect()
    }

    /// To each output the number of its answer, `[outputs]`.
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
    fn numbers_of_outputs_are_summed_by_answer_and_spread_again() {
        let mut packed = Packed::default();
        packed.push(&[1, 2], &[5], &[7, 8, 9]);
        assert_eq!(packed.sum_by_answer(&[0.5, 1.0, 2.0, 3.0]), [0.5, 6.0]);
        assert_eq!(packed.spread_to_outputs(&[2.0, -1.0]), [2.0, -1.0, -1.0, -1.0]);
    }
}
