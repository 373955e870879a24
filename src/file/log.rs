//! JSON-lines logs that survive an interruption.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, Result};

/// A JSON-lines log, appended to in units of several rows. An incomplete unit is dropped when the log is reopened.
#[derive(Debug)]
pub struct JsonLog {
    file: File,
    path: PathBuf,
}

impl JsonLog {
    /// Opens or creates the log, returns the rows of its complete units, and truncates the file after them.
    ///
    /// `unit_rows` is the number of rows in each unit of a complete log.
    ///
    /// # Errors
    /// [`Error::Input`] with the line number if a complete line is not a valid row. [`Error::Io`].
    pub fn open<T: DeserializeOwned>(
        path: &Path,
        unit_rows: impl IntoIterator<Item = usize>,
    ) -> Result<(JsonLog, Vec<T>)> {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(Error::io("write", path))?;
        let mut reader = BufReader::new(&file);
        let mut kept = Vec::new();
        let mut kept_bytes = 0u64;
        let mut line = String::new();
        'units: for n_rows in unit_rows {
            let mut unit = Vec::with_capacity(n_rows);
            let mut unit_bytes = 0u64;
            for _ in 0..n_rows {
                line.clear();
                let n = match reader.read_line(&mut line) {
                    Ok(n) => n,
                    // Not UTF-8: an interrupted write can end in the middle of a character.
                    Err(e) if e.kind() == std::io::ErrorKind::InvalidData => break 'units,
                    Err(e) => return Err(Error::io("read", path)(e)),
                };
                if n == 0 || !line.ends_with('\n') {
                    break 'units;
                }
                unit_bytes += n as u64;
                let row = serde_json::from_str(&line).map_err(|e| {
                    Error::input(
                        path,
                        Some(kept.len() + unit.len() + 1),
                        format!("expected a row written by this program: {e}"),
                    )
                    .with_hint("the file was changed after the run wrote it; delete it to create it again")
                })?;
                unit.push(row);
            }
            kept.append(&mut unit);
            kept_bytes += unit_bytes;
        }
        file.set_len(kept_bytes).map_err(Error::io("write", path))?;
        file.seek(SeekFrom::Start(kept_bytes)).map_err(Error::io("write", path))?;
        Ok((JsonLog { file, path: path.to_path_buf() }, kept))
    }

    /// Appends a unit and waits until it is on disk.
    pub fn append<T: Serialize>(&mut self, unit: &[T]) -> Result<()> {
        let bytes = json_lines(unit);
        // One write, so that an interruption truncates the unit and never interleaves it.
        self.file.write_all(&bytes).map_err(Error::io("write", &self.path))?;
        self.file.sync_data().map_err(Error::io("write", &self.path))
    }
}

/// Formats rows as JSON lines.
pub fn json_lines<T: Serialize>(rows: &[T]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for row in rows {
        serde_json::to_writer(&mut bytes, row)
            .expect("rows are plain data with string keys, written to memory");
        bytes.push(b'\n');
    }
    bytes
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn log(path: &Path, units: &[usize]) -> Vec<u32> {
        JsonLog::open::<u32>(path, units.iter().copied()).unwrap().1
    }

    #[test]
    fn keeps_complete_units_and_truncates_the_rest() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let (mut file, kept) = JsonLog::open::<u32>(&path, [2, 2]).unwrap();
        assert!(kept.is_empty());
        file.append(&[1u32, 2]).unwrap();
        file.append(&[3u32, 4]).unwrap();
        drop(file);
        assert_eq!(log(&path, &[2, 2]), [1, 2, 3, 4]);
        // Interrupted in the middle of the second unit, of a line, and of a character.
        for torn in ["1\n2\n3\n", "1\n2\n3\n4", "1\n2\n\u{ff}"] {
            fs::write(&path, torn).unwrap();
            assert_eq!(log(&path, &[2, 2]), [1, 2]);
            assert_eq!(fs::read_to_string(&path).unwrap(), "1\n2\n");
        }
        fs::write(&path, b"1\n2\n\xe6\xbc").unwrap();
        assert_eq!(log(&path, &[2, 2]), [1, 2]);
    }

    #[test]
    fn rejects_an_invalid_row_and_names_its_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        fs::write(&path, "1\nx\n3\n4\n").unwrap();
        let error = JsonLog::open::<u32>(&path, [2, 2]).unwrap_err();
        assert!(matches!(error, Error::Input { line: Some(2), .. }), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "1\nx\n3\n4\n", "the file is unchanged");
    }
}
