//! Rejects models, weights and settings that cannot be trained, by name.

use detox_gguf::error::Error;
use detox_gguf::gguf::GgufFile;
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
