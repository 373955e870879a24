//! Writes a steered copy of a model, with vectors baked in as biases of the down projections.

use std::collections::BTreeMap;
use std::path::Path;

use crate::error::{Error, Result};
use crate::file::output::{Form, Paths};
use crate::gguf::{self, GgufFile, GgufWriter, Metadata, TensorInfo, TensorSpec, TensorType, Value};
use crate::graph::architecture::{ARCHITECTURES, Architecture};

/// Bytes to copy at a time.
const CHUNK_BYTES: usize = 4 << 20;

/// Writes a copy of `model` that adds `vectors` to the residual stream.
///
/// Each vector, keyed by layer from 0 and of shape `[n_embd]`, is added to the bias `blk.N.ffn_down.bias`; a
/// layer without that bias gets one. Every other tensor is copied byte for byte. A split model becomes one
/// file.
///
/// `provenance` lists metadata keys and the strings to write there. `progress` is called with the bytes
/// copied so far and the total.
///
/// # Errors
/// [`Error::Model`] if the model's graph does not read such a bias for this architecture or layer, or scales
/// it; [`Error::Setting`] if the output is the model itself, a folder or a device, or if a vector does not fit;
/// [`Error::Io`]. On an error no partial output is left behind.
pub fn bake(
    model: &GgufFile,
    vectors: &BTreeMap<usize, Vec<f32>>,
    provenance: &[(&str, String)],
    output: &Path,
    mut progress: impl FnMut(u64, u64),
) -> Result<()> {
    check_architecture(model)?;
    Paths::new().reads(model.part_paths()).writes(output, Form::Gguf).check()?;
    check_vectors(model, vectors)?;
    let entries = plan(model, vectors);
    let specs = entries.iter().map(|(spec, _)| spec.clone()).collect();
    let mut writer = GgufWriter::create(output, &metadata(model, provenance), specs)?;
    let total: u64 = model.tensors().iter().map(TensorInfo::n_bytes).sum();
    let mut done = 0;
    let mut chunk = vec![0; CHUNK_BYTES];
    for (_, source) in &entries {
        match *source {
            Source::Copy(tensor) => {
                for offset in (0..tensor.n_bytes()).step_by(CHUNK_BYTES) {
                    let n = (tensor.n_bytes() - offset).min(CHUNK_BYTES as u64) as usize;
                    model.read_tensor_at(tensor, offset, &mut chunk[..n])?;
                    writer.write(&chunk[..n])?;
                    done += n as u64;
                    progress(done, total);
                }
            }
            Source::Sum(tensor, vector) => {
                writer.write_f32s(&bias_plus(model, tensor, vector)?)?;
                done += tensor.n_bytes();
            }
            Source::Vector(vector) => writer.write_f32s(vector)?,
        }
    }
    writer.finish()
}

/// The data of one tensor of the copy.
#[derive(Clone, Copy)]
enum Source<'a> {
    /// The model's tensor, unchanged.
    Copy(&'a TensorInfo),
    /// The model's bias plus a vector.
    Sum(&'a TensorInfo, &'a [f32]),
    /// A vector alone, as a new bias.
    Vector(&'a [f32]),
}

/// Lists the tensors of the copy in the order in which they are written.
fn plan<'a>(model: &'a GgufFile, vectors: &'a BTreeMap<usize, Vec<f32>>) -> Vec<(TensorSpec, Source<'a>)> {
    let bias_name = |layer: usize| format!("blk.{layer}.ffn_down.bias");
    let f32_spec = |name: &str, shape: &[u64]| TensorSpec {
        name: name.to_owned(),
        shape: shape.to_vec(),
        tensor_type: TensorType::F32,
    };
    let mut entries = Vec::new();
    for tensor in model.tensors() {
        let spec = f32_spec(tensor.name(), tensor.shape());
        entries.push(match vectors.iter().find(|&(&layer, _)| bias_name(layer) == tensor.name()) {
            Some((_, vector)) => (spec, Source::Sum(tensor, vector)),
            None => (TensorSpec { tensor_type: tensor.tensor_type(), ..spec }, Source::Copy(tensor)),
        });
    }
    for (&layer, vector) in vectors.iter().filter(|&(&layer, _)| model.tensor(&bias_name(layer)).is_none()) {
        entries.push((f32_spec(&bias_name(layer), &[vector.len() as u64]), Source::Vector(vector)));
    }
    entries
}

