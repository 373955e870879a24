//! The tensors of the architectures that this program supports by name, as their `load_arch_tensors` asks for them.
//!
//! The graphs of these architectures reshape by the sizes of the keys, so a tensor whose shape follows from the keys
//! cannot fail there. Other architectures are left to llama.cpp, which refuses a wrong shape while it loads.

use super::super::read::GgufFile;
use super::sizes::Sizes;
use super::{wrong_key, wrong_tensor};
use crate::error::Result;

/// One axis of a tensor.
#[derive(Debug, Clone, Copy)]
enum Axis {
    /// Width of the residual stream.
    Embd,
    Vocab,
    /// Positions of a learned table.
    Positions,
    /// Neurons of an FFN. llama.cpp takes those of the first layer for all.
    Ff,
    TwiceFf,
    /// Width of all queries of the layer.
    Query,
    /// Width of all keys of the layer.
    Key,
    /// Width of all values of the layer.
    Values,
    /// Queries, keys and values together.
    QueryKeyValues,
    /// Width of the attention's output before it is projected.
    AttentionOut,
    /// Width of one key.
    Head,
    Heads,
    KeyHeads,
    /// Half of the rotated dimensions.
    HalfRotated,
    Experts,
    /// `ssm.conv_kernel`.
    Kernel,
    /// `ssm.inner_size`.
    Inner,
    TwiceInner,
    /// `ssm.state_size`.
    State,
    /// `ssm.time_step_rank`, the number of heads of a plamo2 state-space layer.
    Rank,
    /// Width of the time step in plamo2: a sixteenth of the model's, and at least 64.
    Step,
    /// `Step`, and two states.
    StepAndStates,
}
use Axis::*;

/// When a tensor must be there.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Need {
    Always,
    /// It may be absent.
    Optional,
    /// In models without experts.
    Dense,
    /// In models with experts.
    Mixture,
    /// As [`Need::Optional`], and ignored in models without experts.
    OptionalMixture,
    /// In layers with attention.
    Attention,
    /// In recurrent layers.
    Recurrent,
    /// If there is no `attn_qkv.weight` in the layer.
    Separate,
}
use Need::*;

/// Name without the layer, shape and need of a tensor.
type Row = (&'static str, &'static [Axis], Need);

/// The tables of one architecture.
struct Family {
    name: &'static str,
    /// Whether llama.cpp takes the heads of the first layer for all layers.
    same_heads: bool,
    /// Whether its projections expect heads that fill the width of the model.
    heads_fill_width: bool,
    epsilon: &'static str,
    /// Tensors outside of the layers.
    outer: &'static [&'static [Row]],
    /// Tensors of each layer.
    layer: &'static [&'static [Row]],
}

const RMS: &str = "attention.layer_norm_rms_epsilon";
const LAYER_NORM: &str = "attention.layer_norm_epsilon";

const OUTER: &[Row] = &[
    ("token_embd.weight", &[Embd, Vocab], Always),
    ("output_norm.weight", &[Embd], Always),
    ("output.weight", &[Embd, Vocab], Optional),
];
const OUTER_BIAS: &[Row] = &[("output_norm.bias", &[Embd], Always)];
const POSITIONS: &[Row] = &[("position_embd.weight", &[Embd, Positions], Always)];
const EMBEDDING_NORM: &[Row] =
    &[("token_embd_norm.weight", &[Embd], Always), ("token_embd_norm.bias", &[Embd], Always)];
const OUTPUT_BIAS: &[Row] = &[("output.bias", &[Vocab], Optional)];
const ROTATION: &[Row] = &[("rope_freqs.weight", &[HalfRotated], Optional)];

