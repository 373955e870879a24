//! Training end to end: train, write the result, compare it with llama.cpp, and report.
//!
//! ```text
//! pairs ──► tokens ──► train::run ──► result.gguf ──► check::training (llama.cpp) ──► report.json, report.html
//! ```
//!
//! ```
//! use std::sync::atomic::AtomicBool;
//! use detox_gguf::{progress::Silent, study::train::{TrainRequest, train}};
//! # fn main() -> detox_gguf::Result<()> {
//! let folder = tempfile::tempdir().expect("a temporary folder");
//! let mut request = TrainRequest::new("gguf/tiny/llama.gguf", folder.path().join("run"));
//! request.settings.max_steps = Some(2);
//! request.settings.rank = 4;
//! let trained = train(&request, &AtomicBool::new(false), &mut Silent)?;
//! trained.verify()?; // llama.cpp reproduces the trained model
//! println!("{} after {} steps", trained.result.display(), trained.report.outcome.n_steps);
//! # Ok(())
//! # }
//! ```

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use serde::Serialize;

use crate::check::training::{Expected, agreement};
use crate::engine::Vocabulary;
use crate::error::{Error, Result};
use crate::file::output::{FolderKind, Paths, open_folder};
use crate::file::{self, base_name};
use crate::gguf::{GgufFile, Metadata, Value, check_decoder};
use crate::memory;
use crate::progress::{Progress, hash_model};
use crate::report::json::to_json;
use crate::report::training::TrainingReport;
use crate::report::write::write_reports;
use crate::train::data::preference_pair::{self, PairColumns, PreferencePair};
use crate::train::data::tokens::{self, Skip, TokenPair, Tokenized};
use crate::train::device::Device;
use crate::train::device::cpu::Cpu;
use crate::train::device::name::{DeviceName, Frozen};
use crate::train::model::config::Config;
use crate::train::output::artifact;
use crate::train::recipe::method::{Method, MethodName};
use crate::train::recipe::products::Products;
use crate::train::recipe::settings::{Identity, Settings};
use crate::train::run::metrics::Record;
use crate::train::run::trainer::Trainer;
use crate::train::run::{RunFiles, check_lengths, run};

/// Default maximum of tokens per pass on the CPU.
const DEFAULT_ROWS: usize = 512;

/// Pairs on which the result is compared with llama.cpp.
const COMPARED_PAIRS: usize = 8;

/// What to train, on which pairs, and how.
#[derive(Debug, Clone)]
pub struct TrainRequest {
    /// The model (GGUF).
    pub model: PathBuf,
    /// Preference pairs: a JSON-lines file or a folder of them; `None` for the built-in pairs.
    pub pairs: Option<PathBuf>,
    /// Columns of the pairs.
    pub columns: PairColumns,
    /// The run's folder. If it holds an interrupted run, that run resumes.
    pub output: PathBuf,
    /// The recipe. `products`, `max_rows` and `frozen` are overwritten from `compute`.
    pub settings: Settings,
    /// How to compute.
    pub compute: ComputeOptions,
    /// Also write the adapter before the first step, as [`INITIAL_ADAPTER`].
    pub save_initial: bool,
}

/// The file in the run's folder with the adapter before the first step. It changes nothing yet, since B is zero.
pub const INITIAL_ADAPTER: &str = "initial.gguf";

/// Choices that affect speed and memory; `None` lets the program choose.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ComputeOptions {
    /// Precision of the CPU's products with frozen matrices.
    pub products: Option<Products>,
    /// Maximum tokens per pass.
    pub max_rows: Option<usize>,
    /// Gradient checkpointing.
    pub checkpointing: Option<bool>,
    /// Storage of frozen matrices in GPU memory.
    pub frozen: Option<Frozen>,
}

/// A finished run.
#[derive(Debug, Clone)]
pub struct Trained {
    /// The trained adapter, control vector or model.
    pub result: PathBuf,
    /// The report, as written to `report.json`.
    pub report: TrainingReport,
    /// The lines of `metrics.jsonl`.
    pub records: Vec<Record>,
}

impl TrainRequest {
    /// Trains an adapter on the built-in pairs with the paper's recipe, on all CPU cores.
    pub fn new(model: impl Into<PathBuf>, output: impl Into<PathBuf>) -> TrainRequest {
        let n_threads = std::thread::available_parallelism().map_or(1, usize::from);
        TrainRequest {
            model: model.into(),
            pairs: None,
            columns: PairColumns::default(),
            output: output.into(),
            settings: Settings { n_threads, ..Settings::paper() },
            compute: ComputeOptions::default(),
            save_initial: false,
        }
    }
}

