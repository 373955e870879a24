//! Products with frozen matrices of all types with kernels.

use crate::error::Error;
use crate::gguf::TensorType;
use crate::gguf::blocks::{dequantize, quantize};
use crate::train::device::HostMatrix;
use crate::train::device::tests::{HELD, Random, Tested, assert_within};

pub const TYPES: [TensorType; 11] = [
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

/// A random matrix, and its dequantised numbers, `[n_out][n_in]`.
pub fn matrix(
    random: &mut Random,
    tensor_type: TensorType,
    [n_out, n_in]: [usize; 2],
) -> (HostMatrix, Vec<f32>) {
    let bytes = quantize(tensor_type, &random.numbers(n_out * n_in), n_in).unwrap();
    let mut values = vec![0.0; n_out * n_in];
    dequantize(tensor_type, &bytes, &mut values).unwrap();
    (
        HostMatrix { name: "blk.0.ffn_up.weight".into(), tensor_type, n_in, n_out, bytes, is_table: false },
        values,
    )
}

/// Outputs and inputs: few, more than a part of a matrix has, and odd ones if the type has no blocks.
pub fn sizes(tensor_type: TensorType) -> Vec<[usize; 2]> {
    match tensor_type.block_len() {
        1 => vec![[1, 1], [5, 7], [33, 45], [300, 770], [530, 9]],
        32 => vec![[1, 32], [5, 96], [64, 160], [300, 736], [530, 32]],
        n => vec![[1, n as usize], [37, 256], [300, 768]],
    }
}

/// `x Wᵀ`, `[R][O]`, and the sums of the absolute products.
pub fn product(w: &[f32], [n_out, n_in]: [usize; 2], x: &[f32]) -> (Vec<f64>, Vec<f64>) {
    let rows = x.chunks_exact(n_in);
    let of_row = |x: &[f32]| -> Vec<(f64, f64)> {
        let of_output = |o: usize| {
            super::dot_and_magnitude(w[o * n_in..(o + 1) * n_in].iter().copied(), x.iter().copied())
        };
        (0..n_out).map(of_output).collect()
    };
    rows.flat_map(of_row).unzip()
}

/// The transpose, `[I][O]`, of `[O][I]`.
pub fn transposed(w: &[f32], [n_out, n_in]: [usize; 2]) -> Vec<f32> {
    (0..n_in * n_out).map(|i| w[i % n_out * n_in + i / n_out]).collect()
}

pub fn products_match_those_with_the_dequantised_matrix<D: Tested>(device: &D) {
    let mut random = Random::new(19);
    let bounds = |magnitudes: Vec<f64>| -> Vec<f64> {
        magnitudes.into_iter().map(|m| super::rounding(D::PRODUCTS) * m).collect()
    };
    for tensor_type in TYPES {
        for [n_out, n_in] in sizes(tensor_type) {
            let (host, w) = matrix(&mut random, tensor_type, [n_out, n_in]);
            let matrix = device.matrix(host).unwrap();
            for n_rows in [1, 3, 17] {
                let what = format!("{tensor_type} [{n_out}][{n_in}], {n_rows} rows");
                let (x, dy) = (random.numbers(n_rows * n_in), random.numbers(n_rows * n_out));
                let mut y = vec![f32::NAN; n_rows * n_out];
                device.product(&matrix, &x, n_rows, &mut y).unwrap();
                let (expected, magnitudes) = product(&w, [n_out, n_in], &x);
                assert_within(&y, &expected, &bounds(magnitudes), &what);
                let mut dx = vec![HELD; n_rows * n_in];
                device.product_back(&matrix, &dy, n_rows, &mut dx).unwrap();
                let (expected, magnitudes) = product(&transposed(&w, [n_out, n_in]), [n_in, n_out], &dy);
                let expected: Vec<f64> = expected.into_iter().map(|x| x + f64::from(HELD)).collect();
                assert_within(&dx, &expected, &bounds(magnitudes), &format!("{what}, back"));
            }
        }
    }
}

pub fn non_finite_rows_stay_non_finite_and_leave_others_alone<D: Tested>(device: &D) {
    let mut random = Random::new(25);
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
                assert!(
                    !found[n..2 * n].iter().any(is_number),
                    "{what}, {of}: finite numbers from a non-finite row"
                );
                assert!(found[..n].iter().all(is_number), "{what}, {of}: the row before");
                assert!(found[2 * n..].iter().all(is_number), "{what}, {of}: the row after");
            }
        }
    }
}

pub fn products_of_one_input_match_one_matrix_at_a_time<D: Tested>(device: &D) {
    let mut random = Random::new(26);
    let all = [(TensorType::Q8_0, 33), (TensorType::Q4_K, 64), (TensorType::F32, 5)];
    for types in [&all[..0], &all[..1], &all[..2], &all] {
        let matrices: Vec<D::Matrix> = types
            .iter()
            .map(|&(tensor_type, n_out)| {
                device.matrix(matrix(&mut random, tensor_type, [n_out, 256]).0).unwrap()
            })
            .collect();
        let x = random.numbers(7 * 256);
        let space =
            || -> Vec<Vec<f32>> { types.iter().map(|(_, n_out)| vec![f32::NAN; 7 * n_out]).collect() };
        let (mut found, mut expected) = (space(), space());
        device.products(&matrices.iter().collect::<Vec<_>>(), &x, 7, &mut found).unwrap();
        for (matrix, y) in matrices.iter().zip(&mut expected) {
            device.product(matrix, &x, 7, y).unwrap();
        }
        assert!(expected.iter().flatten().all(|y| y.is_finite()));
        assert_eq!(found, expected);
    }
}

pub fn rejects_a_matrix_whose_bytes_do_not_match_its_shape<D: Tested>(device: &D) {
    let mut random = Random::new(23);
    let (host, _) = matrix(&mut random, TensorType::Q8_0, [4, 64]);
    let cases = [
        HostMatrix { n_out: 5, ..host.clone() },
        HostMatrix { n_in: 32, ..host.clone() },
        HostMatrix { n_in: 33, ..host.clone() },
        HostMatrix { tensor_type: TensorType::F32, ..host },
    ];
    for host in cases {
        let error = device.matrix(host).unwrap_err();
        assert!(matches!(error, Error::Setting { .. }), "{error}");
        assert!(error.to_string().starts_with("blk.0.ffn_up.weight: expected"), "{error}");
    }
}
