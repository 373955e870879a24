//! Quantisation: which types reproduce dequantised values exactly, and the error of each.

use detox_gguf::gguf::TensorType;
use detox_gguf::gguf::{dequantize, quantize};

/// Types for which quantising dequantised values again changes nothing.
///
/// The largest value of a block, or both extremes, lie on their grid. The other types (q2_K to q6_K, iq, nvfp4)
/// search for the best scales and find different ones the second time.
const IDEMPOTENT: [TensorType; 13] = [
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

/// Values distributed like weights: sums of four uniform values, with a scale per block of 32.
fn weights(n: usize) -> Vec<f32> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut uniform = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..n).map(|i| (0..4).map(|_| uniform()).sum::<f32>() * 0.02 * (1.0 + (i / 32 % 5) as f32)).collect()
}

/// Quantises `values` to this type and dequantises them again.
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
fn quantising_dequantised_values_again_changes_nothing_for_types_with_a_fixed_grid() {
    let values = weights(64 * 1024);
    let mut kept = Vec::new();
    for &tensor_type in TensorType::ALL {
        if tensor_type.quantize_fault(1024).is_some() {
            continue;
        }
        let once = rounded(tensor_type, &values);
        let error = relative_error(&rounded(tensor_type, &once), &once);
        // A recomputed f16 scale may differ in a block or two. A search for scales changes thousands.
        if error < 1e-5 {
            kept.push(tensor_type);
        }
    }
    assert_eq!(kept, IDEMPOTENT);
}

#[test]
fn more_bits_mean_a_smaller_error() {
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
