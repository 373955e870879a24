//! The comparison that decides whether a merged model is kept: adapters of every type, and merges that went wrong.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use detox_gguf::check::export::{Applied, LoadedBack};
use detox_gguf::engine::steering::LoraScaled;
use detox_gguf::engine::{Model, ModelOptions, SessionOptions};
use detox_gguf::error::Result;
use detox_gguf::gguf::{GgufFile, GgufWriter, Metadata, TensorSpec, TensorType, quantize};
use detox_gguf::train::output::Adapter;
use detox_gguf::train::output::merge::{MergeOptions, merge};

use super::{TOKENS, factors, tiny};

const CHANGED: [&str; 2] = ["blk.0.attn_q.weight", "blk.1.ffn_down.weight"];

/// An adapter of rank 32 whose factors are stored as `tensor_type`.
fn adapter_of(tensor_type: TensorType, base: &GgufFile, path: &Path) {
    let in_f32 = path.with_extension("f32");
    let made = CHANGED.iter().enumerate().map(|(seed, name)| factors(base, name, 32, seed));
    let adapter = Adapter { alpha: 4.0, factors: made.collect() };
    adapter.write(&in_f32, base, &Metadata::new()).unwrap();
    let file = GgufFile::open(&in_f32).unwrap();
    let spec = |t: &detox_gguf::gguf::TensorInfo| TensorSpec {
        name: t.name().to_owned(),
        shape: t.shape().to_vec(),
        tensor_type,
    };
    let specs = file.tensors().iter().map(spec).collect();
    let mut writer = GgufWriter::create(path, file.metadata(), specs).unwrap();
    for tensor in file.tensors() {
        let bytes = file.read_tensor(tensor).unwrap();
        let values: Vec<f32> =
            bytes.chunks_exact(4).map(|four| f32::from_le_bytes(four.try_into().unwrap())).collect();
        writer.write(&quantize(tensor_type, &values, tensor.shape()[0] as usize).unwrap()).unwrap();
    }
    writer.finish().unwrap();
}

/// Merges `adapter` at `scale`, and compares the result with the adapter at scale 1.
fn compared(base: &GgufFile, given: &Path, adapter: Adapter, scale: f32) -> Result<LoadedBack> {
    let folder = tempfile::tempdir().unwrap();
    let (merged, in_f32) = (folder.path().join("merged.gguf"), folder.path().join("in-f32.gguf"));
    Adapter::read(given, base).unwrap().write(&in_f32, base, &Metadata::new()).unwrap();
    merge(base, &[(adapter, scale)], &merged, &MergeOptions::default(), |_, _| Ok(())).unwrap();
    let loras = |path: &Path| [LoraScaled { path: path.to_path_buf(), scale: 1.0 }];
    LoadedBack::compare(
        base.path(),
        Applied { given: &loras(given), in_f32: &loras(&in_f32) },
        &merged,
        &ModelOptions::default(),
        &SessionOptions { n_threads: Some(1), ..SessionOptions::default() },
        |_: &Model| Ok(vec![TOKENS.to_vec()]),
        &AtomicBool::new(false),
    )
}

#[test]
fn a_right_merge_is_kept_and_a_wrong_one_refused_whatever_the_adapters_type() {
    let folder = tempfile::tempdir().unwrap();
    let base = tiny("llama");
    let path = folder.path().join("lora.gguf");
    for tensor_type in [TensorType::Q8_0, TensorType::F16, TensorType::BF16, TensorType::Q4_0] {
        adapter_of(tensor_type, &base, &path);
        let adapter = Adapter::read(&path, &base).unwrap();
        let of_type = [(TensorType::F32, TensorType::F32); 2];
        let right = compared(&base, &path, adapter.clone(), 1.0).unwrap();
        right.verdict(&of_type, false, false).unwrap_or_else(|refusal| panic!("{tensor_type}: {refusal:?}"));
        // The adapter's own rounding is larger than what the merge may lose.
        let own = right.rounding.expect("the adapter is not in F32").mean_kl;
        assert!(own > 10.0 * right.missed.mean_kl, "{tensor_type}: {own} {right:?}");

        let louder = compared(&base, &path, adapter.clone(), 1.2).unwrap();
        assert!(louder.verdict(&of_type, false, true).is_err(), "{tensor_type}: {louder:?}");
        for skipped in 0..CHANGED.len() {
            let mut part = adapter.clone();
            part.factors.remove(skipped);
            let part = compared(&base, &path, part, 1.0).unwrap();
            assert!(part.verdict(&of_type, false, true).is_err(), "{tensor_type}: {part:?}");
        }
    }
}

#[test]
fn a_merged_model_that_overflows_an_f16_cache_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let base = tiny("llama");
    let path = folder.path().join("lora.gguf");
    let mut adapter = Adapter { alpha: 1e20, factors: vec![factors(&base, "blk.0.attn_k.weight", 4, 0)] };
    adapter.write(&path, &base, &Metadata::new()).unwrap();
    // In an F32 cache nothing overflows, and the merge is exact.
    let error = compared(&base, &path, adapter.clone(), 1.0).unwrap_err();
    assert!(error.to_string().contains("its logits contain NaN or infinite values"), "{error}");
    adapter.alpha = 1.0;
    adapter.write(&path, &base, &Metadata::new()).unwrap();
    compared(&base, &path, adapter, 1.0).unwrap();
}
