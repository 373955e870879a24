//! Temporary files: without a name where the system has such files, so that a killed process leaves nothing behind.
//!
//! Elsewhere a temporary file's name records the process that owns it ([`Owner`]), and that process keeps the file
//! locked. [`remove_unfinished`] removes the files of processes that have ended.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use super::owner::{Life, Owner};

/// Prefix of the names of temporary files, and of everything else in a folder that is not for the user.
pub const TEMPORARY_PREFIX: &str = ".detox-gguf-";

/// Ending of the names of temporary files.
const ENDING: &str = ".tmp";

/// Names of the temporary GGUF files of earlier versions.
const OLD_GGUF: (&str, &str) = (".gguf-", ".part");

/// A leftover whose owner is unknown or on another machine is removed once it is unchanged for this long.
const FORGOTTEN: Duration = Duration::from_secs(24 * 60 * 60);

/// A file that has no name yet, or a temporary one. Dropping it removes it.
#[derive(Debug)]
pub(super) struct Temporary {
    file: File,
    folder: PathBuf,
    /// `None` for a file without a name.
    name: Option<PathBuf>,
}

impl Temporary {
    /// Creates an empty file that can later get a name in `folder`.
    pub(super) fn create(folder: &Path) -> io::Result<Temporary> {
        match unnamed(folder) {
            Some(file) => {
                // Best effort: so that its later name counts as in use.
                let _ = file.try_lock();
                Ok(Temporary { file, folder: folder.to_path_buf(), name: None })
            }
            None => Temporary::create_named(folder),
        }
    }

    /// Creates an empty file with a temporary name.
    fn create_named(folder: &Path) -> io::Result<Temporary> {
        loop {
            let name = temporary_name(folder);
            let mut options = OpenOptions::new();
            options.read(true).write(true).create_new(true);
            let file = match options.open(&name) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                file => file?,
            };
            names().insert(name.clone());
            // A lock would keep others from reading the file on Windows.
            #[cfg(unix)]
            let _ = file.try_lock();
            let temporary = Temporary { file, folder: folder.to_path_buf(), name: Some(name.clone()) };
            // A process in another container may have removed it before it was locked.
            if name.exists() {
                return Ok(temporary);
            }
        }
    }

    /// The file, for writing.
    pub(super) fn file(&mut self) -> &mut File {
        &mut self.file
    }

    /// A path under which this process can read the file.
    pub(super) fn path(&self) -> PathBuf {
        self.name.clone().unwrap_or_else(|| path_of_open(&self.file))
    }

    /// Gives the file its name, and replaces what has that name.
    pub(super) fn persist(mut self, target: &Path) -> io::Result<()> {
        if self.name.is_none() {
            // A link cannot replace a file, but a rename can.
            let name = temporary_name(&self.folder);
            names().insert(name.clone());
            self.name = Some(name.clone());
            link(&self.file, &name)?;
        }
        if let Some(name) = &self.name {
            fs::rename(name, target)?;
        }
        self.forget_name();
        Ok(())
    }

    fn forget_name(&mut self) -> Option<PathBuf> {
        let name = self.name.take()?;
        names().remove(&name);
        Some(name)
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if let Some(name) = self.forget_name()
            && let Err(error) = fs::remove_file(&name)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!("cannot remove {}: {error}", name.display());
        }
    }
}

/// Temporary names of this process that may exist.
static NAMES: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

fn names() -> MutexGuard<'static, BTreeSet<PathBuf>> {
    NAMES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes the temporary files of this process, which is about to exit.
pub(super) fn remove_own() {
    for name in std::mem::take(&mut *names()) {
        let _ = fs::remove_file(name);
    }
}

/// A name in `folder` that no other process and no other file of this process has.
fn temporary_name(folder: &Path) -> PathBuf {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let n = COUNT.fetch_add(1, Ordering::Relaxed);
    folder.join(format!("{TEMPORARY_PREFIX}{}-{n}{ENDING}", Owner::this().to_name()))
}

/// Creates a file without a name on the file system of `folder`; `None` where that cannot be done.
#[cfg(target_os = "linux")]
fn unnamed(folder: &Path) -> Option<File> {
    use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(rustix::fs::OFlags::TMPFILE.bits() as i32);
    let file = options.open(folder).ok()?;
    // Without /proc there is no path to read it by, and none to link it from.
    let found = fs::metadata(path_of_open(&file)).ok()?;
    (found.ino() == file.metadata().ok()?.ino()).then_some(file)
}

