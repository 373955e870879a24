//! Options of one training step.

use crate::train::recipe::dpo::Preference;
use crate::train::recipe::optimizer::OptimizerKind;

/// Loss, optimizer and memory use of a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepOptions {
    /// The loss and its parameters.
    pub preference: Preference,
    /// The optimizer.
    pub optimizer: OptimizerKind,
    /// Weight decay; AdamW only.
    pub weight_decay: f32,
    /// Maximum rows (tokens) in a forward pass; a longer pair gets a pass of its own.
    pub max_rows: usize,
    /// Gradient checkpointing: keep only each block's input and recompute the rest in the backward pass.
    pub checkpointing: bool,
}
