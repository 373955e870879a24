//! The result of training as a GGUF file that stock llama.cpp loads.

use std::collections::BTreeMap;
use std::path::Path;

use crate::error::{Error, Result};
use crate::gguf::quantize;
use crate::gguf::{GgufFile, GgufWriter, Metadata, TensorSpec};
use crate::steer::{Fingerprint, control_vector};

use crate::train::device::Device;
use crate::train::model::parameters::Role;
use crate::train::output::adapter::{Adapter, Factors};
use crate::train::output::provenance::{add, copy_of, set_version};
use crate::train::recipe::method::MethodName;
use crate::train::recipe::settings::Settings;
use crate::train::run::trainer::Trainer;

/// The file name of a method's result in the run folder.
pub fn file_name(method: MethodName) -> &'static str {
    match method {
        MethodName::Lora => "adapter.gguf",
        MethodName::Vector => "steer.gguf",
        MethodName::Full => "model.gguf",
    }
}

/// Checks that the result of training `base` by `method` can be written.
///
/// # Errors
/// [`Error::Setting`] for [`MethodName::Full`] if the model is quantised.
pub fn check(base: &GgufFile, method: MethodName) -> Result<()> {
    let quantised = base.tensors().iter().find(|tensor| tensor.tensor_type().block_len() > 1);
    match (method, quantised) {
        (MethodName::Full, Some(tensor)) => Err(Error::setting(
            "--method full",
            format!(
                "it trains the weights themselves, and tensor {:?} is of type {}, which is quantised",
                tensor.name(),
                tensor.tensor_type()
            ),
        )
        .with_hint("train an adapter with --method lora, or use an F16, BF16 or F32 file of the model")),
        _ => Ok(()),
    }
}

/// Writes the result: an adapter, a control vector or a whole model.
///
/// The file gets its name only when complete.
///
/// # Errors
/// [`Error::Io`], and those of the device.
pub fn write<D: Device>(
    trainer: &Trainer<D>,
    base: &GgufFile,
    settings: &Settings,
    path: &Path,
    provenance: &Metadata,
) -> Result<()> {
    match settings.method {
        MethodName::Lora => adapter(trainer, base, settings.alpha)?.write(path, base, provenance),
        MethodName::Vector => {
            let directions = directions(trainer)?;
            control_vector::write(path, &Fingerprint::of(base)?, &directions, provenance)
        }
        MethodName::Full => write_model(trainer, base, path, provenance),
    }
}

/// Downloads the trained factors of each matrix.
fn adapter<D: Device>(trainer: &Trainer<D>, base: &GgufFile, alpha: f32) -> Result<Adapter> {
    let parameters = &trainer.parameters;
    let mut all: BTreeMap<&str, Factors> = BTreeMap::new();
    for (parameter, value) in parameters.list().iter().zip(&parameters.values) {
        let (Role::LoraA { tensor: name } | Role::LoraB { tensor: name }) = &parameter.role else {
            unreachable!("`Method::Lora` trains factors only, found {:?}", parameter.role)
        };
        let shape = base.tensor(name).map(|tensor| tensor.shape().to_vec()).unwrap_or_default();
        let &[n_in, n_out] = shape.as_slice() else {
            let reason = format!("tensor {name:?}: expected a matrix, found {shape:?}");
            return Err(Error::gguf(base.path(), reason));
        };
        let factors = all.entry(name).or_insert_with(|| Factors {
            name: name.clone(),
            n_in: n_in as usize,
            n_out: n_out as usize,
            rank: 0,
            a: Vec::new(),
            b: Vec::new(),
        });
        let values = trainer.device().download(value)?;
        if let Role::LoraA { .. } = parameter.role {
            factors.rank = values.len() / if factors.is_lookup() { factors.n_out } else { factors.n_in };
            factors.a = values;
        } else {
            factors.b = values;
        }
    }
    Ok(Adapter { alpha, factors: all.into_values().collect() })
}

/// Downloads the trained direction of each layer.
fn directions<D: Device>(trainer: &Trainer<D>) -> Result<BTreeMap<usize, Vec<f32>>> {
    let parameters = &trainer.parameters;
    let all = parameters.list().iter().zip(&parameters.values);
    all.map(|(parameter, value)| match parameter.role {
        Role::Direction { layer } => Ok((layer, trainer.device().download(value)?)),
        ref other => unreachable!("`Method::Vector` trains directions only, found {other:?}"),
    })
    .collect()
}

/// Writes a copy of the base with its trained tensors, each in its own type. Other tensors are copied byte for
/// byte.
fn write_model<D: Device>(
    trainer: &Trainer<D>,
    base: &GgufFile,
    path: &Path,
    provenance: &Metadata,
) -> Result<()> {
    let parameters = &trainer.parameters;
    let trained: BTreeMap<&str, usize> =
        parameters.list().iter().enumerate().map(|(i, p)| (p.name.as_str(), i)).collect();
    let mut metadata = copy_of(base, &[]);
    set_version(&mut metadata);
    add(provenance, &mut metadata);
    let specs = base.tensors().iter().map(|tensor| TensorSpec {
        name: tensor.name().to_owned(),
        shape: tensor.shape().to_vec(),
        tensor_type: tensor.tensor_type(),
    });
    let mut writer = GgufWriter::create(path, &metadata, specs.collect())?;
    for tensor in base.tensors() {
        match trained.get(tensor.name()) {
            Some(&i) => {
                let values = trainer.device().download(&parameters.values[i])?;
                let n_per_row = tensor.shape()[0] as usize;
                let bytes = quantize(tensor.tensor_type(), &values, n_per_row)
                    .map_err(|reason| Error::gguf(path, format!("tensor {:?}: {reason}", tensor.name())))?;
                writer.write(&bytes)?;
            }
            None => writer.write(&base.read_tensor(tensor)?)?,
        }
    }
    writer.finish()
}
