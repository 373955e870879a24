//! Preference pairs, from files to packed batches of tokens.

pub mod pack;
pub mod preference_pair;
pub mod tokens;