/// The metadata of the copy: the model's, without the keys of a split file, plus `provenance`.
fn metadata(model: &GgufFile, provenance: &[(&str, String)]) -> Metadata {
    let mut metadata = Metadata::new();
    metadata.copy_from(model.metadata(), |key| !key.starts_with("split."));
    for (key, value) in provenance {
        metadata.set(*key, Value::Str(value.clone()));
    }
    metadata
}

/// The bias `tensor` plus `vector`, shape `[n_embd]`.
fn bias_plus(model: &GgufFile, tensor: &TensorInfo, vector: &[f32]) -> Result<Vec<f32>> {
    let mut bias = vec![0f32; vector.len()];
    gguf::dequantize(tensor.tensor_type(), &model.read_tensor(tensor)?, &mut bias)
        .map_err(|reason| Error::gguf(model.path(), format!("tensor {:?}: {reason}", tensor.name())))?;
    bias.iter_mut().zip(vector).for_each(|(bias, x)| *bias += x);
    Ok(bias)
}

/// Checks the vectors' layers, lengths and values, and that each layer can take a bias.
fn check_vectors(model: &GgufFile, vectors: &BTreeMap<usize, Vec<f32>>) -> Result<()> {
    let (n_layer, n_embd) = (model.n_layer()? as usize, model.n_embd()? as usize);
    for (&layer, vector) in vectors {
        let refuse = |reason: String| Err(Error::setting("--bake", reason));
        if layer >= n_layer {
            return refuse(format!("expected a layer below {n_layer}, found layer {layer}"));
        }
        if vector.len() != n_embd {
            return refuse(format!("layer {layer}: expected {n_embd} numbers, found {}", vector.len()));
        }
        if let Some(x) = vector.iter().find(|x| !x.is_finite()) {
            return refuse(format!("layer {layer}: expected finite numbers, found {x}"));
        }
        check_layer(model, layer)?;
    }
    Ok(())
}

/// Checks that the model's graph adds a bias to the output of the down projection.
///
/// # Errors
/// [`Error::Model`] if it does not; the hint names an alternative.
pub fn check_architecture(model: &GgufFile) -> Result<()> {
    let name = model.architecture()?;
    let can = ARCHITECTURES.iter().filter(|a| a.reads_down_bias).map(|a| a.name).collect::<Vec<_>>();
    if Architecture::find(name).is_some_and(|a| a.reads_down_bias) {
        return Ok(());
    }
    let hint = match Architecture::find(name) {
        Some(a) if a.norm_after_ffn => {
            "a norm follows its FFN: steer at run time with --steer and an intervention file, or use a control \
             vector from text"
        }
        _ => {
            "write a control vector instead (`detox-gguf steer … -o steer.gguf`) and load it with \
             --control-vector-scaled"
        }
    };
    let reason = format!(
        "expected an architecture with a bias on the down projection ({}), found {name:?}: llama.cpp's graph \
         reads no bias there, so nothing can be baked in",
        can.join(", ")
    );
    Err(Error::model(model.path(), reason).with_hint(hint))
}

