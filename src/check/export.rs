//! Compares a merged model with its base plus adapters, in llama.cpp.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::check::bounds;
use crate::check::difference::{Difference, compare};
use crate::check::logits::{exact_options, logits, nudges};
use crate::engine::steering::LoraScaled;
use crate::engine::{Model, ModelOptions, SessionOptions, Steering, Token};
use crate::error::{Error, Result};
use crate::gguf::{GgufFile, TensorType, check_decoder};

/// A merged model against its base with the adapters applied at run time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoadedBack {
    /// The adapters' effect: the base alone against the base with adapters.
    pub effect: Difference,
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
}

impl LoadedBack {
    /// Compares the logits after each token of `texts`, under [`exact_options`].
    ///
    /// The base is closed before the merged model is opened, so that only one is in memory. `tokenize` tokenises the
    /// texts with the base's vocabulary.
    ///
    /// # Errors
    /// Those of loading and decoding; [`Error::Model`] if the merged model's logits are not finite;
    /// [`Error::Interrupted`] after the current pass.
    pub fn compare(
        base: &Path,
        loras: &[LoraScaled],
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
        let steering = Steering { loras: loras.to_vec(), ..Steering::default() };
        let expected = logits(&model.with_steering(steering.clone())?, &texts, &options)?;
        check_interrupt()?;
        let effect = compare(&logits(&model, &texts, &options)?, &expected);
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
        let found = logits(&Model::open(merged, model_options)?, &texts, &options)?;
        Ok(LoadedBack { effect, missed: compare(&found, &expected), floor })
    }

    /// Whether the merge lost almost nothing: a tenth of the effect, or twice the noise floor.
    pub fn is_close(&self) -> bool {
        let floor = self.floor.map_or(0.0, |floor| floor.mean_kl);
        let bound =
            f64::max(bounds::MERGE_LOSS_CLOSE * self.effect.mean_kl, bounds::MERGE_NOISE_FACTOR * floor);
        self.missed.mean_kl <= bound
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
        let of_types =
            changed.iter().map(|&(from, to)| bounds::float_merge(from).and(bounds::float_merge(to)));
        if let Some(of_types) = of_types.collect::<Option<Vec<f64>>>() {
            let bound = of_types.into_iter().fold(bounds::MERGE_NOISE_FACTOR * floor, f64::max);
            if missed > bound {
                let reason = format!(
                    "the merged model differs from the base with the adapters: expected a mean KL up to {bound:.1e}, \
                     found {missed:.1e}"
                );
                return Err(Refusal { reason, can_be_allowed: false });
            }
        }
        let is_nearer = missed < effect;
        if is_zero || is_nearer && (allow_loss || missed <= bounds::MERGE_LOSS_MAX * effect) {
            return Ok(());
        }
        let why = if effect < bounds::FAINT_EFFECT_FACTOR * floor {
            "the adapters' effect is hardly larger than the noise of the model's own quantisation"
        } else {
            "rounding removed the change, or added an error as large"
        };
        let near = if is_nearer { "hardly" } else { "no" };
        let reason = format!(
            "the merged model is {near} nearer to the base with the adapters (mean KL {missed:.1e}) than the base \
             is ({effect:.1e}): {why}"
        );
        Err(Refusal { reason, can_be_allowed: is_nearer })
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
        let compared = LoadedBack { effect: difference(effect), missed: difference(missed), floor };
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
        let lossy = |missed| LoadedBack { effect: difference(0.1), missed: difference(missed), floor: None };
        assert!(!lossy(0.011).is_close() && lossy(0.01).is_close());
        assert!(lossy(0.09).verdict(&[LOW], false, false).unwrap_err().can_be_allowed);
        lossy(0.09).verdict(&[LOW], false, true).unwrap();
        assert!(!lossy(0.1).verdict(&[LOW], false, true).unwrap_err().can_be_allowed);
        let reason = verdict(0.1, 0.1, 0.001, &[LOW], false).unwrap_err();
        assert!(reason.contains("no nearer") && reason.contains("1.0e-1"), "{reason}");
        assert!(reason.contains("rounding removed the change"), "{reason}");
        let reason = verdict(0.1, 0.1, 0.03, &[LOW], false).unwrap_err();
        assert!(reason.contains("hardly larger than the noise"), "{reason}");
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
}
