//! Rows of JSON: one value per line, values over several lines, an array, or an object with a list.

use std::collections::VecDeque;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use crate::error::{Error, Result};

use super::bytes::{Bytes, utf8};
use super::column::has_text_name;

/// Keys of an object under which a file of a single object may hold its list of rows.
const LISTS: [&str; 9] =
    ["data", "rows", "prompts", "examples", "items", "records", "pairs", "texts", "instances"];

/// The most values of one row. A parsed value takes some hundred bytes, whatever its length in the file.
const MAX_VALUES: usize = 4_000_000;

pub(super) const HINT: &str =
    "give one JSON object per line, or one JSON array of objects; name plain text .txt";

/// A value with its place.
#[derive(Debug)]
pub(super) struct Found {
    pub line: usize,
    /// The line, or the position in the array, from 1.
    pub place: usize,
    pub value: Value,
    /// Unpaired surrogates that were replaced.
    pub n_surrogates: usize,
}

enum Shape {
    /// One value on each line.
    Lines,
    /// Values over several lines.
    Values,
    Array,
}

/// Iterates over the rows.
pub(super) struct Json<'a> {
    path: PathBuf,
    bytes: Bytes<'a>,
    shape: Shape,
    /// Rows that are already read.
    ready: VecDeque<Found>,
    /// Rows so far, of an array or of values over several lines.
    n: usize,
    is_finished: bool,
}

impl<'a> Json<'a> {
    /// Recognises the shape by the first value.
    pub fn new(path: &Path, mut bytes: Bytes<'a>) -> Result<Json<'a>> {
        let first = bytes.skip_space()?;
        let shape = if first == Some(b'[') { Shape::Array } else { Shape::Lines };
        let mut json =
            Json { path: path.to_path_buf(), bytes, shape, ready: VecDeque::new(), n: 0, is_finished: false };
        match first {
            None => json.is_finished = true,
            Some(b'[') => {
                json.bytes.next()?;
            }
            Some(_) => json.start_lines()?,
        }
        Ok(json)
    }

    /// Reads the first line. If its value continues on the next line, all values may.
    fn start_lines(&mut self) -> Result<()> {
        let (line, column) = (self.bytes.line, self.bytes.column);
        let mut raw = Vec::new();
        self.bytes.read_until(b'\n', &mut raw)?;
        if raw.starts_with(b"{") && parse(&raw).is_err_and(|error| error.is_eof()) {
            self.bytes.put_back(&raw, line);
            self.bytes.column = column;
            self.shape = Shape::Values;
            let Some(first) = self.value()? else { return Ok(()) };
            return self.first(first);
        }
        raw.truncate(raw.trim_ascii_end().len());
        let first = self.read(raw, line, column, line)?;
        self.first(first)
    }

    /// Keeps the first value, or the rows of its list if it is the only value.
    fn first(&mut self, first: Found) -> Result<()> {
        if self.bytes.skip_space()?.is_some() {
            self.ready.push_back(first);
            return Ok(());
        }
        self.is_finished = true;
        match first.value {
            Value::Object(object) if is_columns(&object) => {
                Err(Error::input(&self.path, Some(first.line), "expected rows, found one object of columns")
                    .with_hint(
                        "write one object per row; in pandas: to_json(FILE, orient=\"records\", lines=True)",
                    ))
            }
            Value::Object(mut object) => {
                let list = LISTS.iter().find(|name| matches!(object.get(**name), Some(Value::Array(_))));
                let has_text = has_text_name(&object);
                let list = list.filter(|_| !has_text).and_then(|name| object.remove(*name));
                let Some(Value::Array(rows)) = list else {
                    self.ready.push_back(Found { value: Value::Object(object), ..first });
                    return Ok(());
                };
                let line = first.line;
                let found = |(i, value)| Found { line, place: i + 1, value, n_surrogates: 0 };
                self.ready = rows.into_iter().enumerate().map(found).collect();
                if let Some(row) = self.ready.front_mut() {
                    row.n_surrogates = first.n_surrogates;
                }
                Ok(())
            }
            _ => {
                self.ready.push_back(first);
                Ok(())
            }
        }
    }

    /// The next row.
    pub fn next(&mut self) -> Result<Option<Found>> {
        if let Some(row) = self.ready.pop_front() {
            return Ok(Some(row));
        }
        if self.is_finished {
            return Ok(None);
        }
        match self.shape {
            Shape::Lines => self.next_line(),
            Shape::Values => match self.bytes.skip_space()? {
                None => Ok(None),
                Some(_) => self.value(),
            },
            Shape::Array => self.element(),
        }
    }

    fn next_line(&mut self) -> Result<Option<Found>> {
        let mut raw = Vec::new();
        loop {
            raw.clear();
            let line = self.bytes.line;
            if !self.bytes.read_until(b'\n', &mut raw)? {
                return Ok(None);
            }
            if !raw.trim_ascii().is_empty() {
                raw.truncate(raw.trim_ascii_end().len());
                return self.read(raw, line, 1, line).map(Some);
            }
        }
    }

    /// The next element of the array.
    fn element(&mut self) -> Result<Option<Found>> {
        let fault = |json: &Json<'_>, reason: &str| {
            Error::input(&json.path, Some(json.bytes.line), reason).with_hint(HINT)
        };
        let cut_off = "expected the end of the JSON array, found the end of the file: it is cut off";
        let mut next = self.bytes.skip_space()?;
        if self.n > 0 {
            match next {
                Some(b',') => {
                    self.bytes.next()?;
                    next = self.bytes.skip_space()?;
                    if next == Some(b']') {
                        return Err(fault(
                            self,
                            "expected another row after the comma, found the end of the array",
                        ));
                    }
                }
                Some(b']') => {}
                Some(_) => return Err(fault(self, "expected a comma between two rows of the JSON array")),
                None => return Err(fault(self, cut_off)),
            }
        }
        match next {
            None => Err(fault(self, cut_off)),
            Some(b']') => {
                self.bytes.next()?;
                self.is_finished = true;
                match self.bytes.skip_space()? {
                    None => Ok(None),
                    Some(_) => {
                        let reason = "expected the end of the file after the JSON array, found more text";
                        Err(fault(self, reason))
                    }
                }
            }
            Some(_) => self.value(),
        }
    }

