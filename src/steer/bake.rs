//! A copy of a model with additions to the residual stream inside, as biases of its down projections.

use std::collections::BTreeMap;
use std::path::Path;

use crate::error::{Error, Result};
use crate::gguf::{self, GgufFile, GgufWriter, Metadata, TensorInfo, TensorSpec, TensorType, Value};
use crate::graph::architecture::{ARCHITECTURES, Architecture};

/// Bytes copied at a time.
const CHUNK_BYTES: usize = 4 << 20;

/// What a tensor of the copy is made of: one of the model's, a vector, or both.
type Entry<'a> = (TensorSpec, Option<&'a TensorInfo>, Option<&'a Vec<f32>>);

/// Writes a copy of `model` in which `vectors`, by layer from 0 and `[n_embd]` long, are added to the biases
/// `blk.N.ffn_down.bias`; where a layer has none it gets one. Every other tensor is copied byte for byte. A
/// model in several files becomes one.
///
/// `provenance` is written as strings under the given keys. `progress` is called with the bytes copied and
/// their number.
///
/// # Errors
/// [`Error::Model`] for an architecture or a layer whose graph reads no such bias, or scales it;
/// [`Error::Setting`] where the output is the model itself or a folder, or a vector does not fit;
/// [`Error::Io`]. An output that is not whole is not left.
pub fn bake(
    model: &GgufFile,
    vectors: &BTreeMap<usize, Vec<f32>>,
    provenance: &[(&str, String)],
    output: &Path,
    mut progress: impl FnMut(u64, u64),
) -> Result<()> {
    check_architecture(model)?;
    check_output(model, output)?;
    let (n_layer, n_embd) = (model.n_layer()? as usize, model.n_embd()? as usize);
    for (&layer, vector) in vectors {
        if layer >= n_layer || vector.len() != n_embd || vector.iter().any(|x| !x.is_finite()) {
            let reason = format!(
                "expected {n_embd} finite numbers for a layer below {n_layer}, found {} for layer {layer}",
                vector.len()
            );
            return Err(Error::setting("--bake", reason));
        }
        check_layer(model, layer)?;
    }
    let mut metadata = Metadata::new();
    for (key, value) in model.metadata().iter().filter(|(key, _)| !key.starts_with("split.")) {
        metadata.set(key, value.clone());
    }
    for (key, value) in provenance {
        metadata.set(*key, Value::Str(value.clone()));
    }
    let bias_name = |layer: usize| format!("blk.{layer}.ffn_down.bias");
    let mut plan: Vec<Entry<'_>> = Vec::new();
    for tensor in model.tensors() {
        let vector = vectors.iter().find(|&(&layer, _)| bias_name(layer) == tensor.name()).map(|(_, v)| v);
        let tensor_type = if vector.is_some() { TensorType::F32 } else { tensor.tensor_type() };
        let spec = TensorSpec { name: tensor.name().to_owned(), shape: tensor.shape().to_vec(), tensor_type };
        plan.push((spec, Some(tensor), vector));
    }
    for (&layer, vector) in vectors.iter().filter(|&(&layer, _)| model.tensor(&bias_name(layer)).is_none()) {
        let spec =
            TensorSpec { name: bias_name(layer), shape: vec![n_embd as u64], tensor_type: TensorType::F32 };
        plan.push((spec, None, Some(vector)));
    }
    let total: u64 = model.tensors().iter().map(TensorInfo::n_bytes).sum();
    let mut done = 0;
    let specs = plan.iter().map(|(spec, ..)| spec.clone()).collect();
    let mut writer = GgufWriter::create(output, &metadata, specs)?;
    let mut chunk = vec![0; CHUNK_BYTES];
    for (_, tensor, vector) in &plan {
        match (tensor, vector) {
            (Some(tensor), None) => {
                for offset in (0..tensor.n_bytes()).step_by(CHUNK_BYTES) {
                    let n = (tensor.n_bytes() - offset).min(CHUNK_BYTES as u64) as usize;
                    model.read_tensor_at(tensor, offset, &mut chunk[..n])?;
                    writer.write(&chunk[..n])?;
                    done += n as u64;
                    progress(done, total);
                }
            }
            (Some(tensor), Some(vector)) => {
                let mut bias = vec![0f32; n_embd];
                gguf::dequantize(tensor.tensor_type(), &model.read_tensor(tensor)?, &mut bias).map_err(
                    |reason| Error::gguf(model.path(), format!("tensor {:?}: {reason}", tensor.name())),
                )?;
                bias.iter_mut().zip(*vector).for_each(|(bias, x)| *bias += x);
                writer.write_f32s(&bias)?;
                done += tensor.n_bytes();
            }
            (None, Some(vector)) => writer.write_f32s(vector)?,
            (None, None) => unreachable!("every entry of the plan has a source"),
        }
    }
    writer.finish()
}

