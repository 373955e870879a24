//! Checks that a valid GGUF file is a language model that can generate text.

use std::collections::HashSet;

use super::hparams::MAX_LAYERS;
use super::read::GgufFile;
use super::{TensorInfo, Value};
use crate::error::{Error, Result};

/// The most experts a model has (`LLAMA_MAX_EXPERTS` in `llama-hparams.h`).
const MAX_EXPERTS: u32 = 1024;

/// Alignment of llama.cpp's CPU buffers in bytes (`TENSOR_ALIGNMENT` in `ggml-impl.h`).
/// It aborts if the tensors of a memory-mapped file are aligned to less.
const MIN_ALIGNMENT: u64 = 32;

/// Architectures that embed text: in llama.cpp they have no KV cache, or no decoder.
const ENCODERS: &[&str] = &[
    "bert",
    "modern-bert",
    "nomic-bert",
    "nomic-bert-moe",
    "neo-bert",
    "jina-bert-v2",
    "jina-bert-v3",
    "eurobert",
    "gemma-embedding",
    "llama-embed",
    "t5encoder",
];

/// Architectures whose decoder needs the output of an encoder. This program does not run encoders.
const ENCODER_DECODERS: &[&str] = &["t5"];

/// Architectures that generate text by filling in masks, not from left to right.
const DIFFUSION: &[&str] = &["dream", "llada", "llada-moe", "rnd1"];

/// Architectures of files that are not language models, with a description.
const NOT_LANGUAGE_MODELS: &[(&str, &str)] = &[
    ("clip", "a vision or audio projector (mmproj), the companion of a multimodal model"),
    ("controlvector", "a control vector: add it to a model with --control-vector"),
    ("imatrix", "an importance matrix for quantising"),
    ("wavtokenizer-dec", "an audio decoder"),
    ("clef", "a token classifier"),
    ("gemma4-assistant", "a draft model for speculative decoding, which cannot generate alone"),
    ("eagle3", "a draft model for speculative decoding, which cannot generate alone"),
    ("dflash", "a draft model for speculative decoding, which cannot generate alone"),
];

/// Values of `general.type` other than "model", with a description.
const NOT_MODELS: &[(&str, &str)] = &[
    ("adapter", "a LoRA adapter: add it to its base model with --lora"),
    ("lora", "a LoRA adapter: add it to its base model with --lora"),
    ("imatrix", "an importance matrix for quantising"),
    ("mmproj", "a vision or audio projector (mmproj), the companion of a multimodal model"),
    ("controlvector", "a control vector: add it to a model with --control-vector"),
    ("vocab", "a vocabulary without a model"),
];

/// Values of `{arch}.rope.scaling.type` that llama.cpp knows (`LLAMA_ROPE_SCALING_TYPES` in `llama-model.cpp`).
const ROPE_SCALING_TYPES: &[&str] = &["none", "linear", "yarn", "longrope"];

/// Checks that llama.cpp can generate text with this file, from its metadata and tensor types.
///
/// Refuses other kinds of file, encoders, and everything known to make llama.cpp abort when it loads the model or first
/// runs it on a CPU. Tensor data is not read, so a NaN in it is not found.
///
/// # Errors
/// [`Error::Model`] names the kind of file, or the key or tensor at fault.
pub fn check_decoder(file: &GgufFile) -> Result<()> {
    check_kind(file)?;
    let arch = file.architecture()?;
    if file.tensors().is_empty() {
        return Err(reject(file, "it has a vocabulary and no tensors").with_hint("pass the model itself"));
    }
    check_vocabulary(file)?;
    check_layers(file)?;
    check_heads(file)?;
    check_norms(file)?;
    check_experts(file)?;
    if let Some(found) = file.str_if_present(&file.arch_key("rope.scaling.type")?)?
        && !ROPE_SCALING_TYPES.contains(&found)
    {
        let reason = format!(
            "key \"{arch}.rope.scaling.type\": expected one of {}, found {found:?}",
            ROPE_SCALING_TYPES.join(", ")
        );
        return Err(reject(file, &reason));
    }
    if let Some(part) = file.parts.iter().find(|part| !part.alignment.is_multiple_of(MIN_ALIGNMENT)) {
        let reason = format!(
            "key \"general.alignment\" in {}: expected a multiple of {MIN_ALIGNMENT}, found {}",
            part.path.display(),
            part.alignment
        );
        return Err(reject(file, &reason));
    }
    file.tensors().iter().try_for_each(|tensor| check_tensor_type(file, tensor))
}

