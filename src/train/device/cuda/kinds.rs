//! The options of operations as the extension's structs.

use crate::train::device::cuda::ffi;
use crate::train::device::cuda::memory::Buffer;
use crate::train::device::cuda::rows::Rows;
use crate::train::device::{Activation, Attention, Gemm, Norm, NormKind};
use crate::train::recipe::dpo::{AnswerLogps, LossKind, PairLoss, Preference};

pub fn gemm(gemm: Gemm) -> ffi::detox_cuda_gemm {
    ffi::detox_cuda_gemm {
        m: gemm.m as i64,
        n: gemm.n as i64,
        k: gemm.k as i64,
        transpose_a: i32::from(gemm.transpose_a),
        transpose_b: i32::from(gemm.transpose_b),
        alpha: gemm.alpha,
        beta: gemm.beta,
    }
}

pub fn norm(norm: Norm) -> ffi::detox_cuda_norm_kind {
    ffi::detox_cuda_norm_kind { is_layer: i32::from(norm.kind == NormKind::Layer), epsilon: norm.epsilon }
}

pub fn activation(activation: Activation) -> ffi::detox_cuda_activation {
    match activation {
        Activation::Silu => ffi::DETOX_CUDA_SILU,
        Activation::Gelu => ffi::DETOX_CUDA_GELU,
    }
}

/// An attention with its slopes, to which the extension's struct points.
#[derive(Debug)]
pub struct AttentionKind<'a> {
    attention: &'a Attention,
    /// ALiBi's slope of each head; empty without ALiBi.
    slopes: Vec<f32>,
}

impl AttentionKind<'_> {
    pub fn new(attention: &Attention) -> AttentionKind<'_> {
        assert!(attention.window != Some(0), "a window includes the row's own position");
        let n_slopes = if attention.max_alibi_bias == 0.0 { 0 } else { attention.n_head };
        AttentionKind { attention, slopes: (0..n_slopes).map(|head| attention.slope(head)).collect() }
    }

    /// Valid as long as `self`.
    pub fn raw(&self) -> ffi::detox_cuda_attention_kind {
        let number = |n: usize| i32::try_from(n).expect("heads are small");
        let Attention { n_head, n_head_kv, head_dim, scale, window, .. } = *self.attention;
        ffi::detox_cuda_attention_kind {
            n_head: number(n_head),
            n_head_kv: number(n_head_kv),
            head_dim: number(head_dim),
            scale,
            // No text is so long that a larger window would hide a token.
            window: window.map_or(0, |window| i32::try_from(window).unwrap_or(i32::MAX)),
            slopes: if self.slopes.is_empty() { std::ptr::null() } else { self.slopes.as_ptr() },
        }
    }

    /// Panics unless queries are `[R][H][D]`, keys and values `[R][K][D]`, and lse `[R][H]`.
    #[track_caller]
    pub fn assert_shapes(&self, rows: &Rows, queries: &[&Buffer], keys: &[&Buffer], lse: &Buffer) {
        let (n, Attention { n_head, n_head_kv, head_dim, .. }) = (rows.n_rows, self.attention);
        assert!(queries.iter().all(|x| x.len() == n * n_head * head_dim), "[R][H][D]");
        assert!(keys.iter().all(|x| x.len() == n * n_head_kv * head_dim), "[R][K][D]");
        assert_eq!(lse.len(), n * n_head, "[R][H]");
    }
}

pub fn preference(preference: Preference, n_pairs: usize) -> ffi::detox_cuda_preference {
    let Preference { kind, beta, label_smoothing } = preference;
    let loss = match kind {
        LossKind::Sigmoid => ffi::DETOX_CUDA_SIGMOID,
        LossKind::Ipo => ffi::DETOX_CUDA_IPO,
        LossKind::Hinge => ffi::DETOX_CUDA_HINGE,
    };
    ffi::detox_cuda_preference { loss, beta, label_smoothing, n_pairs: n_pairs as i64 }
}

/// Log-probabilities and loss of a pair from the GPU's result; the rewards are computed here.
pub fn pair_loss(
    preference: Preference,
    cost: &ffi::detox_cuda_pair_cost,
    reference: AnswerLogps,
) -> (AnswerLogps, PairLoss) {
    let policy = AnswerLogps { chosen: cost.policy_chosen, rejected: cost.policy_rejected };
    let loss = PairLoss {
        loss: cost.loss,
        dchosen: cost.dchosen,
        drejected: cost.drejected,
        chosen_reward: preference.beta * (policy.chosen - reference.chosen),
        rejected_reward: preference.beta * (policy.rejected - reference.rejected),
    };
    (policy, loss)
}
