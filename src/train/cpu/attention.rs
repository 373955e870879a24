//! Attention over segments. Scores are made again in the backward pass, as in FlashAttention (arXiv
//! 2205.14135): only the logarithm of each row's sum of exponentials is kept.

use rayon::prelude::*;

use crate::train::device::Attention;
use crate::train::pack::{Packed, Segment};

use super::math::{exp, sum_of_pairs};

/// What one query head of one segment needs: its rows, and the rows they may see.
struct Scope<'a> {
    attention: &'a Attention,
    packed: &'a Packed,
    segment: &'a Segment,
    slope: f32,
}

impl Scope<'_> {
    /// Rows that `row` sees, nearest last: of the prefix, then of its own segment.
    fn seen(&self, row: usize) -> impl Iterator<Item = usize> + '_ {
        let position = self.packed.positions[row];
        let first = self.attention.window.map_or(0, |window| (position + 1).saturating_sub(window));
        let all = self.segment.prefix.clone().chain(self.segment.rows.start..row + 1);
        all.filter(move |&other| self.packed.positions[other] >= first)
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

/// Where `head` of `row` lies in a buffer of `n_heads` heads of `dim` numbers.
fn at(row: usize, n_heads: usize, head: usize, dim: usize) -> std::ops::Range<usize> {
    let start = (row * n_heads + head) * dim;
    start..start + dim
}

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
                let sum: f32 = scores.iter().map(|&(_, s)| exp(s - most)).sum();
                lse[head] = most + sum.ln();
                let out = &mut out[head * head_dim..(head + 1) * head_dim];
                out.fill(0.0);
                for &(other, score) in &scores {
                    let p = exp(score - most) / sum;
                    add_scaled(p, &v[at(other, n_head_kv, head / group, head_dim)], out);
                }
            }
        },
    );
}

/// With p the probabilities, dp = dout·v, and D = dout·out: ds = p (dp - D).
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
    let segment_of = segment_of_rows(packed);
    // A task is one key and value head with the query heads that it serves: nothing else adds to its
    // gradients, so the order of each sum is fixed.
    let of_heads: Vec<(Vec<f32>, Vec<f32>, Vec<f32>)> = (0..n_head_kv)
        .into_par_iter()
        .map(|kv_head| {
            let n_rows = packed.n_rows();
            let mut dq_head = vec![0.0; n_rows * group * head_dim];
            let mut dk_head = vec![0.0; n_rows * head_dim];
            let mut dv_head = vec![0.0; n_rows * head_dim];
            for row in 0..n_rows {
                for in_group in 0..group {
                    let head = kv_head * group + in_group;
                    let segment = &packed.segments[segment_of[row]];
                    let scope = Scope { attention, packed, segment, slope: attention.slope(head) };
                    let here = at(row, n_head, head, head_dim);
                    let (q, dout) = (&q[here.clone()], &dout[here.clone()]);
                    let shift = dot(dout, &out[here]);
                    let dq = &mut dq_head[at(row, group, in_group, head_dim)];
                    for other in scope.seen(row) {
                        let there = at(other, n_head_kv, kv_head, head_dim);
                        let (k, v) = (&k[there.clone()], &v[there]);
                        let p = exp(scope.score(row, other, dot(q, k)) - lse[row * n_head + head]);
                        let ds = p * (dot(dout, v) - shift) * attention.scale;
                        add_scaled(ds, k, dq);
                        add_scaled(ds, q, &mut dk_head[at(other, 1, 0, head_dim)]);
                        add_scaled(p, dout, &mut dv_head[at(other, 1, 0, head_dim)]);
                    }
                }
            }
            (dq_head, dk_head, dv_head)
        })
        .collect();
    for (kv_head, (dq_head, dk_head, dv_head)) in of_heads.iter().enumerate() {
        for row in 0..packed.n_rows() {
            for in_group in 0..group {
                let from = &dq_head[at(row, group, in_group, head_dim)];
                add_scaled(1.0, from, &mut dq[at(row, n_head, kv_head * group + in_group, head_dim)]);
            }
            let there = at(row, n_head_kv, kv_head, head_dim);
            add_scaled(1.0, &dk_head[at(row, 1, 0, head_dim)], &mut dk[there.clone()]);
            add_scaled(1.0, &dv_head[at(row, 1, 0, head_dim)], &mut dv[there]);
        }
    }
}

/// The segment of each row, `[R]`.
fn segment_of_rows(packed: &Packed) -> Vec<usize> {
    let mut of_rows = vec![0; packed.n_rows()];
    for (i, segment) in packed.segments.iter().enumerate() {
        of_rows[segment.rows.clone()].fill(i);
    }
    of_rows
}
