//! Compares the trainer with llama.cpp running its result.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::check::bounds;
use crate::check::difference::{Difference, compare};
use crate::check::logits::{exact_options, logits, nudges};
use crate::engine::steering::LoraScaled;
use crate::engine::{Model, ModelOptions, SessionOptions, Steering, Token};
use crate::error::{Error, Result};
use crate::finite;
use crate::gguf::{GgufFile, TensorType};
use crate::steer::{ControlVectorFile, control_vector};
use crate::train::data::pack::Packed;
use crate::train::data::tokens::TokenPair;
use crate::train::device::Device;
use crate::train::device::name::Rounding;
use crate::train::model::forward::Batch;
use crate::train::recipe::method::MethodName;
use crate::train::run::trainer::{Side, Trainer};

/// Maximum bytes of logits kept from the trainer: a vocabulary can have 262,144 tokens.
const MAX_BYTES: usize = 16 << 20;

/// The trainer and llama.cpp on the same texts.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Agreement {
    /// llama.cpp with the result against the trained model.
    pub difference: Difference,
    /// llama.cpp's noise floor: a negligible nudge of its own run.
    pub floor: Difference,
    /// The comparison before training; `None` if every weight was trained.
    pub untrained: Option<Untrained>,
    /// The largest mean KL that counts as agreement, in nats per token.
    pub bound: f64,
}

/// The trainer and llama.cpp without the result.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Untrained {
    /// llama.cpp without the result against the untrained model.
    pub difference: Difference,
    /// The effect of training: llama.cpp without the result against the trained model.
    pub effect: Difference,
}

/// The verdict of a comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finding {
    /// llama.cpp reproduces the trained model.
    Reproduced,
    /// Both agree within rounding, but training changed too little to tell the result from none.
    TooSmall,
    /// llama.cpp computes something else.
    Differs,
}

impl Agreement {
    /// Whether llama.cpp reproduces the trained model.
    ///
    /// Three conditions:
    /// - The difference is within the bound.
    /// - Before training, the two differed only by rounding (at most [`bounds::ROUNDING_MAX`]).
    /// - llama.cpp is nearer to the trained model with the result than without it.
    ///
    /// If only the third is not met, and the effect of training is within a few times rounding, no check can tell.
    pub fn finding(&self) -> Finding {
        if !(bounds::within(self.difference.mean_kl, self.bound) && self.base_agrees()) {
            return Finding::Differs;
        }
        let Some(Untrained { difference, effect }) = self.untrained else { return Finding::Reproduced };
        let rounding = bounds::largest([difference.mean_kl, bounds::LOGIT_ROUNDING]);
        let is_clear = effect.mean_kl > bounds::UNTRAINED_FACTOR * rounding;
        if is_clear && self.difference.mean_kl < effect.mean_kl {
            Finding::Reproduced
        } else if bounds::within(effect.mean_kl, bounds::FAINT_EFFECT_FACTOR * rounding) {
            Finding::TooSmall
        } else {
            Finding::Differs
        }
    }

    /// Whether nothing speaks against the result. It may be too small to tell.
    pub fn holds(&self) -> bool {
        self.finding() != Finding::Differs
    }

    /// Says that training changed too little to be checked, and how little; `None` if it changed enough.
    pub fn too_small(&self) -> Option<String> {
        let Untrained { difference, effect } = self.untrained?;
        (self.finding() == Finding::TooSmall).then(|| {
            format!(
                "the trained change is too small to tell from rounding: without it llama.cpp differs from the trained \
                 model by a mean KL of {:.1e} a token, and rounding alone gives {:.1e}",
                effect.mean_kl, difference.mean_kl
            )
        })
    }

    /// Whether both compute the same untrained model, within rounding.
    fn base_agrees(&self) -> bool {
        self.untrained
            .is_none_or(|untrained| bounds::within(untrained.difference.mean_kl, bounds::ROUNDING_MAX))
    }

    /// Fails if llama.cpp computes something else than the trained model. `result` is the trained file, for the message.
    ///
    /// # Errors
    /// [`Error::Model`] with the condition of [`Agreement::finding`] that is not met.
    pub fn verify(&self, result: &Path) -> Result<()> {
        if self.holds() {
            return Ok(());
        }
        let reason = match self.untrained {
            Some(Untrained { difference, .. }) if !self.base_agrees() => format!(
                "the trainer and llama.cpp disagree about the model even before training, by more than rounding \
                 explains: expected a mean KL up to {:.1e} a token, found {:.1e}",
                bounds::ROUNDING_MAX,
                difference.mean_kl
            ),
            untrained => format!(
                "llama.cpp does not reproduce the trained model: expected a mean KL up to {:.1e} a token{}, found {:.1e}",
                self.bound,
                untrained.map_or(String::new(), |untrained| format!(
                    ", and below {:.1e}, the mean KL without the result",
                    untrained.effect.mean_kl
                )),
                self.difference.mean_kl
            ),
        };
        Err(Error::model(result, reason).with_hint(
            "do not use this file; this is a bug in detox-gguf, please report it with the run's folder",
        ))
    }
}

