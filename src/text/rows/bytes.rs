//! Reads text byte by byte and line by line, and counts lines.

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

use super::source;

/// The longest row in bytes. An endless line must not fill the memory.
pub(super) const MAX_ROW_BYTES: usize = 64 << 20;

/// The rest of a text, with the number of the current line.
pub(super) struct Bytes<'a> {
    path: PathBuf,
    input: Box<dyn Read + 'a>,
    buffer: Vec<u8>,
    at: usize,
    /// The line of the next byte, from 1.
    pub line: usize,
    /// The byte of the line that comes next, from 1.
    pub column: usize,
}

impl<'a> Bytes<'a> {
    pub fn new(path: &Path, input: Box<dyn Read + 'a>) -> Bytes<'a> {
        Bytes { path: path.to_path_buf(), input, buffer: Vec::new(), at: 0, line: 1, column: 1 }
    }

    /// Makes sure that a byte is there; `false` at the end.
    fn fill(&mut self) -> Result<bool> {
        if self.at < self.buffer.len() {
            return Ok(true);
        }
        self.buffer.resize(1 << 16, 0);
        self.at = 0;
        loop {
            match self.input.read(&mut self.buffer) {
                Ok(n) => {
                    self.buffer.truncate(n);
                    return Ok(n > 0);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.buffer.clear();
                    return Err(Error::io("read", &self.path)(error));
                }
            }
        }
    }

    /// The next byte, which stays.
    pub fn peek(&mut self) -> Result<Option<u8>> {
        Ok(if self.fill()? { Some(self.buffer[self.at]) } else { None })
    }

    /// Takes the next byte.
    pub fn next(&mut self) -> Result<Option<u8>> {
        let Some(byte) = self.peek()? else { return Ok(None) };
        self.at += 1;
        self.column += 1;
        if byte == b'\n' {
            self.line += 1;
            self.column = 1;
        }
        Ok(Some(byte))
    }

    /// Puts a line back that was just taken, which began on line `line`.
    pub fn put_back(&mut self, text: &[u8], line: usize) {
        self.buffer.splice(..self.at, text.iter().copied());
        (self.at, self.line, self.column) = (0, line, 1);
    }

    /// Skips white space, then returns the next byte, which stays.
    pub fn skip_space(&mut self) -> Result<Option<u8>> {
        loop {
            match self.peek()? {
                Some(byte) if byte.is_ascii_whitespace() => self.next()?,
                byte => return Ok(byte),
            };
        }
    }

    /// Appends the bytes up to and including `end`, or to the end of the text; `false` if there were none.
    pub fn read_until(&mut self, end: u8, line: &mut Vec<u8>) -> Result<bool> {
        let before = line.len();
        while self.fill()? {
            let left = &self.buffer[self.at..];
            let found = left.iter().position(|&byte| byte == end);
            let n = found.map_or(left.len(), |i| i + 1);
            line.extend_from_slice(&left[..n]);
            self.at += n;
            self.check_length(line.len())?;
            if found.is_some() {
                self.line += 1;
                self.column = 1;
                break;
            }
        }
        Ok(line.len() > before)
    }

    /// Refuses a row of too many bytes.
    pub fn check_length(&self, n: usize) -> Result<()> {
        if n <= MAX_ROW_BYTES {
            return Ok(());
        }
        let reason = format!("expected a row of at most {} MiB, found a longer one", MAX_ROW_BYTES >> 20);
        Err(Error::input(&self.path, Some(self.line), reason).with_hint(
            "write one row per line; for one large JSON array inside an object: jq -c '.data[]' FILE",
        ))
    }
}

/// Bytes as UTF-8 without NUL.
///
/// # Errors
/// [`Error::Input`] with the line and the position of the first bad byte. The bytes begin on `line`.
pub(super) fn utf8(path: &Path, line: usize, bytes: Vec<u8>) -> Result<String> {
    let place = |at: usize| {
        let before = &bytes[..at];
        let n_breaks = before.iter().filter(|&&byte| byte == b'\n').count();
        let column = 1 + before.iter().rev().take_while(|&&byte| byte != b'\n').count();
        (line + n_breaks, column)
    };
    if let Some(at) = bytes.iter().position(|&byte| byte == 0) {
        let (line, column) = place(at);
        let reason = format!("expected text, found a NUL byte at byte {column} of the line");
        return Err(Error::input(path, Some(line), reason).with_hint(format!(
            "the file is damaged or binary; to drop the NUL bytes: {}",
            source::converted("tr -d '\\0'", path, "clean.txt")
        )));
    }
    match std::str::from_utf8(&bytes) {
        Ok(_) => Ok(String::from_utf8(bytes).expect("checked in the line above")),
        Err(error) => {
            let at = error.valid_up_to();
            let (line, column) = place(at);
            let reason =
                format!("expected UTF-8, found the byte 0x{:02X} at byte {column} of the line", bytes[at]);
            Err(Error::input(path, Some(line), reason).with_hint(source::utf8_hint(path)))
        }
    }
}
