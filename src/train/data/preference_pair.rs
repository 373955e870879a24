//! Preference pairs: a prompt, the continuation to prefer, and the one to avoid.
//!
//! # Forms of a row
//! JSON lines; the keys of each row tell its form, and other keys are left alone:
//!
//! | form | recognised by | prompt | chosen | rejected |
//! |---|---|---|---|---|
//! | TRL, explicit prompt; ours | `prompt` | `prompt` | `chosen` | `rejected` |
//! | the paper's (arXiv 2401.01967) | `prompt_text` | `prompt_text` | `unpert_gen_text` | `pert_gen_text` |
//! | TRL, implicit prompt | `chosen` without either | what both begin with | the rest | the rest |
//!
//! In the first two, a continuation is put behind its prompt as it is, without a space between them: the
//! loaders of both papers do so.
//!
//! # The implicit prompt
//! As TRL's `extract_prompt`: the longest prefix that both texts share, counted in characters, less a space
//! at its end, which then begins both answers (most tokenizers join a space with the word after it). It
//! is not cut back to the start of a word: "a good" and "a great" share "a g". [`tokens`](super::tokens)
//! then moves the boundary back to where the tokens agree. Where one text begins the other, TRL leaves the
//! last shared character in both answers, by an accident of its loop; here the shorter text is the prompt,
//! and its answer, being empty, is counted and skipped.
//!
//! Conversations (lists of messages) are refused: which template turns them into text is for the user
//! to say.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// A prompt with the continuation to prefer and the one to avoid.
///
/// Texts, as the file has them: chosen and rejected without the prompt, with the space between, if any.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PreferencePair {
    /// What both continue.
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

/// The program's own pairs: English, in the project's own words, the rejected ones mildly insulting.
pub fn own() -> Vec<PreferencePair> {
    parse(Path::new("own_pairs.jsonl"), include_bytes!("own_pairs.jsonl"))
        .expect("the file is part of the program, and a test reads it")
}

/// Reads pairs in file order, from one file or from every `.jsonl` file of a folder, by name.
///
/// # Errors
/// [`Error::Io`]; [`Error::Input`] with file and line for a row of no form in the
/// [module's table](self#forms-of-a-row), and for a file without rows or a folder without files.
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

/// The `.jsonl` files of a folder, sorted, without hidden ones.
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
            .with_hint("name the file itself, whatever its ending"));
    }
    Ok(files)
}

fn read_file(path: &Path) -> Result<Vec<PreferencePair>> {
    parse(path, &std::fs::read(path).map_err(Error::io("read", path))?)
}

fn parse(path: &Path, bytes: &[u8]) -> Result<Vec<PreferencePair>> {
    let text = std::str::from_utf8(bytes).map_err(|e| {
        let line = bytes[..e.valid_up_to()].iter().filter(|&&byte| byte == b'\n').count() + 1;
        Error::input(path, Some(line), "expected UTF-8, found bytes that are no text")
    })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut pairs = Vec::new();
    for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let fault = |(reason, hint): Fault| Error::Input {
            path: path.to_path_buf(),
            line: Some(i + 1),
            reason,
            hint: hint.map(str::to_owned),
        };
        pairs.push(row(line).map_err(fault)?);
    }
    if pairs.is_empty() {
        return Err(
            Error::input(path, None, "expected preference pairs, found an empty file").with_hint(FORMS)
        );
    }
    Ok(pairs)
}

/// What is wrong with a row, and the cure.
type Fault = (String, Option<&'static str>);

const FORMS: &str = "a row is {\"prompt\", \"chosen\", \"rejected\"}, the paper's {\"prompt_text\", \
    \"unpert_gen_text\", \"pert_gen_text\"}, or {\"chosen\", \"rejected\"} that begin with the same prompt";

fn row(line: &str) -> Result<PreferencePair, Fault> {
    let object: Map<String, Value> = match serde_json::from_str(line) {
        Ok(Value::Object(object)) => object,
        Ok(Value::Array(_)) => {
            return Err((
                "expected a JSON object, found a list".into(),
                Some("write one object a line: jq -c '.[]' FILE"),
            ));
        }
        Ok(_) => return Err(("expected a JSON object".into(), Some(FORMS))),
        // A file that is laid out over many lines fails on its first.
        Err(e) => {
            return Err((
                format!("expected a JSON object: {e}"),
                Some("one whole object a line: jq -c . FILE turns other JSON into that"),
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
        // `pairs` of this program, and TRL.
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
            format!("expected \"{key}\" to be a text, found messages of a conversation"),
            Some("turn conversations into texts with the model's chat template first"),
        )),
        Some(other) => Err((format!("expected \"{key}\" to be a text, found {other}"), None)),
        None => {
            let found: Vec<&str> = object.keys().map(String::as_str).take(8).collect();
            Err((format!("expected a \"{key}\", found only the keys {found:?}"), Some(FORMS)))
        }
    }
}

/// Splits two whole texts into their common prompt and what follows it; see the
/// [module](self#the-implicit-prompt).
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
