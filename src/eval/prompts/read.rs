//! Reads the rows of one prompt file, in any form of the [parent module's table](super#forms-of-a-file).

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::text::{language, rows};

/// Bytes checked before a file is read whole: enough to recognise a binary file.
const SNIFF_BYTES: u64 = 8192;

/// Fields with the text; the first one present wins.
const TEXT_FIELDS: [&str; 4] = ["Prompt", "prompt", "prompt_text", "text"];
/// Fields with the row's own id.
const ID_FIELDS: [&str; 4] = ["Index", "index", "id", "ID"];
/// Fields with the row's language.
const LANGUAGE_FIELDS: [&str; 4] = ["Locale", "locale", "language", "lang"];

const JSON_HINT: &str = "give one JSON object per line, or one JSON array of objects; name plain text .txt";

/// One prompt as read from its file.
#[derive(Debug)]
pub(super) struct Row {
    /// The line on which the row begins, from 1.
    pub line: usize,
    /// The row's own id, else its line number or its position in the array.
    pub key: String,
    /// The row's language, if it has one.
    pub language: Option<&'static str>,
    /// The text, unchanged.
    pub text: String,
}

/// Whether the file has an extension of prompt files.
pub(super) fn is_prompt_file(path: &Path) -> bool {
    matches!(extension(path).as_str(), "jsonl" | "json" | "ndjson" | "txt")
}

fn extension(path: &Path) -> String {
    path.extension().map(|extension| extension.to_string_lossy().to_ascii_lowercase()).unwrap_or_default()
}

/// The language in a file's name: `de.txt`, `RTP_LX_ZH-Hans.json`, or the paper's
/// `dpo_toxicity_pairwise_de_200.jsonl`.
///
/// Other names have no language: the `id` of `prompts_with_id.jsonl` does not mean Indonesian.
pub(super) fn language_of_name(path: &Path) -> Option<&'static str> {
    let stem = path.file_stem()?.to_str()?.to_ascii_lowercase();
    let code = if let Some(rest) = stem.strip_prefix("rtp_lx_") {
        rest
    } else if let Some(rest) = stem.strip_prefix("dpo_toxicity_pairwise_") {
        rest.split('_').next()?
    } else {
        &stem
    };
    language::normalize(code)
}

/// The row's language, else the file name's. If the row has `zh` and the name `zh-hant`, the name wins.
pub(super) fn more_specific(row: Option<&'static str>, name: Option<&'static str>) -> Option<&'static str> {
    match (row, name) {
        (Some(row), Some(name)) if name.strip_prefix(row).is_some_and(|rest| rest.starts_with('-')) => {
            Some(name)
        }
        (row, name) => row.or(name),
    }
}

/// The error for a folder in place of a file.
pub(super) fn folder_for_file(path: &Path) -> Error {
    Error::input(path, None, "expected a prompt file, found a folder")
        .with_hint("name one of the files in it")
}

/// Reads and checks every row of a file.
///
/// # Errors
/// [`Error::Input`] for a bad row and for a file without rows; [`Error::Io`].
pub(super) fn read_rows(path: &Path) -> Result<Vec<Row>> {
    let bytes = read_bytes(path)?;
    let text = rows::decode(path, &bytes)?;
    let first = text.trim_start().chars().next();
    let is_json = match extension(path).as_str() {
        "jsonl" | "json" | "ndjson" => true,
        "txt" => false,
        _ => matches!(first, Some('{' | '[')),
    };
    let rows = match (is_json, first) {
        (_, None) => Vec::new(),
        (true, Some('[')) => read_array(path, text)?,
        (true, _) => read_lines(path, text)?,
        (false, _) => read_text(path, text)?,
    };
    if rows.is_empty() {
        return Err(Error::input(path, None, "expected prompts, found none: the file is empty"));
    }
    if rows.iter().all(|row| row.text.trim() == "NA") {
        return Err(Error::input(
            path,
            None,
            format!("expected prompts, found \"NA\" in every one of {} rows", rows.len()),
        )
        .with_hint("RTP-LX's English file at commit d64f109 is like this; use the one of commit f10b92a"));
    }
    Ok(rows)
}

