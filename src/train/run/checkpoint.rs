//! Checkpoints: the trained values, the optimizer state and the progress of a run, in one GGUF.

use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::file::base_name;
use crate::gguf::{GgufFile, GgufWriter, Metadata, TensorSpec, TensorType, Value};

use crate::train::device::Device;
use crate::train::model::transformer::read_numbers;
use crate::train::run::files::RunFiles;
use crate::train::run::trainer::Trainer;

/// `general.architecture` of a checkpoint, so that no program mistakes it for a model.
const ARCHITECTURE: &str = "detox-gguf-checkpoint";

/// Metadata key of [`State`], stored as JSON.
const STATE: &str = "detox_gguf.checkpoint.state";

/// The last tensor: SHA-256 of [`STATE`] and of all other tensors.
const SHA256: &str = "sha256";

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
/// If `previous` is given, the checkpoint that was at `path` is kept there.
///
/// # Errors
/// [`Error::Io`]; [`Error::Training`] for a value that is not finite; and those of the device.
pub fn save<D: Device>(
    path: &Path,
    previous: Option<&Path>,
    trainer: &Trainer<D>,
    state: &State,
    with_optimizer: bool,
) -> Result<()> {
    let mut metadata = Metadata::new();
    metadata.set("general.architecture", Value::Str(ARCHITECTURE.into()));
    let state = serde_json::to_string(state).expect("numbers in a struct");
    let mut sha256 = Sha256::new_with_prefix(&state);
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
    specs.push(TensorSpec { name: SHA256.into(), shape: vec![8], tensor_type: TensorType::I32 });
    let mut writer = GgufWriter::create(path, &metadata, specs)?;
    let mut write = |values: Vec<f32>| {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        sha256.update(&bytes);
        writer.write_f32s(&values).map_err(Error::as_divergence)
    };
    for value in &trainer.parameters.values {
        write(trainer.device().download(value)?)?;
    }
    for i in 0..n_states {
        for states in &trainer.optimizer.states {
            write(trainer.device().download(&states[i])?)?;
        }
    }
    writer.write(&sha256.finalize())?;
    let file = writer.complete()?;
    if let Some(previous) = previous.filter(|_| path.is_file()) {
        std::fs::rename(path, previous).map_err(Error::io("rename", path))?;
    }
    file.commit()
}

/// A checkpoint that was read and found whole.
#[derive(Debug)]
pub struct Checkpoint {
    file: GgufFile,
    /// The run's progress.
    pub state: State,
}

/// Reads the checkpoint at `path` into `trainer`, and returns the run's progress.
///
/// # Errors
/// Those of [`Checkpoint::open`] and [`Checkpoint::load`].
pub fn load<D: Device>(path: &Path, trainer: &mut Trainer<D>, with_optimizer: bool) -> Result<State> {
    let checkpoint = Checkpoint::open(path)?;
    checkpoint.load(trainer, with_optimizer)?;
    Ok(checkpoint.state)
}

impl Checkpoint {
    /// The newest whole checkpoint of a run; `None` if it has none.
    ///
    /// # Errors
    /// [`Error::RunFolder`] if the only one is damaged; [`Error::Io`].
    pub fn newest(files: &RunFiles) -> Result<Option<Checkpoint>> {
        let RunFiles { checkpoint, previous_checkpoint: previous, .. } = files;
        match (checkpoint.exists(), previous.exists()) {
            (false, false) => Ok(None),
            (false, true) => Checkpoint::open(previous).map(Some),
            (true, false) => Checkpoint::open(checkpoint).map(Some),
            (true, true) => Checkpoint::open(checkpoint)
                .or_else(|error| {
                    // If both are damaged, the error names both in turn: deleting the one leads to the other.
                    let Ok(found) = Checkpoint::open(previous) else { return Err(error) };
                    let step = found.state.step;
                    tracing::warn!("{error}; resuming from the checkpoint before it, of step {step}");
                    Ok(found)
                })
                .map(Some),
        }
    }

    /// Opens a checkpoint and compares its SHA-256.
    ///
    /// # Errors
    /// [`Error::RunFolder`] if it is damaged or no checkpoint; [`Error::Io`] if it cannot be read.
    pub fn open(path: &Path) -> Result<Checkpoint> {
        let damaged = |error: Error| match error {
            Error::Gguf { reason, .. } => refuse(path, format!("the checkpoint is damaged: {reason}")),
            other => other,
        };
        let file = GgufFile::open(path).map_err(damaged)?;
        let found = file.str_if_present("general.architecture").map_err(damaged)?.unwrap_or_default();
        if found != ARCHITECTURE {
            return Err(refuse(path, format!("expected a checkpoint, found architecture {found:?}")));
        }
        let text = file.str(STATE).map_err(damaged)?;
        let state: State = serde_json::from_str(text)
            .map_err(|error| refuse(path, format!("the checkpoint is damaged: key {STATE:?}: {error}")))?;
        // Checkpoints of earlier versions have none.
        if let Some(expected) = file.tensor(SHA256) {
            let mut sha256 = Sha256::new_with_prefix(text);
            for tensor in file.tensors().iter().filter(|tensor| tensor.name() != SHA256) {
                sha256.update(file.read_tensor(tensor)?);
            }
            if file.read_tensor(expected)? != sha256.finalize()[..] {
                return Err(refuse(path, "the checkpoint is damaged: its contents do not match its SHA-256"));
            }
        }
        Ok(Checkpoint { file, state })
    }

    /// Puts its values into `trainer`.
    ///
    /// # Errors
    /// [`Error::RunFolder`] if the checkpoint belongs to another run; [`Error::Io`] if it cannot be read.
    pub fn load<D: Device>(&self, trainer: &mut Trainer<D>, with_optimizer: bool) -> Result<()> {
        let file = &self.file;
        let list = trainer.parameters.list().to_vec();
        let read = |name: String, shape: &[usize]| -> Result<Vec<f32>> {
            let expected: Vec<u64> = shape.iter().rev().map(|&n| n as u64).collect();
            match file.tensor(&name) {
                Some(tensor) if tensor.shape() == expected => read_numbers(file, tensor),
                other => {
                    let found = other.map_or("nothing".into(), |tensor| format!("{:?}", tensor.shape()));
                    let reason = format!("tensor {name:?}: expected {expected:?}, found {found}");
                    Err(refuse(file.path(), reason))
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
            trainer.optimizer.n_steps = self.state.step;
        }
        Ok(())
    }
}

/// The error for a checkpoint that cannot be used, with a way out that keeps the rest of the folder.
fn refuse(path: &Path, reason: impl Into<String>) -> Error {
    let name = base_name(path);
    Error::run_folder(path, reason).with_hint(format!(
        "delete {name} and repeat the command to train from the first step, or choose another folder with -o"
    ))
}

fn value_name(parameter: &str) -> String {
    format!("value/{parameter}")
}

fn state_name(state: usize, parameter: &str) -> String {
    format!("state{state}/{parameter}")
}
