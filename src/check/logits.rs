//! llama.cpp's logits for a comparison, and nudges that measure its rounding noise.

use crate::engine::{CacheType, FlashAttention, Model, Session, SessionOptions, Token};
use crate::error::Result;
use crate::graph::steering::{Change, Edit, Operation, When};

/// How much a nudge adds to a neuron.
const NUDGE: f32 = 0.001;

/// Neurons between two that [`nudges`] changes: the block over which ggml rounds activations to 8 bits.
const BLOCK: usize = 32;

/// Returns `options` with an F32 KV cache and without flash attention, so that only the weights affect the result.
pub fn exact_options(options: &SessionOptions) -> SessionOptions {
    SessionOptions {
        flash_attention: FlashAttention::Off,
        cache_type_k: CacheType::F32,
        cache_type_v: CacheType::F32,
        ..options.clone()
    }
}

/// The logits after every token of `texts`, text by text, of shape `[n_tokens][n_vocab]`.
///
/// For comparing models that do not fit into memory together.
///
/// # Errors
/// Those of [`Session::logits`], which refuses logits that are not finite.
pub fn logits(model: &Model, texts: &[Vec<Token>], options: &SessionOptions) -> Result<Vec<Vec<f32>>> {
    let mut session = open_for(model, texts, options)?;
    let mut rows = Vec::new();
    for text in texts {
        rows.append(&mut session.logits(text)?);
    }
    Ok(rows)
}

/// Opens a session that is large enough for the longest of `texts`, one at a time.
pub(super) fn open_for(model: &Model, texts: &[Vec<Token>], options: &SessionOptions) -> Result<Session> {
    let longest = texts.iter().map(Vec::len).max().unwrap_or(0);
    let options = SessionOptions { n_parallel: Some(1), n_ctx: None, ..options.clone() };
    Session::open(model, &options, longest)
}

/// An edit that adds 0.001 to one neuron, for every token.
pub(super) fn nudge(layer: usize, index: usize) -> Edit {
    Edit {
        layer,
        when: When::Both,
        coefficient: 1.0,
        change: Change::Neuron { index, operation: Operation::Offset(NUDGE) },
    }
}

/// Edits that add 0.001 to every 32nd neuron of layer 0.
///
/// The change itself is negligible, but it alters the rounding of every later product. A trainer that does not round,
/// or a model with other weights, also differs from the first layer on, so this is the noise to compare with.
pub(super) fn nudges(model: &Model) -> Vec<Edit> {
    let n_ff = model.n_ff().first().copied().unwrap_or(0);
    (0..n_ff).step_by(BLOCK).map(|index| nudge(0, index)).collect()
}
