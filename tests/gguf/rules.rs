//! `check_decoder` on the tiny models with one key or tensor changed: what llama.cpp would abort on.

use detox_gguf::gguf::{Array, GgufFile, GgufWriter, Metadata, TensorSpec, TensorType, Value, check_decoder};
use tempfile::TempDir;

/// A tiny model in memory, to be changed and written.
struct Tiny {
    metadata: Metadata,
    tensors: Vec<(TensorSpec, Vec<u8>)>,
}

impl Tiny {
    fn read(name: &str) -> Tiny {
        let file = GgufFile::open(format!("gguf/tiny/{name}.gguf")).unwrap();
        let tensors = file.tensors().iter().map(|tensor| {
            let spec = TensorSpec {
                name: tensor.name().into(),
                shape: tensor.shape().into(),
                tensor_type: tensor.tensor_type(),
            };
            (spec, file.read_tensor(tensor).unwrap())
        });
        Tiny { metadata: file.metadata().clone(), tensors: tensors.collect() }
    }

    fn with(mut self, key: &str, value: Value) -> Tiny {
        self.metadata.set(key, value);
        self
    }

    /// The same model under the name of another architecture, whose keys it gets.
    fn renamed(mut self, arch: &str) -> Tiny {
        let mut metadata = Metadata::new();
        for (key, value) in self.metadata.iter() {
            metadata.set(key.replacen("llama.", &format!("{arch}."), 1), value.clone());
        }
        metadata.set("general.architecture", Value::Str(arch.into()));
        self.metadata = metadata;
        self
    }

    fn tensor(&mut self, name: &str) -> &mut (TensorSpec, Vec<u8>) {
        self.tensors.iter_mut().find(|(spec, _)| spec.name == name).unwrap()
    }

    /// The message of `check_decoder`; empty if it accepts the file.
    fn verdict(self) -> String {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("m.gguf");
        let (specs, data): (Vec<_>, Vec<_>) = self.tensors.into_iter().unzip();
        let mut writer = GgufWriter::create(&path, &self.metadata, specs).unwrap();
        data.iter().for_each(|bytes| writer.write(bytes).unwrap());
        writer.finish().unwrap();
        let file = GgufFile::open(&path).unwrap();
        check_decoder(&file).map_or_else(|error| error.to_string(), |()| String::new())
    }
}

#[track_caller]
fn assert_names(message: &str, words: &[&str]) {
    assert!(words.iter().all(|word| message.contains(word)), "expected {words:?} in {message:?}");
}

const MODELS: [&str; 9] =
    ["bloom", "command-r", "gemma3", "gpt2", "llama", "llama-q8_0", "plamo2", "qwen2", "qwen3"];

#[test]
fn the_tiny_models_keep_every_rule() {
    for name in MODELS {
        assert_eq!(Tiny::read(name).verdict(), "", "{name}");
    }
}

