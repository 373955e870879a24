//! Lines of text files: UTF-8, byte-order marks, line numbers for errors.

use std::path::Path;

use crate::error::{Error, Result};

/// Decodes the bytes of a file as UTF-8, without a byte-order mark.
///
/// # Errors
/// [`Error::Input`] with the line and the position of the first invalid byte.
pub fn decode<'a>(path: &Path, bytes: &'a [u8]) -> Result<&'a str> {
    let bytes = bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(bytes);
    std::str::from_utf8(bytes).map_err(|error| {
        let valid = &bytes[..error.valid_up_to()];
        let line = 1 + valid.iter().filter(|&&byte| byte == b'\n').count();
        let column = 1 + valid.iter().rev().take_while(|&&byte| byte != b'\n').count();
        let reason = format!(
            "expected UTF-8, found the byte 0x{:02X} at byte {column} of the line",
            bytes[error.valid_up_to()]
        );
        Error::input(path, Some(line), reason).with_hint("save the file as UTF-8")
    })
}

/// The lines that are not blank, with their numbers from 1. Lines end in LF or CRLF.
pub fn numbered(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines().enumerate().map(|(i, line)| (i + 1, line)).filter(|(_, line)| !line.trim().is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_order_mark_and_blank_lines_are_skipped() {
        let text = decode(Path::new("f"), "\u{feff}a\r\n\n \nb".as_bytes()).unwrap();
        assert_eq!(numbered(text).collect::<Vec<_>>(), [(1, "a"), (4, "b")]);
    }

    #[test]
    fn rejects_invalid_utf8_with_line_and_byte() {
        let error = decode(Path::new("f"), b"\xEF\xBB\xBFone\ntw\xE9").unwrap_err();
        assert_eq!(error.to_string(), "f:2: expected UTF-8, found the byte 0xE9 at byte 3 of the line");
    }
}
