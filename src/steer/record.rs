//! Describes steering in a `run.json`.

use std::path::Path;

use serde_json::{Value, json};

use super::SteerFile;
use crate::error::Result;
use crate::file::base_name;
use crate::gguf::file_sha256;
use crate::graph::steering::LoraScaled;

/// Records each file with its hash and coefficient, and the layer range of control vectors.
///
/// The hash prevents a run from resuming with another file of the same name.
///
/// # Errors
/// [`crate::Error::Io`] if a file cannot be read.
pub fn record(
    sources: &[(SteerFile, f32)],
    loras: &[LoraScaled],
    layer_range: Option<(i32, i32)>,
) -> Result<Vec<Value>> {
    let mut records = Vec::new();
    for (source, coefficient) in sources {
        records.push(record_file("steer", source.path(), *coefficient)?);
    }
    for lora in loras {
        records.push(record_file("lora", &lora.path, lora.scale)?);
    }
    if let Some((start, end)) = layer_range {
        records.push(json!({ "control_vector_layer_range": [start, end] }));
    }
    Ok(records)
}

fn record_file(kind: &str, path: &Path, coefficient: f32) -> Result<Value> {
    let sha256 = file_sha256(path, |_, _| {})?;
    Ok(json!({ "kind": kind, "file": base_name(path), "sha256": sha256, "coefficient": coefficient }))
}
