//! Reads and writes this program's JSON files, which may also be written by hand.
//!
//! Files are read up to a size limit. The key `detox_gguf` says which kind of file it is.

use std::io::Read;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::finite;

/// Size limit of a file. Chosen here: a hundred thousand neurons with thirty tokens each stay below it.
const MAX_BYTES: u64 = 64 << 20;

/// The format version that is written, and the newest that is read.
pub(super) const FORMAT: u32 = 1;

/// Reads a file as text, without a byte order mark.
///
/// # Errors
/// [`Error::Io`] if it cannot be read; [`Error::Input`] if it is empty, too large or not UTF-8.
pub(super) fn read_text(path: &Path) -> Result<String> {
    let file = std::fs::File::open(path).map_err(Error::io("open", path))?;
    let mut bytes = Vec::new();
    // A pipe has no size to query, so the limit applies to the bytes read.
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    if bytes.len() as u64 > MAX_BYTES {
        let reason = format!("expected at most {} MiB of JSON, found more", MAX_BYTES >> 20);
        return Err(Error::input(path, None, reason));
    }
    let text = String::from_utf8(bytes).map_err(|e| {
        let valid = &e.as_bytes()[..e.utf8_error().valid_up_to()];
        let line = valid.iter().filter(|&&byte| byte == b'\n').count() + 1;
        Error::input(path, Some(line), "expected JSON, found bytes that are not UTF-8")
    })?;
    let text = text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text);
    if text.trim().is_empty() {
        return Err(Error::input(path, None, "expected JSON, found an empty file"));
    }
    Ok(text)
}

/// Parses `text`, the content of `path`; `expected` describes the content in the error message.
pub(super) fn parse<T: DeserializeOwned>(path: &Path, text: &str, expected: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|e| {
        let line = Some(e.line()).filter(|&line| line > 0);
        Error::input(path, line, format!("expected {expected}: {e}"))
    })
}

/// The keys that identify one of this program's files.
#[derive(Deserialize)]
struct Head {
    detox_gguf: Option<String>,
    format: Option<u32>,
}

/// Reads the kind of a file, such as "neurons"; `None` if it does not say.
///
/// # Errors
/// [`Error::Input`] if the text is not a JSON object, or was written by a later version of this program.
pub(super) fn kind(path: &Path, text: &str) -> Result<Option<String>> {
    let head: Head = parse(path, text, "a JSON object")?;
    if let (Some(_), Some(format)) = (&head.detox_gguf, head.format)
        && format != FORMAT
    {
        return Err(Error::input(path, None, format!("\"format\": expected {FORMAT}, found {format}"))
            .with_hint("a newer detox-gguf may have written it: use that version, or make the file again"));
    }
    Ok(head.detox_gguf)
}

/// Parses a file of the kind `expected`. If it is of another kind, the error names that kind.
pub(super) fn parse_kind<T: DeserializeOwned>(
    path: &Path,
    text: &str,
    expected: &str,
    what: &str,
) -> Result<T> {
    match kind(path, text)? {
        Some(found) if found == expected => parse(path, text, what),
        Some(found) => {
            let reason = format!("\"detox_gguf\": expected {expected:?}, found {found:?}");
            Err(Error::input(path, None, reason))
        }
        None => Err(Error::input(
            path,
            None,
            format!("expected {what}, an object with \"detox_gguf\": {expected:?}; found another object"),
        )),
    }
}

/// Formats a file's content: indented, with a newline at the end.
///
/// # Errors
/// [`Error::NotFinite`] for NaN or an infinity.
pub(super) fn to_bytes<T: Serialize>(form: &T) -> Result<Vec<u8>> {
    finite::check_json(form)?;
    let mut bytes =
        serde_json::to_vec_pretty(form).expect("plain data with string keys can be written to memory");
    bytes.push(b'\n');
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> Result<String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file.json");
        std::fs::write(&path, bytes).unwrap();
        read_text(&path)
    }

    #[test]
    fn a_byte_order_mark_is_skipped() {
        assert_eq!(read(b"\xef\xbb\xbf[1]").unwrap(), "[1]");
    }

    #[test]
    fn rejects_a_file_that_is_empty_or_not_utf8() {
        for bytes in [&b""[..], b" \n\t"] {
            assert!(read(bytes).unwrap_err().to_string().contains("empty"));
        }
        let error = read(b"[\n\xff]").unwrap_err();
        assert!(matches!(error, Error::Input { line: Some(2), .. }), "{error}");
    }

    #[test]
    fn rejects_a_file_over_the_size_limit() {
        // A sparse file of twice the limit takes no disk space.
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("huge.json");
        std::fs::File::create(&path).unwrap().set_len(2 * MAX_BYTES).unwrap();
        assert!(read_text(&path).unwrap_err().to_string().contains("64 MiB"));
    }

    #[test]
    fn rejects_a_later_format() {
        let text = "{\"detox_gguf\": \"neurons\", \"format\": 2}";
        let error = kind(Path::new("f"), text).unwrap_err();
        assert!(error.to_string().contains("expected 1, found 2"), "{error}");
        assert!(error.hint().is_some());
    }
}
