//! Everything that decides what a run of training does.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

use crate::train::data::tokens::Limits;
use crate::train::device::cpu::Products;
use crate::train::device::name::Rounding;
use crate::train::device::name::{DeviceName, Frozen};
use crate::train::model::lora::LoraOptions;
use crate::train::model::transformer::Method;
use crate::train::recipe::dpo::{LossKind, Preference};
use crate::train::recipe::method::MethodName;
use crate::train::run::optimizer::{OptimizerKind, Schedule, ScheduleKind};
use crate::train::run::trainer::StepOptions;

/// Settings that on a GPU decide memory and speed alone: how a step's pairs are shared out among passes changes the order
/// in which gradients are added up, weights are rounded to the same bf16 before a product or at the start, and threads of
/// the CPU compute nothing there.
const OF_PLACEMENT: [&str; 3] = ["n_threads", "max_rows", "frozen"];

/// Everything that decides what a run does; two runs with the same settings, model and pairs write the same
/// bytes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// What is trained.
    pub method: MethodName,
    /// Of low-rank changes.
    pub rank: usize,
    /// Low-rank changes are multiplied by alpha / rank.
    pub alpha: f32,
    /// Matrices that are changed.
    pub targets: Vec<String>,
    /// What is made small.
    pub loss: LossKind,
    /// How much the policy is held to the reference.
    pub beta: f64,
    /// Share of pairs whose labels are taken to be swapped.
    pub label_smoothing: f64,
    /// Which optimizer.
    pub optimizer: OptimizerKind,
    /// AdamW's.
    pub weight_decay: f32,
    /// The highest learning rate.
    pub learning_rate: f64,
    /// Steps up to it.
    pub warmup_steps: u64,
    /// How it goes on.
    pub schedule: ScheduleKind,
    /// Gradients are cut to this norm.
    pub max_grad_norm: f64,
    /// Pairs in a step.
    pub batch_size: usize,
    /// Passes through the pairs.
    pub epochs: u32,
    /// At most so many steps.
    pub max_steps: Option<u64>,
    /// Steps from one look at the held-out pairs, and from one checkpoint, to the next.
    pub eval_every: u64,
    /// Share of pairs that are held out.
    pub held_out: f64,
    /// Looks without a better loss after which a run ends.
    pub patience: u32,
    /// Most tokens of a prompt where it must be cut.
    pub max_prompt: usize,
    /// Most tokens of a prompt with its answer.
    pub max_length: usize,
    /// Whether answers end with the end-of-text token.
    pub append_eos: bool,
    /// How products with frozen matrices are computed.
    pub products: Products,
    /// Threads; sums are shared out by them, so they decide the last bits.
    pub n_threads: usize,
    /// Most tokens in one pass.
    pub max_rows: usize,
    /// Of the split, the order of pairs, and the first numbers of low-rank changes.
    pub seed: u64,
    /// Where it is computed.
    #[serde(default, skip_serializing_if = "DeviceName::is_cpu")]
    pub device: DeviceName,
    /// How frozen matrices lie in a GPU's memory; none on the CPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frozen: Option<Frozen>,
}

/// Settings that make two runs the same one.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub enum Identity<'a> {
    /// Each of them.
    All(&'a Settings),
    /// Some of them.
    Chosen(serde_json::Value),
}

impl Settings {
    /// The paper's recipe (arXiv 2406.16235, table 6 and its released scripts), on one thread.
    pub fn paper() -> Settings {
        let lora = LoraOptions::default();
        let limits = Limits::default();
        Settings {
            method: MethodName::Lora,
            rank: lora.rank,
            alpha: lora.alpha,
            targets: lora.targets,
            loss: LossKind::Sigmoid,
            beta: 0.1,
            label_smoothing: 0.0,
            optimizer: OptimizerKind::Rmsprop,
            weight_decay: 0.0,
            learning_rate: 1e-5,
            warmup_steps: 150,
            schedule: ScheduleKind::Constant,
            max_grad_norm: 10.0,
            batch_size: 4,
            epochs: 5,
            max_steps: None,
            eval_every: 25,
            held_out: 0.05,
            patience: 10,
            max_prompt: limits.max_prompt,
            max_length: limits.max_length,
            append_eos: limits.append_eos,
            products: Products::Exact,
            n_threads: 1,
            max_rows: 512,
            seed: 0,
            device: DeviceName::Cpu,
            frozen: None,
        }
    }

