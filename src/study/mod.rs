//! Work that needs several of `eval`, `interp` and `train`, which never use one another.
//!
//! - [`make_pairs`] samples continuations, scores them, and pairs a clean one with a toxic one.

pub mod make_pairs;
pub mod sweep;
