//! `train`: DPO on a GGUF base, and its result as GGUF.

mod device;

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use clap::{Args, ValueEnum};
use serde::Serialize;

use crate::check::training::{self, Expected, agreement};
use crate::engine::Vocabulary;
use crate::error::{Error, Result};
use crate::file;
use crate::gguf::{GgufFile, Metadata, Value, check_decoder};
use crate::memory;
use crate::progress::hash_model;
use crate::report::json as report_json;
use crate::report::training::TrainingReport;
#[cfg(any(feature = "cuda", feature = "cuda-emulation"))]
use crate::train::data::pack::Packed;
use crate::train::data::preference_pair::{self, PreferencePair};
use crate::train::data::tokens::{self, TokenPair, Tokenized};
use crate::train::device::Device;
use crate::train::device::cpu::{Cpu, Products};
use crate::train::device::name::DeviceName;
use crate::train::model::config::Config;
use crate::train::model::lora::LoraOptions;
use crate::train::model::transformer::Method;
use crate::train::output::artifact;
use crate::train::recipe::dpo::LossKind;
use crate::train::recipe::method::MethodName;
use crate::train::recipe::settings::{Identity, Settings};
use crate::train::run::metrics::Record;
use crate::train::run::optimizer::{OptimizerKind, ScheduleKind};
use crate::train::run::trainer::Trainer;
use crate::train::run::{RunFiles, check_lengths, run};

use super::eval::write_reports;
use super::progress::Shown;
use super::{may_colour, print};

use device::DeviceArguments;

/// Tokens that the CPU computes at once without `--ubatch-size`.
const DEFAULT_ROWS: usize = 512;

/// Pairs on which the result is compared with llama.cpp.
const COMPARED_PAIRS: usize = 8;

/// Arguments of `train`.
#[derive(Debug, Args)]
pub struct TrainCommand {
    /// Model (GGUF)
    #[arg(short, long, value_name = "FILE")]
    model: PathBuf,
    /// Preference pairs: JSON lines, or a folder of such files [default: the program's own pairs]
    #[arg(long, value_name = "PATH")]
    pairs: Option<PathBuf>,
    /// Folder for the result and the report; the same command goes on with a run that was broken off
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// What is trained: an adapter, a direction a layer (a control vector), or every weight
    #[arg(long, value_enum, default_value = "lora")]
    method: MethodArgument,
    #[command(flatten)]
    lora: LoraArguments,
    #[command(flatten)]
    recipe: RecipeArguments,
    #[command(flatten)]
    compute: ComputeArguments,
    #[command(flatten)]
    place: DeviceArguments,
}

/// `lora`, `vector` or `full`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum MethodArgument {
    Lora,
    Vector,
    Full,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Adapter")]