impl ComputeOptions {
    /// Checks that this build supports `device`, and that the options apply to it.
    ///
    /// # Errors
    /// [`Error::Setting`].
    pub fn check(&self, device: DeviceName) -> Result<()> {
        match device {
            DeviceName::Cpu if self.frozen.is_some() => {
                Err(Error::setting("--frozen", "the CPU always keeps frozen matrices in the file's blocks")
                    .with_hint("leave it out, or train with --device cuda"))
            }
            DeviceName::Cpu => Ok(()),
            DeviceName::Cuda(_) if !cfg!(any(feature = "cuda", feature = "cuda-emulation")) => {
                Err(Error::setting(format!("--device {device}"), "this build trains on the CPU only").with_hint(
                    "build with --features cuda (see vendor/cuda/README.md for its requirements), or train with \
                     --device cpu",
                ))
            }
            DeviceName::Cuda(_) if self.products.is_some() => {
                Err(Error::setting("--products", "it applies to the CPU only; a GPU rounds to bf16")
                    .with_hint("leave it out, or train with --device cpu"))
            }
            DeviceName::Cuda(_) => Ok(()),
        }
    }

    /// Whether to use gradient checkpointing on the CPU: by default if activations exceed a quarter of the memory.
    fn checkpointing_on_cpu(&self, config: &Config, settings: &Settings) -> bool {
        self.checkpointing.unwrap_or_else(|| {
            let rows = settings.max_rows.max(settings.max_length * 2);
            config.activation_bytes(rows) > memory::total_bytes() / 4
        })
    }
}

impl Trained {
    /// Fails unless llama.cpp reproduces the trained model.
    ///
    /// # Errors
    /// [`Error::Model`]: do not use the result.
    pub fn verify(&self) -> Result<()> {
        self.report.agreement.verify(&self.result)
    }
}

/// Trains, writes the result, compares it with llama.cpp, and writes the report.
///
/// Messages for the user, such as the choice of memory options on a GPU, go to `progress`. The result is written even
/// if llama.cpp does not reproduce it; call [`Trained::verify`] before using it.
///
/// # Errors
/// [`Error::Setting`], [`Error::Input`], [`Error::Model`] and [`Error::Gguf`] for bad settings, pairs and models,
/// before the folder is created; [`Error::RunFolder`] if the folder holds anything else, or another process uses
/// it; [`Error::Interrupted`] after a
/// checkpoint; and those of [`run`].
pub fn train(request: &TrainRequest, interrupt: &AtomicBool, progress: &mut dyn Progress) -> Result<Trained> {
    let compute = &request.compute;
    let paths = Paths::new().reads([&request.model]).reads(&request.pairs);
    paths.writes_folder(&request.output, FolderKind::Train).check()?;
    let prepared = Prepared::read(request)?;
    match prepared.settings.device {
        DeviceName::Cpu => {
            let device = Cpu::new(prepared.settings.n_threads, prepared.settings.products)?;
            let checkpointing = compute.checkpointing_on_cpu(&prepared.config, &prepared.settings);
            train_on(device, checkpointing, request, prepared, interrupt, progress)
        }
        #[cfg(any(feature = "cuda", feature = "cuda-emulation"))]
        DeviceName::Cuda(ordinal) => {
            let mut prepared = prepared;
            let (device, checkpointing) = open_gpu(ordinal, compute, &mut prepared, progress)?;
            train_on(device, checkpointing, request, prepared, interrupt, progress)
        }
        #[cfg(not(any(feature = "cuda", feature = "cuda-emulation")))]
        DeviceName::Cuda(_) => unreachable!("`ComputeOptions::check` refuses a GPU in this build"),
    }
}

/// The inputs of a run, read and checked.
struct Prepared {
    base: GgufFile,
    config: Config,
    settings: Settings,
    pairs_name: String,
    pairs_sha256: String,
    tokenized: Tokenized,
    token_pairs: Vec<TokenPair>,
}

