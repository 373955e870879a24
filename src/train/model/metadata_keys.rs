//! Refuses metadata that would change the computation in a way the trainer does not implement.
//!
//! The trainer's graph honours few of llama.cpp's keys. A model with another one, such as a scale, would be trained to
//! the end before the comparison with llama.cpp fails.

use crate::error::{Error, Result};
use crate::gguf::{GgufFile, Value};

/// Keys `{arch}.…` of llama.cpp (`LLM_KV_NAMES` in `llama-arch.cpp`) that change what some architecture computes, and
/// that the trainer does not read. Keys that llama.cpp does not know change nothing and are not here.
const NOT_IMPLEMENTED: &[&str] = &[
    "activation.",
    "adapters.",
    "attention.block_",
    "attention.causal",
    "attention.clamp_kqv",
    "attention.compress_",
    "attention.decay_lora_rank",
    "attention.gate_lora_rank",
    "attention.group_norm_",
    "attention.iclr_lora_rank",
    "attention.indexer.",
    "attention.key_length_",
    "attention.kv_lora_rank",
    "attention.max_alibi_bias",
    "attention.output_",
    "attention.q_lora_rank",
    "attention.recurrent_layers",
    "attention.relative_buckets_count",
    "attention.rope_pattern",
    "attention.scale",
    "attention.shared_kv_layers",
    "attention.temperature_",
    "attention.value_length_",
    "attention.value_residual_mix_lora_rank",
    "attention.value_scale",
    "attn_logit_softcapping",
    "attn_res.",
    "convnext.",
    "decision.",
    "deepstack_mapping",
    "embedding_length_per_layer_input",
    "embedding_scale",
    "expert_",
    "final_logit_softcapping",
    "full_attention_interval",
    "hidden_activation",
    "hrm.",
    "hyper_connection.",
    "interleave_moe_layer_step",
    "kda.",
    "logit_scale",
    "moe_",
    "n_deepstack_layers",
    "nextn_predict_layers",
    "norm_before_",
    "num_loops",
    "ple.",
    "posnet.",
    "rescale_every_n_layers",
    "residual_scale",
    "rope.dimension_count_swa",
    "rope.dimension_sections",
    "rope.scaling.alpha",
    "rope.scaling.attn_factor",
    "router_logit_softcapping",
    "shortconv.",
    "skip_loop_final_norm",
    "ssm.",
    "swiglu_clamp_",
    "swin_norm",
    "time_decay_extra_dim",
    "time_mix_extra_dim",
    "token_shift_count",
    "use_parallel_residual",
    "wkv.",
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
        if is_not_implemented(name) && !honoured.contains(&name) && !is_neutral(name, value) {
            let found = short(value);
            let reason = format!(
                "key {key:?}: the trainer does not implement it, so that it would train another model than llama.cpp \
                 runs; expected no such key, found {found}"
            );
            return Err(Error::model(file.path(), reason).with_hint(
                "train another model; if llama.cpp ignores this key for this architecture, remove it from a copy of \
                 the model with llama.cpp's gguf_new_metadata.py --remove-metadata",
            ));
        }
    }
    Ok(())
}

/// Names that end in a dot or an underscore stand for all that begin with them.
fn is_not_implemented(name: &str) -> bool {
    NOT_IMPLEMENTED.iter().any(|&known| match known.ends_with(['.', '_']) {
        true => name.starts_with(known),
        false => name == known,
    })
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
    fn keys_that_only_describe_the_model_are_accepted() {
        for name in [
            "attention.head_count",
            "attention.key_length",
            "attention.layer_norm_rms_epsilon",
            "attention.sliding_window",
            "block_count",
            "context_length",
            "rope.dimension_count",
            "rope.freq_base",
            "rope.scaling.original_context_length",
            "tensor_data_layout",
            "vocab_size",
            "a_key_of_another_program",
        ] {
            assert!(!is_not_implemented(name), "{name}");
        }
        for name in ["attention.scale", "attention.key_length_mla", "expert_weights_scale", "ssm.conv_kernel"]
        {
            assert!(is_not_implemented(name), "{name}");
        }
    }
}
