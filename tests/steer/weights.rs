//! Value vectors, their ranking and projection, and baked biases, on modified copies of the tiny models.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use detox_gguf::Error;
use detox_gguf::engine::steering::LoraScaled;
use detox_gguf::gguf::dequantize;
use detox_gguf::gguf::{GgufFile, GgufWriter, Metadata, TensorSpec, TensorType, Value};
use detox_gguf::interp::locate::{RankedNeuron, rank_value_vectors};
use detox_gguf::interp::vocabulary;
use detox_gguf::steer::bake::bake;
use detox_gguf::steer::value_vector::ValueVectors;
use tempfile::TempDir;

use super::split::split_in_two;

fn tiny(name: &str) -> GgufFile {
    GgufFile::open(format!("{}/gguf/tiny/{name}.gguf", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

/// A tensor with its data.
type Tensor = (TensorSpec, Vec<u8>);

fn f32_tensor(name: &str, shape: &[u64], values: &[f32]) -> Tensor {
    let spec = TensorSpec { name: name.into(), shape: shape.to_vec(), tensor_type: TensorType::F32 };
    (spec, values.iter().flat_map(|v| v.to_le_bytes()).collect())
}

fn write(path: &Path, metadata: &Metadata, tensors: Vec<Tensor>) {
    let specs = tensors.iter().map(|(spec, _)| spec.clone()).collect();
    let mut writer = GgufWriter::create(path, metadata, specs).unwrap();
    tensors.iter().for_each(|(_, bytes)| writer.write(bytes).unwrap());
    writer.finish().unwrap();
}

fn tensors_of(model: &GgufFile) -> Vec<Tensor> {
    let of = |t: &detox_gguf::gguf::TensorInfo| TensorSpec {
        name: t.name().into(),
        shape: t.shape().to_vec(),
        tensor_type: t.tensor_type(),
    };
    model.tensors().iter().map(|t| (of(t), model.read_tensor(t).unwrap())).collect()
}

/// A modified copy of the tiny llama.
fn changed(change: impl FnOnce(&mut Metadata, &mut Vec<Tensor>)) -> (TempDir, GgufFile) {
    let model = tiny("llama");
    let (mut metadata, mut tensors) = (model.metadata().clone(), tensors_of(&model));
    change(&mut metadata, &mut tensors);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("changed.gguf");
    write(&path, &metadata, tensors);
    (folder, GgufFile::open(path).unwrap())
}

/// The tiny llama with one weight of layer 1's down projection (row 3, column 17) set to `x`.
fn with_weight(x: f32) -> (TempDir, GgufFile) {
    changed(|_, tensors| {
        let (spec, bytes) =
            tensors.iter_mut().find(|(spec, _)| spec.name == "blk.1.ffn_down.weight").unwrap();
        assert_eq!(spec.tensor_type, TensorType::F32);
        let at = (3 * spec.shape[0] as usize + 17) * 4;
        bytes[at..at + 4].copy_from_slice(&x.to_le_bytes());
    })
}

/// The tiny llama with a mixture of two experts in layer 1.
fn with_experts() -> (TempDir, GgufFile) {
    changed(|_, tensors| {
        tensors.retain(|(spec, _)| spec.name != "blk.1.ffn_down.weight");
        tensors.push(f32_tensor("blk.1.ffn_down_exps.weight", &[96, 64, 2], &[0.5; 96 * 64 * 2]));
    })
}

fn rank(model: &GgufFile, probe: &[f32], top: usize) -> Result<Vec<RankedNeuron>, Error> {
    rank_value_vectors(model, probe, top, &AtomicBool::new(false), |_| {})
}

fn probe() -> Vec<f32> {
    (0..64).map(|i| ((i * 7 % 13) as f32 - 6.0) / 8.0).collect()
}

#[track_caller]
fn assert_says(error: &Error, words: &[&str]) {
    for word in words {
        assert!(error.to_string().contains(word), "expected {word:?} in {error}");
    }
}

#[test]
fn an_adapter_adds_its_scaled_product_to_the_value_vector() {
    let model = tiny("llama");
    let n_ff = 96;
    let folder = tempfile::tempdir().unwrap();
    // A is [n_ff, rank], B is [rank, n_embd]: the product's column i is B A[:, i].
    let a: Vec<f32> = (0..2 * n_ff).map(|i| (i % 5) as f32 - 2.0).collect();
    let b: Vec<f32> = (0..64 * 2).map(|i| (i % 3) as f32 - 1.0).collect();
    for (alpha, effective) in [(8.0, 0.5 * 8.0 / 2.0), (0.0, 0.5)] {
        let path: PathBuf = folder.path().join(format!("{alpha}.gguf"));
        let mut metadata = Metadata::new();
        for (key, value) in [("general.type", "adapter"), ("adapter.type", "lora")] {
            metadata.set(key, Value::Str(value.into()));
        }
        metadata.set("general.architecture", Value::Str("llama".into()));
        metadata.set("adapter.lora.alpha", Value::F32(alpha));
        let name = "blk.1.ffn_down.weight";
        let pair = vec![
            f32_tensor(&format!("{name}.lora_a"), &[n_ff as u64, 2], &a),
            f32_tensor(&format!("{name}.lora_b"), &[2, 64], &b),
        ];
        write(&path, &metadata, pair);
        let vectors = ValueVectors::open(&model).unwrap();
        let lora = LoraScaled { path, scale: 0.5 };
        let weights = [(3, 2.0f32), (90, -1.0)];
        let plain = vectors.weighted_sum(1, &weights).unwrap();
        let found = vectors.weighted_sum_with_loras(1, &weights, std::slice::from_ref(&lora)).unwrap();
        for row in 0..64 {
            let product = |i: usize| b[2 * row] * a[i] + b[2 * row + 1] * a[n_ff + i];
            let expected = plain[row] + effective * (2.0 * product(3) - product(90));
            assert!(
                (found[row] - expected).abs() < 1e-5,
                "alpha {alpha}, row {row}: {} {expected}",
                found[row]
            );
        }
        // The adapter does not contain layer 0.
        let untouched = vectors.weighted_sum_with_loras(0, &weights, &[lora]).unwrap();
        assert_eq!(untouched, vectors.weighted_sum(0, &weights).unwrap());
    }
}

#[test]
fn the_ranking_is_the_same_with_any_number_of_threads() {
    let model = tiny("llama-q8_0");
    let with = |n: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
        pool.install(|| rank(&model, &probe(), 50).unwrap())
    };
    let one = with(1);
    assert_eq!(one.len(), 50);
    for n in [2, 3, 8] {
        assert_eq!(with(n), one, "{n} threads");
    }
}

#[test]
fn cosines_do_not_depend_on_the_length_of_the_probe() {
    let model = tiny("llama");
    let expected = rank(&model, &probe(), 20).unwrap();
    for factor in [1e-30, 1e30] {
        let found = rank(&model, &probe().iter().map(|x| x * factor).collect::<Vec<_>>(), 20).unwrap();
        for (found, expected) in found.iter().zip(&expected) {
            assert_eq!((found.layer, found.index), (expected.layer, expected.index), "times {factor:e}");
            assert!((found.cosine - expected.cosine).abs() < 1e-6, "times {factor:e}");
        }
    }
}

#[test]
fn rejects_ranking_weights_that_are_not_finite() {
    for x in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
        let (_folder, model) = with_weight(x);
        match rank(&model, &probe(), 5) {
            Err(error) => assert_says(&error, &["blk.1.ffn_down.weight", "expected finite numbers"]),
            Ok(ranked) => panic!("{x} was ranked: {ranked:?}"),
        }
    }
}

#[test]
fn an_interrupt_stops_ranking_and_projection() {
    let model = tiny("llama");
    let interrupt = AtomicBool::new(true);
    let ranked = rank_value_vectors(&model, &probe(), 5, &interrupt, |_| panic!("no layer is ranked"));
    assert!(matches!(ranked, Err(Error::Interrupted)));
    assert!(matches!(vocabulary::project(&model, &[probe()], 5, &interrupt), Err(Error::Interrupted)));
}

#[test]
fn rejects_the_value_vectors_of_a_mixture_of_experts() {
    let (_folder, model) = with_experts();
    let error = ValueVectors::open(&model).unwrap_err();
    assert!(matches!(error, Error::Model { .. }));
    assert_says(&error, &["mixture of experts", "blk.1.ffn_down_exps.weight"]);
}

#[test]
fn rejects_projecting_vectors_whose_lengths_are_wrong_but_add_up() {
    let model = tiny("llama");
    let vectors = [vec![1.0; 63], vec![1.0; 65]];
    let error = vocabulary::project(&model, &vectors, 3, &AtomicBool::new(false)).unwrap_err();
    assert_says(&error, &["64", "63"]);
}

#[test]
fn a_split_model_is_baked_into_one_complete_file() {
    let whole = tiny("llama");
    let folder = tempfile::tempdir().unwrap();
    let split = GgufFile::open(split_in_two(&whole, folder.path())).unwrap();
    let vectors = BTreeMap::from([(0, vec![0.25; 64])]);
    let output = folder.path().join("baked.gguf");
    bake(&split, &vectors, &[], &output, |_, _| {}).unwrap();
    let baked = GgufFile::open(&output).unwrap();
    assert_eq!(baked.metadata(), whole.metadata());
    assert_eq!(baked.part_paths().len(), 1);
    assert_eq!(baked.tensors().len(), whole.tensors().len() + 1);
    for tensor in whole.tensors() {
        let copy = baked.tensor(tensor.name()).unwrap();
        assert_eq!(whole.read_tensor(tensor).unwrap(), baked.read_tensor(copy).unwrap(), "{}", tensor.name());
    }
    let bias = baked.tensor("blk.0.ffn_down.bias").unwrap();
    let mut values = vec![0.0; 64];
    dequantize(bias.tensor_type(), &baked.read_tensor(bias).unwrap(), &mut values).unwrap();
    assert_eq!(values, [0.25; 64]);
}

/// Tries to bake, checks that nothing was written, and returns the error.
fn refusal_to_bake(model: &GgufFile) -> Error {
    let folder = tempfile::tempdir().unwrap();
    let vectors = BTreeMap::from([(1, vec![0.5; 64])]);
    let baked = bake(model, &vectors, &[], &folder.path().join("baked.gguf"), |_, _| {});
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "expected no output");
    baked.unwrap_err()
}

