//! The sha256 of a file.

use std::collections::HashMap;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use sha2::{Digest, Sha256};

use super::cursor::read_exact_at;
use super::stamp::Stamp;
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
    let file = File::open(path).map_err(Error::io("open", path))?;
    let total = file.metadata().map_err(Error::io("read", path))?.len();
    hash_all(path, &file, total, &mut progress)
}

/// The sha256 of an open file from its beginning. Leaves the file's own position alone.
pub(super) fn hash_file(path: &Path, file: &File, mut progress: impl FnMut(u64, u64)) -> Result<String> {
    let total = file.metadata().map_err(Error::io("read", path))?.len();
    hash_all(path, ReadAt { file, position: 0, end: total }, total, &mut progress)
}

fn hash_all(
    path: &Path,
    mut from: impl Read,
    total: u64,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<String> {
    let mut hash = Sha256::new();
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut done = 0;
    loop {
        let n = match from.read(&mut chunk) {
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

/// Reads an open file at a position of its own.
struct ReadAt<'a> {
    file: &'a File,
    position: u64,
    end: u64,
}

impl Read for ReadAt<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> std::io::Result<usize> {
        let n = (self.end - self.position).min(bytes.len() as u64) as usize;
        read_exact_at(self.file, &mut bytes[..n], self.position)?;
        self.position += n as u64;
        Ok(n)
    }
}

/// Hashes computed by this process: each run of a sweep asks for the same model.
static KNOWN: Mutex<Option<HashMap<Stamp, String>>> = Mutex::new(None);

/// The hash of a file that this process has already hashed.
pub(super) fn known(stamp: &Stamp) -> Option<String> {
    // Without inodes a stamp does not name its file.
    if cfg!(not(unix)) {
        return None;
    }
    KNOWN.lock().unwrap_or_else(PoisonError::into_inner).as_ref()?.get(stamp).cloned()
}

pub(super) fn remember(stamp: Stamp, hash: &str) {
    KNOWN
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .get_or_insert_default()
        .insert(stamp, hash.to_owned());
}
