//! The trainer's operations on an NVIDIA GPU, by the extension in `vendor/cuda`; the only caller of it.
//!
//! Products with frozen matrices round both operands to bf16 and add up in f32; products of dense matrices round to TF32;
//! all else is f32. Sums are added up in a fixed order, so that the same command gives the same numbers to the bit.

#[cfg(feature = "cuda-emulation")]
pub mod emulation;
mod ffi;
mod handle;
mod matrix;
mod operations;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::sync::Arc;

use crate::error::Result;

use crate::train::device::name::Frozen;
use crate::train::device::{Activation, AdamwStep, Attention, Index, Norm, NormKind, RmspropStep};
use crate::train::recipe::dpo::{AnswerLogps, LossKind, PairLoss, Preference};

use handle::Handle;
pub use handle::{Buffer, Properties, Rows, count, is_present};
pub use matrix::Matrix;

/// A GPU.
#[derive(Debug)]
pub struct Cuda {
    handle: Arc<Handle>,
    properties: Properties,
    frozen: Frozen,
}

impl Cuda {
    /// Opens GPU `ordinal`, counted from 0.
    ///
    /// # Errors
    /// [`crate::Error::Device`] where there is none, or its driver or its kind are too old.
    pub fn open(ordinal: usize, frozen: Frozen) -> Result<Cuda> {
        let handle = Handle::open(ordinal)?;
        let properties = handle.properties()?;
        Ok(Cuda { handle, properties, frozen })
    }

    /// Bytes that could still be had, and bytes in all.
    ///
    /// # Errors
    /// Of the device.
    pub fn memory_bytes(&self) -> Result<(u64, u64)> {
        self.handle.memory_bytes()
    }

    /// How frozen matrices that are taken from now on lie in memory.
    pub fn set_frozen(&mut self, frozen: Frozen) {
        self.frozen = frozen;
    }

    /// As the driver calls it.
    pub fn model(&self) -> &str {
        &self.properties.name
    }

    /// As on the command line.
    pub fn name(&self) -> String {
        format!("cuda:{}", self.handle.ordinal())
    }

    /// Bytes of rounded numbers that a product of blocks makes at a time.
    #[cfg(test)]
    fn set_part_bytes(&self, n_bytes: usize) {
        // SAFETY: sets a number of an open device.
        self.check(unsafe { ffi::detox_cuda_set_part(self.raw(), n_bytes) }).unwrap();
    }

    fn raw(&self) -> *mut ffi::detox_cuda_device {
        self.handle.raw()
    }

    fn check(&self, status: ffi::detox_cuda_status) -> Result<()> {
        self.handle.check(status)
    }
}

/// Rows of `n_cols` numbers in a buffer of `len`.
fn rows_in(len: usize, n_cols: usize) -> usize {
    assert!(n_cols > 0 && len.is_multiple_of(n_cols), "{len} numbers in rows of {n_cols}");
    len / n_cols
}

/// Which rows of which array an index means, and the largest row of the table that it looks at.
fn index_of(index: &Index, rows: &Rows) -> (ffi::detox_cuda_index, Range<usize>, usize) {
    match index {
        Index::Token => (ffi::DETOX_CUDA_TOKEN, 0..rows.n_rows, rows.most_token),
        Index::Position => (ffi::DETOX_CUDA_POSITION, 0..rows.n_rows, rows.most_position),
        Index::Output(range) => {
            assert!(range.start <= range.end && range.end <= rows.n_outputs, "outputs of the batch");
            (ffi::DETOX_CUDA_OUTPUT, range.clone(), rows.n_rows.saturating_sub(1))
        }
    }
}

fn norm_kind(norm: Norm) -> ffi::detox_cuda_norm_kind {
    ffi::detox_cuda_norm_kind { is_layer: i32::from(norm.kind == NormKind::Layer), epsilon: norm.epsilon }
}

fn preference_kind(preference: Preference, n_pairs: usize) -> ffi::detox_cuda_preference {
    let loss = match preference.kind {
        LossKind::Sigmoid => ffi::DETOX_CUDA_SIGMOID,
        LossKind::Ipo => ffi::DETOX_CUDA_IPO,
        LossKind::Hinge => ffi::DETOX_CUDA_HINGE,
    };
    let Preference { beta, label_smoothing, .. } = preference;
    ffi::detox_cuda_preference { loss, beta, label_smoothing, n_pairs: n_pairs as i64 }
}

