//! Validates a GGUF file. [`validate`] is the only function that turns an untrusted file into a trusted one.
//!
//! Truncated files are refused here: a header that ends early in [`super::cursor`], missing tensor data in
//! [`place_tensors`].

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::cursor::{Cursor, Fault};
use super::regular::check_regular;
use super::tensor::{self, TensorInfo, TensorType};
use super::watched::WatchedFile;
use super::{DEFAULT_ALIGNMENT, Metadata, VERSION, Value, foreign};
use crate::error::{Error, Result};

/// The most metadata keys accepted. Our limit: converters write fewer than 100, and a key takes more memory than disk.
const MAX_KEYS: u64 = 65_536;

/// The most tensors accepted. Our limit: 512 for each of llama.cpp's `LLAMA_MAX_LAYERS` (512).
const MAX_TENSORS: u64 = 512 * 512;

/// The most bytes after the last tensor. Our limit: llama.cpp maps the whole file, and a sparse file has no end.
const MAX_TRAILING_BYTES: u64 = 1 << 30;

/// The smallest key with its value: a length, one letter, a type and one byte.
const MIN_KEY_BYTES: u64 = 8 + 1 + 4 + 1;

/// The smallest entry of the tensor list: a length, one letter, `n_dims`, one dimension, a type and an offset.
const MIN_TENSOR_BYTES: u64 = 8 + 1 + 4 + 8 + 4 + 8;

/// A file whose header is valid and whose tensors all lie inside the file.
#[derive(Debug)]
pub(super) struct Validated {
    pub(super) part: Part,
    pub(super) metadata: Metadata,
    pub(super) tensors: Vec<TensorInfo>,
}

/// An open file: the whole model, or one part of a split model.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) path: PathBuf,
    pub(super) file: Arc<File>,
    pub(super) watched: Arc<WatchedFile>,
    /// In bytes.
    pub(super) len: u64,
    pub(super) version: u32,
    /// In bytes, a power of two.
    pub(super) alignment: u64,
    /// End of the last tensor's data, in bytes.
    pub(super) data_end: u64,
}

/// Shorthand for [`Error::gguf`].
pub(super) fn refuse(path: &Path, reason: impl Into<String>) -> Error {
    Error::gguf(path, reason)
}

/// Reads the header of one file and checks everything that does not need the tensor data.
pub(super) fn validate(path: &Path) -> Result<Validated> {
    check_regular(path)?;
    let file = Arc::new(File::open(path).map_err(Error::io("open", path))?);
    let watched = Arc::new(WatchedFile::new(path, file.clone())?);
    let len = file.metadata().map_err(Error::io("read", path))?.len();
    let header = parse_header(&mut Cursor::new(&*file, len), len).map_err(|fault| match fault {
        Fault::Io(source) => Error::io("read", path)(source),
        Fault::Reason(reason) => match piece(path) {
            Some(hint) => {
                Error::input(path, None, format!("not a usable GGUF file: {reason}")).with_hint(hint)
            }
            None => refuse(path, reason),
        },
    })?;
    let Header { version, alignment, metadata, tensors, data_end } = header;
    let part = Part { path: path.to_path_buf(), file, watched, len, version, alignment, data_end };
    Ok(Validated { part, metadata, tensors })
}

/// The hint for a file whose name says that it is a piece of a file: a part of a download, or the output of `split`.
fn piece(path: &Path) -> Option<&'static str> {
    let name = path.file_name()?.to_string_lossy().to_ascii_lowercase();
    let (stem, end) = name.rsplit_once(".gguf")?;
    if stem.is_empty() {
        return None;
    }
    match end {
        "" => None,
        ".part" | ".partial" | ".download" | ".crdownload" | ".incomplete" | ".tmp" | ".aria2" => {
            Some("its name is that of an unfinished download: finish it, or start it again")
        }
        _ => Some("its name is that of a piece of a file: join the pieces first (cat m.gguf.* > m.gguf)"),
    }
}

