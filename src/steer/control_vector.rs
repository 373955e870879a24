//! Control vectors: one direction a layer, added to the residual stream, as GGUF.
//!
//! Files are those of llama.cpp's tools and of repeng: `general.architecture` is `controlvector`,
//! `controlvector.model_hint` an architecture, `controlvector.layer_count` the number of directions (i32
//! from llama.cpp's cvector-generator, u32 from repeng), and tensor `direction.N` an F32 vector of
//! `n_embd` numbers, N from 1.
//!
//! What N means differs between tools. The runtime adds `direction.N` after block N, counted from 0, and
//! so do the files written here and by repeng, which compute it there too. cvector-generator computes a
//! direction after block N and writes it as `direction.{N+1}`: its files act one block later than they
//! were computed.
//!
//! Adding up follows `common_control_vector_load` of llama.cpp: several files add up, and so do several
//! tensors for one layer (`direction.1` and `direction.01`). What it lets pass and would do nothing, or
//! harm, is refused: layers that the model has not, values that are not finite, tensors of other names.

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

/// What a file says of its own convention.
const CONVENTION: (&str, &str) =
    ("detox_gguf.convention", "direction.N is added to the residual stream after block N, counted from 0");

/// A control vector's file, read and checked by itself.
#[derive(Debug, Clone, PartialEq)]
pub struct ControlVectorFile {
    /// Where it was read from.
    pub path: PathBuf,
    /// The architecture that it was made for, in the words of its maker: repeng writes names of Hugging
    /// Face, such as "mistral" where GGUF says "llama".
    pub model_hint: Option<String>,
    /// The model that it was made for, if this program wrote it.
    pub fingerprint: Option<Fingerprint>,
    /// By layer, from 1; all of one length, and finite. At least one.
    pub directions: BTreeMap<usize, Vec<f32>>,
    /// Everything that the file says of itself.
    pub metadata: Metadata,
}

impl ControlVectorFile {
    /// Reads a control vector of any tool.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::Gguf`] as [`GgufFile::open`]. [`Error::Input`] for a GGUF of another
    /// kind, which it names, and for directions that llama.cpp's own loader refuses, or that are not finite.
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
                let reason =
                    format!("tensor {name:?}: expected {n} numbers as in the ones before, found {found}");
                return Err(refuse(reason));
            }
            let values = f32s(&file.read_tensor(tensor)?);
            if let Some((i, value)) = values.iter().enumerate().find(|(_, value)| !value.is_finite()) {
                let name = tensor.name();
                let reason = format!("tensor {name:?}: expected finite numbers, found {value} at {i}");
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

    /// Numbers in each direction.
    pub fn n_embd(&self) -> usize {
        self.directions.values().next().map_or(0, Vec::len)
    }

    /// Whether the directions fit a model's residual stream and layers.
    ///
    /// # Errors
    /// [`Error::Input`] with the direction that does not.
    pub fn check_sizes(&self, n_layer: usize, n_embd: usize) -> Result<()> {
        let refuse = |reason: String| {
            Err(Error::input(&self.path, None, reason)
                .with_hint("it was made for another model: use that, or a control vector for this one"))
        };
        for (&layer, direction) in &self.directions {
            if direction.len() != n_embd {
                return refuse(format!(
                    "direction.{layer}: expected {n_embd} numbers, the width of this model's residual stream, found {}",
                    direction.len()
                ));
            }
            if layer >= n_layer {
                return refuse(format!(
                    "direction.{layer}: expected a layer below {n_layer}, as many as this model has"
                ));
            }
        }
        Ok(())
    }

    /// Whether it was made for a model of this fingerprint, as far as the file tells. Without a
    /// fingerprint there is only the hint, in words that differ between tools, so that another hint is a
    /// warning.
    ///
    /// # Errors
    /// As [`Fingerprint::check`].
    pub fn check_origin(&self, model: &Fingerprint, force: bool) -> Result<()> {
        if let Some(fingerprint) = &self.fingerprint {
            return fingerprint.check(model, "directions", &self.path, force);
        }
        if let Some(doubt) = self.doubt(model) {
            tracing::warn!("{}: {doubt}", self.path.display());
        }
        Ok(())
    }

    /// Why it may not be for a model, in words: it has no fingerprint, and its hint is of another architecture.
    pub(crate) fn doubt(&self, model: &Fingerprint) -> Option<String> {
        let hint = self.model_hint.as_deref().filter(|_| self.fingerprint.is_none())?;
        (hint != model.architecture).then(|| {
            format!(
                "this control vector says it is for {hint:?}, and the model's architecture is {:?}; sizes fit, \
                 whether it means anything there is not known",
                model.architecture
            )
        })
    }
}

