//! Recognises common mis-spellings of `FILE:COEFFICIENT`, and shows the right spelling.

use std::path::Path;

use crate::error::Error;

/// Characters that people put between a file and its coefficient.
const SEPARATORS: [char; 9] = [':', '=', '@', ' ', ',', ';', '*', '×', '：'];

/// The error for the value of `--steer` that names no file, if it looks like a file with a coefficient.
///
/// `None` if no part of it names a file and no part looks like a coefficient: then the file is missing.
pub(super) fn refuse(text: &str) -> Option<Error> {
    if Path::new(text).exists() {
        return None;
    }
    let error = |found: &str, hint: String| {
        let reason = format!("expected FILE or FILE:COEFFICIENT, {found} in {text:?}");
        Some(Error::setting("--steer", reason).with_hint(hint))
    };
    if let Some(files) = several(text) {
        let flags: Vec<String> = files.iter().map(|file| format!("--steer {file}")).collect();
        return error("found several files", format!("repeat the flag: {}", flags.join(" ")));
    }
    for (at, separator) in text.char_indices().rev().filter(|(_, c)| SEPARATORS.contains(c)) {
        let (path, rest) = (&text[..at], &text[at + separator.len_utf8()..]);
        let is_file = Path::new(path).is_file();
        // Without the file, only a number after a colon is surely meant as a coefficient.
        let is_misspelt = separator == ':' && rest.parse::<f32>().is_err();
        let number = coefficient(rest).filter(|_| is_file || is_misspelt);
        match number {
            Some(number) if !path.is_empty() => {
                return error(&format!("found {rest:?} after the file"), format!("write {path}:{number}"));
            }
            _ if is_file => {
                let hint = format!("write the coefficient as a number with a point, such as {path}:-0.5");
                return error(&format!("found {rest:?} after the file"), hint);
            }
            _ => {}
        }
    }
    None
}

/// The files of a list, as in `--lora-scaled`, each as `--steer` takes it.
fn several(text: &str) -> Option<Vec<String>> {
    let entries: Vec<&str> = text.split([',', ';', ' ']).filter(|entry| !entry.is_empty()).collect();
    let is_scaled = |(path, number): (&str, &str)| Path::new(path).is_file() && coefficient(number).is_some();
    let is_file = |entry: &&str| Path::new(entry).is_file() || entry.rsplit_once(':').is_some_and(is_scaled);
    (entries.len() > 1 && entries.iter().all(is_file))
        .then(|| entries.iter().map(|entry| (*entry).to_owned()).collect())
}

/// A coefficient as people write it: `-0,5`, `−0.5`, `50%`, `x2`, `1/2`, `1.234,5`.
fn coefficient(text: &str) -> Option<f32> {
    let text = text.trim().replace(['\u{2212}', '\u{2010}', '\u{2011}', '\u{2013}', '\u{2014}'], "-");
    let (text, divisor) = match text.strip_suffix('%') {
        Some(rest) => (rest.trim_end(), 100.0),
        None => (text.as_str(), 1.0),
    };
    let text = text.trim_start_matches(['x', 'X', '*', '×']).trim_end_matches(['x', 'X', 'f', '×']).trim();
    let (text, divisor) = match text.split_once('/') {
        Some((text, below)) => (text.trim(), below.trim().parse::<f32>().ok()?),
        None => (text, divisor),
    };
    // One comma is a decimal comma, and points before it separate thousands.
    let plain = match text.split_once(',') {
        Some((whole, fraction)) => format!("{}.{fraction}", whole.replace('.', "")),
        None => text.to_owned(),
    };
    let is_number = plain.chars().all(|c| c.is_ascii_digit() || "+-.eE".contains(c));
    let number = plain.parse::<f32>().ok().filter(|_| is_number)? / divisor;
    number.is_finite().then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelt_coefficient_is_refused_with_the_right_spelling() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("s.json");
        std::fs::write(&file, "{}").unwrap();
        let file = file.to_str().unwrap();
        for (end, number) in [
            (":-0,5", "-0.5"),
            (":0,25", "0.25"),
            (":\u{2212}0.5", "-0.5"),
            (": 0.5", "0.5"),
            ("=0.5", "0.5"),
            ("@-1", "-1"),
            (" 2", "2"),
            (",0.5", "0.5"),
            ("：0.5", "0.5"),
            (":50%", "0.5"),
            (":x2", "2"),
            (":2x", "2"),
            (":1/2", "0.5"),
            (":0.5f", "0.5"),
            (":1.234,5", "1234.5"),
        ] {
            let error = refuse(&format!("{file}{end}")).unwrap_or_else(|| panic!("{end}"));
            assert_eq!(error.hint().unwrap(), format!("write {file}:{number}"), "{end}: {error}");
            assert!(error.is_usage() && error.to_string().starts_with("--steer: expected FILE"), "{error}");
        }
        for end in [":", ":strong", ":1e", "=half"] {
            let hint = refuse(&format!("{file}{end}")).unwrap().hint().unwrap();
            assert!(hint.ends_with(&format!("such as {file}:-0.5")), "{hint}");
        }
        let both = refuse(&format!("{file}:1,{file}:-2")).unwrap();
        assert_eq!(both.hint().unwrap(), format!("repeat the flag: --steer {file}:1 --steer {file}:-2"));
        assert!(refuse(file).is_none());
    }

    #[test]
    fn a_missing_file_is_left_to_the_reader_unless_a_coefficient_follows() {
        for text in ["no/such.json", "no such.json", "C:\\no.json", "a=b", "run-2,5.json"] {
            assert!(refuse(text).is_none(), "{text}");
        }
        assert_eq!(refuse("no.json:-0,5").unwrap().hint().unwrap(), "write no.json:-0.5");
    }
}
