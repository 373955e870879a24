//! Trains a probe on a model's residual stream from labelled texts.

use std::sync::atomic::AtomicBool;

use crate::engine::{Model, SessionOptions};
use crate::error::Result;
use crate::interp::residual_streams::mean_residual_streams;
use crate::progress::Progress;
use crate::steer::Fingerprint;

use super::{Fit, Labelled, Probe, ProbeOptions, ProbePlace, fit};

/// Where a probe reads the residual stream, and how many tokens of each text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProbeReading {
    /// Where to read the residual stream.
    pub place: ProbePlace,
    /// Tokens to read of each text at most.
    pub max_tokens: usize,
}

/// Fits a probe to the mean residual streams of labelled texts.
///
/// Returns the probe, and the fit with its held-out results. `fingerprint` (the model's) and `source` (the
/// name of the texts) are recorded in the probe.
///
/// # Errors
/// Those of [`mean_residual_streams`] and [`fit`].
#[expect(
    clippy::too_many_arguments,
    reason = "each is a plain value, and a struct of them would be no clearer"
)]
pub fn train(
    model: &Model,
    session_options: &SessionOptions,
    fingerprint: Fingerprint,
    labelled: &Labelled,
    source: &str,
    reading: ProbeReading,
    options: &ProbeOptions,
    progress: &mut dyn Progress,
    interrupt: &AtomicBool,
) -> Result<(Probe, Fit)> {
    let is_toxic: Vec<bool> = labelled.texts.iter().map(|t| t.is_toxic).collect();
    let texts: Vec<&str> = labelled.texts.iter().map(|t| t.text.as_str()).collect();
    let places = [reading.place.residual_place()];
    let streams = mean_residual_streams(
        model,
        session_options,
        &texts,
        &places,
        reading.max_tokens,
        progress,
        interrupt,
    )?;
    let features: Vec<Vec<f32>> = streams.into_iter().map(|mut places| places.swap_remove(0)).collect();
    let fit = fit(&features, &is_toxic, options)?;
    let probe = Probe {
        weight: fit.weight.clone(),
        place: reading.place,
        fingerprint: Some(fingerprint),
        source: source.to_owned(),
        accuracy: Some(fit.held_out.accuracy as f32),
        auc: Some(fit.held_out.auc as f32),
    };
    Ok((probe, fit))
}