struct LoraArguments {
    /// Rank
    #[arg(long, value_name = "R", default_value_t = 64)]
    rank: usize,
    /// The change is multiplied by alpha / rank
    #[arg(long, value_name = "A", default_value_t = 16.0, allow_negative_numbers = true)]
    alpha: f32,
    /// Matrices, out of q k v o gate up down embed output [default: those of the blocks]
    #[arg(long, value_name = "T,…", value_delimiter = ',')]
    targets: Vec<String>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Recipe (the paper's by default)")]
struct RecipeArguments {
    /// Loss: sigmoid (DPO), ipo or hinge
    #[arg(long, value_name = "L", default_value = "sigmoid")]
    loss: LossKind,
    /// How much the policy is held to the reference
    #[arg(long, value_name = "B", default_value_t = 0.1, allow_negative_numbers = true)]
    beta: f64,
    /// Share of pairs whose labels are taken to be swapped
    #[arg(long, value_name = "S", default_value_t = 0.0, allow_negative_numbers = true)]
    label_smoothing: f64,
    /// Passes through the pairs
    #[arg(long, value_name = "N", default_value_t = 5)]
    epochs: u32,
    /// At most so many steps
    #[arg(long, value_name = "N")]
    max_steps: Option<u64>,
    /// Pairs in a step
    #[arg(long, value_name = "N", default_value_t = 4)]
    batch_size: usize,
    /// The highest learning rate
    #[arg(long, value_name = "X", default_value_t = 1e-5, allow_negative_numbers = true)]
    learning_rate: f64,
    /// Steps up to it
    #[arg(long, value_name = "N", default_value_t = 150)]
    warmup_steps: u64,
    /// How the learning rate goes on: constant, linear or cosine
    #[arg(long, value_name = "S", default_value = "constant")]
    schedule: ScheduleKind,
    /// Optimizer: rmsprop or adamw
    #[arg(long, value_name = "O", default_value = "rmsprop")]
    optimizer: OptimizerKind,
    /// Weight decay, of adamw
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_negative_numbers = true)]
    weight_decay: f32,
    /// Gradients are cut to this norm
    #[arg(long, value_name = "X", default_value_t = 10.0, allow_negative_numbers = true)]
    max_grad_norm: f64,
    /// Steps from one look at the held-out pairs, and one checkpoint, to the next
    #[arg(long, value_name = "N", default_value_t = 25)]
    eval_every: u64,
    /// Share of pairs that are held out
    #[arg(long, value_name = "S", default_value_t = 0.05, allow_negative_numbers = true)]
    held_out: f64,
    /// Looks without a better held-out loss after which training ends
    #[arg(long, value_name = "N", default_value_t = 10)]
    patience: u32,
    /// Most tokens of a prompt that must be cut
    #[arg(long, value_name = "N", default_value_t = 64)]
    max_prompt: usize,
    /// Most tokens of a prompt with its answer
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_length: usize,
    /// Do not end answers with the end-of-text token
    #[arg(long)]
    no_eos: bool,
    /// Seed
    #[arg(short = 's', long, value_name = "SEED", default_value_t = 0)]
    seed: u64,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Computing")]
struct ComputeArguments {
    /// Threads [default: all cores]
    #[arg(short = 't', long, value_name = "N")]
    threads: Option<usize>,
    /// Products with frozen matrices
    #[arg(long, value_enum, default_value = "auto")]
    products: ProductsArgument,
    /// Tokens computed at once (-ub); a pair that has more is computed by itself [default: 512, on a GPU what a step has
    /// and its memory suffices for, up to 4096]
    #[arg(long, value_name = "N")]
    ubatch_size: Option<usize>,
    /// Save memory by computing activations twice
    #[arg(long, value_enum, default_value = "auto")]
    checkpointing: CheckpointingArgument,
}

/// `exact`, `fast` or `auto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ProductsArgument {
    /// In f32
    Exact,
    /// With quantised matrices, rounded to 8 bits
    Fast,
    /// Fast where the CPU has AVX-512 VNNI and memory suffices, else exact
    Auto,
}

/// `on`, `off` or `auto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum CheckpointingArgument {
    /// Always
    On,
    /// Never, also where memory runs out
    Off,
    /// Where activations would take more than a quarter of the machine's memory, or more than a GPU has
    Auto,
}

impl CheckpointingArgument {
    /// What it fixes.
    #[cfg(any(feature = "cuda", feature = "cuda-emulation"))]
    fn wanted(self) -> Option<bool> {
        match self {
            CheckpointingArgument::On => Some(true),
            CheckpointingArgument::Off => Some(false),
            CheckpointingArgument::Auto => None,
        }
    }
}

/// What a run is made of, read and checked.
struct Prepared {
    base: GgufFile,
    settings: Settings,
    pairs_name: String,
    pairs_sha256: String,
    tokenized: Tokenized,
    token_pairs: Vec<TokenPair>,
}

/// Everything that decides a run, for `run.json`.
#[derive(Debug, Serialize)]
struct Started<'a> {
    detox_gguf: &'static str,
    model: String,
    model_sha256: &'a str,
    pairs: &'a str,
    pairs_sha256: String,
    settings: Identity<'a>,
}

