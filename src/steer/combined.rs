//! Several steering files as one: a control vector, interventions, or vectors baked into a model.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::gguf::{GgufFile, file_sha256};
use crate::graph::Steering;
use crate::graph::steering::{Change, ControlVector, Edit, Operation, When};

use super::compile::{Compiled, layer_vectors};
use super::intervention::Directions;
use super::{Fingerprint, Intervention, Interventions, Neuron, SteerFile, Target};

/// The directions of a control vector, shape `[n_embd]` each, by layer; layers of zeros are left out.
fn nonzero_directions(vector: ControlVector) -> BTreeMap<usize, Vec<f32>> {
    let ControlVector { n_embd, rows } = vector;
    let rows = rows.chunks_exact(n_embd).enumerate();
    let rows = rows.filter(|(_, row)| row.iter().any(|&x| x != 0.0));
    // The first row is layer 1's.
    rows.map(|(i, row)| (i + 1, row.to_vec())).collect()
}

/// The directions of a control vector that does all that was compiled, by layer.
///
/// # Errors
/// [`Error::Setting`] if something needs the eval callback, such as an edit of layer 0.
pub fn as_control_vector(Compiled { steering, choices }: Compiled) -> Result<BTreeMap<usize, Vec<f32>>> {
    if let Some(edit) = steering.edits.first() {
        let reason = format!(
            "a control vector cannot hold all of it, layer {} for one: {}",
            edit.layer,
            choices.join("; ")
        );
        return Err(Error::setting("-o/--output", reason).with_hint(
            "write interventions (-o steer.json, for --steer), bake a model (--bake), or leave layer 0 out \
             (--without-layer-0)",
        ));
    }
    Ok(steering.control_vector.map(nonzero_directions).unwrap_or_default())
}

/// The vector that each layer adds to the residual stream, shape `[n_embd]`, by layer: what a bias of
/// `ffn_down` must hold.
///
/// # Errors
/// [`Error::Setting`] for an edit that is not an offset on all tokens, and if nothing would change; those of
/// [`layer_vectors`].
pub fn as_layer_vectors(model: &GgufFile, steering: Steering) -> Result<BTreeMap<usize, Vec<f32>>> {
    let mut vectors = steering.control_vector.map(nonzero_directions).unwrap_or_default();
    let mut offsets = Vec::new();
    for edit in steering.edits {
        match edit {
            Edit {
                layer,
                when: When::Both,
                coefficient,
                change: Change::Neuron { index, operation: Operation::Offset(x) },
            } => offsets.push((Neuron { layer: layer as u32, index: index as u32 }, coefficient * x)),
            other => {
                let reason = format!(
                    "only offsets on all tokens can be baked in; found {:?} in layer {}",
                    other.change.operation(),
                    other.layer
                );
                return Err(Error::setting("--bake", reason)
                    .with_hint("write interventions instead: -o steer.json, for --steer"));
            }
        }
    }
    for (layer, vector) in layer_vectors(model, &offsets, &[])? {
        let sum = vectors.entry(layer).or_insert_with(|| vec![0.0; vector.len()]);
        sum.iter_mut().zip(&vector).for_each(|(sum, x)| *sum += x);
    }
    if vectors.is_empty() {
        return Err(Error::setting("--bake", "nothing would change: every offset or coefficient is 0"));
    }
    Ok(vectors)
}

/// One list of interventions with the coefficients of `sources` multiplied in, to be written to `output`.
///
/// Control vectors are referred to by path and hash, limited to `layers` (both ends included). One whose
/// path is `output` itself is not in a file yet, and is refused.
///
/// # Errors
/// [`Error::Setting`] for directions that are not in a file; [`Error::Input`] for a coefficient out of range;
/// [`Error::Io`] while hashing.
pub fn as_interventions(
    sources: &[(SteerFile, f32)],
    layers: Option<(u32, u32)>,
    fingerprint: &Fingerprint,
    output: &Path,
) -> Result<Interventions> {
    let refuse = |reason: String| Error::input(output, None, reason);
    let mut list = Vec::new();
    for (source, coefficient) in sources {
        match source {
            SteerFile::Interventions(interventions) => {
                for intervention in &interventions.list {
                    list.push(intervention.times(*coefficient).map_err(refuse)?);
                }
            }
            SteerFile::ControlVector(file) if file.path == output => {
                return Err(Error::setting("-o/--output", "directions go into a control vector").with_hint(
                    "write -o steer.gguf first, and combine it with --steer steer.gguf:COEF -o steer.json",
                ));
            }
            SteerFile::ControlVector(file) => {
                let directions = Directions {
                    path: path_from(output, &file.path)?,
                    sha256: file_sha256(&file.path, |_, _| {})?,
                    file: file.clone(),
                };
                let target = Target::Directions(Box::new(directions));
                let operation = Operation::Offset(*coefficient);
                list.push(Intervention::new(target, operation, When::Both, layers, 1.0).map_err(refuse)?);
            }
        }
    }
    Ok(Interventions { path: output.to_path_buf(), fingerprint: Some(fingerprint.clone()), list })
}

/// `path` as the file `output` names it: relative to its folder if it lies in there, else absolute.
fn path_from(output: &Path, path: &Path) -> Result<PathBuf> {
    let absolute = path.canonicalize().map_err(Error::io("read", path))?;
    let folder = output.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let folder = folder.canonicalize().map_err(Error::io("read", folder))?;
    Ok(absolute.strip_prefix(&folder).map_or(absolute.clone(), Path::to_path_buf))
}