/// The trainer's logits for some pairs, kept so that the trainer can be freed before llama.cpp loads the model.
#[derive(Debug, Clone)]
pub struct Expected {
    /// Each prompt with one answer, without the answer's last token; and the prompt's length.
    texts: Vec<(Vec<Token>, usize)>,
    /// Logits of the trained model that predict the answers' tokens, `[rows][n_vocab]`.
    policy: Vec<Vec<f32>>,
    /// The same logits from the untrained model.
    reference: Option<Vec<Vec<f32>>>,
    rounding: Rounding,
}

impl Expected {
    /// Computes the logits of the first of `pairs`: as many as fit into 16 MiB, and at least one.
    ///
    /// # Errors
    /// [`Error::Training`] for a logit that is not finite; those of the device.
    pub fn of<D: Device>(trainer: &Trainer<D>, rounding: Rounding, pairs: &[&TokenPair]) -> Result<Expected> {
        let logits_of = |side, batch: &Batch<D>| trainer.transformer.logits(&trainer.pass(side), batch);
        let row_bytes = 4 * trainer.transformer.config.n_vocab;
        let reference = trainer.has_reference().then(Vec::new);
        let mut expected = Expected { texts: Vec::new(), policy: Vec::new(), reference, rounding };
        for pair in pairs {
            let n_rows = pair.chosen.len() + pair.rejected.len();
            if !expected.texts.is_empty() && (expected.policy.len() + n_rows) * row_bytes > MAX_BYTES {
                break;
            }
            for answer in [&pair.chosen, &pair.rejected] {
                let text = pair.prompt.iter().chain(&answer[..answer.len() - 1]).copied().collect();
                expected.texts.push((text, pair.prompt.len()));
            }
            let mut packed = Packed::default();
            packed.push(&pair.prompt, &pair.chosen, &pair.rejected);
            let batch = Batch::new(trainer.device(), packed)?;
            expected.policy.extend(finite(logits_of(Side::Policy, &batch)?)?);
            if let Some(reference) = &mut expected.reference {
                reference.extend(finite(logits_of(Side::Reference, &batch)?)?);
            }
        }
        Ok(expected)
    }
}

/// Returns the trainer's logits, or refuses NaN and infinities.
fn finite(rows: Vec<Vec<f32>>) -> Result<Vec<Vec<f32>>> {
    match rows.iter().find_map(|row| finite::not_finite(row)) {
        Some((token, found)) => {
            Err(Error::Training { reason: format!("the logit of token {token} is {found}") })
        }
        None => Ok(rows),
    }
}

/// Compares the trainer's logits with those of llama.cpp running `result`.
///
/// On float weights the bound depends on their type ([`bounds::F32`], [`bounds::F16`]). On quantised weights llama.cpp
/// rounds activations to 8 bits, and the trainer rounds differently or not at all. There the bound is the largest of:
/// - llama.cpp's noise floor, or four times the floor if the trainer rounds too;
/// - twice the difference before training, capped at [`bounds::ROUNDING_MAX`];
/// - [`bounds::QUANTISED_MIN`].
///
/// The bound is at least [`bounds::BF16`] if the trainer rounds to bf16.
///
/// # Errors
/// Those of loading and decoding.
pub fn agreement(
    expected: &Expected,
    base: &GgufFile,
    method: MethodName,
    result: &Path,
    n_threads: usize,
) -> Result<Agreement> {
    let options = exact_options(&SessionOptions { n_threads: Some(n_threads), ..SessionOptions::default() });
    let model_options = ModelOptions { n_gpu_layers: 0, ..ModelOptions::default() };
    let path = if method == MethodName::Full { result } else { base.path() };
    let model = Model::open(path, &model_options)?;
    let steering = steering(&model, method, result)?;
    // Only the rows that predict answers.
    let run = |steering: &Steering| -> Result<Vec<Vec<f32>>> {
        let model = model.with_steering(steering.clone())?;
        let mut rows = Vec::new();
        for (text, n_prompt) in &expected.texts {
            let mut of_text = logits(&model, std::slice::from_ref(text), &options)?;
            rows.extend(of_text.drain(n_prompt - 1..));
        }
        Ok(rows)
    };
    let found = run(&steering)?;
    let nudged = Steering { edits: nudges(&model), ..steering.clone() };
    let floor = compare(&found, &run(&nudged)?);
    let difference = compare(&expected.policy, &found);
    drop(found);
    let untrained = match &expected.reference {
        Some(reference) => {
            let without = run(&Steering::default())?;
            let effect = compare(&expected.policy, &without);
            Some(Untrained { difference: compare(reference, &without), effect })
        }
        None => None,
    };
    let weights = Weights::of(base);
    let untrained_kl = untrained.map_or(0.0, |untrained| untrained.difference.mean_kl);
    let bound = bound(weights, expected.rounding, floor.mean_kl, untrained_kl);
    Ok(Agreement { difference, floor, untrained, bound })
}

