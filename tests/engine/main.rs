//! Compares the engine with references made by transformers (`scripts/make_tiny_models.py`), and with itself.

mod generation;
mod golden;
mod intervention;
mod measured;
mod recording;
mod refusals;
mod steering;
mod ways;

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use detox_gguf::engine::{CacheType, FlashAttention, Model, ModelOptions, Session, SessionOptions};
use serde::de::DeserializeOwned;

fn tiny(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("gguf/tiny").join(format!("{name}.gguf"))
}

fn open(name: &str) -> Model {
    Model::open(&tiny(name), &ModelOptions::default()).unwrap()
}

/// One thread: these models are too small for more.
fn options(n_parallel: usize) -> SessionOptions {
    SessionOptions {
        n_parallel: Some(n_parallel),
        n_threads: Some(1),
        flash_attention: FlashAttention::Auto,
        ..SessionOptions::default()
    }
}

fn session(model: &Model, n_parallel: usize) -> Session {
    Session::open(model, &options(n_parallel), 64).unwrap()
}

/// An interrupt flag that stays off.
fn uninterrupted() -> AtomicBool {
    AtomicBool::new(false)
}

/// As [`options`], with an F32 cache and without flash attention.
///
/// Only the order of sums and ggml's F16 table for GELU then differ from PyTorch.
fn exact(n_parallel: usize) -> SessionOptions {
    SessionOptions {
        flash_attention: FlashAttention::Off,
        cache_type_k: CacheType::F32,
        cache_type_v: CacheType::F32,
        ..options(n_parallel)
    }
}

/// Largest allowed difference to PyTorch of a residual-stream value or a logit, under [`exact`].
fn tolerance(name: &str) -> f32 {
    match name {
        "gpt2" | "bloom" | "gemma3" => 0.03,
        _ => 1e-3,
    }
}

/// Reads a golden file.
fn golden<T: DeserializeOwned>(name: &str) -> T {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/tiny_{name}.json"));
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}
