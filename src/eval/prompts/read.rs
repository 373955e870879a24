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

/// Whether a file of a folder is read: it is JSON or plain text, or a table named after a language.
pub(super) fn is_prompt_file(path: &Path) -> bool {
    rows::has_rows(path) && (!rows::is_table_name(path) || language_of_name(path).is_some())
}

/// The language in a file's name: `de.txt`, `german.csv.gz`, `RTP_LX_ZH-Hans.json`, or the paper's
/// `output-rtp_lx_de.json` and `dpo_toxicity_pairwise_de_200.jsonl`.
///
/// Other names have no language: the `id` of `prompts_with_id.jsonl` does not mean Indonesian.
pub(in crate::eval) fn language_of_name(path: &Path) -> Option<&'static str> {
    let name = path.file_name()?.to_str()?.to_ascii_lowercase();
    let name = rows::uncompressed_name(&name);
    let stem = name.rsplit_once('.').map_or(name, |(stem, _)| stem);
    let code = if let Some(rest) = stem.strip_prefix("dpo_toxicity_pairwise_") {
        rest.split('_').next()?
    } else {
        let rest = ["output-rtp_lx_", "rtp_lx_"].iter().find_map(|prefix| stem.strip_prefix(prefix));
        rest.unwrap_or(stem)
    };
    language::recognise(code)
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
    let named = [&columns.prompt, &columns.language, &columns.id].map(Option::as_deref);
    let rows = Rows::open(path, "prompts", &named)?.limited();
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
    if chosen.is_none() {
        PROMPT.check_whole(fields, name, &[name]).map_err(|(reason, hint)| fail(reason, Some(hint)))?;
    }
    let id = key_of(fields, columns).map_err(|(reason, hint)| fail(reason, hint))?;
    let language = language_of(fields, columns).map_err(|(reason, hint)| fail(reason, Some(hint)))?;
    let used = [Some(name), id.as_ref().map(|(name, _)| *name), language.map(|(name, _)| name)];
    ignored.add(fields, &used.into_iter().flatten().collect::<Vec<_>>());
    let key = id.map_or_else(|| row.place.to_string(), |(_, key)| key);
    Ok(Row { line, key, language: language.map(|(_, code)| code), text: text.to_owned() })
}

/// Why a row is refused, and the hint.
type Fault = (String, Option<String>);

/// The row's own id, with the column's name.
fn key_of<'r>(
    fields: &'r Map<String, Value>,
    columns: &PromptColumns,
) -> Result<Option<(&'r str, String)>, Fault> {
    let stated = ID.stated(fields, columns.id.as_deref()).map_err(|(reason, hint)| (reason, Some(hint)))?;
    let Some((name, value)) = stated else { return Ok(None) };
    match id(value) {
        Ok(key) => Ok(Some((name, key))),
        Err(found) => {
            let hint = value.is_number().then(|| "put the ids in double quotes".to_owned());
            Err((format!("field {name:?}: expected a string or an integer, found {found}"), hint))
        }
    }
}

/// An id: a string or a whole number. `7.0`, as pandas writes whole numbers, is 7, also in a table.
///
/// # Errors
/// Describes the value found. Fractions are refused, and so are numbers that a JSON float cannot hold exactly.
pub(in crate::eval) fn id(value: &Value) -> Result<String, String> {
    match value {
        Value::String(text) => {
            let text = text.trim();
            let whole = text.strip_suffix(".0").filter(|whole| {
                (1..=15).contains(&whole.len()) && whole.bytes().all(|byte| byte.is_ascii_digit())
            });
            Ok(whole.unwrap_or(text).to_owned())
        }
        Value::Number(number) if number.is_i64() || number.is_u64() => Ok(number.to_string()),
        Value::Number(number) => match number.as_f64() {
            Some(x) if x.fract() == 0.0 && x.abs() < 9e15 => Ok((x as i64).to_string()),
            Some(x) if x.fract() == 0.0 => Err(format!("{number}, too large to be exact")),
            _ => Err(number.to_string()),
        },
        other => Err(rows::kind(other).to_owned()),
    }
}

/// The row's language, with the column's name.
fn language_of<'r>(
    fields: &'r Map<String, Value>,
    columns: &PromptColumns,
) -> Result<Option<(&'r str, &'static str)>, (String, String)> {
    let Some((name, value)) = LANGUAGE.stated(fields, columns.language.as_deref())? else { return Ok(None) };
    let refuse = |found: String| {
        let known = language::known_codes().join(", ");
        Err((format!("field {name:?}: {found}"), format!("known languages: {known}")))
    };
    let Value::String(code) = value else {
        return refuse(format!("expected a language code, found {}", rows::kind(value)));
    };
    match language::recognise(code) {
        Some(language) => Ok(Some((name, language))),
        None => refuse(format!("expected a known language code, found {code:?}")),
    }
}
