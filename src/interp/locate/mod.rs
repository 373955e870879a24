//! Finds the FFN neurons that write toxicity (the paper, section 4.2).
//!
//! ```text
//! probe ─► rank (cosine of every value vector with it) ─► promoted tokens ─► mean activations ─► kept neurons
//! ```

mod rank;

use std::sync::atomic::AtomicBool;

use crate::engine::{Model, SessionOptions, Vocabulary};
use crate::error::Result;
use crate::gguf::GgufFile;
use crate::progress::{Progress, advance_to};
use crate::steer::value_vector::ValueVectors;
use crate::steer::{LocatedNeuron, Neuron};

pub use rank::{LocateTimes, RankedNeuron, bench, rank_value_vectors};

use super::activations::{ActivationPrompt, mean_activations};
use super::vocabulary;

/// Finds the `top` neurons whose value vectors have the highest cosine with `probe`, shape `[n_embd]`.
///
/// Each neuron lists the `n_tokens` tokens that its value vector promotes most. With `n_tokens` 0, the
/// projection is skipped.
///
/// # Errors
/// Those of [`rank_value_vectors`] and [`vocabulary::project`].
pub fn top_neurons(
    model: &GgufFile,
    probe: &[f32],
    top: usize,
    n_tokens: usize,
    progress: &mut dyn Progress,
    interrupt: &AtomicBool,
) -> Result<Vec<LocatedNeuron>> {
    progress.start("layers", u64::from(model.n_layer()?), 0);
    let ranked = rank_value_vectors(model, probe, top, interrupt, advance_to(progress))?;
    progress.finish();
    let located = ranked.iter().map(|ranked| LocatedNeuron {
        neuron: Neuron { layer: ranked.layer, index: ranked.index },
        cosine: Some(ranked.cosine),
        norm: Some(ranked.norm),
        mean_activation: None,
        tokens: Vec::new(),
    });
    let mut neurons: Vec<LocatedNeuron> = located.collect();
    if n_tokens > 0 {
        add_promoted_tokens(model, &mut neurons, n_tokens, interrupt)?;
    }
    Ok(neurons)
}

/// Fills in the tokens that each neuron's value vector promotes most.
fn add_promoted_tokens(
    model: &GgufFile,
    neurons: &mut [LocatedNeuron],
    n_tokens: usize,
    interrupt: &AtomicBool,
) -> Result<()> {
    let vectors = ValueVectors::open(model)?;
    let columns = neurons
        .iter()
        .map(|n| vectors.weighted_sum(n.neuron.layer as usize, &[(n.neuron.index as usize, 1.0)]));
    let columns: Vec<Vec<f32>> = columns.collect::<Result<_>>()?;
    let projected = vocabulary::project(model, &columns, n_tokens, interrupt)?;
    let vocabulary = Vocabulary::open(model.path())?;
    for (neuron, tokens) in neurons.iter_mut().zip(projected) {
        neuron.tokens = tokens.into_iter().map(|t| vocabulary.text(t.token)).collect();
    }
    Ok(())
}

/// Fills in each neuron's mean activation over `prompts` and `n_predict` greedy tokens.
///
/// # Errors
/// Those of [`mean_activations`].
pub fn add_mean_activations(
    model: &Model,
    options: &SessionOptions,
    prompts: &[ActivationPrompt<'_>],
    neurons: &mut [LocatedNeuron],
    n_predict: usize,
    progress: &mut dyn Progress,
    interrupt: &AtomicBool,
) -> Result<()> {
    let of_prompts = mean_activations(model, options, prompts, neurons, n_predict, progress, interrupt)?;
    for (n, neuron) in neurons.iter_mut().enumerate() {
        let sum: f64 = of_prompts.iter().map(|activations| f64::from(activations[n])).sum();
        neuron.mean_activation = Some(sum / of_prompts.len() as f64);
    }
    Ok(())
}

/// Whether a neuron's mean activation is above `min_activation`, or was not measured.
pub fn is_active(neuron: &LocatedNeuron, min_activation: f64) -> bool {
    neuron.mean_activation.is_none_or(|activation| activation > min_activation)
}
