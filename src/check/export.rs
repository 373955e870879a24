//! Compares a merged model with its base plus adapters, in llama.cpp.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::Serialize;

use crate::check::bounds;
use crate::check::difference::{Difference, compare};
use crate::check::logits::{exact_options, logits, nudges};
use crate::engine::steering::LoraScaled;
use crate::engine::{Model, ModelOptions, SessionOptions, Steering, Token};
use crate::error::{Error, Result};
use crate::gguf::{GgufFile, TensorType, check_decoder};

/// A merged model against its base with the adapters applied at run time, in F32.
///
/// llama.cpp rounds what it multiplies with an adapter: to 8 bits for Q8_0 and Q4_0, to F16 for F16. A merge has the
/// adapter's numbers without that rounding. So the comparison uses the same numbers in F32, and the bounds need no
/// allowance for the types of the adapters.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct LoadedBack {
    /// The adapters' effect: the base alone against the base with adapters.
    pub effect: Difference,
    /// The adapters' own rounding: in their file's types against F32. `None` if they are in F32.
    pub rounding: Option<Difference>,
    /// The merge's error: the merged model against the base with adapters.
    pub missed: Difference,
    /// The noise floor: the effect of a negligible nudge to the base with adapters. `None` if the eval callback,
    /// which applies the nudge, does not support the architecture.
    pub floor: Option<Difference>,
}

/// Why a merged model is not kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The reason, for an error message.
    pub reason: String,
    /// Whether `allow_loss` would keep the model.
    pub can_be_allowed: bool,
    /// Whether the adapters' effect cannot be told from rounding.
    pub is_too_small: bool,
}

/// The adapters of a comparison.
#[derive(Debug, Clone, Copy)]
pub struct Applied<'a> {
    /// As the user gave them.
    pub given: &'a [LoraScaled],
    /// With the same numbers in F32; equal to `given` if they are already.
    pub in_f32: &'a [LoraScaled],
}

impl LoadedBack {
    /// Compares the logits after each token of `texts`, under [`exact_options`].
    ///
    /// The base is closed before the merged model is opened, so that only one is in memory. `tokenize` tokenises the
    /// texts with the base's vocabulary.
    ///
    /// # Errors
    /// Those of loading and decoding; [`Error::Model`] if a logit is not finite, also of the merged model with
    /// `session_options` as they are; [`Error::Interrupted`] after the current pass.
    pub fn compare(
        base: &Path,
        loras: Applied<'_>,
        merged: &Path,
        model_options: &ModelOptions,
        session_options: &SessionOptions,
        tokenize: impl FnOnce(&Model) -> Result<Vec<Vec<Token>>>,
        interrupt: &AtomicBool,
    ) -> Result<LoadedBack> {
        let check_interrupt =
            || if interrupt.load(Ordering::SeqCst) { Err(Error::Interrupted) } else { Ok(()) };
        let options = exact_options(session_options);
        let model = Model::open(base, model_options)?;
        let texts = tokenize(&model)?;
        check_interrupt()?;
        let of = |loras: &[LoraScaled]| Steering { loras: loras.to_vec(), ..Steering::default() };
        let steering = of(loras.in_f32);
        let expected = logits(&model.with_steering(steering.clone())?, &texts, &options)?;
        check_interrupt()?;
        let effect = compare(&logits(&model, &texts, &options)?, &expected);
        check_interrupt()?;
        let rounding = match loras.in_f32 == loras.given {
            true => None,
            false => {
                let given = model.with_steering(of(loras.given))?;
                Some(compare(&logits(&given, &texts, &options)?, &expected))
            }
        };
        check_interrupt()?;
        let floor = match model.graph() {
            Ok(_) => {
                let nudged = Steering { edits: nudges(&model), ..steering };
                Some(compare(&logits(&model.with_steering(nudged)?, &texts, &options)?, &expected))
            }
            // The eval callback does not support this architecture.
            Err(Error::Model { .. }) => None,
            Err(other) => return Err(other),
        };
        drop(model);
        check_interrupt()?;
        check_decoder(&GgufFile::open(merged)?)?;
        // llama.cpp looks at every tensor, also at those that these texts do not reach.
        let model = Model::open(merged, &ModelOptions { check_tensors: true, ..*model_options })?;
        let found = logits(&model, &texts, &options)?;
        check_interrupt()?;
        // As it will be used: keys and values that do not fit into an F16 cache become infinities.
        logits(&model, &texts, session_options)?;
        Ok(LoadedBack { effect, rounding, missed: compare(&found, &expected), floor })
    }

