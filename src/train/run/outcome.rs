//! How a run ended.

use serde::{Deserialize, Serialize};

/// Why a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// All steps are done.
    Finished,
    /// The held-out loss stopped falling.
    EarlyStopping,
}

/// The outcome of a finished run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Why the run ended.
    pub ending: Ending,
    /// Steps done.
    pub n_steps: u64,
    /// Training pairs.
    pub n_train: usize,
    /// Held-out pairs.
    pub n_held_out: usize,
    /// Positions of the held-out pairs among all pairs read, from 0. Empty in older files.
    #[serde(default)]
    pub held_out_indices: Vec<usize>,
    /// The step whose values were kept, and its held-out loss; `None` without held-out pairs.
    pub best: Option<(u64, f64)>,
    /// Wall-clock seconds of all steps and evaluations.
    pub seconds: f64,
}
