//! Products with frozen matrices of every type that models come in.

use super::{Cpu, HELD, Products, Random, SUMS, assert_close, cpu};
use crate::error::Error;
use crate::gguf::{TensorType, dequantize, quantize};
use crate::train::device::{Device, HostMatrix};

const TYPES: [TensorType; 11] = [
    TensorType::F32,
    TensorType::F16,
    TensorType::BF16,
    TensorType::Q4_0,
    TensorType::Q4_1,
    TensorType::Q5_0,
    TensorType::Q5_1,
    TensorType::Q8_0,
    TensorType::Q4_K,
    TensorType::Q5_K,
    TensorType::Q6_K,
];

/// A matrix of random numbers, and the numbers that its blocks stand for, `[n_out][n_in]`.
fn matrix(random: &mut Random, tensor_type: TensorType, [n_out, n_in]: [usize; 2]) -> (HostMatrix, Vec<f32>) {
    let bytes = quantize(tensor_type, &random.numbers(n_out * n_in), n_in).unwrap();
    let mut values = vec![0.0; n_out * n_in];
    dequantize(tensor_type, &bytes, &mut values).unwrap();
    (HostMatrix { name: "blk.0.ffn_up.weight".into(), tensor_type, n_in, n_out, bytes }, values)
}

/// Outputs and inputs: odd ones where the type has no blocks; more outputs and inputs than a part of a
/// matrix has; and few.
fn sizes(tensor_type: TensorType) -> Vec<[usize; 2]> {
    match tensor_type.block_len() {
        1 => vec![[1, 1], [5, 7], [33, 45], [300, 770]],
        32 => vec![[1, 32], [5, 96], [64, 160], [300, 736]],
        n => vec![[1, n as usize], [37, 256], [300, 768]],
    }
}

/// `[R][O]`
fn product(w: &[f32], [n_out, n_in]: [usize; 2], x: &[f32]) -> Vec<f64> {
    let rows = x.chunks_exact(n_in);
    let of_row = |x: &[f32]| -> Vec<f64> {
        (0..n_out)
            .map(|o| super::dot(w[o * n_in..(o + 1) * n_in].iter().copied(), x.iter().copied()))
            .collect()
    };
    rows.flat_map(of_row).collect()
}

/// `[I][O]` of `[O][I]`
fn transposed(w: &[f32], [n_out, n_in]: [usize; 2]) -> Vec<f32> {
    (0..n_in * n_out).map(|i| w[i % n_out * n_in + i / n_out]).collect()
}

#[test]
fn products_are_those_with_the_numbers_that_blocks_stand_for() {
    let mut random = Random::new(19);
    for n_threads in [1, 3] {
        let device = Cpu::new(n_threads, Products::Exact).unwrap();
        for tensor_type in TYPES {
            for [n_out, n_in] in sizes(tensor_type) {
                let (host, w) = matrix(&mut random, tensor_type, [n_out, n_in]);
                let matrix = device.matrix(host).unwrap();
                for n_rows in [1, 3, 17] {
                    let what = format!("{tensor_type} [{n_out}][{n_in}], {n_rows} rows");
                    let (x, dy) = (random.numbers(n_rows * n_in), random.numbers(n_rows * n_out));
                    let mut y = vec![f32::NAN; n_rows * n_out];
                    device.product(&matrix, &x, n_rows, &mut y).unwrap();
                    assert_close(&y, &product(&w, [n_out, n_in], &x), SUMS, &what);
                    let mut dx = vec![HELD; n_rows * n_in];
                    device.product_back(&matrix, &dy, n_rows, &mut dx).unwrap();
                    let expected = product(&transposed(&w, [n_out, n_in]), [n_in, n_out], &dy);
                    let expected: Vec<f64> = expected.into_iter().map(|x| x + f64::from(HELD)).collect();
                    assert_close(&dx, &expected, SUMS, &format!("{what}, back"));
                }
            }
        }
    }
}

/// The most that rounding a row to 8 bits in blocks of `len` changes each number: half a step of the largest
/// over 127, and an F16's rounding of that step and of what the block adds up to.
fn rounding(row: &[f32], len: usize) -> Vec<f64> {
    let largest = |block: &[f32]| block.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    let of_block = |block: &[f32]| {
        let most = f64::from(largest(block)) * (1.0 / 254.0 + 1.0 / 1024.0);
        vec![most; block.len()]
    };
    row.chunks(len).flat_map(of_block).collect()
}

