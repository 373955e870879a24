//! Bounded reads: every length is checked against the bytes left in the file before anything is allocated.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};

use super::{Array, Strings, Value, ValueType};

/// The longest key in bytes: the format's own limit, 2^16 - 1 (gguf.md, `gguf_metadata_kv_t`).
const MAX_KEY_BYTES: u64 = 65_535;

/// The largest header (metadata and tensor list) in bytes. llama.cpp's cap for one string or array
/// (`GGUF_MAX_STRING_LENGTH` in `gguf.cpp`), applied to the whole header. Today's vocabularies need 30 MB.
const MAX_HEADER_BYTES: u64 = 1 << 30;

/// The most array elements allocated before they are read: a false length costs at most 8 MiB.
const MAX_ELEMENTS_AHEAD: u64 = 1 << 20;

/// Why a read failed.
#[derive(Debug)]
pub(super) enum Fault {
    /// The operating system refused the read.
    Io(io::Error),
    /// The file is invalid; the reason for `Error::Gguf`.
    Reason(String),
}

impl From<String> for Fault {
    fn from(reason: String) -> Fault {
        Fault::Reason(reason)
    }
}

/// Reads a file of known length from its start.
#[derive(Debug)]
pub(super) struct Cursor<R> {
    reader: BufReader<R>,
    position: u64,
    len: u64,
}

impl<R: Read> Cursor<R> {
    /// A cursor at the start of `reader`, which holds `len` bytes.
    pub(super) fn new(reader: R, len: u64) -> Cursor<R> {
        Cursor { reader: BufReader::with_capacity(1 << 18, reader), position: 0, len }
    }

    /// Bytes read so far.
    pub(super) fn position(&self) -> u64 {
        self.position
    }

    /// Bytes not yet read.
    pub(super) fn remaining(&self) -> u64 {
        self.len - self.position
    }

    /// Peeks at the first bytes of the file, up to a full buffer.
    pub(super) fn head(&mut self) -> Result<&[u8], Fault> {
        self.reader.fill_buf().map_err(Fault::Io)
    }

