//! Reads the rows of one prompt file, in any form of the [parent module's table](super#forms-of-a-file).

use std::fs;
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::text::rows::{self, ID, Ignored, LANGUAGE, PROMPT, Rows};
use crate::text::{chat_markers, language};

use super::PromptColumns;

/// One prompt as read from its file.
#[derive(Debug)]
pub(super) struct Row {
    /// The line on which the row begins, from 1.
    pub line: usize,
    /// The row's own id, else its line number or its position in the file.
    pub key: String,
    /// The row's language, if it has one.
    pub language: Option<&'static str>,
    /// The text, unchanged.
    pub text: String,
}

/// Whether a file of a folder is read: it has an extension of prompt files, or is a table named after a language.
pub(super) fn is_prompt_file(path: &Path) -> bool {
    match rows::extension(path).as_str() {
        "jsonl" | "json" | "ndjson" | "txt" => true,
        "csv" | "tsv" => language_of_name(path).is_some(),
        _ => false,
    }
}

/// The language in a file's name: `de.txt`, `de.csv.gz`, `RTP_LX_ZH-Hans.json`, or the paper's
/// `dpo_toxicity_pairwise_de_200.jsonl`.
///
/// Other names have no language: the `id` of `prompts_with_id.jsonl` does not mean Indonesian.
pub(super) fn language_of_name(path: &Path) -> Option<&'static str> {
    let name = path.file_name()?.to_str()?.to_ascii_lowercase();
    let name = rows::uncompressed_name(&name);
    let stem = name.rsplit_once('.').map_or(name, |(stem, _)| stem);
    let code = if let Some(rest) = stem.strip_prefix("rtp_lx_") {
        rest
    } else if let Some(rest) = stem.strip_prefix("dpo_toxicity_pairwise_") {
        rest.split('_').next()?
    } else {
        stem
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
pub(super) fn read_rows(path: &Path, columns: &PromptColumns) -> Result<Vec<Row>> {
    if fs::metadata(path).map_err(Error::io("read", path))?.is_dir() {
        return Err(folder_for_file(path));
    }
    let rows = Rows::open(path, "prompts")?.limited();
    let (is_plain, is_table) = (rows.is_plain(), rows.header().is_some_and(|header| !header.is_empty()));
    let (mut found, mut ignored, mut marked) =
        (Vec::new(), Ignored::default(), chat_markers::Count::default());
    for row in rows {
        let row = row?;
        let is_blank = |value: &Value| value.as_str().is_some_and(|text| text.trim().is_empty());
        if is_plain && row.fields.values().all(is_blank) {
            continue;
        }
        let prompt = prompt(path, &row, columns, &mut ignored)?;
        marked.add(&[&prompt.text]);
        found.push(prompt);
    }
    if found.is_empty() {
        let what = if is_table { "the table has only a header" } else { "the file is empty" };
        return Err(Error::input(path, None, format!("expected prompts, found none: {what}")));
    }
    if found.iter().all(|row| row.text.trim() == "NA") {
        return Err(Error::input(
            path,
            None,
            format!("expected prompts, found \"NA\" in every one of {} rows", found.len()),
        )
        .with_hint("RTP-LX's English file at commit d64f109 is like this; use the one of commit f10b92a"));
    }
    ignored.log(path);
    marked.warn(path, "prompts");
    Ok(found)
}

fn prompt(path: &Path, row: &rows::Row, columns: &PromptColumns, ignored: &mut Ignored) -> Result<Row> {
    let (fields, line) = (&row.fields, row.line);
    let fail = |reason: String, hint: Option<String>| {
        Error::input(path, Some(line), reason).with_optional_hint(hint)
    };
    let chosen = columns.prompt.as_deref();
    if chosen.is_none() && fields.contains_key("generated_text") {
        return Err(fail(
            "expected a prompt, found a generation (field \"generated_text\"): this is a generations file, not a \
             prompt file"
                .into(),
            Some("give the prompts behind it; to score generations, use `detox-gguf score`".into()),
        ));
    }
    let Some((name, value)) = PROMPT.find(fields, chosen) else {
        if let Some((reason, hint)) = rows::chat(fields) {
            return Err(fail(reason, hint.map(str::to_owned)));
        }
        let (reason, hint) = PROMPT.absent(fields, chosen);
        return Err(fail(reason, Some(hint)));
    };
    let text = rows::text(name, value).map_err(|(reason, hint)| fail(reason, hint.map(str::to_owned)))?;
    if text.trim().is_empty() {
        return Err(fail("expected a prompt, found an empty text".into(), None));
    }
    if chosen.is_none()
        && let Some(dropped) = rows::dropped(fields, &[name])
    {
        let reason = format!(
            "expected the whole prompt in the column {name:?}, found another part of it in {dropped:?}"
        );
        let hint = format!(
            "put both into one column, or read {name:?} alone with --prompt-column {}",
            rows::argument(name)
        );
        return Err(fail(reason, Some(hint)));
    }
    let id = key_of(fields, columns).map_err(|reason| fail(reason, None))?;
    let language = language_of(fields, columns).map_err(|reason| {
        fail(reason, Some(format!("known languages: {}", language::known_codes().join(", "))))
    })?;
    let used = [Some(name), id.as_ref().map(|(name, _)| *name), language.map(|(name, _)| name)];
    ignored.add(fields, &used.into_iter().flatten().collect::<Vec<_>>());
    let key = id.map_or_else(|| row.place.to_string(), |(_, key)| key);
    Ok(Row { line, key, language: language.map(|(_, code)| code), text: text.to_owned() })
}

/// The row's own id: a string or an integer, with the column's name. `3.0`, as pandas writes integers, is 3.
fn key_of<'r>(
    fields: &'r Map<String, Value>,
    columns: &PromptColumns,
) -> Result<Option<(&'r str, String)>, String> {
    let chosen = columns.id.as_deref();
    let Some((name, value)) = ID.optional(fields, chosen) else {
        return match ID.find(fields, chosen) {
            None if chosen.is_some() => Err(ID.absent(fields, chosen).0),
            _ => Ok(None),
        };
    };
    let key = match value {
        Value::String(key) => key.trim().to_owned(),
        Value::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
            (Some(key), _, _) => key.to_string(),
            (_, Some(key), _) => key.to_string(),
            (_, _, Some(key)) if key.fract() == 0.0 => format!("{key:.0}"),
            _ => return Err(format!("field {name:?}: expected a string or an integer, found {number}")),
        },
        other => {
            return Err(format!(
                "field {name:?}: expected a string or an integer, found {}",
                rows::kind(other)
            ));
        }
    };
    Ok(Some((name, key)))
}

/// The row's language, with the column's name.
fn language_of<'r>(
    fields: &'r Map<String, Value>,
    columns: &PromptColumns,
) -> Result<Option<(&'r str, &'static str)>, String> {
    let chosen = columns.language.as_deref();
    let Some((name, value)) = LANGUAGE.optional(fields, chosen) else {
        return match chosen {
            Some(_) if LANGUAGE.find(fields, chosen).is_none() => Err(LANGUAGE.absent(fields, chosen).0),
            _ => Ok(None),
        };
    };
    let Value::String(code) = value else {
        return Err(format!("field {name:?}: expected a language code, found {}", rows::kind(value)));
    };
    match language::recognise(code) {
        Some(language) => Ok(Some((name, language))),
        None => Err(format!("field {name:?}: expected a known language code, found {code:?}")),
    }
}
