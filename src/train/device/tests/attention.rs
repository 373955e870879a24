//! Attention over packed pairs, compared with attention over each separate text.

use crate::train::data::pack::Packed;
use crate::train::device::Attention;
use crate::train::device::tests::{
    HELD, Random, SUMS, Tested, assert_close, assert_gradient, oracle, packed, texts,
};

/// Tokens of prompt, chosen and rejected: one row in total, answers without rows, prompts of one token, several pairs.
const LENGTHS: [&[[usize; 3]]; 4] =
    [&[[1, 1, 1]], &[[1, 4, 3]], &[[5, 1, 3]], &[[3, 4, 2], [1, 2, 6], [4, 3, 3]]];

/// Query heads, key and value heads, size of a head.
const HEADS: [[usize; 3]; 4] = [[1, 1, 1], [4, 4, 8], [6, 2, 5], [3, 1, 17]];

fn attentions() -> Vec<Attention> {
    let mut all = Vec::new();
    for [n_head, n_head_kv, head_dim] in HEADS {
        for (window, max_alibi_bias) in
            [(None, 0.0), (Some(1), 0.0), (Some(3), 0.0), (None, 8.0), (Some(2), 8.0)]
        {
            // Twice the usual scale, so that some rows attend to few others.
            let scale = 2.0 / (head_dim as f32).sqrt();
            all.push(Attention { n_head, n_head_kv, head_dim, scale, window, max_alibi_bias });
        }
    }
    all
}

/// ALiBi's slopes as in the paper's code (`get_slopes` of
/// <https://github.com/ofirpress/attention_with_linear_biases>).
///
/// A geometric sequence for a power of two; the remaining heads take every other slope of the next power.
fn slopes(n_head: usize, max_bias: f64) -> Vec<f64> {
    if max_bias == 0.0 {
        return vec![0.0; n_head];
    }
    if n_head.is_power_of_two() {
        return (1..=n_head).map(|i| (-max_bias * i as f64 / n_head as f64).exp2()).collect();
    }
    let power = n_head.next_power_of_two() / 2;
    let mut all = slopes(power, max_bias);
    all.extend(slopes(2 * power, max_bias).into_iter().step_by(2).take(n_head - power));
    all
}

/// `out[R][H][D]` and `lse[R][H]`, one text at a time.
fn expected(attention: &Attention, lengths: &[[usize; 3]], [q, k, v]: [&[f32]; 3]) -> (Vec<f64>, Vec<f64>) {
    let Attention { n_head, n_head_kv, head_dim, .. } = *attention;
    let n_rows = packed(lengths).n_rows();
    let (mut out, mut lse) = (vec![f64::NAN; n_rows * n_head * head_dim], vec![f64::NAN; n_rows * n_head]);
    let slopes = slopes(n_head, f64::from(attention.max_alibi_bias));
    for text in texts(lengths) {
        for (i, &row) in text.iter().enumerate() {
            for head in 0..n_head {
                let head_of = |x: &[f32], row: usize, n_heads: usize, head: usize| {
                    x[(row * n_heads + head) * head_dim..(row * n_heads + head + 1) * head_dim].to_vec()
                };
                let kv_head = head / (n_head / n_head_kv);
                let q = head_of(q, row, n_head, head);
                let seen = (0..=i).filter(|j| attention.window.is_none_or(|window| i - j < window));
                let scores: Vec<(usize, f64)> = seen
                    .map(|j| {
                        let k = head_of(k, text[j], n_head_kv, kv_head);
                        let dot = super::dot(q.clone(), k) * f64::from(attention.scale);
                        (j, dot - slopes[head] * (i - j) as f64)
                    })
                    .collect();
                let sum: f64 = scores.iter().map(|(_, score)| score.exp()).sum();
                lse[row * n_head + head] = sum.ln();
                for d in 0..head_dim {
                    let of_v = |j: usize| f64::from(head_of(v, text[j], n_head_kv, kv_head)[d]);
                    let weighted = scores.iter().map(|&(j, score)| score.exp() / sum * of_v(j));
                    out[(row * n_head + head) * head_dim + d] = weighted.sum();
                }
            }
        }
    }
    (out, lse)
}

fn forward(
    device: &impl Tested,
    attention: &Attention,
    packed: &Packed,
    [q, k, v]: [&Vec<f32>; 3],
) -> (Vec<f32>, Vec<f32>) {
    let n = packed.n_rows() * attention.n_head;
    let (mut out, mut lse) = (vec![f32::NAN; n * attention.head_dim], vec![f32::NAN; n]);
    let rows = device.rows(packed).unwrap();
    device.attention(attention, &rows, q, k, v, &mut out, &mut lse).unwrap();
    (out, lse)
}