#[test]
fn rejects_baking_into_a_mixture_of_experts() {
    // The expert branch of llama.cpp's graph has no such bias, so its loader would find an unexpected tensor.
    let (_folder, model) = with_experts();
    let error = refusal_to_bake(&model);
    assert!(matches!(error, Error::Model { .. }));
    assert_says(&error, &["mixture of experts"]);
}

#[test]
fn rejects_baking_if_a_scale_follows_the_bias() {
    // build_ffn adds the bias before the scale, so the bias would be scaled; with NVFP4 the process aborts.
    let (_folder, model) =
        changed(|_, tensors| tensors.push(f32_tensor("blk.1.ffn_down.scale", &[1], &[2.0])));
    let error = refusal_to_bake(&model);
    assert!(matches!(error, Error::Model { .. }));
    assert_says(&error, &["blk.1.ffn_down.scale"]);
}

#[test]
fn rejects_a_folder_as_output_before_anything_is_copied() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("folder");
    std::fs::create_dir(&output).unwrap();
    let mut n_copied = 0;
    let vectors = BTreeMap::from([(0, vec![0.5; 64])]);
    let error = bake(&tiny("llama"), &vectors, &[], &output, |done, _| n_copied = done).unwrap_err();
    assert_eq!(n_copied, 0, "{error}");
    assert_says(&error, &["folder"]);
}
