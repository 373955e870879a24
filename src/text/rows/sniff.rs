//! Recognises the form of a file by its content, and by its name where the content leaves a choice.

use std::path::Path;

use serde_json::Value;

use crate::error::{Error, Result};

use super::column::{is_named, is_text_name, is_usual_name};
use super::json;
use super::source::SAMPLE_BYTES;
use super::table::{Record, SEPARATORS, Sampled, sampled};

/// The form of a file of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// JSON: an object or string per line, an array, or an object with a list.
    Json,
    /// A table with a header.
    Table {
        /// Between two cells.
        separator: u8,
        /// Whether a cell that starts with a quotation mark ends with one.
        is_quoted: bool,
    },
    /// One text per line.
    Lines {
        /// Whether lines end in CR alone, as in old Mac files.
        ends_in_cr: bool,
    },
}

/// A form that the user asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// JSON in any shape.
    Json,
    /// A table. The separator is detected.
    Table,
    /// One text per line.
    Lines,
}

/// Extensions of files that are not lists of rows: what they are.
const FOREIGN: [(&str, &[&str]); 6] = [
    ("YAML", &["yaml", "yml"]),
    ("Markdown", &["md", "markdown", "mdx", "rst", "adoc", "org"]),
    ("settings", &["toml", "ini", "cfg", "conf", "properties", "env", "lock"]),
    ("a page of markup", &["html", "htm", "xhtml", "xml", "svg", "tex", "srt", "vtt", "tmx"]),
    (
        "source code",
        &[
            "py", "rs", "js", "ts", "c", "cc", "cpp", "h", "hpp", "java", "go", "rb", "php", "sh", "bash",
            "pl", "lua", "sql", "r", "jl", "cs", "swift", "kt", "ps1", "bat", "css",
        ],
    ),
    ("a notebook", &["ipynb"]),
];

/// The extension of a file in lower case, without `.gz` and `.zst`.
pub fn extension(path: &Path) -> String {
    let name = path.file_name().map(|name| name.to_string_lossy().to_ascii_lowercase()).unwrap_or_default();
    let name = uncompressed_name(&name);
    name.rsplit_once('.').map(|(_, extension)| extension.to_owned()).unwrap_or_default()
}

/// A file's name without `.gz` or `.zst`.
pub fn uncompressed_name(name: &str) -> &str {
    [".gz", ".gzip", ".zst", ".zstd"].iter().find_map(|ending| name.strip_suffix(ending)).unwrap_or(name)
}

/// The form of a file, by its name and its first bytes. `named` are the columns that the user names.
///
/// # Errors
/// [`Error::Input`] for a form that is not a list of rows.
pub(super) fn detect(
    path: &Path,
    noun: &str,
    sample: &[u8],
    wanted: Option<Wanted>,
    named: &[Option<&str>],
) -> Result<Form> {
    let is_whole = sample.len() < SAMPLE_BYTES;
    let extension = extension(path);
    match wanted {
        Some(Wanted::Json) => return Ok(Form::Json),
        Some(Wanted::Lines) => return Ok(lines(sample)),
        Some(Wanted::Table) => return Ok(table(sample, is_whole, &extension, named)),
        None => {}
    }
    let is_json_name = matches!(extension.as_str(), "json" | "jsonl" | "ndjson" | "geojson" | "jsonlines");
    let is_plain_name = extension == "txt";
    if extension != "ipynb" && looks_like_json(sample, is_json_name) {
        return Ok(Form::Json);
    }
    if let Some((found, _)) = FOREIGN.iter().find(|(_, endings)| endings.contains(&extension.as_str())) {
        return Err(foreign(path, noun, found));
    }
    if let Some(found) = markup(sample) {
        return Err(foreign(path, noun, found));
    }
    if matches!(extension.as_str(), "csv" | "tsv" | "tab" | "psv") {
        return Ok(table(sample, is_whole, &extension, named));
    }
    if let Some(form) = certain_table(sample, is_whole, named) {
        return Ok(form);
    }
    if is_json_name {
        return Ok(Form::Json);
    }
    if let Some(found) = structured(sample, is_plain_name) {
        return Err(foreign(path, noun, found));
    }
    if let Some(name) = lone_header(sample) {
        let reason = format!("expected plain text, one row a line, found the name of a column: {name:?}");
        return Err(Error::input(path, Some(1), reason)
            .with_hint("remove the first line, or write the rows as CSV in a file named .csv"));
    }
    Ok(lines(sample))
}

