//! Writes GGUF files: first the header, then tensor data in chunks, so a model need not fit in memory.

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use super::tensor::{self, TensorType};
use super::validate::{self, refuse};
use super::{Array, Metadata, VERSION, Value, ValueType};
use crate::error::{Error, Result};
use crate::file::AtomicFile;
use crate::finite;

/// Name, shape and type of a tensor to write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// The name, at most 63 bytes.
    pub name: String,
    /// Elements in each of its 1 to 4 dimensions, in ggml's order (fastest axis first).
    pub shape: Vec<u64>,
    /// The storage type of the elements.
    pub tensor_type: TensorType,
}

/// Writes a GGUF file atomically: to a temporary file, renamed into place by [`GgufWriter::finish`].
///
/// Dropping it earlier removes the temporary file.
///
/// ```no_run
/// # use detox_gguf::gguf::*;
/// let mut metadata = Metadata::new();
/// metadata.set("general.architecture", Value::Str("controlvector".into()));
/// let direction = TensorSpec { name: "direction.1".into(), shape: vec![2], tensor_type: TensorType::F32 };
/// let mut writer = GgufWriter::create("steer.gguf", &metadata, vec![direction])?;
/// writer.write_f32s(&[0.5, -0.5])?;
/// writer.finish()?;
/// # Ok::<(), detox_gguf::Error>(())
/// ```
#[derive(Debug)]
pub struct GgufWriter {
    path: PathBuf,
    file: BufWriter<AtomicFile>,
    alignment: u64,
    /// Tensors with their sizes in bytes.
    tensors: Vec<(TensorSpec, u64)>,
    /// Index of the tensor that the next byte belongs to.
    current: usize,
    /// Bytes of that tensor written so far.
    written: u64,
}

impl GgufWriter {
    /// Starts a file that will appear at `path`, and writes its header. The data of `tensors` follows in order.
    ///
    /// Tensors are aligned to `general.alignment` in `metadata`, or to the default.
    ///
    /// # Errors
    /// [`Error::Gguf`] if metadata or tensors break a rule of the format. [`Error::Setting`] if `path` is a device.
    /// [`Error::Io`] if the file cannot be written.
    pub fn create(
        path: impl AsRef<Path>,
        metadata: &Metadata,
        tensors: Vec<TensorSpec>,
    ) -> Result<GgufWriter> {
        let path = path.as_ref();
        let alignment = validate::parse_alignment(metadata).map_err(|reason| refuse(path, reason))?;
        let in_tensor = |name: &str, reason: String| refuse(path, format!("tensor {name:?}: {reason}"));
        let mut names = std::collections::HashSet::new();
        let mut sized = Vec::with_capacity(tensors.len());
        for spec in tensors {
            if let Some(fault) = tensor::name_fault(&spec.name) {
                return Err(in_tensor(&spec.name, fault));
            }
            if !names.insert(spec.name.clone()) {
                return Err(in_tensor(&spec.name, "it occurs twice".into()));
            }
            let n_bytes = tensor::tensor_bytes(&spec.shape, spec.tensor_type)
                .map_err(|reason| in_tensor(&spec.name, reason))?;
            sized.push((spec, n_bytes));
        }
        let header = header_bytes(metadata, &sized, alignment)
            .ok_or_else(|| refuse(path, "its tensors have more than 2^64 bytes in total"))?;

        let file = AtomicFile::create(path)?;
        if file.is_device() {
            let reason = format!("expected a plain file to write, found a device at {}", path.display());
            return Err(Error::setting("-o/--output", reason));
        }
        let mut file = BufWriter::with_capacity(1 << 20, file);
        file.write_all(&header).map_err(Error::io("write", path))?;
        Ok(GgufWriter { path: path.to_path_buf(), file, alignment, tensors: sized, current: 0, written: 0 })
    }

