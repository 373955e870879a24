//! Attention over segments.
//!
//! The backward pass recomputes the scores, as in FlashAttention (arXiv 2205.14135): only the logarithm of each row's
//! sum of exponentials is kept.

use std::ops::Range;

use rayon::prelude::*;

use crate::train::data::pack::{Packed, Segment};
use crate::train::device::Attention;

use crate::train::device::cpu::dense::Target;
use crate::train::device::cpu::math::{exp, sum_of_pairs};

/// One query head of one segment: its rows, and the rows they see.
struct Scope<'a> {
    attention: &'a Attention,
    packed: &'a Packed,
    segment: &'a Segment,
    slope: f32,
}

impl Scope<'_> {
    /// Rows that `row` sees, nearest last: of the prefix, then of its own segment.
    ///
    /// Positions start at 0 in the prefix and continue in the segment.
    fn seen(&self, row: usize) -> impl Iterator<Item = usize> + use<> {
        let Segment { rows, prefix } = self.segment;
        let position = self.packed.positions[row];
        let first = self.attention.window.map_or(0, |window| (position + 1).saturating_sub(window));
        let of_prefix = prefix.start + first.min(prefix.len())..prefix.end;
        of_prefix.chain(rows.start + first.saturating_sub(prefix.len())..row + 1)
    }

    fn score(&self, row: usize, other: usize, dot: f32) -> f32 {
        let distance = (self.packed.positions[row] - self.packed.positions[other]) as f32;
        dot * self.attention.scale - self.slope * distance
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    sum_of_pairs(a, b, |a, b| a * b)
}

fn add_scaled(scale: f32, x: &[f32], y: &mut [f32]) {
    y.iter_mut().zip(x).for_each(|(y, &x)| *y += scale * x);
}

/// The range of head `head` of row `row` in a buffer `[R][n_heads][dim]`.
fn at(row: usize, n_heads: usize, head: usize, dim: usize) -> Range<usize> {
    let start = (row * n_heads + head) * dim;
    start..start + dim
}

/// `out[R][H][D]` and `lse[R][H]`: a softmax over the scores of each row and head.
pub fn attention(
    attention: &Attention,
    packed: &Packed,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    out: &mut [f32],
    lse: &mut [f32],
) {
    let Attention { n_head, n_head_kv, head_dim, .. } = *attention;
    let group = n_head / n_head_kv;
    let segment_of = segment_of_rows(packed);
    out.par_chunks_mut(n_head * head_dim).zip(lse.par_chunks_mut(n_head)).enumerate().for_each(
        |(row, (out, lse))| {
            let mut scores: Vec<(usize, f32)> = Vec::new();
            for head in 0..n_head {
                let segment = &packed.segments[segment_of[row]];
                let scope = Scope { attention, packed, segment, slope: attention.slope(head) };
                let q = &q[at(row, n_head, head, head_dim)];
                scores.clear();
                scores.extend(scope.seen(row).map(|other| {
                    let k = &k[at(other, n_head_kv, head / group, head_dim)];
                    (other, scope.score(row, other, dot(q, k)))
                }));
                let most = scores.iter().fold(f32::NEG_INFINITY, |most, &(_, s)| most.max(s));
                scores.iter_mut().for_each(|(_, s)| *s = exp(*s - most));
                let sum: f32 = scores.iter().map(|&(_, e)| e).sum();
                lse[head] = most + sum.ln();
                let out = &mut out[head * head_dim..(head + 1) * head_dim];
                out.fill(0.0);
                for &(other, e) in &scores {
                    add_scaled(e / sum, &v[at(other, n_head_kv, head / group, head_dim)], out);
                }
            }
        },
    );
}

/// Gradients of [`attention`].
///
/// With p the probabilities, dp = dout·v and D = dout·out: ds = p (dp - D).
#[allow(clippy::too_many_arguments, reason = "one operation's operands and gradients")]
pub fn attention_back(
    attention: &Attention,
    packed: &Packed,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    out: &[f32],
    lse: &[f32],
    dout: &[f32],
    dq: &mut [f32],
    dk: &mut [f32],
    dv: &mut [f32],
) {
    let Attention { n_head, n_head_kv, head_dim, .. } = *attention;
    let group = n_head / n_head_kv;
    let pairs = pairs_of(packed);
    let [dq, dk, dv] = [dq, dk, dv].map(Target::new);
    // A task is one pair, and one key and value head with the query heads it serves. No other task adds to its
    // gradients, so that the order of each sum is fixed.
    (0..pairs.len() * n_head_kv).into_par_iter().for_each(|task| {
        let (segments, kv_head) = (pairs[task / n_head_kv], task % n_head_kv);
        for (segment, row) in
            segments.iter().flat_map(|segment| segment.rows.clone().map(move |row| (segment, row)))
        {
            for head in kv_head * group..(kv_head + 1) * group {
                let scope = Scope { attention, packed, segment, slope: attention.slope(head) };
                let here = at(row, n_head, head, head_dim);
                let (q, dout) = (&q[here.clone()], &dout[here.clone()]);
                let shift = dot(dout, &out[here.clone()]);
                // SAFETY: only this task has the queries of this head in this pair, and dq outlives the task.
                let dq = unsafe { dq.row(here.start, head_dim) };
                for other in scope.seen(row) {
                    let there = at(other, n_head_kv, kv_head, head_dim);
                    let (k, v) = (&k[there.clone()], &v[there.clone()]);
                    let p = exp(scope.score(row, other, dot(q, k)) - lse[row * n_head + head]);
                    let ds = p * (dot(dout, v) - shift) * attention.scale;
                    add_scaled(ds, k, dq);
                    // SAFETY: only this task has the keys and values of this head in this pair; each is borrowed
                    // for one line.
                    unsafe {
                        add_scaled(ds, q, dk.row(there.start, head_dim));
                        add_scaled(p, dout, dv.row(there.start, head_dim));
                    }
                }
            }
        }
    });
}

/// The segments of each pair: the prompt's, which has no prefix, and those of its answers.
///
/// # Panics
/// If a row is in two pairs or sees rows of another pair, since two tasks would then write to the same gradients.
fn pairs_of(packed: &Packed) -> Vec<&[Segment]> {
    let pairs: Vec<&[Segment]> = packed.segments.chunk_by(|_, next| !next.prefix.is_empty()).collect();
    let mut end = 0;
    for pair in &pairs {
        let (prompt, answers) = pair.split_first().expect("a part of a slice is not empty");
        assert!(
            prompt.prefix.is_empty() && answers.iter().all(|a| a.prefix == prompt.rows),
            "rows of one pair"
        );
        for segment in *pair {
            assert!(segment.rows.start == end && segment.rows.end >= end, "each row in one segment");
            end = segment.rows.end;
        }
    }
    pairs
}

/// The segment of each row, `[R]`.
fn segment_of_rows(packed: &Packed) -> Vec<usize> {
    let mut of_rows = vec![0; packed.n_rows()];
    for (i, segment) in packed.segments.iter().enumerate() {
        of_rows[segment.rows.clone()].fill(i);
    }
    of_rows
}
