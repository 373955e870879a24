//! Atomic file writes, and logs and run folders that survive an interruption.
//!
//! | file | contents |
//! |---|---|
//! | `temporary.rs`, `owner.rs` | files without a name, or named after the process that owns them; removal of leftovers |
//! | `atomic.rs` | a file that appears at its path once it is complete |
//! | `lock.rs` | the lock that a run holds on its folder |
//! | `log.rs` | a JSON-lines log that drops what a crash left torn |
//! | `output.rs` | the check that an output harms no other file |
//! | `record.rs` | `run.json`, the settings of a run |

mod atomic;
mod lock;
mod log;
pub mod output;
mod owner;
mod record;
mod temporary;

use std::fs;
use std::path::Path;

use crate::error::{Error, Result};

pub use atomic::{AtomicFile, write_atomic};
pub use lock::FolderLock;
pub use log::{JsonLog, json_lines};
pub use record::{peek_record, read_record, start_record};
pub use temporary::{TEMPORARY_PREFIX, is_internal, remove_unfinished};

/// The last component of a path as text, or the whole path if it has none.
pub fn base_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// Creates a folder and its parents.
pub fn create_folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(Error::io("create", path))
}

/// Removes this process's temporary files and locks. For a process that exits without unwinding.
pub fn clean_up_before_exit() {
    temporary::remove_own();
    lock::remove_own();
}

/// Formats bytes as lower-case hex, like `sha256sum`.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
