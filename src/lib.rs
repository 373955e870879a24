//! Measures and reduces the toxicity of GGUF language models in 17 languages, on llama.cpp.
//!
//! ```text
//! text, gguf ─► graph ─► engine ─► steer ─► score ─► { eval | interp | train } ─► check ─► study ─► report
//!
//! doors: cli (the program) · plugin (steering inside another program) · this crate
//! ```
//!
//! A module uses modules to its left, and the leaves `error`, `file`, `memory` and `progress`. The exception:
//! `report` formats results that are defined in `study`, and `study::train` writes its report.
//!
//! - [`text`] knows the languages, identifies a text's language, normalises words, and reads lines of people's files.
//! - [`gguf`] reads, validates and writes GGUF files, and converts their blocks to and from numbers.
//! - [`graph`] describes llama.cpp's compute graphs, and edits or records their values during the forward pass.
//! - [`engine`] runs models: samples continuations in parallel, computes log-probs, records activations.
//! - [`steer`] reads, combines, applies and bakes interventions, control vectors and LoRA adapters.
//! - [`score`] rates the toxicity of texts: the trait `Scorer`, its kinds, and the agreement of two scorers.
//! - [`eval`] turns prompts into continuations, scores and metrics with confidence intervals.
//! - [`interp`] finds what to steer: probes, directions, value vectors, neuron activations, retrieval.
//! - [`train`] trains models on preference pairs (DPO), on the CPU or with CUDA.
//! - [`check`] verifies in llama.cpp that trained, merged and steered models behave as intended.
//! - [`study`] combines the modules above: training and export end to end, sweeps, preference pairs, retrieval.
//! - [`report`] formats results as JSON, CSV, Markdown, terminal tables and HTML.
//! - [`cli`] is the command line: it parses, calls the library, prints.
//! - [`plugin`] steers inside a program that runs llama.cpp itself, from Rust or C.
//!
//! - [`error`] is the error type of every module.
//! - [`finite`] refuses NaN and infinities.
//! - [`mod@file`] checks outputs, writes files atomically, and locks and resumes runs.
//! - [`memory`] measures memory.
//! - [`progress`] is the trait through which long work reports its progress.
//!
//! The default feature `engine` compiles llama.cpp in. Without it the crate is small and has no llama.cpp: `gguf`,
//! `graph`, `plugin`, and those parts of `interp`, `score` and `steer` that do not run a model. The features `rows` and
//! `tokenizer-json` add the readers of `text` without llama.cpp. With `capi` as well
//! the crate is the plugin, a C library (`vendor/include/detox_gguf.h`).
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
pub mod finite;
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

/// The version of this crate, with the git revision of the build if known.
pub fn version() -> &'static str {
    env!("DETOX_GGUF_VERSION")
}
