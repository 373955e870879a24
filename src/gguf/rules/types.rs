//! Storage types of tensors. ggml's CPU code aborts on the types that are refused here.

use super::super::read::GgufFile;
use super::super::{TensorInfo, TensorType};
use super::wrong_tensor;
use crate::error::{Error, Result};

/// Ends of the roles of tensors that are no operand of a product of matrices, and must be f32 in any shape.
const F32_ONLY: &[&str] = &[
    "norm.weight",
    "norm",
    ".bias",
    "ssm_conv1d.weight",
    "ssm_a",
    "ssm_d",
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
];

/// Beginnings of the roles of tensors that are multiplied, or whose rows are looked up.
const WEIGHTS: &[&str] = &["token_embd.", "position_embd.", "output.", "attn_", "ffn_", "ssm_"];

/// A table of integers in an architecture that routes tokens to experts by their ids.
const INTEGER_TABLE: &str = "ffn_gate_tid2eid";

/// Checks the type of every tensor.
pub(super) fn check(file: &GgufFile) -> Result<()> {
    file.tensors().iter().try_for_each(|tensor| check_tensor(file, tensor))
}

fn check_tensor(file: &GgufFile, tensor: &TensorInfo) -> Result<()> {
    let (name, found) = (tensor.name(), tensor.tensor_type());
    let role = role(name);
    // The router of a single shared expert is a vector that is multiplied.
    let is_vector = tensor.shape().len() == 1 && !role.contains("gate_inp");
    let is_f32_only = F32_ONLY.iter().any(|end| role.ends_with(end));
    let is_known = is_f32_only || WEIGHTS.iter().any(|start| role.starts_with(start));
    if found != TensorType::F32 && (is_f32_only || is_vector && is_known) {
        return Err(wrong_tensor(file, name, "type f32", found));
    }
    let is_weight = WEIGHTS.iter().any(|start| role.starts_with(start)) && !role.starts_with(INTEGER_TABLE);
    if is_weight && !found.is_weight() {
        let reason = format!("tensor {name:?}: llama.cpp cannot multiply by type {found}");
        return Err(Error::model(file.path(), reason));
    }
    Ok(())
}

/// The name without its layer: `attn_q.weight` of `blk.3.attn_q.weight`.
pub(super) fn role(name: &str) -> &str {
    name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')).map_or(name, |(_, role)| role)
}