    /// Takes one value, which begins at the next byte.
    fn value(&mut self) -> Result<Option<Found>> {
        let (line, column) = (self.bytes.line, self.bytes.column);
        let mut raw = Vec::new();
        let (mut depth, mut in_string, mut is_escaped) = (0usize, false, false);
        while let Some(byte) = self.bytes.peek()? {
            if !in_string && depth == 0 && !raw.is_empty() && matches!(byte, b',' | b']' | b'}' | b'\n') {
                break;
            }
            self.bytes.next()?;
            // JSON has no line breaks in strings. Stop here, so that the error names this line.
            if in_string && byte == b'\n' {
                break;
            }
            raw.push(byte);
            if raw.len().is_multiple_of(4096) {
                self.bytes.check_length(raw.len())?;
            }
            if in_string {
                match byte {
                    _ if is_escaped => is_escaped = false,
                    b'\\' => is_escaped = true,
                    b'"' => in_string = false,
                    _ => {}
                }
                continue;
            }
            match byte {
                b'"' => in_string = true,
                b'[' | b'{' => depth += 1,
                b']' | b'}' => {
                    depth = depth.saturating_sub(1);
                    if depth == 0 {
                        break;
                    }
                }
                _ => {}
            }
        }
        self.n += 1;
        let place = if matches!(self.shape, Shape::Array) { self.n } else { line };
        self.read(raw, line, column, place).map(Some)
    }

    /// Parses a value that begins on `line` at byte `column`.
    fn read(&self, raw: Vec<u8>, line: usize, column: usize, place: usize) -> Result<Found> {
        // Commas and opening brackets are at least as many as the values after the first.
        if raw.iter().filter(|byte| matches!(byte, b',' | b'[' | b'{')).count() > MAX_VALUES {
            let reason = format!("expected a row of at most {MAX_VALUES} values, found more");
            return Err(Error::input(&self.path, Some(line), reason)
                .with_hint("write one row per line, and leave out columns that are not needed"));
        }
        match parse(&raw) {
            Ok((value, n_surrogates)) => Ok(Found { line, place, value, n_surrogates }),
            Err(error) => {
                let raw = utf8(&self.path, line, raw)?;
                Err(self.fault(&raw, line, column, &error))
            }
        }
    }

