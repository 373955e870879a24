//! What changes a model while it runs: adapters, a control vector, and edits by callback.
//!
//! These are llama.cpp's own means, in the order of their cost. Which of them an intervention needs is
//! decided by [`crate::steer::compile`]; here they are only described.

use std::path::PathBuf;

/// Everything that changes a model while it runs. The default changes nothing.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Steering {
    /// LoRA adapters, each with its scale.
    pub loras: Vec<LoraScaled>,
    /// Added to the residual stream after blocks 1 and up; free of cost.
    pub control_vector: Option<ControlVector>,
    /// Made by the eval callback, in this order where several meet.
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
    /// As `--lora-scaled` takes it; the adapter's own alpha / rank comes on top.
    pub scale: f32,
}

/// One vector for each block but the first, as `llama_set_adapter_cvec` takes them.
#[derive(Debug, Clone, PartialEq)]
pub struct ControlVector {
    /// Width of the residual stream.
    pub n_embd: usize,
    /// Coefficients applied, shape `[n_layer - 1][n_embd]`: row 0 is added after block 1. Rows of zeros
    /// where nothing is added.
    pub rows: Vec<f32>,
}

/// One edit at one place of one block.
#[derive(Debug, Clone, PartialEq)]
pub struct Edit {
    /// The block, from 0.
    pub layer: usize,
    /// Which tokens it is made on.
    pub when: When,
    /// Share of the change that is made: the place becomes `x + coefficient * (edited(x) - x)`.
    pub coefficient: f32,
    /// What is changed, and how.
    pub change: Change,
}

/// Which tokens an intervention is made on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum When {
    /// Those of the prompt.
    Prompt,
    /// Those that follow it.
    Generation,
    /// All.
    #[default]
    Both,
}

/// What an [`Edit`] changes, and how.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// One neuron's activation, after the non-linearity and gate: the input of `ffn_down`.
    Neuron {
        /// Which of the block's `n_ff` neurons.
        index: usize,
        /// What becomes of it.
        operation: Operation,
    },
    /// The residual stream as the block leaves it, along a direction.
    ///
    /// [`Operation::Offset`] adds the vector as it is, times the offset. The others act on the component
    /// `c = x . v / |v|` along the vector: the residual stream becomes `x + (operation(c) - c) v / |v|`, so
    /// that assigning 0 projects the direction out.
    Direction {
        /// Shape `[n_embd]`, finite, not all zero.
        vector: Vec<f32>,
        /// What becomes of the component.
        operation: Operation,
    },
}

impl Change {
    /// What becomes of the neuron, or of the component.
    pub fn operation(&self) -> Operation {
        match self {
            Change::Neuron { operation, .. } | Change::Direction { operation, .. } => *operation,
        }
    }
}

/// What becomes of a number.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    /// It plus this: `a + offset` (the paper's intervention, section 4.2).
    Offset(f32),
    /// This instead of it.
    Assign(f32),
    /// It times this; 0 switches a neuron off.
    Scale(f32),
    /// It, but no less than `min` and no more than `max`.
    Clamp {
        /// Least value.
        min: f32,
        /// Most.
        max: f32,
    },
}

impl Operation {
    /// The number after the operation.
    pub fn apply(self, a: f32) -> f32 {
        match self {
            Operation::Offset(offset) => a + offset,
            Operation::Assign(value) => value,
            Operation::Scale(factor) => a * factor,
            Operation::Clamp { min, max } => a.max(min).min(max),
        }
    }
}
