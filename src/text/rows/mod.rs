//! Reads people's files into rows with named columns. Every command reads its rows here.
//!
//! ```text
//! file or standard input ─► source (decompress, decode) ─► sniff (form) ─► json | table | lines ─► Rows
//! Row ─► column (by its usual names) ─► cell (missing values, labels, numbers)
//! ```
//!
//! # Forms
//! | form | recognised by | fields of a row |
//! |---|---|---|
//! | JSON lines, values over several lines, an array, `{"data": […]}` | its first bytes | those of the object; a string is `text` |
//! | CSV, TSV, tables with `;` or `\|` | the name, or a header with a usual column and as many cells in each row | the cells, as strings |
//! | plain text | `.txt`, or none of the others | `text`: the line |
//!
//! Text is UTF-8, or UTF-16 with a byte-order mark, and may be compressed with gzip or zstd. Lines end in LF, CRLF or
//! CR. Anything else is refused with advice: other encodings, archives, YAML, Markdown, markup, source code.
//!
//! Rows are read one at a time, so a file may be larger than the memory. A reader that keeps all rows asks for
//! [`Rows::limited`].

mod bytes;
mod cell;
mod column;
mod folder;
mod json;
mod sniff;
mod source;
mod surrogates;
mod table;

use std::cell::Cell;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use serde_json::{Map, Value};

use crate::error::{Error, Result};

use bytes::{Bytes, utf8};
use json::Json;
use surrogates::Surrogates;
use table::Table;

pub use cell::{chat, is_message, is_missing, kind, label, number, text};
pub use column::{
    BENIGN, CHOSEN, CONTINUATION, Column, ID, Ignored, LABEL, LABELLED_TEXT, LANGUAGE, PAIR_PROMPT, PROMPT,
    PROMPT_ID, REJECTED, TEXT, TOXIC, argument, dropped, listed,
};
pub use folder::{has_rows, is_table_name, skipped_names};
pub use sniff::{Form, Wanted, extension, uncompressed_name};

/// Limits of a file whose rows are all kept in memory, so that an endless input is refused in time.
const MAX_BYTES: usize = 2 << 30;
const MAX_ROWS: usize = 2_000_000;

/// A row of a file.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// The line on which the row begins, from 1.
    pub line: usize,
    /// The row's line in JSON lines and plain text, else its position in the file, from 1.
    pub place: usize,
    /// The values by column. A plain line and a JSON string are the column `text`.
    pub fields: Map<String, Value>,
}

/// Iterator over the rows of a file.
///
/// Blank lines are rows of a plain text, with an empty `text`. Elsewhere they are skipped.
pub struct Rows<'a> {
    path: PathBuf,
    noun: &'static str,
    reader: Reader<'a>,
    is_form_given: bool,
    is_limited: bool,
    n_rows: usize,
    n_bytes: usize,
    n_surrogates: usize,
    /// Those in UTF-8, where they are not allowed.
    n_encoded_surrogates: Rc<Cell<usize>>,
    is_finished: bool,
}

