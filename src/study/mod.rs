//! Work that needs several of `eval`, `interp` and `train`, which never use one another.
//!
//! - [`retrieval`] compares translations inside a model, and correlates that with the fall of toxicity.
//! - [`make_pairs`] samples continuations, scores them, and pairs a clean one with a toxic one.

pub mod make_pairs;
pub mod retrieval;
pub mod sweep;
