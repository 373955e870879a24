//! One side of a comparison.

use crate::eval::continuation::Sample;
use crate::eval::result::RunInfo;

/// One of the two runs of a comparison.
#[derive(Debug, Clone, Copy)]
pub struct Side<'a> {
    /// Name of the run in reports.
    pub label: &'a str,
    /// Settings of the run.
    pub run: &'a RunInfo,
    /// Its measured continuations.
    pub samples: &'a [Sample],
}