/// Everything before the tensor data.
struct Header {
    /// End of the last tensor's data, in bytes from the start of the file.
    data_end: u64,
    version: u32,
    alignment: u64,
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
}

fn parse_header<R: io::Read>(cursor: &mut Cursor<R>, len: u64) -> Result<Header, Fault> {
    let version = parse_version(cursor, len)?;
    let n_tensors = cursor.u64("the number of tensors")?;
    let n_keys = cursor.u64("the number of metadata keys")?;
    check_count("metadata keys", n_keys, MAX_KEYS, MIN_KEY_BYTES, cursor.remaining())?;
    check_count("tensors", n_tensors, MAX_TENSORS, MIN_TENSOR_BYTES, cursor.remaining())?;

    let mut metadata = Metadata::new();
    for i in 0..n_keys {
        let key = cursor.key(i)?;
        let shown = String::from_utf8_lossy(&key).into_owned();
        let value = cursor.value(&shown)?;
        if metadata.set_bytes(key, value).is_some() {
            return Err(Fault::Reason(format!("key {shown:?} occurs twice")));
        }
    }
    let alignment = parse_alignment(&metadata)?;

    let mut tensors: Vec<TensorInfo> = Vec::with_capacity(n_tensors as usize);
    let mut names = HashSet::with_capacity(n_tensors as usize);
    for i in 0..n_tensors {
        let tensor = parse_tensor(cursor, i)?;
        if !names.insert(tensor.name.clone()) {
            return Err(Fault::Reason(format!("tensor {:?} occurs twice", tensor.name)));
        }
        tensors.push(tensor);
    }
    // Cannot overflow: the cursor caps the header's size, and the alignment fits in a u32.
    let data_offset = cursor.position().next_multiple_of(alignment);
    place_tensors(&mut tensors, data_offset, alignment, len)?;
    let data_end = tensors.last().map_or(cursor.position(), |last| last.offset + last.n_bytes);
    if len.saturating_sub(data_end) > MAX_TRAILING_BYTES {
        return Err(Fault::Reason(format!(
            "its data ends after {data_end} bytes, but the file has {len}: it is not the file that was made"
        )));
    }
    Ok(Header { version, alignment, metadata, tensors, data_end })
}

fn parse_version<R: io::Read>(cursor: &mut Cursor<R>, len: u64) -> Result<u32, Fault> {
    if len == 0 {
        return Err(Fault::Reason("the file is empty".into()));
    }
    let head = cursor.head()?;
    if !head.starts_with(b"GGUF") {
        let shown = &head[..head.len().min(4)];
        let what = foreign::name_foreign(head).map(|what| format!(": {what}")).unwrap_or_default();
        return Err(Fault::Reason(format!(
            "expected it to begin with \"GGUF\", found \"{}\"{what}",
            shown.escape_ascii()
        )));
    }
    cursor.u32("the magic")?;
    let version = cursor.u32("the format version")?;
    match version {
        2 | VERSION => Ok(version),
        1 => Err(Fault::Reason(
            "it has format version 1, which llama.cpp no longer reads: look for a newer GGUF of the same model".into(),
        )),
        // llama.cpp's own test: a version below 65536, written in the other byte order.
        _ if version != 0 && version & 0xFFFF == 0 => Err(Fault::Reason(format!(
            "it is big-endian (format version {} in that byte order), and only little-endian files are supported",
            version.swap_bytes()
        ))),
        _ => Err(Fault::Reason(format!("expected format version 2 or {VERSION}, found {version}"))),
    }
}

fn check_count(what: &str, n: u64, max: u64, min_bytes: u64, remaining: u64) -> Result<(), Fault> {
    if n > max {
        return Err(Fault::Reason(format!("it claims {n} {what}, but at most {max} are allowed")));
    }
    if n.checked_mul(min_bytes).is_none_or(|n_bytes| n_bytes > remaining) {
        return Err(Fault::Reason(format!("it claims {n} {what}, but only {remaining} bytes follow")));
    }
    Ok(())
}