/// How far a product may be from the exact one, if its operands are rounded by at most so much.
fn bound(a: &[f32], da: &[f64], b: &[f32], db: &[f64]) -> f64 {
    let of = |i: usize| f64::from(a[i].abs()) * db[i] + f64::from(b[i].abs()) * da[i] + da[i] * db[i];
    (0..a.len()).map(of).sum::<f64>() + SUMS * a.len() as f64
}

/// ggml's kernels, and where this CPU has what they need this program's; the latter round the matrix too.
fn fast_devices() -> Vec<(Cpu, bool)> {
    let ggml = (Cpu::with(2, Products::Fast, true).unwrap(), false);
    let own = Cpu::new(2, Products::Fast).unwrap();
    if own.kernels.is_some() { vec![ggml] } else { vec![ggml, (own, true)] }
}

#[test]
fn fast_products_differ_by_rounding_to_eight_bits_and_no_more() {
    for (device, rounds_matrix) in fast_devices() {
        check_fast_products(&device, rounds_matrix);
    }
}

fn check_fast_products(device: &Cpu, rounds_matrix: bool) {
    let mut random = Random::new(20);
    for tensor_type in TYPES {
        for [n_out, n_in] in sizes(tensor_type) {
            let (host, w) = matrix(&mut random, tensor_type, [n_out, n_in]);
            let matrix = device.matrix(host).unwrap();
            let len = tensor_type.block_len() as usize;
            for n_rows in [1, 3, 17, 70] {
                let what = format!("{tensor_type} [{n_out}][{n_in}], {n_rows} rows");
                let x = random.numbers(n_rows * n_in);
                let mut y = vec![f32::NAN; n_rows * n_out];
                device.product(&matrix, &x, n_rows, &mut y).unwrap();
                let exact = product(&w, [n_out, n_in], &x);
                let mut largest = 0.0f64;
                for (i, (&found, exact)) in y.iter().zip(&exact).enumerate() {
                    let x = &x[i / n_out * n_in..(i / n_out + 1) * n_in];
                    let w = &w[i % n_out * n_in..(i % n_out + 1) * n_in];
                    // F16 and BF16 round to their own type: BF16's 2^-9 is less than 8 bits of a block.
                    let (dw, dx) = match (rounds_matrix, len) {
                        (false, _) if tensor_type == TensorType::F32 => (vec![0.0; n_in], vec![0.0; n_in]),
                        (false, _) => (vec![0.0; n_in], rounding(x, len.max(32))),
                        (true, 1) => (vec![0.0; n_in], vec![0.0; n_in]),
                        (true, _) => (rounding(w, 32), rounding(x, 32)),
                    };
                    let distance = (f64::from(found) - exact).abs();
                    let bound = bound(w, &dw, x, &dx);
                    assert!(distance <= bound, "{what}: {found}, exactly {exact}, {distance} > {bound}");
                    largest = largest.max(distance);
                }
                assert!(
                    len == 1 || largest > 1e-4,
                    "{what}: nothing was rounded, which is not what fast means"
                );
            }
        }
    }
}

#[test]
fn fast_products_back_differ_by_rounding_both_sides_to_eight_bits_and_no_more() {
    for (device, is_own) in fast_devices() {
        check_fast_products_back(&device, is_own);
    }
}

fn check_fast_products_back(device: &Cpu, is_own: bool) {
    let mut random = Random::new(21);
    for tensor_type in TYPES.into_iter().filter(|t| t.block_len() > 1) {
        let block_len = tensor_type.block_len() as usize;
        // More inputs than a part of a transposed copy has.
        // ggml's are exact where outputs are no whole blocks.
        let odd = if is_own { &[[33, block_len], [3, 256], [197, 256]][..] } else { &[] };
        for &[n_out, n_in] in [[32, block_len], [96, 768]].iter().chain(odd) {
            let (host, w) = matrix(&mut random, tensor_type, [n_out, n_in]);
            let matrix = device.matrix(host).unwrap();
            let w = transposed(&w, [n_out, n_in]);
            for n_rows in [1, 3, 17, 70] {
                let what = format!("{tensor_type} [{n_out}][{n_in}], {n_rows} rows");
                let dy = random.numbers(n_rows * n_out);
                let mut dx = vec![HELD; n_rows * n_in];
                device.product_back(&matrix, &dy, n_rows, &mut dx).unwrap();
                let exact = product(&w, [n_in, n_out], &dy);
                let mut largest = 0.0f64;
                for (i, (&found, exact)) in dx.iter().zip(&exact).enumerate() {
                    let dy = &dy[i / n_in * n_out..(i / n_in + 1) * n_out];
                    let w = &w[i % n_in * n_out..(i % n_in + 1) * n_out];
                    let distance = (f64::from(found) - f64::from(HELD) - exact).abs();
                    let bound = bound(w, &rounding(w, 32), dy, &rounding(dy, 32));
                    assert!(distance <= bound, "{what}: {found}, exactly {exact}, {distance} > {bound}");
                    largest = largest.max(distance);
                }
                assert!(largest > 1e-4, "{what}: nothing was rounded, which is not what fast means");
            }
        }
    }
}

