//! The lists and ids of the tokenizer (`llama_vocab::impl::load`).

use std::collections::HashSet;

use super::super::read::GgufFile;
use super::super::{Strings, Value, ValueType};
use super::{shown, wrong_key};
use crate::error::{Error, Result};

/// Values of `tokenizer.ggml.model` that llama.cpp loads.
const MODELS: &[&str] =
    &["llama", "gpt2", "bert", "t5", "rwkv", "plamo2", "gemma4", "hybriddna", "whitespace"];

/// Optional keys of one type: ids of tokens, then switches.
const IDS: &[&str] = &[
    "bos",
    "eos",
    "eot",
    "eom",
    "unknown",
    "seperator",
    "padding",
    "mask",
    "cls",
    "fim_pre",
    "fim_suf",
    "fim_mid",
    "fim_pad",
    "fim_rep",
    "fim_sep",
    "prefix",
    "suffix",
    "middle",
];
const SWITCHES: &[&str] =
    &["add_bos_token", "add_eos_token", "add_sep_token", "add_space_prefix", "remove_extra_whitespaces"];

/// Checks that there is a tokenizer, that its lists fit each other, and that its tokens are distinct.
pub(super) fn check(file: &GgufFile) -> Result<()> {
    let model = check_model(file)?;
    let key = "tokenizer.ggml.tokens";
    if file.metadata.get(key).is_none() || file.tokens()?.is_empty() {
        return Err(wrong_key(file, key, "the vocabulary", "no tokens"));
    }
    let tokens = file.tokens()?;
    check_distinct(file, model, tokens)?;
    check_lists(file, model, tokens.len())?;
    for name in IDS {
        file.u32_if_present(&format!("tokenizer.ggml.{name}_token_id"))?;
    }
    for name in SWITCHES {
        file.bool_if_present(&format!("tokenizer.ggml.{name}"))?;
    }
    file.u32_if_present("tokenizer.ggml.token_type_count")?;
    file.str_if_present("tokenizer.ggml.pre")?;
    check_added_tokens(file, model, tokens.len())
}

fn check_model(file: &GgufFile) -> Result<&str> {
    let key = "tokenizer.ggml.model";
    match file.str_if_present(key)? {
        Some(model) if MODELS.contains(&model) => Ok(model),
        None | Some("none" | "no_vocab") => {
            Err(wrong_key(file, key, "a kind of tokenizer", shown(file, key))
                .with_hint("pass a model with a tokenizer: prompts cannot be read without one"))
        }
        Some(_) => Err(wrong_key(file, key, &format!("one of {}", MODELS.join(", ")), shown(file, key))),
    }
}

/// llama.cpp asserts that tokens are distinct, and throws on a byte without a token.
fn check_distinct(file: &GgufFile, model: &str, tokens: &Strings) -> Result<()> {
    let key = "tokenizer.ggml.tokens";
    let reject = |reason: String| Err(Error::model(file.path(), format!("key {key:?}: {reason}")));
    let mut seen: HashSet<&[u8]> = HashSet::with_capacity(tokens.len());
    let mut placeholders = Vec::new();
    for (id, token) in tokens.iter_bytes().enumerate() {
        // llama.cpp reads C strings, and renames an empty one to [EMPTY_id].
        let token = token.split(|&b| b == 0).next().unwrap_or_default();
        if token.is_empty() {
            placeholders.push(format!("[EMPTY_{id}]"));
        } else if !seen.insert(token) {
            let token = String::from_utf8_lossy(token);
            return reject(format!("token {id}, {token:?}, occurs twice"));
        }
    }
    if let Some(name) = placeholders.iter().find(|name| seen.contains(name.as_bytes())) {
        return reject(format!("token {name:?} has the name that llama.cpp gives to an empty token"));
    }
    if model == "llama" {
        // Bytes that never occur in UTF-8 need no token.
        let has_byte = |b: u8| {
            seen.contains(format!("<0x{b:02X}>").as_bytes()) || b.is_ascii() && seen.contains(&[b][..])
        };
        let missing = (0..=0xF4u8).find(|&b| !matches!(b, 0xC0 | 0xC1) && !has_byte(b));
        if let Some(byte) = missing {
            return reject(format!(
                "expected a token for each byte, found no \"<0x{byte:02X}>\"; \
                 llama.cpp aborts on the first character that is not in the vocabulary"
            ));
        }
    }
    Ok(())
}

/// The lists beside the tokens: llama.cpp reads as many entries as there are tokens.
fn check_lists(file: &GgufFile, model: &str, n_vocab: usize) -> Result<()> {
    use ValueType::{F32, I8, I32, Str, U8};
    let is_bpe = matches!(model, "gpt2" | "hybriddna" | "whitespace" | "gemma4");
    let needs_merges = is_bpe && file.str_if_present("tokenizer.ggml.pre")? != Some("kimi-k2");
    for (name, types, min, is_needed) in [
        ("scores", &[F32, I32][..], n_vocab, false),
        ("token_type", &[I32][..], n_vocab, false),
        ("suppress_tokens", &[I32][..], 0, false),
        ("merges", &[Str][..], 0, needs_merges),
        ("precompiled_charsmap", &[U8, I8][..], 5, false),
    ] {
        // Only these tokenizers read the last two.
        let is_read = match name {
            "merges" => is_bpe,
            "precompiled_charsmap" => model == "t5",
            _ => true,
        };
        let key = format!("tokenizer.ggml.{name}");
        let is_sound = match file.metadata.get(&key) {
            None => !is_needed,
            Some(Value::Array(array)) => types.contains(&array.element_type()) && array.len() >= min,
            Some(_) => false,
        };
        if is_read && !is_sound {
            let names: Vec<&str> = types.iter().map(|t| t.name()).collect();
            let at_least = if min > 0 { format!("at least {min} ") } else { String::new() };
            let expected = format!("an array of {at_least}{}", names.join(" or "));
            let found = file.metadata.get(&key).map_or("nothing".into(), Value::describe);
            return Err(wrong_key(file, &key, &expected, found));
        }
    }
    Ok(())
}

/// Checks that tokens added to every prompt exist. llama.cpp asserts it when it first tokenizes a text.
fn check_added_tokens(file: &GgufFile, tokenizer: &str, n_vocab: usize) -> Result<()> {
    // (added by default, default id) for the first and the last token.
    let (first, last) = match tokenizer {
        "llama" => ((true, Some(1)), (false, Some(2))),
        "gpt2" | "hybriddna" | "whitespace" => ((false, Some(11)), (false, Some(11))),
        "gemma4" => ((true, None), (false, None)),
        "t5" => ((false, None), (true, Some(1))),
        "bert" => ((true, Some(101)), (false, None)),
        "plamo2" => ((false, Some(1)), (false, Some(2))),
        _ => return Ok(()),
    };
    for (name, (added, default)) in [("bos", first), ("eos", last)] {
        let flag = format!("tokenizer.ggml.add_{name}_token");
        let key = format!("tokenizer.ggml.{name}_token_id");
        let given: Option<u32> = file.u32_if_present(&key)?;
        // llama.cpp replaces an id outside the vocabulary by the default.
        let exists = [given, default].into_iter().flatten().any(|id| (id as usize) < n_vocab);
        if file.bool_if_present(&flag)?.unwrap_or(added) && !exists {
            let expected = format!("a token below {n_vocab} because every prompt gets it");
            return Err(wrong_key(file, &key, &expected, shown(file, &key)));
        }
    }
    Ok(())
}
