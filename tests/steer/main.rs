//! Tests of value vectors and of models with baked biases.

#[path = "../support/split.rs"]
mod split;
mod weights;
