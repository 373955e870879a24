//! What was trained, run by llama.cpp: are its logits those of the trainer?

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::check::steering::{Difference, compare, logits};
use crate::engine::steering::{Change, Edit, LoraScaled, Operation, When};
use crate::engine::{Model, ModelOptions, SessionOptions, Steering, Token};
use crate::error::{Error, Result};
use crate::gguf::{GgufFile, TensorType};
use crate::steer::{ControlVectorFile, control_vector};

use crate::check::export::exact_options;
use crate::train::data::pack::Packed;
use crate::train::data::tokens::TokenPair;
use crate::train::device::Device;
use crate::train::device::name::Rounding;
use crate::train::model::forward::Batch;
use crate::train::recipe::method::MethodName;
use crate::train::run::trainer::{Side, Trainer};

/// Mean KL that the order of sums, and llama.cpp's table of GELU in F16, may cause in F32 (nats a token).
const F32_BOUND: f64 = 1e-6;

/// llama.cpp rounds what it multiplies by F16 weights to F16, and by BF16 weights to BF16.
const HALF_BOUND: f64 = 1e-4;

/// A trainer that rounds both operands of every product to bf16: as for models merged into BF16, where llama.cpp does.
/// The tiny models on the emulated GPU are 1.5e-4 to 9e-4 apart (tests/cuda/result.rs).
const BF16_BOUND: f64 = 5e-3;

/// Least bound on quantised weights: in a model so small that a nudge moves hardly a rounding (gguf/tiny/llama-q8_0),
/// llama.cpp's roundings were seen to move 1.6e-4.
const QUANTISED_BOUND: f64 = 5e-4;

/// How many times the floor two that round differently may differ.
const FAST_FACTOR: f64 = 4.0;

/// How many times as much as before training they may differ on quantised weights.
const UNTRAINED_FACTOR: f64 = 2.0;

/// More than rounding was ever seen to make between two that run one model, by ten times: beyond it, what they
/// differed by before training excuses nothing.
const MOST_ROUNDING: f64 = 0.1;

/// Most bytes of logits that are kept of one side: a vocabulary can have 262,144 words.
const MOST_BYTES: usize = 16 << 20;

/// Trainer and llama.cpp on the same texts.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Agreement {
    /// llama.cpp's divergence from the trainer.
    pub difference: Difference,
    /// What the least change makes in llama.cpp itself.
    pub floor: Difference,
    /// What is known of the model before training; nothing where every weight was trained.
    pub untrained: Option<Untrained>,
    /// The mean KL up to which they agree.
    pub bound: f64,
}

/// Trainer and llama.cpp without the result.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Untrained {
    /// llama.cpp's divergence from the trainer, both without it.
    pub difference: Difference,
    /// Of the training: llama.cpp's divergence without the result from the trainer with it.
    pub effect: Difference,
}

impl Agreement {
    /// Whether they agree.
    pub fn holds(&self) -> bool {
        // Where training did more than rounding does, llama.cpp must be nearer with the result than without.
        let is_nearer = self.untrained.is_none_or(|Untrained { difference, effect }| {
            effect.mean_kl <= UNTRAINED_FACTOR * difference.mean_kl
                || self.difference.mean_kl < effect.mean_kl
        });
        self.difference.mean_kl <= self.bound && is_nearer
    }
}

/// The trainer's logits of some pairs, to be compared with llama.cpp's when the trainer's memory is free again.
#[derive(Debug, Clone)]
pub struct Expected {
    /// Prompts with answers but for the last token, and the prompts' lengths.
    texts: Vec<(Vec<Token>, usize)>,
    /// Of the model as it is trained: of every token that predicts an answer's, `[rows][n_vocab]`.
    policy: Vec<Vec<f32>>,
    /// Of the model as it was.
    reference: Option<Vec<Vec<f32>>>,
    rounding: Rounding,
}

impl Expected {
    /// Those of the first of `pairs`, as many as fit into [`MOST_BYTES`] but one at least.
    ///
    /// # Errors
    /// Of the device.
    pub fn of<D: Device>(trainer: &Trainer<D>, rounding: Rounding, pairs: &[&TokenPair]) -> Result<Expected> {
        let of_side = |side, batch: &Batch<D>| trainer.transformer.logits(&trainer.pass(side), batch);
        let row_bytes = 4 * trainer.transformer.config.n_vocab;
        let reference = trainer.has_reference().then(Vec::new);
        let mut expected = Expected { texts: Vec::new(), policy: Vec::new(), reference, rounding };
        for pair in pairs {
            let n_rows = pair.chosen.len() + pair.rejected.len();
            if !expected.texts.is_empty() && (expected.policy.len() + n_rows) * row_bytes > MOST_BYTES {
                break;
            }
            for answer in [&pair.chosen, &pair.rejected] {
                let text = pair.prompt.iter().chain(&answer[..answer.len() - 1]).copied().collect();
                expected.texts.push((text, pair.prompt.len()));
            }
            let mut packed = Packed::default();
            packed.push(&pair.prompt, &pair.chosen, &pair.rejected);
            let batch = Batch::new(trainer.device(), packed)?;
            expected.policy.extend(of_side(Side::Policy, &batch)?);
            if let Some(reference) = &mut expected.reference {
                reference.extend(of_side(Side::Reference, &batch)?);
            }
        }
        Ok(expected)
    }
}

