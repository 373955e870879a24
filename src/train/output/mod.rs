//! Results of training as GGUF files, and adapters merged into models.
//!
//! - [`artifact`] writes the result of a run: adapter, control vector or model.
//! - [`adapter`] reads, checks and writes LoRA adapters.
//! - [`merge`](mod@merge) adds adapters to a model's own tensors, [`merge_report`] says how much survived rounding.
//! - [`merge_bench`] measures the time of a merge.

pub mod adapter;
pub mod artifact;
pub mod merge;
pub mod merge_bench;
pub mod merge_report;
mod provenance;

pub use adapter::{Adapter, Factors};
