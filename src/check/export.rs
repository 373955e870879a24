//! What was written, loaded back by llama.cpp: does it do what it was made of?

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::check::steering::{Difference, compare, logits};
use crate::engine::steering::LoraScaled;
use crate::engine::{CacheType, FlashAttention, Model, ModelOptions, SessionOptions, Steering, Token};
use crate::error::{Error, Result};
use crate::gguf::{GgufFile, TensorType, check_decoder};

use crate::check::training::nudges;

/// A merged model must miss less than this share of the adapters' effect, both as mean KL.
const MOST_MISSED: f64 = 0.5;

/// A merged model against its base with the adapters at run time, by the logits of llama.cpp.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoadedBack {
    /// Of the adapters: the base's divergence from the base with them.
    pub effect: Difference,
    /// What the merge missed: the merged model's divergence from the base with the adapters.
    pub missed: Difference,
    /// What the least change makes on the base with the adapters; `None` where the architecture has no
    /// place for it that this program knows.
    pub floor: Option<Difference>,
}

/// Why a merged model is not kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// In words.
    pub reason: String,
    /// Whether `allow_loss` would keep it.
    pub can_be_allowed: bool,
}

/// `options` with an F32 cache and without fused attention: what differs then comes from the weights.
pub fn exact_options(options: &SessionOptions) -> SessionOptions {
    SessionOptions {
        flash_attention: FlashAttention::Off,
        cache_type_k: CacheType::F32,
        cache_type_v: CacheType::F32,
        ..options.clone()
    }
}

impl LoadedBack {
    /// Loads the base, lets go of it, loads the merged model, and compares the logits after each token of
    /// `texts`, under [`exact_options`]. `tokenize` gives the texts for the base.
    ///
    /// # Errors
    /// Those of loading and decoding; [`Error::Model`] where the merged model gives logits that are not finite;
    /// [`Error::Interrupted`] after the pass in hand.
    pub fn compare(
        base: &Path,
        loras: &[LoraScaled],
        merged: &Path,
        model_options: &ModelOptions,
        session_options: &SessionOptions,
        tokenize: impl FnOnce(&Model) -> Result<Vec<Vec<Token>>>,
        interrupt: &AtomicBool,
    ) -> Result<LoadedBack> {
        let go_on = || if interrupt.load(Ordering::SeqCst) { Err(Error::Interrupted) } else { Ok(()) };
        let options = exact_options(session_options);
        let model = Model::open(base, model_options)?;
        let texts = tokenize(&model)?;
        go_on()?;
        let steering = Steering { loras: loras.to_vec(), ..Steering::default() };
        let expected = logits(&model.with_steering(steering.clone())?, &texts, &options)?;
        go_on()?;
        let effect = compare(&logits(&model, &texts, &options)?, &expected);
        go_on()?;
        let floor = match model.graph() {
            Ok(_) => {
                let nudged = Steering { edits: nudges(&model), ..steering };
                Some(compare(&logits(&model.with_steering(nudged)?, &texts, &options)?, &expected))
            }
            // The callback that nudges neurons does not know this architecture.
            Err(Error::Model { .. }) => None,
            Err(other) => return Err(other),
        };
        drop(model);
        go_on()?;
        check_decoder(&GgufFile::open(merged)?)?;
        let found = logits(&Model::open(merged, model_options)?, &texts, &options)?;
        Ok(LoadedBack { effect, missed: compare(&found, &expected), floor })
    }

    /// Whether next to nothing was missed: a tenth of the effect, or twice the noise floor.
    pub fn is_close(&self) -> bool {
        let floor = self.floor.map_or(0.0, |floor| floor.mean_kl);
        self.missed.mean_kl <= f64::max(0.1 * self.effect.mean_kl, 2.0 * floor)
    }

