//! Detects a change of a file without reading it.

use std::fs::Metadata;

/// What the system knows about a file without reading it. Times are in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Stamp {
    pub device: u64,
    pub inode: u64,
    pub n_bytes: u64,
    pub modified: i128,
    /// Last change of content, name or permissions.
    pub changed: i128,
    pub n_links: u64,
    /// Permissions and owner.
    pub rights: (u32, u32, u32),
}

impl Stamp {
    /// The stamp in the system's description of a file.
    #[cfg(unix)]
    pub(super) fn of(found: &Metadata) -> Stamp {
        use std::os::unix::fs::MetadataExt;
        let nanoseconds = |s: i64, ns: i64| i128::from(s) * 1_000_000_000 + i128::from(ns);
        Stamp {
            device: found.dev(),
            inode: found.ino(),
            n_bytes: found.len(),
            modified: nanoseconds(found.mtime(), found.mtime_nsec()),
            changed: nanoseconds(found.ctime(), found.ctime_nsec()),
            n_links: found.nlink(),
            rights: (found.mode(), found.uid(), found.gid()),
        }
    }

    #[cfg(not(unix))]
    pub(super) fn of(found: &Metadata) -> Stamp {
        let modified = found.modified().ok();
        let since_1970 = modified.and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok());
        let modified = since_1970.map_or(0, |t| t.as_nanos() as i128);
        let n_bytes = found.len();
        Stamp { device: 0, inode: 0, n_bytes, modified, changed: modified, n_links: 1, rights: (0, 0, 0) }
    }

    pub(super) fn is_same_file(&self, other: &Stamp) -> bool {
        (self.device, self.inode) == (other.device, other.inode)
    }
}
