//! Training on the emulated GPU: the same steps as on the CPU, and what happens where memory does not suffice.
#![cfg(feature = "cuda-emulation")]

mod memory;
mod result;
mod step;

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use detox_gguf::engine::Vocabulary;
use detox_gguf::gguf::GgufFile;
use detox_gguf::train::cuda::Cuda;
use detox_gguf::train::pairs;
use detox_gguf::train::placement::Frozen;
use detox_gguf::train::settings::Settings;
use detox_gguf::train::tokens::{Limits, TokenPair, tokenize};
use detox_gguf::train::trainer::Trainer;

/// The emulated GPU is one for the process: its memory is limited by one test at a time.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn tiny(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("gguf/tiny/{name}.gguf"))
}

/// The program's own pairs as a tiny model's tokens, the first `n`.
fn own_pairs(name: &str, n: usize) -> Vec<TokenPair> {
    let vocabulary = Vocabulary::open(&tiny(name)).unwrap();
    let limits = Limits { max_prompt: 16, max_length: 40, append_eos: true };
    let tokenized = tokenize(&vocabulary, &pairs::own()[..n], &limits).unwrap();
    tokenized.pairs.into_iter().map(|(_, pair)| pair).collect()
}

fn settings() -> Settings {
    Settings {
        rank: 4,
        alpha: 8.0,
        learning_rate: 2e-3,
        warmup_steps: 1,
        batch_size: 2,
        max_steps: Some(5),
        eval_every: 2,
        held_out: 0.25,
        max_rows: 120,
        n_threads: 2,
        seed: 7,
        ..Settings::paper()
    }
}

fn load(name: &str, settings: &Settings, frozen: Frozen) -> Trainer<Cuda> {
    let base = GgufFile::open(tiny(name)).unwrap();
    let device = Cuda::open(0, frozen).unwrap();
    Trainer::load(device, &base, &settings.method(), settings.seed, settings.step_options()).unwrap()
}
