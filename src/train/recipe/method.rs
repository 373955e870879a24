//! What training changes in a model.

use serde::{Deserialize, Serialize};

/// What is trained, as users type it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MethodName {
    /// Low-rank changes of chosen matrices.
    Lora,
    /// One direction a block.
    Vector,
    /// Every weight.
    Full,
}
