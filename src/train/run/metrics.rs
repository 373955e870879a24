//! What a run writes of itself, a line for each step and each evaluation, under TRL's names.

use serde::{Deserialize, Serialize};

use crate::train::device::name::{DeviceName, Frozen};
use crate::train::recipe::dpo::{AnswerLogps, PairLoss};

/// Means over pairs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct PairMeans {
    /// The loss.
    pub loss: f64,
    /// beta (policy - reference) of chosen answers.
    #[serde(rename = "rewards/chosen")]
    pub rewards_chosen: f64,
    /// beta (policy - reference) of rejected answers.
    #[serde(rename = "rewards/rejected")]
    pub rewards_rejected: f64,
    /// The former less the latter.
    #[serde(rename = "rewards/margins")]
    pub rewards_margins: f64,
    /// Share of pairs whose margin is above 0.
    #[serde(rename = "rewards/accuracies")]
    pub rewards_accuracies: f64,
    /// Summed log-probabilities of chosen answers under the policy, in nats.
    #[serde(rename = "logps/chosen")]
    pub logps_chosen: f64,
    /// Summed log-probabilities of rejected answers under the policy, in nats.
    #[serde(rename = "logps/rejected")]
    pub logps_rejected: f64,
}

impl PairMeans {
    /// The means over `pairs`; zeros where there is none.
    pub fn of(pairs: &[(AnswerLogps, PairLoss)]) -> PairMeans {
        let n = pairs.len().max(1) as f64;
        let mean = |of: &dyn Fn(&(AnswerLogps, PairLoss)) -> f64| pairs.iter().map(of).sum::<f64>() / n;
        PairMeans {
            loss: mean(&|p| p.1.loss),
            rewards_chosen: mean(&|p| p.1.chosen_reward),
            rewards_rejected: mean(&|p| p.1.rejected_reward),
            rewards_margins: mean(&|p| p.1.margin()),
            rewards_accuracies: mean(&|p| f64::from(p.1.margin() > 0.0)),
            logps_chosen: mean(&|p| p.0.chosen),
            logps_rejected: mean(&|p| p.0.rejected),
        }
    }
}

/// One step of the optimizer.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// From 1.
    pub step: u64,
    /// Passes through the pairs so far.
    pub epoch: f64,
    /// Over the step's pairs, before it was made.
    #[serde(flatten)]
    pub means: PairMeans,
    /// Norm of the gradient, before it was cut.
    pub grad_norm: f64,
    /// Of this step.
    pub learning_rate: f64,
    /// Wall-clock time of the step.
    pub step_seconds: f64,
    /// Tokens that the step read: each prompt once.
    pub tokens: u64,
    /// Pairs of the step.
    pub pairs: u64,
}

/// One look at the held-out pairs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct EvaluationRecord {
    /// Steps so far.
    pub step: u64,
    /// The loss, over the held-out pairs.
    pub eval_loss: f64,
    /// As `rewards/chosen`.
    #[serde(rename = "eval_rewards/chosen")]
    pub rewards_chosen: f64,
    /// As `rewards/rejected`.
    #[serde(rename = "eval_rewards/rejected")]
    pub rewards_rejected: f64,
    /// As `rewards/margins`.
    #[serde(rename = "eval_rewards/margins")]
    pub rewards_margins: f64,
    /// As `rewards/accuracies`.
    #[serde(rename = "eval_rewards/accuracies")]
    pub rewards_accuracies: f64,
    /// As `logps/chosen`.
    #[serde(rename = "eval_logps/chosen")]
    pub logps_chosen: f64,
    /// As `logps/rejected`.
    #[serde(rename = "eval_logps/rejected")]
    pub logps_rejected: f64,
}

impl EvaluationRecord {
    /// After `step` steps.
    pub fn new(step: u64, means: PairMeans) -> EvaluationRecord {
        EvaluationRecord {
            step,
            eval_loss: means.loss,
            rewards_chosen: means.rewards_chosen,
            rewards_rejected: means.rewards_rejected,
            rewards_margins: means.rewards_margins,
            rewards_accuracies: means.rewards_accuracies,
            logps_chosen: means.logps_chosen,
            logps_rejected: means.logps_rejected,
        }
    }
}

/// What decides how much memory a run takes, and how fast it is, from some step on: on a GPU it changes numbers by their
/// rounding alone, and on the CPU, where only `checkpointing` may change, none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlacementRecord {
    /// Steps so far.
    pub step: u64,
    /// Where they were made: another card may compute other last bits.
    #[serde(default)]
    pub device: DeviceName,
    /// Most tokens in one pass.
    pub max_rows: usize,
    /// Whether activations are made again in the backward pass.
    pub checkpointing: bool,
    /// How frozen matrices lie in a GPU's memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frozen: Option<Frozen>,
    /// Whether it was chosen because memory had run out.
    pub out_of_memory: bool,
}

impl PlacementRecord {
    /// What was chosen, whenever and why.
    pub fn choice(&self) -> (DeviceName, usize, bool, Option<Frozen>) {
        (self.device, self.max_rows, self.checkpointing, self.frozen)
    }

    /// What was chosen, for people.
    pub fn in_words(&self) -> String {
        let tokens = match self.max_rows {
            1 => "1 token at once".to_owned(),
            n => format!("{n} tokens at once"),
        };
        let frozen = self.frozen.map_or(String::new(), |frozen| format!(", weights in {}", frozen.place()));
        let twice = if self.checkpointing { ", activations computed twice" } else { "" };
        tokens + &frozen + twice
    }
}

/// A line of `metrics.jsonl`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Record {
    /// Of the held-out pairs.
    Evaluation(EvaluationRecord),
    /// Of a step.
    Step(StepRecord),
    /// Of a choice: on a GPU the first one and every other one since, on the CPU those after memory ran out.
    Placement(PlacementRecord),
}
