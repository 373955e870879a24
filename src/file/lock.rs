//! The lock that a run holds on its folder, so that no second process writes there.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::ThreadId;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::owner::host_name;
use super::temporary::remove_unfinished;
use crate::error::{Error, Result};

/// Name of the lock file in a folder. Without a lock on it the file means nothing.
const NAME: &str = ".detox-gguf-lock";

/// Longest contents of a lock file that are read.
const MAX_BYTES: u64 = 4096;

/// A lock on a folder. Dropping the last one of this folder releases it and removes the lock file.
#[derive(Debug, Clone)]
pub struct FolderLock {
    /// Only kept for its `Drop`.
    _held: Arc<Held>,
}

#[derive(Debug)]
struct Held {
    path: PathBuf,
    /// `None` if the file system has no locks.
    file: Option<File>,
}

/// What the lock file says of the process that holds it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Holder {
    command: String,
    pid: u32,
    host: String,
    since: String,
}

/// A lock of this process: its folder, the thread that took it, and the lock itself.
type Entry = (PathBuf, ThreadId, Weak<Held>);

static LOCKS: Mutex<Vec<Entry>> = Mutex::new(Vec::new());

fn locks() -> MutexGuard<'static, Vec<Entry>> {
    LOCKS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Creates a folder and its parents, locks it for this process, and removes what killed processes left in it.
///
/// A thread may lock a folder that it has already locked. The lock ends with the process, however that ends. Where the
/// file system has no locks, a warning is logged.
///
/// # Errors
/// [`Error::RunFolder`] with the holder if another process or thread has locked the folder; [`Error::Io`].
pub fn lock_folder(folder: &Path) -> Result<FolderLock> {
    super::create_folder(folder)?;
    let folder_path = folder.canonicalize().map_err(Error::io("open", folder))?;
    let mut locks = locks();
    locks.retain(|(.., held)| held.strong_count() > 0);
    let of_folder = locks.iter().find(|(path, ..)| *path == folder_path);
    if let Some((_, thread, held)) = of_folder
        && let Some(held) = held.upgrade()
    {
        return match *thread == std::thread::current().id() {
            true => Ok(FolderLock { _held: held }),
            false => Err(in_use(folder, ": another thread of this program".into())),
        };
    }
    let held = Arc::new(Held::acquire(folder, folder_path.join(NAME))?);
    locks.push((folder_path, std::thread::current().id(), Arc::downgrade(&held)));
    drop(locks);
    remove_unfinished(folder);
    Ok(FolderLock { _held: held })
}

/// Whether this thread has locked `folder`, a canonical path.
pub(super) fn is_own(folder: &Path) -> bool {
    let this = std::thread::current().id();
    locks().iter().any(|(path, thread, held)| path == folder && *thread == this && held.strong_count() > 0)
}

/// Removes the lock files of this process, which is about to exit.
pub(super) fn remove_own() {
    for (.., held) in locks().iter() {
        if let Some(held) = held.upgrade() {
            let _ = fs::remove_file(&held.path);
        }
    }
}

fn in_use(folder: &Path, by: String) -> Error {
    Error::run_folder(folder, format!("another process is writing to this folder{by}"))
        .with_hint("wait until that process ends, or choose another folder with -o")
}

impl Held {
    fn acquire(folder: &Path, path: PathBuf) -> Result<Held> {
        loop {
            if path.is_dir() {
                let reason = format!("expected a lock file at {}, found a folder", path.display());
                return Err(Error::run_folder(folder, reason).with_hint("remove that folder"));
            }
            let mut file = open(&path).map_err(Error::io("write", &path))?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    let by =
                        Holder::read(&mut file).map_or_else(String::new, |h| format!(": {}", h.in_words()));
                    return Err(in_use(folder, by));
                }
                Err(TryLockError::Error(error)) => {
                    tracing::warn!(
                        "cannot lock {} ({error}); make sure that no other process writes to this folder",
                        folder.display()
                    );
                    return Ok(Held { path, file: None });
                }
            }
            // The holder before may have removed the file after it was opened here: then the lock guards nothing.
            if is_at(&file, &path) {
                // Only for the message: a folder on a full disk can still be locked.
                let _ = Holder::this().write(&mut file);
                return Ok(Held { path, file: Some(file) });
            }
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // While it is still locked, so that the file removed is never the next holder's.
        if let Err(error) = fs::remove_file(&self.path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::debug!("cannot remove {}: {error}", self.path.display());
        }
        drop(self.file.take());
    }
}

/// Opens or creates a lock file. Another user's file can only be opened for reading, which is enough for a lock.
fn open(path: &Path) -> io::Result<File> {
    match OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => File::open(path).map_err(|_| error),
        file => file,
    }
}

