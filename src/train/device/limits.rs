//! Limits of the GPU's kernels, available in every build.
//!
//! The constants come from `vendor/cuda/limits.h`, which the kernels include too.

use crate::error::{Error, Result};
use crate::gguf::{GgufFile, TensorInfo, TensorType};

use crate::train::device::{Attention, Rope};

mod header {
    include!(concat!(env!("OUT_DIR"), "/cuda_limits.rs"));
}
pub(super) use header::*;

/// Bytes of logits a GPU computes at a time: several hundred rows even of the largest vocabularies.
pub(super) const LOGIT_BYTES: usize = 256 << 20;

/// Whether a GPU can multiply by frozen matrices of this type.
pub fn has_kernel(tensor_type: TensorType) -> bool {
    KERNEL_TYPES.contains(&tensor_type.id())
}

/// Checks that the GPU has kernels for every part of a model.
///
/// `attention` and `rope` have one entry per block. `has_frozen` says whether matrices of `base` stay frozen; trained
/// ones are f32, whatever their type in the file.
///
/// # Errors
/// [`Error::Model`], naming the part without a kernel.
pub fn check_kernels(
    base: &GgufFile,
    attention: &[Attention],
    rope: &[Option<Rope>],
    has_frozen: bool,
) -> Result<()> {
    let refuse = |reason: String, hint: &str| Error::model(base.path(), reason).with_hint(hint);
    for (il, attention) in attention.iter().enumerate() {
        let (heads, dim) = (attention.n_head, attention.head_dim);
        if heads > MOST_HEADS || dim > MOST_HEAD_DIM {
            let reason = format!(
                "block {il}: expected at most {MOST_HEADS} heads of at most {MOST_HEAD_DIM} numbers (the GPU's \
                 kernels), found {heads} heads of {dim}"
            );
            return Err(refuse(reason, "train with --device cpu"));
        }
    }
    let pairs = rope.iter().flatten().map(|rope| rope.frequencies.len()).max().unwrap_or(0);
    if pairs > MOST_ROPE_PAIRS {
        let reason = format!(
            "RoPE: expected at most {} rotated numbers per head (the GPU's kernel), found {}",
            2 * MOST_ROPE_PAIRS,
            2 * pairs
        );
        return Err(refuse(reason, "train with --device cpu"));
    }
    if !has_frozen {
        return Ok(());
    }
    // The table of positions is always loaded as f32.
    let is_frozen =
        |tensor: &&TensorInfo| tensor.shape().len() > 1 && tensor.name() != "position_embd.weight";
    match base.tensors().iter().filter(is_frozen).find(|tensor| !has_kernel(tensor.tensor_type())) {
        Some(tensor) => Err(refuse(
            format!("tensor {:?}: the GPU has no kernel for type {}", tensor.name(), tensor.tensor_type()),
            NO_KERNEL_HINT,
        )),
        None => Ok(()),
    }
}

/// The hint for a tensor type without a kernel.
pub(super) const NO_KERNEL_HINT: &str =
    "quantise the model to a type that has one (such as Q4_K_M or Q8_0), or train with --device cpu";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::model::config::Config;

    #[test]
    fn rejects_models_with_a_part_that_has_no_kernel() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/gguf/tiny/llama.gguf");
        let base = GgufFile::open(path).unwrap();
        let config = Config::read(&base, None).unwrap();
        let check = |config: &Config| check_kernels(&base, &config.attention, &config.rope, true);
        check(&config).unwrap();
        let refused = |config: &Config| {
            let error = check(config).unwrap_err();
            assert!(error.hint().unwrap().contains("--device cpu"), "{error:?}");
            error.to_string()
        };
        let mut large = config.clone();
        large.attention[1].head_dim = 512;
        let message = refused(&large);
        assert!(message.contains("block 1: ") && message.contains(" heads of 512"), "{message}");
        let mut many = config.clone();
        many.attention[0].n_head = 257;
        let message = refused(&many);
        assert!(message.contains("block 0: ") && message.contains("found 257 heads"), "{message}");
        let mut rotated = config;
        rotated.rope[0].as_mut().unwrap().frequencies = vec![1.0; 257];
        let message = refused(&rotated);
        assert!(
            message.contains("expected at most 512 rotated numbers") && message.ends_with("found 514"),
            "{message}"
        );
    }

    #[test]
    fn quantised_types_of_llama_cpp_have_kernels() {
        use TensorType::*;
        assert!([F32, F16, BF16, Q4_0, Q4_K, Q6_K, Q8_0].into_iter().all(has_kernel));
        assert!(![Q8_K, IQ2_XXS, I32].into_iter().any(has_kernel));
    }
}
