//! Runs every operation once, for tests that results have the same bits.

use crate::gguf::TensorType;
use crate::gguf::quantize;
use crate::train::device::tests::{Random, Tested, packed};
use crate::train::device::*;
use crate::train::recipe::dpo::{AnswerLogps, LossKind, Preference};

/// The results of every operation on the same random numbers, in sizes that are split among threads.
pub fn everything(device: &impl Tested) -> Vec<Vec<f32>> {
    let mut random = Random::new(24);
    let packed = packed(&[[30, 20, 25], [7, 40, 3], [19, 2, 33], [1, 50, 50]]);
    let rows = device.rows(&packed).unwrap();
    let (n_rows, n_in, n_out) = (packed.n_rows(), 256, 320);
    let mut results = Vec::new();

    let w = random.numbers(n_out * n_in);
    for tensor_type in [TensorType::F32, TensorType::F16, TensorType::Q8_0, TensorType::Q4_K] {
        let (name, bytes) = ("w".into(), quantize(tensor_type, &w, n_in).unwrap());
        let matrix =
            device.matrix(HostMatrix { name, tensor_type, n_in, n_out, bytes, is_table: true }).unwrap();
        let (x, dy) = (random.numbers(n_rows * n_in), random.numbers(n_rows * n_out));
        let (mut y, mut dx) = (vec![0.0; n_rows * n_out], random.numbers(n_rows * n_in));
        device.product(&matrix, &x, n_rows, &mut y).unwrap();
        device.product_back(&matrix, &dy, n_rows, &mut dx).unwrap();
        let mut embedded = vec![0.0; n_rows * n_in];
        device.embed(&matrix, &rows, 2.0, &mut embedded).unwrap();
        results.extend([y, dx, embedded]);
    }
    let x = random.numbers(n_rows * n_in);
    let dy = random.numbers(n_rows * n_in);
    let mut c = random.numbers(n_in * n_in);
    let gemm =
        Gemm { m: n_in, n: n_in, k: n_rows, transpose_a: true, transpose_b: false, alpha: 0.5, beta: 1.0 };
    device.gemm(gemm, &x, &dy, &mut c).unwrap();

    let (weight, bias) = (random.numbers(n_in), random.numbers(n_in));
    let norm = Norm { kind: NormKind::Layer, epsilon: 1e-5 };
    let mut y = vec![0.0; n_rows * n_in];
    device.norm(norm, &x, &weight, Some(&bias), n_in, &mut y).unwrap();
    let (mut dx, mut dweight, mut dbias) = (vec![0.0; x.len()], vec![0.0; n_in], vec![0.0; n_in]);
    device.norm_back(norm, &x, &weight, &dy, n_in, &mut dx, Some(&mut dweight), Some(&mut dbias)).unwrap();
    let mut turned = x.clone();
    let rope = Rope { pairs: RopePairs::Halves, frequencies: (0..8).map(|i| 0.5f32.powi(i)).collect() };
    device.rope(&rope, &rows, 32, false, &mut turned).unwrap();
    results.extend([c, y, dx, dweight, dbias, turned]);

    let attention = Attention {
        n_head: 8,
        n_head_kv: 4,
        head_dim: 32,
        scale: 0.2,
        window: Some(20),
        max_alibi_bias: 8.0,
    };
    let (k, v) = (random.numbers(n_rows * 128), random.numbers(n_rows * 128));
    let (mut out, mut lse) = (vec![0.0; n_rows * n_in], vec![0.0; n_rows * 8]);
    device.attention(&attention, &rows, &x, &k, &v, &mut out, &mut lse).unwrap();
    let (mut dq, mut dk, mut dv) = (vec![0.0; x.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
    device.attention_back(&attention, &rows, &x, &k, &v, &out, &lse, &dy, &mut dq, &mut dk, &mut dv).unwrap();
    results.extend([out, lse, dq, dk, dv]);

    let mut active = vec![0.0; x.len()];
    device.activate(Activation::Gelu, &x, Some(&dy), &mut active).unwrap();
    let (mut dgate, mut dup) = (vec![0.0; x.len()], vec![0.0; x.len()]);
    device.activate_back(Activation::Silu, &x, Some(&dy), &active, &mut dgate, Some(&mut dup)).unwrap();
    let mut sums = vec![0.0; n_in];
    device.sum_rows(&dup, n_in, &mut sums).unwrap();
    let mut table = vec![0.0; 5 * n_in];
    device.scatter_add(&dy, n_in, &Index::Token, &rows, 0.3, &mut table).unwrap();
    let n_outputs = packed.outputs.len();
    let mut logits = random.numbers(n_outputs * 5000);
    let mut logps = vec![0.0; n_outputs];
    device.logprobs(&rows, 0..n_outputs, 1.5, 5000, true, &mut logits, &mut logps).unwrap();
    let mut dlogps = vec![0.0; n_outputs];
    let preference = Preference { kind: LossKind::Sigmoid, beta: 0.1, label_smoothing: 0.1 };
    let references = [AnswerLogps { chosen: -150.0, rejected: -160.0 }; 4];
    let costs = device.preference_loss(preference, &rows, &references, 4, &logps, &mut dlogps).unwrap();
    results.push(costs.iter().map(|(_, loss)| loss.loss as f32).collect());
    let square_sum = device.square_sum(&logits).unwrap().to_bits();
    let halves = [(square_sum >> 32) as u32, square_sum as u32].map(f32::from_bits).to_vec();
    results.extend([active, dgate, dup, sums, table, logits, logps, dlogps, halves]);

    let (mut value, mut mean, mut square) = (x.clone(), vec![0.0; x.len()], vec![0.1; x.len()]);
    let step = RmspropStep { learning_rate: 0.1, alpha: 0.9, epsilon: 1e-8, gradient_scale: 0.5 };
    device.rmsprop(step, &dy, &mut square, &mut value).unwrap();
    let step = AdamwStep {
        learning_rate: 0.1,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.1,
        step: 3,
        gradient_scale: 0.5,
    };
    device.adamw(step, &dy, &mut mean, &mut square, &mut value).unwrap();
    results.extend([value, mean, square]);
    results
}

/// Checks that two runs of [`everything`] gave the same bits.
#[track_caller]
pub fn assert_same(first: &[Vec<f32>], again: &[Vec<f32>], what: &str) {
    assert_eq!(first.len(), again.len(), "{what}");
    let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<u32>>();
    for (i, (a, b)) in first.iter().zip(again).enumerate() {
        assert!(bits(a) == bits(b), "result {i}, {what}");
    }
}