    /// Whether the merged model may be kept. `changed` are the types of the changed tensors before and after,
    /// and `is_zero` says that the adapters change nothing.
    ///
    /// Whatever the types, the merged model must be nearer to the base with the adapters than the base is, unless
    /// there is no change; and at most half as far from it, unless `allow_loss`. Where all were and are float types, rounding is all that may differ: the
    /// divergence must be below a bound for the type, or below twice the noise floor where other tensors of the
    /// model are quantised.
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
        let bounds = changed.iter().map(|&(from, to)| float_bound(from).and(float_bound(to)));
        if let Some(bounds) = bounds.collect::<Option<Vec<f64>>>() {
            let bound = bounds.into_iter().fold(2.0 * floor, f64::max);
            if missed > bound {
                let reason = format!(
                    "the merged model is not the base with the adapters: expected a mean KL up to {bound:.1e}, \
                     found {missed:.1e}"
                );
                return Err(Refusal { reason, can_be_allowed: false });
            }
        }
        let is_nearer = missed < effect;
        if is_zero || is_nearer && missed <= MOST_MISSED * effect {
            return Ok(());
        }
        let why = if effect < 4.0 * floor {
            "the adapters' effect is hardly above the noise of the model's own quantisation, and cannot be told \
             from it"
        } else {
            "rounding took the change, or added as much"
        };
        if is_nearer && allow_loss {
            return Ok(());
        }
        let near = if is_nearer { "hardly" } else { "no" };
        let reason = format!(
            "the merged model is {near} nearer to the base with the adapters (mean KL {missed:.1e}) than the base \
             is ({effect:.1e}): {why}"
        );
        Err(Refusal { reason, can_be_allowed: is_nearer })
    }
}

/// The mean KL that rounding to this type may cause; `None` for quantised types, whose errors depend on the weights.
fn float_bound(tensor_type: TensorType) -> Option<f64> {
    match tensor_type {
        // What the order of sums leaves is 1e-9 or less.
        TensorType::F32 => Some(1e-6),
        TensorType::F16 => Some(1e-4),
        TensorType::BF16 => Some(5e-3),
        _ => None,
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
    fn a_merge_is_kept_if_it_is_nearer_to_the_adapter_than_the_base_is() {
        const F32: (TensorType, TensorType) = (TensorType::F32, TensorType::F32);
        const F16: (TensorType, TensorType) = (TensorType::F16, TensorType::F16);
        const LOW: (TensorType, TensorType) = (TensorType::Q4_K, TensorType::Q4_K);
        const FINER: (TensorType, TensorType) = (TensorType::Q4_K, TensorType::F32);
        verdict(0.1, 0.05, 0.01, &[LOW], false).unwrap();
        // Nearly all of the change lost is not what was asked for, unless it was.
        let reason = verdict(0.1, 0.09, 0.001, &[LOW], false).unwrap_err();
        assert!(reason.contains("hardly nearer") && reason.contains("9.0e-2"), "{reason}");
        let lossy = |missed| LoadedBack { effect: difference(0.1), missed: difference(missed), floor: None };
        assert!(!lossy(0.011).is_close() && lossy(0.01).is_close());
        assert!(lossy(0.09).verdict(&[LOW], false, false).unwrap_err().can_be_allowed);
        lossy(0.09).verdict(&[LOW], false, true).unwrap();
        assert!(!lossy(0.1).verdict(&[LOW], false, true).unwrap_err().can_be_allowed);
        let reason = verdict(0.1, 0.1, 0.001, &[LOW], false).unwrap_err();
        assert!(reason.contains("no nearer") && reason.contains("1.0e-1"), "{reason}");
        assert!(reason.contains("rounding took the change"), "{reason}");
        let reason = verdict(0.1, 0.1, 0.03, &[LOW], false).unwrap_err();
        assert!(reason.contains("hardly above the noise"), "{reason}");
        // An adapter of zeros has no effect to be near to.
        verdict(0.0, 0.0, 0.0, &[LOW], true).unwrap();
        assert!(verdict(0.0, 0.0, 0.0, &[LOW], false).is_err());
        // Float types must be exact, as far as the rest of the model lets that be seen.
        verdict(0.1, 1e-7, 0.0, &[F32], false).unwrap();
        assert!(verdict(0.1, 1e-5, 0.0, &[F32], false).unwrap_err().contains("up to 1.0e-6"));
        verdict(0.1, 1e-5, 0.0, &[F32, F16], false).unwrap();
        verdict(0.1, 1e-2, 0.006, &[F32], false).unwrap();
        verdict(0.1, 1e-2, 0.001, &[F32, LOW], false).unwrap();
        // From quantised to float: the reference at run time rounds activations to 8 bits, the copy does not.
        verdict(0.1, 1e-2, 0.001, &[FINER], false).unwrap();
        assert!(verdict(0.0, 1e-5, 0.0, &[F32], true).is_err(), "zeros must change nothing");
    }
}