/// Projections of queries, keys and values, in one tensor or three (`create_tensor_qkv`).
const PROJECTIONS: &[Row] = &[
    ("attn_qkv.weight", &[Embd, QueryKeyValues], Optional),
    ("attn_qkv.bias", &[QueryKeyValues], Optional),
    ("attn_q.weight", &[Embd, Query], Separate),
    ("attn_k.weight", &[Embd, Key], Separate),
    ("attn_v.weight", &[Embd, Values], Separate),
    ("attn_q.bias", &[Query], Optional),
    ("attn_k.bias", &[Key], Optional),
    ("attn_v.bias", &[Values], Optional),
    ("attn_output.weight", &[AttentionOut, Embd], Always),
];
const NORMS: &[Row] = &[("attn_norm.weight", &[Embd], Always), ("ffn_norm.weight", &[Embd], Always)];
const ATTENTION_NORM: &[Row] = &[("attn_norm.weight", &[Embd], Always)];
const GATED_FFN: &[Row] = &[
    ("ffn_gate.weight", &[Embd, Ff], Dense),
    ("ffn_down.weight", &[Ff, Embd], Dense),
    ("ffn_up.weight", &[Embd, Ff], Dense),
];
const LLAMA: &[Row] = &[
    ("attn_output.bias", &[Embd], Optional),
    ("ffn_gate.bias", &[Ff], Optional),
    ("ffn_down.bias", &[Embd], Optional),
    ("ffn_up.bias", &[Ff], Optional),
    ("ffn_gate_inp.weight", &[Embd, Experts], Mixture),
    ("ffn_gate_exps.weight", &[Embd, Ff, Experts], OptionalMixture),
    ("ffn_down_exps.weight", &[Ff, Embd, Experts], Mixture),
    ("ffn_up_exps.weight", &[Embd, Ff, Experts], Mixture),
];
const HEAD_NORMS: &[Row] =
    &[("attn_q_norm.weight", &[Head], Always), ("attn_k_norm.weight", &[Head], Always)];
const POST_NORMS: &[Row] =
    &[("post_attention_norm.weight", &[Embd], Always), ("post_ffw_norm.weight", &[Embd], Always)];
/// Layers of gpt2 and bloom.
const PLAIN: &[Row] = &[
    ("attn_norm.bias", &[Embd], Always),
    ("ffn_norm.bias", &[Embd], Always),
    ("attn_qkv.weight", &[Embd, QueryKeyValues], Always),
    ("attn_qkv.bias", &[QueryKeyValues], Always),
    ("attn_output.weight", &[AttentionOut, Embd], Always),
    ("attn_output.bias", &[Embd], Always),
    ("ffn_down.weight", &[Ff, Embd], Always),
    ("ffn_down.bias", &[Embd], Always),
    ("ffn_up.weight", &[Embd, Ff], Always),
    ("ffn_up.bias", &[Ff], Always),
];
const PLAMO2: &[Row] = &[
    ("ssm_in.weight", &[Embd, TwiceInner], Recurrent),
    ("ssm_conv1d.weight", &[Kernel, Inner], Recurrent),
    ("ssm_x.weight", &[Inner, StepAndStates], Recurrent),
    ("ssm_dt.weight", &[Step, Rank], Recurrent),
    ("ssm_dt.bias", &[Rank], Recurrent),
    ("ssm_a", &[Rank], Recurrent),
    ("ssm_d", &[Rank], Recurrent),
    ("ssm_out.weight", &[Inner, Embd], Recurrent),
    ("ssm_dt_norm", &[Step], Recurrent),
    ("ssm_b_norm", &[State], Recurrent),
    ("ssm_c_norm", &[State], Recurrent),
    ("attn_qkv.weight", &[Embd, QueryKeyValues], Attention),
    ("attn_q_norm.weight", &[Head, Heads], Attention),
    ("attn_k_norm.weight", &[Head, KeyHeads], Attention),
    ("attn_output.weight", &[AttentionOut, Embd], Attention),
    ("post_attention_norm", &[Embd], Always),
    ("ffn_down.weight", &[Ff, Embd], Always),
    ("ffn_up.weight", &[Embd, TwiceFf], Always),
    ("post_ffw_norm", &[Embd], Always),
];

