//! Models and sessions over llama.cpp: many continuations of many prompts, and log-probabilities.
//!
//! ```text
//! Model ──► Session ──► schedule::generate     k sampled continuations a prompt
//!   ▲              ├──► logprob::score         log-probabilities of given continuations
//! Steering         ├──► activation::record     mean activations of neurons over greedy continuations
//!                  └──► residual::record       mean residual streams of texts, by layer
//! ```
//!
//! A [`Model`] is shared; each [`Session`] owns one `llama_context`. Its sequences are slots: slot 0
//! holds the prompt that is being served, slots 1 to `n_parallel` the continuations. Every slot has a
//! KV stream of its own, so a token attends over its own sequence only; a prompt is decoded once, in
//! slot 0, and its KV is copied to the slots that continue it.
//!
//! [`Steering`] describes what changes a model while it runs. A [`Model`] carries one to every session
//! opened over it; [`Session::steer`] changes it between two decodes. Values inside the graph are read and
//! written by llama.cpp's eval callback, which only sessions that need it have.

pub mod activation;
pub mod bench;
mod ffi;
pub mod logprob;
pub mod model;
pub mod options;
pub mod random;
pub mod residual;
pub mod sample;
pub mod schedule;
pub mod session;
mod vocabulary;

pub use crate::graph::{Architecture, architecture, steering};
pub use model::{LoadedSteering, Model};
pub use options::{CacheType, FlashAttention, ModelOptions, SessionOptions};
pub use sample::Sampling;
pub use session::Session;
pub use steering::Steering;
pub use vocabulary::Vocabulary;

/// A token id, as llama.cpp counts them: `0..n_vocab`.
pub type Token = i32;

/// The version of llama.cpp in this build.
pub fn llama_version() -> String {
    ffi::llama_version()
}

/// What ggml in this build uses of the CPU, in its own words.
pub fn system_info() -> String {
    ffi::system_info()
}
