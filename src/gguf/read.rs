//! Opens a GGUF file. [`validate`] is the one function in which a file becomes trusted.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::cursor::{Cursor, Fault};
use super::tensor::{self, TensorInfo, TensorType};
use super::{DEFAULT_ALIGNMENT, Metadata, VERSION, Value, foreign, split};
use crate::error::{Error, Result};

/// The most metadata keys. Ours: converters write fewer than 100, and each costs more memory than file.
const MAX_KEYS: u64 = 65_536;

/// The most tensors. Ours: 512 for each of llama.cpp's `LLAMA_MAX_LAYERS` (512).
const MAX_TENSORS: u64 = 512 * 512;

/// The fewest bytes of a key with its value: a length, one letter, a type and one byte.
const MIN_KEY_BYTES: u64 = 8 + 1 + 4 + 1;

/// The fewest bytes of a tensor's entry: a length, one letter, `n_dims`, one dimension, a type and an offset.
const MIN_TENSOR_BYTES: u64 = 8 + 1 + 4 + 8 + 4 + 8;

/// A GGUF file, or the files of a split one, whose header has been validated against its size.
///
/// Holds the metadata, the tensor list and the open files; tensor data stays on disk.
#[derive(Debug)]
pub struct GgufFile {
    pub(super) parts: Vec<Part>,
    pub(super) metadata: Metadata,
    pub(super) tensors: Vec<TensorInfo>,
    pub(super) tensor_index: HashMap<String, usize>,
}

/// One file on disk.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) path: PathBuf,
    pub(super) file: File,
    /// In bytes.
    pub(super) len: u64,
    pub(super) modified: Option<SystemTime>,
    pub(super) version: u32,
    /// In bytes, a power of two.
    pub(super) alignment: u64,
}

impl GgufFile {
    /// Reads and validates the header of `path`, and of the other parts if it is the first of a split model.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read. [`Error::Gguf`] if it, or another part, is not a GGUF
    /// file, is damaged or incomplete: the reason names the key or tensor. [`Error::Model`] if it is a
    /// later part of a split model; the hint names the first.
    pub fn open(path: impl AsRef<Path>) -> Result<GgufFile> {
        let (part, metadata, tensors) = validate(path.as_ref())?;
        let file = GgufFile { parts: vec![part], metadata, tensors, tensor_index: HashMap::new() };
        let mut file = split::open_other_parts(file)?;
        file.tensor_index = file.tensors.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
        Ok(file)
    }

    /// The path that was opened.
    pub fn path(&self) -> &Path {
        &self.parts[0].path
    }

    /// The paths of all parts in order: one, unless the model is split.
    pub fn part_paths(&self) -> impl ExactSizeIterator<Item = &Path> + '_ {
        self.parts.iter().map(|part| part.path.as_path())
    }

    /// The format version: 2 or 3.
    pub fn version(&self) -> u32 {
        self.parts[0].version
    }

    /// Alignment of the tensor data in bytes, a power of two.
    pub fn alignment(&self) -> u64 {
        self.parts[0].alignment
    }

    /// Size on disk in bytes, all parts together.
    pub fn n_bytes(&self) -> u64 {
        self.parts.iter().map(|part| part.len).sum()
    }

    /// The metadata of the (first) file.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The tensors of all parts in file order.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor of this name, if there is one.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensor_index.get(name).map(|&i| &self.tensors[i])
    }

    /// All bytes of one tensor, `tensor.n_bytes()` of them.
    ///
    /// # Errors
    /// As [`GgufFile::read_tensor_at`].
    pub fn read_tensor(&self, tensor: &TensorInfo) -> Result<Vec<u8>> {
        let mut bytes = vec![0; tensor.n_bytes as usize];
        self.read_tensor_at(tensor, 0, &mut bytes)?;
        Ok(bytes)
    }

    /// Fills `bytes` from `tensor`'s data, beginning `offset` bytes into it. May be called from several threads.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read, or was cut short since it was opened.
    ///
    /// # Panics
    /// If `offset + bytes.len()` exceeds the tensor, or `tensor` is not one of [`GgufFile::tensors`].
    pub fn read_tensor_at(&self, tensor: &TensorInfo, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let end = offset.checked_add(bytes.len() as u64);
        assert!(
            end.is_some_and(|end| end <= tensor.n_bytes),
            "read past the end of tensor {:?}",
            tensor.name
        );
        let part = &self.parts[tensor.part];
        read_exact_at(&part.file, bytes, tensor.offset + offset).map_err(Error::io("read", &part.path))
    }

    /// Whether every part still has the length and the time of change that it had when it was validated.
    ///
    /// # Errors
    /// [`Error::Gguf`] if one has not, [`Error::Io`] if one is gone.
    pub fn check_unchanged(&self) -> Result<()> {
        for part in &self.parts {
            let now = std::fs::metadata(&part.path).map_err(Error::io("read", &part.path))?;
            if now.len() != part.len || now.modified().ok() != part.modified {
                return Err(refuse(&part.path, "it was changed after it was checked"));
            }
        }
        Ok(())
    }
}

/// An [`Error::Gguf`].
pub(super) fn refuse(path: &Path, reason: impl Into<String>) -> Error {
    Error::gguf(path, reason)
}