/// The types of a model's matrices, as far as they affect llama.cpp's rounding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Weights {
    /// Some are F16 or BF16.
    has_half: bool,
    /// Some are quantised.
    has_quantised: bool,
}

impl Weights {
    fn of(base: &GgufFile) -> Weights {
        let matrices = || base.tensors().iter().filter(|t| t.shape().len() > 1).map(|t| t.tensor_type());
        Weights {
            has_half: matrices().any(|t| matches!(t, TensorType::F16 | TensorType::BF16)),
            has_quantised: matrices().any(|t| t.block_len() > 1),
        }
    }
}

/// The largest mean KL that counts as agreement.
///
/// `floor` and `untrained` are the mean KL of the noise floor and of the comparison before training.
fn bound(weights: Weights, rounding: Rounding, floor: f64, untrained: f64) -> f64 {
    let least = match rounding {
        Rounding::Bf16 => bounds::BF16,
        _ if weights.has_half => bounds::F16,
        _ => bounds::F32,
    };
    if !weights.has_quantised {
        return least;
    }
    let factor = if rounding == Rounding::Nothing { 1.0 } else { bounds::FAST_FACTOR };
    // The cap drops a NaN, which `Agreement::finding` then meets in the difference before training.
    let from_untrained = (bounds::UNTRAINED_FACTOR * untrained).min(bounds::ROUNDING_MAX);
    bounds::largest([from_untrained, factor * floor, bounds::QUANTISED_MIN, least])
}

