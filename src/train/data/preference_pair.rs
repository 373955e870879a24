//! Preference pairs as texts: a prompt, the chosen continuation and the rejected one.
//!
//! # Forms of a row
//! Files are JSON lines. The keys of a row decide its form; all other keys are ignored:
//!
//! | form | key that decides | prompt | chosen | rejected |
//! |---|---|---|---|---|
//! | TRL, explicit prompt; ours | `prompt` | `prompt` | `chosen` | `rejected` |
//! | the paper's (arXiv 2401.01967) | `prompt_text` | `prompt_text` | `unpert_gen_text` | `pert_gen_text` |
//! | TRL, implicit prompt | `chosen`, if neither is present | the common prefix | the rest | the rest |
//!
//! In the first two forms a continuation follows its prompt directly, without a space in between, as in the loaders
//! of both papers.
//!
//! # The implicit prompt
//! The prompt is the longest common prefix in characters, as in TRL's `extract_prompt`. A space at its end moves to
//! both answers, because most tokenizers join a space with the next word. The prefix may end inside a word: "a good"
//! and "a great" share "a g". [`tokens`](super::tokens) later moves the boundary back to where the tokens agree.
//!
//! If one text is a prefix of the other, the shorter text is the prompt. Its answer is then empty, so the pair is
//! counted and skipped. TRL leaves the last shared character in both answers in this case, by an accident of its
//! loop.
//!
//! Conversations (lists of messages) are refused, because only the user knows which chat template applies.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::text::rows;

/// A prompt with a chosen and a rejected continuation.
///
/// The continuations do not repeat the prompt, and start with the space that separates them from it, if any.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PreferencePair {
    /// The text that both continue.
    pub prompt: String,
    /// The continuation to prefer.
    pub chosen: String,
    /// The continuation to avoid.
    pub rejected: String,
}

/// SHA-256 of the pairs' texts, in hexadecimal.
pub fn sha256(pairs: &[PreferencePair]) -> String {
    let mut hash = Sha256::new();
    for text in pairs.iter().flat_map(|pair| [&pair.prompt, &pair.chosen, &pair.rejected]) {
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text.as_bytes());
    }
    crate::file::hex(&hash.finalize())
}

/// The built-in pairs: English, written for this project, with mildly insulting rejected answers.
pub fn own() -> Vec<PreferencePair> {
    parse(Path::new("own_pairs.jsonl"), include_bytes!("own_pairs.jsonl"))
        .expect("the file is built in, and a test parses it")
}

/// Reads the pairs of a file, or of every `.jsonl` file of a folder in the order of their names.
///
/// # Errors
/// [`Error::Io`]; [`Error::Input`], with file and line, for a row in none of the
/// [supported forms](self#forms-of-a-row), a file without rows or a folder without files.
pub fn read(path: &Path) -> Result<Vec<PreferencePair>> {
    let metadata = std::fs::metadata(path).map_err(Error::io("read", path))?;
    if !metadata.is_dir() {
        return read_file(path);
    }
    let mut pairs = Vec::new();
    for file in files(path)? {
        pairs.extend(read_file(&file)?);
    }
    Ok(pairs)
}

/// The `.jsonl` files of a folder, sorted; hidden files are skipped.
fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(Error::io("read", folder))? {
        let path = entry.map_err(Error::io("read", folder))?.path();
        let is_hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
        if path.extension().is_some_and(|ending| ending == "jsonl") && !is_hidden && !path.is_dir() {
            files.push(path);
        }
    }
    files.sort();
    if files.is_empty() {
        return Err(Error::input(folder, None, "expected files of preference pairs (.jsonl), found none")
            .with_hint("give the file itself if its name ends differently"));
    }
    Ok(files)
}

fn read_file(path: &Path) -> Result<Vec<PreferencePair>> {
    parse(path, &std::fs::read(path).map_err(Error::io("read", path))?)
}

