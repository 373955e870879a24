//! A model's tokenizer, and the text of its tokens.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::gguf::{self, GgufFile, Value};
use crate::text::nfc;

use super::Token;
use super::ffi::{LoadParams, ModelHandle};

/// A model's tokenizer and tokens.
///
/// It is part of a [`Model`](super::Model), or loaded by itself, which is quick for a model of any size.
#[derive(Debug, Clone)]
pub struct Vocabulary {
    handle: Arc<ModelHandle>,
    path: PathBuf,
    eos: Option<Token>,
    hash: Arc<str>,
    /// Whether texts are normalised to NFC before they are tokenised.
    nfc: bool,
    /// `tokenizer.ggml.pre`, if it is one of [`NFC_TOKENIZERS`].
    expects_nfc: Option<&'static str>,
}

/// The warnings of [`Vocabulary::check_nfc`] that were logged.
static LOGGED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// Pre-tokenizers (`tokenizer.ggml.pre`) whose tokenizer in Hugging Face normalises text to NFC. llama.cpp does not.
///
/// Source: the normalizer in the `tokenizer.json` of Qwen 2, 2.5, 3 and 3.5, Command R, MPT (that of GPT-NeoX) and OLMo,
/// and the Python tokenizer of StableLM 2.
const NFC_TOKENIZERS: [&str; 6] = ["qwen2", "qwen35", "command-r", "mpt", "olmo", "stablelm2"];

impl Vocabulary {
    /// Loads the vocabulary of the GGUF at `path`, which may be an encoder, or have no tensors.
    ///
    /// Errors: those of [`Model::open`](super::Model::open) that concern the tokenizer.
    pub fn open(path: &Path) -> Result<Vocabulary> {
        let file = GgufFile::open(path)?;
        gguf::check_vocabulary(&file)?;
        file.check_unchanged()?;
        let params = LoadParams { n_gpu_layers: 0, check_tensors: false, vocab_only: true };
        let handle = ModelHandle::load(&file, params);
        file.check_unchanged()?;
        let handle = handle.map_err(|reason| {
            let (version, reason) = (super::llama_version(), super::ffi::after_colon(&reason));
            Error::model(path, format!("llama.cpp {version} refused its vocabulary{reason}"))
                .with_hint("run again with -v to see llama.cpp's log")
        })?;
        Ok(Vocabulary::new(Arc::new(handle), &file))
    }

    /// The vocabulary of a loaded model.
    pub(super) fn new(handle: Arc<ModelHandle>, file: &GgufFile) -> Vocabulary {
        // Without this key llama.cpp assumes an id from the kind of tokenizer (11 for every BPE). In this vocabulary
        // that id may be any word, so it is not used as the EOS.
        let is_named = file.metadata().get("tokenizer.ggml.eos_token_id").is_some();
        let eos = handle.eos().filter(|_| is_named);
        let pre = file.str_if_present("tokenizer.ggml.pre").ok().flatten();
        Vocabulary {
            handle,
            path: file.path().to_path_buf(),
            eos,
            hash: hash_of(file).into(),
            nfc: false,
            expects_nfc: NFC_TOKENIZERS.into_iter().find(|&known| pre == Some(known)),
        }
    }

    /// The same vocabulary. With `nfc` it normalises texts to NFC before it tokenizes them.
    pub fn with_nfc(self, nfc: bool) -> Vocabulary {
        Vocabulary { nfc, ..self }
    }