/// How llama.cpp applies the trained result.
fn steering(model: &Model, method: MethodName, result: &Path) -> Result<Steering> {
    Ok(match method {
        MethodName::Lora => Steering {
            loras: vec![LoraScaled { path: result.to_path_buf(), scale: 1.0 }],
            ..Steering::default()
        },
        MethodName::Vector => {
            let files = [(ControlVectorFile::read(result)?, 1.0)];
            let vector = control_vector::combine(&files, None, model.n_layer(), model.n_embd())?;
            Steering { control_vector: Some(vector), ..Steering::default() }
        }
        MethodName::Full => Steering::default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUANTISED: Weights = Weights { has_half: false, has_quantised: true };

    fn difference(mean_kl: f64) -> Difference {
        Difference { mean_kl, largest_kl: mean_kl, largest_logit_difference: 0.1, n_tokens: 9 }
    }

    /// An agreement on quantised weights, with the trainer's exact products.
    fn agreement(trained: f64, floor: f64, untrained: f64, effect: f64) -> Agreement {
        let of_base = Untrained { difference: difference(untrained), effect: difference(effect) };
        Agreement {
            difference: difference(trained),
            floor: difference(floor),
            untrained: Some(of_base),
            bound: bound(QUANTISED, Rounding::Nothing, floor, untrained),
        }
    }

    #[test]
    fn the_bound_on_quantised_weights_follows_rounding_up_to_a_cap() {
        let of = |rounding, floor, untrained| bound(QUANTISED, rounding, floor, untrained);
        assert_eq!(of(Rounding::Nothing, 1e-5, 1e-5), bounds::QUANTISED_MIN);
        assert_eq!(of(Rounding::Nothing, 3e-3, 1e-3), 3e-3);
        assert_eq!(of(Rounding::Bytes, 3e-3, 1e-3), 4.0 * 3e-3);
        assert_eq!(of(Rounding::Nothing, 3e-3, 4e-3), 2.0 * 4e-3);
        assert_eq!(of(Rounding::Bf16, 1e-5, 1e-5), bounds::BF16);
        assert_eq!(of(Rounding::Nothing, 3e-3, 0.09), bounds::ROUNDING_MAX, "0.18 before there was a cap");
    }

    #[test]
    fn the_bound_on_float_weights_ignores_noise() {
        let float =
            |has_half, rounding| bound(Weights { has_half, has_quantised: false }, rounding, 1.0, 1.0);
        assert_eq!(float(false, Rounding::Nothing), bounds::F32);
        assert_eq!(float(true, Rounding::Nothing), bounds::F16);
        assert_eq!(float(true, Rounding::Bf16), bounds::BF16);
    }

    #[test]
    fn differences_that_rounding_explains_agree() {
        // As measured on SmolLM2-135M-Instruct in Q4_1, and on random weights of Llama-3.2-1B's shape in Q4_K and Q6_K.
        assert!(agreement(2.7e-3, 3.3e-3, 3.7e-3, 1.2e-2).holds());
        assert!(agreement(2.2e-3, 1.3e-3, 2.3e-3, 4.6e-3).holds());
    }

    #[test]
    fn a_model_that_differs_before_training_is_refused_whatever_the_difference_after() {
        // The bound was twice the untrained difference up to 0.1, so these passed.
        for (trained, untrained) in [(0.05, 0.05), (0.09, 0.09), (1e-3, 0.03)] {
            let found = agreement(trained, 3e-3, untrained, 1.0);
            assert!(trained <= 2.0 * untrained && untrained <= 0.1);
            assert!(!found.holds(), "{found:?}");
            let error = found.verify(Path::new("adapter.gguf")).unwrap_err();
            let expected = format!(
                "adapter.gguf: cannot run this model: the trainer and llama.cpp disagree about the model even before \
                 training, by more than rounding explains: expected a mean KL up to 2.0e-2 a token, found {untrained:.1e}"
            );
            assert_eq!(error.to_string(), expected);
            assert!(error.hint().unwrap().contains("do not use this file"));
        }
    }

    #[test]
    fn a_result_that_is_no_nearer_than_the_base_is_refused() {
        let found = agreement(5e-3, 5e-3, 1e-3, 4.5e-3);
        assert!(found.difference.mean_kl <= found.bound && !found.holds(), "{found:?}");
        assert_eq!(agreement(5e-3, 5e-3, 1e-3, 6e-3).finding(), Finding::Reproduced);
    }

    #[test]
    fn an_effect_within_rounding_is_said_to_be_too_small() {
        // Two steps at 1e-5 on the tiny llama, on a machine whose rounding with the adapter is twice that without it.
        let mut found = agreement(1.7e-9, 3e-7, 7e-10, 1.67e-9);
        found.bound = bounds::F32;
        let words = found.too_small().unwrap();
        assert!(words.contains("mean KL of 1.7e-9 a token, and rounding alone gives 7.0e-10"), "{words}");
        found.verify(Path::new("adapter.gguf")).unwrap();
        // Twice rounding is enough if the result is nearer; nothing at all is never enough.
        assert_eq!(agreement(9e-4, 6e-4, 8e-4, 1.7e-3).finding(), Finding::Reproduced);
        assert_eq!(agreement(9e-4, 6e-4, 8e-4, 1e-3).finding(), Finding::TooSmall);
        for nothing in [0.0, 1e-13] {
            let found = agreement(nothing, 0.0, 0.0, nothing);
            assert_eq!((found.finding(), found.too_small().is_some()), (Finding::TooSmall, true));
        }
        // A result that llama.cpp does not apply is not excused by a small effect.
        assert_eq!(agreement(4e-4, 1e-6, 1e-9, 4e-4).finding(), Finding::Differs);
    }

    #[test]
    fn nan_never_agrees() {
        let good = agreement(2.7e-3, 3.3e-3, 3.7e-3, 1.2e-2);
        assert!(good.holds());
        let nan = f64::NAN;
        for found in [
            agreement(nan, 3.3e-3, 3.7e-3, 1.2e-2),
            agreement(2.7e-3, nan, 3.7e-3, 1.2e-2),
            agreement(2.7e-3, 3.3e-3, nan, 1.2e-2),
            agreement(2.7e-3, 3.3e-3, 3.7e-3, nan),
            Agreement { bound: nan, ..good },
            Agreement { bound: f64::INFINITY, ..good },
        ] {
            assert!(!found.holds() && found.verify(Path::new("x")).is_err(), "{found:?}");
        }
    }
}
