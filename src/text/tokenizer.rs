//! A Hugging Face `tokenizer.json`. No panic of the crate `tokenizers` leaves this module.

use std::cell::Cell;
use std::io::Read;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Once;

use serde::Deserialize;
use serde::de::IgnoredAny;
use sha2::{Digest, Sha256};
use tokenizers::{ModelWrapper, Tokenizer};

use crate::error::{Error, Result};

/// The largest file read. The largest vocabularies, of 260,000 tokens, take 35 MB.
const MAX_BYTES: u64 = 512 << 20;

/// Texts that a usable tokenizer splits without an error.
const TRIALS: [&str; 4] = ["a", " Hello, world! 1234\n\n\tgrößer", "你好，नमस्ते 🎉\u{200d}", ""];

/// A tokenizer of a file.
#[derive(Debug, Clone)]
pub struct JsonTokenizer {
    path: PathBuf,
    sha256: String,
    tokenizer: Box<Tokenizer>,
}

/// The parts without which a file is no tokenizer.
#[derive(Deserialize)]
struct Parts {
    model: Option<IgnoredAny>,
}

impl JsonTokenizer {
    /// Reads a `tokenizer.json`. Truncation, padding and BPE dropout are switched off: every token of a text counts,
    /// and always the same ones.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Input`] for a file that is no tokenizer, or that the crate `tokenizers` cannot use.
    pub fn read(path: &Path) -> Result<JsonTokenizer> {
        let file = std::fs::File::open(path).map_err(Error::io("read", path))?;
        let mut bytes = Vec::new();
        file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
        JsonTokenizer::from_bytes(path, &bytes)
    }

    /// Reads the bytes of a `tokenizer.json`. `path` names it in errors.
    ///
    /// # Errors
    /// As [`JsonTokenizer::read`].
    pub fn from_bytes(path: &Path, bytes: &[u8]) -> Result<JsonTokenizer> {
        // Windows programs put a byte-order mark before JSON.
        let json = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
        check(path, json)?;
        let refuse = |reason: String| {
            Error::input(path, None, format!("cannot use this tokenizer.json: {reason}"))
                .with_hint("download the file again, or use the tokenizer.json of another model")
        };
        let tokenizer = caught(|| {
            let mut tokenizer = Tokenizer::from_bytes(json)?;
            tokenizer.with_truncation(None)?;
            tokenizer.with_padding(None);
            if let ModelWrapper::BPE(bpe) = tokenizer.get_model()
                && bpe.dropout.is_some()
            {
                let mut bpe = bpe.clone();
                bpe.dropout = None;
                tokenizer.with_model(ModelWrapper::BPE(bpe));
            }
            Ok(tokenizer)
        })
        .map_err(&refuse)?;
        let sha256 = crate::file::hex(&Sha256::digest(bytes));
        let tokenizer = JsonTokenizer { path: path.to_path_buf(), sha256, tokenizer: Box::new(tokenizer) };
        let mut n_tokens = 0;
        for text in TRIALS {
            n_tokens += tokenizer.tokens(text)?.len();
        }
        if n_tokens == 0 {
            return Err(refuse("it splits no text into tokens".into()));
        }
        Ok(tokenizer)
    }

    /// The SHA-256 of the file, in hexadecimal.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The tokens of `text`, each decoded on its own. Some may be empty.
    ///
    /// # Errors
    /// [`Error::Input`] if the tokenizer cannot split the text.
    pub fn tokens(&self, text: &str) -> Result<Vec<String>> {
        let tokenizer = &self.tokenizer;
        let tokens = caught(|| {
            let encoding = tokenizer.encode_fast(text, false)?;
            let decode = |&id: &u32| {
                let text = tokenizer.decode(&[id], true).unwrap_or_default();
                // A token can be part of a character; it is spelled as in the vocabulary.
                match text.contains('\u{fffd}') {
                    true => tokenizer.id_to_token(id).unwrap_or(text),
                    false => text.trim_start_matches(' ').to_owned(),
                }
            };
            Ok(encoding.get_ids().iter().map(decode).collect())
        });
        tokens.map_err(|reason| {
            let start: String = text.chars().take(40).collect();
            let reason = format!("this tokenizer.json cannot split the text {start:?}: {reason}");
            Error::input(&self.path, None, reason).with_hint("use the tokenizer.json of another model")
        })
    }
}