#[cfg(not(target_os = "linux"))]
fn unnamed(_: &Path) -> Option<File> {
    None
}

/// The path of an open file that has no name.
#[cfg(target_os = "linux")]
fn path_of_open(file: &File) -> PathBuf {
    use std::os::fd::AsRawFd;
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

#[cfg(not(target_os = "linux"))]
fn path_of_open(_: &File) -> PathBuf {
    unreachable!("every file has a name here")
}

/// Gives a file without a name this one.
#[cfg(target_os = "linux")]
fn link(file: &File, name: &Path) -> io::Result<()> {
    use rustix::fs::{AtFlags, CWD, linkat};
    Ok(linkat(CWD, path_of_open(file), CWD, name, AtFlags::SYMLINK_FOLLOW)?)
}

#[cfg(not(target_os = "linux"))]
fn link(_: &File, _: &Path) -> io::Result<()> {
    unreachable!("every file has a name here")
}

/// Removes what killed processes left in a folder: temporary files, and the temporary folders of earlier versions.
///
/// Keeps the files of processes that run. Never fails: a leftover that cannot be removed does no harm.
pub fn remove_unfinished(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        let Ok(kind) = entry.file_type() else { continue };
        let is_ours = is_between(&name, TEMPORARY_PREFIX, ENDING);
        let is_leftover = match kind.is_dir() {
            true => is_ours && is_forgotten(&path),
            false => {
                kind.is_file()
                    && (is_ours || is_between(&name, OLD_GGUF.0, OLD_GGUF.1))
                    && has_no_owner(&path, &name)
            }
        };
        if is_leftover && let Err(error) = remove(&path, kind.is_dir()) {
            tracing::debug!("cannot remove the leftover {}: {error}", path.display());
        }
    }
}

/// As [`remove_unfinished`], once for each folder.
pub(super) fn remove_unfinished_once(folder: &Path) {
    static SEEN: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());
    let Ok(path) = folder.canonicalize() else { return };
    if SEEN.lock().unwrap_or_else(PoisonError::into_inner).insert(path) {
        remove_unfinished(folder);
    }
}

/// Whether an entry of a folder is this program's own and not for the user: a temporary file, a lock.
pub fn is_internal(name: &str) -> bool {
    name.starts_with(TEMPORARY_PREFIX) || is_between(name, OLD_GGUF.0, OLD_GGUF.1)
}

fn is_between(name: &str, prefix: &str, ending: &str) -> bool {
    name.strip_prefix(prefix).is_some_and(|rest| rest.ends_with(ending))
}

/// Whether the process that wrote a temporary file has ended.
fn has_no_owner(path: &Path, name: &str) -> bool {
    let owner = name.strip_prefix(TEMPORARY_PREFIX).and_then(|name| name.strip_suffix(ENDING));
    let owner = owner.and_then(|name| name.rsplit_once('-')).and_then(|(owner, _)| Owner::from_name(owner));
    // On Windows the owner has no lock, and a lock of ours would keep it from writing.
    let lock = if cfg!(unix) { lock_of(path) } else { Lock::Unknown };
    match (owner.map(|owner| owner.life()), lock) {
        (_, Lock::Taken) | (Some(Life::Running), _) => false,
        (Some(Life::Ended), _) | (Some(Life::Near), Lock::Free) => true,
        (Some(Life::Near | Life::Far) | None, _) => is_forgotten(path),
    }
}

/// Whether a process holds a file locked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lock {
    Taken,
    Free,
    /// The file system has no locks, or the file cannot be opened.
    Unknown,
}

fn lock_of(path: &Path) -> Lock {
    let Ok(file) = OpenOptions::new().read(true).write(true).open(path) else { return Lock::Unknown };
    match file.try_lock() {
        Ok(()) => Lock::Free,
        Err(TryLockError::WouldBlock) => Lock::Taken,
        Err(TryLockError::Error(_)) => Lock::Unknown,
    }
}

/// Whether a file, or everything in a folder, has long been unchanged.
fn is_forgotten(path: &Path) -> bool {
    let is_old = |path: &Path| {
        let modified = fs::symlink_metadata(path).and_then(|metadata| metadata.modified());
        modified.is_ok_and(|at| SystemTime::now().duration_since(at).is_ok_and(|age| age > FORGOTTEN))
    };
    let mut inside = fs::read_dir(path).into_iter().flatten().flatten();
    is_old(path) && inside.all(|entry| is_old(&entry.path()))
}

