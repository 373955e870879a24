//! All settings that decide the outcome of a training run.

use serde::{Deserialize, Serialize};

use crate::engine::options::check_threads;
use crate::error::{Error, Result};

use crate::train::device::name::{DeviceName, Frozen, Rounding};
use crate::train::recipe::dpo::{LossKind, Preference};
use crate::train::recipe::limits::Limits;
use crate::train::recipe::lora::LoraOptions;
use crate::train::recipe::method::{Method, MethodName};
use crate::train::recipe::optimizer::OptimizerKind;
use crate::train::recipe::products::Products;
use crate::train::recipe::schedule::{Schedule, ScheduleKind};
use crate::train::recipe::step::StepOptions;

/// Settings that on a GPU affect only memory and speed: splitting a step into passes changes the order in which
/// gradients are summed, weights round to the same bf16 values before a product as at load time, and CPU threads
/// compute nothing.
const PLACEMENT_SETTINGS: [&str; 3] = ["n_threads", "max_rows", "frozen"];

/// All settings of a run. The same settings, model and pairs produce the same bytes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// What is trained.
    pub method: MethodName,
    /// LoRA rank.
    pub rank: usize,
    /// LoRA alpha: the update is scaled by alpha / rank.
    pub alpha: f32,
    /// LoRA targets.
    pub targets: Vec<String>,
    /// The loss.
    pub loss: LossKind,
    /// DPO temperature: higher values keep the policy closer to the reference.
    pub beta: f64,
    /// Assumed share of pairs with swapped labels.
    pub label_smoothing: f64,
    /// The optimizer.
    pub optimizer: OptimizerKind,
    /// Weight decay; AdamW only.
    pub weight_decay: f32,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Steps of linear warm-up to the peak learning rate.
    pub warmup_steps: u64,
    /// Learning-rate schedule after the warm-up.
    pub schedule: ScheduleKind,
    /// Maximum gradient norm, for clipping.
    pub max_grad_norm: f64,
    /// Pairs per step.
    pub batch_size: usize,
    /// Passes over the training pairs.
    pub epochs: u32,
    /// Maximum number of steps; overrides `epochs` if smaller.
    pub max_steps: Option<u64>,
    /// Steps between two evaluations on the held-out pairs; each also saves a checkpoint.
    pub eval_every: u64,
    /// Share of pairs held out for evaluation.
    pub held_out: f64,
    /// Early stopping: evaluations without a lower held-out loss before the run ends.
    pub patience: u32,
    /// Tokens kept of a prompt that has to be truncated.
    pub max_prompt: usize,
    /// Maximum tokens of prompt and answer together.
    pub max_length: usize,
    /// Whether answers end with the end-of-text token.
    pub append_eos: bool,
    /// Whether texts are normalised to Unicode NFC before they are tokenised.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub nfc: bool,
    /// Precision of the CPU's products with frozen matrices.
    pub products: Products,
    /// CPU threads. Sums are split among them, so their number affects the last bits.
    pub n_threads: usize,
    /// Maximum tokens in one forward pass.
    pub max_rows: usize,
    /// Seeds the held-out split, the order of pairs, and the initial LoRA values.
    pub seed: u64,
    /// The device that trains.
    #[serde(default, skip_serializing_if = "DeviceName::is_cpu")]
    pub device: DeviceName,
    /// Storage of frozen matrices in GPU memory; `None` on the CPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frozen: Option<Frozen>,
}

/// The settings that must match for a run to resume.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub enum Identity<'a> {
    /// All settings.
    All(&'a Settings),
    /// A subset.
    Chosen(serde_json::Value),
}

