//! Type and range of single keys.

use super::super::hparams::{MAX_EMBD, MAX_FF, MAX_LAYERS};
use super::super::read::GgufFile;
use super::super::{Value, ValueType};
use super::{shown, wrong_key};
use crate::error::Result;

/// What a key may hold.
#[derive(Debug, Clone, Copy)]
enum Rule {
    /// A u32 from the first number to the second.
    Count(u32, u32),
    /// The same, or an array of as many u32 or i32 as there are layers (`get_key_or_arr`).
    CountPerLayer(u32, u32),
    /// A u32 in this range if it is one; the key has other types on some architectures.
    CountIfU32(u32, u32),
    /// An f32 that is neither NaN nor infinite.
    Finite,
    /// A finite f32 of at least 0.
    NotNegative,
    /// A finite f32 above 0.
    Positive,
    /// A bool.
    Flag,
    /// A string. llama.cpp reads bytes, so it need not be UTF-8.
    Text,
    /// A string of this list.
    OneOf(&'static [&'static str]),
    /// An array of strings, if it is an array.
    Texts,
}
use Rule::*;

/// The largest number that llama.cpp's i32 holds.
const MAX: u32 = i32::MAX as u32;

/// Values of `rope.scaling.type` (`LLAMA_ROPE_SCALING_TYPES` in `llama-model.cpp`).
const ROPE_SCALING_TYPES: &[&str] = &["none", "linear", "yarn", "longrope"];

/// Keys without an architecture, all optional.
const GENERAL: &[(&str, Rule)] = &[("general.name", Text), ("general.file_type", Count(0, u32::MAX))];

/// Keys `{arch}.{name}` that llama.cpp requires of every language model.
const REQUIRED: &[(&str, Rule)] = &[
    ("block_count", Count(1, MAX_LAYERS)),
    ("embedding_length", Count(1, MAX_EMBD)),
    ("context_length", Count(1, MAX)),
];

/// Optional keys `{arch}.{name}`, from `load_hparams` and the `load_arch_hparams` of all architectures.
const OPTIONAL: &[(&str, Rule)] = &[
    ("vocab_size", Count(0, MAX)),
    ("embedding_length_out", Count(0, MAX)),
    ("attention.causal", Flag),
    ("pooling_type", Count(0, u32::MAX)),
    ("nextn_predict_layers", Count(0, MAX_LAYERS)),
    ("feed_forward_length", CountPerLayer(0, MAX_FF)),
    ("expert_count", Count(0, MAX)),
    ("expert_used_count", CountPerLayer(0, MAX)),
    ("expert_group_count", Count(0, MAX)),
    ("expert_group_used_count", Count(0, MAX)),
    ("attention.head_count", CountPerLayer(0, MAX)),
    ("attention.head_count_kv", CountPerLayer(0, MAX)),
    ("attention.key_length", Count(1, MAX)),
    ("attention.value_length", Count(1, MAX)),
    ("attention.key_length_swa", Count(1, MAX)),
    ("attention.value_length_swa", Count(1, MAX)),
    ("attention.sliding_window", CountIfU32(0, MAX)),
    ("attention.scale", Finite),
    ("attention.clamp_kqv", Finite),
    ("attention.max_alibi_bias", NotNegative),
    ("attention.layer_norm_rms_epsilon", NotNegative),
    ("attention.layer_norm_epsilon", NotNegative),
    ("attention.group_norm_epsilon", NotNegative),
    ("attention.group_norm_groups", Count(0, MAX)),
    ("attention.output_scale", Finite),
    ("attention.value_scale", Finite),
    ("attention.temperature_scale", Finite),
    ("attn_logit_softcapping", NotNegative),
    ("final_logit_softcapping", NotNegative),
    ("router_logit_softcapping", NotNegative),
    ("logit_scale", Finite),
    ("residual_scale", Finite),
    ("embedding_scale", Finite),
    ("expert_weights_scale", Finite),
    ("rope.dimension_count", Count(0, MAX)),
    ("rope.dimension_count_swa", Count(0, MAX)),
    ("rope.freq_base", Positive),
    ("rope.freq_base_swa", Positive),
    ("rope.scale_linear", NotNegative),
    ("rope.scaling.type", OneOf(ROPE_SCALING_TYPES)),
    ("rope.scaling.factor", NotNegative),
    ("rope.scaling.attn_factor", Finite),
    ("rope.scaling.alpha", Finite),
    ("rope.scaling.original_context_length", Count(0, MAX)),
    ("rope.scaling.finetuned", Flag),
    ("rope.scaling.yarn_log_multiplier", Finite),
    ("rope.scaling.yarn_ext_factor", Finite),
    ("rope.scaling.yarn_attn_factor", Finite),
    ("rope.scaling.yarn_beta_fast", Finite),
    ("rope.scaling.yarn_beta_slow", Finite),
    ("classifier.output_labels", Texts),
    ("ssm.conv_kernel", Count(0, MAX)),
    ("ssm.inner_size", Count(0, MAX)),
    ("ssm.state_size", Count(0, MAX)),
    ("ssm.time_step_rank", Count(0, MAX)),
    ("ssm.group_count", Count(0, MAX)),
    ("wkv.head_size", Count(0, MAX)),
];