/// Whether the model's graph adds a bias to the output of the down projection.
///
/// # Errors
/// [`Error::Model`] with what to do instead.
pub fn check_architecture(model: &GgufFile) -> Result<()> {
    let name = model.architecture()?;
    let can = ARCHITECTURES.iter().filter(|a| a.reads_down_bias).map(|a| a.name).collect::<Vec<_>>();
    if Architecture::find(name).is_some_and(|a| a.reads_down_bias) {
        return Ok(());
    }
    let instead = match Architecture::find(name) {
        Some(a) if a.norm_after_ffn => {
            "a norm follows its FFN: use --steer with an intervention file at run time, or a control vector from text"
        }
        _ => {
            "write a control vector instead: `detox-gguf steer … -o steer.gguf`, for --control-vector-scaled"
        }
    };
    Err(Error::model(model.path(), format!(
            "llama.cpp's graph of architecture {name:?} reads no bias of the down projection, so nothing can be baked into it (it can into {})",
            can.join(", ")
        )).with_hint(instead))
}

/// Whether a bias of this layer reaches the residual stream as it is.
fn check_layer(model: &GgufFile, layer: usize) -> Result<()> {
    let find = |name: &str| model.tensor(&format!("blk.{layer}.{name}"));
    let reason = if let Some(experts) = find("ffn_down_exps.weight") {
        // That branch of the graph has no such bias: the loader would find a tensor too many.
        format!("a mixture of experts ({}) reads no bias of the down projection", experts.name())
    } else if let Some(scale) = find("ffn_down.scale") {
        // build_ffn adds the bias first, and beside NVFP4 weights it ends the process.
        format!("tensor {:?} would scale what is baked in", scale.name())
    } else {
        return Ok(());
    };
    let hint = "steer it while it runs instead, with --steer";
    Err(Error::model(model.path(), reason).with_hint(hint))
}

/// Whether a changed copy of `model` can be written to `output`.
///
/// # Errors
/// [`Error::Setting`] where it is a folder, a device, or the model itself.
pub fn check_output(model: &GgufFile, output: &Path) -> Result<()> {
    let Ok(existing) = output.canonicalize() else { return Ok(()) };
    if existing.is_dir() {
        let reason = format!("expected a file to write, found the folder {}", output.display());
        return Err(Error::setting("-o/--output", reason));
    }
    if !existing.is_file() {
        let reason = format!("expected a plain file to write, found a device at {}", output.display());
        return Err(Error::setting("-o/--output", reason));
    }
    if model.part_paths().any(|part| part.canonicalize().is_ok_and(|part| part == existing)) {
        return Err(Error::setting("-o/--output", format!("{} is the model itself", output.display())));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tiny(name: &str) -> GgufFile {
        GgufFile::open(format!("{}/gguf/tiny/{name}.gguf", env!("CARGO_MANIFEST_DIR"))).unwrap()
    }

    #[test]
    fn a_baked_model_is_the_model_with_biases_added_and_nothing_else_changed() {
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
    fn rejects_architectures_that_would_ignore_the_bias_and_says_what_to_do() {
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
    fn rejects_the_model_itself_as_output_and_vectors_that_do_not_fit() {
        let folder = tempfile::tempdir().unwrap();
        let copy = folder.path().join("copy.gguf");
        std::fs::copy(tiny("llama").path(), &copy).unwrap();
        let model = GgufFile::open(&copy).unwrap();
        let error = bake(&model, &BTreeMap::new(), &[], &copy, |_, _| {}).unwrap_err();
        assert!(error.to_string().contains("the model itself"), "{error}");
        let output = folder.path().join("x.gguf");
        for vectors in [(3, vec![0.0; 64]), (0, vec![0.0; 63]), (0, vec![f32::NAN; 64])] {
            assert!(bake(&model, &BTreeMap::from([vectors]), &[], &output, |_, _| {}).is_err());
        }
        assert!(!output.exists());
    }
}
