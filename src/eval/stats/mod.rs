//! Statistics over prompts: bootstrap intervals, and tests of paired differences.

pub mod bootstrap;
pub(crate) mod paired_test;
