//! Models split into two files like `llama-gguf-split` does.

use std::path::{Path, PathBuf};

use detox_gguf::gguf::{GgufFile, GgufWriter, Metadata, TensorSpec, Value};

/// Writes `model` to `folder` in two parts, the first with four tensors. Returns the path of the first part.
pub fn split_in_two(model: &GgufFile, folder: &Path) -> PathBuf {
    let tensors = model.tensors();
    let parts = [&tensors[..4], &tensors[4..]];
    let paths = [1, 2].map(|i| folder.join(format!("m-{i:05}-of-00002.gguf")));
    for (i, (path, part)) in paths.iter().zip(parts).enumerate() {
        let mut metadata = if i == 0 { model.metadata().clone() } else { Metadata::new() };
        metadata.set("split.no", Value::U16(i as u16));
        metadata.set("split.count", Value::U16(2));
        metadata.set("split.tensors.count", Value::I32(tensors.len() as i32));
        let specs = part.iter().map(|tensor| TensorSpec {
            name: tensor.name().into(),
            shape: tensor.shape().to_vec(),
            tensor_type: tensor.tensor_type(),
        });
        let mut writer = GgufWriter::create(path, &metadata, specs.collect()).unwrap();
        part.iter().for_each(|tensor| writer.write(&model.read_tensor(tensor).unwrap()).unwrap());
        writer.finish().unwrap();
    }
    let [first, _] = paths;
    first
}
