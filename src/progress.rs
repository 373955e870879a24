//! Progress reports from long work, independent of how they are shown.

use std::path::Path;

use crate::error::Result;
use crate::gguf::{GgufFile, ModelFiles};

/// Receives the progress of a run.
pub trait Progress {
    /// A phase begins. `done` of its `total` items are already finished, for instance by an interrupted run.
    fn start(&mut self, phase: &str, total: u64, done: u64);
    /// `n` more items are finished.
    fn advance(&mut self, n: u64);
    /// The phase has ended.
    fn finish(&mut self);
    /// The current state in a line or two. Each note replaces the previous one.
    fn note(&mut self, _text: &str) {}
    /// Prints a line that stays.
    fn say(&mut self, text: &str);
}

/// Shows nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn start(&mut self, _phase: &str, _total: u64, _done: u64) {}
    fn advance(&mut self, _n: u64) {}
    fn finish(&mut self) {}
    fn say(&mut self, _text: &str) {}
}

/// Advances `progress` by totals: the returned function takes how many are done so far.
pub fn advance_to(progress: &mut dyn Progress) -> impl FnMut(usize) {
    let mut n_done = 0;
    move |done| {
        progress.advance((done - n_done) as u64);
        n_done = done;
    }
}

/// Hashes a model (SHA-256) and reports the progress.
///
/// # Errors
/// Same as [`crate::gguf::model_sha256`].
pub fn hash_model(path: &Path, progress: &mut dyn Progress) -> Result<String> {
    hash_files(&GgufFile::open(path)?.files(), progress)
}

/// Hashes the open files of a model (SHA-256) and reports the progress.
///
/// # Errors
/// Same as [`ModelFiles::sha256`].
pub fn hash_files(files: &ModelFiles, progress: &mut dyn Progress) -> Result<String> {
    let mut shown = 0;
    let hash = files.sha256(|done, total| {
        if shown == 0 {
            progress.start("hashing the model, MiB", total >> 20, 0);
        }
        progress.advance((done >> 20) - (shown >> 20));
        shown = done;
    })?;
    if shown > 0 {
        progress.finish();
    }
    Ok(hash)
}