fn operands(random: &mut Random, attention: &Attention, n_rows: usize) -> [Vec<f32>; 3] {
    let n_key = n_rows * attention.n_head_kv * attention.head_dim;
    let n_query = n_rows * attention.n_head * attention.head_dim;
    [random.numbers(n_query), random.numbers(n_key), random.numbers(n_key)]
}

#[test]
fn alibi_slopes_match_a_hand_calculation() {
    let attention = |n_head| Attention {
        n_head,
        n_head_kv: 1,
        head_dim: 1,
        scale: 1.0,
        window: None,
        max_alibi_bias: 8.0,
    };
    let slopes = |n_head: usize| (0..n_head).map(|h| attention(n_head).slope(h)).collect::<Vec<f32>>();
    // Two heads: 2^-4 and 2^-8. The third is the first of four: 2^-2.
    assert_eq!(slopes(3), [1.0 / 16.0, 1.0 / 256.0, 1.0 / 4.0]);
    // Four heads: 2^-2, 2^-4, 2^-6, 2^-8. The others are the first and third of eight: 2^-1, 2^-3.
    assert_eq!(slopes(6), [1.0 / 4.0, 1.0 / 16.0, 1.0 / 64.0, 1.0 / 256.0, 1.0 / 2.0, 1.0 / 8.0]);
    assert_eq!(Attention { max_alibi_bias: 0.0, ..attention(3) }.slope(2), 0.0);
}

pub fn packed_rows_attend_as_in_separate_texts<D: Tested>(device: &D) {
    let mut random = Random::new(5);
    for lengths in LENGTHS {
        let packed = packed(lengths);
        for attention in attentions() {
            let [q, k, v] = operands(&mut random, &attention, packed.n_rows());
            let (out, lse) = forward(device, &attention, &packed, [&q, &k, &v]);
            let (expected_out, expected_lse) = expected(&attention, lengths, [&q, &k, &v]);
            let what = format!("{attention:?} of {lengths:?}");
            assert_close(&out, &expected_out, SUMS, &what);
            assert_close(&lse, &expected_lse, SUMS, &format!("{what}, logarithms of sums"));
        }
    }
}

pub fn large_scores_do_not_overflow<D: Tested>(device: &D) {
    let attention =
        Attention { n_head: 1, n_head_kv: 1, head_dim: 1, scale: 1.0, window: None, max_alibi_bias: 0.0 };
    // Scores of the second row: 400 and 400 - ln 3, so that it sees the first row with probability 3/4.
    let (q, k) = (vec![200.0, 200.0], vec![2.0, (400.0 - 3.0f32.ln()) / 200.0]);
    let (out, lse) = forward(device, &attention, &packed(&[[2, 1, 1]]), [&q, &k, &vec![1.0, 5.0]]);
    assert_eq!(out[0], 1.0);
    // 400 has a unit in the last place of 3e-5.
    assert!((out[1] - 2.0).abs() < 1e-3, "{out:?}");
    assert!((lse[1] - (400.0 + (4.0f32 / 3.0).ln())).abs() < 1e-3, "{lse:?}");
}

pub fn gradients_of_attention_match_finite_differences<D: Tested>(device: &D) {
    let mut random = Random::new(6);
    for lengths in LENGTHS {
        let packed = packed(lengths);
        for attention in attentions() {
            let [q, k, v] = operands(&mut random, &attention, packed.n_rows());
            let dout = random.numbers(q.len());
            let (out, lse) = forward(device, &attention, &packed, [&q, &k, &v]);
            let (mut dq, mut dk, mut dv) = (vec![HELD; q.len()], vec![HELD; k.len()], vec![HELD; v.len()]);
            let rows = device.rows(&packed).unwrap();
            device
                .attention_back(&attention, &rows, &q, &k, &v, &out, &lse, &dout, &mut dq, &mut dk, &mut dv)
                .unwrap();
            let what = |of: &str| format!("{of} of {attention:?} of {lengths:?}");
            assert_gradient(
                &dq,
                &q,
                &dout,
                |q| forward(oracle(), &attention, &packed, [q, &k, &v]).0,
                &what("q"),
            );
            assert_gradient(
                &dk,
                &k,
                &dout,
                |k| forward(oracle(), &attention, &packed, [&q, k, &v]).0,
                &what("k"),
            );
            assert_gradient(
                &dv,
                &v,
                &dout,
                |v| forward(oracle(), &attention, &packed, [&q, &k, v]).0,
                &what("v"),
            );
        }
    }
}
