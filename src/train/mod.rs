//! Training away from toxicity on preference pairs (DPO).
//!
//! ```text
//! data: preference pairs ──► tokens ──► packed rows ─┐
//!                                                    ▼
//! gguf ──► model: config, transformer ──► forward ──► dpo ──► backward ──► optimizer   (run::trainer: one step)
//!             over a device (cpu, cuda)       ▲                                │
//!                                     run::reference                           ▼
//! recipe ──► run: training loop, evaluations, checkpoints, metrics ──► output: adapter, control vector, model
//! ```
//!
//! - [`recipe`] holds the settings of a run and the preference losses; it uses none of the other modules but the names
//!   of devices.
//! - [`data`] reads preference pairs, tokenises them and packs them into batches.
//! - [`model`] is the transformer: weights, trained parameters, forward and backward pass.
//! - [`device`] computes its operations, on the CPU or on an NVIDIA GPU.
//! - [`run`](mod@run) trains: steps, evaluations, checkpoints, metrics.
//! - [`output`] writes the result, and merges adapters into models.
//!
//! [`crate::study::train`] runs all of this from a model and pairs to a checked result and a report.

pub mod data;
pub mod device;
pub mod model;
pub mod output;
pub mod recipe;
pub mod run;