#[test]
fn rejects_keys_that_llama_cpp_asserts_against() {
    let list = |values: &[i32]| Value::Array(Array::from(values));
    for (model, name, value) in [
        ("qwen2", "rope.dimension_count", Value::U32(8)),
        ("llama", "rope.dimension_count", Value::U32(8)),
        ("command-r", "rope.dimension_count", Value::U32(7)),
        ("gemma3", "rope.dimension_count", Value::U32(0)),
        ("gemma3", "rope.dimension_count", Value::U32(1 << 31)),
        ("gemma3", "rope.dimension_count_swa", Value::U32(3)),
        ("gemma3", "attention.key_length_swa", Value::U32(8)),
        ("llama", "nextn_predict_layers", Value::U32(1)),
        ("gemma3", "rope.freq_base", Value::F32(f32::NAN)),
        ("bloom", "attention.key_length", Value::U32(8)),
        ("gpt2", "attention.value_length", Value::U32(8)),
        ("qwen3", "attention.key_length", Value::U32(0)),
        ("llama", "attention.key_length", Value::I32(16)),
        ("llama", "attention.head_count", list(&[4, 2])),
        ("llama", "attention.head_count_kv", list(&[4, -1])),
        ("llama", "attention.head_count_kv", Value::U32(3)),
        ("llama", "attention.head_count_kv", Value::U32(0)),
        ("llama", "feed_forward_length", list(&[128])),
        ("llama", "feed_forward_length", Value::F32(128.0)),
        ("llama", "embedding_length", Value::U32(u32::MAX)),
        ("llama", "block_count", Value::U32(1 << 31)),
        ("llama", "block_count", Value::U32(1)),
        ("llama", "block_count", Value::U32(9)),
        ("llama", "context_length", Value::U32(0)),
        ("llama", "context_length", Value::Str("128".into())),
        ("gpt2", "context_length", Value::U32(512)),
        ("llama", "attention.layer_norm_rms_epsilon", Value::F32(-1.0)),
        ("gemma3", "attention.sliding_window", Value::U32(u32::MAX)),
        ("gemma3", "attention.sliding_window_pattern", Value::F32(2.0)),
        ("gemma3", "attention.sliding_window_pattern", Value::U32(1)),
        ("gemma3", "attention.sliding_window_pattern", list(&[])),
        ("gemma3", "attention.sliding_window_pattern", list(&[0, 0])),
        ("gemma3", "final_logit_softcapping", Value::F32(f32::INFINITY)),
        ("command-r", "logit_scale", Value::F32(f32::NAN)),
        ("plamo2", "ssm.time_step_rank", Value::U32(0)),
        ("plamo2", "ssm.time_step_rank", Value::U32(3)),
        ("plamo2", "ssm.group_count", Value::U32(2)),
        ("plamo2", "ssm.conv_kernel", Value::U32(0)),
        ("plamo2", "attention.head_count", list(&[0, 4])),
    ] {
        let file = GgufFile::open(format!("gguf/tiny/{model}.gguf")).unwrap();
        let key = file.arch_key(name).unwrap();
        let found = format!("{value:?}");
        let message = Tiny::read(model).with(&key, value).verdict();
        assert!(message.contains(&key) && message.contains("expected"), "{model} {key} {found}: {message:?}");
    }
}

#[test]
fn rejects_lists_of_the_tokenizer_that_do_not_fit_its_tokens() {
    let texts = |texts: &[&str]| Value::Array(texts.iter().collect());
    for (name, value, words) in [
        ("token_type", Value::Array(Array::from(&[1i32][..])), "at least 384 i32"),
        ("scores", Value::Array(Array::from(&[1f32][..])), "at least 384 f32 or i32"),
        ("merges", Value::Array(Array::from(&[1u32][..])), "an array of str"),
        ("model", Value::Str("nobody".into()), "one of llama, gpt2"),
        ("bos_token_id", Value::Str("1".into()), "expected u32"),
        ("add_bos_token", Value::U32(1), "expected bool"),
        ("tokens", texts(&["a", "b"]), "token_embd.weight"),
    ] {
        let key = format!("tokenizer.ggml.{name}");
        assert_names(&Tiny::read("llama").with(&key, value).verdict(), &[&key, words]);
    }
}

#[test]
fn rejects_tensors_of_another_type_or_shape_by_name() {
    // The type of a bias, of a norm of two dimensions, and of a table whose rows are looked up.
    for (model, name, found) in [
        ("gpt2", "blk.0.attn_qkv.bias", TensorType::F16),
        ("plamo2", "blk.1.attn_q_norm.weight", TensorType::F16),
        ("plamo2", "blk.0.ssm_conv1d.weight", TensorType::F16),
        ("gpt2", "position_embd.weight", TensorType::I32),
        ("llama", "token_embd.weight", TensorType::F64),
        ("llama", "blk.1.ffn_up.weight", TensorType::I16),
    ] {
        let mut tiny = Tiny::read(model);
        let (spec, data) = tiny.tensor(name);
        spec.tensor_type = found;
        let n: u64 = spec.shape.iter().product();
        data.resize((n * found.block_bytes()) as usize, 0);
        assert_names(&tiny.verdict(), &[name, found.name()]);
    }
    let mut tiny = Tiny::read("llama");
    tiny.tensor("blk.0.ffn_down.weight").0.shape.reverse();
    assert_names(&tiny.verdict(), &["blk.0.ffn_down.weight", "llama.feed_forward_length", "found [64, 96]"]);
    let mut tiny = Tiny::read("qwen3");
    tiny.tensor("blk.1.attn_q_norm.weight").0.name = "blk.1.other.weight".into();
    assert_names(&tiny.verdict(), &["blk.1.attn_q_norm.weight", "no such tensor"]);
}

