//! What is trained: an adapter, a direction per layer, or every weight.

use serde::{Deserialize, Serialize};

use crate::train::recipe::lora::LoraOptions;

/// A training method as users type it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MethodName {
    /// Low-rank updates of chosen matrices.
    Lora,
    /// One direction per block.
    Vector,
    /// Every weight.
    Full,
}

/// A training method with its options.
#[derive(Debug, Clone, PartialEq)]
pub enum Method {
    /// Low-rank updates of chosen matrices.
    Lora(LoraOptions),
    /// Every weight.
    Full,
    /// One direction for each block from block 1 up, added to the residual stream after the block.
    Vector,
}