/// Checks that this layer's bias reaches the residual stream unscaled.
fn check_layer(model: &GgufFile, layer: usize) -> Result<()> {
    let find = |name: &str| model.tensor(&format!("blk.{layer}.{name}"));
    let reason = if let Some(experts) = find("ffn_down_exps.weight") {
        // The expert branch of the graph has no such bias, so the loader would find an unexpected tensor.
        format!("layer {layer} is a mixture of experts ({}), without a bias to bake into", experts.name())
    } else if let Some(scale) = find("ffn_down.scale") {
        // build_ffn adds the bias before the scale; with NVFP4 weights it aborts the process.
        format!("tensor {:?} would also scale the bias that is baked in", scale.name())
    } else {
        return Ok(());
    };
    let hint = "steer at run time instead, with --steer";
    Err(Error::model(model.path(), reason).with_hint(hint))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tiny(name: &str) -> GgufFile {
        GgufFile::open(format!("{}/gguf/tiny/{name}.gguf", env!("CARGO_MANIFEST_DIR"))).unwrap()
    }

    #[test]
    fn baking_changes_only_the_biases() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["llama", "llama-q8_0", "gpt2", "bloom"] {
            let model = tiny(name);
            let output = folder.path().join(format!("{name}.gguf"));
            let vectors = BTreeMap::from([(0, vec![0.5; 64]), (1, vec![-1.0; 64])]);
            bake(&model, &vectors, &[("detox_gguf.baked", "yes".into())], &output, |_, _| {}).unwrap();
            let baked = GgufFile::open(&output).unwrap();
            gguf::check_decoder(&baked).unwrap();
            assert_eq!(baked.str("detox_gguf.baked").unwrap(), "yes");
            for (key, value) in model.metadata().iter() {
                assert_eq!(baked.metadata().get(key), Some(value), "{name}: {key}");
            }
            for tensor in model.tensors() {
                let copy = baked.tensor(tensor.name()).unwrap();
                let is_bias = ["blk.0.ffn_down.bias", "blk.1.ffn_down.bias"].contains(&tensor.name());
                let is_equal = model.read_tensor(tensor).unwrap() == baked.read_tensor(copy).unwrap();
                assert_ne!(is_bias, is_equal, "{name}: {}", tensor.name());
            }
            for (layer, x) in [(0, 0.5), (1, -1.0)] {
                let bias = |file: &GgufFile| {
                    let tensor = file.tensor(&format!("blk.{layer}.ffn_down.bias"))?;
                    let mut values = vec![0.0; 64];
                    gguf::dequantize(tensor.tensor_type(), &file.read_tensor(tensor).unwrap(), &mut values)
                        .unwrap();
                    Some(values)
                };
                let before = bias(&model).unwrap_or(vec![0.0; 64]);
                assert_eq!(bias(&baked).unwrap(), before.iter().map(|b| b + x).collect::<Vec<f32>>());
            }
        }
    }

    #[test]
    fn rejects_architectures_that_ignore_the_bias_and_suggests_an_alternative() {
        let folder = tempfile::tempdir().unwrap();
        for (name, cure) in
            [("command-r", "control vector"), ("gemma3", "intervention file"), ("qwen2", "control vector")]
        {
            let output = folder.path().join("x.gguf");
            let error = bake(&tiny(name), &BTreeMap::new(), &[], &output, |_, _| {}).unwrap_err();
            assert!(error.hint().unwrap().contains(cure), "{error}");
            assert!(!output.exists());
        }
    }

    #[test]
    fn rejects_overwriting_the_model_and_vectors_that_do_not_fit() {
        let folder = tempfile::tempdir().unwrap();
        let copy = folder.path().join("copy.gguf");
        std::fs::copy(tiny("llama").path(), &copy).unwrap();
        let model = GgufFile::open(&copy).unwrap();
        let error = bake(&model, &BTreeMap::new(), &[], &copy, |_, _| {}).unwrap_err();
        assert!(error.to_string().contains("is an input of this command"), "{error}");
        let output = folder.path().join("x.gguf");
        for vectors in [(3, vec![0.0; 64]), (0, vec![0.0; 63]), (0, vec![f32::NAN; 64])] {
            assert!(bake(&model, &BTreeMap::from([vectors]), &[], &output, |_, _| {}).is_err());
        }
        assert!(!output.exists());
    }
}
