//! Files that appear at their path only when they are complete.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::temporary::{Temporary, remove_unfinished_once};
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
/// file would be wrong. If two processes write to one path, the one that ends last wins: the file is always the whole
/// result of one of them.
#[derive(Debug)]
pub struct AtomicFile {
    path: PathBuf,
    target: Target,
}

#[derive(Debug)]
enum Target {
    Beside {
        temporary: Temporary,
        /// The file at this path when writing started.
        replaces: Option<Version>,
    },
    Device(File),
}

/// A version of a file: its size and the time of its last change.
type Version = (u64, Option<SystemTime>);

fn version(path: &Path) -> Option<Version> {
    let metadata = fs::metadata(path).ok()?;
    Some((metadata.len(), metadata.modified().ok()))
}

/// The file that `path` means: where its links lead, even if nothing is there yet.
pub(super) fn follow(path: &Path) -> PathBuf {
    /// As many as Linux follows.
    const MAX_LINKS: usize = 40;
    let mut path = path.to_path_buf();
    for _ in 0..MAX_LINKS {
        if let Ok(path) = fs::canonicalize(&path) {
            return path;
        }
        let Ok(target) = fs::read_link(&path) else { break };
        path = path.parent().unwrap_or(Path::new("")).join(target);
    }
    path
}

impl AtomicFile {
    /// Starts a file that will appear at `path`. Fails now if the folder is not writable.
    ///
    /// Also removes what killed processes left in that folder.
    pub fn create(path: &Path) -> Result<AtomicFile> {
        let path = follow(path);
        let is_device = fs::metadata(&path).is_ok_and(|m| !m.is_file() && !m.is_dir());
        if is_device {
            let file = OpenOptions::new().write(true).open(&path).map_err(Error::io("write", &path))?;
            return Ok(AtomicFile { path, target: Target::Device(file) });
        }
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        remove_unfinished_once(folder);
        let temporary = Temporary::create(folder).map_err(Error::io("write", &path))?;
        let replaces = version(&path);
        Ok(AtomicFile { path, target: Target::Beside { temporary, replaces } })
    }

    /// Appends bytes.
    pub fn write_all(&mut self, bytes: &[u8]) -> Result<()> {
        self.file().write_all(bytes).map_err(Error::io("write", &self.path))
    }

    /// Waits until all bytes are on disk.
    pub fn sync(&mut self) -> Result<()> {
        match &mut self.target {
            Target::Beside { temporary, .. } => temporary.file().sync_all(),
            Target::Device(file) => file.flush(),
        }
        .map_err(Error::io("write", &self.path))
    }

    /// A path under which this process can read the file before it has its own: to check it, for example.
    pub fn path_for_reading(&self) -> PathBuf {
        match &self.target {
            Target::Beside { temporary, .. } => temporary.path(),
            Target::Device(_) => self.path.clone(),
        }
    }

    /// Whether bytes go directly to a device or a pipe.
    pub fn is_device(&self) -> bool {
        matches!(self.target, Target::Device(_))
    }

    /// Flushes to disk and puts the file into its place.
    pub fn commit(mut self) -> Result<()> {
        self.sync()?;
        let path = self.path;
        let Target::Beside { mut temporary, replaces } = self.target else { return Ok(()) };
        if version(&path).is_some_and(|now| Some(now) != replaces) {
            tracing::warn!(
                "{}: another program wrote this file in the meantime; it is replaced now",
                path.display()
            );
        }
        #[cfg(unix)]
        keep_permissions(&path, temporary.file()).map_err(Error::io("write", &path))?;
        temporary.persist(&path).map_err(Error::io("write", &path))
    }

    fn file(&mut self) -> &mut File {
        match &mut self.target {
            Target::Beside { temporary, .. } => temporary.file(),
            Target::Device(file) => file,
        }
    }
}

/// Gives `file` the permissions of the file at `path` that it replaces, if there is one.
#[cfg(unix)]
fn keep_permissions(path: &Path, file: &File) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let Ok(found) = fs::metadata(path) else { return Ok(()) };
    file.set_permissions(fs::Permissions::from_mode(found.permissions().mode() & 0o777))
}

/// For buffered writers. Errors carry no path.
impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file().flush()
    }
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

    #[cfg(unix)]
    #[test]
    fn keeps_the_permissions_of_the_file_that_it_replaces() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, "before").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        write_atomic(&path, b"after").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
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
        // A link to a file that does not exist yet.
        let (target, dangling) = (folder.path().join("target"), folder.path().join("dangling"));
        std::os::unix::fs::symlink("target", &dangling).unwrap();
        write_atomic(&dangling, b"new").unwrap();
        assert!(fs::symlink_metadata(&dangling).unwrap().is_symlink());
        assert_eq!(fs::read_to_string(&target).unwrap(), "new");
        // A link to itself cannot be followed.
        std::os::unix::fs::symlink("loop", folder.path().join("loop")).unwrap();
        follow(&folder.path().join("loop"));

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
