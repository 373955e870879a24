//! The sha256 of a file, and of a model in one or several files.

use std::collections::HashMap;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use sha2::{Digest, Sha256};

use super::GgufFile;
use crate::error::{Error, Result};
use crate::file::hex;

/// Bytes read at a time: large enough to make system calls cheap, small enough for the L2 cache.
const CHUNK_BYTES: usize = 1 << 18;

/// The sha256 of the file at `path` in lower-case hex, as `sha256sum` prints it.
///
/// `progress` is called after each chunk with the bytes hashed so far and the size of the file, both in bytes.
///
/// # Errors
/// [`Error::Io`] if the file cannot be opened or read.
pub fn file_sha256(path: impl AsRef<Path>, mut progress: impl FnMut(u64, u64)) -> Result<String> {
    let path = path.as_ref();
    let mut file = File::open(path).map_err(Error::io("open", path))?;
    let total = file.metadata().map_err(Error::io("read", path))?.len();
    let mut hash = Sha256::new();
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut done = 0;
    loop {
        let n = match file.read(&mut chunk) {
            Ok(0) => break,
            Ok(n) => n,
            Err(e) if e.kind() == ErrorKind::Interrupted => continue,
            Err(e) => return Err(Error::io("read", path)(e)),
        };
        hash.update(&chunk[..n]);
        done += n as u64;
        progress(done, total);
    }
    Ok(hex(&hash.finalize()))
}

/// Identifies a hashed file: path, length in bytes, modification time.
type Stamp = (PathBuf, u64, Option<SystemTime>);

/// Hashes computed by this process: each run of a sweep asks for the same model.
static KNOWN: Mutex<Option<HashMap<Stamp, String>>> = Mutex::new(None);

/// The sha256 of the model at `path`. For a split model, the sha256 of its parts' hashes (hex, in order).
///
/// A hash is reused if this process has already hashed the file, and its length and modification time are the same.
/// `progress` works as in [`file_sha256`], with totals over all parts. It is not called for reused hashes.
///
/// # Errors
/// Same as [`GgufFile::open`] and [`file_sha256`].
pub fn model_sha256(path: impl AsRef<Path>, mut progress: impl FnMut(u64, u64)) -> Result<String> {
    let file = GgufFile::open(path)?;
    let total = file.n_bytes();
    let mut hashes = Vec::new();
    let mut before = 0;
    for part in file.part_paths() {
        let found = std::fs::metadata(part).map_err(Error::io("read", part))?;
        let stamp = (part.to_path_buf(), found.len(), found.modified().ok());
        let known = || KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        let hash = known().get_or_insert_default().get(&stamp).cloned();
        let hash = match hash {
            Some(hash) => hash,
            None => {
                let hash = file_sha256(part, |done, _| progress(before + done, total))?;
                known().get_or_insert_default().insert(stamp, hash.clone());
                hash
            }
        };
        before += found.len();
        hashes.push(hash);
    }
    Ok(match hashes.as_slice() {
        [hash] => hash.clone(),
        _ => hex(&Sha256::digest(hashes.concat())),
    })
}
