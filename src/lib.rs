//! Measures how toxic a GGUF model's continuations are, in 17 languages, with llama.cpp.
//!
//! ```text
//! gguf ──► graph ──► engine ──► steer ──► { eval | interp | train } ──► study ──► report
//!             doors: cli (the program) · plugin (inside another program) · this crate
//! ```
//!
//! A module uses only what stands to its left.
//!
//! - [`gguf`] reads, validates and writes GGUF files.
//! - [`graph`] knows llama.cpp's graphs from inside, and edits the values in them as they are computed.
//! - [`engine`] runs models: many continuations of many prompts, and log-probabilities.
//! - [`steer`] reads, combines and compiles what changes a model while it runs.
//! - [`interp`] finds what to change: probes, value vectors, activations, retrieval.
//! - [`train`] trains models on preference pairs, by hand over a device, and puts what was learned into files.
//! - [`eval`] turns prompts into continuations, scores and metrics with intervals.
//! - [`study`] is what needs several of these: making preference pairs.
//! - [`report`] turns results into JSON, CSV, Markdown, a terminal table and an HTML page.
//! - [`plugin`] steers inside a program that runs llama.cpp itself.
//!
//! The feature `engine`, on by default, is all that needs llama.cpp compiled in: `engine`, `train`, `study`, `report`,
//! `cli`, and the parts of the others that run models. Without it the crate is small, and carries no llama.cpp; with
//! `capi` it is then the plugin, a C library (`vendor/include/detox_gguf.h`).
//!
//! The metrics are those of Li, Yong and Bach, "Preference Tuning For Toxicity Mitigation Generalizes
//! Across Languages" (arXiv 2406.16235).

#[cfg(feature = "engine")]
pub mod check;
#[cfg(feature = "engine")]
pub mod cli;
#[cfg(feature = "engine")]
pub mod engine;
pub mod error;
#[cfg(feature = "engine")]
pub mod eval;
pub mod file;
pub mod gguf;
pub mod graph;
pub mod interp;
#[cfg(feature = "engine")]
pub mod memory;
pub mod plugin;
#[cfg(feature = "engine")]
pub mod progress;
#[cfg(feature = "engine")]
pub mod report;
pub mod score;
pub mod steer;
#[cfg(feature = "engine")]
pub mod study;
pub mod text;
#[cfg(feature = "engine")]
pub mod train;

pub use error::{Error, Result};

/// This program's version, with the git revision it was built from where that is known.
pub fn version() -> &'static str {
    env!("DETOX_GGUF_VERSION")
}
