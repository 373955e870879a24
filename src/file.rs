//! Atomic file writes, and logs and run folders that survive an interruption.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::error::{Error, Result};

/// Writes a file atomically: to a temporary file first, renamed once every byte is on disk.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = AtomicFile::create(path)?;
    file.write_all(bytes)?;
    file.commit()
}

/// A file that appears at its path only when it is complete.
///
/// Symbolic links are followed. Devices and pipes are written to directly, because replacing `/dev/stdout` with a
/// file would be wrong.
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

/// Prefix of the names of temporary files.
pub const TEMPORARY_PREFIX: &str = ".detox-gguf-";

impl AtomicFile {
    /// Starts a file that will appear at `path`. Fails now if the folder is not writable.
    pub fn create(path: &Path) -> Result<AtomicFile> {
        // Falls back to the path as given if it does not exist yet or is a dangling link.
        let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
        let is_device = fs::metadata(&path).is_ok_and(|m| !m.is_file() && !m.is_dir());
        if is_device {
            let file = OpenOptions::new().write(true).open(&path).map_err(Error::io("write", &path))?;
            return Ok(AtomicFile { path, target: Target::Device(file) });
        }
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut builder = tempfile::Builder::new();
        builder.prefix(TEMPORARY_PREFIX).suffix(".tmp");
        // Temporary files are private by default; the final file should follow the user's umask.
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

    /// Flushes to disk and renames the file into place.
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

/// The last component of a path as text, or the whole path if it has none.
pub fn base_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// Removes temporary files that killed runs left in a folder. Keeps temporary folders, which `export` creates.
pub fn remove_unfinished(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(Error::io("read", folder))? {
        let entry = entry.map_err(Error::io("read", folder))?;
        let is_file = entry.file_type().map_err(Error::io("read", entry.path()))?.is_file();
        if is_file && entry.file_name().to_string_lossy().starts_with(TEMPORARY_PREFIX) {
            fs::remove_file(entry.path()).map_err(Error::io("remove", entry.path()))?;
        }
    }
    Ok(())
}

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

/// JSON pointers to the program's version in `run.json`: in a training run, and in any other run.
const VERSION_POINTERS: [&str; 2] = ["/detox_gguf", "/run/tool_version"];

/// Starts or resumes a run: writes its settings to `run.json`, or checks that they match those already there.
///
/// Everything in `record` must match for a run to resume, except the version of this program. If only that differs,
/// a warning names both versions, and `run.json` keeps the version that started the run.
///
/// # Errors
/// [`Error::RunFolder`] with the first setting that differs; [`Error::Io`].
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
    let (difference, version) = compare_records(&found, &text);
    if let Some(difference) = difference {
        return Err(Error::run_folder(folder, format!("holds another run: {difference}")).with_hint(
            "choose a new folder with -o, or repeat the command that started this run to resume it",
        ));
    }
    if let Some((started, now)) = version {
        tracing::warn!(
            "{}: the run was started by detox-gguf {started} and continues with {now}: its results come from both",
            folder.display()
        );
    }
    Ok(())
}

/// Compares two `run.json`. Gives the first difference in words, and both versions of this program if they differ.
fn compare_records(there: &str, here: &str) -> (Option<String>, Option<(String, String)>) {
    let parse = serde_json::from_str::<Value>;
    let (Ok(mut there), Ok(mut here)) = (parse(there), parse(here)) else {
        return (Some("run.json was changed".into()), None);
    };
    let mut version = None;
    for pointer in VERSION_POINTERS {
        let (Some(started), Some(now)) = (there.pointer_mut(pointer), here.pointer_mut(pointer)) else {
            continue;
        };
        if let (Some(a), Some(b)) = (started.as_str(), now.as_str())
            && a != b
        {
            version = Some((a.to_owned(), b.to_owned()));
            *started = now.clone();
        }
    }
    (first_difference("", &there, &here), version)
}

/// Describes the first setting that differs between two records.
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

/// Formats bytes as lower-case hex, like `sha256sum`.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

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

    #[test]
    fn an_uncommitted_file_leaves_nothing_behind() {
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
    fn removes_temporary_files_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(".detox-gguf-x.tmp"), "half").unwrap();
        fs::write(folder.path().join("mine.tmp"), "mine").unwrap();
        fs::create_dir(folder.path().join(".detox-gguf-folder.tmp")).unwrap();
        remove_unfinished(folder.path()).unwrap();
        let mut names: Vec<_> =
            fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, [".detox-gguf-folder.tmp", "mine.tmp"]);
    }

    /// A run folder whose `run.json` is `record`.
    fn run_folder(record: &Value) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        start_record(folder.path(), record).unwrap();
        folder
    }

    #[test]
    fn a_run_resumes_under_another_version_of_the_program() {
        let training = |version: &str| json!({"detox_gguf": version, "settings": {"rank": 2}});
        let evaluation = |version: &str| json!({"llama_cpp": "1", "run": {"tool_version": version, "k": 4}});
        for (started, now) in
            [(training("0.1.0"), training("0.2.0")), (evaluation("0.1.0"), evaluation("0.2.0"))]
        {
            let folder = run_folder(&started);
            let before = fs::read(folder.path().join("run.json")).unwrap();
            start_record(folder.path(), &now).unwrap();
            let after = fs::read(folder.path().join("run.json")).unwrap();
            assert!(before == after, "run.json keeps the version that started the run");
        }
        let (difference, version) =
            compare_records(&evaluation("a").to_string(), &evaluation("b").to_string());
        assert_eq!((difference, version), (None, Some(("a".into(), "b".into()))));
    }

    #[test]
    fn rejects_a_run_with_any_other_difference() {
        let run = |version: &str, llama_cpp: &str, k: u32| {
            let run = json!({"tool_version": version, "settings": {"k": k}});
            json!({"llama_cpp": llama_cpp, "run": run})
        };
        let folder = run_folder(&run("0.1.0", "1", 4));
        let refusal = |record: &Value| start_record(folder.path(), record).unwrap_err().to_string();
        assert!(refusal(&run("0.2.0", "1", 5)).contains("k is 4 there, and 5 now"));
        assert!(refusal(&run("0.1.0", "2", 4)).contains("llama_cpp is \"1\" there, and \"2\" now"));
        // Only the two known places hold the program's version.
        let elsewhere = |version: &str| json!({"run": {"scorer": {"tool_version": version}}});
        let folder = run_folder(&elsewhere("1"));
        assert!(start_record(folder.path(), &elsewhere("2")).is_err());
        // A record without a version is another run.
        let folder = run_folder(&json!({"run": {}}));
        assert!(start_record(folder.path(), &json!({"run": {"tool_version": "1"}})).is_err());
        fs::write(folder.path().join("run.json"), "{").unwrap();
        let error = start_record(folder.path(), &json!({"run": {}})).unwrap_err();
        assert!(error.to_string().contains("run.json was changed"), "{error}");
    }

    #[cfg(unix)]
    #[test]
    fn follows_links_and_writes_into_pipes() {
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
