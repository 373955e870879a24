//! One result tree, written as JSON, CSV, Markdown, a terminal table and a self-contained HTML page.
//!
//! ```text
//! EvalResult, Comparison ──► headline, grid ──► terminal · markdown · html (with plot)
//!                        └─► json · csv
//! Sweep ──► sweep        activations, retrieval ──► interp
//! ```
//!
//! Every function here returns text and does no I/O. Titles, units and definitions come from
//! [`crate::eval::metric::METRICS`].

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
pub mod pairs;
pub mod plot;
pub mod sweep;
#[cfg(test)]
mod synthetic;
pub mod terminal;
pub mod training;

pub use excerpt::{Excerpt, most_toxic};
