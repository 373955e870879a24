//! Notices files that change while they are in use.
//!
//! A model is mapped or read for hours, and reports name it by its hash. If its bytes change meanwhile, the report
//! would name a model that did not run. So an open file is looked at again before and after each unit of work.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use sha2::{Digest, Sha256};

use super::file_hash;
use super::stamp::Stamp;
use crate::error::{Error, Result};
use crate::file::hex;

/// An open file, with its stamp from when it was opened.
#[derive(Debug)]
pub struct WatchedFile {
    path: PathBuf,
    file: Arc<File>,
    seen: Mutex<Seen>,
}

#[derive(Debug)]
struct Seen {
    stamp: Stamp,
    sha256: Option<String>,
}

impl WatchedFile {
    /// Opens the file at `path` to watch it.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(path: &Path) -> Result<WatchedFile> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        WatchedFile::new(path, Arc::new(file))
    }

    /// Watches a file that is already open.
    pub(super) fn new(path: &Path, file: Arc<File>) -> Result<WatchedFile> {
        let stamp = Stamp::of(&file.metadata().map_err(Error::io("read", path))?);
        Ok(WatchedFile { path: path.to_path_buf(), file, seen: Mutex::new(Seen { stamp, sha256: None }) })
    }

    /// Its path when it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn stamp(&self) -> Stamp {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).stamp
    }

    /// Checks that the open file has the bytes it had when it was opened.
    ///
    /// Another file under its name does not matter: the open file is still the old one. A change of the inode alone
    /// (a new time, a rename, a link, new permissions, or a copy that restores the old time) is an error unless the
    /// content has the same hash, or, for a file without a hash yet, unless its name or permissions explain the change.
    ///
    /// # Errors
    /// [`Error::Input`] if it changed; [`Error::Io`].
    pub fn check_content(&self) -> Result<()> {
        let now = Stamp::of(&self.file.metadata().map_err(Error::io("read", &self.path))?);
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let before = seen.stamp;
        if now == before {
            return Ok(());
        }
        if now.n_bytes != before.n_bytes {
            return Err(
                self.changed(&format!("it had {} bytes, and has {} now", before.n_bytes, now.n_bytes))
            );
        }
        let is_same = match &seen.sha256 {
            Some(hash) => *hash == file_hash::hash_file(&self.path, &self.file, |_, _| {})?,
            None if now.modified != before.modified => false,
            None => {
                now.n_links != before.n_links
                    || now.rights != before.rights
                    || !std::fs::metadata(&self.path)
                        .is_ok_and(|at_path| Stamp::of(&at_path).is_same_file(&now))
            }
        };
        if !is_same {
            return Err(self.changed(match now.modified != before.modified {
                true => "it was written to",
                false => "it was written to, and its old time was restored",
            }));
        }
        seen.stamp = now;
        Ok(())
    }

    /// Checks that the path still leads to this file, and that the file has not changed.
    ///
    /// # Errors
    /// As [`WatchedFile::check_content`].
    pub fn check_path(&self) -> Result<()> {
        let at_path = Stamp::of(&std::fs::metadata(&self.path).map_err(Error::io("read", &self.path))?);
        if !at_path.is_same_file(&self.stamp()) {
            return Err(self.changed("another file took its name"));
        }
        self.check_content()
    }

    fn changed(&self, how: &str) -> Error {
        changed(&self.path, how)
    }

    /// The sha256 of the open file, computed once.
    fn sha256(&self, progress: impl FnMut(u64, u64)) -> Result<String> {
        self.check_content()?;
        let known = |seen: &Mutex<Seen>| seen.lock().unwrap_or_else(PoisonError::into_inner).sha256.clone();
        if let Some(hash) = known(&self.seen).or_else(|| file_hash::known(&self.stamp())) {
            self.seen.lock().unwrap_or_else(PoisonError::into_inner).sha256 = Some(hash.clone());
            return Ok(hash);
        }
        let hash = file_hash::hash_file(&self.path, &self.file, progress)?;
        // Only now is it known that all bytes were of one state.
        self.check_content()?;
        file_hash::remember(self.stamp(), &hash);
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).sha256 = Some(hash.clone());
        Ok(hash)
    }
}

fn changed(path: &Path, how: &str) -> Error {
    Error::input(path, None, format!("the file was changed while it was in use: {how}")).with_hint(
        "units finished before the change are kept. Restore the file and repeat the command, or choose a new output",
    )
}

/// The files of a model: one, or the parts of a split model in order.
#[derive(Debug, Clone)]
pub struct ModelFiles(pub(super) Arc<[Arc<WatchedFile>]>);

impl ModelFiles {
    /// Checks that every file has the bytes it had when it was opened.
    ///
    /// # Errors
    /// As [`WatchedFile::check_content`].
    pub fn check_content(&self) -> Result<()> {
        self.0.iter().try_for_each(|file| file.check_content())
    }

    /// Checks that the paths still lead to these files, and that none has changed.
    ///
    /// # Errors
    /// As [`WatchedFile::check_path`].
    pub fn check_paths(&self) -> Result<()> {
        self.0.iter().try_for_each(|file| file.check_path())
    }

    /// Checks that `later`, opened under the same path, is the same model.
    ///
    /// # Errors
    /// [`Error::Input`] if a file is another one, or changed in between.
    pub fn check_same(&self, later: &ModelFiles) -> Result<()> {
        self.check_content()?;
        for (file, later) in self.0.iter().zip(later.0.iter()) {
            if file.stamp() != later.stamp() {
                return Err(file.changed("another file took its name, or it was written to"));
            }
        }
        Ok(())
    }

