//! What neurons write, and models with it baked in.

#[path = "../support/split.rs"]
mod split;
mod weights;