impl TrainCommand {
    /// Trains, writes the result, runs it in llama.cpp, and reports.
    pub fn run(&self, interrupt: &AtomicBool) -> Result<()> {
        self.place.check(self.compute.products != ProductsArgument::Auto)?;
        let base = GgufFile::open(&self.model)?;
        check_decoder(&base)?;
        let settings = self.settings(&base)?;
        artifact::check(&base, settings.method)?;
        let config = Config::read(&base, None)?;
        if let Method::Lora(options) = settings.method() {
            options.check(&base)?;
        }
        let (all, pairs_name) = self.read_pairs()?;
        let vocabulary = Vocabulary::open(&self.model)?;
        let tokenized = tokens::tokenize(&vocabulary, &all, &settings.limits())?;
        let token_pairs: Vec<TokenPair> = tokenized.pairs.iter().map(|(_, pair)| pair.clone()).collect();
        if token_pairs.is_empty() {
            return Err(self.no_pairs(&tokenized, &all));
        }
        check_lengths(&config, &token_pairs)?;
        let pairs_sha256 = preference_pair::sha256(&all);
        let prepared = Prepared { base, settings, pairs_name, pairs_sha256, tokenized, token_pairs };
        match prepared.settings.device {
            DeviceName::Cpu => {
                let device = Cpu::new(prepared.settings.n_threads, prepared.settings.products)?;
                let checkpointing = self.checkpointing(&config, &prepared.settings);
                self.train(device, checkpointing, prepared, interrupt)
            }
            #[cfg(any(feature = "cuda", feature = "cuda-emulation"))]
            DeviceName::Cuda(ordinal) => {
                let mut prepared = prepared;
                let (device, checkpointing) = self.open_gpu(ordinal, &config, &mut prepared)?;
                self.train(device, checkpointing, prepared, interrupt)
            }
            #[cfg(not(any(feature = "cuda", feature = "cuda-emulation")))]
            DeviceName::Cuda(_) => unreachable!("`check` has refused it"),
        }
    }

    /// Opens a GPU, and settles what its memory suffices for.
    #[cfg(any(feature = "cuda", feature = "cuda-emulation"))]
    fn open_gpu(
        &self,
        ordinal: usize,
        config: &Config,
        prepared: &mut Prepared,
    ) -> Result<(crate::train::device::cuda::Cuda, bool)> {
        use crate::train::device::limits::check_kernels;
        use crate::train::device::name::Frozen;
        use crate::train::run::placement::{Needs, Wanted};
        let has_frozen = prepared.settings.method != MethodName::Full;
        check_kernels(&prepared.base, &config.attention, &config.rope, has_frozen)?;
        let mut device = crate::train::device::cuda::Cuda::open(ordinal, Frozen::Quantised)?;
        let (free, total) = device.memory_bytes()?;
        let wanted = Wanted {
            frozen: self.place.frozen.wanted(),
            checkpointing: self.compute.checkpointing.wanted(),
            max_rows: self.compute.ubatch_size,
        };
        let rows = |pair: &TokenPair| Packed::n_rows_of(&pair.prompt, &pair.chosen, &pair.rejected);
        let longest = prepared.token_pairs.iter().map(rows).max().unwrap_or(0);
        let needs = Needs::new(&prepared.base, &prepared.settings, longest);
        let choice = needs.choose(wanted, prepared.settings.device, free)?;
        let mib = |bytes: u64| bytes >> 20;
        eprintln!(
            "{}: {}, {} of {} MiB free; this run needs about {} MiB",
            device.name(),
            device.model(),
            mib(free),
            mib(total),
            mib(needs.bytes(choice)?)
        );
        if choice.frozen == Frozen::Quantised && wanted.frozen.is_none() {
            eprintln!("frozen weights stay in the file's blocks, to save memory (--frozen)");
        }
        match (choice.max_rows, self.compute.ubatch_size) {
            (found, Some(asked)) if found < asked => eprintln!(
                "{found} tokens are computed at once and not {asked}, to save memory (--ubatch-size)"
            ),
            (_, Some(_)) => {}
            (found, None) => eprintln!("{found} tokens are computed at once (--ubatch-size)"),
        }
        device.set_frozen(choice.frozen);
        prepared.settings.frozen = Some(choice.frozen);
        prepared.settings.max_rows = choice.max_rows;
        Ok((device, choice.checkpointing))
    }

