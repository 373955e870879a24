//! JSON-lines logs that survive an interruption.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::atomic::{AtomicFile, write_atomic};
use super::base_name;
use crate::error::{Error, Result};
use crate::finite;

/// A JSON-lines log, appended to in units of several rows. What a crash left torn is dropped when it is reopened.
#[derive(Debug)]
pub struct JsonLog {
    file: File,
    path: PathBuf,
    /// Bytes of the whole units.
    n_bytes: u64,
}

impl JsonLog {
    /// Opens or creates the log, returns the rows of its whole units, and truncates the file after them.
    ///
    /// `unit_rows` is the number of rows in each unit of a complete log. `is_expected` gets the index of a row and the
    /// row. The first row that is cut off, damaged or unexpected ends the log, with a warning. If whole units follow
    /// it, they are kept in a file beside the log.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open<T: DeserializeOwned>(
        path: &Path,
        unit_rows: impl IntoIterator<Item = usize>,
        is_expected: impl Fn(usize, &T) -> bool,
    ) -> Result<(JsonLog, Vec<T>)> {
        let file = open_file(path)?;
        let mut lines = Lines::new(path, &file);
        let mut kept: Vec<T> = Vec::new();
        let mut n_bytes = 0;
        let mut damage = None;
        'units: for n_rows in unit_rows {
            let mut unit = Vec::with_capacity(n_rows);
            for _ in 0..n_rows {
                let index = kept.len() + unit.len();
                let row = match lines.next_row::<T>()? {
                    Some(Ok(row)) if is_expected(index, &row) => Ok(row),
                    Some(Ok(_)) => Err("this row was not expected here".to_owned()),
                    Some(Err(reason)) => Err(format!("the row is damaged ({reason})")),
                    None if unit.is_empty() => break 'units,
                    None => Err("the file ends in the middle of a unit of rows".to_owned()),
                };
                match row {
                    Ok(row) => unit.push(row),
                    Err(reason) => {
                        damage = Some((index + 1, reason, n_rows));
                        break 'units;
                    }
                }
            }
            kept.append(&mut unit);
            n_bytes = lines.n_bytes;
        }
        if damage.is_none() && lines.next_row::<T>()?.is_some() {
            damage = Some((
                kept.len() + 1,
                format!("the file has more than the {} rows of this run", kept.len()),
                1,
            ));
        }
        if let Some((line, reason, n_rows)) = damage {
            let rest = Rest { start: n_bytes, line, reason };
            rest.drop_from::<T>(path, n_rows)?;
        }
        Ok((JsonLog::truncated(file, path, n_bytes)?, kept))
    }

    /// As [`JsonLog::open`] for rows that do not need one another: a damaged row is dropped alone, with a warning.
    ///
    /// Keeps the first `max_rows` lines, without those that are not expected.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open_independent<T: DeserializeOwned + Serialize>(
        path: &Path,
        max_rows: usize,
        is_expected: impl Fn(&T) -> bool,
    ) -> Result<(JsonLog, Vec<T>)> {
        let mut file = open_file(path)?;
        let mut lines = Lines::new(path, &file);
        let (mut kept, mut whole) = (Vec::new(), Vec::new());
        let (mut n_lines, mut first_damaged, mut n_dropped) = (0, None, 0);
        // Whether a row was left out, and whether a row was kept after one that was left out.
        let (mut leaves_out, mut has_gap) = (false, false);
        while n_lines < max_rows {
            n_lines += 1;
            match lines.next_row::<T>()? {
                None => break,
                Some(Ok(row)) if is_expected(&row) => {
                    has_gap |= leaves_out;
                    kept.push(row);
                    whole.extend_from_slice(&lines.line);
                }
                Some(Ok(_)) => leaves_out = true,
                Some(Err(reason)) => {
                    leaves_out = true;
                    first_damaged.get_or_insert((n_lines, reason));
                    n_dropped += lines.line.len();
                }
            }
        }
        if let Some((line, reason)) = first_damaged {
            tracing::warn!(
                "{}:{line}: the row is damaged ({reason}); dropped {n_dropped} damaged bytes and kept all {} whole \
                 rows",
                path.display(),
                kept.len()
            );
        }
        if has_gap {
            write_atomic(path, &whole)?;
            file = open_file(path)?;
        }
        Ok((JsonLog::truncated(file, path, whole.len() as u64)?, kept))
    }

    /// The log with its first `n_bytes` bytes.
    fn truncated(mut file: File, path: &Path, n_bytes: u64) -> Result<JsonLog> {
        file.set_len(n_bytes).map_err(Error::io("write", path))?;
        file.seek(SeekFrom::Start(n_bytes)).map_err(Error::io("write", path))?;
        Ok(JsonLog { file, path: path.to_path_buf(), n_bytes })
    }

    /// Appends a unit and waits until it is on disk.
    pub fn append<T: Serialize>(&mut self, unit: &[T]) -> Result<()> {
        let bytes = json_lines(unit)?;
        // One write, so that an interruption truncates the unit and never interleaves it.
        let written = self.file.write_all(&bytes).and_then(|()| self.file.sync_data());
        match written {
            Ok(()) => self.n_bytes += bytes.len() as u64,
            Err(error) => {
                // Best effort: on a full disk, gives back the half of the unit that was written.
                let _ = self.file.set_len(self.n_bytes);
                let _ = self.file.seek(SeekFrom::Start(self.n_bytes));
                return Err(Error::io("write", &self.path)(error));
            }
        }
        Ok(())
    }
}