impl Prepared {
    /// Reads the model's metadata and the pairs, and checks everything that can be checked before training.
    fn read(request: &TrainRequest) -> Result<Prepared> {
        request.compute.check(request.settings.device)?;
        let base = GgufFile::open(&request.model)?;
        check_decoder(&base)?;
        let settings = resolve(request, &base);
        settings.validate()?;
        artifact::check(&base, settings.method)?;
        if request.save_initial && settings.method != MethodName::Lora {
            let reason = "only --method lora has an initial adapter";
            return Err(Error::setting("--save-initial", reason).with_hint(
                "leave it out: a control vector starts as zeros, and full training as the model",
            ));
        }
        let config = Config::read(&base, None)?;
        if let Method::Lora(options) = settings.method() {
            options.check(&base)?;
        }
        let (pairs, pairs_name) = match &request.pairs {
            Some(path) => (preference_pair::read(path, &request.columns)?, base_name(path)),
            None => (preference_pair::own(), "the program's own pairs".into()),
        };
        let vocabulary = Vocabulary::open(&request.model)?.with_nfc(settings.nfc);
        let tokenized = tokens::tokenize(&vocabulary, &pairs, &settings.limits())?;
        let token_pairs: Vec<TokenPair> = tokenized.pairs.iter().map(|(_, pair)| pair.clone()).collect();
        if token_pairs.is_empty() {
            return Err(no_pairs(request, &tokenized, &pairs));
        }
        check_lengths(&config, &token_pairs)?;
        let pairs_sha256 = preference_pair::sha256(&pairs);
        Ok(Prepared { base, config, settings, pairs_name, pairs_sha256, tokenized, token_pairs })
    }
}

/// The request's settings, with defaults for unset options.
///
/// A GPU chooses again once its free memory is known.
fn resolve(request: &TrainRequest, base: &GgufFile) -> Settings {
    let compute = &request.compute;
    let automatic = || match request.settings.device {
        DeviceName::Cpu => Products::auto(base.n_params()),
        DeviceName::Cuda(_) => Products::Exact,
    };
    Settings {
        products: compute.products.unwrap_or_else(automatic),
        max_rows: compute.max_rows.unwrap_or(DEFAULT_ROWS),
        frozen: None,
        ..request.settings.clone()
    }
}

fn no_pairs(request: &TrainRequest, tokenized: &Tokenized, pairs: &[PreferencePair]) -> Error {
    let reasons = tokenized.skipped.reasons();
    let reasons: Vec<String> = reasons.iter().map(|(s, n)| format!("{n} {}", s.reason())).collect();
    let reason = format!("none of its {} pairs can be used: {}", pairs.len(), reasons.join(", "));
    let source = request.pairs.clone().unwrap_or_else(|| "built-in pairs".into());
    // Answers that are equal as texts stay equal at any length.
    let n_same = pairs.iter().filter(|pair| pair.chosen == pair.rejected).count();
    let hint = |&(skip, n): &(Skip, usize)| match skip {
        Skip::EqualAnswers if n_same == 0 => "raise --max-length: the answers differ only after it",
        Skip::EqualAnswers if n_same >= n => "give two different answers",
        skip => skip.hint(),
    };
    let hints: Vec<&str> = tokenized.skipped.reasons().iter().map(hint).collect();
    Error::input(source, None, reason).with_hint(hints.join("; "))
}

/// Opens a GPU, and chooses the memory options that fit into its free memory.
#[cfg(any(feature = "cuda", feature = "cuda-emulation"))]
fn open_gpu(
    ordinal: usize,
    compute: &ComputeOptions,
    prepared: &mut Prepared,
    progress: &mut dyn Progress,
) -> Result<(crate::train::device::cuda::Cuda, bool)> {
    use crate::train::data::pack::Packed;
    use crate::train::device::limits::check_kernels;
    use crate::train::run::placement::{Needs, Wanted};
    let has_frozen = prepared.settings.method != MethodName::Full;
    check_kernels(&prepared.base, &prepared.config.attention, &prepared.config.rope, has_frozen)?;
    let mut device = crate::train::device::cuda::Cuda::open(ordinal, Frozen::Quantised)?;
    let (free, total) = device.memory_bytes()?;
    let wanted =
        Wanted { frozen: compute.frozen, checkpointing: compute.checkpointing, max_rows: compute.max_rows };
    let rows = |pair: &TokenPair| Packed::n_rows_of(&pair.prompt, &pair.chosen, &pair.rejected);
    let longest = prepared.token_pairs.iter().map(rows).max().unwrap_or(0);
    let needs = Needs::new(&prepared.base, &prepared.settings, longest);
    let choice = needs.choose(wanted, prepared.settings.device, free)?;
    let mib = |bytes: u64| bytes >> 20;
    progress.say(&format!(
        "{}: {}, {} of {} MiB free; this run needs about {} MiB",
        device.name(),
        device.model(),
        mib(free),
        mib(total),
        mib(needs.bytes(choice)?)
    ));
    if choice.frozen == Frozen::Quantised && wanted.frozen.is_none() {
        progress.say("keeping frozen weights quantised to save memory (--frozen)");
    }
    match (choice.max_rows, compute.max_rows) {
        (found, Some(asked)) if found < asked => progress.say(&format!(
            "computing {found} tokens per pass instead of {asked} to save memory (--ubatch-size)"
        )),
        (_, Some(_)) => {}
        (found, None) => progress.say(&format!("computing {found} tokens per pass (--ubatch-size)")),
    }
    device.set_frozen(choice.frozen);
    prepared.settings.frozen = Some(choice.frozen);
    prepared.settings.max_rows = choice.max_rows;
    Ok((device, choice.checkpointing))
}

