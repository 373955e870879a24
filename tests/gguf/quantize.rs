//! Numbers as blocks: which types give back what was read from them, and which round it again.

use detox_gguf::gguf::TensorType;
use detox_gguf::gguf::{dequantize, quantize};

/// Types whose numbers fix their blocks: the largest of a block, or both ends, lie on the grid, so that
/// quantising what was read from them writes the same numbers. The others (q2_K to q6_K, iq, nvfp4) search
/// for the scales that fit best, and find others the second time.
const KEEP_THEIR_NUMBERS: [TensorType; 13] = [
    TensorType::F32,
    TensorType::F16,
    TensorType::Q4_0,
    TensorType::Q4_1,
    TensorType::Q5_0,
    TensorType::Q5_1,
    TensorType::Q8_0,
    TensorType::BF16,
    TensorType::TQ1_0,
    TensorType::TQ2_0,
    TensorType::MXFP4,
    TensorType::Q1_0,
    TensorType::Q2_0,
];

/// Numbers with the spread of weights: sums of four, scaled by blocks.
fn weights(n: usize) -> Vec<f32> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut uniform = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..n).map(|i| (0..4).map(|_| uniform()).sum::<f32>() * 0.02 * (1.0 + (i / 32 % 5) as f32)).collect()
}

/// `values` as they are read from blocks of this type.
fn rounded(tensor_type: TensorType, values: &[f32]) -> Vec<f32> {
    let mut read = vec![0.0; values.len()];
    dequantize(tensor_type, &quantize(tensor_type, values, 1024).unwrap(), &mut read).unwrap();
    read
}

fn relative_error(found: &[f32], expected: &[f32]) -> f64 {
    let sum = |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x).powi(2)).sum::<f64>();
    let error = sum(&mut found.iter().zip(expected).map(|(a, b)| a - b));
    (error / sum(&mut expected.iter().copied())).sqrt()
}

#[test]
fn what_was_read_from_blocks_of_a_fixed_grid_is_written_as_it_was() {
    let values = weights(64 * 1024);
    let mut kept = Vec::new();
    for &tensor_type in TensorType::ALL {
        if tensor_type.quantize_fault(1024).is_some() {
            continue;
        }
        let once = rounded(tensor_type, &values);
        let error = relative_error(&rounded(tensor_type, &once), &once);
        // A scale computed from the numbers may be another F16 in a block or two; a search moves thousands.
        if error < 1e-5 {
            kept.push(tensor_type);
        }
    }
    assert_eq!(kept, KEEP_THEIR_NUMBERS);
}

#[test]
fn more_bits_give_less_error() {
    use TensorType::*;
    let values = weights(16 * 1024);
    let error = |t| relative_error(&rounded(t, &values), &values);
    for (finer, coarser) in [
        (F32, F16),
        (F16, BF16),
        (BF16, Q8_0),
        (Q8_0, Q6_K),
        (Q6_K, Q5_K),
        (Q5_K, Q4_K),
        (Q4_K, Q3_K),
        (Q3_K, Q2_K),
        (Q5_1, Q4_1),
    ] {
        assert!(error(finer) < error(coarser), "{finer} {} {coarser} {}", error(finer), error(coarser));
    }
    assert!(error(Q8_0) < 0.01 && error(Q4_K) < 0.1);
}
