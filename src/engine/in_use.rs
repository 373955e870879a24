//! The files that llama.cpp reads or maps at this moment, for the last message of a program that crashes.
//!
//! Entries are read inside signal handlers, so they are made in advance, never freed, and published by one atomic
//! pointer each.

use std::path::Path;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Mutex, PoisonError};

/// A file in use.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct UsedFile {
    /// What it is, and its path as the user gave it, ready to print: `model m.gguf`.
    pub(crate) text: String,
    /// Device and inode, where the system has them.
    pub(crate) device_and_inode: Option<(u64, u64)>,
    /// Size when it was opened, in bytes.
    pub(crate) n_bytes: u64,
    /// Its path for the system, terminated by NUL.
    pub(crate) c_path: Vec<u8>,
}

/// The most files that are listed at a time. Further ones are left out of the message.
const SLOTS: usize = 64;

static IN_USE: [AtomicPtr<UsedFile>; SLOTS] = [const { AtomicPtr::new(ptr::null_mut()) }; SLOTS];

/// Every entry ever made. A file that is opened again reuses its entry, so their number stays small.
static KNOWN: Mutex<Vec<&'static UsedFile>> = Mutex::new(Vec::new());

/// Lists a file while it exists.
#[derive(Debug)]
pub(super) struct InUse {
    slot: Option<usize>,
}

impl InUse {
    /// Lists the file at `path`; `kind` is "model" or "adapter".
    pub(super) fn enter(kind: &str, path: &Path) -> InUse {
        let entry = ptr::from_ref(known(UsedFile::new(kind, path))).cast_mut();
        let take = |slot: &AtomicPtr<UsedFile>| {
            slot.compare_exchange(ptr::null_mut(), entry, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        };
        InUse { slot: IN_USE.iter().position(take) }
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        if let Some(slot) = self.slot {
            IN_USE[slot].store(ptr::null_mut(), Ordering::Release);
        }
    }
}

impl UsedFile {
    fn new(kind: &str, path: &Path) -> UsedFile {
        let found = std::fs::metadata(path).ok();
        let mut c_path = path.as_os_str().as_encoded_bytes().to_vec();
        c_path.push(0);
        UsedFile {
            text: format!("{kind} {}", printable(&path.display().to_string())),
            device_and_inode: found.as_ref().and_then(device_and_inode),
            n_bytes: found.map_or(0, |found| found.len()),
            c_path,
        }
    }
}

#[cfg(unix)]
fn device_and_inode(found: &std::fs::Metadata) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    Some((found.dev(), found.ino()))
}

#[cfg(not(unix))]
fn device_and_inode(_: &std::fs::Metadata) -> Option<(u64, u64)> {
    None
}

/// Escapes characters that could change how a terminal shows a line.
fn printable(text: &str) -> String {
    let is_unsafe = |c: char| {
        c.is_control()
            || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if is_unsafe(c) { shown.extend(c.escape_unicode()) } else { shown.push(c) }
    }
    shown
}

fn known(new: UsedFile) -> &'static UsedFile {
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(entry) = known.iter().find(|entry| ***entry == new) {
        return entry;
    }
    let entry = Box::leak(Box::new(new));
    known.push(entry);
    entry
}

/// The files in use. Safe inside a signal handler: it only loads pointers.
pub(crate) fn files_in_use() -> impl Iterator<Item = &'static UsedFile> {
    IN_USE.iter().filter_map(|slot| {
        // SAFETY: the pointer is null, or came from `known`, which never frees or changes an entry.
        unsafe { slot.load(Ordering::Acquire).as_ref() }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_listed_while_it_is_in_use() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a\u{1b}[31m\u{202e}.gguf");
        std::fs::write(&path, b"12345").unwrap();
        let listed =
            || files_in_use().filter(|file| file.text.contains("a\\u{1b}[31m\\u{202e}.gguf")).count();
        let (first, second) = (InUse::enter("model", &path), InUse::enter("model", &path));
        assert_eq!(listed(), 2);
        drop(first);
        assert_eq!(listed(), 1);
        drop(second);
        assert_eq!(listed(), 0);
    }
}
