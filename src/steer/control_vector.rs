//! Control vectors: a direction for each layer, added to the residual stream, in a GGUF file.
//!
//! The format is that of llama.cpp's tools and of repeng:
//!
//! - `general.architecture` is `controlvector`.
//! - `controlvector.model_hint` is the model's architecture.
//! - `controlvector.layer_count` is the number of directions (i32 from llama.cpp's cvector-generator, u32
//!   from repeng).
//! - Tensor `direction.N`, N from 1, is an F32 vector of shape `[n_embd]`.
//!
//! Tools disagree on N. The runtime adds `direction.N` after block N, counted from 0. This program and
//! repeng compute it after block N too. cvector-generator computes a direction after block N and writes it
//! as `direction.{N+1}`, so its files act one block later than where they were computed.
//!
//! As in llama.cpp's `common_control_vector_load`, several files add up, and so do several tensors for one
//! layer (`direction.1` and `direction.01`). Some input that llama.cpp accepts has no effect or does harm;
//! it is refused here: layers that the model does not have, values that are not finite, and tensors with
//! other names.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use super::fingerprint::Fingerprint;
use crate::error::{Error, Result};
use crate::gguf::{GgufFile, GgufWriter, Metadata, TensorInfo, TensorSpec, TensorType, Value};
use crate::graph::steering::ControlVector;

/// `general.architecture` of a control vector.
const ARCHITECTURE: &str = "controlvector";

const MODEL_HINT: &str = "controlvector.model_hint";
const LAYER_COUNT: &str = "controlvector.layer_count";

/// Metadata key and text that state how `direction.N` is numbered.
const CONVENTION: (&str, &str) =
    ("detox_gguf.convention", "direction.N is added to the residual stream after block N, counted from 0");

/// A control-vector file, not yet checked against a model.
#[derive(Debug, Clone, PartialEq)]
pub struct ControlVectorFile {
    /// The path it was read from.
    pub path: PathBuf,
    /// The architecture it was made for, as named by the tool that wrote it. repeng writes Hugging Face's
    /// names, such as "mistral" for GGUF's "llama".
    pub model_hint: Option<String>,
    /// The model it was made for, if this program wrote it.
    pub fingerprint: Option<Fingerprint>,
    /// Directions by layer, from 1, shape `[n_embd]` each. At least one; all values are finite.
    pub directions: BTreeMap<usize, Vec<f32>>,
    /// All metadata of the file.
    pub metadata: Metadata,
}