    /// The sha256 of the model, in lower-case hex. For a split model, that of its parts' hashes (hex, in order).
    ///
    /// The bytes come from the open files, so they are those that run. `progress` is called after each chunk with
    /// the bytes hashed so far and the size of all parts. It is not called for a hash that is already known.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Input`] if a file changed.
    pub fn sha256(&self, mut progress: impl FnMut(u64, u64)) -> Result<String> {
        let total = self.0.iter().map(|file| file.stamp().n_bytes).sum();
        let mut before = 0;
        let mut hashes = Vec::new();
        for file in self.0.iter() {
            hashes.push(file.sha256(|done, _| progress(before + done, total))?);
            before += file.stamp().n_bytes;
        }
        Ok(match hashes.as_slice() {
            [hash] => hash.clone(),
            _ => hex(&Sha256::digest(hashes.concat())),
        })
    }
}

/// Whether the program asked for [`hold_models`].
static HOLDS: AtomicBool = AtomicBool::new(false);

/// The stamp of each model at its first opening.
static HELD: Mutex<Option<HashMap<PathBuf, Stamp>>> = Mutex::new(None);

/// For programs that run one command: a model that is opened again must be the file that was opened first.
///
/// A command opens its model several times: to read its metadata, to hash it, to run it, to compare results. From now
/// on each opening is compared with the first.
pub fn hold_models() {
    HOLDS.store(true, Ordering::SeqCst);
}

/// Compares a model's file with the first one under its path, if the program asked for that.
pub(super) fn check_held(file: &WatchedFile) -> Result<()> {
    if !HOLDS.load(Ordering::SeqCst) {
        return Ok(());
    }
    let path = std::path::absolute(&file.path).unwrap_or_else(|_| file.path.clone());
    let mut held = HELD.lock().unwrap_or_else(PoisonError::into_inner);
    let now = file.stamp();
    let first = *held.get_or_insert_default().entry(path).or_insert(now);
    // New links or permissions also set the time of the last change, and explain it.
    let is_explained = (first.n_links, first.rights) != (now.n_links, now.rights);
    let comparable = |stamp: Stamp| match is_explained {
        true => Stamp { changed: 0, n_links: 0, rights: (0, 0, 0), ..stamp },
        false => stamp,
    };
    if comparable(first) != comparable(now) {
        return Err(file.changed("another file took its name, or it was written to"));
    }
    Ok(())
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn watched() -> (tempfile::TempDir, PathBuf, WatchedFile) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.gguf");
        std::fs::write(&path, b"before").unwrap();
        let file = WatchedFile::open(&path).unwrap();
        // Longer than the tick of a file system's clock, so that a write gets another time.
        std::thread::sleep(std::time::Duration::from_millis(20));
        (folder, path, file)
    }

    fn restore_time(path: &Path, from: &WatchedFile) {
        let time = std::time::UNIX_EPOCH + std::time::Duration::from_nanos(from.stamp().modified as u64);
        File::options().write(true).open(path).unwrap().set_modified(time).unwrap();
    }

    #[test]
    fn a_file_that_is_overwritten_or_truncated_is_noticed() {
        for new in ["after!", "before and more", ""] {
            let (_folder, path, file) = watched();
            file.check_path().unwrap();
            std::fs::write(&path, new).unwrap();
            let message = file.check_content().unwrap_err().to_string();
            assert!(message.contains("changed while it was in use"), "{message}");
        }
    }

    #[test]
    fn an_overwritten_file_is_noticed_even_if_its_time_is_restored() {
        for is_hashed in [false, true] {
            let (_folder, path, file) = watched();
            if is_hashed {
                file.sha256(|_, _| {}).unwrap();
            }
            std::fs::write(&path, "after!").unwrap();
            restore_time(&path, &file);
            let message = file.check_content().unwrap_err().to_string();
            assert!(message.contains("old time was restored"), "{message}");
        }
    }

    #[test]
    fn a_new_time_of_a_hashed_file_changes_nothing() {
        let (_folder, path, file) = watched();
        file.sha256(|_, _| {}).unwrap();
        for seconds in [1, 2] {
            let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
            File::options().write(true).open(&path).unwrap().set_modified(time).unwrap();
            file.check_path().unwrap();
        }
        std::fs::write(&path, "after!").unwrap();
        let message = file.check_content().unwrap_err().to_string();
        assert!(message.ends_with("it was written to"), "{message}");
    }

    #[test]
    fn another_file_under_the_name_matters_only_to_those_who_open_it_again() {
        for is_hashed in [false, true] {
            let (folder, path, file) = watched();
            if is_hashed {
                file.sha256(|_, _| {}).unwrap();
            }
            std::fs::write(folder.path().join("other"), "after!").unwrap();
            std::fs::rename(folder.path().join("other"), &path).unwrap();
            file.check_content().unwrap();
            let message = file.check_path().unwrap_err().to_string();
            assert!(message.contains("another file took its name"), "{message}");
            assert_eq!(file.sha256(|_, _| {}).unwrap(), hex(&Sha256::digest(b"before")));
        }
    }

    #[test]
    fn new_permissions_and_links_change_nothing() {
        let (folder, path, file) = watched();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        file.check_path().unwrap();
        std::fs::hard_link(&path, folder.path().join("link")).unwrap();
        file.check_path().unwrap();
        file.sha256(|_, _| {}).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        file.check_path().unwrap();
    }
}