    fn fault(&self, raw: &str, line: usize, column: usize, error: &serde_json::Error) -> Error {
        let words = error.to_string();
        // Remove serde_json's line number: it counts from the start of the row, not of the file.
        let words = words.rsplit_once(" at line ").map_or(words.as_str(), |(words, _)| words);
        let column = if error.line() <= 1 { error.column() + column - 1 } else { error.column() };
        let line = line + error.line().saturating_sub(1);
        let is_python = ["{'", "[{'", "['"].iter().any(|start| raw.trim_start().starts_with(start));
        let hint = match is_python {
            true => "JSON strings have double quotes; in Python, write rows with json.dumps",
            false => HINT,
        };
        let reason = match error.is_data() {
            true => format!("expected a row with different keys: {words}"),
            false => format!("expected JSON, found an error at column {column}: {words}"),
        };
        Error::input(&self.path, Some(line), reason).with_hint(hint)
    }
}

/// Whether an object is a table by columns, as pandas and datasets write it: lists or objects of one length.
fn is_columns(object: &Map<String, Value>) -> bool {
    let length = |value: &Value| match value {
        Value::Array(list) => list.iter().all(|value| !value.is_object()).then_some(list.len()),
        Value::Object(column) => {
            let is_index = |key: &String| key.bytes().all(|byte| byte.is_ascii_digit());
            column.keys().all(is_index).then_some(column.len())
        }
        _ => None,
    };
    let mut lengths = object.values().map(length);
    let first = lengths.next().flatten();
    object.len() >= 2 && first.is_some_and(|n| n > 0) && lengths.all(|n| n == first)
        || object.len() == 1
            && object.values().all(|value| value.is_object() && length(value).is_some_and(|n| n > 0))
}

/// Parses one value. Returns the number of unpaired surrogates that were replaced.
///
/// NaN and the infinities, which Python writes, are null.
pub(super) fn parse(raw: &[u8]) -> Result<(Value, usize), serde_json::Error> {
    match serde_json::from_slice::<Unique>(raw) {
        Ok(Unique(value)) => Ok((value, 0)),
        Err(error) => match repair(raw) {
            Some((repaired, n)) => {
                serde_json::from_slice::<Unique>(&repaired).map(|Unique(value)| (value, n))
            }
            None => Err(error),
        },
    }
}

/// Replaces unpaired surrogates by U+FFFD, and NaN and the infinities by null. `None` if there are none.
fn repair(raw: &[u8]) -> Option<(Vec<u8>, usize)> {
    let mut repaired = Vec::with_capacity(raw.len());
    let (mut in_string, mut n_surrogates, mut n_other, mut at) = (false, 0, 0, 0);
    let unit = |at: usize| -> Option<u16> {
        let digits = raw.get(at..at + 6)?.strip_prefix(b"\\u")?;
        u16::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
    };
    while at < raw.len() {
        let rest = &raw[at..];
        let word = ["NaN", "Infinity", "-Infinity"].iter().find(|word| rest.starts_with(word.as_bytes()));
        let n = match (in_string, rest[0]) {
            (true, b'\\') => match (unit(at), unit(at + 6)) {
                (Some(0xD800..=0xDBFF), Some(0xDC00..=0xDFFF)) => 12,
                (Some(0xD800..=0xDFFF), _) => {
                    repaired.extend_from_slice(b"\\ufffd");
                    n_surrogates += 1;
                    at += 6;
                    continue;
                }
                (Some(_), _) => 6,
                (None, _) => 2,
            },
            (false, _) if word.is_some() => {
                repaired.extend_from_slice(b"null");
                n_other += 1;
                at += word.map_or(1, |word| word.len());
                continue;
            }
            (_, b'"') => {
                in_string = !in_string;
                1
            }
            _ => 1,
        };
        let end = raw.len().min(at + n);
        repaired.extend_from_slice(&raw[at..end]);
        at = end;
    }
    (n_surrogates + n_other > 0).then_some((repaired, n_surrogates))
}

/// A value. An object whose key occurs twice is refused, because one of the two values would be lost.
struct Unique(Value);

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Unique, D::Error> {
        deserializer.deserialize_any(UniqueVisitor).map(Unique)
    }
}

struct UniqueVisitor;

impl<'de> Visitor<'de> for UniqueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            if object.contains_key(&key) {
                return Err(A::Error::custom(format!("found the key {key:?} twice")));
            }
            let value = entries.next_value::<Value>()?;
            object.insert(key, value);
        }
        Ok(Value::Object(object))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(value) = elements.next_element()? {
            list.push(value);
        }
        Ok(Value::Array(list))
    }

    fn visit_str<E>(self, text: &str) -> Result<Value, E> {
        Ok(Value::from(text))
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }
}
