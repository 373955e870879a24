//! Describes changes to a running model: adapters, a control vector, and edits by callback.
//!
//! [`crate::steer::compile`] decides which of these an intervention needs.

use std::path::PathBuf;

/// Everything that changes a running model. The default changes nothing.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Steering {
    /// LoRA adapters, each with its scale.
    pub loras: Vec<LoraScaled>,
    /// Added to the residual stream after blocks 1 and up, at almost no cost.
    pub control_vector: Option<ControlVector>,
    /// Edits made by the eval callback. Several edits of one value are made in this order.
    pub edits: Vec<Edit>,
}

impl Steering {
    /// Whether it changes nothing.
    pub fn is_empty(&self) -> bool {
        *self == Steering::default()
    }
}

/// A LoRA adapter file and the scale that multiplies it.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraScaled {
    /// The adapter (GGUF).
    pub path: PathBuf,
    /// As in `--lora-scaled`: multiplied with the adapter's own alpha / rank.
    pub scale: f32,
}

/// One vector per block except the first, as `llama_set_adapter_cvec` takes them.
#[derive(Debug, Clone, PartialEq)]
pub struct ControlVector {
    /// Width of the residual stream.
    pub n_embd: usize,
    /// The vectors, already multiplied by their coefficients: `[n_layer - 1][n_embd]`. Row 0 is added after block 1.
    /// A row of zeros adds nothing.
    pub rows: Vec<f32>,
}

/// One edit in one block.
#[derive(Debug, Clone, PartialEq)]
pub struct Edit {
    /// The block, from 0.
    pub layer: usize,
    /// Which tokens it is made on.
    pub when: When,
    /// Fraction of the change that is made: x becomes `x + coefficient * (edited(x) - x)`.
    pub coefficient: f32,
    /// What is changed, and how.
    pub change: Change,
}

/// Which tokens an intervention applies to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum When {
    /// Tokens of the prompt.
    Prompt,
    /// Tokens after the prompt.
    Generation,
    /// All tokens.
    #[default]
    Both,
}

/// What an [`Edit`] changes, and how.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// One neuron's activation, after the non-linearity and gate: the input of `ffn_down`.
    Neuron {
        /// The neuron, below `n_ff`.
        index: usize,
        /// The operation on its activation.
        operation: Operation,
    },
    /// The residual stream after the block, along a direction.
    ///
    /// [`Operation::Offset`] adds the vector itself, times the offset. The other operations act on the component
    /// `c = x . v / |v|` along the vector: the residual stream becomes `x + (operation(c) - c) v / |v|`. Assigning 0
    /// therefore projects the direction out.
    Direction {
        /// Shape `[n_embd]`, finite, not all zero.
        vector: Vec<f32>,
        /// The operation on the vector or the component.
        operation: Operation,
    },
}

impl Change {
    /// The operation on the neuron or the direction.
    pub fn operation(&self) -> Operation {
        match self {
            Change::Neuron { operation, .. } | Change::Direction { operation, .. } => *operation,
        }
    }
}

/// An operation on one value.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    /// Adds this: `a + offset` (the paper's intervention, section 4.2).
    Offset(f32),
    /// Replaces the value.
    Assign(f32),
    /// Multiplies by this; 0 switches a neuron off.
    Scale(f32),
    /// Limits the value to `[min, max]`.
    Clamp {
        /// Lower bound.
        min: f32,
        /// Upper bound.
        max: f32,
    },
}

impl Operation {
    /// The value after the operation.
    pub fn apply(self, a: f32) -> f32 {
        match self {
            Operation::Offset(offset) => a + offset,
            Operation::Assign(value) => value,
            Operation::Scale(factor) => a * factor,
            Operation::Clamp { min, max } => a.max(min).min(max),
        }
    }
}