impl ControlVectorFile {
    /// Reads a control vector written by any tool.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::Gguf`] as [`GgufFile::open`]. [`Error::Input`] for another kind of GGUF
    /// file, for directions that llama.cpp's own loader refuses, and for values that are not finite.
    pub fn read(path: &Path) -> Result<ControlVectorFile> {
        let file = GgufFile::open(path)?;
        check_kind(&file)?;
        let refuse = |reason: String| Error::input(path, None, reason);
        let mut directions: BTreeMap<usize, Vec<f32>> = BTreeMap::new();
        let mut n_embd = None;
        for tensor in file.tensors() {
            let layer = direction_layer(tensor).map_err(refuse)?;
            let n = *n_embd.get_or_insert(tensor.n_elements());
            if tensor.n_elements() != n {
                let (name, found) = (tensor.name(), tensor.n_elements());
                let reason = format!(
                    "tensor {name:?}: expected {n} numbers, as in the tensors before it, found {found}"
                );
                return Err(refuse(reason));
            }
            let values = f32s(&file.read_tensor(tensor)?);
            if let Some((i, value)) = values.iter().enumerate().find(|(_, value)| !value.is_finite()) {
                let name = tensor.name();
                let reason = format!("tensor {name:?}: expected finite numbers, found {value} at index {i}");
                return Err(refuse(reason));
            }
            match directions.get_mut(&layer) {
                None => drop(directions.insert(layer, values)),
                Some(sum) => sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value),
            }
        }
        if directions.is_empty() {
            return Err(refuse("expected tensors direction.1, direction.2, …, found none".into()));
        }
        Ok(ControlVectorFile {
            path: path.to_path_buf(),
            model_hint: file.str_if_present(MODEL_HINT)?.map(str::to_owned),
            fingerprint: Fingerprint::recorded_in(&file)?,
            directions,
            metadata: file.metadata().clone(),
        })
    }

    /// Length of each direction.
    pub fn n_embd(&self) -> usize {
        self.directions.values().next().map_or(0, Vec::len)
    }

    /// Checks the directions against a model's layers and the width of its residual stream.
    ///
    /// # Errors
    /// [`Error::Input`] that names the first direction that does not fit.
    pub fn check_sizes(&self, n_layer: usize, n_embd: usize) -> Result<()> {
        let refuse = |reason: String| {
            Err(Error::input(&self.path, None, reason).with_hint(
                "it was made for another model: use that model, or a control vector made for this one",
            ))
        };
        for (&layer, direction) in &self.directions {
            if direction.len() != n_embd {
                return refuse(format!(
                    "direction.{layer}: expected {n_embd} numbers (this model's n_embd), found {}",
                    direction.len()
                ));
            }
            if layer >= n_layer {
                return refuse(format!(
                    "direction.{layer}: expected a layer below {n_layer} (this model's n_layer)"
                ));
            }
        }
        Ok(())
    }

    /// Checks that it was made for the model with this fingerprint, as far as the file says.
    ///
    /// A file without a fingerprint has only its model hint. Tools spell the hint differently, so a
    /// mismatch is a warning, not an error.
    ///
    /// # Errors
    /// As [`Fingerprint::check`].
    pub fn check_origin(&self, model: &Fingerprint, force: bool) -> Result<()> {
        if let Some(fingerprint) = &self.fingerprint {
            return fingerprint.check(model, "directions", &self.path, force);
        }
        if let Some(warning) = self.hint_warning(model) {
            tracing::warn!("{}: {warning}", self.path.display());
        }
        Ok(())
    }

    /// A warning if it has no fingerprint and its hint names another architecture.
    pub(crate) fn hint_warning(&self, model: &Fingerprint) -> Option<String> {
        let hint = self.model_hint.as_deref().filter(|_| self.fingerprint.is_none())?;
        (hint != model.architecture).then(|| {
            format!(
                "this control vector was made for architecture {hint:?}, but the model's is {:?}; the sizes fit, \
                 but it may have no useful effect",
                model.architecture
            )
        })
    }
}

