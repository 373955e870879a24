//! The tokenizer of distinct-n and repetition: the model's own or a `tokenizer.json`.

use std::path::Path;

use sha2::{Digest, Sha256};

use crate::engine::{Model, Token};
use crate::error::Result;
#[cfg(feature = "tokenizer-json")]
use crate::text::tokenizer::JsonTokenizer;

/// Splits texts into tokens, each decoded to text.
#[derive(Debug, Clone)]
pub enum TextTokenizer {
    /// The vocabulary of a GGUF.
    Model {
        /// The model.
        model: Model,
        /// Name and hash of the vocabulary, for the report.
        name: String,
    },
    /// A Hugging Face `tokenizer.json`, such as that of mT5, which the paper uses.
    #[cfg(feature = "tokenizer-json")]
    File {
        /// Name and hash of the file, for the report.
        name: String,
        /// The tokenizer.
        tokenizer: JsonTokenizer,
    },
}

impl TextTokenizer {
    /// Reads a `tokenizer.json`.
    #[cfg(feature = "tokenizer-json")]
    pub fn from_file(path: &Path) -> Result<TextTokenizer> {
        let tokenizer = JsonTokenizer::read(path)?;
        let name = format!("{} (sha256 {})", crate::file::base_name(path), &tokenizer.sha256()[..12]);
        Ok(TextTokenizer::File { name, tokenizer })
    }

    /// Refuses a `tokenizer.json`, because this build has no reader for it.
    #[cfg(not(feature = "tokenizer-json"))]
    pub fn from_file(path: &Path) -> Result<TextTokenizer> {
        let reason = format!("cannot read {}: this build has no support for tokenizer.json", path.display());
        Err(crate::error::Error::setting("--tokenizer", reason).with_hint(
            "build with --features tokenizer-json, or leave out --tokenizer and give --base model.gguf",
        ))
    }

    /// The vocabulary of a model.
    ///
    /// Models with the same tokens, such as two quantisations, share a name: their counts are comparable.
    pub fn of_model(model: &Model) -> TextTokenizer {
        let mut pieces = Vec::new();
        for token in 0..model.n_vocab() {
            pieces.extend(model.piece(token as Token));
            // A separator that never occurs in UTF-8.
            pieces.push(0xff);
        }
        let name = format!("the model's own ({} tokens, sha256 {})", model.n_vocab(), short_hash(&pieces));
        TextTokenizer::Model { model: model.clone(), name }
    }

    /// The name in reports. Tokenizers with the same name split texts in the same way.
    pub fn name(&self) -> &str {
        match self {
            TextTokenizer::Model { name, .. } => name,
            #[cfg(feature = "tokenizer-json")]
            TextTokenizer::File { name, .. } => name,
        }
    }

    /// The tokens of `text`, each decoded on its own, without empty ones.
    ///
    /// As in the code of arXiv 2406.16235 (`xg/eval/metric_diversity.py`), a word is the same token with
    /// and without a space before it.
    ///
    /// # Errors
    /// Those of a `tokenizer.json` that cannot split the text.
    pub fn tokens(&self, text: &str) -> Result<Vec<String>> {
        let all: Vec<String> = match self {
            // A text that the tokenizer refuses has no tokens. A tokenizer accepts the text of its own model.
            TextTokenizer::Model { model, .. } => model.tokenize_text(text).map_or_else(
                |_| Vec::new(),
                // A token can be one byte of a character; it is spelled as hex.
                |tokens| tokens.into_iter().map(|t| spelled(&model.piece(t))).collect(),
            ),
            #[cfg(feature = "tokenizer-json")]
            TextTokenizer::File { tokenizer, .. } => tokenizer.tokens(text)?,
        };
        Ok(all.into_iter().filter(|token| !token.is_empty()).collect())
    }
}

/// The first 12 hex digits of the SHA-256.
fn short_hash(bytes: &[u8]) -> String {
    crate::file::hex(&Sha256::digest(bytes)[..6])
}

/// The text of a token, or its bytes in hex if they are not valid UTF-8.
fn spelled(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        // A word is the same token with and without a space before it.
        Ok(text) => text.trim_start_matches(' ').to_owned(),
        Err(_) => bytes.iter().map(|byte| format!("<{byte:02x}>")).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    #[test]
    fn a_word_is_one_token_with_and_without_its_space() {
        assert_eq!(spelled(b" word"), spelled(b"word"));
        assert_eq!(spelled(&[0xe6, 0xbc]), "<e6><bc>");
    }

    #[test]
    fn a_tokenizer_file_decodes_every_token() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("gguf/tiny/tokenizer.json");
        let tokenizer = TextTokenizer::from_file(&path).unwrap();
        let tokens = tokenizer.tokens("one two one").unwrap();
        assert!(!tokens.is_empty());
        assert!(tokens.iter().all(|t| !t.is_empty()));
        assert_eq!(tokens.concat().replace(' ', ""), "onetwoone");
        assert!(tokenizer.name().starts_with("tokenizer.json (sha256 "));
    }

    #[test]
    fn rejects_a_file_that_is_not_a_tokenizer() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        assert!(matches!(TextTokenizer::from_file(&path), Err(Error::Io { .. })));
        std::fs::write(&path, "{}").unwrap();
        assert!(matches!(TextTokenizer::from_file(&path), Err(Error::Input { .. })));
    }
}
