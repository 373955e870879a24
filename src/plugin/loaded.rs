//! An intervention compiled for one model, shared by a [`Steer`](super::Steer) and its callbacks.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::graph::Architecture;
use crate::graph::steering::{ControlVector, Edit};
use crate::steer::Fingerprint;

/// A compiled intervention, with the coefficient that all its users share.
#[derive(Debug)]
pub(super) struct LoadedSteer {
    /// `None` if the callback does not know the architecture. There are no edits then.
    pub(super) architecture: Option<&'static Architecture>,
    pub(super) n_layer: usize,
    pub(super) n_embd: usize,
    pub(super) fingerprint: Fingerprint,
    /// Whether the model has sliding-window attention. llama.cpp then keeps two caches, and may split a batch in
    /// more than one way.
    pub(super) has_sliding_window: bool,
    /// Compiled at a coefficient of 1.
    pub(super) control_vector: Option<ControlVector>,
    /// Compiled at a coefficient of 1.
    pub(super) edits: Vec<Edit>,
    /// How each part is applied, in sentences.
    pub(super) choices: Vec<String>,
    /// The largest number that the coefficient multiplies.
    pub(super) largest: f32,
    /// The bits of an f32.
    pub(super) coefficient: AtomicU32,
}

impl LoadedSteer {
    pub(super) fn coefficient(&self) -> f32 {
        f32::from_bits(self.coefficient.load(Ordering::Acquire))
    }

    pub(super) fn set_coefficient(&self, coefficient: f32) {
        self.coefficient.store(coefficient.to_bits(), Ordering::Release);
    }
}