fn read_bytes(path: &Path) -> Result<Vec<u8>> {
    if fs::metadata(path).map_err(Error::io("read", path))?.is_dir() {
        return Err(folder_for_file(path));
    }
    let mut file = File::open(path).map_err(Error::io("read", path))?;
    let mut bytes = Vec::new();
    (&mut file).take(SNIFF_BYTES).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    // Refuse a model before reading gigabytes of it.
    if bytes.starts_with(b"GGUF") {
        return Err(Error::input(path, None, "expected a text file of prompts, found a GGUF model"));
    }
    if bytes.contains(&0) {
        return Err(Error::input(
            path,
            None,
            "expected text in UTF-8, found NUL bytes (UTF-16 text or a binary file)",
        )
        .with_hint("save the file as UTF-8"));
    }
    file.read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    Ok(bytes)
}

fn read_text(path: &Path, text: &str) -> Result<Vec<Row>> {
    let mut found = Vec::new();
    for (number, line) in rows::numbered(text) {
        // JSON in a file with the wrong name must not become prompts, braces and all.
        if line.trim_start().starts_with('{') && serde_json::from_str::<Map<String, Value>>(line).is_ok() {
            return Err(Error::input(
                path,
                Some(number),
                "expected plain text, one prompt a line, found a JSON object",
            )
            .with_hint("name the file .jsonl"));
        }
        found.push(Row { line: number, key: number.to_string(), language: None, text: line.to_owned() });
    }
    Ok(found)
}

fn read_lines(path: &Path, text: &str) -> Result<Vec<Row>> {
    let one = |(number, line): (usize, &str)| {
        let value = serde_json::from_str(line).map_err(|error| json_error(path, number, &error))?;
        row(path, number, number, value)
    };
    rows::numbered(text).map(one).collect()
}

fn read_array(path: &Path, text: &str) -> Result<Vec<Row>> {
    let values: Vec<Value> =
        serde_json::from_str(text).map_err(|error| json_error(path, error.line(), &error))?;
    let lines = element_lines(text);
    values
        .into_iter()
        .zip(lines)
        .enumerate()
        .map(|(i, (value, line))| row(path, line, i + 1, value))
        .collect()
}

/// The line on which each element of a valid JSON array begins. serde_json does not keep positions.
fn element_lines(array: &str) -> Vec<usize> {
    let (mut line, mut depth, mut in_string, mut escaped, mut awaited) = (1, 0usize, false, false, false);
    let mut lines = Vec::new();
    for byte in array.bytes() {
        if byte == b'\n' {
            line += 1;
        }
        if byte.is_ascii_whitespace() {
            continue;
        }
        if in_string {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => in_string = false,
                _ => {}
            }
            continue;
        }
        if awaited && byte != b']' {
            lines.push(line);
        }
        awaited = false;
        match byte {
            b'[' | b'{' => {
                depth += 1;
                awaited = depth == 1;
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            b'"' => in_string = true,
            b',' => awaited = depth == 1,
            _ => {}
        }
    }
    lines
}

fn json_error(path: &Path, line: usize, error: &serde_json::Error) -> Error {
    let words = error.to_string();
    // Remove serde_json's line number: it counts from the start of the row, not of the file.
    let words = words.rsplit_once(" at line ").map_or(words.as_str(), |(words, _)| words);
    Error::input(
        path,
        Some(line),
        format!("expected JSON, found an error at column {}: {words}", error.column()),
    )
    .with_hint(JSON_HINT)
}

