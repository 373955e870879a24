//! One side of a comparison.

use crate::eval::continuation::Sample;
use crate::eval::result::{ModelPaths, RunInfo};

/// One of the two runs of a comparison.
#[derive(Debug, Clone, Copy)]
pub struct Side<'a> {
    /// Name of the run in reports: its folder, if it has one.
    pub label: &'a str,
    /// Settings of the run.
    pub run: &'a RunInfo,
    /// Its measured continuations.
    pub samples: &'a [Sample],
    /// The files of its models, if it was read from a folder.
    pub paths: Option<&'a ModelPaths>,
}
