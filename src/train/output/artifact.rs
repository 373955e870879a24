//! What training leaves behind: GGUF files that stock llama.cpp reads.

use std::collections::BTreeMap;
use std::path::Path;

use crate::error::{Error, Result};
use crate::gguf::quantize;
use crate::gguf::{GgufFile, GgufWriter, Metadata, TensorSpec, Value};
use crate::steer::{Fingerprint, control_vector};

use crate::train::device::Device;
use crate::train::output::adapter::{Adapter, Factors};
use crate::train::recipe::method::MethodName;
use crate::train::recipe::settings::Settings;
use crate::train::run::trainer::Trainer;

/// What a method's result is called in the run's folder.
pub fn file_name(method: MethodName) -> &'static str {
    match method {
        MethodName::Lora => "adapter.gguf",
        MethodName::Vector => "steer.gguf",
        MethodName::Full => "model.gguf",
    }
}

/// Whether `base` can be trained by `method`, and its result be written.
///
/// # Errors
/// [`Error::Setting`] where a model is to be trained itself whose weights are quantised.
pub fn check(base: &GgufFile, method: MethodName) -> Result<()> {
    let quantised = base.tensors().iter().find(|tensor| tensor.tensor_type().block_len() > 1);
    match (method, quantised) {
        (MethodName::Full, Some(tensor)) => Err(Error::setting(
            "--method full",
            format!(
                "it trains the weights themselves, and tensor {:?} of this model is of type {}",
                tensor.name(),
                tensor.tensor_type()
            ),
        )
        .with_hint("train an adapter with --method lora, or take the model in F16, BF16 or F32")),
        _ => Ok(()),
    }
}

/// Writes what was trained: an adapter, a control vector, or a whole model.
///
/// # Errors
/// [`Error::Io`], and nothing is left half-written; of the device.
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

/// The trained factors of each matrix.
fn adapter<D: Device>(trainer: &Trainer<D>, base: &GgufFile, alpha: f32) -> Result<Adapter> {
    let parameters = &trainer.parameters;
    let mut factors: BTreeMap<&str, Factors> = BTreeMap::new();
    for (parameter, value) in parameters.list().iter().zip(&parameters.values) {
        let (name, is_a) = match parameter.name.strip_suffix(".lora_a") {
            Some(name) => (name, true),
            None => (parameter.name.trim_end_matches(".lora_b"), false),
        };
        let shape = base.tensor(name).map(|tensor| tensor.shape().to_vec()).unwrap_or_default();
        let &[n_in, n_out] = shape.as_slice() else {
            let reason = format!("tensor {name:?}: expected a matrix, found {shape:?}");
            return Err(Error::gguf(base.path(), reason));
        };
        let of_matrix = factors.entry(name).or_insert_with(|| Factors {
            name: name.to_owned(),
            n_in: n_in as usize,
            n_out: n_out as usize,
            rank: 0,
            a: Vec::new(),
            b: Vec::new(),
        });
        let values = trainer.device().download(value)?;
        if is_a {
            of_matrix.rank =
                values.len() / if of_matrix.is_lookup() { of_matrix.n_out } else { of_matrix.n_in };
            of_matrix.a = values;
        } else {
            of_matrix.b = values;
        }
    }
    Ok(Adapter { alpha, factors: factors.into_values().collect() })
}

/// The trained direction of each block.
fn directions<D: Device>(trainer: &Trainer<D>) -> Result<BTreeMap<usize, Vec<f32>>> {
    let parameters = &trainer.parameters;
    let all = parameters.list().iter().zip(&parameters.values);
    all.map(|(parameter, value)| {
        let layer = parameter.name.strip_prefix("direction.").and_then(|n| n.parse().ok());
        let layer = layer.expect("`Method::Vector` names its parameters direction.N");
        Ok((layer, trainer.device().download(value)?))
    })
    .collect()
}

/// The base with its trained tensors, each in its own type; what is not trained byte for byte.
fn write_model<D: Device>(
    trainer: &Trainer<D>,
    base: &GgufFile,
    path: &Path,
    provenance: &Metadata,
) -> Result<()> {
    let parameters = &trainer.parameters;
    let trained: BTreeMap<&str, usize> =
        parameters.list().iter().enumerate().map(|(i, p)| (p.name.as_str(), i)).collect();
    let mut metadata = Metadata::new();
    for (key, value) in base.metadata().iter().filter(|(key, _)| !key.starts_with("split.")) {
        metadata.set(key, value.clone());
    }
    metadata.set("detox_gguf.version", Value::Str(crate::version().into()));
    for (key, value) in provenance.iter() {
        metadata.set(key, value.clone());
    }
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
