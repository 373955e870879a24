//! `train`: trains a GGUF model with DPO, and writes a GGUF file.

mod compute;

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use clap::{Args, ValueEnum};

use crate::error::Result;
use crate::file::output::{FolderKind, Paths};
use crate::study::train::{TrainRequest, train};
use crate::train::data::preference_pair::PairColumns;
use crate::train::recipe::dpo::LossKind;
use crate::train::recipe::lora::LoraOptions;
use crate::train::recipe::method::MethodName;
use crate::train::recipe::optimizer::OptimizerKind;
use crate::train::recipe::schedule::ScheduleKind;
use crate::train::recipe::settings::Settings;

use super::progress::Shown;
use super::{may_colour, print};

use compute::{ComputeArguments, DeviceArguments};

/// Arguments of `train`.
#[derive(Debug, Args)]
pub struct TrainCommand {
    /// Model (GGUF)
    #[arg(short, long, value_name = "FILE")]
    model: PathBuf,
    /// Preference pairs: JSON or a table with prompt, chosen and rejected, or a folder of .jsonl files [default: built-in
    /// pairs]
    #[arg(long, value_name = "PATH")]
    pairs: Option<PathBuf>,
    #[command(flatten)]
    columns: ColumnArguments,
    /// Folder for the result, checkpoints and report. Interrupted? Run the same command again
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Also write the adapter before the first step (initial.gguf), to replay the run elsewhere
    #[arg(long)]
    save_initial: bool,
    /// What to train
    #[arg(long, value_enum, default_value = "lora")]
    method: MethodArgument,
    #[command(flatten)]
    lora: LoraArguments,
    #[command(flatten)]
    recipe: RecipeArguments,
    #[command(flatten)]
    compute: ComputeArguments,
    #[command(flatten)]
    device: DeviceArguments,
}

/// `lora`, `vector` or `full`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum MethodArgument {
    /// A LoRA adapter
    Lora,
    /// A control vector: one direction per layer
    Vector,
    /// Every weight of an F32, F16 or BF16 model
    Full,
}

/// Names of the columns of pairs. Only a file that has other than the usual names needs them.
#[derive(Debug, Args)]
struct ColumnArguments {
    /// Column with the prompt [default: prompt, question, instruction or similar]
    #[arg(long, value_name = "NAME", requires = "pairs")]
    prompt_column: Option<String>,
    /// Column with the preferred answer [default: chosen or similar]
    #[arg(long, value_name = "NAME", requires = "pairs")]
    chosen_column: Option<String>,
    /// Column with the answer to avoid [default: rejected or similar]
    #[arg(long, value_name = "NAME", requires = "pairs")]
    rejected_column: Option<String>,
}

impl ColumnArguments {
    fn columns(&self) -> PairColumns {
        PairColumns {
            prompt: self.prompt_column.clone(),
            chosen: self.chosen_column.clone(),
            rejected: self.rejected_column.clone(),
        }
    }
}

#[derive(Debug, Args)]
#[command(next_help_heading = "LoRA adapter")]
struct LoraArguments {
    /// LoRA rank
    #[arg(long, value_name = "R", default_value_t = 64)]
    rank: usize,
    /// LoRA alpha: the update is scaled by alpha / rank
    #[arg(long, value_name = "A", default_value_t = 16.0, allow_negative_numbers = true)]
    alpha: f32,
    /// Matrices to adapt, from q k v o gate up down embed output [default: all but embed and output]
    #[arg(long, value_name = "T,…", value_delimiter = ',')]
    targets: Vec<String>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Recipe (the paper's by default)")]
struct RecipeArguments {
    /// Loss function: sigmoid (DPO), ipo or hinge
    #[arg(long, value_name = "L", default_value = "sigmoid")]
    loss: LossKind,
    /// DPO temperature: a higher beta keeps the model closer to the untrained one
    #[arg(long, value_name = "B", default_value_t = 0.1, allow_negative_numbers = true)]
    beta: f64,
    /// Assumed probability that chosen and rejected are swapped in a pair (sigmoid loss only)
    #[arg(long, value_name = "P", default_value_t = 0.0, allow_negative_numbers = true)]
    label_smoothing: f64,
    /// Number of passes over the training pairs
    #[arg(long, value_name = "N", default_value_t = 5)]
    epochs: u32,
    /// Maximum number of steps [default: all steps of --epochs]
    #[arg(long, value_name = "N")]
    max_steps: Option<u64>,
    /// Pairs per optimizer step
    #[arg(long, value_name = "N", default_value_t = 4)]
    batch_size: usize,
    /// Peak learning rate
    #[arg(long, value_name = "X", default_value_t = 1e-5, allow_negative_numbers = true)]
    learning_rate: f64,
    /// Steps of linear warm-up from 0 to the peak learning rate
    #[arg(long, value_name = "N", default_value_t = 150)]
    warmup_steps: u64,
    /// Learning-rate schedule after the warm-up: constant, linear or cosine
    #[arg(long, value_name = "S", default_value = "constant")]
    schedule: ScheduleKind,
    /// Optimizer: rmsprop or adamw
    #[arg(long, value_name = "O", default_value = "rmsprop")]
    optimizer: OptimizerKind,
    /// Weight decay (adamw only)
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_negative_numbers = true)]
    weight_decay: f32,
    /// Maximum gradient norm; larger gradients are clipped
    #[arg(long, value_name = "X", default_value_t = 10.0, allow_negative_numbers = true)]
    max_grad_norm: f64,
    /// Number of steps between evaluations on the held-out pairs; each evaluation saves a checkpoint
    #[arg(long, value_name = "N", default_value_t = 25)]
    eval_every: u64,
    /// Fraction of the pairs held out for evaluation; the pairs of one prompt stay together
    #[arg(long, value_name = "FRACTION", default_value_t = 0.05, allow_negative_numbers = true)]
    held_out: f64,
    /// Early stopping: evaluations without a lower held-out loss before training ends
    #[arg(long, value_name = "N", default_value_t = 10)]
    patience: u32,
    /// If prompt and answer exceed --max-length, keep only the last N tokens of the prompt
    #[arg(long, value_name = "N", default_value_t = 64)]
    max_prompt: usize,
    /// Maximum number of tokens in prompt and answer together
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_length: usize,
    /// Do not append the end-of-text token to answers
    #[arg(long)]
    no_eos: bool,
    /// Normalise texts to Unicode NFC before tokenising, as Hugging Face does for some models (Qwen, Command R)
    #[arg(long)]
    nfc: bool,
    /// Random seed of the held-out split, the order of the pairs and the initial adapter
    #[arg(short = 's', long, value_name = "SEED", default_value_t = 0)]
    seed: u64,
}

