//! Relations between heads, their widths and rotated dimensions.

use super::super::Value;
use super::super::read::GgufFile;
use super::sizes::Sizes;
use super::{shown, wrong_key, wrong_tensor};
use crate::error::Result;

/// Architectures whose graph asserts that keys and values have the same width
/// (`GGML_ASSERT(n_embd_head == hparams.n_embd_head_k())`).
const EQUAL_WIDTHS: &[&str] = &[
    "afmoe",
    "apertus",
    "arcee",
    "arctic",
    "baichuan",
    "bailingmoe2",
    "bitnet",
    "bloom",
    "chameleon",
    "chatglm",
    "codeshell",
    "cogvlm",
    "cohere2",
    "cohere2moe",
    "command-r",
    "dbrx",
    "deci",
    "deepseek",
    "dots1",
    "ernie4_5",
    "ernie4_5-moe",
    "exaone",
    "exaone4",
    "exaone-moe",
    "falcon",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma4",
    "glm4",
    "glm4moe",
    "gpt2",
    "gptneox",
    "granite",
    "granitemoe",
    "granitehybrid",
    "graniteswitch",
    "granite_swa",
    "grok",
    "grovemoe",
    "hunyuan-dense",
    "hunyuan-moe",
    "hunyuan_vl",
    "hy_v3",
    "internlm2",
    "jais",
    "jais2",
    "laguna",
    "llama",
    "llama4",
    "maincoder",
    "maple",
    "mellum",
    "minicpm",
    "minimax-01",
    "minimax-m2",
    "minimax-m3",
    "mistral3",
    "mpt",
    "muse-glimmer",
    "nanbeige",
    "nemotron",
    "nemotron_h",
    "nemotron_h_moe",
    "olmo",
    "olmo2",
    "olmoe",
    "openelm",
    "orion",
    "paddleocr",
    "pangu-embedded",
    "phi2",
    "phi3",
    "phimoe",
    "plamo",
    "qwen",
    "qwen2",
    "qwen2moe",
    "qwen2vl",
    "qwen3",
    "qwen35",
    "qwen35moe",
    "qwen3moe",
    "qwen3next",
    "qwen3vl",
    "qwen3vlmoe",
    "qwen4exp",
    "refact",
    "seed_oss",
    "smallthinker",
    "smollm3",
    "spark2_5",
    "stablelm",
    "starcoder",
    "starcoder2",
    "talkie",
    "xverse",
];

/// Architectures whose graph asserts that a head is rotated whole (`GGML_ASSERT(n_embd_head == n_rot)`).
const WHOLE_HEAD_ROTATED: &[&str] = &[
    "apertus",
    "arcee",
    "arctic",
    "baichuan",
    "chameleon",
    "codeshell",
    "cogvlm",
    "cohere2moe",
    "dbrx",
    "deci",
    "deepseek",
    "dots1",
    "ernie4_5",
    "ernie4_5-moe",
    "exaone",
    "exaone4",
    "exaone-moe",
    "falcon",
    "granite",
    "granitemoe",
    "graniteswitch",
    "granite_swa",
    "grok",
    "grovemoe",
    "hunyuan-moe",
    "hunyuan_vl",
    "hy_v3",
    "internlm2",
    "jais2",
    "llama",
    "llama4",
    "maincoder",
    "mellum",
    "minicpm",
    "mistral3",
    "olmo",
    "olmo2",
    "olmoe",
    "orion",
    "paddleocr",
    "pangu-embedded",
    "plamo",
    "qwen2",
    "qwen2moe",
    "qwen2vl",
    "qwen3",
    "qwen3moe",
    "qwen3vl",
    "qwen3vlmoe",
    "seed_oss",
    "smallthinker",
    "smollm3",
    "starcoder2",
    "talkie",
    "xverse",
];

/// Architectures of [`EQUAL_WIDTHS`] whose projections are not one row for each dimension of a head: gates are among
/// the rows, or some layers have another kind of attention.
const OTHER_PROJECTIONS: &[&str] = &[
    "cogvlm",
    "graniteswitch",
    "minimax-01",
    "minimax-m3",
    "qwen35",
    "qwen35moe",
    "qwen3next",
    "qwen4exp",
    "gemma4",
];

