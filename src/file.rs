//! Files that are never half-written, and logs that survive being cut off.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::error::{Error, Result};

/// Writes a file beside its place, and moves it there once every byte is on disk.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = AtomicFile::create(path)?;
    file.write_all(bytes)?;
    file.commit()
}

/// A file that appears at its path only when it is whole.
///
/// A symbolic link is followed. What is there and no plain file (a device, a pipe) is written to as it
/// is, since a new file in its place would not be what was asked for.
#[derive(Debug)]
pub struct AtomicFile {
    path: PathBuf,
    target: Target,
}

#[derive(Debug)]
enum Target {
    Beside(tempfile::NamedTempFile),
    Device(File),
}

/// Names of files that are not finished begin so.
pub const TEMPORARY_PREFIX: &str = ".detox-gguf-";

impl AtomicFile {
    /// Starts a file that is to appear at `path`; fails at once where the folder cannot be written.
    pub fn create(path: &Path) -> Result<AtomicFile> {
        // A path that does not exist yet stays as it is; so does a link to nothing.
        let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
        let is_device = fs::metadata(&path).is_ok_and(|m| !m.is_file() && !m.is_dir());
        if is_device {
            let file = OpenOptions::new().write(true).open(&path).map_err(Error::io("write", &path))?;
            return Ok(AtomicFile { path, target: Target::Device(file) });
        }
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut builder = tempfile::Builder::new();
        builder.prefix(TEMPORARY_PREFIX).suffix(".tmp");
        // Temporary files are private by default; what the user gets should follow their umask.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let temporary = builder.tempfile_in(folder).map_err(Error::io("write", &path))?;
        Ok(AtomicFile { path, target: Target::Beside(temporary) })
    }

    /// Appends bytes.
    pub fn write_all(&mut self, bytes: &[u8]) -> Result<()> {
        let written = match &mut self.target {
            Target::Beside(file) => file.write_all(bytes),
            Target::Device(file) => file.write_all(bytes),
        };
        written.map_err(Error::io("write", &self.path))
    }

    /// Flushes to disk, and gives the file its name.
    pub fn commit(self) -> Result<()> {
        let path = self.path;
        match self.target {
            Target::Beside(file) => {
                file.as_file().sync_all().map_err(Error::io("write", &path))?;
                file.persist(&path).map(drop).map_err(|e| Error::io("write", &path)(e.error))
            }
            Target::Device(mut file) => file.flush().map_err(Error::io("write", &path)),
        }
    }
}

/// The last component of a path, as text; the path itself if it has none.
pub fn base_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// Removes what runs that were killed left unfinished in a folder.
pub fn remove_unfinished(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(Error::io("read", folder))? {
        let entry = entry.map_err(Error::io("read", folder))?;
        if entry.file_name().to_string_lossy().starts_with(TEMPORARY_PREFIX) {
            fs::remove_file(entry.path()).map_err(Error::io("remove", entry.path()))?;
        }
    }
    Ok(())
}

/// One JSON line a row, appended to in units: a unit is either whole on disk, or dropped at the next start.
#[derive(Debug)]
pub struct JsonLog {
    file: File,
    path: PathBuf,
}

impl JsonLog {
    /// Opens the log, keeps the whole units of `unit_rows` rows at its start, and cuts off the rest.
    ///
    /// `unit_rows` gives the number of rows of each unit in turn; the log may hold all of them.
    /// A row that is no JSON of the expected form, before the last unit, is damage and an error.
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
                    // Not UTF-8: what a torn write can leave at the end of a file.
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
                        format!("expected a row that this program wrote: {e}"),
                    )
                    .with_hint("the file was changed since; delete it to make it again")
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

    /// Appends a unit, and waits until it is on disk.
    pub fn append<T: Serialize>(&mut self, unit: &[T]) -> Result<()> {
        let bytes = json_lines(unit);
        // One write: a unit is then at most cut off, never interleaved.
        self.file.write_all(&bytes).map_err(Error::io("write", &self.path))?;
        self.file.sync_data().map_err(Error::io("write", &self.path))
    }
}

/// Rows as JSON lines.
pub fn json_lines<T: Serialize>(rows: &[T]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for row in rows {
        serde_json::to_writer(&mut bytes, row)
            .expect("rows are plain data with string keys, written to memory");
        bytes.push(b'\n');
    }
    bytes
}