fn foreign(path: &Path, noun: &str, found: &str) -> Error {
    let hint = match extension(path).as_str() {
        "txt" => {
            "write one row per line as plain text without markup, or as JSON or CSV in a file named .jsonl or .csv"
        }
        _ => "write one row per line as JSON, CSV with a header, or plain text in a file named .txt",
    };
    Error::input(path, None, format!("expected a list of {noun}, found {found}")).with_hint(hint)
}

/// The name on the first line, if the lines after it are texts.
fn lone_header(sample: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(sample);
    let mut lines = text.split(['\n', '\r']).map(str::trim).filter(|line| !line.is_empty());
    let first = lines.next().filter(|first| is_text_name(first) && !first.contains(' '))?;
    // A list of words may start with "text".
    let is_word = |line: &&str| line.bytes().all(|byte| byte.is_ascii_lowercase());
    let (words, texts): (Vec<&str>, Vec<&str>) = lines.take(50).partition(is_word);
    (texts.len() > words.len()).then(|| first.to_owned())
}

fn lines(sample: &[u8]) -> Form {
    Form::Lines { ends_in_cr: sample.contains(&b'\r') && !sample.contains(&b'\n') }
}

/// Whether the text is JSON. A text that merely starts with a bracket, such as "[sic] he said", is not.
fn looks_like_json(sample: &[u8], is_json_name: bool) -> bool {
    let start = sample.trim_ascii_start();
    let first_line = start.split(|&byte| byte == b'\n').next().unwrap_or_default();
    let next = start.get(1..).unwrap_or_default().trim_ascii_start().first().copied();
    match start.first() {
        Some(b'{') => {
            is_json_name
                || matches!(next, Some(b'"' | b'}') | None)
                || json::parse(first_line).is_ok_and(|(value, _)| value.is_object())
        }
        Some(b'[') => {
            is_json_name
                || matches!(next, Some(b'{') | None)
                || matches!(json::parse(first_line), Ok((Value::Array(_), _)))
                || (next == Some(b'"') && is_array_of_strings(start))
        }
        _ => false,
    }
}

/// Whether a text starts with `[`, a string and a comma.
fn is_array_of_strings(start: &[u8]) -> bool {
    let rest = start[1..].trim_ascii_start();
    let mut strings = serde_json::Deserializer::from_slice(rest).into_iter::<String>();
    let is_string = strings.next().is_some_and(|string| string.is_ok());
    let after = rest.get(strings.byte_offset()..).unwrap_or_default().trim_ascii_start();
    is_string && matches!(after.first(), Some(b',' | b']'))
}

/// The table that fits best. Used if name or user say that the text is a table.
fn table(sample: &[u8], is_whole: bool, extension: &str, named: &[Option<&str>]) -> Form {
    let preferred = match extension {
        "tsv" | "tab" => b'\t',
        "psv" => b'|',
        _ => b',',
    };
    let mut best = (0, preferred, true);
    for separator in std::iter::once(preferred).chain(SEPARATORS) {
        for is_quoted in [true, false] {
            // Without quotation marks, only a table with tabs is unambiguous.
            if !is_quoted && separator != b'\t' {
                continue;
            }
            let Sampled { records, is_broken } = sampled(sample, is_whole, separator, is_quoted);
            let Some(header) = records.first() else { continue };
            let n = header.cells.len();
            let is_even = records.iter().all(|record| record.cells.len() == n);
            let is_known = header.cells.iter().any(|cell| is_text_name(cell) || is_named(cell, named));
            let fit = 2 * usize::from(is_known) + usize::from(n > 1 && is_even) + usize::from(n > 1);
            let fit = 2 * fit + usize::from(!is_broken);
            if fit > best.0 {
                best = (fit, separator, is_quoted);
            }
        }
    }
    Form::Table { separator: best.1, is_quoted: best.2 }
}

