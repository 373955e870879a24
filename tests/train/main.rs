//! Tests the trainer against PyTorch and TRL goldens (`scripts/make_train_goldens.py`), against itself, and against
//! llama.cpp.

mod golden;
#[path = "../own_pairs/mod.rs"]
mod own_pairs;
mod refusals;
mod result;
mod run;

use std::path::Path;
use std::sync::atomic::AtomicBool;

use detox_gguf::error::Result;
use detox_gguf::gguf::{GgufFile, GgufWriter, Metadata, TensorSpec};
use detox_gguf::progress::Progress;
use detox_gguf::train::data::tokens::TokenPair;
use detox_gguf::train::device::cpu::Cpu;
use detox_gguf::train::output::artifact;
use detox_gguf::train::recipe::settings::Settings;
use detox_gguf::train::run::metrics::Record;
use detox_gguf::train::run::trainer::Trainer;
use detox_gguf::train::run::{Outcome, RunFiles, run};

use own_pairs::{Silent, own_pairs, tiny};

/// Settings of a run of about a dozen steps with a visible effect.
fn small_settings() -> Settings {
    Settings {
        rank: 4,
        alpha: 8.0,
        learning_rate: 2e-3,
        warmup_steps: 2,
        batch_size: 3,
        epochs: 2,
        eval_every: 4,
        held_out: 0.25,
        // Two passes a step.
        max_rows: 120,
        n_threads: 2,
        seed: 7,
        ..Settings::paper()
    }
}

fn load(base: &GgufFile, settings: &Settings) -> Result<Trainer<Cpu>> {
    let device = Cpu::new(settings.n_threads, settings.products)?;
    Trainer::load(device, base, &settings.method(), settings.seed, settings.step_options())
}

/// A finished run.
struct Trained {
    trainer: Trainer<Cpu>,
    outcome: Outcome,
    records: Vec<Record>,
}

/// Trains or resumes in `folder`, and writes the result as `train` does.
fn train(
    name: &str,
    settings: &Settings,
    pairs: &[TokenPair],
    folder: &Path,
    interrupt: &AtomicBool,
    progress: &mut dyn Progress,
) -> Result<Trained> {
    std::fs::create_dir_all(folder).unwrap();
    let base = GgufFile::open(tiny(name)).unwrap();
    let mut trainer = load(&base, settings)?;
    let files = RunFiles::of(folder);
    let (outcome, records) = run(&mut trainer, pairs, settings, &files, interrupt, progress)?;
    let path = folder.join(artifact::file_name(settings.method));
    artifact::write(&trainer, &base, settings, &path, &Metadata::new())?;
    Ok(Trained { trainer, outcome, records })
}

/// As [`train`], without interruption.
fn train_whole(name: &str, settings: &Settings, pairs: &[TokenPair], folder: &Path) -> Trained {
    train(name, settings, pairs, folder, &AtomicBool::new(false), &mut Silent).unwrap()
}

/// A copy of a model with `change` applied to the bytes of one tensor.
fn changed(base: &GgufFile, tensor: &str, path: &Path, change: impl Fn(&mut [u8])) -> GgufFile {
    let spec = |t: &detox_gguf::gguf::TensorInfo| TensorSpec {
        name: t.name().to_owned(),
        shape: t.shape().to_vec(),
        tensor_type: t.tensor_type(),
    };
    let specs = base.tensors().iter().map(spec).collect();
    let mut writer = GgufWriter::create(path, base.metadata(), specs).unwrap();
    for t in base.tensors() {
        let mut bytes = base.read_tensor(t).unwrap();
        if t.name() == tensor {
            change(&mut bytes);
        }
        writer.write(&bytes).unwrap();
    }
    writer.finish().unwrap();
    GgufFile::open(path).unwrap()
}
