//! What was trained, run by llama.cpp: are its logits those of the trainer?

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::engine::steering::{Change, Edit, LoraScaled, Operation, When};
use crate::engine::{Model, ModelOptions, SessionOptions, Steering, Token};
use crate::error::{Error, Result};
use crate::gguf::{GgufFile, TensorType};
use crate::steer::exact_check::{Difference, compare, logits};
use crate::steer::{ControlVectorFile, control_vector};

use super::cpu::Products;
use super::device::Device;
use super::forward::Batch;
use super::loaded_back::exact_options;
use super::pack::Packed;
use super::settings::MethodName;
use super::tokens::TokenPair;
use super::trainer::{Side, Trainer};

/// Mean KL that the order of sums, and llama.cpp's table of GELU in F16, may cause in F32 (nats a token).
const F32_BOUND: f64 = 1e-6;

/// llama.cpp rounds what it multiplies by F16 weights to F16, and by BF16 weights to BF16.
const HALF_BOUND: f64 = 1e-4;

/// Least bound on quantised weights: in a model so small that a nudge moves hardly a rounding (gguf/tiny/llama-q8_0),
/// llama.cpp's roundings were seen to move 1.6e-4.
const QUANTISED_BOUND: f64 = 5e-4;

/// How many times the floor two that round differently may differ.
const FAST_FACTOR: f64 = 4.0;

/// Trainer and llama.cpp on the same texts.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Agreement {
    /// llama.cpp's divergence from the trainer.
    pub difference: Difference,
    /// What the least change makes in llama.cpp itself.
    pub floor: Difference,
    /// The mean KL up to which they agree.
    pub bound: f64,
}

impl Agreement {
    /// Whether they agree.
    pub fn holds(&self) -> bool {
        self.difference.mean_kl <= self.bound
    }
}

/// Compares the trainer's logits with llama.cpp's that runs `result`, after each token before the ones
/// that `pairs`' answers hold.
///
/// The bound is 1e-6 a token in F32 and 1e-4 in F16 and BF16. On quantised weights llama.cpp rounds to 8
/// bits what it multiplies, which the trainer's exact products do not: there the bound is llama.cpp's own
/// noise floor, or four times it where the trainer rounds too.
///
/// # Errors
/// Those of loading and decoding, and of the device.
pub fn agreement<D: Device>(
    trainer: &Trainer<D>,
    base: &GgufFile,
    method: MethodName,
    products: Products,
    result: &Path,
    pairs: &[&TokenPair],
    n_threads: usize,
) -> Result<Agreement> {
    let texts: Vec<Vec<Token>> = pairs
        .iter()
        .flat_map(|pair| [&pair.chosen, &pair.rejected].map(|answer| (&pair.prompt, answer)))
        .map(|(prompt, answer)| prompt.iter().chain(&answer[..answer.len() - 1]).copied().collect())
        .collect();
    let options = exact_options(&SessionOptions { n_threads: Some(n_threads), ..SessionOptions::default() });
    let model_options = ModelOptions { n_gpu_layers: 0, check_tensors: false };
    let path = if method == MethodName::Full { result } else { base.path() };
    let model = Model::open(path, &model_options)?;
    let steering = steering(&model, method, result)?;
    // The rows that predict answers, of all rows.
    let theirs = |steering: &Steering| -> Result<Vec<Vec<f32>>> {
        let all = logits(&model.with_steering(steering.clone())?, &texts, &options)?;
        let mut rows = Vec::new();
        let mut first = 0;
        for (i, text) in texts.iter().enumerate() {
            let n_prompt = pairs[i / 2].prompt.len();
            rows.extend_from_slice(&all[first + n_prompt - 1..first + text.len()]);
            first += text.len();
        }
        Ok(rows)
    };
    let found = theirs(&steering)?;
    let nudged = Steering { edits: nudges(&model), ..steering.clone() };
    let floor = compare(&found, &theirs(&nudged)?);
    drop(model);

    let mut ours = Vec::new();
    for pair in pairs {
        let mut packed = Packed::default();
        packed.push(&pair.prompt, &pair.chosen, &pair.rejected);
        let batch = Batch::new(trainer.device(), packed)?;
        ours.extend(trainer.transformer.logits(&trainer.pass(Side::Policy), &batch)?);
    }
    let difference = compare(&ours, &found);
    let bound = bound(base, &floor, products);
    Ok(Agreement { difference, floor, bound })
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

fn bound(base: &GgufFile, floor: &Difference, products: Products) -> f64 {
    let matrices = || base.tensors().iter().filter(|t| t.shape().len() > 1).map(|t| t.tensor_type());
    let is_half = |t: TensorType| matches!(t, TensorType::F16 | TensorType::BF16);
    let least = if matrices().any(is_half) { HALF_BOUND } else { F32_BOUND };
    let factor = if products == Products::Fast { FAST_FACTOR } else { 1.0 };
    let quantised = matrices().any(|t| t.block_len() > 1);
    if quantised { (factor * floor.mean_kl).max(QUANTISED_BOUND) } else { least }
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
    Error::Model {
        path: result.to_path_buf(),
        reason: format!(
            "llama.cpp runs it otherwise than it was trained: expected a mean KL up to {:.1e} a token, found {:.1e}",
            agreement.bound, agreement.difference.mean_kl
        ),
        hint: Some("this is a fault of the program: please report it with the run's folder".into()),
    }
}
