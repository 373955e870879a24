//! The sha256 of a whole file.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// Bytes read at a time: large enough for a system call to cost nothing, small enough to stay in the L2 cache.
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
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}
