//! Prepares text: rows of files, languages, normalisation, tokenizers, and what a terminal may be shown.

pub mod chat_markers;
#[cfg(feature = "rows")]
pub mod language;
pub mod nfc;
pub mod normalise;
pub mod printable;
#[cfg(feature = "rows")]
pub mod rows;
#[cfg(feature = "tokenizer-json")]
pub mod tokenizer;

pub use printable::printable;