/// Writes `run.json`, which holds everything that decides what a run does, or refuses to mix two runs in one folder.
///
/// # Errors
/// [`Error::RunFolder`] that names the first difference; [`Error::Io`].
pub fn start_record<T: Serialize>(folder: &Path, record: &T) -> Result<()> {
    let path = folder.join("run.json");
    let text = serde_json::to_string_pretty(record).expect("settings are plain data") + "\n";
    if !path.exists() {
        return write_atomic(&path, text.as_bytes());
    }
    let found = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
    if found == text {
        return Ok(());
    }
    let values = |text: &str| serde_json::from_str::<Value>(text).unwrap_or(Value::Null);
    let difference = first_difference("", &values(&found), &values(&text));
    Err(Error::run_folder(
        folder,
        format!("holds another run: {}", difference.unwrap_or_else(|| "run.json was changed".into())),
    )
    .with_hint("choose a new folder with -o, or repeat that run's command to go on with it"))
}

/// Where two settings differ, in words.
fn first_difference(name: &str, there: &Value, here: &Value) -> Option<String> {
    match (there, here) {
        (Value::Object(a), Value::Object(b)) => {
            a.keys().chain(b.keys()).find_map(|key| first_difference(key, &there[key], &here[key]))
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            a.iter().zip(b).find_map(|(a, b)| first_difference(name, a, b))
        }
        _ => (there != here).then(|| format!("{name} is {there} there, and {here} now")),
    }
}

/// Creates a folder and its parents.
pub fn create_folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(Error::io("create", path))
}

/// Bytes as lower-case hex, as `sha256sum` prints them.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(path: &Path, units: &[usize]) -> Vec<u32> {
        JsonLog::open::<u32>(path, units.iter().copied()).unwrap().1
    }

    #[test]
    fn whole_units_are_kept_and_the_rest_is_cut_off() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let (mut file, kept) = JsonLog::open::<u32>(&path, [2, 2]).unwrap();
        assert!(kept.is_empty());
        file.append(&[1u32, 2]).unwrap();
        file.append(&[3u32, 4]).unwrap();
        drop(file);
        assert_eq!(log(&path, &[2, 2]), [1, 2, 3, 4]);
        // Killed in the middle of the second unit, and in the middle of a line.
        for torn in ["1\n2\n3\n", "1\n2\n3\n4", "1\n2\n\u{ff}"] {
            fs::write(&path, torn).unwrap();
            assert_eq!(log(&path, &[2, 2]), [1, 2]);
            assert_eq!(fs::read_to_string(&path).unwrap(), "1\n2\n");
        }
        fs::write(&path, b"1\n2\n\xe6\xbc").unwrap();
        assert_eq!(log(&path, &[2, 2]), [1, 2]);
    }

    #[test]
    fn rejects_a_damaged_row_by_its_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        fs::write(&path, "1\nx\n3\n4\n").unwrap();
        let error = JsonLog::open::<u32>(&path, [2, 2]).unwrap_err();
        assert!(matches!(error, Error::Input { line: Some(2), .. }), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "1\nx\n3\n4\n", "nothing was touched");
    }

    #[test]
    fn a_file_that_is_not_committed_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, "before").unwrap();
        let mut file = AtomicFile::create(&path).unwrap();
        file.write_all(b"half").unwrap();
        drop(file);
        assert_eq!(fs::read_to_string(&path).unwrap(), "before");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        write_atomic(&path, b"after").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "after");
    }

    #[test]
    fn what_a_killed_run_left_is_removed_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(".detox-gguf-x.tmp"), "half").unwrap();
        fs::write(folder.path().join("mine.tmp"), "mine").unwrap();
        remove_unfinished(folder.path()).unwrap();
        let names: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["mine.tmp"]);
    }

    #[cfg(unix)]
    #[test]
    fn a_link_is_followed_and_a_pipe_stays_a_pipe() {
        use std::os::unix::fs::FileTypeExt;
        let folder = tempfile::tempdir().unwrap();
        let (file, link) = (folder.path().join("file"), folder.path().join("link"));
        fs::write(&file, "before").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        write_atomic(&link, b"after").unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read_to_string(&file).unwrap(), "after");

        let pipe = folder.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        let reader = std::thread::spawn({
            let pipe = pipe.clone();
            move || fs::read_to_string(pipe).unwrap()
        });
        write_atomic(&pipe, b"through").unwrap();
        assert_eq!(reader.join().unwrap(), "through");
        assert!(fs::metadata(&pipe).unwrap().file_type().is_fifo());
    }
}
