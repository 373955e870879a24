//! Rows of tables: CSV, TSV, and tables with semicolons or vertical bars.
//!
//! The crate `csv` is not used for reading: it accepts wrong quotation marks silently, and has no limit for a record.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

use super::bytes::{Bytes, utf8};

/// Separators that are recognised, the most frequent first.
pub(super) const SEPARATORS: [u8; 4] = [b',', b';', b'\t', b'|'];

/// Iterates over the records of a table after its header.
pub(super) struct Table<'a> {
    path: PathBuf,
    bytes: Bytes<'a>,
    separator: u8,
    /// Whether a cell that starts with a quotation mark ends with one.
    is_quoted: bool,
    /// Columns with their names. Columns without a name and without a cell are not kept.
    header: Vec<String>,
}

/// A record and the line on which it begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Record {
    pub line: usize,
    pub cells: Vec<String>,
}

impl<'a> Table<'a> {
    /// Reads the header.
    pub fn new(path: &Path, bytes: Bytes<'a>, separator: u8, is_quoted: bool) -> Result<Table<'a>> {
        let mut table = Table { path: path.to_path_buf(), bytes, separator, is_quoted, header: Vec::new() };
        let Some(mut header) = table.record()? else { return Ok(table) };
        if is_separator(&header.cells) {
            match table.record()? {
                Some(next) => header = next,
                None => return Ok(table),
            }
        }
        let mut names = HashSet::new();
        for name in header.cells.iter().filter(|name| !name.trim().is_empty()) {
            if !names.insert(name.trim()) {
                let reason = format!("expected columns with different names, found {name:?} twice");
                return Err(Error::input(path, Some(header.line), reason)
                    .with_hint("rename one of the two columns in the first line"));
            }
        }
        table.header = header.cells;
        Ok(table)
    }

    /// The names of the columns; empty for an empty file.
    pub fn header(&self) -> &[String] {
        &self.header
    }

    /// The next record.
    ///
    /// # Errors
    /// [`Error::Input`] with the line for a record with more or fewer cells than the header.
    pub fn next(&mut self) -> Result<Option<Record>> {
        let Some(record) = self.record()? else { return Ok(None) };
        let (expected, found) = (self.header.len(), record.cells.len());
        if found != expected {
            let reason = format!("expected {expected} cells as in the header, found {found}");
            return Err(Error::input(&self.path, Some(record.line), reason)
                .with_hint("put a text that contains the separator or a line break in double quotes"));
        }
        Ok(Some(record))
    }

    /// Reads a record; blank lines are skipped.
    fn record(&mut self) -> Result<Option<Record>> {
        loop {
            if self.bytes.peek()?.is_none() {
                return Ok(None);
            }
            let line = self.bytes.line;
            let mut cells = Vec::new();
            let mut n_bytes = 0;
            while self.cell(&mut cells, &mut n_bytes)? {}
            if cells.len() > 1 || cells.iter().any(|cell: &String| !cell.is_empty()) {
                return Ok(Some(Record { line, cells }));
            }
        }
    }

    /// Reads a cell and its separator or line end; `false` at the end of the record.
    fn cell(&mut self, cells: &mut Vec<String>, n_bytes: &mut usize) -> Result<bool> {
        let line = self.bytes.line;
        let mut cell = Vec::new();
        let is_quoted = self.is_quoted && self.bytes.peek()? == Some(b'"');
        if is_quoted {
            self.quoted(&mut cell, line, *n_bytes)?;
        }
        loop {
            let next = self.bytes.next()?;
            let is_end = matches!(next, None | Some(b'\n' | b'\r'));
            if is_end || next == Some(self.separator) {
                if next == Some(b'\r') {
                    match self.bytes.peek()? {
                        Some(b'\n') => drop(self.bytes.next()?),
                        _ => self.bytes.line += 1,
                    }
                }
                // An empty cell takes memory too.
                *n_bytes += cell.len() + size_of::<String>();
                self.bytes.check_length(*n_bytes)?;
                cells.push(utf8(&self.path, line, cell)?);
                return Ok(!is_end);
            }
            if is_quoted {
                let reason = "expected the separator after a quoted cell, found more text";
                return Err(Error::input(&self.path, Some(self.bytes.line), reason)
                    .with_hint("double the quotation marks inside a quoted cell: \"a \"\"word\"\" here\""));
            }
            cell.extend(next);
            if cell.len().is_multiple_of(4096) {
                self.bytes.check_length(*n_bytes + cell.len())?;
            }
        }
    }

    /// Reads a quoted cell up to its last quotation mark.
    fn quoted(&mut self, cell: &mut Vec<u8>, line: usize, n_bytes: usize) -> Result<()> {
        self.bytes.next()?;
        loop {
            match self.bytes.next()? {
                Some(b'"') if self.bytes.peek()? == Some(b'"') => {
                    self.bytes.next()?;
                    cell.push(b'"');
                }
                Some(b'"') => return Ok(()),
                Some(byte) => cell.push(byte),
                None => {
                    let reason =
                        "expected a quotation mark at the end of this cell, found the end of the file";
                    return Err(Error::input(&self.path, Some(line), reason)
                        .with_hint("double the quotation marks inside a quoted cell, and close it"));
                }
            }
            if cell.len().is_multiple_of(4096) {
                self.bytes.check_length(n_bytes + cell.len())?;
            }
        }
    }
}

/// Whether a record is the separator on a line of its own, `sep=;`, as Excel writes it.
fn is_separator(cells: &[String]) -> bool {
    let start = cells.first().and_then(|cell| cell.strip_prefix("sep="));
    start.is_some_and(|rest| rest.len() + cells.len() == 2)
}

/// The records of a sample of a text.
pub(super) struct Sampled {
    pub records: Vec<Record>,
    /// Whether the quotation marks are wrong after these records.
    pub is_broken: bool,
}

/// The records of a sample of a text, up to one with wrong quotation marks.
///
/// A line with the separator is dropped, and the last record unless the sample is the whole text.
pub(super) fn sampled(sample: &[u8], is_whole: bool, separator: u8, is_quoted: bool) -> Sampled {
    let bytes = Bytes::new(Path::new(""), Box::new(sample));
    let mut table = Table { path: PathBuf::new(), bytes, separator, is_quoted, header: Vec::new() };
    let mut records = Vec::new();
    let is_broken = loop {
        match table.record() {
            Ok(Some(record)) => records.push(record),
            Ok(None) => {
                if !is_whole {
                    records.pop();
                }
                break false;
            }
            // The sample ends in the middle of a cell.
            Err(_) if !is_whole && matches!(table.bytes.peek(), Ok(None)) => break false,
            Err(_) => break true,
        }
    };
    if records.first().is_some_and(|first| is_separator(&first.cells)) {
        records.remove(0);
    }
    Sampled { records, is_broken }
}