/// The form of a text that is certainly a table, whatever its name: a header of at least two plain names, one of
/// them that of a text, and rows with as many cells. Rows that differ, or have wrong quotation marks, do not make it
/// plain text: the reader names them.
fn certain_table(sample: &[u8], is_whole: bool, named: &[Option<&str>]) -> Option<Form> {
    let found: Vec<(Form, Sampled)> = SEPARATORS
        .into_iter()
        .flat_map(|separator| [(separator, true), (separator, false)])
        .filter(|&(separator, is_quoted)| is_quoted || separator == b'\t')
        .map(|(separator, is_quoted)| {
            (Form::Table { separator, is_quoted }, sampled(sample, is_whole, separator, is_quoted))
        })
        .filter(|(_, sampled)| sampled.records.first().is_some_and(|header| is_header(header, named)))
        .collect();
    let first = |fits: &dyn Fn(&Sampled) -> bool| {
        found.iter().find(|(_, sampled)| fits(sampled)).map(|(form, _)| *form)
    };
    first(&is_even).or_else(|| first(&is_mostly_even))
}

/// Whether a record is a header of plain names, one of them that of a text.
fn is_header(header: &Record, named: &[Option<&str>]) -> bool {
    let is_name = |cell: &String| {
        let cell = cell.trim();
        cell.len() <= 40
            && cell.chars().all(|c| c.is_alphanumeric() || "_-. ".contains(c))
            && cell.split_whitespace().count() <= 2
            || is_named(cell, named)
    };
    let names = &header.cells;
    // One column is a table only by the user's word.
    let is_usual = names.len() >= 2 && names.iter().any(|cell| is_text_name(cell));
    (is_usual || names.iter().any(|cell| is_named(cell, named)))
        && names.iter().all(is_name)
        && names.iter().skip(1).all(|cell| !cell.trim().is_empty())
}

fn is_even(sampled: &Sampled) -> bool {
    let n = sampled.records[0].cells.len();
    !sampled.is_broken
        && sampled.records.len() >= 2
        && sampled.records.iter().all(|record| record.cells.len() == n)
}

/// Whether the header is no line of text, or at least half of the rows have as many cells.
fn is_mostly_even(sampled: &Sampled) -> bool {
    let (header, rows) = (&sampled.records[0].cells, &sampled.records[1..]);
    // A text has a space after a comma.
    let is_certain =
        !header.iter().any(|name| name.contains(' ')) || header.iter().all(|name| is_usual_name(name));
    let n_even = rows.iter().filter(|record| record.cells.len() == header.len()).count();
    let is_rest = !rows.is_empty() || sampled.is_broken;
    is_rest && (is_certain || header.len() >= 3 && n_even >= 1 && 2 * n_even >= rows.len())
}

/// Markup that is no list of texts even in a file named `.txt`.
fn markup(sample: &[u8]) -> Option<&'static str> {
    let start = String::from_utf8_lossy(&sample[..sample.len().min(256)]).trim_start().to_lowercase();
    let is = |word: &str| start.starts_with(word);
    match () {
        () if is("<!doctype html") || is("<html") => {
            Some("a web page (HTML), perhaps an error page of a download")
        }
        () if is("<?xml") || is("<!doctype") || is("<svg") => Some("XML"),
        () if is("#!/") => Some("a script"),
        () => None,
    }
}

