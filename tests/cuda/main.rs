//! Training on a GPU or the emulated GPU.
//!
//! The tests compare its steps with the CPU's, run the result in llama.cpp, and, on the emulated GPU, run out of
//! memory.
#![cfg(any(feature = "cuda", feature = "cuda-emulation"))]

mod command;
#[cfg(feature = "cuda-emulation")]
mod memory;
#[cfg(feature = "cuda-emulation")]
mod memory_in_a_run;
#[path = "../own_pairs/mod.rs"]
mod own_pairs;
mod result;
mod shapes;
mod step;
mod toolkit;

use std::sync::{Mutex, MutexGuard, PoisonError};

use detox_gguf::gguf::GgufFile;
use detox_gguf::train::device::cuda::{Cuda, is_present};
use detox_gguf::train::device::name::{DeviceName, Frozen};
use detox_gguf::train::recipe::settings::Settings;
use detox_gguf::train::run::trainer::Trainer;

use own_pairs::{Silent, own_pairs, tiny};

/// Waits for this test's turn: the process has one GPU, and only one test at a time may limit its memory.
///
/// `None` on a machine without a GPU, such as one that builds for others.
fn gpu() -> Option<MutexGuard<'static, ()>> {
    static TURN: Mutex<()> = Mutex::new(());
    if cfg!(feature = "cuda") && !is_present().unwrap() {
        eprintln!("skipped: this machine has no usable NVIDIA GPU");
        return None;
    }
    Some(TURN.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Five steps of two pairs, with a rank of 4.
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
        device: DeviceName::Cuda(0),
        ..Settings::paper()
    }
}

/// A trainer of a tiny model on the GPU.
fn load(name: &str, settings: &Settings, frozen: Frozen) -> Trainer<Cuda> {
    let base = GgufFile::open(tiny(name)).unwrap();
    let device = Cuda::open(0, frozen).unwrap();
    Trainer::load(device, &base, &settings.method(), settings.seed, settings.step_options()).unwrap()
}