#[test]
fn rejects_heads_that_the_projections_do_not_fit_in_other_architectures() {
    let renamed = |n_head: u32| {
        let tiny = Tiny::read("llama").renamed("xverse");
        let tiny = tiny.with("xverse.attention.head_count", Value::U32(n_head));
        let tiny = tiny.with("xverse.attention.key_length", Value::U32(16));
        tiny.with("xverse.attention.value_length", Value::U32(16)).verdict()
    };
    assert_eq!(renamed(4), "");
    assert_names(&renamed(6), &["blk.0.attn_", "heads of 16", "xverse.attention.head_count"]);
}

#[test]
fn rejects_an_architecture_that_the_keys_do_not_belong_to() {
    for name in ["", "gpt-2", "no\0name", &"x".repeat(70_000)] {
        let message = Tiny::read("gpt2").with("general.architecture", Value::Str(name.into())).verdict();
        assert_names(&message, &["key \"general.architecture\": expected"]);
        assert!(message.len() < 400, "{} bytes", message.len());
    }
}

#[test]
fn rejects_keys_that_other_architectures_assert_about() {
    let no_windows = Value::Array(Array::from(&[0i32, 0][..]));
    for (arch, name, value) in [
        ("cohere2", "attention.sliding_window_pattern", Value::U32(1)),
        ("cohere2", "attention.sliding_window_pattern", no_windows),
        ("exaone4", "attention.value_length", Value::U32(8)),
        ("gemma4", "attention.value_length", Value::U32(8)),
        ("gemma4", "attention.value_length_swa", Value::U32(8)),
        ("nanbeige", "num_loops", Value::U32(0)),
        ("nanbeige", "num_loops", Value::U32(1000)),
        ("smallthinker", "expert_count", Value::U32(0)),
        ("ernie4_5-moe", "interleave_moe_layer_step", Value::U32(0)),
        ("rwkv7", "token_shift_count", Value::U32(1)),
        ("rwkv7", "wkv.head_size", Value::U32(0)),
        ("lfm2", "shortconv.l_cache", Value::U32(1)),
        ("jamba", "ssm.inner_size", Value::U32(64)),
        ("mamba", "ssm.state_size", Value::U32(0)),
    ] {
        let key = format!("{arch}.{name}");
        let tiny = Tiny::read("llama").renamed(arch);
        let tiny = tiny.with(&format!("{arch}.attention.sliding_window"), Value::U32(16));
        let message = tiny.with(&key, value.clone()).verdict();
        assert!(message.contains(&key) && message.contains("expected"), "{key} {value:?}: {message:?}");
    }
}

#[test]
fn accepts_the_defaults_that_llama_cpp_saves_for_keys_of_other_architectures() {
    let mut tiny = Tiny::read("llama");
    for name in [
        "ssm.conv_kernel",
        "ssm.inner_size",
        "ssm.state_size",
        "ssm.time_step_rank",
        "wkv.head_size",
        "attention.group_norm_groups",
        "attention.sliding_window",
        "interleave_moe_layer_step",
        "shortconv.l_cache",
        "num_loops",
    ] {
        tiny = tiny.with(&format!("llama.{name}"), Value::U32(0));
    }
    tiny = tiny.with("llama.attention.sliding_window_pattern", Value::U32(1));
    assert_eq!(tiny.with("llama.rope.scaling.yarn_ext_factor", Value::F32(-1.0)).verdict(), "");
}