const fn family(name: &'static str, heads_fill_width: bool, epsilon: &'static str) -> Family {
    Family { name, same_heads: true, heads_fill_width, epsilon, outer: &[OUTER], layer: &[] }
}

const FAMILIES: &[Family] = &[
    Family {
        outer: &[OUTER, ROTATION],
        layer: &[NORMS, PROJECTIONS, GATED_FFN, LLAMA],
        ..family("llama", false, RMS)
    },
    Family {
        outer: &[OUTER, OUTPUT_BIAS],
        layer: &[NORMS, PROJECTIONS, GATED_FFN],
        ..family("qwen2", true, RMS)
    },
    Family { layer: &[NORMS, PROJECTIONS, HEAD_NORMS, GATED_FFN], ..family("qwen3", false, RMS) },
    Family { layer: &[NORMS, PROJECTIONS, GATED_FFN], ..family("gemma", false, RMS) },
    Family { layer: &[NORMS, PROJECTIONS, POST_NORMS, GATED_FFN], ..family("gemma2", false, RMS) },
    Family {
        layer: &[NORMS, PROJECTIONS, HEAD_NORMS, POST_NORMS, GATED_FFN],
        ..family("gemma3", false, RMS)
    },
    Family { layer: &[ATTENTION_NORM, PROJECTIONS, GATED_FFN], ..family("command-r", true, LAYER_NORM) },
    Family {
        outer: &[OUTER, OUTER_BIAS, POSITIONS],
        layer: &[NORMS, PLAIN],
        ..family("gpt2", true, LAYER_NORM)
    },
    Family {
        outer: &[OUTER, OUTER_BIAS, EMBEDDING_NORM],
        layer: &[NORMS, PLAIN],
        ..family("bloom", true, LAYER_NORM)
    },
    Family { same_heads: false, layer: &[NORMS, PLAMO2], ..family("plamo2", false, RMS) },
];

/// The tables of the file's architecture, if there are any.
fn family_of(file: &GgufFile) -> Option<&'static Family> {
    let arch = file.architecture().ok()?;
    FAMILIES.iter().find(|family| family.name == arch)
}

/// Checks the tensors outside of the layers: first, because all other sizes are compared with the model's width.
pub(super) fn check_outer(file: &GgufFile, sizes: &Sizes) -> Result<()> {
    let tables = family_of(file).map_or(&[][..], |family| family.outer);
    tables.iter().copied().flatten().try_for_each(|row| check_row(file, sizes, None, row))
}

/// Checks the keys of an architecture in the tables, and the tensors of its layers.
pub(super) fn check(file: &GgufFile, sizes: &Sizes) -> Result<()> {
    let Some(family) = family_of(file) else { return Ok(()) };
    let arch = family.name;
    let epsilon = file.arch_key(family.epsilon)?;
    if file.f32_if_present(&epsilon)?.is_none() {
        return Err(wrong_key(file, &epsilon, "a finite f32 of at least 0", "nothing"));
    }
    let nextn = file.arch_key("nextn_predict_layers")?;
    if sizes.n_layer_main != file.n_layer()? as usize {
        return Err(wrong_key(
            file,
            &nextn,
            &format!("no such layers in {arch}"),
            super::shown(file, &nextn),
        ));
    }
    check_heads(file, family, sizes)?;
    for il in 0..sizes.n_layer_main {
        for row in family.layer.iter().copied().flatten() {
            check_row(file, sizes, Some(il), row)?;
        }
    }
    Ok(())
}

/// The first tensor that is not in the tables of the file's architecture; `None` for an architecture without tables.
///
/// llama.cpp refuses such a file without a name: "wrong number of tensors".
#[cfg(feature = "engine")]
pub(in crate::gguf) fn unexpected(file: &GgufFile) -> Option<&str> {
    let family = family_of(file)?;
    let is_in =
        |tables: &[&[Row]], role: &str| tables.iter().copied().flatten().any(|(name, ..)| *name == role);
    let mut names = file.tensors().iter().map(|tensor| tensor.name());
    names.find(|name| match name.starts_with("blk.") {
        true => !is_in(family.layer, super::types::role(name)),
        false => !is_in(family.outer, name),
    })
}

