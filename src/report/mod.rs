//! Formats results as JSON, CSV, Markdown, terminal tables and self-contained HTML pages.
//!
//! ```text
//! EvalResult, Comparison ─┬─► headline, grid ─► terminal · markdown · html (with plot, excerpt)
//!                         └─► json · csv · per_prompt
//! Sweep ─► sweep    MadePairs ─► pairs    activations, retrieval ─► interp    training ─► training
//! ```
//!
//! A file named after a command formats the result of that command. All functions return text
//! and do no I/O; only [`write`](mod@write) writes files. Titles, units and definitions come from
//! [`crate::eval::metric::METRICS`].

pub mod axis;
pub mod csv;
pub mod excerpt;
pub mod format;
pub mod grid;
pub mod headline;
pub mod html;
pub mod interp;
pub mod json;
pub mod line_plot;
pub mod markdown;
pub mod neurons;
pub mod npy;
pub mod pairs;
pub mod per_prompt;
pub mod plot;
pub mod sweep;
#[cfg(test)]
mod synthetic;
pub mod terminal;
pub mod training;
pub mod write;

pub use excerpt::{Excerpt, most_toxic};