/// Writes a control vector that llama.cpp, its server and repeng read.
///
/// `directions` are by layer from 1, each `n_embd` of `fingerprint` long; `provenance` are further
/// metadata, of which none may be among the keys that this function writes.
///
/// # Errors
/// [`Error::Input`] for no directions, layer 0 (which no runtime adds), another length, or values that are
/// not finite; [`Error::Gguf`] for a key that is taken; [`Error::Io`].
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
            let hint = "leave layer 0 out, or write it into a model with --bake";
            return refuse(
                "a control vector cannot hold layer 0: llama.cpp adds none there".into(),
                Some(hint),
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
    // llama.cpp's own tool takes the hint from the model's metadata, and writes the count as an i32.
    metadata.set(MODEL_HINT, Value::Str(fingerprint.architecture.clone()));
    metadata.set(LAYER_COUNT, Value::I32(directions.len() as i32));
    metadata.set(CONVENTION.0, Value::Str(CONVENTION.1.into()));
    fingerprint.add_to(&mut metadata);
    for (key, value) in provenance.iter() {
        if metadata.set(key, value.clone()).is_some() {
            let reason = format!("key {key:?} of the provenance is one that a control vector has anyway");
            return Err(Error::gguf(path, reason));
        }
    }
    let specs = directions.iter().map(|(layer, direction)| TensorSpec {
        name: format!("direction.{layer}"),
        shape: vec![direction.len() as u64],
        tensor_type: TensorType::F32,
    });
    let mut writer = GgufWriter::create(path, &metadata, specs.collect())?;
    for direction in directions.values() {
        writer.write_f32s(direction)?;
    }
    writer.finish()
}

/// The sum of several control vectors, each times its scale, within a range of layers.
///
/// # Errors
/// [`Error::Input`] where one does not fit the model, [`Error::Setting`] for a scale that is not finite,
/// a sum that overflows, or a range that leaves nothing.
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

/// `--control-vector-layer-range START END` as layers, both inclusive; as in llama.cpp, a START or END
/// that is not positive stands for the first or last layer.
///
/// # Errors
/// [`Error::Setting`] where no layer is left.
pub fn resolve_layer_range(range: Option<(i32, i32)>, n_layer: usize) -> Result<RangeInclusive<usize>> {
    let last = n_layer.saturating_sub(1);
    let (start, end) = range.unwrap_or((0, 0));
    let or =
        |bound: i32, otherwise: usize| usize::try_from(bound).ok().filter(|&n| n > 0).unwrap_or(otherwise);
    let resolved = or(start, 1)..=or(end, last).min(last);
    if range.is_some() && resolved.is_empty() {
        return Err(Error::setting(
            "--control-vector-layer-range",
            format!("expected layers from 1 to {last}, found {start} to {end}, which are none of them"),
        ));
    }
    Ok(resolved)
}

/// A control vector in the making.
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

    /// Adds `scale * direction` after block `layer`, which is from 1 to `n_layer - 1`. In f32 and in this
    /// order, as llama.cpp does, so that the sum is the same to the last bit.
    pub(super) fn add(&mut self, layer: usize, direction: &[f32], scale: f32) {
        let row = &mut self.rows[(layer - 1) * self.n_embd..layer * self.n_embd];
        row.iter_mut().zip(direction).for_each(|(sum, value)| *sum += value * scale);
    }

    /// Whether there is nothing to add.
    pub(super) fn is_zero(&self) -> bool {
        self.rows.iter().all(|&value| value == 0.0)
    }

    /// The control vector, if it is finite.
    pub(super) fn finish(self) -> Result<ControlVector> {
        if let Some(i) = self.rows.iter().position(|value| !value.is_finite()) {
            let layer = i / self.n_embd + 1;
            return Err(Error::setting(
                "coefficient",
                format!("what is added after layer {layer} exceeds the largest f32, {:e}", f32::MAX),
            ));
        }
        Ok(ControlVector { n_embd: self.n_embd, rows: self.rows })
    }
}

/// A control vector, by what the file says it is.
fn check_kind(file: &GgufFile) -> Result<()> {
    let refuse = |reason: String, hint: &str| Err(Error::input(file.path(), None, reason).with_hint(hint));
    let kind = file.str_if_present("general.type")?;
    if kind == Some("adapter") {
        return refuse("expected a control vector, found a LoRA adapter".into(), "give it with --lora");
    }
    match file.str_if_present("general.architecture")? {
        Some(ARCHITECTURE) => Ok(()),
        Some("imatrix") => refuse(
            "expected a control vector, found an importance matrix".into(),
            "it is for quantising, and steers nothing",
        ),
        Some(architecture) => refuse(
            format!("expected a control vector, found a model of architecture {architecture:?}"),
            "give the model with -m",
        ),
        // llama.cpp does not look at the architecture: directions alone are enough.
        None if file.tensors().iter().any(|tensor| tensor.name().starts_with("direction.")) => Ok(()),
        None => refuse(
            "expected a control vector, found a GGUF without general.architecture and without directions"
                .into(),
            "a control vector holds tensors direction.1, direction.2, …",
        ),
    }
}

/// The layer of a tensor `direction.N`, or what is wrong with it.
fn direction_layer(tensor: &TensorInfo) -> Result<usize, String> {
    let name = tensor.name();
    let digits = name.strip_prefix("direction.").filter(|d| d.bytes().all(|byte| byte.is_ascii_digit()));
    let Some(layer) = digits.and_then(|digits| digits.parse::<u32>().ok()) else {
        return Err(format!("tensor {name:?}: expected direction.N with a layer N, and no other tensors"));
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
