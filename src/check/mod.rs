//! Checks that llama.cpp computes what was meant.
//!
//! - [`steering`] compares two ways of steering one model.
//! - [`training`] compares a trained result in llama.cpp with the trainer.
//! - [`export`] compares a merged model with its base and adapters.

pub mod export;
pub mod steering;
pub mod training;
