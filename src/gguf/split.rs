//! Models split over several files, `<name>-00001-of-0000N.gguf` and so on, as `llama-gguf-split` writes them.

use std::path::{Path, PathBuf};

use super::read::{GgufFile, refuse, validate};
use super::{Metadata, TensorInfo, Value};
use crate::error::{Error, Result};

/// The most parts. Ours: each stays open while the model is, and systems allow some 1024 files.
const MAX_PARTS: u16 = 512;

/// Adds the other parts of a split model; a model of one file comes back as it is.
///
/// llama.cpp reads `split.no` of each part as a u16 and ends the process on another type, so types are checked here.
pub(super) fn open_other_parts(mut file: GgufFile) -> Result<GgufFile> {
    let first_path = file.path().to_path_buf();
    let n_parts = part_number(&first_path, &file.metadata, "split.count")?.unwrap_or(0);
    if n_parts <= 1 {
        return Ok(file);
    }
    if n_parts > MAX_PARTS {
        let reason = format!("key \"split.count\": expected at most {MAX_PARTS} parts, found {n_parts}");
        return Err(refuse(&first_path, reason));
    }
    let index = required_part_number(&first_path, &file.metadata)?;
    if index != 0 {
        return Err(Error::model(
            &first_path,
            format!("it is part {} of {n_parts} of a split model", u32::from(index) + 1),
        )
        .with_hint(match part_path(&first_path, index, 0, n_parts) {
            Some(path) => format!("pass the first part: {}", path.display()),
            None => "pass the first part, the one that ends in -00001-of-…".into(),
        }));
    }
    for index in 1..n_parts {
        let Some(path) = part_path(&first_path, 0, index, n_parts) else {
            let suffix = suffix(0, n_parts);
            return Err(refuse(
                &first_path,
                format!(
                    "it is the first of {n_parts} parts, which llama.cpp finds by name: expected a name ending in {suffix:?}"
                ),
            ));
        };
        if !path.exists() {
            let reason = format!("part {} of {n_parts} is missing: expected {}", index + 1, path.display());
            return Err(refuse(&first_path, reason));
        }
        let (part, metadata, tensors) = validate(&path)?;
        let found = required_part_number(&path, &metadata)?;
        if found != index {
            return Err(refuse(
                &path,
                format!("key \"split.no\": expected {index} from its name, found {found}"),
            ));
        }
        let part_index = file.parts.len();
        file.tensors.extend(tensors.into_iter().map(|tensor| TensorInfo { part: part_index, ..tensor }));
        file.parts.push(part);
    }
    check_tensors(&file)?;
    Ok(file)
}

/// No name twice across the parts, and as many tensors as the first part promises.
fn check_tensors(file: &GgufFile) -> Result<()> {
    let mut names = std::collections::HashSet::with_capacity(file.tensors.len());
    if let Some(twice) = file.tensors.iter().find(|t| !names.insert(t.name.as_str())) {
        let reason = format!("tensor {:?} is already in another part", twice.name);
        return Err(refuse(&file.parts[twice.part].path, reason));
    }
    let key = "split.tensors.count";
    match file.metadata.get(key) {
        // llama.cpp reads it as an i32.
        Some(&Value::I32(n)) if usize::try_from(n).is_ok_and(|n| n == file.tensors.len()) => Ok(()),
        Some(&Value::I32(n)) => {
            let reason =
                format!("key {key:?}: expected {} tensors as in the parts, found {n}", file.tensors.len());
            Err(refuse(file.path(), reason))
        }
        other => {
            let found = other.map_or("nothing".into(), Value::describe);
            Err(refuse(file.path(), format!("key {key:?}: expected i32, found {found}")))
        }
    }
}

fn part_number(path: &Path, metadata: &Metadata, key: &str) -> Result<Option<u16>> {
    match metadata.get(key) {
        None => Ok(None),
        Some(&Value::U16(n)) => Ok(Some(n)),
        Some(other) => Err(refuse(path, format!("key {key:?}: expected u16, found {}", other.describe()))),
    }
}

fn required_part_number(path: &Path, metadata: &Metadata) -> Result<u16> {
    let key = "split.no";
    part_number(path, metadata, key)?.ok_or_else(|| {
        refuse(path, format!("key {key:?}: expected u16 in a part of a split model, found nothing"))
    })
}

/// How the file name of part `index` (from 0) ends; llama.cpp's `SPLIT_PATH_FORMAT`, which counts from 1.
fn suffix(index: u16, n_parts: u16) -> String {
    format!("-{:05}-of-{n_parts:05}.gguf", u32::from(index) + 1)
}

/// The path of part `to`, given that of part `from`; `None` if that is not named as llama.cpp expects.
fn part_path(path: &Path, from: u16, to: u16, n_parts: u16) -> Option<PathBuf> {
    let name = path.file_name()?.to_str()?;
    let stem = name.strip_suffix(&suffix(from, n_parts))?;
    // llama.cpp refuses a name that is nothing but the suffix only when there is no folder before it either.
    let whole_path_is_suffix = stem.is_empty() && path.parent().is_none_or(|p| p.as_os_str().is_empty());
    (!whole_path_is_suffix).then(|| path.with_file_name(format!("{stem}{}", suffix(to, n_parts))))
}