impl Settings {
    /// The paper's recipe (arXiv 2406.16235, table 6 and its released scripts), on one CPU thread.
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
            nfc: false,
            products: Products::Exact,
            n_threads: 1,
            max_rows: 512,
            seed: 0,
            device: DeviceName::Cpu,
            frozen: None,
        }
    }

    /// Checks that every setting is in its range.
    ///
    /// # Errors
    /// [`Error::Setting`] for the first one that is not.
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
            ("--ubatch-size", self.max_rows as u64),
        ];
        for (flag, found) in from_one {
            if found == 0 {
                return Err(Error::setting(flag, "expected at least 1, found 0"));
            }
        }
        check_threads("-t/--threads", self.n_threads)?;
        if !(0.0..1.0).contains(&self.held_out) {
            let reason = format!("expected a fraction from 0 to less than 1, found {}", self.held_out);
            return Err(Error::setting("--held-out", reason));
        }
        if !(0.0..0.5).contains(&self.label_smoothing) {
            let reason =
                format!("expected a fraction from 0 to less than 0.5, found {}", self.label_smoothing);
            return Err(Error::setting("--label-smoothing", reason));
        }
        if self.label_smoothing > 0.0 && self.loss != LossKind::Sigmoid {
            let reason = format!("the {} loss does not support it", self.loss.name());
            return Err(Error::setting("--label-smoothing", reason));
        }
        if !(self.weight_decay.is_finite() && self.weight_decay >= 0.0) {
            let reason = format!("expected a number from 0 up, found {}", self.weight_decay);
            return Err(Error::setting("--weight-decay", reason));
        }
        if self.weight_decay > 0.0 && self.optimizer != OptimizerKind::Adamw {
            return Err(Error::setting("--weight-decay", "only AdamW supports it"));
        }
        self.limits().validate()
    }

    /// The settings that must match for a run to resume, as stored in `run.json`.
    ///
    /// On the CPU these are all settings. A run on a GPU may resume with another placement or on another GPU, because
    /// free memory may have changed and results then differ only by rounding.
    pub fn identity(&self) -> Identity<'_> {
        if self.device.is_cpu() {
            return Identity::All(self);
        }
        let mut settings = serde_json::to_value(self).expect("settings are plain data");
        let all = settings.as_object_mut().expect("settings have names");
        PLACEMENT_SETTINGS.iter().for_each(|name| drop(all.remove(*name)));
        all.insert("device".into(), "cuda".into());
        Identity::Chosen(settings)
    }

    /// Length limits of the pairs.
    pub fn limits(&self) -> Limits {
        Limits { max_prompt: self.max_prompt, max_length: self.max_length, append_eos: self.append_eos }
    }

    /// The training method with its options.
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

    /// How the device rounds the operands of products.
    pub fn rounding(&self) -> Rounding {
        match (self.device, self.products) {
            (DeviceName::Cuda(_), _) => Rounding::Bf16,
            (DeviceName::Cpu, Products::Fast) => Rounding::Bytes,
            (DeviceName::Cpu, Products::Exact) => Rounding::Nothing,
        }
    }

    /// Options of each step, without checkpointing.
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

    /// Steps per epoch over `n_pairs` training pairs.
    pub fn steps_per_epoch(&self, n_pairs: usize) -> u64 {
        n_pairs.div_ceil(self.batch_size) as u64
    }

    /// Steps of the whole run over `n_pairs` training pairs.
    pub fn n_steps(&self, n_pairs: usize) -> u64 {
        let all = u64::from(self.epochs) * self.steps_per_epoch(n_pairs);
        all.min(self.max_steps.unwrap_or(u64::MAX))
    }

    /// The learning-rate schedule of a run of `n_steps` steps.
    pub fn schedule(&self, n_steps: u64) -> Schedule {
        let Settings { schedule: kind, learning_rate, warmup_steps, .. } = *self;
        Schedule { kind, learning_rate, warmup_steps, n_steps }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_run_resumes_with_another_placement_but_not_with_another_recipe() {
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
        assert_ne!(text(&cpu), text(&placed), "threads and passes affect the last bits on the CPU");
        let other = Settings { rank: 3, ..Settings::paper() };
        assert_ne!(text(&gpu(cpu)), text(&gpu(other)));
    }
}
