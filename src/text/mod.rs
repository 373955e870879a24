//! Text from people: rows of their files, languages, normalisation.

#[cfg(feature = "engine")]
pub mod language;
pub mod normalise;
pub mod rows;
