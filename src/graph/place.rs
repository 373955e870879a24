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
