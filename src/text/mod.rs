//! Prepares text: rows of files, languages, normalisation, tokenizers.

pub mod chat_markers;
#[cfg(feature = "rows")]
pub mod language;
pub mod nfc;
pub mod normalise;
#[cfg(feature = "rows")]
pub mod rows;
#[cfg(feature = "tokenizer-json")]
pub mod tokenizer;