/// Architectures without rotation (`LLAMA_ROPE_TYPE_NONE` in `llama_model_rope_type`).
const NOT_ROTATED: &[&str] = &[
    "gpt2",
    "gptj",
    "mpt",
    "refact",
    "bloom",
    "mamba",
    "mamba2",
    "jamba",
    "jais",
    "rwkv6",
    "rwkv6qwen2",
    "rwkv7",
    "arwkv7",
    "nemotron_h",
    "nemotron_h_moe",
    "kimi-linear",
    "kimi-k3",
    "glm5-next",
];

/// Architectures whose rotation has sections, one of which must be above 0 (`LLAMA_ROPE_TYPE_MROPE`, `…_IMROPE`).
const SECTIONED: &[&str] =
    &["qwen2vl", "paddleocr", "qwen3vl", "qwen3vlmoe", "qwen35", "qwen35moe", "qwen4exp", "qwen3tts"];

/// Checks the tables above, and that key heads divide the heads.
pub(super) fn check(file: &GgufFile, sizes: &Sizes) -> Result<()> {
    check_heads(file, sizes)?;
    let arch = file.architecture()?;
    if sizes.n_head[0] == 0 {
        // llama.cpp then rotates 0 dimensions in the layers that have heads, and never ends.
        if arch == "plamo2" {
            let key = file.arch_key("attention.head_count")?;
            return Err(wrong_key(file, &key, "a number above 0 for the first layer", shown(file, &key)));
        }
        return Ok(());
    }
    let Sizes { n_embd_head_k, n_embd_head_v, n_rot, .. } = *sizes;
    if n_embd_head_k == 0 || n_embd_head_v == 0 {
        let key = file.arch_key("attention.head_count")?;
        let expected = format!("at most {} heads, the width of the model", sizes.n_embd);
        return Err(wrong_key(file, &key, &expected, sizes.n_head[0]));
    }
    if EQUAL_WIDTHS.contains(&arch) && n_embd_head_k != n_embd_head_v {
        // Name the key that is there; both may be.
        let (name, expected, found) = match file.metadata.get(&file.arch_key("attention.key_length")?) {
            Some(_) => ("attention.key_length", n_embd_head_v, n_embd_head_k),
            None => ("attention.value_length", n_embd_head_k, n_embd_head_v),
        };
        let expected = format!("{expected}, because keys and values have the same width in {arch}");
        return Err(wrong_key(file, &file.arch_key(name)?, &expected, found));
    }
    if !NOT_ROTATED.contains(&arch) {
        let key = file.arch_key("rope.dimension_count")?;
        let is_whole = WHOLE_HEAD_ROTATED.contains(&arch);
        if is_whole && n_rot != n_embd_head_k {
            let expected = format!("{n_embd_head_k}, the width of a head");
            return Err(wrong_key(file, &key, &expected, n_rot));
        }
        if n_rot == 0 || n_rot % 2 != 0 || n_rot > n_embd_head_k {
            let expected = format!("an even number from 2 to {n_embd_head_k}, the width of a head");
            return Err(wrong_key(file, &key, &expected, n_rot));
        }
    }
    check_windowed(file, arch, sizes)?;
    check_sections(file, arch)?;
    if EQUAL_WIDTHS.contains(&arch) && !OTHER_PROJECTIONS.contains(&arch) {
        check_projections(file, sizes)?;
    }
    Ok(())
}

