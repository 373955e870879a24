//! Fast products, and exact products on other numbers of threads.

use crate::gguf::TensorType;
use crate::train::device::Device;
use crate::train::device::cpu::{Cpu, Products};
use crate::train::device::tests::on_host::OnHost;
use crate::train::device::tests::product::{TYPES, matrix, product, sizes, transposed};
use crate::train::device::tests::{HELD, Random, SUMS, oracle, product as common};

/// Bound on the error of each number when a row is rounded to 8 bits in blocks of `len`.
///
/// Half a step, where a step is the largest number over 127, plus the F16 rounding of the step and of the block's sum.
fn rounding(row: &[f32], len: usize) -> Vec<f64> {
    let largest = |block: &[f32]| block.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    let of_block = |block: &[f32]| {
        let most = f64::from(largest(block)) * (1.0 / 254.0 + 1.0 / 1024.0);
        vec![most; block.len()]
    };
    row.chunks(len).flat_map(of_block).collect()
}

/// Bound on the error of a product of a and b, whose numbers are off by at most `da` and `db`.
fn bound(a: &[f32], da: &[f64], b: &[f32], db: &[f64]) -> f64 {
    let of = |i: usize| f64::from(a[i].abs()) * db[i] + f64::from(b[i].abs()) * da[i] + da[i] * db[i];
    (0..a.len()).map(of).sum::<f64>() + SUMS * a.len() as f64
}

/// A device with ggml's kernels, and one with this program's if the CPU supports them; the latter round the matrix too.
fn fast_devices() -> Vec<(OnHost<Cpu>, bool)> {
    let ggml = (OnHost(Cpu::with(2, Products::Fast, true).unwrap()), false);
    let own = OnHost(Cpu::new(2, Products::Fast).unwrap());
    if own.0.kernels.is_some() { vec![ggml] } else { vec![ggml, (own, true)] }
}

#[test]
fn fast_products_are_within_the_rounding_to_eight_bits() {
    for (device, rounds_matrix) in fast_devices() {
        check_fast_products(&device, rounds_matrix);
    }
}

fn check_fast_products(device: &OnHost<Cpu>, rounds_matrix: bool) {
    let mut random = Random::new(20);
    for tensor_type in TYPES {
        // Deeper than the blocks that a panel goes through at a time.
        let deep = if tensor_type == TensorType::Q8_0 { vec![[33, 4160]] } else { vec![] };
        for [n_out, n_in] in sizes(tensor_type).into_iter().chain(deep) {
            let (host, w) = matrix(&mut random, tensor_type, [n_out, n_in]);
            let matrix = device.matrix(host).unwrap();
            let len = tensor_type.block_len() as usize;
            for n_rows in [1, 3, 17, 70] {
                let what = format!("{tensor_type} [{n_out}][{n_in}], {n_rows} rows");
                let x = random.numbers(n_rows * n_in);
                let mut y = vec![f32::NAN; n_rows * n_out];
                device.product(&matrix, &x, n_rows, &mut y).unwrap();
                let (exact, _) = product(&w, [n_out, n_in], &x);
                let mut largest = 0.0f64;
                for (i, (&found, exact)) in y.iter().zip(&exact).enumerate() {
                    let x = &x[i / n_out * n_in..(i / n_out + 1) * n_in];
                    let w = &w[i % n_out * n_in..(i % n_out + 1) * n_in];
                    // F16 and BF16 round x to their own type: BF16's 2^-9 is less than the error of 8 bits.
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
                    "{what}: nothing was rounded, so the product was not fast"
                );
            }
        }
    }
}

#[test]
fn fast_products_back_are_within_the_rounding_of_both_sides_to_eight_bits() {
    for (device, is_own) in fast_devices() {
        check_fast_products_back(&device, is_own);
    }
}

fn check_fast_products_back(device: &OnHost<Cpu>, is_own: bool) {
    let mut random = Random::new(21);
    for tensor_type in TYPES.into_iter().filter(|t| t.block_len() > 1) {
        let block_len = tensor_type.block_len() as usize;
        // More inputs than a part of a transposed copy has. Odd numbers of outputs are this program's only: ggml's
        // products are exact if the outputs are not whole blocks.
        let odd = if is_own { &[[33, block_len], [3, 256], [197, 256], [4160, 256]][..] } else { &[] };
        for &[n_out, n_in] in [[32, block_len], [96, 768]].iter().chain(odd) {
            let (host, w) = matrix(&mut random, tensor_type, [n_out, n_in]);
            let matrix = device.matrix(host).unwrap();
            let w = transposed(&w, [n_out, n_in]);
            for n_rows in [1, 3, 17, 70] {
                let what = format!("{tensor_type} [{n_out}][{n_in}], {n_rows} rows");
                let dy = random.numbers(n_rows * n_out);
                let mut dx = vec![HELD; n_rows * n_in];
                device.product_back(&matrix, &dy, n_rows, &mut dx).unwrap();
                let (exact, _) = product(&w, [n_in, n_out], &dy);
                let mut largest = 0.0f64;
                for (i, (&found, exact)) in dx.iter().zip(&exact).enumerate() {
                    let dy = &dy[i / n_in * n_out..(i / n_in + 1) * n_out];
                    let w = &w[i % n_in * n_out..(i % n_in + 1) * n_out];
                    let distance = (f64::from(found) - f64::from(HELD) - exact).abs();
                    let bound = bound(w, &rounding(w, 32), dy, &rounding(dy, 32));
                    assert!(distance <= bound, "{what}: {found}, exactly {exact}, {distance} > {bound}");
                    largest = largest.max(distance);
                }
                assert!(largest > 1e-4, "{what}: nothing was rounded, so the product was not fast");
            }
        }
    }
}

#[test]
fn products_back_by_ggml_are_exact_unless_outputs_are_whole_blocks() {
    let mut random = Random::new(22);
    let (exact, fast) = (oracle(), OnHost(Cpu::with(2, Products::Fast, true).unwrap()));
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
fn non_finite_rows_stay_non_finite_in_fast_products() {
    for (device, _) in fast_devices() {
        common::non_finite_rows_stay_non_finite_and_leave_others_alone(&device);
    }
}

#[test]
fn fast_products_of_one_input_match_one_matrix_at_a_time() {
    for (device, _) in fast_devices() {
        common::products_of_one_input_match_one_matrix_at_a_time(&device);
    }
}

#[test]
fn products_on_one_and_three_threads_are_exact() {
    for n_threads in [1, 3] {
        let device = OnHost(Cpu::new(n_threads, Products::Exact).unwrap());
        common::products_match_those_with_the_dequantised_matrix(&device);
    }
}
