//! `check_decoder`: which files can generate text.

use detox_gguf::Error;
use detox_gguf::gguf::{Array, GgufFile, GgufWriter, Metadata, TensorSpec, TensorType, Value, check_decoder};
use tempfile::TempDir;

use crate::bytes::assert_words;

/// A tiny model: metadata like a converter's, and three tensors.
struct Model {
    metadata: Metadata,
    tensors: Vec<(&'static str, Vec<u64>, TensorType)>,
}

fn string(s: &str) -> Value {
    Value::Str(s.into())
}

impl Model {
    fn new() -> Model {
        let mut metadata = Metadata::new();
        for (key, value) in [
            ("general.architecture", string("xverse")),
            ("general.type", string("model")),
            ("xverse.block_count", Value::U32(2)),
            ("xverse.embedding_length", Value::U32(32)),
            ("xverse.feed_forward_length", Value::U32(64)),
            ("xverse.context_length", Value::U32(128)),
            ("xverse.attention.head_count", Value::U32(4)),
            ("general.file_type", Value::U32(15)),
            ("tokenizer.ggml.model", string("gpt2")),
            ("tokenizer.ggml.merges", Value::Array(["t 0"].iter().collect())),
            ("tokenizer.ggml.tokens", Value::Array((0..16).map(|i| format!("t{i}")).collect())),
        ] {
            metadata.set(key, value);
        }
        let tensors = vec![
            ("token_embd.weight", vec![32, 16], TensorType::Q8_0),
            ("blk.1.ffn_norm.weight", vec![32], TensorType::F32),
            ("blk.0.ffn_down.weight", vec![64, 32], TensorType::Q4_0),
        ];
        Model { metadata, tensors }
    }

    fn set(mut self, key: &str, value: Value) -> Model {
        self.metadata.set(key, value);
        self
    }

    fn without(mut self, unwanted: &str) -> Model {
        let kept: Vec<_> = self.metadata.iter().filter(|(key, _)| *key != unwanted).collect();
        let mut metadata = Metadata::new();
        kept.into_iter().for_each(|(key, value)| {
            metadata.set(key, value.clone());
        });
        self.metadata = metadata;
        self
    }

    fn open(&self) -> (TempDir, GgufFile) {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("model.gguf");
        let specs = self.tensors.iter().map(|(name, shape, tensor_type)| TensorSpec {
            name: (*name).into(),
            shape: shape.clone(),
            tensor_type: *tensor_type,
        });
        let mut writer = GgufWriter::create(&path, &self.metadata, specs.collect()).unwrap();
        for (_, shape, tensor_type) in &self.tensors {
            let n_rows: u64 = shape[1..].iter().product();
            let n_bytes = tensor_type.row_bytes(shape[0]).unwrap() * n_rows;
            writer.write(&vec![0; n_bytes as usize]).unwrap();
        }
        writer.finish().unwrap();
        let file = GgufFile::open(path).unwrap();
        (folder, file)
    }

    fn assert_accepted(&self) {
        check_decoder(&self.open().1).unwrap();
    }

