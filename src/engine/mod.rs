//! Runs models with llama.cpp: samples continuations, and computes log-probabilities.
//!
//! ```text
//! Model ──► Session ──► schedule::generate     k sampled continuations per prompt
//!   ▲              ├──► logprob::score         log-probabilities of given continuations
//! Steering         ├──► activation::record     mean activations of neurons over greedy continuations
//!                  └──► residual::record       mean residual streams of texts, by layer
//! ```
//!
//! A [`Model`] is shared; each [`Session`] owns one `llama_context`. A session's sequences are its slots: slot 0
//! holds the current prompt, slots 1 to `n_parallel` its continuations. Every slot has its own KV stream, so a token
//! attends only to its own sequence. A prompt is decoded once, in slot 0, and its KV is copied to the slots that
//! continue it.
//!
//! A [`Steering`] describes how a model is changed while it runs. A [`Model`] passes its steering to every session
//! opened over it; [`Session::steer`] replaces it between two decodes. Sessions that edit or record values inside
//! the graph do so in llama.cpp's eval callback; the others run without it.
//!
//! # Example
//! Sample five continuations of a prompt while an intervention steers the model:
//!
//! ```
//! # std::env::set_current_dir(env!("CARGO_MANIFEST_DIR"))?;
//! # let folder = tempfile::tempdir()?;
//! use std::{path::Path, sync::atomic::AtomicBool};
//!
//! use detox_gguf::engine::schedule::{self, GenerateOptions, Request};
//! use detox_gguf::engine::{Model, ModelOptions, Sampling, Session, SessionOptions};
//! use detox_gguf::gguf::GgufFile;
//! use detox_gguf::steer::{CompileOptions, SteerFile, compile::compile};
//!
//! let (path, steer) = (Path::new("gguf/tiny/llama.gguf"), Path::new("steer.json"));
//! # let steer = &folder.path().join(steer);
//! # std::fs::write(steer, r#"{"detox_gguf": "interventions", "format": 1, "interventions":
//! #     [{"what": {"neurons": [[1, 3], [2, 40]]}, "edit": {"offset": -3}}]}"#)?;
//! let sources = [(SteerFile::open(steer)?, 1.0)]; // with a coefficient of 1
//! let compiled = compile(&GgufFile::open(path)?, &sources, &[], &CompileOptions::default())?;
//! let model = Model::open(path, &ModelOptions::default())?.with_steering(compiled.steering)?;
//! let mut session = Session::open(&model, &SessionOptions::default(), 64)?;
//! let prompt = Request { id: "en/1".into(), tokens: model.tokenize_prompt("Once upon a time")? };
//! let options = GenerateOptions { k: 5, n_predict: 20, sampling: Sampling::PAPER, seed: 1, ignore_eos: false };
//! let print = |c: schedule::Continuation| Ok(println!("{}", model.detokenize(&c.tokens)));
//! let stats = schedule::generate(&mut session, &[prompt], &options, &AtomicBool::new(false), print)?;
//! # assert!(stats.n_decoded > 0);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Modules
//! - [`sample`] chooses a token from logits: temperature, top-k, top-p, min-p.
//! - [`random`] makes the random streams.
//! - [`mod@bench`] measures generation speed.
//! - `ffi` holds all `unsafe` code of the engine.

pub mod activation;
mod batching;
pub mod bench;
mod ffi;
mod in_use;
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
pub(crate) use ffi::set_abort_callback;
pub(crate) use in_use::{UsedFile, files_in_use};
pub use model::{LoadedSteering, Model};
pub use options::{CacheType, FlashAttention, ModelOptions, SessionOptions};
pub use sample::Sampling;
pub use session::Session;
pub use steering::Steering;
pub use vocabulary::Vocabulary;

/// A token id, in `0..n_vocab`.
pub type Token = i32;

/// The version of llama.cpp in this build.
pub fn llama_version() -> String {
    ffi::llama_version()
}

/// The CPU features that ggml uses in this build, as ggml prints them.
pub fn system_info() -> String {
    ffi::system_info()
}
