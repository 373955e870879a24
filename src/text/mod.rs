//! What every reader of people's text shares: languages and which of them a text is in.

pub mod language;
