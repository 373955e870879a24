//! Builds GGUF bytes by hand. Independent of the crate's writer, so that its bugs cannot cancel out the reader's.

use std::path::PathBuf;

use detox_gguf::Error;
use detox_gguf::gguf::GgufFile;
use tempfile::TempDir;

pub const U16: u32 = 2;
pub const U32: u32 = 4;
pub const I32: u32 = 5;
pub const F32: u32 = 6;
pub const BOOL: u32 = 7;
pub const STR: u32 = 8;
pub const ARRAY: u32 = 9;

/// A string: its length and its bytes.
pub fn string(s: impl AsRef<[u8]>) -> Vec<u8> {
    let s = s.as_ref();
    [&(s.len() as u64).to_le_bytes()[..], s].concat()
}

/// A key with a value of type `id`.
pub fn pair(key: &str, id: u32, value: impl AsRef<[u8]>) -> Vec<u8> {
    [&string(key)[..], &id.to_le_bytes(), value.as_ref()].concat()
}

pub fn str_pair(key: &str, value: &str) -> Vec<u8> {
    pair(key, STR, string(value))
}

pub fn u32_pair(key: &str, value: u32) -> Vec<u8> {
    pair(key, U32, value.to_le_bytes())
}

/// An array value: element type, length, elements.
pub fn array(id: u32, n: u64, elements: impl AsRef<[u8]>) -> Vec<u8> {
    [&id.to_le_bytes()[..], &n.to_le_bytes(), elements.as_ref()].concat()
}

pub fn str_array_pair(key: &str, values: &[&str]) -> Vec<u8> {
    pair(key, ARRAY, array(STR, values.len() as u64, values.iter().flat_map(string).collect::<Vec<u8>>()))
}

/// One entry of the tensor list.
pub fn tensor(name: &str, shape: &[u64], type_id: u32, offset: u64) -> Vec<u8> {
    let mut entry = string(name);
    entry.extend((shape.len() as u32).to_le_bytes());
    entry.extend(shape.iter().flat_map(|ne| ne.to_le_bytes()));
    entry.extend(type_id.to_le_bytes());
    entry.extend(offset.to_le_bytes());
    entry
}

/// A header of format version 3 with these counts.
pub fn header(n_tensors: u64, n_keys: u64) -> Vec<u8> {
    [&b"GGUF"[..], &3u32.to_le_bytes(), &n_tensors.to_le_bytes(), &n_keys.to_le_bytes()].concat()
}

/// A whole file: header, keys, tensors, padding to 32 and `n_data` bytes.
pub fn gguf(pairs: &[Vec<u8>], tensors: &[Vec<u8>], n_data: usize) -> Vec<u8> {
    let mut bytes = header(tensors.len() as u64, pairs.len() as u64);
    bytes.extend(pairs.concat());
    bytes.extend(tensors.concat());
    bytes.resize(bytes.len().next_multiple_of(32), 0);
    bytes.extend((0..n_data).map(|i| i as u8));
    bytes
}

/// Writes `bytes` to a file `name` in a new folder.
pub fn on_disk(name: &str, bytes: &[u8]) -> (TempDir, PathBuf) {
    let folder = TempDir::new().expect("a temporary folder can be made");
    let path = folder.path().join(name);
    std::fs::write(&path, bytes).expect("a temporary file can be written");
    (folder, path)
}

/// Opens `bytes` as a file.
pub fn open(bytes: &[u8]) -> Result<(TempDir, GgufFile), Error> {
    let (folder, path) = on_disk("model.gguf", bytes);
    GgufFile::open(path).map(|file| (folder, file))
}

/// Asserts that opening `bytes` fails with `Error::Gguf`, with all of `words` in the message.
#[track_caller]
pub fn assert_rejected(bytes: &[u8], words: &[&str]) {
    match open(bytes) {
        Err(error @ Error::Gguf { .. }) => assert_words(&error.to_string(), words),
        Err(other) => panic!("expected Error::Gguf, found {other:?}"),
        Ok(_) => panic!("expected a refusal with {words:?}, but the file was opened"),
    }
}

#[track_caller]
pub fn assert_words(message: &str, words: &[&str]) {
    for word in words {
        assert!(message.contains(word), "expected {word:?} in {message:?}");
    }
}