fn check_heads(file: &GgufFile, family: &Family, sizes: &Sizes) -> Result<()> {
    let arch = family.name;
    let ff_key = file.arch_key("feed_forward_length")?;
    if let Some(n) = sizes.n_ff.iter().find(|&&n| n == 0 || n != sizes.n_ff[0]) {
        let expected = format!("the same number above 0 in all layers of {arch}");
        return Err(wrong_key(file, &ff_key, &expected, n));
    }
    if family.same_heads {
        for (name, values) in
            [("attention.head_count", &sizes.n_head), ("attention.head_count_kv", &sizes.n_head_kv)]
        {
            if let Some(n) = values.iter().find(|&&n| n == 0 || n != values[0]) {
                let key = file.arch_key(name)?;
                let expected = format!("the same number above 0 in all layers of {arch}");
                return Err(wrong_key(file, &key, &expected, n));
            }
        }
        let width = sizes.n_head[0].saturating_mul(sizes.n_embd_head_k);
        if family.heads_fill_width && width != sizes.n_embd {
            let name = match file.metadata.get(&file.arch_key("attention.key_length")?) {
                Some(_) => "attention.key_length",
                None => "attention.head_count",
            };
            let key = file.arch_key(name)?;
            let width = file.arch_key("embedding_length")?;
            let expected = format!("heads that fill the {} of {width} in {arch}", sizes.n_embd);
            let found = format!("{} heads of {}", sizes.n_head[0], sizes.n_embd_head_k);
            return Err(wrong_key(file, &key, &expected, found));
        }
    }
    for name in ["key_length", "value_length"] {
        let (key, of_windows) =
            (file.arch_key(&format!("attention.{name}"))?, format!("attention.{name}_swa"));
        let of_windows = file.arch_key(&of_windows)?;
        let full = if name == "key_length" { sizes.n_embd_head_k } else { sizes.n_embd_head_v };
        if let Some(found) = file.u32_if_present(&of_windows)?
            && u64::from(found) != full
        {
            return Err(wrong_key(file, &of_windows, &format!("{full}, as {key:?} in {arch}"), found));
        }
    }
    Ok(())
}

fn check_row(file: &GgufFile, sizes: &Sizes, layer: Option<usize>, row: &Row) -> Result<()> {
    let &(role, axes, need) = row;
    let name = match layer {
        None => role.to_owned(),
        Some(il) => format!("blk.{il}.{role}"),
    };
    let il = layer.unwrap_or(0);
    let is_recurrent = sizes.n_head_kv[il] == 0;
    let is_needed = match need {
        Always => true,
        Optional => false,
        Dense if sizes.n_expert > 0 => return Ok(()),
        Mixture | OptionalMixture if sizes.n_expert == 0 => return Ok(()),
        Attention if is_recurrent => return Ok(()),
        Recurrent if !is_recurrent => return Ok(()),
        Dense | Mixture | Attention | Recurrent => true,
        OptionalMixture => false,
        Separate => file.tensor(&format!("blk.{il}.attn_qkv.weight")).is_none(),
    };
    let shape = axes.iter().map(|axis| axis.len(file, sizes, il)).collect::<Result<Vec<u64>>>()?;
    match file.tensor(&name) {
        None if is_needed => {
            let expected = format!("shape {shape:?} ({})", keys_of(axes, file.architecture()?));
            Err(wrong_tensor(file, &name, &expected, "no such tensor"))
        }
        None => Ok(()),
        Some(tensor) => {
            // Axes of one element at the end mean nothing to ggml.
            let n_axes = tensor.shape().iter().rposition(|&n| n != 1).map_or(1, |last| last + 1);
            let found = &tensor.shape()[..n_axes];
            let n_wanted = shape.iter().rposition(|&n| n != 1).map_or(1, |last| last + 1);
            match found == &shape[..n_wanted] {
                true => Ok(()),
                false => Err(wrong_tensor(
                    file,
                    &name,
                    &format!("shape {shape:?} ({})", keys_of(axes, file.architecture()?)),
                    format!("{:?}", tensor.shape()),
                )),
            }
        }
    }
}