fn row(path: &Path, line: usize, place: usize, value: Value) -> Result<Row> {
    let fail = |reason: String, hint: Option<String>| Error::Input {
        path: path.to_path_buf(),
        line: Some(line),
        reason,
        hint,
    };
    let Value::Object(fields) = value else {
        return Err(fail(
            format!("expected a JSON object with a prompt, found {}", kind(&value)),
            Some(JSON_HINT.into()),
        ));
    };
    if fields.contains_key("generated_text") {
        return Err(fail(
            "expected a prompt, found a generation (field \"generated_text\"): this is a generations file, not a \
             prompt file"
                .into(),
            Some("give the prompts behind it; to score generations, use `detox-gguf score`".into()),
        ));
    }
    let text = text_of(&fields).map_err(|reason| fail(reason, None))?;
    if text.trim().is_empty() {
        return Err(fail("expected a prompt, found an empty text".into(), None));
    }
    let key = key_of(&fields).map_err(|reason| fail(reason, None))?;
    let language = language_of(&fields).map_err(|reason| {
        fail(reason, Some(format!("known languages: {}", language::known_codes().join(", "))))
    })?;
    Ok(Row { line, key: key.unwrap_or_else(|| place.to_string()), language, text: text.to_owned() })
}

fn text_of(fields: &Map<String, Value>) -> Result<&str, String> {
    let Some((name, value)) = TEXT_FIELDS.iter().find_map(|name| Some((name, fields.get(*name)?))) else {
        let found: Vec<String> = fields.keys().take(8).map(|name| format!("{name:?}")).collect();
        return Err(format!(
            "expected a prompt in a field \"Prompt\", \"prompt\", \"prompt_text\" or \"text\", found {}",
            if found.is_empty() { "no fields".into() } else { format!("only {}", found.join(", ")) }
        ));
    };
    match value {
        Value::String(text) => Ok(text),
        Value::Object(prompt) => match prompt.get("text") {
            Some(Value::String(text)) => Ok(text),
            Some(other) => Err(format!("field \"{name}.text\": expected a string, found {}", kind(other))),
            None => Err(format!("field {name:?}: expected \"text\" in it, found none")),
        },
        other => Err(format!("field {name:?}: expected a string, found {}", kind(other))),
    }
}

/// The row's own id: a string or an integer. `3.0`, as pandas writes integers, is 3.
fn key_of(fields: &Map<String, Value>) -> Result<Option<String>, String> {
    let Some((name, value)) = present(fields, &ID_FIELDS) else { return Ok(None) };
    let key = match value {
        Value::String(key) => key.trim().to_owned(),
        Value::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
            (Some(key), _, _) => key.to_string(),
            (_, Some(key), _) => key.to_string(),
            (_, _, Some(key)) if key.fract() == 0.0 => format!("{key:.0}"),
            _ => return Err(format!("field {name:?}: expected a string or an integer, found {number}")),
        },
        other => {
            return Err(format!("field {name:?}: expected a string or an integer, found {}", kind(other)));
        }
    };
    if key.is_empty() {
        return Err(format!("field {name:?}: expected an id, found an empty string"));
    }
    Ok(Some(key))
}

fn language_of(fields: &Map<String, Value>) -> Result<Option<&'static str>, String> {
    let Some((name, value)) = present(fields, &LANGUAGE_FIELDS) else { return Ok(None) };
    let Value::String(code) = value else {
        return Err(format!("field {name:?}: expected a language code, found {}", kind(value)));
    };
    match language::normalize(code) {
        Some(language) => Ok(Some(language)),
        None => Err(format!("field {name:?}: expected a known language code, found {code:?}")),
    }
}

/// The first of the fields that the row has. A null field counts as absent.
fn present<'a>(fields: &'a Map<String, Value>, names: &[&'static str]) -> Option<(&'static str, &'a Value)> {
    names.iter().find_map(|name| Some((*name, fields.get(*name).filter(|value| !value.is_null())?)))
}

/// The type of a JSON value in words.
fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