fn remove(path: &Path, is_folder: bool) -> io::Result<()> {
    if !is_folder {
        return fs::remove_file(path);
    }
    // `export` wrote only files into its temporary folder.
    for entry in fs::read_dir(path)? {
        fs::remove_file(entry?.path())?;
    }
    fs::remove_dir(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    /// Makes a file or folder two days old.
    fn age(path: &Path) {
        let then = SystemTime::now() - 2 * FORGOTTEN;
        File::open(path).unwrap().set_modified(then).unwrap();
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_file_without_a_name_is_readable_and_gets_one() {
        use std::io::Write;
        let folder = tempfile::tempdir().unwrap();
        let mut file = Temporary::create(folder.path()).unwrap();
        file.file().write_all(b"whole").unwrap();
        assert_eq!(entries(folder.path()), [""; 0]);
        assert_eq!(fs::read(file.path()).unwrap(), b"whole");
        let target = folder.path().join("target");
        fs::write(&target, "before").unwrap();
        file.persist(&target).unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"whole");
        assert_eq!(entries(folder.path()), ["target"]);
    }

    #[test]
    fn a_file_with_a_temporary_name_goes_with_its_owner() {
        let folder = tempfile::tempdir().unwrap();
        let file = Temporary::create_named(folder.path()).unwrap();
        remove_unfinished(folder.path());
        assert_eq!(entries(folder.path()).len(), 1, "its process runs");
        assert!(is_internal(&entries(folder.path())[0]));
        drop(file);
        assert_eq!(entries(folder.path()), [""; 0]);
        Temporary::create_named(folder.path()).unwrap().persist(&folder.path().join("x")).unwrap();
        assert_eq!(entries(folder.path()), ["x"]);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn removes_leftovers_of_ended_processes_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let this = Owner::this().to_name();
        let [host, boot, namespace, pid, start] = this.split('-').collect::<Vec<_>>()[..] else { panic!() };
        let name = |owner: &[&str]| format!(".detox-gguf-{}-0.tmp", owner.join("-"));
        let ended = name(&[host, boot, namespace, "2147483647", "1"]);
        let reused = name(&[host, boot, namespace, pid, "1"]);
        let running = name(&[host, boot, namespace, pid, start]);
        let rebooted = name(&[host, "00000000", namespace, "1", "1"]);
        let container = name(&["00000000", boot, "7", "1", "1"]);
        let container_running = name(&["00000001", boot, "7", "1", "1"]);
        let far = name(&["00000000", "00000000", namespace, "1", "1"]);
        let far_forgotten = name(&["00000000", "00000000", namespace, "2", "1"]);
        let old = [".detox-gguf-abc.tmp", ".gguf-abc.part", ".detox-gguf-forgotten.tmp", ".gguf-x.part"];
        for name in
            [&ended, &reused, &running, &rebooted, &container, &container_running, &far, &far_forgotten]
        {
            fs::write(path(name), "half").unwrap();
        }
        for name in old.iter().chain(&["mine.tmp", ".detox-gguf-lock", "model.gguf"]) {
            fs::write(path(name), "half").unwrap();
        }
        let locked = File::open(path(&container_running)).unwrap();
        locked.try_lock().unwrap();
        for name in [".detox-gguf-folder.tmp", ".detox-gguf-forgotten-folder.tmp"] {
            fs::create_dir(path(name)).unwrap();
            fs::write(path(name).join("merged.gguf"), "half").unwrap();
        }
        age(&path(".detox-gguf-forgotten-folder.tmp/merged.gguf"));
        for name in [&far_forgotten, old[2], old[3], ".detox-gguf-forgotten-folder.tmp", "mine.tmp"] {
            age(&path(name));
        }
        remove_unfinished(folder.path());
        let mut kept = vec![
            running,
            container_running,
            far,
            old[0].into(),
            old[1].into(),
            "mine.tmp".into(),
            ".detox-gguf-lock".into(),
            "model.gguf".into(),
            ".detox-gguf-folder.tmp".into(),
        ];
        kept.sort();
        assert_eq!(entries(folder.path()), kept);
    }
}
