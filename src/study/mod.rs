//! Studies: workflows that combine `eval`, `interp` and `train`, which do not depend on each other.
//!
//! - [`retrieval`] compares translations inside a model, and correlates that with the fall of toxicity.
//! - [`mod@export`] merges adapters into a model and checks the result in llama.cpp.
//! - [`make_pairs`] samples continuations, scores them, and pairs a clean one with a toxic one.
//! - [`sweep`](mod@sweep) evaluates an intervention at several settings, against random controls.
//! - [`train`] trains on preference pairs, compares the result with llama.cpp, and writes the report. It is the only
//!   study that uses [`crate::report`]; the others return their results.

pub mod export;
pub mod make_pairs;
pub mod retrieval;
pub mod sweep;
pub mod train;
