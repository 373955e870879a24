//! Checks in llama.cpp that trained, merged and steered models behave as intended.
//!
//! ```text
//! bounds, difference, logits ──► steering · training · export
//! ```
//!
//! - [`bounds`] lists every bound, with its reason and its measurement.
//! - [`difference`] compares two sets of logits: KL divergence and largest logit difference.
//! - [`logits`] runs llama.cpp for a comparison, and nudges neurons to measure its rounding noise.
//! - [`steering`] compares two ways of steering one model.
//! - [`training`] compares the trainer with llama.cpp running its result.
//! - [`export`] compares a merged model with its base plus adapters.

pub mod bounds;
pub mod difference;
pub mod export;
pub mod logits;
pub mod steering;
pub mod training;