/// Compares the trainer's logits with llama.cpp's that runs `result`.
///
/// The bound is 1e-6 a token in F32 and 1e-4 in F16 and BF16. On quantised weights llama.cpp rounds to 8
/// bits what it multiplies, and the trainer either does not or does otherwise: there the bound is llama.cpp's own
/// noise floor, four times it where the trainer rounds too, or twice what the two differed by before training;
/// and llama.cpp must be nearer to the trainer with `result` than without, where that can be told from rounding.
/// Where the trainer rounds to bf16 the bound is 5e-3 at least.
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
    let model_options = ModelOptions { n_gpu_layers: 0, check_tensors: false };
    let path = if method == MethodName::Full { result } else { base.path() };
    let model = Model::open(path, &model_options)?;
    let steering = steering(&model, method, result)?;
    // The rows that predict answers, of all rows.
    let theirs = |steering: &Steering| -> Result<Vec<Vec<f32>>> {
        let model = model.with_steering(steering.clone())?;
        let mut rows = Vec::new();
        for (text, n_prompt) in &expected.texts {
            let mut of_text = logits(&model, std::slice::from_ref(text), &options)?;
            rows.extend(of_text.drain(n_prompt - 1..));
        }
        Ok(rows)
    };
    let found = theirs(&steering)?;
    let nudged = Steering { edits: nudges(&model), ..steering.clone() };
    let floor = compare(&found, &theirs(&nudged)?);
    let difference = compare(&expected.policy, &found);
    drop(found);
    let untrained = match &expected.reference {
        Some(reference) => {
            let without = theirs(&Steering::default())?;
            let effect = compare(&expected.policy, &without);
            Some(Untrained { difference: compare(reference, &without), effect })
        }
        None => None,
    };
    let bound = bound(base, &floor, untrained.as_ref(), expected.rounding);
    Ok(Agreement { difference, floor, untrained, bound })
}

/// 0.001 more on one neuron in each block of 32 of the first layer: next to nothing in itself, but it moves the
/// roundings of all that follows. The trainer, which rounds nothing, differs from the first
/// layer on too, and so does a model whose weights are others everywhere.
pub(super) fn nudges(model: &Model) -> Vec<Edit> {
    const BLOCK: usize = 32;
    let n_ff = model.n_ff().first().copied().unwrap_or(0);
    let operation = Operation::Offset(0.001);
    let nudge = |index| Edit {
        layer: 0,
        when: When::Both,
        coefficient: 1.0,
        change: Change::Neuron { index, operation },
    };
    (0..n_ff).step_by(BLOCK).map(nudge).collect()
}

fn bound(base: &GgufFile, floor: &Difference, untrained: Option<&Untrained>, rounding: Rounding) -> f64 {
    let matrices = || base.tensors().iter().filter(|t| t.shape().len() > 1).map(|t| t.tensor_type());
    let is_half = |t: TensorType| matches!(t, TensorType::F16 | TensorType::BF16);
    let least = match rounding {
        Rounding::Bf16 => BF16_BOUND,
        _ if matrices().any(is_half) => HALF_BOUND,
        _ => F32_BOUND,
    };
    if !matrices().any(|t| t.block_len() > 1) {
        return least;
    }
    let factor = if rounding == Rounding::Nothing { 1.0 } else { FAST_FACTOR };
    let untrained = untrained.map_or(0.0, |untrained| untrained.difference.mean_kl);
    let excused = if untrained <= MOST_ROUNDING { UNTRAINED_FACTOR * untrained } else { 0.0 };
    excused.max(factor * floor.mean_kl).max(QUANTISED_BOUND).max(least)
}

/// How llama.cpp is told to run what was trained.
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

/// The error of a result that llama.cpp runs otherwise than it was trained.
pub fn refuse(result: &Path, agreement: &Agreement) -> Error {
    Error::model(result, format!(
            "llama.cpp runs it otherwise than it was trained: expected a mean KL up to {:.1e} a token{}, found {:.1e}",
            agreement.bound,
            agreement
                .untrained
                .map_or(String::new(), |u| format!(", and below {:.1e}, that without it", u.effect.mean_kl)),
            agreement.difference.mean_kl
        )).with_hint("this is a fault of the program: please report it with the run's folder")
}
