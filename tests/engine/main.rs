//! The engine against references made by transformers (`scripts/make_tiny_models.py`), and against itself.

mod generation;
mod golden;
mod refusals;

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use detox_gguf::engine::{FlashAttention, Model, ModelOptions, Session, SessionOptions};

fn tiny(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("gguf/tiny").join(format!("{name}.gguf"))
}

fn open(name: &str) -> Model {
    Model::open(&tiny(name), &ModelOptions::default()).unwrap()
}

/// One thread: these models are too small to share.
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

fn go_on() -> AtomicBool {
    AtomicBool::new(false)
}
