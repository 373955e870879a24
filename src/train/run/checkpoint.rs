//! Checkpoints: the trained values, the optimizer state and the progress of a run, in one GGUF.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::gguf::{GgufFile, GgufWriter, Metadata, TensorSpec, TensorType, Value};

use crate::train::device::Device;
use crate::train::model::transformer::read_numbers;
use crate::train::run::trainer::Trainer;

/// `general.architecture` of a checkpoint, so that no program mistakes it for a model.
const ARCHITECTURE: &str = "detox-gguf-checkpoint";

/// Metadata key of [`State`], stored as JSON.
const STATE: &str = "detox_gguf.checkpoint.state";

/// The progress of a run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Steps done.
    pub step: u64,
    /// Lines of `metrics.jsonl` so far.
    pub n_records: usize,
    /// The step with the lowest held-out loss, and that loss.
    pub best: Option<(u64, f64)>,
    /// Evaluations since then.
    pub n_worse: u32,
    /// The step of the last evaluation.
    #[serde(rename = "looked_at")]
    pub evaluated_at: u64,
    /// Wall-clock seconds of all steps and evaluations, over all resumes.
    pub seconds: f64,
}

/// Writes a checkpoint atomically. Only with `with_optimizer` can a run resume from it.
///
/// # Errors
/// [`Error::Io`], and those of the device.
pub fn save<D: Device>(path: &Path, trainer: &Trainer<D>, state: &State, with_optimizer: bool) -> Result<()> {
    let mut metadata = Metadata::new();
    metadata.set("general.architecture", Value::Str(ARCHITECTURE.into()));
    let state = serde_json::to_string(state).expect("numbers in a struct");
    metadata.set(STATE, Value::Str(state));
    let list = trainer.parameters.list();
    let spec = |name: String, shape: &[usize]| TensorSpec {
        name,
        shape: shape.iter().rev().map(|&n| n as u64).collect(),
        tensor_type: TensorType::F32,
    };
    let n_states = if with_optimizer { trainer.optimizer.states.first().map_or(0, Vec::len) } else { 0 };
    let mut specs: Vec<TensorSpec> = list.iter().map(|p| spec(value_name(&p.name), &p.shape)).collect();
    for i in 0..n_states {
        specs.extend(list.iter().map(|p| spec(state_name(i, &p.name), &p.shape)));
    }
    let mut writer = GgufWriter::create(path, &metadata, specs)?;
    for value in &trainer.parameters.values {
        writer.write_f32s(&trainer.device().download(value)?)?;
    }
    for i in 0..n_states {
        for states in &trainer.optimizer.states {
            writer.write_f32s(&trainer.device().download(&states[i])?)?;
        }
    }
    writer.finish()
}

/// Reads a checkpoint into `trainer`, and returns the run's progress.
///
/// # Errors
/// [`Error::RunFolder`] if the checkpoint belongs to another run; [`Error::Gguf`] and [`Error::Io`] if it cannot be
/// read.
pub fn load<D: Device>(path: &Path, trainer: &mut Trainer<D>, with_optimizer: bool) -> Result<State> {
    let file = GgufFile::open(path)?;
    let refuse = |reason: String| {
        Error::run_folder(path, reason).with_hint("choose another -o, or delete the folder to start over")
    };
    let found = file.str_if_present("general.architecture")?.unwrap_or_default();
    if found != ARCHITECTURE {
        return Err(refuse(format!("expected a checkpoint, found architecture {found:?}")));
    }
    let state: State =
        serde_json::from_str(file.str(STATE)?).map_err(|error| refuse(format!("key {STATE:?}: {error}")))?;
    let list = trainer.parameters.list().to_vec();
    let read = |name: String, shape: &[usize]| -> Result<Vec<f32>> {
        let expected: Vec<u64> = shape.iter().rev().map(|&n| n as u64).collect();
        match file.tensor(&name) {
            Some(tensor) if tensor.shape() == expected => read_numbers(&file, tensor),
            other => {
                let found = other.map_or("nothing".into(), |tensor| format!("{:?}", tensor.shape()));
                Err(refuse(format!("tensor {name:?}: expected {expected:?}, found {found}")))
            }
        }
    };
    for (i, parameter) in list.iter().enumerate() {
        let values = read(value_name(&parameter.name), &parameter.shape)?;
        trainer.write_value(i, &values)?;
        if with_optimizer {
            for j in 0..trainer.optimizer.states[i].len() {
                let values = read(state_name(j, &parameter.name), &parameter.shape)?;
                trainer.write_state(i, j, &values)?;
            }
        }
    }
    if with_optimizer {
        trainer.optimizer.n_steps = state.step;
    }
    Ok(state)
}

fn value_name(parameter: &str) -> String {
    format!("value/{parameter}")
}

fn state_name(state: usize, parameter: &str) -> String {
    format!("state{state}/{parameter}")
}