fn parse(path: &Path, bytes: &[u8]) -> Result<Vec<PreferencePair>> {
    let text = rows::decode(path, bytes)?;
    let mut pairs = Vec::new();
    for (number, line) in rows::numbered(text) {
        let refuse =
            |(reason, hint): Fault| Error::input(path, Some(number), reason).with_optional_hint(hint);
        pairs.push(row(line).map_err(refuse)?);
    }
    if pairs.is_empty() {
        return Err(
            Error::input(path, None, "expected preference pairs, found an empty file").with_hint(FORMS)
        );
    }
    Ok(pairs)
}

/// Why a row is refused, and the hint.
type Fault = (String, Option<&'static str>);

const FORMS: &str = "a row is {\"prompt\", \"chosen\", \"rejected\"}, the paper's {\"prompt_text\", \
    \"unpert_gen_text\", \"pert_gen_text\"}, or {\"chosen\", \"rejected\"} that start with the same prompt";

fn row(line: &str) -> Result<PreferencePair, Fault> {
    let object: Map<String, Value> = match serde_json::from_str(line) {
        Ok(Value::Object(object)) => object,
        Ok(Value::Array(_)) => {
            return Err((
                "expected a JSON object, found a list".into(),
                Some("write one object per line: jq -c '.[]' FILE"),
            ));
        }
        Ok(_) => return Err(("expected a JSON object".into(), Some(FORMS))),
        // An object that spans several lines fails on its first line.
        Err(e) => {
            return Err((
                format!("expected a JSON object: {e}"),
                Some("write one whole object per line: jq -c . FILE"),
            ));
        }
    };
    let has = |key: &str| object.contains_key(key);
    let three = |prompt: &str, chosen: &str, rejected: &str| {
        Ok(PreferencePair {
            prompt: field(&object, prompt)?.to_owned(),
            chosen: field(&object, chosen)?.to_owned(),
            rejected: field(&object, rejected)?.to_owned(),
        })
    };
    match (has("prompt"), has("prompt_text"), has("chosen")) {
        // The `pairs` command of this program, and TRL.
        (true, false, _) | (true, true, true) => three("prompt", "chosen", "rejected"),
        (_, true, _) => three("prompt_text", "unpert_gen_text", "pert_gen_text"),
        (false, false, true) => Ok(implicit(field(&object, "chosen")?, field(&object, "rejected")?)),
        (false, false, false) => {
            let found: Vec<&str> = object.keys().map(String::as_str).take(8).collect();
            Err((format!("expected a preference pair, found the keys {found:?}"), Some(FORMS)))
        }
    }
}

fn field<'a>(object: &'a Map<String, Value>, key: &str) -> Result<&'a str, Fault> {
    match object.get(key) {
        Some(Value::String(text)) => Ok(text),
        Some(Value::Array(_) | Value::Object(_)) => Err((
            format!("expected \"{key}\" to be a string, found messages of a conversation"),
            Some("apply the model's chat template first"),
        )),
        Some(other) => Err((format!("expected \"{key}\" to be a string, found {other}"), None)),
        None => {
            let found: Vec<&str> = object.keys().map(String::as_str).take(8).collect();
            Err((format!("expected a key \"{key}\", found only {found:?}"), Some(FORMS)))
        }
    }
}

/// Splits two whole texts into their common prompt and the two answers; see
/// [the implicit prompt](self#the-implicit-prompt).
fn implicit(chosen: &str, rejected: &str) -> PreferencePair {
    let n_shared: usize =
        chosen.chars().zip(rejected.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum();
    let shared = &chosen[..n_shared];
    let is_whole = n_shared == chosen.len() || n_shared == rejected.len();
    let prompt = if is_whole { shared } else { shared.strip_suffix(' ').unwrap_or(shared) };
    PreferencePair {
        prompt: prompt.to_owned(),
        chosen: chosen[prompt.len()..].to_owned(),
        rejected: rejected[prompt.len()..].to_owned(),
    }
}

#[cfg(test)]
mod tests;
