//! Optimizers and learning rates.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::Result;

use crate::train::device::{AdamwStep, Device, RmspropStep, Trained};
use crate::train::model::parameters::Parameters;

/// Which optimizer, with PyTorch's defaults.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// The paper's: smoothing 0.99, no momentum.
    Rmsprop,
    /// Betas 0.9 and 0.999.
    Adamw,
}

impl OptimizerKind {
    /// As users type it.
    pub fn name(self) -> &'static str {
        match self {
            OptimizerKind::Rmsprop => "rmsprop",
            OptimizerKind::Adamw => "adamw",
        }
    }

    /// Numbers that are kept for each number that is trained.
    pub(super) fn n_states(self) -> usize {
        match self {
            OptimizerKind::Rmsprop => 1,
            OptimizerKind::Adamw => 2,
        }
    }
}

impl FromStr for OptimizerKind {
    type Err = String;

    fn from_str(text: &str) -> Result<OptimizerKind, String> {
        let all = [OptimizerKind::Rmsprop, OptimizerKind::Adamw];
        let found = all.into_iter().find(|kind| kind.name() == text);
        found.ok_or_else(|| format!("expected rmsprop or adamw, found {text:?}"))
    }
}

const RMSPROP_ALPHA: f32 = 0.99;
const ADAMW_BETAS: (f32, f32) = (0.9, 0.999);
const EPSILON: f32 = 1e-8;

/// An optimizer with its state.
#[derive(Debug)]
pub struct Optimizer<D: Device> {
    kind: OptimizerKind,
    weight_decay: f32,
    /// Steps so far.
    pub n_steps: u64,
    /// For each parameter its states, `[parameters][states]`.
    pub states: Vec<Vec<D::Buffer>>,
}

impl<D: Device> Optimizer<D> {
    /// Without any history. Weight decay is AdamW's.
    ///
    /// # Errors
    /// Of the device: memory.
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

    /// One step against the gradients, each multiplied by `gradient_scale` first.
    ///
    /// # Errors
    /// Of the device.
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

/// How the learning rate goes after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleKind {
    /// As it is.
    Constant,
    /// Down to 0 at the last step, along a line.
    Linear,
    /// Down to 0 at the last step, along half a cosine.
    Cosine,
}

impl ScheduleKind {
    /// As users type it.
    pub fn name(self) -> &'static str {
        match self {
            ScheduleKind::Constant => "constant",
            ScheduleKind::Linear => "linear",
            ScheduleKind::Cosine => "cosine",
        }
    }
}

impl FromStr for ScheduleKind {
    type Err = String;

    fn from_str(text: &str) -> Result<ScheduleKind, String> {
        let all = [ScheduleKind::Constant, ScheduleKind::Linear, ScheduleKind::Cosine];
        let found = all.into_iter().find(|kind| kind.name() == text);
        found.ok_or_else(|| format!("expected constant, linear or cosine, found {text:?}"))
    }
}

/// Learning rates, as transformers' schedulers of the same names count them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// How it goes on after the warm-up.
    pub kind: ScheduleKind,
    /// The highest learning rate.
    pub learning_rate: f64,
    /// Steps from 0 up to it; the first step has 0 itself.
    pub warmup_steps: u64,
    /// Steps in all.
    pub n_steps: u64,
}

impl Schedule {
    /// The learning rate of step `step`, from 0.
    pub fn at(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.learning_rate * step as f64 / self.warmup_steps as f64;
        }
        let n = self.n_steps.saturating_sub(self.warmup_steps).max(1) as f64;
        let done = ((step - self.warmup_steps) as f64 / n).min(1.0);
        self.learning_rate
            * match self.kind {
                ScheduleKind::Constant => 1.0,
                ScheduleKind::Linear => 1.0 - done,
                ScheduleKind::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn learning_rates_warm_up_along_a_line_and_then_go_as_their_schedule_says() {
        let schedule = |kind| Schedule { kind, learning_rate: 2.0, warmup_steps: 4, n_steps: 12 };
        let rates =
            |kind, steps: &[u64]| -> Vec<f64> { steps.iter().map(|&s| schedule(kind).at(s)).collect() };
        assert_eq!(rates(ScheduleKind::Constant, &[0, 1, 3, 4, 11]), [0.0, 0.5, 1.5, 2.0, 2.0]);
        // Half of the eight steps after the warm-up.
        assert_eq!(rates(ScheduleKind::Linear, &[4, 8, 12, 20]), [2.0, 1.0, 0.0, 0.0]);
        let cosine = rates(ScheduleKind::Cosine, &[4, 8, 12]);
        assert!(cosine.iter().zip([2.0, 1.0, 0.0]).all(|(a, b)| (a - b).abs() < 1e-12), "{cosine:?}");
    }

    #[test]
    fn without_a_warm_up_the_first_step_has_the_whole_rate() {
        let kind = ScheduleKind::Constant;
        assert_eq!(Schedule { kind, learning_rate: 3.0, warmup_steps: 0, n_steps: 1 }.at(0), 3.0);
    }
}