    /// Logs a warning if some of a run's texts are not NFC and Hugging Face would tokenize them differently.
    ///
    /// The same warning is logged once in a process, although several models may read the same texts. Returns the number of such texts. It is 0 if texts are normalised, and for tokenizers without a normalizer.
    pub fn check_nfc<'a>(&self, texts: impl IntoIterator<Item = &'a str>) -> usize {
        let Some(pre) = self.expects_nfc.filter(|_| !self.nfc) else { return 0 };
        let (mut n, mut n_other) = (0, 0);
        for text in texts {
            n += 1;
            n_other += usize::from(!nfc::is_nfc(text));
        }
        let warning = format!(
            "{n_other} of {n} texts are not in Unicode's NFC form. Hugging Face normalises them before this model's \
             tokenizer ({pre}), and llama.cpp does not, so their tokens differ. --nfc normalises them"
        );
        let is_new = || LOGGED.lock().is_ok_and(|mut logged| logged.insert(warning.clone()));
        if n_other > 0 && is_new() {
            tracing::warn!("{warning}");
        }
        n_other
    }

    /// The file it was loaded from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Hash of the kind of tokenizer, its tokens and its merges, in hex.
    ///
    /// Models with the same hash give each token id the same meaning.
    pub fn hash(&self) -> &str {
        &self.hash
    }

    /// Size of the vocabulary.
    pub fn n_vocab(&self) -> usize {
        self.handle.n_vocab()
    }

    /// The BOS token that the metadata asks for before every prompt.
    ///
    /// `None` if the metadata asks for none, even if the vocabulary has one.
    pub fn bos(&self) -> Option<Token> {
        self.handle.added_begin()
    }

    /// The token that ends a text, if the metadata names one (`tokenizer.ggml.eos_token_id`).
    ///
    /// Returned even if the metadata does not ask for it after every text.
    pub fn eos(&self) -> Option<Token> {
        self.eos
    }

    /// Tokenizes a prompt, with BOS if the metadata asks for one.
    ///
    /// Special tokens are not parsed: `<s>` is plain text. No EOS is added, even if the metadata asks for one, because
    /// a text that has ended cannot be continued.
    pub fn tokenize_prompt(&self, text: &str) -> Result<Vec<Token>> {
        self.tokenize(text, true, false)
    }

    /// Tokenizes a piece of text, without BOS or EOS.
    pub fn tokenize_text(&self, text: &str) -> Result<Vec<Token>> {
        self.tokenize(text, false, false)
    }

    /// Tokenizes a text: the one place through which every text passes.
    ///
    /// With `add_bos` it gets a BOS if the metadata asks for one. With `parse_special`, `<s>` is the token and not three
    /// letters. No EOS is added.
    ///
    /// # Errors
    /// [`Error::Model`] for a text that is longer than llama.cpp can count.
    pub fn tokenize(&self, text: &str, add_bos: bool, parse_special: bool) -> Result<Vec<Token>> {
        let text = if self.nfc { nfc::to_nfc(text) } else { Cow::Borrowed(text) };
        let mut tokens = self.handle.tokenize(&text, add_bos, parse_special).ok_or_else(|| {
            Error::model(&self.path, format!("its tokenizer cannot take a text of {} bytes", text.len()))
        })?;
        if add_bos && tokens.last().copied() == self.handle.added_end() {
            tokens.pop();
        }
        Ok(tokens)
    }

    /// The bytes of one token; empty for control tokens.
    pub fn piece(&self, token: Token) -> Vec<u8> {
        self.handle.piece(token, false)
    }

    /// Like [`Vocabulary::piece`], but with the name of a control token, such as `<s>`.
    pub fn piece_or_name(&self, token: Token) -> Vec<u8> {
        self.handle.piece(token, true)
    }

    /// The text of one token, with invalid UTF-8 replaced; empty for control tokens.
    pub fn text(&self, token: Token) -> String {
        String::from_utf8_lossy(&self.piece(token)).into_owned()
    }

    /// The text of `tokens`.
    ///
    /// An incomplete character at the end is dropped; other invalid UTF-8 becomes U+FFFD.
    pub fn detokenize(&self, tokens: &[Token]) -> String {
        let bytes: Vec<u8> = tokens.iter().flat_map(|&t| self.piece(t)).collect();
        text_of(&bytes)
    }
}

/// The first 16 hex digits of the SHA-256 of a file's tokenizer.
fn hash_of(file: &GgufFile) -> String {
    let mut hash = Sha256::new();
    for key in ["tokenizer.ggml.model", "tokenizer.ggml.tokens", "tokenizer.ggml.merges"] {
        let mut add = |bytes: &[u8]| {
            // The length too, so that bytes cannot move between neighbours.
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        };
        add(key.as_bytes());
        match file.metadata().get(key) {
            Some(Value::Str(text)) => add(text.as_bytes()),
            Some(Value::Bytes(bytes)) => add(bytes),
            Some(Value::Array(array)) => {
                array.strings().into_iter().flat_map(|strings| strings.iter_bytes()).for_each(&mut add);
            }
            _ => {}
        }
    }
    crate::file::hex(&hash.finalize()[..8])
}

/// Decodes UTF-8: drops an incomplete last character, and replaces other invalid bytes.
fn text_of(bytes: &[u8]) -> String {
    let whole = match std::str::from_utf8(bytes) {
        Ok(text) => return text.to_owned(),
        // `error_len` is `None` exactly if the input ends in the middle of a character.
        Err(e) if e.error_len().is_none() => &bytes[..e.valid_up_to()],
        Err(_) => {
            let unfinished = bytes.utf8_chunks().last().is_some_and(|c| {
                !c.invalid().is_empty()
                    && std::str::from_utf8(c.invalid()).is_err_and(|e| e.error_len().is_none())
            });
            let tail = bytes.utf8_chunks().last().map_or(0, |c| c.invalid().len());
            if unfinished { &bytes[..bytes.len() - tail] } else { bytes }
        }
    };
    String::from_utf8_lossy(whole).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_incomplete_last_character_is_dropped() {
        // "né" is 6e c3 a9; "漢" is e6 bc a2.
        assert_eq!(text_of(&[0x6e, 0xc3]), "n");
        assert_eq!(text_of(&[0x6e, 0xe6, 0xbc]), "n");
        assert_eq!(text_of(&[0x6e, 0xc3, 0xa9]), "né");
    }

    #[test]
    fn invalid_bytes_are_replaced() {
        assert_eq!(text_of(&[0x61, 0xff, 0x62]), "a\u{fffd}b");
        assert_eq!(text_of(&[0x61, 0xff, 0x62, 0xe6, 0xbc]), "a\u{fffd}b");
        assert_eq!(text_of(&[0xff]), "\u{fffd}");
        assert_eq!(text_of(&[]), "");
    }
}