/// Checks the tables above.
pub(super) fn check(file: &GgufFile) -> Result<()> {
    for (key, rule) in GENERAL {
        check_key(file, key, *rule)?;
    }
    for (name, rule) in REQUIRED {
        let key = file.arch_key(name)?;
        if file.metadata.get(&key).is_none() {
            return Err(wrong_key(file, &key, &rule.expected(file), "nothing"));
        }
        check_key(file, &key, *rule)?;
    }
    for (name, rule) in OPTIONAL {
        check_key(file, &file.arch_key(name)?, *rule)?;
    }
    let n_layer = file.n_layer()?;
    let key = file.arch_key("nextn_predict_layers")?;
    match file.u32_if_present(&key)? {
        Some(n) if n >= n_layer => {
            Err(wrong_key(file, &key, &format!("fewer than the {n_layer} layers of the model"), n))
        }
        _ => Ok(()),
    }
}

fn check_key(file: &GgufFile, key: &str, rule: Rule) -> Result<()> {
    let Some(value) = file.metadata.get(key) else { return Ok(()) };
    if rule.holds(file, value) {
        return Ok(());
    }
    let found = match rule.has_type(value) {
        true => shown(file, key),
        false => value.describe(),
    };
    Err(wrong_key(file, key, &rule.expected(file), found))
}

impl Rule {
    /// Whether the type is right, so that a message shows the value and not its type.
    fn has_type(self, value: &Value) -> bool {
        let found = value.value_type();
        match self {
            Count(..) | CountIfU32(..) => found == ValueType::U32,
            CountPerLayer(..) => matches!(found, ValueType::U32 | ValueType::Array),
            Finite | NotNegative | Positive => found == ValueType::F32,
            Flag => found == ValueType::Bool,
            Text | OneOf(_) => found == ValueType::Str,
            Texts => false,
        }
    }

    fn holds(self, file: &GgufFile, value: &Value) -> bool {
        match (self, value) {
            (Count(min, max) | CountIfU32(min, max), Value::U32(n)) => (min..=max).contains(n),
            (CountIfU32(..), _) => true,
            (CountPerLayer(min, max), Value::U32(n)) => (min..=max).contains(n),
            (CountPerLayer(min, max), Value::Array(array)) => {
                let is_integer = matches!(array.element_type(), ValueType::U32 | ValueType::I32);
                let range = i64::from(min)..=i64::from(max);
                let are_in_range = array.to_i64s().is_some_and(|ns| ns.iter().all(|n| range.contains(n)));
                is_integer && are_in_range && file.n_layer().is_ok_and(|n| array.len() == n as usize)
            }
            (Finite, Value::F32(v)) => v.is_finite(),
            (NotNegative, Value::F32(v)) => v.is_finite() && *v >= 0.0,
            (Positive, Value::F32(v)) => v.is_finite() && *v > 0.0,
            (Flag, Value::Bool(_)) | (Text, Value::Str(_) | Value::Bytes(_)) => true,
            (OneOf(names), Value::Str(found)) => names.contains(&found.as_str()),
            (Texts, Value::Array(array)) => array.is_empty() || array.strings().is_some(),
            (Texts, _) => true,
            _ => false,
        }
    }

    fn expected(self, file: &GgufFile) -> String {
        let range = |min: u32, max: u32| match (min, max) {
            (0, u32::MAX) => "a u32".to_owned(),
            _ => format!("a u32 from {min} to {max}"),
        };
        match self {
            Count(min, max) | CountIfU32(min, max) => range(min, max),
            CountPerLayer(min, max) => {
                let n_layer = file.n_layer().unwrap_or_default();
                format!("{}, or an array of {n_layer} of them", range(min, max))
            }
            Finite => "a finite f32".into(),
            NotNegative => "a finite f32 of at least 0".into(),
            Positive => "a finite f32 above 0".into(),
            Flag => "a bool".into(),
            Text => "a str".into(),
            OneOf(names) => format!("one of {}", names.join(", ")),
            Texts => "an array of str".into(),
        }
    }
}