    #[track_caller]
    fn assert_refused(&self, words: &[&str]) {
        let error = check_decoder(&self.open().1).unwrap_err();
        assert!(matches!(error, Error::Model { .. } | Error::Gguf { .. }), "{error:?}");
        assert_words(&error.to_string(), words);
    }
}

#[test]
fn accepts_a_language_model_and_reads_its_sizes() {
    let (_folder, file) = Model::new().open();
    check_decoder(&file).unwrap();
    assert_eq!(file.architecture().unwrap(), "xverse");
    assert_eq!((file.n_layer().unwrap(), file.n_embd().unwrap(), file.n_ff().unwrap()), (2, 32, 64));
    assert_eq!((file.n_head().unwrap(), file.n_head_kv().unwrap(), file.n_ctx_train().unwrap()), (4, 4, 128));
    assert_eq!((file.n_vocab().unwrap(), file.tokenizer_model().unwrap()), (16, "gpt2"));
    assert_eq!(file.quant(), "Q4_K_M");
    // 32 * 16 + 32 + 64 * 32
    assert_eq!(file.n_params(), 2592);
    let down = file.tensor("blk.0.ffn_down.weight").unwrap();
    // 64 elements are two blocks of 18 bytes.
    assert_eq!((down.shape(), down.row_bytes(), down.n_bytes()), (&[64, 32][..], 36, 36 * 32));
}

#[test]
fn accepts_a_model_without_a_type() {
    Model::new().without("general.type").assert_accepted();
}

#[test]
fn guesses_the_quantisation_without_a_file_type() {
    let mut model = Model::new().without("general.file_type");
    model.tensors.push(("blk.1.ffn_down.weight", vec![64, 32], TensorType::Q4_0));
    assert_eq!(model.open().1.quant(), "(guessed) Q4_0");
    assert_eq!(
        Model::new().set("general.file_type", Value::U32(999)).open().1.quant(),
        "unknown file type 999"
    );
}

#[test]
fn errors_of_getters_name_the_key_and_both_types() {
    let (_folder, file) = Model::new().set("a", Value::U64(1)).open();
    assert_words(&file.u32("a").unwrap_err().to_string(), &["key \"a\": expected u32, found u64"]);
    assert_words(&file.u32("b").unwrap_err().to_string(), &["key \"b\": expected u32", "no such key"]);
    assert_words(&file.f32("a").unwrap_err().to_string(), &["expected f32"]);
    assert_words(&file.array("a").unwrap_err().to_string(), &["expected arr"]);
    let words = ["expected i32, found arr of 16 str"];
    assert_words(&file.i32("tokenizer.ggml.tokens").unwrap_err().to_string(), &words);
    assert_eq!(file.integer("a").unwrap(), 1);
    assert_eq!(file.u32_if_present("b").unwrap(), None);
    assert!(file.u32_if_present("a").is_err());
}

#[test]
fn reads_sizes_that_differ_between_layers() {
    let ff: Array = Array::from(&[64i32, 48][..]);
    let (_folder, file) = Model::new().set("xverse.feed_forward_length", Value::Array(ff)).open();
    assert_eq!(file.n_ff_per_layer().unwrap(), [64, 48]);
    assert_words(&file.n_ff().unwrap_err().to_string(), &["xverse.feed_forward_length", "[64, 48]"]);

    let (_folder, file) = Model::new()
        .set("xverse.attention.head_count_kv", Value::Array(Array::from(&[2u32, 2, 2][..])))
        .open();
    assert_words(&file.n_head_kv().unwrap_err().to_string(), &["array of 2 of them, found arr of 3 u32"]);

    let (_folder, file) =
        Model::new().set("xverse.feed_forward_length", Value::Array(Array::from(&[-1i32, 2][..]))).open();
    assert_words(&file.n_ff().unwrap_err().to_string(), &["array of 2 of them"]);
}

#[test]
fn rejects_other_types_of_file() {
    for (kind, word) in [
        ("adapter", "LoRA adapter"),
        ("lora", "LoRA adapter"),
        ("imatrix", "importance matrix"),
        ("mmproj", "projector"),
        ("controlvector", "control vector"),
        ("something", "not a model"),
    ] {
        Model::new()
            .set("general.type", string(kind))
            .assert_refused(&[word, &format!("general.type is {kind:?}")]);
    }
}

#[test]
fn rejects_a_missing_architecture() {
    Model::new()
        .without("general.architecture")
        .assert_refused(&["\"general.architecture\"", "found nothing"]);
}

#[test]
fn rejects_an_architecture_that_is_not_a_string() {
    let model = Model::new().set("general.architecture", Value::U32(1));
    model.assert_refused(&["\"general.architecture\": expected str, found u32"]);
}

#[test]
fn rejects_encoders() {
    for arch in
        ["bert", "nomic-bert", "jina-bert-v2", "modern-bert", "neo-bert", "t5encoder", "gemma-embedding"]
    {
        let words = [arch, "an encoder: it does not generate text"];
        Model::new().set("general.architecture", string(arch)).assert_refused(&words);
    }
}

#[test]
fn rejects_a_decoder_without_causal_attention() {
    Model::new()
        .set("xverse.attention.causal", Value::Bool(false))
        .assert_refused(&["xverse.attention.causal", "encoder"]);
    Model::new().set("xverse.attention.causal", Value::Bool(true)).assert_accepted();
}

#[test]
fn rejects_architectures_that_are_not_language_models() {
    for (arch, word) in [
        ("clip", "projector"),
        ("controlvector", "control vector"),
        ("imatrix", "importance matrix"),
        ("eagle3", "draft model"),
        ("t5", "encoder-decoder"),
        ("llada", "diffusion"),
    ] {
        Model::new().set("general.architecture", string(arch)).assert_refused(&[word, arch]);
    }
}

#[test]
fn rejects_a_vocabulary_without_tensors() {
    let mut model = Model::new();
    model.tensors.clear();
    model.assert_refused(&["a vocabulary and no tensors"]);
}

#[test]
fn rejects_a_missing_tokenizer() {
    Model::new()
        .without("tokenizer.ggml.model")
        .assert_refused(&["\"tokenizer.ggml.model\"", "found nothing"]);
    Model::new().set("tokenizer.ggml.model", string("none")).assert_refused(&["found \"none\""]);
    Model::new().set("tokenizer.ggml.model", string("no_vocab")).assert_refused(&["found \"no_vocab\""]);
}

#[test]
fn rejects_missing_tokens() {
    let key = "tokenizer.ggml.tokens";
    Model::new().without(key).assert_refused(&[key, "found no tokens"]);
    Model::new().set(key, Value::Array(Array::from_iter([""; 0]))).assert_refused(&[key, "found no tokens"]);
    Model::new()
        .set(key, Value::Array(Array::from(&[1u32][..])))
        .assert_refused(&[key, "expected arr of str"]);
}

#[test]
fn rejects_a_duplicate_token() {
    let with =
        |tokens: &[&str]| Model::new().set("tokenizer.ggml.tokens", Value::Array(tokens.iter().collect()));
    with(&["a", "b", "a"]).assert_refused(&["token 2, \"a\", occurs twice"]);
    // Equal as C strings.
    with(&["a", "b\0x", "b\0y"]).assert_refused(&["token 2, \"b\", occurs twice"]);
    with(&["a", "", "[EMPTY_1]"]).assert_refused(&["[EMPTY_1]"]);
    with(&["a", "", ""]).assert_accepted();
}

#[test]
fn rejects_a_sentencepiece_vocabulary_without_byte_tokens() {
    let tokens = |missing: u8| {
        let bytes = (0..=255u8).filter(move |&b| b != missing).map(|b| format!("<0x{b:02X}>"));
        let all: Array = ["<unk>", "<s>", "</s>"].map(str::to_owned).into_iter().chain(bytes).collect();
        Value::Array(all)
    };
    let model = |missing| {
        Model::new()
            .set("tokenizer.ggml.model", string("llama"))
            .set("tokenizer.ggml.tokens", tokens(missing))
    };
    model(0x80).assert_refused(&["\"<0x80>\""]);
    // This byte never occurs in UTF-8.
    model(0xFF).assert_accepted();
}

#[test]
fn rejects_a_start_token_outside_the_vocabulary() {
    let model = || {
        let tokens: Array = ["a", "b", "c"].iter().collect();
        Model::new()
            .set("tokenizer.ggml.tokens", Value::Array(tokens))
            .set("tokenizer.ggml.add_bos_token", Value::Bool(true))
    };
    let id = "tokenizer.ggml.bos_token_id";
    // gpt2's default id is 11.
    model().assert_refused(&[id, "below 3", "found nothing"]);
    model().set(id, Value::U32(3)).assert_refused(&[id, "below 3", "found 3"]);
    model().set(id, Value::U32(2)).assert_accepted();
    model().set("tokenizer.ggml.add_bos_token", Value::Bool(false)).assert_accepted();
    model()
        .set(id, Value::U32(2))
        .set("tokenizer.ggml.add_eos_token", Value::Bool(true))
        .assert_refused(&["tokenizer.ggml.eos_token_id"]);
}

#[test]
fn rejects_a_number_of_layers_that_llama_cpp_asserts_against() {
    let key = "xverse.block_count";
    Model::new().without(key).assert_refused(&[key, "found nothing"]);
    Model::new().set(key, Value::U32(0)).assert_refused(&[key, "a u32 from 1 to 512, found 0"]);
    Model::new().set(key, Value::U32(513)).assert_refused(&[key, "found 513"]);
    Model::new()
        .set("xverse.nextn_predict_layers", Value::U32(3))
        .assert_refused(&["fewer than the 2 layers of the model, found 3"]);
    Model::new().set("xverse.nextn_predict_layers", Value::U32(2)).assert_refused(&["found 2"]);
}

#[test]
fn rejects_heads_that_do_not_divide_evenly() {
    let key = "xverse.attention.head_count_kv";
    Model::new().set(key, Value::U32(3)).assert_refused(&[key, "a divisor of 4 heads, found 3"]);
    Model::new().set(key, Value::U32(2)).assert_accepted();
    let per_layer = Value::Array(Array::from(&[0u32, 1][..]));
    Model::new().set(key, per_layer).assert_accepted();
    Model::new().without("xverse.attention.head_count").assert_accepted();
}

#[test]
fn rejects_a_norm_with_a_negative_epsilon() {
    let key = "xverse.attention.layer_norm_rms_epsilon";
    Model::new().set(key, Value::F32(1e-5)).assert_accepted();
    for bad in [-1.0, f32::NAN, f32::INFINITY] {
        Model::new().set(key, Value::F32(bad)).assert_refused(&[key, &format!("found {bad}")]);
    }
}

#[test]
fn rejects_empty_dimensions() {
    Model::new().set("xverse.embedding_length", Value::U32(0)).assert_refused(&["xverse.embedding_length"]);
    Model::new().without("xverse.context_length").assert_refused(&["xverse.context_length"]);
}

#[test]
fn rejects_experts_that_llama_cpp_asserts_against() {
    let experts = |n: u32, used: u32| {
        Model::new()
            .set("xverse.expert_count", Value::U32(n))
            .set("xverse.expert_used_count", Value::U32(used))
    };
    experts(8, 2).assert_accepted();
    experts(2048, 2).assert_refused(&["xverse.expert_count", "at most 1024 experts, found 2048"]);
    experts(8, 9).assert_refused(&["xverse.expert_used_count", "1 to 8, found 9"]);
    experts(8, 0).assert_refused(&["xverse.expert_used_count", "found 0"]);
    experts(0, 2).assert_refused(&["xverse.expert_used_count", "found 2"]);
    let per_layer = Value::Array(Array::from(&[2u32, 9][..]));
    experts(8, 2).set("xverse.expert_used_count", per_layer).assert_refused(&["1 to 8, found 9"]);

    let groups = |n: u32, used: u32| {
        experts(8, 2)
            .set("xverse.expert_group_count", Value::U32(n))
            .set("xverse.expert_group_used_count", Value::U32(used))
    };
    groups(4, 2).assert_accepted();
    groups(1, 1).assert_accepted();
    groups(3, 1).assert_refused(&["xverse.expert_group_count", "divides 8", "found 3"]);
    groups(8, 1).assert_refused(&["xverse.expert_group_count", "found 8"]);
    groups(4, 4).assert_refused(&["xverse.expert_group_used_count", "1 to 3, found 4"]);
    groups(4, 0).assert_refused(&["xverse.expert_group_used_count", "found 0"]);
}

#[test]
fn rejects_an_unknown_rope_scaling() {
    let key = "xverse.rope.scaling.type";
    Model::new().set(key, string("dynamic")).assert_refused(&[key, "linear", "found \"dynamic\""]);
    Model::new().set(key, string("yarn")).assert_accepted();
}

#[test]
fn rejects_an_alignment_below_that_of_cpu_buffers() {
    Model::new()
        .set("general.alignment", Value::U32(8))
        .assert_refused(&["general.alignment", "multiple of 32, found 8"]);
    Model::new().set("general.alignment", Value::U32(64)).assert_accepted();
}

#[test]
fn rejects_a_norm_that_is_not_f32() {
    let mut model = Model::new();
    model.tensors[1].2 = TensorType::F16;
    model.assert_refused(&["blk.1.ffn_norm.weight", "expected type f32, found f16"]);
}

#[test]
fn rejects_a_matrix_that_llama_cpp_cannot_multiply_by() {
    let mut model = Model::new();
    model.tensors[2].2 = TensorType::I32;
    model.assert_refused(&["blk.0.ffn_down.weight", "cannot multiply by type i32"]);
}