impl TrainCommand {
    /// Trains, prints the summary, and fails unless llama.cpp reproduces the trained model.
    pub fn run(&self, interrupt: &AtomicBool) -> Result<()> {
        let trained = train(&self.request(), interrupt, &mut Shown::new())?;
        let verified = trained.verify();
        let printed = print(&trained.report.to_terminal(&trained.records, may_colour(&std::io::stdout())));
        verified.and(printed)?;
        print::note(&format!("report: {}", self.output.join("report.html").display()));
        print::note(&format!("result: {}  ({})", trained.result.display(), self.method.usage()));
        Ok(())
    }

    /// The files that the command reads and writes.
    pub fn paths(&self) -> Paths {
        let paths = Paths::new().reads([&self.model]).reads(&self.pairs);
        paths.writes_folder(&self.output, FolderKind::Train)
    }

    fn request(&self) -> TrainRequest {
        let default = TrainRequest::new(&self.model, &self.output);
        let (lora, recipe) = (&self.lora, &self.recipe);
        let settings = Settings {
            method: self.method.name(),
            rank: lora.rank,
            alpha: lora.alpha,
            targets: if lora.targets.is_empty() {
                LoraOptions::default().targets
            } else {
                lora.targets.clone()
            },
            loss: recipe.loss,
            beta: recipe.beta,
            label_smoothing: recipe.label_smoothing,
            optimizer: recipe.optimizer,
            weight_decay: recipe.weight_decay,
            learning_rate: recipe.learning_rate,
            warmup_steps: recipe.warmup_steps,
            schedule: recipe.schedule,
            max_grad_norm: recipe.max_grad_norm,
            batch_size: recipe.batch_size,
            epochs: recipe.epochs,
            max_steps: recipe.max_steps,
            eval_every: recipe.eval_every,
            held_out: recipe.held_out,
            patience: recipe.patience,
            max_prompt: recipe.max_prompt,
            max_length: recipe.max_length,
            append_eos: !recipe.no_eos,
            nfc: recipe.nfc,
            n_threads: self.compute.threads.unwrap_or(default.settings.n_threads),
            seed: recipe.seed,
            device: self.device.device,
            ..default.settings
        };
        let compute = self.compute.options(self.device.frozen);
        TrainRequest {
            pairs: self.pairs.clone(),
            columns: self.columns.columns(),
            settings,
            compute,
            save_initial: self.save_initial,
            ..default
        }
    }
}

impl MethodArgument {
    fn name(self) -> MethodName {
        match self {
            MethodArgument::Lora => MethodName::Lora,
            MethodArgument::Vector => MethodName::Vector,
            MethodArgument::Full => MethodName::Full,
        }
    }

    /// How to use the result.
    fn usage(self) -> &'static str {
        match self {
            MethodArgument::Lora => "use it with llama.cpp's --lora, or merge it with detox-gguf export",
            MethodArgument::Vector => "use it with llama.cpp's --control-vector",
            MethodArgument::Full => "use it like any other model",
        }
    }
}
