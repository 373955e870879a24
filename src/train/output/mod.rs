//! Results of training as GGUF files, and adapters merged into models.

pub mod adapter;
pub mod artifact;
pub mod merge;
pub mod merge_bench;

pub use adapter::{Adapter, Factors};
