//! Preference pairs, from files to packed batches of tokens.
//!
//! [`preference_pair`] (texts) ──► [`tokens`] ──► [`pack`] (rows of a batch)

pub mod pack;
pub mod preference_pair;
pub mod tokens;
