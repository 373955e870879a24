//! Places in a model's graph, and the two phases of generation.

/// A place in the graph. Places are ordered as the graph computes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// The residual stream before the first block, `[n_embd]` per token.
    Embedding,
    /// A place inside a block: the block's layer, and where in the block.
    Block(usize, InBlock),
    /// The residual stream after the final norm, `[n_embd]` per token.
    FinalNorm,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Place::Embedding => f.write_str("the embedding of a token"),
            Place::Block(il, InBlock::Neurons) => write!(f, "a neuron activation of layer {il}"),
            Place::Block(il, InBlock::Output) => write!(f, "the residual stream after layer {il}"),
            Place::FinalNorm => f.write_str("the residual stream after the final norm"),
        }
    }
}

/// A place in a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum InBlock {
    /// Neuron activations, `[n_ff]` per token.
    Neurons,
    /// The residual stream after the block, `[n_embd]` per token.
    Output,
}

/// Whether a token belongs to the prompt or was generated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Phase {
    #[default]
    Prompt,
    Generation,
}
