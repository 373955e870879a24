//! Models split over several files, `<name>-00001-of-0000N.gguf` and so on, as `llama-gguf-split` writes them.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use super::cursor::read_exact_at;
use super::validate::{Part, Validated, refuse, validate};
use super::{Metadata, TensorInfo, Value};
use crate::error::{Error, Result};

/// The most parts accepted. Our limit: every part stays open, and systems allow about 1024 open files.
const MAX_PARTS: u16 = 512;

/// All parts of a model, with the metadata of the first and the tensors of all.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) parts: Vec<Part>,
    pub(super) metadata: Metadata,
    pub(super) tensors: Vec<TensorInfo>,
}

/// Opens the other parts of a split model, given the first. A model in one file has no other parts.
///
/// llama.cpp reads each part's `split.no` as a u16 and aborts on any other type, so types are checked here.
pub(super) fn open_other_parts(first: Validated) -> Result<Parts> {
    let Validated { part, metadata, tensors } = first;
    let mut model = Parts { parts: vec![part], metadata, tensors };
    let first_path = model.parts[0].path.clone();
    let n_parts = part_number(&first_path, &model.metadata, "split.count")?.unwrap_or(0);
    if n_parts <= 1 {
        return Ok(model);
    }
    if n_parts > MAX_PARTS {
        let reason = format!("key \"split.count\": expected at most {MAX_PARTS} parts, found {n_parts}");
        return Err(refuse(&first_path, reason));
    }
    let index = required_part_number(&first_path, &model.metadata)?;
    if index != 0 {
        return Err(later_part(&first_path, index, n_parts));
    }
    for index in 1..n_parts {
        let path = existing_part(&model.parts[0], index, n_parts)?;
        let Validated { part, metadata, tensors } = validate(&path)?;
        let found = required_part_number(&part.path, &metadata)?;
        if found != index {
            let reason = format!("key \"split.no\": expected {index} from its name, found {found}");
            let hint =
                format!("it is another part, renamed: name it after its number, {}", suffix(found, n_parts));
            return Err(Error::input(&part.path, None, reason).with_hint(hint));
        }
        let part_index = model.parts.len();
        model.tensors.extend(tensors.into_iter().map(|tensor| TensorInfo { part: part_index, ..tensor }));
        model.parts.push(part);
    }
    check_tensors(&model)?;
    Ok(model)
}

/// The error for opening a part that is not the first.
fn later_part(path: &Path, index: u16, n_parts: u16) -> Error {
    let reason = format!("it is part {} of {n_parts} of a split model", u32::from(index) + 1);
    Error::model(path, reason).with_hint(match part_path(path, index, 0, n_parts) {
        Some(first) => format!("pass the first part: {}", first.display()),
        None => "pass the first part, the one that ends in -00001-of-…".into(),
    })
}

/// The path of part `index` (from 0), checked to exist.
fn existing_part(first: &Part, index: u16, n_parts: u16) -> Result<PathBuf> {
    let suffix = suffix(0, n_parts);
    let Some(path) = part_path(&first.path, 0, index, n_parts) else {
        if holds_another_file(first) {
            let reason = format!("it is {n_parts} parts of a split model, joined byte for byte");
            return Err(Error::input(&first.path, None, reason).with_hint(format!(
                "keep the parts apart, named like model{suffix}, and pass the first; \
                 or join them with `llama-gguf-split --merge FIRST-PART OUTPUT`"
            )));
        }
        let reason = format!(
            "it is the first of {n_parts} parts, and llama.cpp finds the others by name: \
             expected a name ending in {suffix:?}"
        );
        let hint = match stem_of_others(&first.path, n_parts) {
            Some(stem) => {
                format!("rename it to {}{suffix}, as the parts beside it are named", stem.display())
            }
            None => {
                format!("rename it to model{suffix} and put the other parts beside it, under the same name")
            }
        };
        return Err(Error::input(&first.path, None, reason).with_hint(hint));
    };
    if !path.exists() {
        let reason = format!("part {} of {n_parts} is missing: expected {}", index + 1, path.display());
        return Err(
            Error::input(&first.path, None, reason).with_hint("download that part into the same folder")
        );
    }
    Ok(path)
}

/// Whether another GGUF begins where this one's data ends.
fn holds_another_file(part: &Part) -> bool {
    [part.data_end, part.data_end.next_multiple_of(part.alignment)].into_iter().any(|at| {
        let mut magic = [0; 4];
        read_exact_at(&part.file, &mut magic, at).is_ok() && &magic == b"GGUF"
    })
}

/// The beginning of the names of later parts in the same folder.
fn stem_of_others(first: &Path, n_parts: u16) -> Option<OsString> {
    let folder = first.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let names = std::fs::read_dir(folder).ok()?.take(10_000).flatten().map(|entry| entry.file_name());
    names.filter_map(|name| strip_suffix(&name, &suffix(1, n_parts))).min()
}

/// Checks that no tensor name occurs in two parts, and that the first part announces the right number of tensors.
fn check_tensors(model: &Parts) -> Result<()> {
    let mut names = HashSet::with_capacity(model.tensors.len());
    if let Some(twice) = model.tensors.iter().find(|t| !names.insert(t.name.as_str())) {
        let reason = format!("tensor {:?} is already in another part", twice.name);
        return Err(refuse(&model.parts[twice.part].path, reason));
    }
    let first_path = &model.parts[0].path;
    let n_tensors = model.tensors.len();
    let key = "split.tensors.count";
    match model.metadata.get(key) {
        // llama.cpp reads it as an i32.
        Some(&Value::I32(n)) if usize::try_from(n).is_ok_and(|n| n == n_tensors) => Ok(()),
        Some(&Value::I32(n)) => {
            let reason =
                format!("key {key:?}: expected {n_tensors} tensors as in all parts together, found {n}");
            Err(refuse(first_path, reason))
        }
        other => {
            let found = other.map_or("nothing".into(), Value::describe);
            Err(refuse(first_path, format!("key {key:?}: expected i32, found {found}")))
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

/// The end of the file name of part `index` (from 0): llama.cpp's `SPLIT_PATH_FORMAT`, which counts from 1.
fn suffix(index: u16, n_parts: u16) -> String {
    format!("-{:05}-of-{n_parts:05}.gguf", u32::from(index) + 1)
}

/// The path of part `to`, given the path of part `from`. `None` if `path` is not named as llama.cpp expects.
fn part_path(path: &Path, from: u16, to: u16, n_parts: u16) -> Option<PathBuf> {
    let mut name = strip_suffix(path.file_name()?, &suffix(from, n_parts))?;
    // llama.cpp refuses a path that is only the suffix, but accepts `folder/<suffix>`.
    let whole_path_is_suffix = name.is_empty() && path.parent().is_none_or(|p| p.as_os_str().is_empty());
    name.push(suffix(to, n_parts));
    (!whole_path_is_suffix).then(|| path.with_file_name(name))
}

/// `name` without `suffix` at its end. On Unix a name need not be UTF-8.
fn strip_suffix(name: &OsStr, suffix: &str) -> Option<OsString> {
    #[cfg(unix)]
    {
        use std::os::unix::ffi::OsStrExt;
        name.as_bytes().strip_suffix(suffix.as_bytes()).map(|stem| OsStr::from_bytes(stem).to_owned())
    }
    #[cfg(not(unix))]
    name.to_str()?.strip_suffix(suffix).map(OsString::from)
}