    /// Whether the merge lost almost nothing: a tenth of the effect, or twice the noise floor.
    pub fn is_close(&self) -> bool {
        let floor = self.floor.map_or(0.0, |floor| floor.mean_kl);
        let of_effect = bounds::MERGE_LOSS_CLOSE * self.effect.mean_kl;
        bounds::within(self.missed.mean_kl, bounds::largest([of_effect, bounds::MERGE_NOISE_FACTOR * floor]))
    }

    /// Decides whether the merged model may be kept.
    ///
    /// `changed` lists the types of the changed tensors before and after. `is_zero` is true if the adapters change
    /// nothing. Two rules apply:
    /// - If all changed tensors are float before and after, only rounding may differ: the loss must be below a bound
    ///   for the type, or below twice the noise floor if other tensors of the model are quantised.
    /// - Unless `is_zero`, the merged model must be nearer to the base with adapters than the base is. Unless
    ///   `allow_loss`, it must also lose at most half of the effect.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn verdict(
        &self,
        changed: &[(TensorType, TensorType)],
        is_zero: bool,
        allow_loss: bool,
    ) -> Result<(), Refusal> {
        let (missed, effect) = (self.missed.mean_kl, self.effect.mean_kl);
        let floor = self.floor.map_or(0.0, |floor| floor.mean_kl);
        if !(missed.is_finite() && effect.is_finite() && floor.is_finite()) {
            let reason = format!(
                "expected finite differences of logits, found a mean KL of {missed} for the merged model, {effect} for \
                 the base, and {floor} for noise"
            );
            return Err(Refusal { reason, can_be_allowed: false, is_too_small: false });
        }
        let of_types =
            changed.iter().map(|&(from, to)| bounds::float_merge(from).and(bounds::float_merge(to)));
        if let Some(of_types) = of_types.collect::<Option<Vec<f64>>>() {
            let bound = of_types.into_iter().fold(bounds::MERGE_NOISE_FACTOR * floor, f64::max);
            if !bounds::within(missed, bound) {
                let reason = format!(
                    "the merged model differs from the base with the adapters: expected a mean KL up to {bound:.1e}, \
                     found {missed:.1e}"
                );
                return Err(Refusal { reason, can_be_allowed: false, is_too_small: false });
            }
        }
        let is_nearer = missed < effect;
        if is_zero || is_nearer && (allow_loss || missed <= bounds::MERGE_LOSS_MAX * effect) {
            return Ok(());
        }
        let rounding = bounds::largest([floor, bounds::LOGIT_ROUNDING]);
        let is_too_small = bounds::within(effect, bounds::FAINT_EFFECT_FACTOR * rounding);
        let why = if is_too_small {
            format!(
                "the adapters' effect is too small to tell from the model's own rounding (mean KL {rounding:.1e})"
            )
        } else {
            "rounding removed the change, or added an error as large".into()
        };
        // Then the merged model is as right as can be measured.
        let is_within_rounding =
            is_too_small && bounds::within(missed, bounds::MERGE_NOISE_FACTOR * rounding);
        if is_within_rounding && allow_loss {
            return Ok(());
        }
        let near = if is_nearer { "hardly" } else { "no" };
        let reason = format!(
            "the merged model is {near} nearer to the base with the adapters (mean KL {missed:.1e}) than the base \
             is ({effect:.1e}): {why}"
        );
        Err(Refusal { reason, can_be_allowed: is_nearer || is_within_rounding, is_too_small })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn difference(mean_kl: f64) -> Difference {
        Difference { mean_kl, largest_kl: mean_kl, largest_logit_difference: 0.1, n_tokens: 9 }
    }

    fn verdict(
        effect: f64,
        missed: f64,
        floor: f64,
        changed: &[(TensorType, TensorType)],
        is_zero: bool,
    ) -> Result<(), String> {
        let floor = Some(difference(floor));
        let compared =
            LoadedBack { effect: difference(effect), rounding: None, missed: difference(missed), floor };
        compared.verdict(changed, is_zero, false).map_err(|refusal| refusal.reason)
    }

    #[test]
    fn a_merge_is_kept_if_it_is_nearer_to_base_plus_adapters_than_the_base_is() {
        const F32: (TensorType, TensorType) = (TensorType::F32, TensorType::F32);
        const F16: (TensorType, TensorType) = (TensorType::F16, TensorType::F16);
        const LOW: (TensorType, TensorType) = (TensorType::Q4_K, TensorType::Q4_K);
        const FINER: (TensorType, TensorType) = (TensorType::Q4_K, TensorType::F32);
        verdict(0.1, 0.05, 0.01, &[LOW], false).unwrap();
        // Losing nearly all of the change is refused, unless the user allows it.
        let reason = verdict(0.1, 0.09, 0.001, &[LOW], false).unwrap_err();
        assert!(reason.contains("hardly nearer") && reason.contains("9.0e-2"), "{reason}");
        let lossy = |missed| LoadedBack {
            effect: difference(0.1),
            rounding: None,
            missed: difference(missed),
            floor: None,
        };
        assert!(!lossy(0.011).is_close() && lossy(0.01).is_close());
        assert!(lossy(0.09).verdict(&[LOW], false, false).unwrap_err().can_be_allowed);
        lossy(0.09).verdict(&[LOW], false, true).unwrap();
        assert!(!lossy(0.1).verdict(&[LOW], false, true).unwrap_err().can_be_allowed);
        let reason = verdict(0.1, 0.1, 0.001, &[LOW], false).unwrap_err();
        assert!(reason.contains("no nearer") && reason.contains("1.0e-1"), "{reason}");
        assert!(reason.contains("rounding removed the change"), "{reason}");
        let reason = verdict(0.1, 0.1, 0.03, &[LOW], false).unwrap_err();
        assert!(reason.contains("too small to tell from the model's own rounding"), "{reason}");
        // An adapter of zeros has no effect.
        verdict(0.0, 0.0, 0.0, &[LOW], true).unwrap();
        assert!(verdict(0.0, 0.0, 0.0, &[LOW], false).is_err());
        // Float types must match within rounding, or within the noise of the model's quantised tensors.
        verdict(0.1, 1e-7, 0.0, &[F32], false).unwrap();
        assert!(verdict(0.1, 1e-5, 0.0, &[F32], false).unwrap_err().contains("up to 1.0e-6"));
        verdict(0.1, 1e-5, 0.0, &[F32, F16], false).unwrap();
        verdict(0.1, 1e-2, 0.006, &[F32], false).unwrap();
        verdict(0.1, 1e-2, 0.001, &[F32, LOW], false).unwrap();
        // From quantised to float: the base rounds activations to 8 bits, the merged model does not.
        verdict(0.1, 1e-2, 0.001, &[FINER], false).unwrap();
        assert!(verdict(0.0, 1e-5, 0.0, &[F32], true).is_err(), "zeros must change nothing");
    }

    #[test]
    fn nan_is_never_kept() {
        const LOW: (TensorType, TensorType) = (TensorType::Q4_K, TensorType::Q4_K);
        let nan = f64::NAN;
        for bad in [nan, f64::INFINITY] {
            for (effect, missed, floor) in [(bad, 0.0, 0.0), (0.1, bad, 0.0), (0.1, 0.0, bad)] {
                for is_zero in [false, true] {
                    let reason = verdict(effect, missed, floor, &[LOW], is_zero).unwrap_err();
                    assert!(reason.contains("expected finite differences"), "{reason}");
                }
            }
        }
        let compared = LoadedBack {
            effect: difference(nan),
            rounding: None,
            missed: difference(0.0),
            floor: Some(difference(0.1)),
        };
        assert!(!compared.is_close());
    }

    #[test]
    fn an_effect_too_small_to_measure_is_refused_unless_that_is_allowed() {
        const F32: (TensorType, TensorType) = (TensorType::F32, TensorType::F32);
        let compared = |missed| LoadedBack {
            effect: difference(1e-13),
            rounding: None,
            missed: difference(missed),
            floor: None,
        };
        let refusal = compared(1e-13).verdict(&[F32], false, false).unwrap_err();
        assert!(refusal.is_too_small && refusal.can_be_allowed, "{refusal:?}");
        compared(1e-13).verdict(&[F32], false, true).unwrap();
        // A merge that changed something else is not excused.
        assert!(compared(1e-9).verdict(&[F32], false, true).is_err());
    }
}