enum Reader<'a> {
    Json(Box<Json<'a>>),
    Table(Box<Table<'a>>),
    Lines { bytes: Bytes<'a>, end: u8 },
}

impl std::fmt::Debug for Rows<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rows").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Rows<'static> {
    /// Opens a file. `noun` is what its rows are, for errors: "prompts". `named` are the columns that the user names:
    /// a header with one of them is that of a table.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Input`] for a file that is no list of rows.
    pub fn open(path: &Path, noun: &'static str, named: &[Option<&str>]) -> Result<Rows<'static>> {
        let file = File::open(path).map_err(Error::io("read", path))?;
        Rows::new(path, noun, Box::new(file), None, named)
    }
}

impl<'a> Rows<'a> {
    /// Starts reading. `path` names the input in errors, and its extension helps to recognise the form.
    ///
    /// # Errors
    /// As [`Rows::open`].
    pub fn new(
        path: &Path,
        noun: &'static str,
        input: Box<dyn Read + 'a>,
        form: Option<Wanted>,
        named: &[Option<&str>],
    ) -> Result<Rows<'a>> {
        let mut source = source::open(path, noun, input)?;
        surrogates::replace(&mut source.sample);
        let detected = sniff::detect(path, noun, &source.sample, form, named)?;
        let n_encoded_surrogates = Rc::new(Cell::new(0));
        let input = Surrogates::new(source.input, n_encoded_surrogates.clone());
        let bytes = Bytes::new(path, Box::new(input));
        let reader = match detected {
            Form::Json => Reader::Json(Box::new(Json::new(path, bytes)?)),
            Form::Table { separator, is_quoted } => {
                Reader::Table(Box::new(Table::new(path, bytes, separator, is_quoted)?))
            }
            Form::Lines { ends_in_cr } => {
                Reader::Lines { bytes, end: if ends_in_cr { b'\r' } else { b'\n' } }
            }
        };
        Ok(Rows {
            path: path.to_path_buf(),
            noun,
            reader,
            is_form_given: form.is_some(),
            is_limited: false,
            n_rows: 0,
            n_bytes: 0,
            n_surrogates: 0,
            n_encoded_surrogates,
            is_finished: false,
        })
    }

    /// Refuses a file with more rows than fit in memory. For readers that keep all rows.
    pub fn limited(mut self) -> Rows<'a> {
        self.is_limited = true;
        self
    }

    /// The columns of a table; `None` for other forms.
    pub fn header(&self) -> Option<&[String]> {
        match &self.reader {
            Reader::Table(table) => Some(table.header()),
            _ => None,
        }
    }

    /// Whether the rows are plain lines.
    pub fn is_plain(&self) -> bool {
        matches!(self.reader, Reader::Lines { .. })
    }

    fn read(&mut self) -> Result<Option<Row>> {
        let row = match &mut self.reader {
            Reader::Json(json) => match json.next()? {
                None => None,
                Some(found) => {
                    self.n_surrogates += found.n_surrogates;
                    Some(object(&self.path, self.noun, found)?)
                }
            },
            Reader::Table(table) => table.next()?.map(|record| {
                let cells = table.header().iter().zip(record.cells);
                // A cell without a name is the index of pandas, or empty.
                let fields = cells.map(|(name, cell)| (name.clone(), Value::from(cell))).collect();
                Row { line: record.line, place: self.n_rows + 1, fields }
            }),
            Reader::Lines { bytes, end } => {
                let (line, mut raw) = (bytes.line, Vec::new());
                match bytes.read_until(*end, &mut raw)? {
                    false => None,
                    true => Some(plain(&self.path, line, raw, self.is_form_given)?),
                }
            }
        };
        if let Some(row) = &row {
            self.add(row)?;
        }
        Ok(row)
    }

    /// Counts a row, and refuses it if there are too many.
    fn add(&mut self, row: &Row) -> Result<()> {
        self.n_rows += 1;
        if !self.is_limited {
            return Ok(());
        }
        let size = |(name, value): (&String, &Value)| {
            name.len() + value.as_str().map_or_else(|| value.to_string().len(), str::len)
        };
        self.n_bytes += row.fields.iter().map(size).sum::<usize>();
        let found = match () {
            () if self.n_rows > MAX_ROWS => format!("more than {MAX_ROWS} rows"),
            () if self.n_bytes > MAX_BYTES => format!("more than {} GiB", MAX_BYTES >> 30),
            () => return Ok(()),
        };
        let reason = format!("expected {} that fit in memory, found {found}", self.noun);
        Err(Error::input(&self.path, None, reason).with_hint(format!(
            "give fewer rows, for example the first million: {}",
            source::converted("head -n 1000000", &self.path, "first.txt")
        )))
    }

    /// Warns of repairs, at the end of the file.
    fn finish(&mut self) {
        let n = self.n_surrogates + self.n_encoded_surrogates.get();
        if n > 0 {
            tracing::warn!(
                "{}: unpaired surrogates (such as \\ud83d without its other half) replaced by U+FFFD: {n}",
                self.path.display(),
            );
        }
    }
}

impl Iterator for Rows<'_> {
    type Item = Result<Row>;

    fn next(&mut self) -> Option<Result<Row>> {
        if self.is_finished {
            return None;
        }
        let row = self.read().transpose();
        if !matches!(row, Some(Ok(_))) {
            self.is_finished = true;
            self.finish();
        }
        row
    }
}

/// A row of a JSON value.
fn object(path: &Path, noun: &str, found: json::Found) -> Result<Row> {
    let fields = match found.value {
        Value::Object(fields) => fields,
        Value::String(text) => Map::from_iter([("text".to_owned(), Value::from(text))]),
        other => {
            let reason = format!("expected {noun} as JSON objects or strings, found {}", kind(&other));
            return Err(Error::input(path, Some(found.line), reason).with_hint(json::HINT));
        }
    };
    Ok(Row { line: found.line, place: found.place, fields })
}

/// A row of a plain line.
fn plain(path: &Path, line: usize, mut raw: Vec<u8>, is_form_given: bool) -> Result<Row> {
    if raw.last() == Some(&b'\n') {
        raw.pop();
    }
    while raw.last() == Some(&b'\r') {
        raw.pop();
    }
    let text = utf8(path, line, raw)?;
    // JSON among plain lines must not become text, braces and all.
    let is_json = !is_form_given
        && text.trim_start().starts_with('{')
        && serde_json::from_str::<Map<String, Value>>(&text).is_ok();
    if is_json {
        return Err(Error::input(
            path,
            Some(line),
            "expected plain text, one row a line, found a JSON object",
        )
        .with_hint("give either JSON on every line or plain text on every line"));
    }
    Ok(Row { line, place: line, fields: Map::from_iter([("text".to_owned(), Value::from(text))]) })
}

#[cfg(test)]
mod tests;