    /// Checks that `n_bytes` remain, and that reading them keeps the header under its cap.
    fn need(&self, n_bytes: u64, what: &str) -> Result<(), Fault> {
        if n_bytes > self.remaining() {
            return Err(Fault::Reason(format!(
                "{what} needs {n_bytes} bytes at byte {}, but the file ends after {}: \
                 the download stopped early, or a length is damaged",
                self.position, self.len
            )));
        }
        if self.position.saturating_add(n_bytes) > MAX_HEADER_BYTES {
            return Err(Fault::Reason(format!(
                "{what} of {n_bytes} bytes would make the header larger than {MAX_HEADER_BYTES} bytes"
            )));
        }
        Ok(())
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), Fault> {
        self.reader.read_exact(bytes).map_err(Fault::Io)?;
        self.position += bytes.len() as u64;
        Ok(())
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], Fault> {
        self.need(N as u64, what)?;
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    /// Reads a little-endian u32.
    pub(super) fn u32(&mut self, what: &str) -> Result<u32, Fault> {
        self.array(what).map(u32::from_le_bytes)
    }

    /// Reads a little-endian u64.
    pub(super) fn u64(&mut self, what: &str) -> Result<u64, Fault> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// Reads a string of at most `max_bytes` into `buffer`, and replaces its content. It need not be UTF-8.
    fn bytes_into(&mut self, max_bytes: u64, what: &str, buffer: &mut Vec<u8>) -> Result<(), Fault> {
        let n_bytes = self.u64(what)?;
        self.need(n_bytes, what)?;
        if n_bytes > max_bytes {
            return Err(Fault::Reason(format!(
                "{what} has {n_bytes} bytes, but at most {max_bytes} are allowed"
            )));
        }
        buffer.clear();
        buffer.resize(n_bytes as usize, 0);
        self.fill(buffer)
    }

    /// Reads a string, limited only by the header's cap.
    fn bytes(&mut self, what: &str) -> Result<Vec<u8>, Fault> {
        let mut buffer = Vec::new();
        self.bytes_into(MAX_HEADER_BYTES, what, &mut buffer)?;
        Ok(buffer)
    }

    /// Reads the name of a tensor, which must be UTF-8: llama.cpp knows no other names.
    pub(super) fn name(&mut self, what: &str) -> Result<String, Fault> {
        String::from_utf8(self.bytes(what)?).map_err(|error| {
            let shown = &error.as_bytes()[..error.as_bytes().len().min(60)];
            let shown = String::from_utf8_lossy(shown).into_owned();
            let valid_up_to = error.utf8_error().valid_up_to();
            Fault::Reason(format!("{what} is not UTF-8 at its byte {valid_up_to}: {shown:?}"))
        })
    }

    /// Reads a metadata key: not empty, no longer than the format allows, no NUL (llama.cpp compares C strings).
    pub(super) fn key(&mut self, index: u64) -> Result<Vec<u8>, Fault> {
        let what = format!("metadata key {index}");
        let mut key = Vec::new();
        self.bytes_into(MAX_KEY_BYTES, &what, &mut key)?;
        if key.is_empty() || key.contains(&0) {
            let key = String::from_utf8_lossy(&key);
            return Err(Fault::Reason(format!("{what} is {key:?}: expected at least one byte, and no NUL")));
        }
        Ok(key)
    }

    fn value_type(&mut self, what: &str) -> Result<ValueType, Fault> {
        let id = self.u32(what)?;
        ValueType::from_id(id)
            .ok_or_else(|| Fault::Reason(format!("{what}: expected a value type from 0 to 12, found {id}")))
    }

    /// Reads a type number and a value of that type.
    pub(super) fn value(&mut self, key: &str) -> Result<Value, Fault> {
        let what = format!("the value of key {key:?}");
        Ok(match self.value_type(&what)? {
            ValueType::U8 => Value::U8(self.array::<1>(&what)?[0]),
            ValueType::I8 => Value::I8(i8::from_le_bytes(self.array(&what)?)),
            ValueType::U16 => Value::U16(u16::from_le_bytes(self.array(&what)?)),
            ValueType::I16 => Value::I16(i16::from_le_bytes(self.array(&what)?)),
            ValueType::U32 => Value::U32(self.u32(&what)?),
            ValueType::I32 => Value::I32(i32::from_le_bytes(self.array(&what)?)),
            ValueType::F32 => Value::F32(f32::from_le_bytes(self.array(&what)?)),
            ValueType::U64 => Value::U64(self.u64(&what)?),
            ValueType::I64 => Value::I64(i64::from_le_bytes(self.array(&what)?)),
            ValueType::F64 => Value::F64(f64::from_le_bytes(self.array(&what)?)),
            ValueType::Str => Value::from_bytes(self.bytes(&what)?),
            ValueType::Bool => match self.array::<1>(&what)?[0] {
                0 => Value::Bool(false),
                1 => Value::Bool(true),
                byte => {
                    return Err(Fault::Reason(format!("{what}: expected a bool of 0 or 1, found {byte}")));
                }
            },
            ValueType::Array => {
                let element = self.value_type(&what)?;
                let n = self.u64(&what)?;
                match element {
                    ValueType::Array => {
                        let reason = format!("{what} is an array of arrays, which llama.cpp does not load");
                        return Err(Fault::Reason(reason));
                    }
                    ValueType::Str => Value::Array(self.strings(n, &what)?.into()),
                    scalar => Value::Array(self.scalars(scalar, n, &what)?),
                }
            }
        })
    }

    fn strings(&mut self, n: u64, what: &str) -> Result<Strings, Fault> {
        // A string takes at least its length field.
        self.need(n.checked_mul(8).ok_or_else(|| too_long(what, n))?, what)?;
        let mut strings = Strings::with_capacity(n.min(MAX_ELEMENTS_AHEAD) as usize);
        let mut buffer = Vec::new();
        for i in 0..n {
            match self.bytes_into(MAX_HEADER_BYTES, what, &mut buffer) {
                Ok(()) => strings.push_bytes(&buffer),
                Err(Fault::Reason(reason)) => return Err(Fault::Reason(format!("element {i} of {reason}"))),
                Err(io) => return Err(io),
            }
        }
        Ok(strings)
    }

    fn scalars(&mut self, element: ValueType, n: u64, what: &str) -> Result<Array, Fault> {
        let size = element.size_bytes().expect("the caller handles strings and arrays") as u64;
        let n_bytes = n.checked_mul(size).ok_or_else(|| too_long(what, n))?;
        self.need(n_bytes, what)?;
        let mut bytes = vec![0; n_bytes as usize];
        self.fill(&mut bytes)?;
        Array::from_le_bytes(element, bytes)
            .ok_or_else(|| Fault::Reason(format!("{what}: expected bools of 0 or 1, found another byte")))
    }
}

fn too_long(what: &str, n: u64) -> Fault {
    Fault::Reason(format!("{what} is an array of {n} elements, more than any file can hold"))
}

/// Reads at a position and leaves the file's own position alone.
#[cfg(unix)]
pub(super) fn read_exact_at(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, offset)
}

/// Reads at a position. On Windows this also moves the file's own position; nothing here relies on it.
#[cfg(windows)]
pub(super) fn read_exact_at(file: &File, mut bytes: &mut [u8], mut offset: u64) -> io::Result<()> {
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
