//! Rejects models, weights and settings that cannot be trained, by name.

use detox_gguf::error::Error;
use detox_gguf::gguf::{GgufFile, GgufWriter, TensorSpec, Value};
use detox_gguf::train::output::artifact;
use detox_gguf::train::recipe::method::MethodName;
use detox_gguf::train::recipe::settings::Settings;

use super::{Silent, changed, load, own_pairs, small_settings, tiny, train};

const METHODS: [MethodName; 3] = [MethodName::Lora, MethodName::Vector, MethodName::Full];

#[test]
fn rejects_nan_and_infinite_weights_by_tensor() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bad.gguf");
    let nan = |at: usize| {
        move |bytes: &mut [u8]| bytes[4 * at..4 * at + 4].copy_from_slice(&f32::NAN.to_le_bytes())
    };
    let infinite = |at: usize| {
        move |bytes: &mut [u8]| bytes[4 * at..4 * at + 4].copy_from_slice(&f32::INFINITY.to_le_bytes())
    };
    for (name, tensor, at) in [
        ("llama", "token_embd.weight", 0),
        ("llama", "token_embd.weight", 7 * 64 + 3),
        ("llama", "blk.1.ffn_up.weight", 95 * 64 + 63),
        ("llama", "output.weight", 64),
        ("llama", "output_norm.weight", 63),
        ("gpt2", "position_embd.weight", 300),
        ("gpt2", "blk.0.attn_qkv.bias", 190),
        ("gemma3", "blk.0.attn_q_norm.weight", 1),
    ] {
        let base = GgufFile::open(tiny(name)).unwrap();
        for (bad, word) in [
            (changed(&base, tensor, &path, nan(at)), "NaN"),
            (changed(&base, tensor, &path, infinite(at)), "inf"),
        ] {
            for method in METHODS {
                let error = load(&bad, &Settings { method, ..small_settings() }).unwrap_err();
                assert!(matches!(error, Error::Gguf { .. }), "{method:?}: {error}");
                let expected =
                    format!("tensor {tensor:?}: expected finite numbers, found {word} at element {at}");
                assert!(error.to_string().ends_with(&expected), "{method:?}: {error}");
            }
        }
    }
}

#[test]
fn rejects_nan_in_quantised_weights_by_tensor() {
    let folder = tempfile::tempdir().unwrap();
    let base = GgufFile::open(tiny("llama-q8_0")).unwrap();
    // The scale of the block with elements 64 * 5 to 64 * 5 + 31: an F16 followed by 32 bytes.
    let at = 34 * 10;
    let nan = move |bytes: &mut [u8]| bytes[at..at + 2].copy_from_slice(&0x7e00u16.to_le_bytes());
    let bad = changed(&base, "blk.0.ffn_up.weight", &folder.path().join("bad.gguf"), nan);
    for method in [MethodName::Lora, MethodName::Vector] {
        let error = load(&bad, &Settings { method, ..small_settings() }).unwrap_err().to_string();
        let expected = "tensor \"blk.0.ffn_up.weight\": expected finite numbers, found NaN at element 320";
        assert!(error.ends_with(expected), "{error}");
    }
}

#[test]
fn rejects_full_training_of_quantised_weights() {
    let base = GgufFile::open(tiny("llama-q8_0")).unwrap();
    let error = artifact::check(&base, MethodName::Full).unwrap_err();
    assert!(error.is_usage());
    let message = error.to_string();
    assert!(message.starts_with("--method full: ") && message.contains("is of type q8_0"), "{message}");
    assert!(error.hint().unwrap().contains("--method lora"));
    for method in [MethodName::Lora, MethodName::Vector] {
        artifact::check(&base, method).unwrap();
    }
}

#[test]
fn rejects_adapters_on_tied_embeddings() {
    for name in ["gemma3", "gpt2", "bloom", "command-r", "qwen2"] {
        let base = GgufFile::open(tiny(name)).unwrap();
        for target in ["embed", "output"] {
            let targets = vec!["q".to_owned(), target.to_owned()];
            let error = load(&base, &Settings { targets, ..small_settings() }).unwrap_err();
            assert!(error.is_usage(), "{name}");
            assert!(
                error.to_string().starts_with(&format!("--targets: {target}: this model shares its token"))
            );
            assert!(error.hint().unwrap().contains("leave embed and output out"));
        }
    }
}

#[test]
fn rejects_unknown_and_missing_targets() {
    let base = GgufFile::open(tiny("gpt2")).unwrap();
    let refusal = |targets: &[&str], rank, alpha| {
        let targets = targets.iter().map(|&target| target.to_owned()).collect();
        let error = load(&base, &Settings { targets, rank, alpha, ..small_settings() }).unwrap_err();
        assert!(error.is_usage());
        error.to_string()
    };
    assert_eq!(
        refusal(&["q", "knee"], 4, 1.0),
        "--targets: expected names from q, k, v, o, gate, up, down, embed, output, found \"knee\""
    );
    // GPT-2's FFN has no gate.
    assert_eq!(refusal(&["gate"], 4, 1.0), "--targets: this model has none of these matrices");
    assert_eq!(refusal(&[], 4, 1.0), "--targets: this model has none of these matrices");
    assert_eq!(refusal(&["q"], 0, 1.0), "--rank: expected at least 1, found 0");
    assert_eq!(refusal(&["q"], 4, 0.0), "--alpha: expected a positive number, found 0");
    assert_eq!(refusal(&["q"], 4, f32::NAN), "--alpha: expected a positive number, found NaN");
}

