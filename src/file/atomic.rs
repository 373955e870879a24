//! Files that appear at their path only when they are complete.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

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

#[cfg(test)]
mod tests {
    use super::*;

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
