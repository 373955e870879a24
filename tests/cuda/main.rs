//! Training on a GPU, or on the emulated one: the same steps as on the CPU, what llama.cpp makes of the result, and, on the
//! emulated one, what happens where memory does not suffice.
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

/// The turn of a test: the GPU is one for the process, and the memory of the emulated one is limited by one test at a time.
/// None where there is no GPU, as on a machine that builds for others.
fn gpu() -> Option<MutexGuard<'static, ()>> {
    static TURN: Mutex<()> = Mutex::new(());
    if cfg!(feature = "cuda") && !is_present().unwrap() {
        eprintln!("skipped: this machine has no NVIDIA GPU that its driver gives to programs");
        return None;
    }
    Some(TURN.lock().unwrap_or_else(PoisonError::into_inner))
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
        device: DeviceName::Cuda(0),
        ..Settings::paper()
    }
}

fn load(name: &str, settings: &Settings, frozen: Frozen) -> Trainer<Cuda> {
    let base = GgufFile::open(tiny(name)).unwrap();
    let device = Cuda::open(0, frozen).unwrap();
    Trainer::load(device, &base, &settings.method(), settings.seed, settings.step_options()).unwrap()
}