/// Writes a control vector that llama.cpp, its server and repeng can read.
///
/// `directions` are keyed by layer from 1; each has the length `fingerprint.n_embd`. `provenance` is
/// additional metadata. It must not contain keys that this function writes itself.
///
/// # Errors
/// [`Error::Input`] if there are no directions, for layer 0 (no runtime adds it), for a wrong length, and
/// for values that are not finite; [`Error::Gguf`] for a key that is already used; [`Error::Io`].
pub fn write(
    path: &Path,
    fingerprint: &Fingerprint,
    directions: &BTreeMap<usize, Vec<f32>>,
    provenance: &Metadata,
) -> Result<()> {
    let refuse = |reason: String, hint: Option<&str>| {
        Err(Error::Input { path: path.to_path_buf(), line: None, reason, hint: hint.map(str::to_owned) })
    };
    if directions.is_empty() {
        return refuse("expected at least one direction to write, found none".into(), None);
    }
    for (&layer, direction) in directions {
        if layer == 0 {
            let reason = "expected layers from 1, found layer 0: llama.cpp adds no control vector there";
            return refuse(
                reason.into(),
                Some("skip layer 0, or write a model that contains it with --bake"),
            );
        }
        if layer >= fingerprint.n_layer as usize {
            let n_layer = fingerprint.n_layer;
            return refuse(format!("direction.{layer}: expected a layer below {n_layer}"), None);
        }
        if direction.len() != fingerprint.n_embd as usize {
            let (expected, found) = (fingerprint.n_embd, direction.len());
            return refuse(format!("direction.{layer}: expected {expected} numbers, found {found}"), None);
        }
        if let Some(value) = direction.iter().find(|value| !value.is_finite()) {
            return refuse(format!("direction.{layer}: expected finite numbers, found {value}"), None);
        }
    }
    let mut metadata = Metadata::new();
    metadata.set("general.architecture", Value::Str(ARCHITECTURE.into()));
    // As llama.cpp's own tool does: the hint is the model's architecture, and the count is an i32.
    metadata.set(MODEL_HINT, Value::Str(fingerprint.architecture.clone()));
    metadata.set(LAYER_COUNT, Value::I32(directions.len() as i32));
    metadata.set(CONVENTION.0, Value::Str(CONVENTION.1.into()));
    fingerprint.add_to(&mut metadata);
    for (key, value) in provenance.iter() {
        if metadata.set(key, value.clone()).is_some() {
            let reason =
                format!("expected provenance keys that a control vector does not use, found {key:?}");
            return Err(Error::gguf(path, reason));
        }
    }
    let specs = directions.iter().map(|(layer, direction)| TensorSpec {
        name: tensor_name(*layer),
        shape: vec![direction.len() as u64],
        tensor_type: TensorType::F32,
    });
    let mut writer = GgufWriter::create(path, &metadata, specs.collect())?;
    for direction in directions.values() {
        writer.write_f32s(direction)?;
    }
    writer.finish()
}

/// Adds up control vectors, each times its scale, within a range of layers.
///
/// # Errors
/// [`Error::Input`] if one does not fit the model; [`Error::Setting`] for a scale that is not finite, a sum
/// that overflows, or an empty range.
pub fn combine(
    files: &[(ControlVectorFile, f32)],
    layer_range: Option<(i32, i32)>,
    n_layer: usize,
    n_embd: usize,
) -> Result<ControlVector> {
    let range = resolve_layer_range(layer_range, n_layer)?;
    let mut rows = Rows::new(n_layer, n_embd);
    for (file, scale) in files {
        file.check_sizes(n_layer, n_embd)?;
        if !scale.is_finite() {
            let reason = format!("expected a finite scale for {}, found {scale}", file.path.display());
            return Err(Error::setting("--control-vector-scaled", reason));
        }
        for (&layer, direction) in file.directions.iter().filter(|(layer, _)| range.contains(layer)) {
            rows.add(layer, direction, *scale);
        }
    }
    rows.finish()
}

/// Resolves `--control-vector-layer-range START END` to layers, both inclusive.
///
/// As in llama.cpp, a START that is not positive means the first layer, and such an END the last.
///
/// # Errors
/// [`Error::Setting`] if the range is empty.
pub fn resolve_layer_range(range: Option<(i32, i32)>, n_layer: usize) -> Result<RangeInclusive<usize>> {
    let last = n_layer.saturating_sub(1);
    let (start, end) = range.unwrap_or((0, 0));
    let or =
        |bound: i32, otherwise: usize| usize::try_from(bound).ok().filter(|&n| n > 0).unwrap_or(otherwise);
    let resolved = or(start, 1)..=or(end, last).min(last);
    if range.is_some() && resolved.is_empty() {
        return Err(Error::setting(
            "--control-vector-layer-range",
            format!("expected layers from 1 to {last}, found {start} to {end}, which contains none of them"),
        ));
    }
    Ok(resolved)
}

/// Sums directions into a [`ControlVector`].
#[derive(Debug)]
pub(super) struct Rows {
    n_embd: usize,
    /// Shape `[n_layer - 1][n_embd]`.
    rows: Vec<f32>,
}