fn open_file(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    options.open(path).map_err(Error::io("write", path))
}

/// Reads rows from a log, line by line.
struct Lines<'a> {
    path: &'a Path,
    reader: BufReader<&'a File>,
    /// The last line, with its line feed.
    line: Vec<u8>,
    /// Bytes read so far.
    n_bytes: u64,
}

impl<'a> Lines<'a> {
    fn new(path: &'a Path, file: &'a File) -> Lines<'a> {
        Lines { path, reader: BufReader::new(file), line: Vec::new(), n_bytes: 0 }
    }

    /// The next row, or in words why the line is none. `None` at the end of the file.
    fn next_row<T: DeserializeOwned>(&mut self) -> Result<Option<Result<T, String>>> {
        self.line.clear();
        self.reader.read_until(b'\n', &mut self.line).map_err(Error::io("read", self.path))?;
        self.n_bytes += self.line.len() as u64;
        if self.line.is_empty() {
            return Ok(None);
        }
        if !self.line.ends_with(b"\n") {
            return Ok(Some(Err("the line is cut off".into())));
        }
        if self.line.contains(&0) {
            return Ok(Some(Err("it has zero bytes".into())));
        }
        Ok(Some(serde_json::from_slice(&self.line).map_err(|error| error.to_string())))
    }
}

/// What follows the whole units of a log that is damaged.
struct Rest {
    /// Where it starts, in bytes.
    start: u64,
    /// The damaged line, from 1.
    line: usize,
    reason: String,
}

impl Rest {
    /// Logs what is dropped. Saves it to another file if it has whole rows after the damaged unit of `n_rows` rows.
    fn drop_from<T: DeserializeOwned>(&self, path: &Path, n_rows: usize) -> Result<()> {
        let mut file = File::open(path).map_err(Error::io("read", path))?;
        file.seek(SeekFrom::Start(self.start)).map_err(Error::io("read", path))?;
        let mut lines = Lines::new(path, &file);
        let mut n_whole = 0;
        while let Some(row) = lines.next_row::<T>()? {
            n_whole += usize::from(row.is_ok());
        }
        let n_bytes = lines.n_bytes;
        let Rest { line, reason, .. } = self;
        // The damaged unit itself has fewer whole rows than that.
        let kept = if n_whole >= n_rows {
            let aside = self.save(path, &mut file)?;
            format!(
                "the {n_bytes} bytes from there, with {n_whole} whole rows, are now in {}",
                base_name(&aside)
            )
        } else {
            match n_bytes {
                1 => "dropped the last byte".to_owned(),
                _ => format!("dropped the last {n_bytes} bytes"),
            }
        };
        tracing::warn!("{}:{line}: {reason}; kept all units before it; {kept}", path.display());
        Ok(())
    }

    /// Copies it to a new file beside the log.
    fn save(&self, path: &Path, file: &mut File) -> Result<PathBuf> {
        let name = |n: usize| match n {
            1 => format!("{}.damaged", base_name(path)),
            _ => format!("{}.damaged-{n}", base_name(path)),
        };
        let mut aside = (1..).map(|n| path.with_file_name(name(n))).filter(|path| !path.exists());
        let aside = aside.next().expect("the numbers do not end");
        file.seek(SeekFrom::Start(self.start)).map_err(Error::io("read", path))?;
        let mut copy = AtomicFile::create(&aside)?;
        io::copy(file, &mut copy).map_err(Error::io("write", &aside))?;
        copy.commit()?;
        Ok(aside)
    }
}