    /// Appends tensor data in its stored form: blocks for a quantised type, otherwise little-endian numbers.
    ///
    /// A chunk may end anywhere in a tensor but must not extend into the next.
    ///
    /// # Errors
    /// [`Error::Gguf`] if `bytes` is longer than the rest of the current tensor. [`Error::Io`] if the write fails.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let Some((spec, n_bytes)) = self.tensors.get(self.current) else {
            return Err(refuse(&self.path, format!("{} bytes follow after the last tensor", bytes.len())));
        };
        let (n_missing, n_given) = (n_bytes - self.written, bytes.len() as u64);
        if n_given > n_missing {
            let reason = format!("tensor {:?}: expected {n_missing} more bytes, found {n_given}", spec.name);
            return Err(refuse(&self.path, reason));
        }
        self.file.write_all(bytes).map_err(Error::io("write", &self.path))?;
        self.written += n_given;
        if self.written == *n_bytes {
            // Pads the last tensor too: llama.cpp reads adapters and control vectors up to the padded size.
            let padding = n_bytes.next_multiple_of(self.alignment) - n_bytes;
            std::io::copy(&mut std::io::Read::take(std::io::repeat(0), padding), &mut self.file)
                .map_err(Error::io("write", &self.path))?;
            self.current += 1;
            self.written = 0;
        }
        Ok(())
    }

    /// Appends f32 numbers to a tensor of type [`TensorType::F32`].
    ///
    /// # Errors
    /// Same as [`GgufWriter::write`]; also if the current tensor has another type, and [`Error::NotFinite`] for NaN or
    /// an infinity.
    pub fn write_f32s(&mut self, values: &[f32]) -> Result<()> {
        if let Some((spec, _)) = self.tensors.get(self.current)
            && spec.tensor_type != TensorType::F32
        {
            let reason =
                format!("tensor {:?}: expected data of type {}, found f32", spec.name, spec.tensor_type);
            return Err(refuse(&self.path, reason));
        }
        if let Some((at, found)) = finite::not_finite(values) {
            let name = self.tensors.get(self.current).map_or("", |(spec, _)| &spec.name);
            let what = format!("{}: tensor {name:?}, element {at}", self.path.display());
            return Err(Error::not_finite(what, found));
        }
        for chunk in values.chunks(1 << 14) {
            self.write(&chunk.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>())?;
        }
        Ok(())
    }

    /// Flushes the file to disk, validates it, and renames it into place.
    ///
    /// # Errors
    /// [`Error::Gguf`] if tensor data is missing, or validation refuses the file. [`Error::Io`] if the write fails.
    pub fn finish(self) -> Result<()> {
        self.complete()?.commit()
    }

    /// As [`GgufWriter::finish`], but the file gets its name only by [`AtomicFile::commit`].
    pub fn complete(self) -> Result<AtomicFile> {
        if let Some((spec, n_bytes)) = self.tensors.get(self.current) {
            let reason = format!("tensor {:?}: expected {n_bytes} bytes, found {}", spec.name, self.written);
            return Err(refuse(&self.path, reason));
        }
        let path = self.path;
        let mut file = self.file.into_inner().map_err(|e| Error::io("write", &path)(e.into_error()))?;
        file.sync()?;
        validate::validate(&file.path_for_reading()).map_err(|error| match error {
            Error::Gguf { reason, .. } | Error::Input { reason, .. } => refuse(&path, reason),
            other => other,
        })?;
        Ok(file)
    }
}

/// Everything before the tensor data, with padding. `None` if the offsets overflow.
fn header_bytes(metadata: &Metadata, tensors: &[(TensorSpec, u64)], alignment: u64) -> Option<Vec<u8>> {
    let mut header = Vec::new();
    header.extend(b"GGUF");
    header.extend(VERSION.to_le_bytes());
    header.extend((tensors.len() as u64).to_le_bytes());
    header.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata.iter_bytes() {
        push_str(&mut header, key);
        push_value(&mut header, value);
    }
    let mut offset = 0u64;
    for (spec, n_bytes) in tensors {
        push_str(&mut header, spec.name.as_bytes());
        header.extend((spec.shape.len() as u32).to_le_bytes());
        header.extend(spec.shape.iter().flat_map(|ne| ne.to_le_bytes()));
        header.extend(spec.tensor_type.id().to_le_bytes());
        header.extend(offset.to_le_bytes());
        offset = offset.checked_add(*n_bytes)?.checked_next_multiple_of(alignment)?;
    }
    if !tensors.is_empty() {
        header.resize(header.len().next_multiple_of(alignment as usize), 0);
    }
    Some(header)
}

fn push_str(header: &mut Vec<u8>, string: &[u8]) {
    header.extend((string.len() as u64).to_le_bytes());
    header.extend(string);
}

fn push_value(header: &mut Vec<u8>, value: &Value) {
    header.extend(value.value_type().id().to_le_bytes());
    match value {
        Value::U8(v) => header.push(*v),
        Value::I8(v) => header.extend(v.to_le_bytes()),
        Value::U16(v) => header.extend(v.to_le_bytes()),
        Value::I16(v) => header.extend(v.to_le_bytes()),
        Value::U32(v) => header.extend(v.to_le_bytes()),
        Value::I32(v) => header.extend(v.to_le_bytes()),
        Value::F32(v) => header.extend(v.to_le_bytes()),
        Value::Bool(v) => header.push(u8::from(*v)),
        Value::U64(v) => header.extend(v.to_le_bytes()),
        Value::I64(v) => header.extend(v.to_le_bytes()),
        Value::F64(v) => header.extend(v.to_le_bytes()),
        Value::Str(v) => push_str(header, v.as_bytes()),
        Value::Bytes(v) => push_str(header, v),
        Value::Array(array) => push_array(header, array),
    }
}

fn push_array(header: &mut Vec<u8>, array: &Array) {
    header.extend(array.element_type().id().to_le_bytes());
    header.extend((array.len() as u64).to_le_bytes());
    if let Some(strings) = array.strings() {
        strings.iter_bytes().for_each(|string| push_str(header, string));
    } else {
        debug_assert_ne!(array.element_type(), ValueType::Array);
        header.extend(array.le_bytes().unwrap_or_default());
    }
}
