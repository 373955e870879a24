//! Writes the files of a report.

use std::path::Path;

use crate::error::Result;
use crate::file::write_atomic;

/// Continuations per language in HTML reports.
pub const EXCERPTS: usize = 3;

/// Writes each text to `folder` as `name.ending`; every file appears when it is complete.
///
/// # Errors
/// [`crate::Error::Io`].
pub fn write_reports(folder: &Path, name: &str, texts: &[(&str, String)]) -> Result<()> {
    for (ending, text) in texts {
        write_atomic(&folder.join(format!("{name}.{ending}")), text.as_bytes())?;
    }
    Ok(())
}