/// Reads the header of one file and checks everything that can be checked without its tensor data.
pub(super) fn validate(path: &Path) -> Result<(Part, Metadata, Vec<TensorInfo>)> {
    let found = std::fs::metadata(path).map_err(Error::io("open", path))?;
    // Asked before opening: opening a named pipe would wait for a writer.
    if !found.is_file() {
        let kind = if found.is_dir() { "a directory" } else { "not a regular file" };
        return Err(refuse(path, format!("expected a file, found {kind}")));
    }
    let file = File::open(path).map_err(Error::io("open", path))?;
    let found = file.metadata().map_err(Error::io("read", path))?;
    let (len, modified) = (found.len(), found.modified().ok());
    let parsed = parse(&mut Cursor::new(&file, len), len);
    let (version, alignment, metadata, tensors) = parsed.map_err(|fault| match fault {
        Fault::Io(source) => Error::io("read", path)(source),
        Fault::Reason(reason) => refuse(path, reason),
    })?;
    Ok((Part { path: path.to_path_buf(), file, len, modified, version, alignment }, metadata, tensors))
}

type Parsed = (u32, u64, Metadata, Vec<TensorInfo>);

fn parse<R: io::Read>(cursor: &mut Cursor<R>, len: u64) -> Result<Parsed, Fault> {
    let version = parse_version(cursor, len)?;
    let n_tensors = cursor.u64("the number of tensors")?;
    let n_keys = cursor.u64("the number of metadata keys")?;
    check_count("metadata keys", n_keys, MAX_KEYS, MIN_KEY_BYTES, cursor.remaining())?;
    check_count("tensors", n_tensors, MAX_TENSORS, MIN_TENSOR_BYTES, cursor.remaining())?;

    let mut metadata = Metadata::new();
    for i in 0..n_keys {
        let key = cursor.key(i)?;
        let value = cursor.value(&key)?;
        if metadata.set(key.as_str(), value).is_some() {
            return Err(Fault::Reason(format!("key {key:?} occurs twice")));
        }
    }
    let alignment = parse_alignment(&metadata)?;

    let mut tensors: Vec<TensorInfo> = Vec::with_capacity(n_tensors as usize);
    let mut names = std::collections::HashSet::with_capacity(n_tensors as usize);
    for i in 0..n_tensors {
        let tensor = parse_tensor(cursor, i)?;
        if !names.insert(tensor.name.clone()) {
            return Err(Fault::Reason(format!("tensor {:?} occurs twice", tensor.name)));
        }
        tensors.push(tensor);
    }
    // Cannot overflow: the position is at most the header's cap, and the alignment fits a u32.
    let data_offset = cursor.position().next_multiple_of(alignment);
    place_tensors(&mut tensors, data_offset, alignment, len)?;
    Ok((version, alignment, metadata, tensors))
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
        // As llama.cpp tells it: a version below 65536 written by the other byte order.
        _ if version != 0 && version & 0xFFFF == 0 => Err(Fault::Reason(format!(
            "it is big-endian (format version {} in that byte order), and this program reads little-endian files",
            version.swap_bytes()
        ))),
        _ => Err(Fault::Reason(format!("expected format version 2 or {VERSION}, found {version}"))),
    }
}

fn check_count(what: &str, n: u64, max: u64, min_bytes: u64, remaining: u64) -> Result<(), Fault> {
    if n > max {
        return Err(Fault::Reason(format!("it claims {n} {what}, and at most {max} are allowed")));
    }
    if n.checked_mul(min_bytes).is_none_or(|n_bytes| n_bytes > remaining) {
        return Err(Fault::Reason(format!("it claims {n} {what}, and only {remaining} bytes follow")));
    }
    Ok(())
}

/// Alignment of tensor data in bytes, or what is wrong with `general.alignment`.
pub(super) fn parse_alignment(metadata: &Metadata) -> Result<u64, String> {
    match metadata.get("general.alignment") {
        None => Ok(DEFAULT_ALIGNMENT.into()),
        Some(&Value::U32(n)) if n.is_power_of_two() => Ok(n.into()),
        Some(&Value::U32(n)) => Err(format!("key \"general.alignment\": expected a power of two, found {n}")),
        Some(other) => Err(format!("key \"general.alignment\": expected u32, found {}", other.describe())),
    }
}

/// One entry of the tensor list; its `offset` still counts from the start of the data section.
fn parse_tensor<R: io::Read>(cursor: &mut Cursor<R>, index: u64) -> Result<TensorInfo, Fault> {
    let name = cursor.string(&format!("the name of tensor {index}"))?;
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

/// Turns offsets into positions in the file: each tensor must begin exactly where the one before it ends,
/// rounded up to the alignment (`gguf_init_from_reader` demands that), and all must lie within the file.
fn place_tensors(
    tensors: &mut [TensorInfo],
    data_offset: u64,
    alignment: u64,
    len: u64,
) -> Result<(), Fault> {
    let mut expected = 0u64;
    let mut data_end = data_offset;
    let mut first_missing = None;
    for tensor in tensors {
        let name = &tensor.name;
        if tensor.offset != expected {
            let what = if !tensor.offset.is_multiple_of(alignment) {
                format!("not a multiple of the alignment {alignment}")
            } else if tensor.offset < expected {
                "it overlaps another tensor".into()
            } else {
                "there is a gap before it".into()
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
    }
    match first_missing {
        None => Ok(()),
        Some(name) => Err(Fault::Reason(format!(
            "expected at least {data_end} bytes, found {len}: the download stopped at {}%; \
             the data of tensor {name:?} and what follows it is missing",
            u128::from(len) * 100 / u128::from(data_end)
        ))),
    }
}

/// Reads at a position, without moving the file's own.
#[cfg(unix)]
fn read_exact_at(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, offset)
}

/// Reads at a position. Windows moves the file's own position too, which nothing here relies on.
#[cfg(windows)]
fn read_exact_at(file: &File, mut bytes: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, bytes, offset) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => {
                bytes = &mut bytes[n..];
                offset += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
