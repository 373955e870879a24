//! A training run: steps, evaluations, checkpoints and metrics.
//!
//! An interrupted run resumes from its last checkpoint and produces the same bytes as an uninterrupted one. The order
//! of pairs comes from the seed, reference log-probs are kept on disk, and lines of `metrics.jsonl` after the
//! checkpoint are dropped. If memory runs out, the run continues with smaller passes or with gradient checkpointing.
//!
//! - [`training_loop`] is the loop; `out_of_memory` holds its retries.
//! - [`trainer`] is one step, [`optimizer`] its update, [`reference`](mod@reference) the reference log-probs.
//! - [`checkpoint`], [`files`] and [`metrics`] hold the files of a run; [`outcome`] its end.
//! - [`placement`] plans GPU memory before a run starts.

pub mod checkpoint;
pub mod files;
pub mod metrics;
pub mod optimizer;
mod out_of_memory;
pub mod outcome;
pub mod placement;
pub mod reference;
pub mod trainer;
pub mod training_loop;

pub use files::RunFiles;
pub use outcome::{Ending, Outcome};
pub use training_loop::{check_lengths, run};