/// What the GPU found of a pair; rewards are a product each.
fn pair_loss(
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

fn activation_id(activation: Activation) -> ffi::detox_cuda_activation {
    match activation {
        Activation::Silu => ffi::DETOX_CUDA_SILU,
        Activation::Gelu => ffi::DETOX_CUDA_GELU,
    }
}

/// The kind for the extension; `slopes`, which it points to, must live as long.
fn attention_kind(attention: &Attention, slopes: &mut Vec<f32>) -> ffi::detox_cuda_attention_kind {
    let number = |n: usize| i32::try_from(n).expect("sizes of heads are small");
    if attention.max_alibi_bias != 0.0 {
        slopes.extend((0..attention.n_head).map(|head| attention.slope(head)));
    }
    // No text has so many tokens that a larger window would hide one.
    let window = attention.window.map_or(0, |window| i32::try_from(window).unwrap_or(i32::MAX));
    assert!(attention.window != Some(0), "a window without a row's own position");
    ffi::detox_cuda_attention_kind {
        n_head: number(attention.n_head),
        n_head_kv: number(attention.n_head_kv),
        head_dim: number(attention.head_dim),
        scale: attention.scale,
        window,
        slopes: if slopes.is_empty() { std::ptr::null() } else { slopes.as_ptr() },
    }
}

/// That q, k, v and what belongs to them have the lengths of their shapes.
fn check_attention(attention: &Attention, rows: &Rows, queries: &[&Buffer], keys: &[&Buffer], lse: &Buffer) {
    let n = rows.n_rows;
    assert!(queries.iter().all(|x| x.len() == n * attention.n_head * attention.head_dim), "[R][H][D]");
    assert!(keys.iter().all(|x| x.len() == n * attention.n_head_kv * attention.head_dim), "[R][K][D]");
    assert_eq!(lse.len(), n * attention.n_head, "[R][H]");
}

/// What calls of the extension are given: addresses of what belongs to this GPU.
impl Cuda {
    fn at(&self, buffer: &Buffer) -> *const f32 {
        buffer.assert_of(&self.handle);
        buffer.at()
    }

    fn at_mut(&self, buffer: &mut Buffer) -> *mut f32 {
        buffer.assert_of(&self.handle);
        buffer.at_mut()
    }

    fn address_of(&self, buffer: Option<&Buffer>) -> *const f32 {
        buffer.map_or(std::ptr::null(), |buffer| self.at(buffer))
    }

    fn address_of_mut(&self, buffer: Option<&mut Buffer>) -> *mut f32 {
        buffer.map_or(std::ptr::null_mut(), |buffer| self.at_mut(buffer))
    }

    fn rows_at(&self, rows: &Rows) -> *const ffi::detox_cuda_rows {
        rows.assert_of(&self.handle);
        rows.raw()
    }

    fn parameter(
        &self,
        gradient: &Buffer,
        mean: Option<&mut Buffer>,
        mean_square: &mut Buffer,
        value: &mut Buffer,
    ) -> ffi::detox_cuda_parameter {
        let n = gradient.len();
        let same =
            mean.as_ref().is_none_or(|mean| mean.len() == n) && mean_square.len() == n && value.len() == n;
        assert!(same, "a gradient, states and a value of one length");
        ffi::detox_cuda_parameter {
            n: n as i64,
            gradient: self.at(gradient),
            mean: self.address_of_mut(mean),
            mean_square: self.at_mut(mean_square),
            value: self.at_mut(value),
        }
    }

    fn step_rmsprop(&self, step: RmspropStep, parameters: &[ffi::detox_cuda_parameter]) -> Result<()> {
        let RmspropStep { learning_rate, alpha, epsilon, gradient_scale } = step;
        let step = ffi::detox_cuda_rmsprop_step { learning_rate, alpha, epsilon, gradient_scale };
        // SAFETY: `Cuda::parameter` has compared the lengths; the list stays during the call.
        let status = unsafe {
            ffi::detox_cuda_rmsprop(self.raw(), &step, parameters.as_ptr(), parameters.len() as i64)
        };
        self.check(status)
    }

    fn step_adamw(&self, step: AdamwStep, parameters: &[ffi::detox_cuda_parameter]) -> Result<()> {
        let AdamwStep { learning_rate, beta1, beta2, epsilon, weight_decay, step: n_steps, gradient_scale } =
            step;
        // In f64: 1 - beta2^step loses half its digits in f32 at the first steps.
        let correction1 = (1.0 - f64::from(beta1).powf(n_steps as f64)) as f32;
        let correction2 = (1.0 - f64::from(beta2).powf(n_steps as f64)).sqrt() as f32;
        let step = ffi::detox_cuda_adamw_step {
            learning_rate,
            beta1,
            beta2,
            epsilon,
            weight_decay,
            gradient_scale,
            correction1,
            correction2,
        };
        // SAFETY: `Cuda::parameter` has compared the lengths; the list stays during the call.
        let status =
            unsafe { ffi::detox_cuda_adamw(self.raw(), &step, parameters.as_ptr(), parameters.len() as i64) };
        self.check(status)
    }
}
