//! Dequantisation, compared with Python's gguf package (`scripts/make_dequantize_golden.py`).

use std::collections::BTreeMap;

use detox_gguf::gguf::TensorType;
use detox_gguf::gguf::dequantize;
use serde::Deserialize;

/// Blocks of one type and their dequantised values (little-endian f32), both in hex.
#[derive(Deserialize)]
struct GoldenBlocks {
    bytes: String,
    values: String,
}

#[derive(Deserialize)]
struct Golden {
    types: BTreeMap<String, GoldenBlocks>,
}

fn golden() -> BTreeMap<String, GoldenBlocks> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/dequantize.json");
    serde_json::from_str::<Golden>(&std::fs::read_to_string(path).unwrap()).unwrap().types
}

fn bytes_of(hex: &str) -> Vec<u8> {
    assert!(hex.len().is_multiple_of(2));
    (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect()
}

fn floats_of(hex: &str) -> Vec<f32> {
    bytes_of(hex).chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

fn type_named(name: &str) -> TensorType {
    *TensorType::ALL.iter().find(|t| t.name().eq_ignore_ascii_case(name)).unwrap()
}

#[test]
fn dequantises_random_blocks_like_the_gguf_package() {
    let golden = golden();
    for required in ["Q4_K", "Q5_K", "Q6_K", "Q5_0", "Q5_1", "IQ4_NL"] {
        assert!(golden.contains_key(required), "{required} is missing from the golden file");
    }
    for (name, blocks) in golden {
        let expected = floats_of(&blocks.values);
        let mut found = vec![f32::NAN; expected.len()];
        dequantize(type_named(&name), &bytes_of(&blocks.bytes), &mut found).unwrap();
        // Both compute in f32, but may round a product of three in another order, and the compiler may fuse a
        // multiplication and an addition. That changes a few units in the last place of the largest term.
        let largest = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let difference = (found - expected).abs();
            assert!(
                difference <= 4.0 * f32::EPSILON * largest,
                "{name}, number {i}: expected {expected:e}, found {found:e}"
            );
        }
    }
}

#[test]
fn dequantises_blocks_separately_or_together_to_the_same_values() {
    for (name, blocks) in golden() {
        let tensor_type = type_named(&name);
        let bytes = bytes_of(&blocks.bytes);
        let (block_len, block_bytes) = (tensor_type.block_len() as usize, tensor_type.block_bytes() as usize);
        let mut together = vec![0f32; bytes.len() / block_bytes * block_len];
        dequantize(tensor_type, &bytes, &mut together).unwrap();
        for (block, expected) in bytes.chunks_exact(block_bytes).zip(together.chunks_exact(block_len)) {
            let mut alone = vec![0f32; block_len];
            dequantize(tensor_type, block, &mut alone).unwrap();
            assert_eq!(alone, expected, "{name}");
        }
    }
}

#[test]
fn rejects_types_that_ggml_cannot_dequantise_and_names_them() {
    let is_refused = |t: TensorType| {
        let mut values = vec![0f32; t.block_len() as usize];
        match dequantize(t, &vec![0; t.block_bytes() as usize], &mut values) {
            Ok(()) => false,
            Err(reason) => {
                assert!(reason.contains(t.name()), "{reason}");
                true
            }
        }
    };
    for &tensor_type in TensorType::ALL {
        assert_eq!(is_refused(tensor_type), !tensor_type.is_weight(), "{tensor_type}");
    }
}