    fn train<D: Device>(
        &self,
        device: D,
        checkpointing: bool,
        prepared: Prepared,
        interrupt: &AtomicBool,
    ) -> Result<()> {
        let Prepared { base, settings, pairs_name, pairs_sha256, tokenized, token_pairs } = prepared;
        let mut progress = Shown::new();
        file::create_folder(&self.output)?;
        file::remove_unfinished(&self.output)?;
        let model_sha256 = hash_model(&self.model, &mut progress)?;
        let record = Started {
            detox_gguf: crate::version(),
            model: file_name(&self.model),
            model_sha256: &model_sha256,
            pairs: &pairs_name,
            pairs_sha256,
            settings: settings.identity(),
        };
        file::start_record(&self.output, &record)?;

        let mut trainer =
            Trainer::load(device, &base, &settings.method(), settings.seed, settings.step_options())?;
        trainer.set_checkpointing(checkpointing);
        if self.compute.checkpointing == CheckpointingArgument::Off {
            trainer.keep_activations();
        }
        if checkpointing {
            eprintln!("activations are computed twice, to save memory (--checkpointing)");
        }
        let files = RunFiles::of(&self.output);
        let trained = run(&mut trainer, &token_pairs, &settings, &files, interrupt, &mut progress);
        let (outcome, records) = trained.inspect_err(|error| {
            if matches!(error, Error::Interrupted) {
                eprintln!("the same command goes on with the run in {}", self.output.display());
            }
        })?;

        let result = artifact::file_name(settings.method);
        let result_path = self.output.join(result);
        let provenance = provenance(&model_sha256, &record.pairs_sha256, &settings, &outcome.best);
        artifact::write(&trainer, &base, &settings, &result_path, &provenance)?;
        let compared: Vec<&TokenPair> = token_pairs.iter().take(COMPARED_PAIRS).collect();
        let expected = Expected::of(&trainer, settings.rounding(), &compared)?;
        let (device, n_trained) = (trainer.describe(), trainer.parameters.n_values());
        // Before llama.cpp takes memory of its own.
        drop(trainer);
        let method = settings.method;
        let agreement = agreement(&expected, &base, method, &result_path, settings.n_threads)?;
        let report = TrainingReport {
            model: file_name(&self.model),
            pairs: pairs_name.clone(),
            device,
            n_trained,
            settings,
            outcome,
            skipped: tokenized.skipped.reasons().iter().map(|(s, n)| (s.reason().to_owned(), *n)).collect(),
            n_cut: tokenized.n_cut,
            agreement,
            pairs_per_second: median_pairs_per_second(&records),
            peak_rss_bytes: memory::peak_rss_bytes(),
            result: result.to_owned(),
        };
        write_reports(
            &self.output,
            "report",
            &[("json", report_json::to_json(&report)), ("html", report.to_html(&records))],
        )?;
        print(&report.to_terminal(&records, may_colour(&std::io::stdout())))?;
        if !agreement.holds() {
            return Err(training::refuse(&result_path, &agreement));
        }
        eprintln!("report: {}", self.output.join("report.html").display());
        eprintln!("result: {}  ({})", result_path.display(), how_to_use(method));
        Ok(())
    }

