//! Checks that llama.cpp computes what this program meant.
//!
//! ```text
//! bounds, difference, logits ──► steering · training · export
//! ```
//!
//! - [`bounds`] is the table of every bound, each with its reason and where it was measured.
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
