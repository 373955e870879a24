//! Steps of the optimizers over many tensors in one call, and the gradient's norm.

use crate::error::Result;

use crate::train::device::cuda::memory::Buffer;
use crate::train::device::cuda::{Cuda, ffi};
use crate::train::device::{AdamwStep, RmspropStep};

impl Cuda {
    /// A tensor with its gradient and states, as the extension takes it.
    pub(super) fn parameter(
        &self,
        gradient: &Buffer,
        mean: Option<&mut Buffer>,
        mean_square: &mut Buffer,
        value: &mut Buffer,
    ) -> ffi::detox_cuda_parameter {
        let n = gradient.len();
        let same =
            mean.as_ref().is_none_or(|mean| mean.len() == n) && mean_square.len() == n && value.len() == n;
        assert!(same, "gradient, states and value have one length");
        ffi::detox_cuda_parameter {
            n: n as i64,
            gradient: self.at(gradient),
            mean: self.address_of_mut(mean),
            mean_square: self.at_mut(mean_square),
            value: self.at_mut(value),
        }
    }

    pub(super) fn step_rmsprop(
        &self,
        step: RmspropStep,
        parameters: &[ffi::detox_cuda_parameter],
    ) -> Result<()> {
        let RmspropStep { learning_rate, alpha, epsilon, gradient_scale } = step;
        let step = ffi::detox_cuda_rmsprop_step { learning_rate, alpha, epsilon, gradient_scale };
        // SAFETY: `Cuda::parameter` has compared the lengths; the list lives during the call.
        let status = unsafe {
            ffi::detox_cuda_rmsprop(self.raw(), &step, parameters.as_ptr(), parameters.len() as i64)
        };
        self.check(status)
    }

    pub(super) fn step_adamw(&self, step: AdamwStep, parameters: &[ffi::detox_cuda_parameter]) -> Result<()> {
        let AdamwStep { learning_rate, beta1, beta2, epsilon, weight_decay, step: n_steps, gradient_scale } =
            step;
        // In f64: at the first steps, 1 - beta2^step loses half its digits in f32.
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
        // SAFETY: `Cuda::parameter` has compared the lengths; the list lives during the call.
        let status =
            unsafe { ffi::detox_cuda_adamw(self.raw(), &step, parameters.as_ptr(), parameters.len() as i64) };
        self.check(status)
    }

    pub(super) fn sum_of_squares(&self, all: &[Buffer]) -> Result<f64> {
        let addresses: Vec<*const f32> = all.iter().map(|x| self.at(x)).collect();
        let lengths: Vec<i64> = all.iter().map(|x| x.len() as i64).collect();
        let (n, mut sum) = (all.len() as i64, 0.0);
        // SAFETY: an address and a length for each buffer; writes one number.
        let status = unsafe {
            ffi::detox_cuda_square_sum(self.raw(), addresses.as_ptr(), lengths.as_ptr(), n, &mut sum)
        };
        self.check(status)?;
        Ok(sum)
    }
}