/// Alignment of tensor data in bytes, from `general.alignment`. The error is the reason to refuse the file.
pub(super) fn parse_alignment(metadata: &Metadata) -> Result<u64, String> {
    match metadata.get("general.alignment") {
        None => Ok(DEFAULT_ALIGNMENT.into()),
        Some(&Value::U32(n)) if n.is_power_of_two() => Ok(n.into()),
        Some(&Value::U32(n)) => Err(format!("key \"general.alignment\": expected a power of two, found {n}")),
        Some(other) => Err(format!("key \"general.alignment\": expected u32, found {}", other.describe())),
    }
}

/// Parses one entry of the tensor list. Its `offset` still counts from the start of the data section.
fn parse_tensor<R: io::Read>(cursor: &mut Cursor<R>, index: u64) -> Result<TensorInfo, Fault> {
    let name = cursor.name(&format!("the name of tensor {index}"))?;
    if let Some(fault) = tensor::name_fault(&name) {
        return Err(Fault::Reason(format!("tensor {index}: {fault}")));
    }
    let what = format!("tensor {name:?}");
    let n_dims = cursor.u32(&what)? as usize;
    if n_dims == 0 || n_dims > tensor::MAX_DIMS {
        return Err(Fault::Reason(format!(
            "{what}: expected 1 to {} dimensions, found {n_dims}",
            tensor::MAX_DIMS
        )));
    }
    let shape = (0..n_dims).map(|_| cursor.u64(&what)).collect::<Result<Vec<u64>, Fault>>()?;
    let in_tensor = |reason: String| Fault::Reason(format!("{what}: {reason}"));
    let tensor_type = TensorType::from_id(cursor.u32(&what)?).map_err(in_tensor)?;
    let n_bytes = tensor::tensor_bytes(&shape, tensor_type).map_err(in_tensor)?;
    let offset = cursor.u64(&what)?;
    Ok(TensorInfo { name, shape, tensor_type, part: 0, offset, n_bytes })
}

/// Turns offsets in the data section into positions in the file.
///
/// Each tensor must begin exactly where the previous one ends, rounded up to the alignment
/// (`gguf_init_from_reader` demands it). All must lie inside the file; if not, the download was truncated.
fn place_tensors(
    tensors: &mut [TensorInfo],
    data_offset: u64,
    alignment: u64,
    len: u64,
) -> Result<(), Fault> {
    let mut expected = 0u64;
    let mut data_end = data_offset;
    let mut first_missing = None;
    let mut previous: Option<String> = None;
    for tensor in tensors {
        let name = &tensor.name;
        if tensor.offset != expected {
            let what = if !tensor.offset.is_multiple_of(alignment) {
                format!("not a multiple of the alignment {alignment}")
            } else {
                let previous = previous.as_deref().unwrap_or("the list of tensors");
                match tensor.offset < expected {
                    true => format!("it overlaps {previous:?}, whose type or shape may be wrong"),
                    false => format!("there is a gap after {previous:?}"),
                }
            };
            let found = tensor.offset;
            return Err(Fault::Reason(format!(
                "tensor {name:?}: expected its data at offset {expected}, found {found} ({what})"
            )));
        }
        let overflow = || Fault::Reason(format!("tensor {name:?}: its data ends beyond 2^64 bytes"));
        let position = data_offset.checked_add(tensor.offset).ok_or_else(overflow)?;
        data_end = position.checked_add(tensor.n_bytes).ok_or_else(overflow)?;
        if data_end > len && first_missing.is_none() {
            first_missing = Some(name.clone());
        }
        expected = (expected + tensor.n_bytes).checked_next_multiple_of(alignment).ok_or_else(overflow)?;
        tensor.offset = position;
        previous = Some(tensor.name.clone());
    }
    match first_missing {
        None => Ok(()),
        Some(name) => Err(Fault::Reason(format!(
            "expected at least {data_end} bytes, found {len}: the download stopped at {}%; \
             the data of tensor {name:?} and everything after it is missing",
            u128::from(len) * 100 / u128::from(data_end)
        ))),
    }
}
