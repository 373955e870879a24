//! Checks that a valid GGUF file is a language model that can generate text.

use super::Value;
use super::read::GgufFile;
use super::rules;
use crate::error::{Error, Result};

/// The most experts a model has (`LLAMA_MAX_EXPERTS` in `llama-hparams.h`).
const MAX_EXPERTS: u32 = 1024;

/// Alignment of llama.cpp's CPU buffers in bytes (`TENSOR_ALIGNMENT` in `ggml-impl.h`).
/// It aborts if the tensors of a memory-mapped file are aligned to less.
const MIN_ALIGNMENT: u64 = 32;

/// The longest name of an architecture in bytes. Our limit, twice that of the longest known.
const MAX_ARCHITECTURE: usize = 40;

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

/// Checks that llama.cpp can generate text with this file, from its metadata and tensor types.
///
/// Refuses other kinds of file, encoders, and everything known to make llama.cpp abort when it loads the model or first
/// runs it on a CPU. Tensor data is not read, so a NaN in it is not found.
///
/// # Errors
/// [`Error::Model`] names the kind of file, or the key or tensor at fault.
pub fn check_decoder(file: &GgufFile) -> Result<()> {
    check_kind(file)?;
    if file.tensors().is_empty() {
        return Err(reject(file, "it has a vocabulary and no tensors").with_hint("pass the model itself"));
    }
    if let Some(part) = file.parts.iter().find(|part| !part.alignment.is_multiple_of(MIN_ALIGNMENT)) {
        let reason = format!(
            "key \"general.alignment\" in {}: expected a multiple of {MIN_ALIGNMENT}, found {}",
            part.path.display(),
            part.alignment
        );
        return Err(reject(file, &reason));
    }
    rules::check_keys(file)?;
    check_experts(file)?;
    rules::check_sizes(file)
}

/// Checks that llama.cpp can load the file's vocabulary. The file need not be a decoder, nor have tensors.
#[cfg(feature = "engine")]
pub(crate) fn check_vocabulary(file: &GgufFile) -> Result<()> {
    file.architecture()?;
    rules::check_tokenizer(file)
}

/// The first tensor that the file's architecture does not have, if this program knows the architecture.
#[cfg(feature = "engine")]
pub(crate) fn unexpected_tensor(file: &GgufFile) -> Option<&str> {
    rules::unexpected(file)
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
    if arch.is_empty() || arch.len() > MAX_ARCHITECTURE || !arch.bytes().all(|b| b.is_ascii_graphic()) {
        let shown: String = arch.chars().take(MAX_ARCHITECTURE).collect();
        let reason =
            format!("key \"general.architecture\": expected a name such as \"llama\", found {shown:?}");
        return Err(reject(file, &reason));
    }
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