/// YAML, Markdown, markup, settings or source code, by the marks of several lines.
///
/// In a file named `.txt`, only marks that no list of texts has.
fn structured(sample: &[u8], is_plain_name: bool) -> Option<&'static str> {
    let text = String::from_utf8_lossy(sample);
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).take(50).collect();
    let first = *lines.first()?;
    let second = lines.get(1).copied().unwrap_or_default();
    let is_key = |line: &str| {
        let line = line.trim_start().trim_start_matches("- ");
        let name = line.split_once(':').filter(|(_, rest)| rest.is_empty() || rest.starts_with(' '));
        name.is_some_and(|(name, _)| is_identifier(name))
    };
    let is_block = |line: &str| line.trim_end().ends_with(':') && is_key(line);
    let is_item = |line: &str| line.trim_start().starts_with("- ");
    let is_rule =
        |line: &str| line.contains('|') && line.contains("--") && line.chars().all(|c| "|-: ".contains(c));
    if first.starts_with("%YAML")
        || (is_block(first)
            && !first.starts_with(' ')
            && (is_item(second) || (second.starts_with(' ') && is_key(second))))
    {
        return Some("YAML");
    }
    if is_rule(second) && first.contains('|') {
        return Some("Markdown");
    }
    if is_plain_name {
        return None;
    }
    let is_pair = |line: &&str| is_item(line) && is_key(line) || line.starts_with(' ') && is_key(line);
    if (first.trim_end() == "---" && (is_key(second) || is_item(second)))
        || (lines.len() > 1 && (lines.iter().all(is_pair) || lines.iter().all(|line| line.starts_with("- "))))
    {
        return Some("YAML");
    }
    let is_section = |line: &str| {
        let name = line.trim_end().strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
        name.is_some_and(|name| {
            !name.is_empty() && name.chars().all(|c| c.is_alphanumeric() || "_-.[]\"".contains(c))
        })
    };
    let is_assignment =
        |line: &str| line.split_once('=').is_some_and(|(name, _)| is_identifier(name.trim_end()));
    if lines.iter().any(|line| is_assignment(line))
        && lines
            .iter()
            .all(|line| is_section(line) || is_assignment(line) || line.starts_with(['#', ';', ' ', ']']))
    {
        return Some("settings (TOML or INI)");
    }
    if is_source(first) && lines.len() > 1 {
        return Some("source code");
    }
    if is_markup_tag(first) {
        return Some("a page of markup");
    }
    let is_heading = |line: &str| {
        let rest = line.trim_start_matches('#');
        (1..=6).contains(&(line.len() - rest.len())) && rest.starts_with(' ')
    };
    let is_bullet = |line: &str| ["- ", "* ", "+ "].iter().any(|mark| line.trim_start().starts_with(mark));
    let is_numbered = |line: &str| {
        let rest = line.trim_start_matches(|c: char| c.is_ascii_digit());
        rest.len() < line.len() && rest.starts_with(". ")
    };
    let is_fence = |line: &str| line.starts_with("```");
    let any = |mark: &dyn Fn(&str) -> bool| usize::from(lines.iter().any(|line| mark(line)));
    let n_marks = any(&is_heading) + any(&is_bullet) + any(&is_numbered) + 2 * any(&is_rule) + any(&is_fence);
    let is_after_heading =
        is_heading(first) && text.trim_start().lines().nth(1).is_some_and(|line| line.trim().is_empty());
    (n_marks >= 2 || is_after_heading && lines.len() > 1).then_some("Markdown")
}

/// Whether a first line is that of a program or of LaTeX.
fn is_source(first: &str) -> bool {
    let words: Vec<&str> = first.split_whitespace().collect();
    let is_import = match words[..] {
        ["import", name] => is_identifier(name.trim_end_matches(';')),
        ["import", _, "as", _] => true,
        ["import", ..] => {
            first.contains(',') && words[1..].iter().all(|name| is_identifier(name.trim_end_matches(',')))
        }
        ["from", _, "import", ..] => true,
        _ => false,
    };
    let starts = [
        "#include <",
        "#include \"",
        "\\documentclass",
        "\\begin{",
        "\\section{",
        "use std::",
        "package main",
    ];
    is_import || starts.iter().any(|start| first.starts_with(start))
}

/// Whether a line starts with a tag of HTML. Special tokens of models, such as `<s>`, are none.
fn is_markup_tag(line: &str) -> bool {
    let Some(rest) = line.trim_start().strip_prefix('<') else { return false };
    let name = rest.split(|c: char| !c.is_ascii_alphanumeric()).next().unwrap_or_default();
    let is_tag = [
        "p", "div", "body", "head", "ul", "ol", "li", "table", "h1", "h2", "h3", "span", "section", "article",
    ]
    .contains(&name.to_ascii_lowercase().as_str());
    is_tag && matches!(rest.as_bytes().get(name.len()), Some(b'>' | b' '))
}

fn is_identifier(name: &str) -> bool {
    let is_start = name.chars().next().is_some_and(|c| c.is_alphabetic() || c == '_');
    is_start && name.len() <= 40 && name.chars().all(|c| c.is_alphanumeric() || "_-.".contains(c))
}
