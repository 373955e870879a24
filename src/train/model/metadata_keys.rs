//! Refuses metadata that would change the computation in a way the trainer does not implement.
//!
//! The trainer's graph honours few of llama.cpp's keys. A model with another one, such as a scale, would be trained to
//! the end before the comparison with llama.cpp fails.

use crate::error::{Error, Result};
use crate::gguf::{GgufFile, Value};

/// Keys `{arch}.…` that llama.cpp reads for some trainable architecture (`load_hparams`, and the `load_arch_hparams` of
/// each), that change what it computes, and that the trainer does not read. Also scales that llama.cpp reads for no
/// trainable architecture, because the model was trained with them. Other keys change nothing and are not here:
/// llama.cpp saves the defaults of all architectures with every model.
const NOT_IMPLEMENTED: &[&str] = &[
    "attention.causal",
    "attention.clamp_kqv",
    "attention.key_length_swa",
    "attention.scale",
    "attention.value_length_swa",
    "attn_logit_softcapping",
    "embedding_scale",
    "expert_count",
    "expert_group_count",
    "expert_group_used_count",
    "expert_used_count",
    "final_logit_softcapping",
    "logit_scale",
    "nextn_predict_layers",
    "residual_scale",
    "rope.dimension_count_swa",
    "rope.scaling.alpha",
    "rope.scaling.attn_factor",
];

/// Refuses keys that would change the computation. The trainer honours the keys `honoured` of this architecture.
///
/// A key whose value changes nothing, such as a scale of 1, is accepted.
///
/// # Errors
/// [`Error::Model`] with the key.
pub(super) fn refuse_unknown(file: &GgufFile, honoured: &[&str]) -> Result<()> {
    let prefix = file.arch_key("")?;
    for (key, value) in file.metadata().iter() {
        let Some(name) = key.strip_prefix(&prefix) else { continue };
        let is_honoured =
            honoured.contains(&name) || is_neutral(name, value) || is_default(file, name, value)?;
        if NOT_IMPLEMENTED.contains(&name) && !is_honoured {
            let found = short(value);
            let reason = format!(
                "key {key:?}: the trainer does not support this key and would train a different model from the one \
                 llama.cpp runs; expected no such key, found {found}"
            );
            return Err(Error::model(file.path(), reason).with_hint(
                "train another model; if llama.cpp ignores this key for this architecture, remove it from a copy of \
                 the model with llama.cpp's gguf_new_metadata.py --remove-metadata",
            ));
        }
    }
    Ok(())
}

/// Whether the value is the one that llama.cpp computes without the key: layers with a window have the widths of the
/// others, and products of queries and keys are divided by the root of the width.
fn is_default(file: &GgufFile, name: &str, value: &Value) -> Result<bool> {
    let number = |name: &str| -> Result<Option<u64>> {
        Ok(file.u32_if_present(&file.arch_key(name)?)?.map(u64::from))
    };
    let n_head = file.n_head_per_layer()?.first().copied().unwrap_or_default();
    let by_heads = u64::from(file.n_embd()?).checked_div(n_head.into());
    let key_length = number("attention.key_length")?.or(by_heads);
    if let ("attention.scale", Value::F32(scale)) = (name, value) {
        let is_root = |width: u64| (f64::from(*scale) * (width as f64).sqrt() - 1.0).abs() < 1e-6;
        return Ok([key_length, by_heads].into_iter().flatten().any(is_root));
    }
    let expected = match name {
        "attention.key_length_swa" => key_length,
        "attention.value_length_swa" => number("attention.value_length")?.or(by_heads),
        "rope.dimension_count_swa" => number("rope.dimension_count")?.or(key_length),
        _ => None,
    };
    Ok(expected.is_some() && value.as_integer().and_then(|n| u64::try_from(n).ok()) == expected)
}

/// Whether the value changes nothing: 0 or false turns an option off, and a scale of 1 does too.
fn is_neutral(name: &str, value: &Value) -> bool {
    let is_scale = name.ends_with("scale") || name.ends_with("factor") || name.ends_with("alpha");
    let is_off = |x: f64| x == 0.0 || is_scale && x == 1.0;
    match value {
        // llama.cpp's attention is causal unless this is false.
        Value::Bool(on) => *on == (name == "attention.causal"),
        Value::F32(x) => is_off(f64::from(*x)),
        Value::F64(x) => is_off(*x),
        Value::Array(array) => {
            array.is_empty() || array.to_i64s().is_some_and(|values| values.iter().all(|&x| x == 0))
        }
        Value::Str(text) => text.is_empty(),
        _ => value.as_integer().is_some_and(|x| is_off(x as f64)),
    }
}

/// The value, for a message.
fn short(value: &Value) -> String {
    match value {
        Value::Bool(on) => on.to_string(),
        Value::F32(x) => x.to_string(),
        Value::F64(x) => x.to_string(),
        _ => value.as_integer().map_or_else(|| value.describe(), |x| x.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::GgufWriter;

    #[test]
    fn options_that_are_off_are_neutral() {
        for (name, value, neutral) in [
            ("logit_scale", Value::F32(1.0), true),
            ("logit_scale", Value::F32(0.0), true),
            ("logit_scale", Value::F32(0.0625), false),
            ("logit_scale", Value::F32(f32::NAN), false),
            ("residual_scale", Value::F64(0.22), false),
            ("final_logit_softcapping", Value::F32(1.0), false),
            ("final_logit_softcapping", Value::F32(0.0), true),
            ("rope.scaling.attn_factor", Value::F32(1.0), true),
            ("rope.scaling.attn_factor", Value::F32(0.8), false),
            ("attention.causal", Value::Bool(true), true),
            ("attention.causal", Value::Bool(false), false),
            ("use_parallel_residual", Value::Bool(false), true),
            ("expert_count", Value::U32(0), true),
            ("expert_count", Value::U32(1), false),
            ("hidden_activation", Value::Str("relu".into()), false),
        ] {
            assert_eq!(is_neutral(name, &value), neutral, "{name} {value:?}");
        }
    }

    #[test]
    fn only_keys_that_change_the_computation_are_refused() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("gguf/tiny/llama.gguf");
        let tiny = GgufFile::open(&path).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let copy = folder.path().join("m.gguf");
        let refused = |name: &str, value: Value| {
            let mut metadata = tiny.metadata().clone();
            metadata.set(format!("llama.{name}"), value);
            GgufWriter::create(&copy, &metadata, Vec::new()).unwrap().finish().unwrap();
            refuse_unknown(&GgufFile::open(&copy).unwrap(), &[]).is_err()
        };
        // Defaults that llama.cpp saves, and a key of another program.
        for (name, value) in [
            ("activation.situ_beta", Value::F32(1.0)),
            ("kda.gate_lower_bound", Value::F32(f32::NEG_INFINITY)),
            ("rope.dimension_count_swa", Value::U32(16)),
            ("attention.key_length_swa", Value::U32(16)),
            ("attention.value_length_swa", Value::U32(16)),
            ("attention.scale", Value::F32(0.25)),
            ("ssm.conv_kernel", Value::U32(4)),
            ("expert_count", Value::U32(0)),
            ("a_key_of_another_program", Value::U32(3)),
        ] {
            assert!(!refused(name, value), "{name}");
        }
        for (name, value) in [
            ("rope.dimension_count_swa", Value::U32(8)),
            ("attention.key_length_swa", Value::U32(8)),
            ("attention.causal", Value::Bool(false)),
            ("expert_count", Value::U32(2)),
            ("logit_scale", Value::F32(0.5)),
        ] {
            assert!(refused(name, value), "{name}");
        }
    }
}
