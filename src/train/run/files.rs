//! The files that a run writes into its folder.

use std::path::{Path, PathBuf};

/// Paths of a run's files.
#[derive(Debug, Clone)]
pub struct RunFiles {
    /// One JSON line per step, evaluation and placement.
    pub metrics: PathBuf,
    /// Log-probs of the answers under the reference model.
    pub references: PathBuf,
    /// The state from which the run resumes.
    pub checkpoint: PathBuf,
    /// The checkpoint before it, until the run ends.
    pub previous_checkpoint: PathBuf,
    /// The trained values with the lowest held-out loss.
    pub best: PathBuf,
}

impl RunFiles {
    /// The files of the run in `folder`.
    pub fn of(folder: &Path) -> RunFiles {
        RunFiles {
            metrics: folder.join("metrics.jsonl"),
            references: folder.join("reference.jsonl"),
            checkpoint: folder.join("checkpoint.gguf"),
            previous_checkpoint: folder.join("checkpoint-previous.gguf"),
            best: folder.join("best.gguf"),
        }
    }
}