/// Trains on `device`, from the first step to the report.
fn train_on<D: Device>(
    device: D,
    checkpointing: bool,
    request: &TrainRequest,
    prepared: Prepared,
    interrupt: &AtomicBool,
    progress: &mut dyn Progress,
) -> Result<Trained> {
    let Prepared { base, settings, token_pairs, .. } = &prepared;
    let output = &request.output;
    let _lock = open_folder(output, FolderKind::Train)?;
    let model_sha256 = start_folder(request, &prepared, progress)?;
    let mut trainer =
        Trainer::load(device, base, &settings.method(), settings.seed, settings.step_options())?;
    trainer.set_checkpointing(checkpointing);
    if request.compute.checkpointing == Some(false) {
        trainer.keep_activations();
    }
    if checkpointing {
        progress.say("recomputing activations to save memory (--checkpointing)");
    }
    if request.save_initial {
        let provenance = provenance(&model_sha256, &prepared.pairs_sha256, settings, None);
        artifact::write(&trainer, base, settings, &output.join(INITIAL_ADAPTER), &provenance)?;
    }
    let files = RunFiles::of(output);
    let (outcome, records) = run(&mut trainer, token_pairs, settings, &files, interrupt, progress)
        .inspect_err(|error| {
            if matches!(error, Error::Interrupted) {
                progress.say(&format!("run the same command again to resume in {}", output.display()));
            }
        })?;

    let name = artifact::file_name(settings.method);
    let result = output.join(name);
    let provenance = provenance(&model_sha256, &prepared.pairs_sha256, settings, outcome.best);
    artifact::write(&trainer, base, settings, &result, &provenance).map_err(Error::as_divergence)?;
    let compared: Vec<&TokenPair> = token_pairs.iter().take(COMPARED_PAIRS).collect();
    let expected = Expected::of(&trainer, settings.rounding(), &compared)?;
    let (device, n_trained) = (trainer.describe(), trainer.parameters.n_values());
    // Free the trainer's memory before llama.cpp loads the model.
    drop(trainer);
    let agreement = agreement(&expected, base, settings.method, &result, settings.n_threads)?;
    let skipped = prepared.tokenized.skipped.reasons();
    let report = TrainingReport {
        model: base_name(&request.model),
        pairs: prepared.pairs_name.clone(),
        settings: settings.clone(),
        device,
        n_trained,
        outcome,
        skipped: skipped.iter().map(|(s, n)| (s.reason().to_owned(), *n)).collect(),
        n_cut: prepared.tokenized.n_cut,
        agreement,
        pairs_per_second: median_pairs_per_second(&records),
        peak_rss_bytes: memory::peak_rss_bytes(),
        result: name.to_owned(),
    };
    write_reports(output, "report", &[("json", to_json(&report)?), ("html", report.to_html(&records))])?;
    Ok(Trained { result, report, records })
}

/// All settings that determine the result of a run, for `run.json`.
#[derive(Debug, Serialize)]
struct RunRecord<'a> {
    detox_gguf: &'static str,
    model: String,
    model_sha256: &'a str,
    pairs: &'a str,
    pairs_sha256: &'a str,
    settings: Identity<'a>,
}

/// Writes `run.json` into the run's folder, or checks that the folder holds this run. Returns the model's SHA-256.
fn start_folder(request: &TrainRequest, prepared: &Prepared, progress: &mut dyn Progress) -> Result<String> {
    let model_sha256 = hash_model(&request.model, progress)?;
    let record = RunRecord {
        detox_gguf: crate::version(),
        model: base_name(&request.model),
        model_sha256: &model_sha256,
        pairs: &prepared.pairs_name,
        pairs_sha256: &prepared.pairs_sha256,
        settings: prepared.settings.identity(),
    };
    file::start_record(&request.output, &record)?;
    Ok(model_sha256)
}

/// The result's metadata: the model, pairs and settings it comes from.
fn provenance(
    model_sha256: &str,
    pairs_sha256: &str,
    settings: &Settings,
    best: Option<(u64, f64)>,
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