    fn settings(&self, base: &GgufFile) -> Result<Settings> {
        let (lora, recipe, compute) = (&self.lora, &self.recipe, &self.compute);
        let default_targets = LoraOptions::default().targets;
        let all_cores = std::thread::available_parallelism().map_or(1, usize::from);
        let settings = Settings {
            method: match self.method {
                MethodArgument::Lora => MethodName::Lora,
                MethodArgument::Vector => MethodName::Vector,
                MethodArgument::Full => MethodName::Full,
            },
            rank: lora.rank,
            alpha: lora.alpha,
            targets: if lora.targets.is_empty() { default_targets } else { lora.targets.clone() },
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
            products: match compute.products {
                ProductsArgument::Exact => Products::Exact,
                ProductsArgument::Fast => Products::Fast,
                ProductsArgument::Auto if !self.place.device.is_cpu() => Products::Exact,
                ProductsArgument::Auto => Products::auto(base.n_params()),
            },
            n_threads: compute.threads.unwrap_or(all_cores),
            max_rows: compute.ubatch_size.unwrap_or(DEFAULT_ROWS),
            seed: recipe.seed,
            device: self.place.device,
            frozen: None,
        };
        settings.validate()?;
        Ok(settings)
    }

    fn checkpointing(&self, config: &Config, settings: &Settings) -> bool {
        match self.compute.checkpointing {
            CheckpointingArgument::On => true,
            CheckpointingArgument::Off => false,
            CheckpointingArgument::Auto => {
                let rows = settings.max_rows.max(settings.max_length * 2);
                config.activation_bytes(rows) > memory::total_bytes() / 4
            }
        }
    }

    fn read_pairs(&self) -> Result<(Vec<PreferencePair>, String)> {
        match &self.pairs {
            Some(path) => Ok((preference_pair::read(path)?, file_name(path))),
            None => Ok((preference_pair::own(), "the program's own pairs".into())),
        }
    }

    fn no_pairs(&self, tokenized: &Tokenized, all: &[PreferencePair]) -> Error {
        let reasons = tokenized.skipped.reasons();
        let reasons: Vec<String> = reasons.iter().map(|(s, n)| format!("{n} {}", s.reason())).collect();
        Error::input(
            self.pairs.clone().unwrap_or_default(),
            None,
            format!("none of its {} pairs can be trained on: {}", all.len(), reasons.join(", ")),
        )
        .with_hint("raise --max-length, or give other pairs")
    }
}

fn file_name(path: &Path) -> String {
    crate::file::base_name(path)
}

fn how_to_use(method: MethodName) -> &'static str {
    match method {
        MethodName::Lora => "llama.cpp's --lora; detox-gguf export merges it",
        MethodName::Vector => "llama.cpp's --control-vector",
        MethodName::Full => "a model like any other",
    }
}

/// Where a result came from, for its metadata.
fn provenance(
    model_sha256: &str,
    pairs_sha256: &str,
    settings: &Settings,
    best: &Option<(u64, f64)>,
) -> Metadata {
    let mut metadata = Metadata::new();
    let mut set = |name: &str, value: String| {
        metadata.set(format!("detox_gguf.train.{name}"), Value::Str(value));
    };
    set("model_sha256", model_sha256.to_owned());
    set("pairs_sha256", pairs_sha256.to_owned());
    set("settings", serde_json::to_string(settings).expect("settings are plain data"));
    if let Some((step, loss)) = best {
        set("best", format!("step {step}, held-out loss {loss:.6}"));
    }
    metadata
}

fn median_pairs_per_second(records: &[Record]) -> f64 {
    let mut speeds: Vec<f64> = records
        .iter()
        .filter_map(|record| match record {
            Record::Step(step) => Some(step.pairs as f64 / step.step_seconds.max(1e-9)),
            Record::Evaluation(_) | Record::Placement(_) => None,
        })
        .collect();
    speeds.sort_by(f64::total_cmp);
    speeds.get(speeds.len() / 2).copied().unwrap_or(0.0)
}