#[test]
fn ggml_s_products_back_are_exact_to_the_bit_where_outputs_are_no_whole_blocks() {
    let mut random = Random::new(22);
    let (exact, fast) = (cpu(), Cpu::with(2, Products::Fast, true).unwrap());
    let plain = [TensorType::F32, TensorType::F16, TensorType::BF16].map(|t| (t, [64, 96]));
    for (tensor_type, [n_out, n_in]) in
        [(TensorType::Q8_0, [33, 96]), (TensorType::Q4_K, [16, 256])].into_iter().chain(plain)
    {
        let (host, _) = matrix(&mut random, tensor_type, [n_out, n_in]);
        let (a, b) = (exact.matrix(host.clone()).unwrap(), fast.matrix(host).unwrap());
        let dy = random.numbers(5 * n_out);
        let (mut of_exact, mut of_fast) = (vec![HELD; 5 * n_in], vec![HELD; 5 * n_in]);
        exact.product_back(&a, &dy, 5, &mut of_exact).unwrap();
        fast.product_back(&b, &dy, 5, &mut of_fast).unwrap();
        assert_eq!(of_exact, of_fast, "{tensor_type} [{n_out}][{n_in}]");
    }
}

#[test]
fn rows_that_hold_no_number_stay_none_and_leave_others_alone() {
    let mut random = Random::new(25);
    let exact = Cpu::new(2, Products::Exact).unwrap();
    for device in fast_devices().into_iter().map(|(device, _)| device).chain([exact]) {
        for tensor_type in [TensorType::F32, TensorType::Q8_0, TensorType::Q4_K] {
            let [n_out, n_in] = [64, 256];
            let matrix = device.matrix(matrix(&mut random, tensor_type, [n_out, n_in]).0).unwrap();
            for bad in [f32::NAN, f32::INFINITY] {
                let what = format!("{bad} in {tensor_type}, {}", device.describe());
                // In the second of three rows.
                let (mut x, mut dy) = (random.numbers(3 * n_in), random.numbers(3 * n_out));
                (x[n_in + 45], dy[n_out + 37]) = (bad, bad);
                let (mut y, mut dx) = (vec![0.0; 3 * n_out], vec![HELD; 3 * n_in]);
                device.product(&matrix, &x, 3, &mut y).unwrap();
                device.product_back(&matrix, &dy, 3, &mut dx).unwrap();
                for (found, n, of) in [(y, n_out, "product"), (dx, n_in, "product back")] {
                    let is_number = |x: &f32| x.is_finite();
                    assert!(!found[n..2 * n].iter().any(is_number), "{what}, {of}: numbers out of none");
                    assert!(found[..n].iter().all(is_number), "{what}, {of}: the row before");
                    assert!(found[2 * n..].iter().all(is_number), "{what}, {of}: the row after");
                }
            }
        }
    }
}

#[test]
fn rejects_a_matrix_whose_bytes_are_not_those_of_its_shape() {
    let mut random = Random::new(23);
    let (host, _) = matrix(&mut random, TensorType::Q8_0, [4, 64]);
    let cases = [
        HostMatrix { n_out: 5, ..host.clone() },
        HostMatrix { n_in: 32, ..host.clone() },
        HostMatrix { n_in: 33, ..host.clone() },
        HostMatrix { tensor_type: TensorType::F32, ..host },
    ];
    for host in cases {
        let error = cpu().matrix(host).unwrap_err();
        assert!(matches!(error, Error::Setting { .. }), "{error}");
        assert!(error.to_string().starts_with("blk.0.ffn_up.weight: expected"), "{error}");
    }
}
