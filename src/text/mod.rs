//! Prepares text: lines of files, languages, normalisation.

#[cfg(feature = "engine")]
pub mod language;
pub mod normalise;
pub mod rows;