/// Formats rows as JSON lines.
///
/// # Errors
/// [`Error::NotFinite`] for a row with NaN or an infinity.
pub fn json_lines<T: Serialize>(rows: &[T]) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for row in rows {
        finite::check_json(row)?;
        serde_json::to_writer(&mut bytes, row)
            .expect("rows are plain data with string keys, written to memory");
        bytes.push(b'\n');
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn open(path: &Path, units: &[usize]) -> (JsonLog, Vec<u32>) {
        JsonLog::open(path, units.iter().copied(), |_, _| true).unwrap()
    }

    fn independent(path: &Path, max_rows: usize) -> Vec<u32> {
        JsonLog::open_independent(path, max_rows, |_| true).unwrap().1
    }

    #[test]
    fn keeps_whole_units_and_drops_a_torn_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let (mut file, kept) = open(&path, &[2, 2]);
        assert!(kept.is_empty());
        file.append(&[1u32, 2]).unwrap();
        file.append(&[3u32, 4]).unwrap();
        drop(file);
        assert_eq!(open(&path, &[2, 2]).1, [1, 2, 3, 4]);
        fs::write(&path, "1\n2\n3\n4\n\0\0\0").unwrap();
        assert_eq!(open(&path, &[2, 2]).1, [1, 2, 3, 4]);
        assert_eq!(fs::read_to_string(&path).unwrap(), "1\n2\n3\n4\n");
        // Cut off in the second unit, in a line and in a character; zeroed; and garbage.
        let torn: [&[u8]; 8] = [
            b"1\n2\n3\n",
            b"1\n2\n3\n4",
            b"1\n2\n\xe6\xbc",
            b"1\n2\n3\n\0\0",
            b"1\n2\n\0\0\n4\n",
            b"1\n2\n\0\0\0\0",
            b"1\n2\nx\n4\n",
            b"1\n2\n{\n\xff\n\n",
        ];
        for torn in torn {
            fs::write(&path, torn).unwrap();
            assert_eq!(open(&path, &[2, 2]).1, [1, 2], "{torn:?}");
            assert_eq!(fs::read_to_string(&path).unwrap(), "1\n2\n");
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        }
    }

    #[test]
    fn saves_whole_units_after_a_damaged_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        for name in ["log.damaged", "log.damaged-2"] {
            fs::write(&path, "1\n2\n3\nx\n5\n6\n").unwrap();
            assert_eq!(open(&path, &[2, 2, 2]).1, [1, 2]);
            assert_eq!(fs::read_to_string(&path).unwrap(), "1\n2\n");
            assert_eq!(fs::read_to_string(folder.path().join(name)).unwrap(), "3\nx\n5\n6\n");
        }
    }

    #[test]
    fn a_row_of_another_place_ends_the_log() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        fs::write(&path, "1\n2\n7\n").unwrap();
        let expected = |i: usize, row: &u32| *row as usize == i + 1;
        assert_eq!(JsonLog::open::<u32>(&path, [1, 1, 1], expected).unwrap().1, [1, 2]);
        assert_eq!(fs::read_to_string(&path).unwrap(), "1\n2\n");
    }

    #[test]
    fn independent_rows_survive_a_damaged_one_between_them() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        for damaged in ["1\nx\n3\n4\n", "1\n\0\0\n3\n4\n"] {
            fs::write(&path, damaged).unwrap();
            assert_eq!(independent(&path, 3), [1, 3]);
            assert_eq!(fs::read_to_string(&path).unwrap(), "1\n3\n");
        }
        fs::write(&path, "1\n2\n3").unwrap();
        let (mut file, kept) = JsonLog::open_independent::<u32>(&path, usize::MAX, |_| true).unwrap();
        assert_eq!(kept, [1, 2]);
        file.append(&[5u32]).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "1\n2\n5\n");
        assert_eq!(independent(&path, 2), [1, 2]);
        assert_eq!(fs::read_to_string(&path).unwrap(), "1\n2\n", "rows after the last one wanted");
        let even = JsonLog::open_independent::<u32>(&path, 9, |row| row % 2 == 0).unwrap().1;
        assert_eq!(even, [2]);
        assert_eq!(fs::read_to_string(&path).unwrap(), "2\n");
    }
}
