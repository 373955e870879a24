//! Refuses what is no regular file: folders, pipes and devices, which have no end or block.

use std::fs::Metadata;
use std::path::Path;

use crate::error::{Error, Result};

/// Checks that `path` is a regular file. Does not open it, because opening a named pipe waits for a writer.
///
/// # Errors
/// [`Error::Io`] if there is nothing; [`Error::Input`] if it is something else than a file.
pub(crate) fn check_regular(path: &Path) -> Result<()> {
    let found = std::fs::metadata(path).map_err(Error::io("open", path))?;
    if found.is_file() {
        return Ok(());
    }
    let error = Error::input(path, None, format!("expected a file, found {}", kind(&found)));
    Err(error.with_hint(match found.is_dir() {
        true => match model_in(path) {
            Some(name) => format!("pass a file in it: {}", path.join(name).display()),
            None => "pass a file in it".into(),
        },
        false => "save its content to a file, and pass that".into(),
    }))
}

fn kind(found: &Metadata) -> &'static str {
    if found.is_dir() {
        return "a folder";
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        let kind = found.file_type();
        if kind.is_fifo() {
            return "a pipe";
        }
        if kind.is_char_device() || kind.is_block_device() {
            return "a device";
        }
        if kind.is_socket() {
            return "a socket";
        }
    }
    "not a regular file"
}

/// The first GGUF file in a folder, by name.
fn model_in(folder: &Path) -> Option<std::ffi::OsString> {
    let names = std::fs::read_dir(folder).ok()?.take(10_000).flatten().map(|entry| entry.file_name());
    names.filter(|name| Path::new(name).extension().is_some_and(|e| e == "gguf")).min()
}