/// Shorthand for [`Error::model`].
fn reject(file: &GgufFile, reason: &str) -> Error {
    Error::model(file.path(), reason)
}

/// Checks that the file is a model, of a kind that generates text.
fn check_kind(file: &GgufFile) -> Result<()> {
    let known = |list: &[(&str, &'static str)], name: &str| {
        list.iter().find(|(n, _)| *n == name).map(|(_, what)| *what)
    };
    if let Some(kind) = file.str_if_present("general.type")?
        && kind != "model"
    {
        let what =
            known(NOT_MODELS, kind).map_or_else(|| "not a model".to_owned(), |what| format!("it is {what}"));
        return Err(reject(file, &format!("{what} (general.type is {kind:?})"))
            .with_hint("pass the model itself with -m"));
    }
    let Some(arch) = file.str_if_present("general.architecture")? else {
        return Err(reject(
            file,
            "key \"general.architecture\": expected a name such as \"llama\", found nothing",
        ));
    };
    if let Some(what) = known(NOT_LANGUAGE_MODELS, arch) {
        return Err(reject(file, &format!("it is {what} (architecture {arch})"))
            .with_hint("pass the model itself with -m"));
    }
    if ENCODERS.contains(&arch) {
        return Err(reject(file, &format!("architecture {arch} is an encoder: it does not generate text")));
    }
    if ENCODER_DECODERS.contains(&arch) {
        let reason =
            format!("architecture {arch} is an encoder-decoder: only decoder-only models can be run");
        return Err(reject(file, &reason));
    }
    if file.bool_if_present(&file.arch_key("attention.causal")?)? == Some(false) {
        let reason =
            format!("key \"{arch}.attention.causal\" is false: an encoder, it does not generate text");
        return Err(reject(file, &reason));
    }
    if DIFFUSION.contains(&arch) {
        let reason =
            format!("architecture {arch} is a diffusion model: it does not generate from left to right");
        return Err(reject(file, &reason));
    }
    Ok(())
}

/// Checks that there is a tokenizer, and that its tokens are distinct. llama.cpp asserts that they are.
fn check_vocabulary(file: &GgufFile) -> Result<()> {
    let model = file.str_if_present("tokenizer.ggml.model")?;
    if model.is_none_or(|model| model == "none" || model == "no_vocab") {
        let found = model.map_or("nothing".to_owned(), |model| format!("{model:?}"));
        let reason = format!("key \"tokenizer.ggml.model\": expected a kind of tokenizer, found {found}");
        return Err(reject(file, &reason)
            .with_hint("pass a model with a tokenizer: prompts cannot be read without one"));
    }
    let key = "tokenizer.ggml.tokens";
    if file.metadata.get(key).is_none() || file.tokens()?.is_empty() {
        return Err(reject(file, &format!("key {key:?}: expected the vocabulary, found no tokens")));
    }
    let tokens = file.tokens()?;
    let mut seen: HashSet<&[u8]> = HashSet::with_capacity(tokens.len());
    let mut placeholders = Vec::new();
    for (id, token) in tokens.iter_bytes().enumerate() {
        // llama.cpp reads C strings, and renames an empty one to [EMPTY_id].
        let token = token.split(|&b| b == 0).next().unwrap_or_default();
        if token.is_empty() {
            placeholders.push(format!("[EMPTY_{id}]"));
        } else if !seen.insert(token) {
            let token = String::from_utf8_lossy(token);
            return Err(reject(file, &format!("key {key:?}: token {id}, {token:?}, occurs twice")));
        }
    }
    if let Some(name) = placeholders.iter().find(|name| seen.contains(name.as_bytes())) {
        return Err(reject(
            file,
            &format!("key {key:?}: token {name:?} has the name that llama.cpp gives to an empty token"),
        ));
    }
    if model == Some("llama") {
        // llama.cpp's tokenizer throws on a byte without a token. Bytes that never occur in UTF-8 need none.
        let has_byte = |b: u8| {
            seen.contains(format!("<0x{b:02X}>").as_bytes()) || b.is_ascii() && seen.contains(&[b][..])
        };
        let missing = (0..=0xF4u8).find(|&b| !matches!(b, 0xC0 | 0xC1) && !has_byte(b));
        if let Some(byte) = missing {
            let reason = format!(
                "key {key:?}: expected a token for each byte, found no \"<0x{byte:02X}>\"; \
                 llama.cpp aborts on the first character that is not in the vocabulary"
            );
            return Err(reject(file, &reason));
        }
    }
    check_special_tokens(file, model.unwrap_or_default(), tokens.len())
}

/// Checks that tokens added to every prompt exist. llama.cpp asserts it when it first tokenizes a text.
fn check_special_tokens(file: &GgufFile, tokenizer: &str, n_vocab: usize) -> Result<()> {
    // (added by default, default id) for the first and the last token, from `llama_vocab::impl::load`.
    let (first, last) = match tokenizer {
        "llama" => ((true, Some(1)), (false, Some(2))),
        "gpt2" => ((false, Some(11)), (false, Some(11))),
        "t5" => ((false, None), (true, Some(1))),
        _ => return Ok(()),
    };
    for (name, (added, default)) in [("bos", first), ("eos", last)] {
        let flag = format!("tokenizer.ggml.add_{name}_token");
        let key = format!("tokenizer.ggml.{name}_token_id");
        let given: Option<u32> = file.u32_if_present(&key)?;
        // llama.cpp replaces an id outside the vocabulary by the default.
        let exists = [given, default].into_iter().flatten().any(|id| (id as usize) < n_vocab);
        if file.bool_if_present(&flag)?.unwrap_or(added) && !exists {
            let found = given.map_or("nothing".to_owned(), |id| id.to_string());
            let reason = format!(
                "key {key:?}: expected a token below {n_vocab} because every prompt gets it, found {found}"
            );
            return Err(reject(file, &reason));
        }
    }
    Ok(())
}

fn check_layers(file: &GgufFile) -> Result<()> {
    let n_layer = file.n_layer()?;
    let key = file.arch_key("block_count")?;
    if n_layer == 0 || n_layer > MAX_LAYERS {
        return Err(reject(
            file,
            &format!("key {key:?}: expected 1 to {MAX_LAYERS} layers, found {n_layer}"),
        ));
    }
    for (name, found) in [("embedding_length", file.n_embd()?), ("context_length", file.n_ctx_train()?)] {
        if found == 0 {
            let key = file.arch_key(name)?;
            return Err(reject(file, &format!("key {key:?}: expected a positive number, found 0")));
        }
    }
    let key = file.arch_key("nextn_predict_layers")?;
    match file.u32_if_present(&key)? {
        Some(n) if n > n_layer => {
            Err(reject(file, &format!("key {key:?}: expected at most {n_layer}, found {n}")))
        }
        _ => Ok(()),
    }
}

/// Checks that the heads divide evenly among the key and value heads.
///
/// `ggml_mul_mat` asserts it when the graph is built.
fn check_heads(file: &GgufFile) -> Result<()> {
    // Recurrent models have no heads. Some layers of hybrid models have none for keys and values.
    if file.metadata.get(&file.arch_key("attention.head_count")?).is_none() {
        return Ok(());
    }
    for (n_head, n_head_kv) in file.n_head_per_layer()?.into_iter().zip(file.n_head_kv_per_layer()?) {
        if n_head_kv > 0 && !n_head.is_multiple_of(n_head_kv) {
            let key = file.arch_key("attention.head_count_kv")?;
            let reason = format!("key {key:?}: expected a divisor of {n_head} heads, found {n_head_kv}");
            return Err(reject(file, &reason));
        }
    }
    Ok(())
}

/// Checks the epsilon of norms. ggml asserts that it is not negative, and NaN fails that too.
fn check_norms(file: &GgufFile) -> Result<()> {
    for name in ["layer_norm_rms_epsilon", "layer_norm_epsilon", "group_norm_epsilon"] {
        let key = file.arch_key(&format!("attention.{name}"))?;
        if let Some(found) = file.f32_if_present(&key)?
            && !(found.is_finite() && found >= 0.0)
        {
            let reason = format!("key {key:?}: expected a number of at least 0, found {found}");
            return Err(reject(file, &reason));
        }
    }
    Ok(())
}

/// Checks what llama.cpp's `load_hparams` asserts about experts.
fn check_experts(file: &GgufFile) -> Result<()> {
    let number = |name: &str| -> Result<(String, u32)> {
        let key = file.arch_key(name)?;
        let found = file.u32_if_present(&key)?.unwrap_or(0);
        Ok((key, found))
    };
    // llama.cpp lets two architectures describe a dense model as one with a single expert.
    let single_is_dense = matches!(file.architecture()?, "hunyuan-dense" | "hunyuan_vl");
    let (key, n_expert) = number("expert_count")?;
    if n_expert <= 1 && single_is_dense {
        return Ok(());
    }
    let expect = |key: &str, expected: String, found: u32, holds: bool| {
        if holds {
            Ok(())
        } else {
            Err(reject(file, &format!("key {key:?}: expected {expected}, found {found}")))
        }
    };
    expect(&key, format!("at most {MAX_EXPERTS} experts"), n_expert, n_expert <= MAX_EXPERTS)?;

    let key = file.arch_key("expert_used_count")?;
    let n_used = match file.metadata.get(&key) {
        None => 0,
        Some(&Value::U32(n)) => n,
        // One number per layer: llama.cpp checks the largest.
        Some(Value::Array(array)) => {
            let most = array.to_i64s().and_then(|values| values.into_iter().max()).unwrap_or(0);
            u32::try_from(most).unwrap_or(u32::MAX)
        }
        Some(other) => {
            return Err(reject(file, &format!("key {key:?}: expected u32, found {}", other.describe())));
        }
    };
    let range =
        if n_expert == 0 { "none in a model without experts".into() } else { format!("1 to {n_expert}") };
    expect(&key, range, n_used, n_used <= n_expert && (n_used > 0) == (n_expert > 0))?;

    let (key, n_groups) = number("expert_group_count")?;
    let fits = n_groups == 0 || n_groups < n_expert && (n_groups == 1 || n_expert % n_groups == 0);
    expect(&key, format!("a number of groups that divides {n_expert} experts"), n_groups, fits)?;
    if n_groups > 1 {
        let (key, n_used) = number("expert_group_used_count")?;
        expect(&key, format!("1 to {}", n_groups - 1), n_used, n_used > 0 && n_used < n_groups)?;
    }
    Ok(())
}

/// Checks tensor types. ggml's CPU code aborts on a norm or bias that is not f32, and cannot multiply by some types.
fn check_tensor_type(file: &GgufFile, tensor: &TensorInfo) -> Result<()> {
    use super::TensorType::F32;
    let (name, found) = (tensor.name(), tensor.tensor_type());
    let is_vector = tensor.shape().len() == 1 && (name.ends_with("norm.weight") || name.ends_with(".bias"));
    if is_vector && found != F32 {
        return Err(reject(file, &format!("tensor {name:?}: expected type f32, found {found}")));
    }
    let role = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')).map_or(name, |(_, role)| role);
    let is_matrix = matches!(
        role,
        "token_embd.weight"
            | "output.weight"
            | "attn_q.weight"
            | "attn_k.weight"
            | "attn_v.weight"
            | "attn_qkv.weight"
            | "attn_output.weight"
            | "ffn_up.weight"
            | "ffn_gate.weight"
            | "ffn_down.weight"
    );
    if is_matrix && !found.is_weight() {
        let reason = format!("tensor {name:?}: llama.cpp cannot multiply by type {found}");
        return Err(reject(file, &reason));
    }
    Ok(())
}
