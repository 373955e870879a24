//! The engine refuses bad input before llama.cpp could abort the process.

use std::path::Path;

use detox_gguf::Error;
use detox_gguf::engine::schedule::{self, GenerateOptions, Request};
use detox_gguf::engine::{Model, ModelOptions, Sampling, Session, SessionOptions};

use super::{open, options, session, tiny, uninterrupted};

fn refusal(path: &Path) -> Error {
    Model::open(path, &ModelOptions::default()).unwrap_err()
}

#[test]
fn rejects_a_missing_file() {
    assert!(matches!(refusal(Path::new("no/such.gguf")), Error::Io { .. }));
}

#[test]
fn rejects_a_model_that_is_not_a_decoder() {
    let error = refusal(&tiny("bert"));
    assert!(matches!(&error, Error::Model { reason, .. } if reason.contains("bert")), "{error}");
}

#[test]
fn rejects_a_truncated_model_at_every_length() {
    let whole = std::fs::read(tiny("llama")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cut.gguf");
    for n in [0, 1, 4, 23, 24, 100, 5000, whole.len() / 2, whole.len() - 40] {
        std::fs::write(&path, &whole[..n]).unwrap();
        assert!(matches!(refusal(&path), Error::Gguf { .. }), "{n} bytes");
    }
}

#[test]
fn rejects_a_foreign_file() {
    assert!(matches!(
        refusal(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"))),
        Error::Gguf { .. }
    ));
}

#[test]
fn rejects_an_architecture_that_llama_cpp_does_not_support() {
    // The name occurs in a value and in keys. Another name of the same length keeps the file well formed.
    let mut bytes = std::fs::read(tiny("llama")).unwrap();
    for i in 0..bytes.len() - 5 {
        if &bytes[i..i + 5] == b"llama" {
            bytes[i..i + 5].copy_from_slice(b"lxama");
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("unknown.gguf");
    std::fs::write(&path, bytes).unwrap();
    let error = refusal(&path);
    assert!(error.to_string().contains("lxama"), "{error}");
}

#[test]
fn rejects_a_prompt_that_does_not_fit_before_anything_runs() {
    let model = open("llama");
    let mut session = session(&model, 2);
    let n = session.n_ctx_seq();
    let generate = |session: &mut Session, n_prompt: usize| {
        let requests = [
            Request { id: "short".into(), tokens: vec![1, 2] },
            Request { id: "long".into(), tokens: vec![1; n_prompt] },
        ];
        let options =
            GenerateOptions { k: 1, n_predict: 9, sampling: Sampling::GREEDY, seed: 0, ignore_eos: true };
        let mut n_done = 0;
        let result = schedule::generate(session, &requests, &options, &uninterrupted(), |_| {
            n_done += 1;
            Ok(())
        });
        (result, n_done)
    };
    let (result, n_done) = generate(&mut session, n - 7);
    assert!(matches!(result, Err(Error::PromptTooLong { prompt, .. }) if prompt == "long"));
    assert_eq!(n_done, 0);
    // The last token of a continuation takes no cell: this fits exactly.
    let (result, n_done) = generate(&mut session, n - 8);
    assert!(result.is_ok());
    assert_eq!(n_done, 2);
}

#[test]
fn rejects_a_prompt_without_tokens() {
    let model = open("gpt2");
    let requests = [Request { id: "empty".into(), tokens: model.tokenize_prompt("").unwrap() }];
    let options =
        GenerateOptions { k: 1, n_predict: 2, sampling: Sampling::GREEDY, seed: 0, ignore_eos: true };
    let result =
        schedule::generate(&mut session(&model, 1), &requests, &options, &uninterrupted(), |_| Ok(()));
    assert!(result.unwrap_err().to_string().contains("no tokens"));
}

#[test]
fn rejects_session_settings_that_contradict_each_other() {
    let model = open("llama");
    let refused = |options: SessionOptions| Session::open(&model, &options, 64).unwrap_err();
    let bad = [
        SessionOptions { n_parallel: Some(0), ..options(1) },
        SessionOptions { n_parallel: Some(64), n_batch: 32, ..options(1) },
        SessionOptions { n_ctx: Some(3), n_parallel: Some(4), ..options(1) },
        SessionOptions { n_ubatch: 0, ..options(1) },
        SessionOptions { n_threads: Some(0), ..options(1) },
        SessionOptions { n_threads: Some(100_000), ..options(1) },
        SessionOptions { n_ctx: Some(usize::MAX), n_parallel: Some(2), ..options(1) },
    ];
    for options in bad {
        let error = refused(options.clone());
        assert!(error.is_usage(), "{options:?}: {error}");
    }
}

#[test]
fn a_damaged_tensor_gives_an_error_instead_of_text() {
    // NaN in the output norm: every logit becomes NaN.
    let bytes = std::fs::read(tiny("llama")).unwrap();
    let file = detox_gguf::gguf::GgufFile::open(tiny("llama")).unwrap();
    let tensor = file.tensor("output_norm.weight").unwrap();
    let mut damaged = bytes.clone();
    let offset = tensor.offset() as usize;
    damaged[offset..offset + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("nan.gguf");
    std::fs::write(&path, damaged).unwrap();

    let checked = ModelOptions { check_tensors: true, ..ModelOptions::default() };
    assert!(matches!(Model::open(&path, &checked), Err(Error::Model { .. })));

    let model = Model::open(&path, &ModelOptions::default()).unwrap();
    let requests = [Request { id: "p".into(), tokens: vec![1, 5, 6] }];
    let options =
        GenerateOptions { k: 1, n_predict: 2, sampling: Sampling::PAPER, seed: 0, ignore_eos: true };
    let error =
        schedule::generate(&mut session(&model, 1), &requests, &options, &uninterrupted(), |_| Ok(()))
            .unwrap_err();
    assert!(error.to_string().contains("NaN"), "{error}");
    assert!(error.hint().unwrap().contains("--check-tensors"));
}

#[test]
fn an_eos_added_by_the_tokenizer_is_not_part_of_a_prompt() {
    use detox_gguf::gguf::{GgufFile, GgufWriter, TensorSpec, Value};
    let file = GgufFile::open(tiny("llama")).unwrap();
    let mut metadata = file.metadata().clone();
    metadata.set("tokenizer.ggml.add_eos_token", Value::Bool(true));
    let specs = file.tensors().iter().map(|t| TensorSpec {
        name: t.name().to_owned(),
        shape: t.shape().to_vec(),
        tensor_type: t.tensor_type(),
    });
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("eos.gguf");
    let mut writer = GgufWriter::create(&path, &metadata, specs.collect()).unwrap();
    for tensor in file.tensors() {
        writer.write(&file.read_tensor(tensor).unwrap()).unwrap();
    }
    writer.finish().unwrap();
    let (plain, with_end) = (open("llama"), Model::open(&path, &ModelOptions::default()).unwrap());
    let tokens = with_end.tokenize_prompt("hello there").unwrap();
    assert_eq!(tokens, plain.tokenize_prompt("hello there").unwrap());
    assert_eq!(tokens[0], 1, "the BOS stays");
}