/// The keys that a shape comes from, for messages.
fn keys_of(axes: &[Axis], arch: &str) -> String {
    let mut keys: Vec<String> = Vec::new();
    for name in axes.iter().flat_map(|axis| axis.keys()) {
        let key = if name.starts_with("tokenizer.") { (*name).to_owned() } else { format!("{arch}.{name}") };
        if !keys.contains(&key) {
            keys.push(key);
        }
    }
    format!("by {}", keys.join(", "))
}

impl Axis {
    /// The keys it comes from: those without a default, and those that replace a default.
    fn keys(self) -> &'static [&'static str] {
        const HEAD: &str = "attention.head_count";
        const HEAD_KV: &str = "attention.head_count_kv";
        const KEY: &str = "attention.key_length";
        const VALUE: &str = "attention.value_length";
        match self {
            Embd => &["embedding_length"],
            Vocab => &["tokenizer.ggml.tokens"],
            Positions => &["context_length"],
            Ff | TwiceFf => &["feed_forward_length"],
            Query => &[HEAD, KEY],
            Key => &[HEAD_KV, KEY],
            Values => &[HEAD_KV, VALUE],
            QueryKeyValues => &[HEAD, HEAD_KV, KEY, VALUE],
            AttentionOut => &[HEAD, VALUE],
            Head => &[KEY, HEAD],
            Heads => &[HEAD],
            KeyHeads => &[HEAD_KV],
            HalfRotated => &["rope.dimension_count"],
            Experts => &["expert_count"],
            Kernel => &["ssm.conv_kernel"],
            Inner | TwiceInner => &["ssm.inner_size"],
            State => &["ssm.state_size"],
            Rank => &["ssm.time_step_rank"],
            Step => &["embedding_length"],
            StepAndStates => &["embedding_length", "ssm.state_size"],
        }
    }

    /// Its number of elements in layer `il`.
    fn len(self, file: &GgufFile, sizes: &Sizes, il: usize) -> Result<u64> {
        let ssm = |name: &str| -> Result<u64> { Ok(file.u32(&file.arch_key(name)?)?.into()) };
        let (n_head, n_head_kv) = (sizes.n_head[il], sizes.n_head_kv[il]);
        let (query, key) = (n_head * sizes.n_embd_head_k, n_head_kv * sizes.n_embd_head_k);
        let values = n_head_kv * sizes.n_embd_head_v;
        let step = (sizes.n_embd / 16).max(64);
        Ok(match self {
            Embd => sizes.n_embd,
            Vocab => sizes.n_vocab,
            Positions => sizes.n_ctx_train,
            Ff => sizes.n_ff[0],
            TwiceFf => 2 * sizes.n_ff[0],
            Query => query,
            Key => key,
            Values => values,
            QueryKeyValues => query.saturating_add(key).saturating_add(values),
            AttentionOut => n_head * sizes.n_embd_head_v,
            Head => sizes.n_embd_head_k,
            Heads => n_head,
            KeyHeads => n_head_kv,
            HalfRotated => sizes.n_rot / 2,
            Experts => sizes.n_expert,
            Kernel => ssm("ssm.conv_kernel")?,
            Inner => ssm("ssm.inner_size")?,
            TwiceInner => 2 * ssm("ssm.inner_size")?,
            State => ssm("ssm.state_size")?,
            Rank => ssm("ssm.time_step_rank")?,
            Step => step,
            StepAndStates => step + 2 * ssm("ssm.state_size")?,
        })
    }
}
