//! Training away from toxicity on preference pairs.
//!
//! ```text
//! pairs (prompt, chosen, rejected) ──► tokens ──► split, epoch order
//! ```

pub mod pairs;
pub mod tokens;
