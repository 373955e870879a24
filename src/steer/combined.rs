//! Merges several steering files into one control vector, one intervention file, or vectors to bake.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::gguf::{GgufFile, file_sha256};
use crate::graph::Steering;
use crate::graph::steering::{Change, ControlVector, Edit, Operation, When};

use super::compile::{Compiled, layer_vectors};
use super::intervention::Directions;
use super::{Fingerprint, Intervention, Interventions, Neuron, SteerFile, Target};

/// The directions of a control vector by layer, shape `[n_embd]` each, without the layers that are zero.
fn nonzero_directions(vector: ControlVector) -> BTreeMap<usize, Vec<f32>> {
    let ControlVector { n_embd, rows } = vector;
    let rows = rows.chunks_exact(n_embd).enumerate();
    let rows = rows.filter(|(_, row)| row.iter().any(|&x| x != 0.0));
    // Row 0 belongs to layer 1.
    rows.map(|(i, row)| (i + 1, row.to_vec())).collect()
}

/// Expresses compiled steering as one control vector: its directions by layer.
///
/// # Errors
/// [`Error::Setting`] if an edit needs the eval callback, such as any edit of layer 0.
pub fn as_control_vector(Compiled { steering, choices }: Compiled) -> Result<BTreeMap<usize, Vec<f32>>> {
    if let Some(edit) = steering.edits.first() {
        let reason = format!(
            "a control vector cannot hold every edit, for example one in layer {}: {}",
            edit.layer,
            choices.join("; ")
        );
        return Err(Error::setting("-o/--output", reason).with_hint(
            "write an intervention file (-o steer.json) and use it with --steer, bake a model (--bake), or skip \
             layer 0 (--without-layer-0)",
        ));
    }
    Ok(steering.control_vector.map(nonzero_directions).unwrap_or_default())
}

/// Expresses compiled steering as vectors to add to the residual stream, by layer.
///
/// Each has shape `[n_embd]` and is the bias that [`super::bake`] adds to `ffn_down`.
///
/// # Errors
/// [`Error::Setting`] for an edit other than an offset on all tokens, and if nothing would change; those of
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
                return Err(Error::setting("--bake", reason).with_hint(
                    "write an intervention file instead (-o steer.json) and use it with --steer",
                ));
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

