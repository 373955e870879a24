//! The bounds of all checks, each with its reason and its measurement.
//!
//! | bound | value | checks |
//! |---|---|---|
//! | [`F32`] | 1e-6 | trained results and merges in F32 |
//! | [`F16`] | 1e-4 | trained results and merges in F16; trained results in BF16 |
//! | [`BF16`] | 5e-3 | trainers that round to bf16; merges into BF16 |
//! | [`QUANTISED_MIN`] | 5e-4 | minimum bound for trained results on quantised weights |
//! | [`ROUNDING_MAX`] | 2e-2 | trainer against llama.cpp before training, on quantised weights |
//! | [`FAST_FACTOR`] | 4 | times the noise floor, if the trainer rounds too |
//! | [`UNTRAINED_FACTOR`] | 2 | times the difference before training |
//! | [`MERGE_NOISE_FACTOR`] | 2 | times the noise floor, for merges |
//! | [`MERGE_LOSS_MAX`] | 0.5 | times the adapters' effect: the largest loss of a merge that is kept |
//! | [`MERGE_LOSS_CLOSE`] | 0.1 | times the adapters' effect: the largest loss of a merge that needs no advice |
//! | [`FAINT_EFFECT_FACTOR`] | 4 | times rounding: a smaller effect cannot be told from it |
//! | [`LOGIT_ROUNDING`] | 1e-11 | the least that counts as rounding |
//!
//! Unless it is a factor, a bound is a mean KL divergence in nats per token. Values are compared with bounds by
//! [`within`], which NaN never passes.

use crate::gguf::TensorType;

/// F32 weights: the order of sums, and llama.cpp's GELU table in F16.
///
/// The order of sums alone gives 1e-9 or less.
pub const F32: f64 = 1e-6;

/// F16 and BF16 weights: llama.cpp rounds the other operand of each product to the type of the weights.
pub const F16: f64 = 1e-4;

/// Both operands of a product rounded to bf16, by a GPU trainer or by llama.cpp on a model merged into BF16.
///
/// Measured on the tiny models with the emulated GPU: 1.5e-4 to 9e-4 (`tests/cuda/result.rs`).
pub const BF16: f64 = 5e-3;

/// The minimum bound on quantised weights.
///
/// The noise floor is no guide for very small models, where a nudge changes hardly any rounding: on
/// `gguf/tiny/llama-q8_0` llama.cpp's rounding alone moved 1.6e-4.
pub const QUANTISED_MIN: f64 = 5e-4;

/// The largest difference before training that rounding explains on quantised weights.
///
/// Measured between trainer and llama.cpp before training, on two threads of a CPU with AVX-512 VNNI:
///
/// | model | exact products | fast products | llama.cpp's noise floor |
/// |---|---|---|---|
/// | SmolLM2-135M-Instruct in Q4_1 | 2.4e-3 to 5.3e-3 | 2.1e-3 to 7.5e-3 | 1.9e-3 to 4.9e-3 |
/// | random weights, Llama-3.2-1B's shape, in Q4_K and Q6_K | 1.1e-3 to 2.3e-3 | 3.8e-3 | 8.6e-4 to 1.3e-3 |
/// | `gguf/tiny/llama-q8_0` | 7.9e-4 | | 5.7e-4 |
///
/// Ranges span four to nine comparisons of 4 to 61 tokens each. The bound is 2.7 times the largest value. Wrong models
/// exceed it: scaling the logits of `llama-q8_0` by 1.2 gives 4.9e-2, scaling its attention scores by 1.2 gives
/// 4.4e-2, and halving its rotary frequencies gives 0.43 (`tests/train/result.rs`).
pub const ROUNDING_MAX: f64 = 2e-2;

/// Maximum difference between two programs that round differently, in noise floors.
pub const FAST_FACTOR: f64 = 4.0;

/// Maximum difference after training, as a multiple of the difference before training.
pub const UNTRAINED_FACTOR: f64 = 2.0;

/// Maximum loss of a merge, in noise floors.
pub const MERGE_NOISE_FACTOR: f64 = 2.0;

/// Maximum loss of a merge, as a fraction of the adapters' effect, unless the user allows more.
pub const MERGE_LOSS_MAX: f64 = 0.5;

/// Maximum loss of a merge that counts as lossless, as a fraction of the adapters' effect.
pub const MERGE_LOSS_CLOSE: f64 = 0.1;

/// An effect of up to this many times rounding is too small to check, unless the result is clearly nearer.
///
/// Rounding with and without an adapter differed by a factor of up to 1.3 on the tiny models.
pub const FAINT_EFFECT_FACTOR: f64 = 4.0;

/// The mean KL of logits rounded to f32.
///
/// A logit of up to 64 is rounded with a standard deviation of 2^-17 / sqrt(12) = 2.2e-6. The KL of two softmaxes is
/// about half the variance of the differences of their logits: 5e-12 if both sides are rounded.
pub const LOGIT_ROUNDING: f64 = 1e-11;

/// Whether `value` is at most `bound`. False if one of them is NaN or infinite.
pub fn within(value: f64, bound: f64) -> bool {
    value.is_finite() && bound.is_finite() && value <= bound
}

/// The largest of `values`; NaN if one of them is NaN, which `f64::max` would drop.
pub fn largest<const N: usize>(values: [f64; N]) -> f64 {
    values
        .into_iter()
        .fold(f64::NEG_INFINITY, |a, b| if a.is_nan() || b.is_nan() { f64::NAN } else { a.max(b) })
}

/// The bound for rounding weights to `tensor_type`; `None` for quantised types, whose error depends on the weights.
pub fn float_merge(tensor_type: TensorType) -> Option<f64> {
    match tensor_type {
        TensorType::F32 => Some(F32),
        TensorType::F16 => Some(F16),
        TensorType::BF16 => Some(BF16),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_is_not_finite_is_within_a_bound() {
        assert!(within(1.0, 1.0) && within(0.0, 1e-11) && !within(1.1, 1.0));
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            assert!(!within(bad, 1.0) && !within(0.0, bad) && !within(bad, bad), "{bad}");
        }
    }

    #[test]
    fn the_largest_keeps_nan() {
        assert_eq!(largest([1.0, 3.0, 2.0]), 3.0);
        assert!(largest([1.0, f64::NAN, 2.0]).is_nan() && largest([f64::NAN, 1.0]).is_nan());
    }
}
