//! How long work tells of itself, without knowing who listens.

use std::path::Path;

use crate::error::Result;
use crate::gguf;

/// Told how a run goes on.
pub trait Progress {
    /// A phase begins: `done` of `total` are there already.
    fn start(&mut self, phase: &str, total: u64, done: u64);
    /// Some more are done.
    fn advance(&mut self, n: u64);
    /// The phase has ended.
    fn finish(&mut self);
    /// How things stand right now, in a line or two; only the last one is worth showing.
    fn note(&mut self, _text: &str) {}
    /// Something worth a line.
    fn say(&mut self, text: &str);
}

/// A progress that shows nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn start(&mut self, _phase: &str, _total: u64, _done: u64) {}
    fn advance(&mut self, _n: u64) {}
    fn finish(&mut self) {}
    fn say(&mut self, _text: &str) {}
}

/// SHA-256 of a model, with its progress shown.
///
/// # Errors
/// [`crate::Error::Io`].
pub fn hash_model(path: &Path, progress: &mut dyn Progress) -> Result<String> {
    let mut shown = 0;
    let hash = gguf::model_sha256(path, |done, total| {
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