#[test]
fn rejects_unsupported_architectures_by_name() {
    for (name, architecture) in [("plamo2", "plamo2"), ("bert", "bert")] {
        let base = GgufFile::open(tiny(name)).unwrap();
        for method in METHODS {
            let error = load(&base, &Settings { method, ..small_settings() }).unwrap_err();
            assert!(matches!(error, Error::Model { .. }), "{error}");
            let expected = format!("architecture {architecture:?} cannot be trained here");
            assert!(error.to_string().ends_with(&expected), "{error}");
            assert!(error.hint().unwrap().contains("llama, command-r, gpt2, bloom, gemma3"));
        }
    }
}

#[test]
fn rejects_pairs_longer_than_the_table_of_positions() {
    let folder = tempfile::tempdir().unwrap();
    let interrupt = std::sync::atomic::AtomicBool::new(false);
    let mut pairs = own_pairs("gpt2", 8);
    let n_places = 256;
    // The last token of an answer is predicted but never read.
    let n_prompt = pairs[3].prompt.len();
    pairs[3].chosen = (0..n_places - n_prompt + 1).map(|i| (i % 50) as i32 + 5).collect();
    let settings = Settings { max_steps: Some(1), ..small_settings() };
    train("gpt2", &settings, &pairs, &folder.path().join("fits"), &interrupt, &mut Silent).unwrap();
    pairs[3].chosen.push(9);
    let refused = train("gpt2", &settings, &pairs, &folder.path().join("long"), &interrupt, &mut Silent);
    let error = refused.err().unwrap();
    assert!(error.is_usage());
    let message = error.to_string();
    assert!(
        message.starts_with("--max-length: ") && message.contains("257") && message.contains("256"),
        "{message}"
    );
    // A model without such a table has no limit.
    train("llama", &settings, &pairs, &folder.path().join("llama"), &interrupt, &mut Silent).unwrap();
}

/// A copy of a tiny model with another key.
fn with_key(name: &str, key: &str, value: Value, path: &std::path::Path) -> GgufFile {
    let base = GgufFile::open(tiny(name)).unwrap();
    let mut metadata = base.metadata().clone();
    metadata.set(key, value);
    let spec = |t: &detox_gguf::gguf::TensorInfo| TensorSpec {
        name: t.name().to_owned(),
        shape: t.shape().to_vec(),
        tensor_type: t.tensor_type(),
    };
    let specs = base.tensors().iter().map(spec).collect();
    let mut writer = GgufWriter::create(path, &metadata, specs).unwrap();
    base.tensors().iter().for_each(|t| writer.write(&base.read_tensor(t).unwrap()).unwrap());
    writer.finish().unwrap();
    GgufFile::open(path).unwrap()
}

#[test]
fn rejects_keys_that_change_the_computation_and_are_not_implemented() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("other.gguf");
    for (name, key, value) in [
        ("llama", "llama.logit_scale", Value::F32(0.0625)),
        ("llama", "llama.residual_scale", Value::F32(0.22)),
        ("llama", "llama.embedding_scale", Value::F32(12.0)),
        ("llama", "llama.attention.scale", Value::F32(0.1)),
        ("llama", "llama.attention.causal", Value::Bool(false)),
        ("qwen2", "qwen2.attn_logit_softcapping", Value::F32(50.0)),
        ("gemma3", "gemma3.final_logit_softcapping", Value::F32(30.0)),
        ("qwen3", "qwen3.rope.scaling.attn_factor", Value::F32(0.8)),
        ("bloom", "bloom.attention.clamp_kqv", Value::F32(8.0)),
        ("gpt2", "gpt2.expert_count", Value::U32(8)),
        ("command-r", "command-r.logit_scale", Value::F32(f32::NAN)),
        ("llama", "llama.rope.freq_base", Value::F32(f32::INFINITY)),
    ] {
        let model = with_key(name, key, value, &path);
        let error = load(&model, &small_settings()).unwrap_err();
        assert!(matches!(error, Error::Model { .. }) && error.to_string().contains(key), "{key}: {error}");
    }
    for (name, key, value) in [
        ("llama", "llama.logit_scale", Value::F32(1.0)),
        ("llama", "llama.final_logit_softcapping", Value::F32(0.0)),
        ("llama", "llama.attention.causal", Value::Bool(true)),
        ("llama", "llama.attention.sliding_window", Value::U32(4096)),
        ("llama", "llama.key_of_another_program", Value::F32(3.0)),
        ("llama", "granite.logit_scale", Value::F32(8.0)),
        ("command-r", "command-r.logit_scale", Value::F32(0.25)),
    ] {
        load(&with_key(name, key, value, &path), &small_settings()).unwrap();
    }
}
