//! The lines of `metrics.jsonl`, one per step, evaluation and placement, with TRL's metric names.

use serde::{Deserialize, Serialize};

use crate::train::device::name::{DeviceName, Frozen};
use crate::train::recipe::dpo::{AnswerLogps, PairLoss};

/// Means of DPO metrics over pairs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct PairMeans {
    /// DPO loss.
    pub loss: f64,
    /// Chosen reward: beta (policy log-prob - reference log-prob).
    #[serde(rename = "rewards/chosen")]
    pub rewards_chosen: f64,
    /// Rejected reward: beta (policy log-prob - reference log-prob).
    #[serde(rename = "rewards/rejected")]
    pub rewards_rejected: f64,
    /// Margin: chosen reward - rejected reward.
    #[serde(rename = "rewards/margins")]
    pub rewards_margins: f64,
    /// Reward accuracy: fraction of pairs with a margin above 0.
    #[serde(rename = "rewards/accuracies")]
    pub rewards_accuracies: f64,
    /// Log-prob of the chosen answer under the policy, summed over its tokens, in nats.
    #[serde(rename = "logps/chosen")]
    pub logps_chosen: f64,
    /// Log-prob of the rejected answer under the policy, summed over its tokens, in nats.
    #[serde(rename = "logps/rejected")]
    pub logps_rejected: f64,
}

impl PairMeans {
    /// The means over `pairs`; zeros if there are none.
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

/// One optimizer step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Number of the step, from 1.
    pub step: u64,
    /// Epochs so far.
    pub epoch: f64,
    /// Means over the step's pairs, before the update.
    #[serde(flatten)]
    pub means: PairMeans,
    /// Gradient norm before clipping.
    pub grad_norm: f64,
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Wall-clock seconds.
    pub step_seconds: f64,
    /// Tokens processed, counting each prompt once.
    pub tokens: u64,
    /// Pairs processed.
    pub pairs: u64,
    /// Positions of these pairs among all pairs read, from 0, in the order used. Empty in older files.
    #[serde(default)]
    pub pair_indices: Vec<usize>,
}

/// One evaluation on the held-out pairs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct EvaluationRecord {
    /// Steps so far.
    pub step: u64,
    /// Mean DPO loss over the held-out pairs.
    pub eval_loss: f64,
    /// As `rewards/chosen`, over the held-out pairs.
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
    /// The record of an evaluation after `step` steps.
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

/// The placement of a run from some step on: device, pass size, checkpointing, and storage of frozen weights.
///
/// It decides memory use and speed. Changing it on a GPU changes results only by rounding. On the CPU only
/// `checkpointing` can change, and results stay the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlacementRecord {
    /// Steps so far.
    pub step: u64,
    /// The device. Another GPU model may differ in the last bits.
    #[serde(default)]
    pub device: DeviceName,
    /// Maximum tokens per pass.
    pub max_rows: usize,
    /// Gradient checkpointing: whether the backward pass recomputes activations.
    pub checkpointing: bool,
    /// Storage of frozen matrices in GPU memory; `None` on the CPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frozen: Option<Frozen>,
    /// Whether it was chosen because memory ran out.
    pub out_of_memory: bool,
}

impl PlacementRecord {
    /// The placement alone, without the step and the reason.
    pub fn choice(&self) -> (DeviceName, usize, bool, Option<Frozen>) {
        (self.device, self.max_rows, self.checkpointing, self.frozen)
    }

    /// The placement for messages: "512 tokens per pass, weights in bf16".
    pub fn in_words(&self) -> String {
        let tokens = match self.max_rows {
            1 => "1 token per pass".to_owned(),
            n => format!("{n} tokens per pass"),
        };
        let frozen = self.frozen.map_or(String::new(), |frozen| format!(", weights in {}", frozen.place()));
        let recomputed = if self.checkpointing { ", activations recomputed" } else { "" };
        tokens + &frozen + recomputed
    }
}

/// A line of `metrics.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Record {
    /// An evaluation.
    Evaluation(EvaluationRecord),
    /// A step.
    Step(StepRecord),
    /// A placement. On a GPU the first one and every change are recorded, on the CPU only changes after memory ran out.
    Placement(PlacementRecord),
}