/// The graph reshapes queries, keys and values to heads, and asserts that all elements find a place.
fn check_projections(file: &GgufFile, sizes: &Sizes) -> Result<()> {
    let has_other_widths = |name: &str| -> Result<bool> {
        Ok(file.metadata.get(&file.arch_key(&format!("attention.{name}_swa"))?).is_some())
    };
    if has_other_widths("key_length")? || has_other_widths("value_length")? {
        return Ok(());
    }
    let (head_key, head_kv_key) =
        (file.arch_key("attention.head_count")?, file.arch_key("attention.head_count_kv")?);
    let width = sizes.n_embd_head_k;
    for (il, (n_head, n_head_kv)) in sizes.n_head.iter().zip(&sizes.n_head_kv).enumerate() {
        if *n_head == 0 || *n_head_kv == 0 {
            continue;
        }
        for (role, axis, n_heads, key) in [
            ("attn_q", 1, *n_head, &head_key),
            ("attn_k", 1, *n_head_kv, &head_kv_key),
            ("attn_v", 1, *n_head_kv, &head_kv_key),
            ("attn_qkv", 1, n_head + 2 * n_head_kv, &head_key),
            ("attn_output", 0, *n_head, &head_key),
        ] {
            let name = format!("blk.{il}.{role}.weight");
            let Some(tensor) = file.tensor(&name) else { continue };
            let found = tensor.shape().get(axis).copied().unwrap_or(1);
            let wanted = n_heads.saturating_mul(width);
            if found != wanted {
                let axis = ["rows of", "rows, as many as"][axis];
                let expected = format!("{axis} {wanted}: {n_heads} heads of {width} (by {key})");
                return Err(wrong_tensor(file, &name, &expected, format!("{:?}", tensor.shape())));
            }
        }
    }
    Ok(())
}

/// The sizes of layers with a window, which default to those of the others.
fn check_windowed(file: &GgufFile, arch: &str, sizes: &Sizes) -> Result<()> {
    let number = |name: &str, default: u64| -> Result<(String, u64)> {
        let key = file.arch_key(name)?;
        let found = file.u32_if_present(&key)?.map_or(default, u64::from);
        Ok((key, found))
    };
    let (key_key, n_key) = number("attention.key_length_swa", sizes.n_embd_head_k)?;
    let (value_key, n_value) = number("attention.value_length_swa", sizes.n_embd_head_v)?;
    let (rotated_key, n_rot) = number("rope.dimension_count_swa", sizes.n_rot)?;
    if EQUAL_WIDTHS.contains(&arch) && n_key != n_value {
        let expected = format!("{n_key}, as {key_key:?} in {arch}");
        return Err(wrong_key(file, &value_key, &expected, n_value));
    }
    if NOT_ROTATED.contains(&arch) || file.metadata.get(&rotated_key).is_none() {
        return Ok(());
    }
    let is_whole = WHOLE_HEAD_ROTATED.contains(&arch);
    if n_rot == 0 || n_rot % 2 != 0 || n_rot > n_key || is_whole && n_rot != n_key {
        let expected = match is_whole {
            true => format!("{n_key}, the width of a head"),
            false => format!("an even number from 2 to {n_key}, the width of a head"),
        };
        return Err(wrong_key(file, &rotated_key, &expected, n_rot));
    }
    Ok(())
}

/// `ggml_mul_mat` asserts that key heads divide the heads when the graph is built.
fn check_heads(file: &GgufFile, sizes: &Sizes) -> Result<()> {
    for (n_head, n_head_kv) in sizes.n_head.iter().zip(&sizes.n_head_kv) {
        if *n_head_kv > 0 && (*n_head == 0 || n_head % n_head_kv != 0) {
            let key = file.arch_key("attention.head_count_kv")?;
            return Err(wrong_key(file, &key, &format!("a divisor of {n_head} heads"), n_head_kv));
        }
    }
    Ok(())
}

fn check_sections(file: &GgufFile, arch: &str) -> Result<()> {
    if !SECTIONED.contains(&arch) {
        return Ok(());
    }
    let key = file.arch_key("rope.dimension_sections")?;
    let sections = match file.metadata.get(&key) {
        Some(Value::Array(array)) => array.to_i64s(),
        _ => None,
    };
    let is_sound = |s: &[i64]| {
        let range = 0..=1i64 << 16;
        (3..=4).contains(&s.len()) && s.iter().all(|n| range.contains(n)) && s[..3].iter().any(|n| *n > 0)
    };
    match sections {
        Some(sections) if is_sound(&sections) => Ok(()),
        _ => Err(wrong_key(file, &key, "3 or 4 sections, not all of them 0", shown(file, &key))),
    }
}