/// Checks that the bytes are whole JSON, and a tokenizer.
fn check(path: &Path, bytes: &[u8]) -> Result<()> {
    let refuse = |reason: &str, hint: &str| {
        let reason = format!("expected a Hugging Face tokenizer.json, found {reason}");
        Err(Error::input(path, None, reason).with_hint(hint))
    };
    let download = "download the file of that name from a model's repository";
    if bytes.len() as u64 > MAX_BYTES {
        return refuse(&format!("more than {} MiB", MAX_BYTES >> 20), download);
    }
    if bytes.trim_ascii().is_empty() {
        return refuse("an empty file", download);
    }
    if bytes.starts_with(b"GGUF") {
        return refuse("a GGUF model", "give the model with --base; its own vocabulary is then used");
    }
    if bytes.starts_with(b"version https://git-lfs.github.com/spec/") {
        return refuse(
            "a Git LFS pointer instead of the file",
            "fetch the file: git lfs pull, or download it",
        );
    }
    match serde_json::from_slice::<Parts>(bytes) {
        Ok(Parts { model: Some(_) }) => Ok(()),
        Ok(Parts { model: None }) => refuse("JSON without a \"model\"", download),
        Err(error) if error.is_eof() => refuse(
            &format!("a file that is cut off: {error}"),
            "download it again, and compare its size with the source",
        ),
        Err(error) if error.is_data() => refuse(&format!("other JSON: {error}"), download),
        Err(error) => refuse(&format!("no JSON: {error}"), download),
    }
}

thread_local! {
    /// Whether this thread's panics are caught by [`caught`], and not printed.
    static IS_CAUGHT: Cell<bool> = const { Cell::new(false) };
}

/// Runs calls of the crate `tokenizers`. An error or a panic becomes its reason in words.
fn caught<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    static QUIET: Once = Once::new();
    QUIET.call_once(|| {
        let print = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !IS_CAUGHT.get() {
                print(info);
            }
        }));
    });
    let before = IS_CAUGHT.replace(true);
    // Sound: a tokenizer that panicked while it was made is dropped, and splitting changes only its caches.
    let result = catch_unwind(AssertUnwindSafe(call));
    IS_CAUGHT.set(before);
    match result {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(panic) => {
            let words = panic.downcast_ref::<String>().map(String::as_str);
            let words = words.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no reason given");
            Err(format!("the crate tokenizers failed: {words}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn tiny() -> Value {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("gguf/tiny/tokenizer.json");
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    }

    fn read(json: &Value) -> Result<JsonTokenizer> {
        JsonTokenizer::from_bytes(Path::new("t.json"), &serde_json::to_vec(json).unwrap())
    }

    #[test]
    fn truncation_padding_and_dropout_change_no_count() {
        let text = "one two three four five six seven";
        let whole = read(&tiny()).unwrap().tokens(text).unwrap();
        let mut changed = tiny();
        changed["truncation"] =
            json!({"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0});
        changed["padding"] = json!({"strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": null,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"});
        changed["model"]["dropout"] = json!(0.9);
        assert!(whole.len() > 3);
        for _ in 0..5 {
            assert_eq!(read(&changed).unwrap().tokens(text).unwrap(), whole);
        }
    }

    #[test]
    fn rejects_a_file_cut_off_at_any_byte_without_a_panic() {
        let bytes = serde_json::to_vec_pretty(&tiny()).unwrap();
        for end in (0..bytes.len() - 1).step_by(13) {
            let error = JsonTokenizer::from_bytes(Path::new("t.json"), &bytes[..end]).unwrap_err();
            assert!(error.to_string().starts_with("t.json: expected a Hugging Face"), "{end}: {error}");
            assert!(error.hint().is_some());
        }
    }

    #[test]
    fn rejects_a_tokenizer_without_tokens_and_skips_a_byte_order_mark() {
        let mut changed = tiny();
        changed["model"] = json!({"type": "BPE", "vocab": {}, "merges": []});
        changed["added_tokens"] = json!([]);
        changed["post_processor"] = Value::Null;
        let error = read(&changed).unwrap_err();
        assert!(error.to_string().contains("it splits no text into tokens"), "{error}");
        let bytes = [b"\xef\xbb\xbf", serde_json::to_vec(&tiny()).unwrap().as_slice()].concat();
        assert!(JsonTokenizer::from_bytes(Path::new("t.json"), &bytes).is_ok());
    }

    #[test]
    fn rejects_a_changed_part_without_a_panic() {
        let parts = ["model", "decoder", "pre_tokenizer", "normalizer", "post_processor", "added_tokens"];
        for part in parts {
            for value in [
                json!({"type": "Sequence"}),
                json!([1]),
                json!("x"),
                json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
                json!({"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}),
            ] {
                let mut changed = tiny();
                changed[part] = value;
                if let Err(error) = read(&changed) {
                    assert!(error.to_string().starts_with("t.json: "), "{error}");
                }
            }
        }
        let mut no_unknown = tiny();
        no_unknown["model"] = json!({"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"});
        assert!(read(&no_unknown).unwrap_err().to_string().contains("cannot split the text"));
    }
}