    /// Whether every number is in its range.
    ///
    /// # Errors
    /// [`Error::Setting`].
    pub fn validate(&self) -> Result<()> {
        let positive = [
            ("--learning-rate", self.learning_rate),
            ("--beta", self.beta),
            ("--max-grad-norm", self.max_grad_norm),
        ];
        for (flag, found) in positive {
            if !(found.is_finite() && found > 0.0) {
                return Err(Error::setting(flag, format!("expected a positive number, found {found}")));
            }
        }
        let from_one = [
            ("--batch-size", self.batch_size as u64),
            ("--epochs", u64::from(self.epochs)),
            ("--max-steps", self.max_steps.unwrap_or(1)),
            ("--eval-every", self.eval_every),
            ("--patience", u64::from(self.patience)),
            ("-t/--threads", self.n_threads as u64),
            ("--ubatch-size", self.max_rows as u64),
        ];
        for (flag, found) in from_one {
            if found == 0 {
                return Err(Error::setting(flag, "expected a number from 1 up, found 0"));
            }
        }
        if !(0.0..1.0).contains(&self.held_out) {
            let reason = format!("expected a share from 0 up to 1, found {}", self.held_out);
            return Err(Error::setting("--held-out", reason));
        }
        if !(0.0..0.5).contains(&self.label_smoothing) {
            let reason = format!("expected a share from 0 up to 0.5, found {}", self.label_smoothing);
            return Err(Error::setting("--label-smoothing", reason));
        }
        if self.label_smoothing > 0.0 && self.loss != LossKind::Sigmoid {
            let reason = format!("the {} loss has none", self.loss.name());
            return Err(Error::setting("--label-smoothing", reason));
        }
        if !(self.weight_decay.is_finite() && self.weight_decay >= 0.0) {
            let reason = format!("expected a number from 0 up, found {}", self.weight_decay);
            return Err(Error::setting("--weight-decay", reason));
        }
        if self.weight_decay > 0.0 && self.optimizer != OptimizerKind::Adamw {
            return Err(Error::setting("--weight-decay", "only AdamW has one"));
        }
        self.limits().validate()
    }

    /// What a run that goes on must have been begun with, for `run.json`. On the CPU that is everything; on a GPU it may
    /// be placed otherwise then, also on another one, since what memory suffices for may have changed, and numbers change
    /// by their rounding alone.
    pub fn identity(&self) -> Identity<'_> {
        if self.device.is_cpu() {
            return Identity::All(self);
        }
        let mut settings = serde_json::to_value(self).expect("settings are plain data");
        let all = settings.as_object_mut().expect("settings have names");
        OF_PLACEMENT.iter().for_each(|name| drop(all.remove(*name)));
        all.insert("device".into(), "cuda".into());
        Identity::Chosen(settings)
    }

    /// How long texts may be.
    pub fn limits(&self) -> Limits {
        Limits { max_prompt: self.max_prompt, max_length: self.max_length, append_eos: self.append_eos }
    }

    /// What is trained.
    pub fn method(&self) -> Method {
        match self.method {
            MethodName::Lora => Method::Lora(LoraOptions {
                rank: self.rank,
                alpha: self.alpha,
                targets: self.targets.clone(),
            }),
            MethodName::Vector => Method::Vector,
            MethodName::Full => Method::Full,
        }
    }

    /// What products round.
    pub fn rounding(&self) -> Rounding {
        match (self.device, self.products) {
            (DeviceName::Cuda(_), _) => Rounding::Bf16,
            (DeviceName::Cpu, Products::Fast) => Rounding::Bytes,
            (DeviceName::Cpu, Products::Exact) => Rounding::Nothing,
        }
    }

    /// How steps are made.
    pub fn step_options(&self) -> StepOptions {
        StepOptions {
            preference: Preference {
                kind: self.loss,
                beta: self.beta,
                label_smoothing: self.label_smoothing,
            },
            optimizer: self.optimizer,
            weight_decay: self.weight_decay,
            max_rows: self.max_rows,
            checkpointing: false,
        }
    }

    /// Steps in a pass through `n_pairs` pairs.
    pub fn steps_per_epoch(&self, n_pairs: usize) -> u64 {
        n_pairs.div_ceil(self.batch_size) as u64
    }

    /// Steps of a whole run with `n_pairs` pairs.
    pub fn n_steps(&self, n_pairs: usize) -> u64 {
        let all = u64::from(self.epochs) * self.steps_per_epoch(n_pairs);
        all.min(self.max_steps.unwrap_or(u64::MAX))
    }

    /// Learning rates of a run of `n_steps` steps.
    pub fn schedule(&self, n_steps: u64) -> Schedule {
        let Settings { schedule: kind, learning_rate, warmup_steps, .. } = *self;
        Schedule { kind, learning_rate, warmup_steps, n_steps }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_decides_memory_and_speed_alone_is_no_part_of_a_run_on_a_gpu() {
        let text = |settings: &Settings| serde_json::to_string(&settings.identity()).unwrap();
        let cpu = Settings::paper();
        assert_eq!(text(&cpu), serde_json::to_string(&cpu).unwrap());
        let gpu = |settings: Settings| Settings {
            device: DeviceName::Cuda(0),
            frozen: Some(Frozen::Bf16),
            ..settings
        };
        let placed = Settings { max_rows: 64, n_threads: 3, ..Settings::paper() };
        let in_blocks = Settings { frozen: Some(Frozen::Quantised), ..gpu(placed.clone()) };
        assert_eq!(text(&gpu(cpu.clone())), text(&in_blocks));
        let on_another = Settings { device: DeviceName::Cuda(1), ..gpu(cpu.clone()) };
        assert_eq!(text(&gpu(cpu.clone())), text(&on_another));
        assert!(text(&on_another).contains("\"device\":\"cuda\""));
        assert_ne!(text(&cpu), text(&placed), "threads and passes decide the CPU's last bits");
        let other = Settings { rank: 3, ..Settings::paper() };
        assert_ne!(text(&gpu(cpu)), text(&gpu(other)));
    }
}