/// Whether the open file is the one at `path`.
#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let id = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    file.metadata().map(id).ok() == fs::metadata(path).map(id).ok()
}

#[cfg(not(unix))]
fn is_at(_: &File, path: &Path) -> bool {
    path.exists()
}

impl Holder {
    fn this() -> Holder {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        Holder { command: command(), pid: std::process::id(), host: host_name(), since: utc(now) }
    }

    fn write(&self, file: &mut File) -> io::Result<()> {
        file.set_len(0)?;
        file.rewind()?;
        let text = serde_json::to_string(self).expect("text and a number");
        file.write_all(format!("{text}\n").as_bytes())
    }

    /// `None` if the holder has not written it, or could not.
    fn read(file: &mut File) -> Option<Holder> {
        let mut text = String::new();
        file.take(MAX_BYTES).read_to_string(&mut text).ok()?;
        serde_json::from_str(&text).ok()
    }

    fn in_words(&self) -> String {
        let Holder { command, pid, host, since } = self;
        let host = if *host == host_name() { String::new() } else { format!(" on {host}") };
        format!("`{command}` (process {pid}{host}, since {since})")
    }
}

/// The program's name and its command: `detox-gguf train`.
fn command() -> String {
    let mut arguments = std::env::args_os().map(|argument| argument.to_string_lossy().into_owned());
    let program = arguments.next().map_or_else(String::new, |path| super::base_name(Path::new(&path)));
    let is_word = |argument: &String| argument.chars().all(|c| c.is_ascii_lowercase());
    let command = arguments.find(is_word).map_or_else(String::new, |command| format!(" {command}"));
    program + &command
}

/// Seconds since 1970 as a date and a time in UTC.
fn utc(seconds: u64) -> String {
    // Days to a date as in "chrono-Compatible Low-Level Date Algorithms", civil_from_days:
    // https://howardhinnant.github.io/date_algorithms.html
    let days = seconds / 86_400 + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A lock as another process would hold it.
    fn lock_of_another(folder: &Path) -> File {
        let mut file = open(&folder.join(NAME)).unwrap();
        file.try_lock().unwrap();
        let holder = Holder { pid: 4711, command: "detox-gguf train".into(), ..Holder::this() };
        holder.write(&mut file).unwrap();
        file
    }

    #[test]
    fn a_second_process_is_refused_with_the_holder() {
        let folder = tempfile::tempdir().unwrap();
        let other = lock_of_another(folder.path());
        let error = lock_folder(folder.path()).unwrap_err();
        assert!(matches!(error, Error::RunFolder { .. }));
        assert!(error.to_string().contains("`detox-gguf train` (process 4711, since 20"), "{error}");
        assert!(error.hint().unwrap().contains("-o"));
        drop(other);
        // Its file is still there, but without a lock.
        let lock = lock_folder(folder.path()).unwrap();
        drop(lock);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_stale_or_foreign_lock_file_never_blocks() {
        for content in ["", "\0\0\0", "not json", "{\"pid\":1}"] {
            let folder = tempfile::tempdir().unwrap();
            fs::write(folder.path().join(NAME), content).unwrap();
            drop(lock_folder(folder.path()).unwrap());
            let file = open(&folder.path().join(NAME)).unwrap();
            fs::write(folder.path().join(NAME), content).unwrap();
            file.try_lock().unwrap();
            let error = lock_folder(folder.path()).unwrap_err().to_string();
            assert!(error.ends_with("another process is writing to this folder"), "{error}");
        }
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join(NAME)).unwrap();
        let error = lock_folder(folder.path()).unwrap_err();
        assert!(error.to_string().contains(NAME) && error.hint().unwrap().contains("remove"), "{error}");
    }

    #[test]
    fn one_thread_may_lock_a_folder_again_and_another_may_not() {
        let folder = tempfile::tempdir().unwrap();
        let outer = lock_folder(folder.path()).unwrap();
        let inner = lock_folder(folder.path()).unwrap();
        drop(outer);
        let refused = |path: &Path| {
            let path = path.to_path_buf();
            std::thread::spawn(move || lock_folder(&path).is_err()).join().unwrap()
        };
        assert!(refused(folder.path()), "the inner lock still holds it");
        drop(inner);
        assert!(!refused(folder.path()));
    }

    #[test]
    fn times_are_in_utc() {
        // `date -u -d @SECONDS`
        assert_eq!(utc(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(utc(951_782_399), "2000-02-28 23:59:59 UTC");
        assert_eq!(utc(951_782_400), "2000-02-29 00:00:00 UTC");
        assert_eq!(utc(1_795_902_404), "2026-11-28 21:46:44 UTC");
    }
}
