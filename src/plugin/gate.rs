//! Conditional steering: steers a sequence only while a probe says that its text is turning toxic.

use std::path::Path;

use crate::error::{Error, Result};
use crate::graph::place::{InBlock, Place};
use crate::graph::recording::{Reader, Reading};
use crate::interp::probe::{Probe, ProbePlace, sigmoid};

use super::loaded::LoadedSteer;

/// When a gate opens.
///
/// The probe reads every token at the probe's place in the graph, before the edits at that place are made. Its dot
/// product with the residual stream is averaged: a plain mean over the first `window` tokens of a sequence, and from
/// then on a moving average in which each new token has weight `1 / window`. The sigmoid of that mean is the
/// probability that the text is toxic. Probes are trained on the mean residual stream of whole texts; with a window of
/// 0 (unlimited) the gate computes the same mean.
///
/// A micro-batch of a sequence is steered if the probability after the tokens before it was at least `threshold`. So a
/// prompt that fits into one micro-batch is never steered, and each generated token depends on the text before it. In
/// the last block and after the final norm llama.cpp computes outputs only, so a probe there reads only tokens whose
/// logits were requested.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GateOptions {
    /// Steer from this probability on, in [0, 1].
    pub threshold: f64,
    /// Tokens in the mean; 0 for all tokens of the sequence.
    pub window: u32,
    /// Allow a probe made for another quantisation or fine-tune of the same model.
    pub force: bool,
}

impl Default for GateOptions {
    fn default() -> GateOptions {
        GateOptions { threshold: 0.5, window: 16, force: false }
    }
}

/// State of a gate for one sequence.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GateState {
    /// The probability that its text is toxic; `None` before the first token.
    pub probability: Option<f64>,
    /// Whether the sequence's next micro-batch will be steered.
    pub is_open: bool,
}

/// The mean of the probe's readings of one sequence.
#[derive(Debug, Clone, Copy, Default)]
struct Mean {
    n_tokens: u64,
    product: f64,
}

#[derive(Debug)]
pub(super) struct Gate {
    /// Number of its reader. Readings of another reader are ignored.
    number: u64,
    threshold: f64,
    window: u64,
    /// `[n_seq_max]`.
    means: Vec<Mean>,
}

impl Gate {
    /// Opens a probe file; returns the gate, and the reader that feeds it.
    pub(super) fn open(
        path: &Path,
        options: &GateOptions,
        model: &LoadedSteer,
        n_seq_max: usize,
        number: u64,
    ) -> Result<(Gate, Reader)> {
        check_threshold(options.threshold)?;
        let probe = Probe::read(path)?;
        probe.check_model(model.n_embd, &model.fingerprint, path, options.force)?;
        let place = match probe.place {
            ProbePlace::Embedding => Place::Embedding,
            ProbePlace::FinalNorm => Place::FinalNorm,
            ProbePlace::Block(il) if (il as usize) < model.n_layer => {
                Place::Block(il as usize, InBlock::Output)
            }
            ProbePlace::Block(il) => {
                let reason = format!("expected a probe of a layer below {}, found {il}", model.n_layer);
                return Err(Error::input(path, None, reason));
            }
        };
        let means = vec![Mean::default(); n_seq_max];
        let (threshold, window) = (options.threshold, u64::from(options.window));
        let gate = Gate { number, threshold, window, means };
        Ok((gate, Reader { number, place, weight: probe.weight }))
    }

    pub(super) fn set_threshold(&mut self, threshold: f64) -> Result<()> {
        check_threshold(threshold)?;
        self.threshold = threshold;
        Ok(())
    }

    pub(super) fn take(&mut self, Reading { reader, sequence, product }: Reading) {
        // One NaN or infinite product would stay in the mean forever.
        if reader != self.number || !product.is_finite() {
            return;
        }
        let mean = &mut self.means[sequence];
        mean.n_tokens += 1;
        let n = if self.window == 0 { mean.n_tokens } else { mean.n_tokens.min(self.window) };
        mean.product += (product - mean.product) / n as f64;
    }

    /// Forgets the readings of a sequence.
    pub(super) fn reset(&mut self, sequence: usize) {
        self.means[sequence] = Mean::default();
    }

    pub(super) fn state(&self, sequence: usize) -> GateState {
        let mean = self.means[sequence];
        let probability = (mean.n_tokens > 0).then(|| sigmoid(mean.product));
        // Finite products can still give a mean that is NaN, which does not open the gate.
        GateState { probability, is_open: probability.is_some_and(|p| p >= self.threshold) }
    }
}

fn check_threshold(threshold: f64) -> Result<()> {
    match (0.0..=1.0).contains(&threshold) {
        true => Ok(()),
        false => Err(Error::setting("threshold", format!("expected a number in [0, 1], found {threshold}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gate(threshold: f64, window: u64) -> Gate {
        Gate { number: 7, threshold, window, means: vec![Mean::default(); 2] }
    }

    fn read(gate: &mut Gate, products: &[f64]) {
        products.iter().for_each(|&product| gate.take(Reading { reader: 7, sequence: 0, product }));
    }

    #[test]
    fn a_gate_is_closed_before_the_first_token_and_separate_for_each_sequence() {
        let mut gate = gate(0.0, 4);
        assert_eq!(gate.state(0), GateState { probability: None, is_open: false });
        read(&mut gate, &[0.0]);
        assert_eq!(gate.state(0), GateState { probability: Some(0.5), is_open: true });
        assert!(!gate.state(1).is_open);
        gate.reset(0);
        assert!(!gate.state(0).is_open);
    }

    #[test]
    fn readings_of_another_gates_probe_are_ignored() {
        let mut gate = gate(0.0, 4);
        gate.take(Reading { reader: 6, sequence: 0, product: 1.0 });
        assert_eq!(gate.state(0).probability, None);
    }

    #[test]
    fn the_mean_is_plain_within_the_window_and_then_moves() {
        // Means: 2, then 1, then with a window of 2: 1 + (4 - 1) / 2 = 2.5.
        let mut gate = gate(0.9, 2);
        for (product, mean) in [(2.0, 2.0), (0.0, 1.0), (4.0, 2.5)] {
            read(&mut gate, &[product]);
            assert_eq!(gate.state(0).probability, Some(sigmoid(mean)));
            assert_eq!(gate.state(0).is_open, sigmoid(mean) >= 0.9);
        }
    }

    #[test]
    fn without_a_window_the_mean_is_over_all_tokens() {
        let mut gate = gate(0.5, 0);
        read(&mut gate, &[1.0, 2.0, 3.0, 6.0]);
        assert_eq!(gate.state(0).probability, Some(sigmoid(3.0)));
    }

    #[test]
    fn readings_that_are_not_finite_are_ignored() {
        let mut gate = gate(0.0, 0);
        read(&mut gate, &[f64::NAN, f64::INFINITY]);
        assert_eq!(gate.state(0), GateState { probability: None, is_open: false });
        read(&mut gate, &[2.0, f64::NAN, f64::NEG_INFINITY, 4.0]);
        assert_eq!(gate.state(0).probability, Some(sigmoid(3.0)), "the mean stays finite");
        for threshold in [-0.1, 1.1, f64::NAN] {
            assert!(gate.set_threshold(threshold).is_err());
        }
    }
}
