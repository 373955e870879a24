//! The optimizer: RMSprop or AdamW on every trained parameter.

use crate::error::Result;

use crate::train::device::{AdamwStep, Device, RmspropStep, Trained};
use crate::train::model::parameters::Parameters;
use crate::train::recipe::optimizer::OptimizerKind;

const RMSPROP_ALPHA: f32 = 0.99;
const ADAMW_BETAS: (f32, f32) = (0.9, 0.999);
const EPSILON: f32 = 1e-8;

/// An optimizer with its state.
#[derive(Debug)]
pub struct Optimizer<D: Device> {
    kind: OptimizerKind,
    weight_decay: f32,
    /// Steps done.
    pub n_steps: u64,
    /// State buffers of each parameter, `[n_parameters][n_states]`.
    pub states: Vec<Vec<D::Buffer>>,
}

impl<D: Device> Optimizer<D> {
    /// Creates an optimizer with zero state. RMSprop ignores `weight_decay`.
    ///
    /// # Errors
    /// Those of the device, such as out of memory.
    pub fn new(
        device: &D,
        kind: OptimizerKind,
        weight_decay: f32,
        parameters: &Parameters<D>,
    ) -> Result<Self> {
        let states = |shape: &[usize]| {
            (0..kind.n_states()).map(|_| device.zeros(shape.iter().product())).collect::<Result<Vec<_>>>()
        };
        let states = parameters.list().iter().map(|p| states(&p.shape)).collect::<Result<_>>()?;
        Ok(Optimizer { kind, weight_decay, n_steps: 0, states })
    }

    /// Updates every parameter from its gradient times `gradient_scale`.
    ///
    /// # Errors
    /// Those of the device.
    pub fn step(
        &mut self,
        device: &D,
        parameters: &mut Parameters<D>,
        learning_rate: f64,
        gradient_scale: f64,
    ) -> Result<()> {
        self.n_steps += 1;
        let (learning_rate, gradient_scale) = (learning_rate as f32, gradient_scale as f32);
        let all = parameters.values.iter_mut().zip(&parameters.gradients).zip(&mut self.states);
        let mut all: Vec<Trained<'_, D::Buffer>> =
            all.map(|((value, gradient), states)| Trained { gradient, states, value }).collect();
        match self.kind {
            OptimizerKind::Rmsprop => {
                let step =
                    RmspropStep { learning_rate, alpha: RMSPROP_ALPHA, epsilon: EPSILON, gradient_scale };
                device.rmsprop_all(step, &mut all)
            }
            OptimizerKind::Adamw => {
                let step = AdamwStep {
                    learning_rate,
                    beta1: ADAMW_BETAS.0,
                    beta2: ADAMW_BETAS.1,
                    epsilon: EPSILON,
                    weight_decay: self.weight_decay,
                    step: self.n_steps,
                    gradient_scale,
                };
                device.adamw_all(step, &mut all)
            }
        }
    }
}