impl Rows {
    pub(super) fn new(n_layer: usize, n_embd: usize) -> Rows {
        Rows { n_embd, rows: vec![0.0; n_layer.saturating_sub(1) * n_embd] }
    }

    /// Adds `scale * direction` after block `layer`, from 1 to `n_layer - 1`.
    ///
    /// The sum is taken in f32 and in llama.cpp's order, so that it has the same bits.
    pub(super) fn add(&mut self, layer: usize, direction: &[f32], scale: f32) {
        let row = &mut self.rows[(layer - 1) * self.n_embd..layer * self.n_embd];
        row.iter_mut().zip(direction).for_each(|(sum, value)| *sum += value * scale);
    }

    /// Whether the sum is zero.
    pub(super) fn is_zero(&self) -> bool {
        self.rows.iter().all(|&value| value == 0.0)
    }

    /// Returns the sum if it is finite.
    pub(super) fn finish(self) -> Result<ControlVector> {
        if let Some(i) = self.rows.iter().position(|value| !value.is_finite()) {
            let layer = i / self.n_embd + 1;
            return Err(Error::setting(
                "coefficient",
                format!(
                    "the sum of the directions after layer {layer} exceeds the largest f32, {:e}",
                    f32::MAX
                ),
            ));
        }
        Ok(ControlVector { n_embd: self.n_embd, rows: self.rows })
    }
}

/// Checks that the file says it is a control vector.
fn check_kind(file: &GgufFile) -> Result<()> {
    let refuse = |reason: String, hint: &str| Err(Error::input(file.path(), None, reason).with_hint(hint));
    let kind = file.str_if_present("general.type")?;
    if kind == Some("adapter") {
        return refuse("expected a control vector, found a LoRA adapter".into(), "use it with --lora");
    }
    match file.str_if_present("general.architecture")? {
        Some(ARCHITECTURE) => Ok(()),
        Some("imatrix") => refuse(
            "expected a control vector, found an importance matrix".into(),
            "an importance matrix is for quantising; it cannot steer",
        ),
        Some(architecture) => refuse(
            format!("expected a control vector, found a model of architecture {architecture:?}"),
            "give the model with -m",
        ),
        // llama.cpp does not read the architecture, so the directions alone are enough.
        None if file.tensors().iter().any(|tensor| tensor.name().starts_with("direction.")) => Ok(()),
        None => refuse(
            "expected a control vector, found a GGUF without general.architecture and without directions"
                .into(),
            "a control vector has tensors direction.1, direction.2, …",
        ),
    }
}

/// The tensor that holds the direction of a layer.
pub fn tensor_name(layer: usize) -> String {
    format!("direction.{layer}")
}

/// Parses the layer of a tensor `direction.N` and checks its type and shape.
fn direction_layer(tensor: &TensorInfo) -> Result<usize, String> {
    let name = tensor.name();
    let digits = name.strip_prefix("direction.").filter(|d| d.bytes().all(|byte| byte.is_ascii_digit()));
    let Some(layer) = digits.and_then(|digits| digits.parse::<u32>().ok()) else {
        return Err(format!(
            "tensor {name:?}: expected direction.N, where N is a layer, and no other tensors"
        ));
    };
    if layer == 0 {
        return Err(format!("tensor {name:?}: expected layers from 1: llama.cpp adds nothing after block 0"));
    }
    if tensor.tensor_type() != TensorType::F32 {
        return Err(format!("tensor {name:?}: expected type f32, found {}", tensor.tensor_type()));
    }
    if tensor.shape()[1..].iter().any(|&ne| ne != 1) {
        return Err(format!("tensor {name:?}: expected one dimension, found {:?}", tensor.shape()));
    }
    Ok(layer as usize)
}

fn f32s(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|&chunk| f32::from_le_bytes(chunk)).collect()
}

#[cfg(test)]
mod tests;