/// Merges `sources` into one list of interventions, to be written to `output`.
///
/// The coefficient of each source is multiplied into its interventions. Control vectors are referred to by
/// path and hash, and limited to `layers` (inclusive). A control vector whose path is `output` has not been
/// written to a file yet, so it is refused.
///
/// # Errors
/// [`Error::Setting`] for directions that are not in a file; [`Error::Input`] for a coefficient that is out
/// of range; [`Error::Io`] while hashing.
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
                let reason = "new directions can only be written to a control vector (.gguf)";
                return Err(Error::setting("-o/--output", reason).with_hint(
                    "write them with -o steer.gguf first, then combine: --steer steer.gguf:COEF -o steer.json",
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

/// Makes `path` relative to the folder of `output` if it is inside that folder, else absolute.
fn path_from(output: &Path, path: &Path) -> Result<PathBuf> {
    let absolute = path.canonicalize().map_err(Error::io("read", path))?;
    let folder = output.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let folder = folder.canonicalize().map_err(Error::io("read", folder))?;
    Ok(absolute.strip_prefix(&folder).map_or(absolute.clone(), Path::to_path_buf))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::Metadata;
    use crate::steer::compile::{CompileOptions, compile};
    use crate::steer::{ControlVectorFile, control_vector};

    fn llama() -> GgufFile {
        GgufFile::open(format!("{}/gguf/tiny/llama.gguf", env!("CARGO_MANIFEST_DIR"))).unwrap()
    }

    /// An offset on these neurons at all tokens, as a source.
    fn offset(neurons: &[(u32, u32)], offset: f32) -> (SteerFile, f32) {
        let neurons = neurons.iter().map(|&neuron| neuron.into()).collect();
        let list = vec![Intervention::neuron_offset(neurons, offset).unwrap()];
        (SteerFile::Interventions(Interventions { path: "a.json".into(), fingerprint: None, list }), 1.0)
    }

    /// Writes a control vector of ones for layer 1 of the tiny llama, and reads it back.
    fn ones(path: &Path) -> ControlVectorFile {
        let fingerprint = Fingerprint::of(&llama()).unwrap();
        let directions = BTreeMap::from([(1, vec![1.0; 64])]);
        control_vector::write(path, &fingerprint, &directions, &Metadata::new()).unwrap();
        ControlVectorFile::read(path).unwrap()
    }

    fn compiled(sources: &[(SteerFile, f32)]) -> Compiled {
        compile(&llama(), sources, &[], &CompileOptions::default()).unwrap()
    }

    #[test]
    fn rejects_an_edit_of_layer_0_in_a_control_vector() {
        let error = as_control_vector(compiled(&[offset(&[(0, 3), (1, 3)], -2.0)])).unwrap_err();
        assert!(error.is_usage() && error.to_string().contains("layer 0"), "{error}");
        assert!(error.hint().unwrap().contains("--without-layer-0"));
        let directions = as_control_vector(compiled(&[offset(&[(1, 3)], -2.0)])).unwrap();
        assert_eq!(directions.keys().collect::<Vec<_>>(), [&1]);
    }

    #[test]
    fn vectors_to_bake_are_the_sum_of_directions_and_offsets_in_every_layer() {
        let folder = tempfile::tempdir().unwrap();
        let file = SteerFile::ControlVector(ones(&folder.path().join("ones.gguf")));
        let sources = [(file, 0.5), offset(&[(0, 3), (1, 3)], -2.0)];
        let model = llama();
        let found = as_layer_vectors(&model, compiled(&sources).steering).unwrap();
        let neurons = [(Neuron { layer: 0, index: 3 }, -2.0), (Neuron { layer: 1, index: 3 }, -2.0)];
        let written = layer_vectors(&model, &neurons, &[]).unwrap();
        assert_eq!(found.keys().collect::<Vec<_>>(), [&0, &1]);
        assert_eq!(found[&0], written[&0]);
        for (found, written) in found[&1].iter().zip(&written[&1]) {
            assert!((found - (0.5 + written)).abs() < 1e-6, "{found} {written}");
        }
    }

    #[test]
    fn rejects_baking_edits_that_are_not_offsets_and_edits_without_effect() {
        let neurons = Target::Neurons(vec![Neuron { layer: 1, index: 3 }]);
        let scale = Intervention::new(neurons, Operation::Scale(0.0), When::Both, None, 1.0).unwrap();
        let list = vec![scale];
        let scale =
            SteerFile::Interventions(Interventions { path: "a.json".into(), fingerprint: None, list });
        for (source, reason) in
            [((scale, 1.0), "only offsets"), (offset(&[(0, 3)], 0.0), "nothing would change")]
        {
            let error = as_layer_vectors(&llama(), compiled(&[source]).steering).unwrap_err();
            assert!(error.is_usage() && error.to_string().contains(reason), "{error}");
        }
    }

    #[test]
    fn interventions_refer_to_a_control_vector_by_relative_path_and_hash() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("cv")).unwrap();
        let path = folder.path().join("cv/ones.gguf");
        let (neurons, _) = offset(&[(0, 3)], 2.0);
        let sources = [(SteerFile::ControlVector(ones(&path)), -3.0), (neurons, 0.5)];
        let output = folder.path().join("both.json");
        let fingerprint = Fingerprint::of(&llama()).unwrap();
        let combined = as_interventions(&sources, Some((1, 2)), &fingerprint, &output).unwrap();
        let Target::Directions(directions) = combined.list[0].target() else { panic!("{combined:?}") };
        assert_eq!(directions.path, Path::new("cv/ones.gguf"));
        assert_eq!(directions.sha256, file_sha256(&path, |_, _| {}).unwrap());
        assert_eq!(combined.list[0].operation(), Operation::Offset(-3.0));
        assert_eq!([0, 1, 2].map(|layer| combined.list[0].acts_on(layer)), [false, true, true]);
        assert_eq!(combined.list[1].coefficient(), 0.5);
        // The written file can be read back, so the relative path is valid.
        combined.write(&output).unwrap();
        assert_eq!(Interventions::read(&output).unwrap().list.len(), 2);
        // From a folder elsewhere, the path is absolute.
        let elsewhere = tempfile::tempdir().unwrap();
        let output = elsewhere.path().join("both.json");
        let combined = as_interventions(&sources, None, &fingerprint, &output).unwrap();
        let Target::Directions(directions) = combined.list[0].target() else { panic!("{combined:?}") };
        assert!(directions.path.is_absolute());
    }

    #[test]
    fn rejects_new_directions_in_an_intervention_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ones.gguf");
        let sources = [(SteerFile::ControlVector(ones(&path)), 1.0)];
        let fingerprint = Fingerprint::of(&llama()).unwrap();
        let error = as_interventions(&sources, None, &fingerprint, &path).unwrap_err();
        assert!(error.hint().unwrap().contains("-o steer.gguf first"), "{error}");
    }
}
