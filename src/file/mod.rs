//! Atomic file writes, and logs and run folders that survive an interruption.

mod atomic;
mod log;
mod record;

use std::fs;
use std::path::Path;

use crate::error::{Error, Result};

pub use atomic::{AtomicFile, TEMPORARY_PREFIX, remove_unfinished, write_atomic};
pub use log::{JsonLog, json_lines};
pub use record::start_record;

/// The last component of a path as text, or the whole path if it has none.
pub fn base_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// Creates a folder and its parents.
pub fn create_folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(Error::io("create", path))
}

/// Formats bytes as lower-case hex, like `sha256sum`.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
