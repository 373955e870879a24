//! Text of people's files as it may be shown: invisible characters that act on a terminal or mislead a reader are
//! escaped.

use std::borrow::Cow;
use std::fmt::Write;

/// Escapes control, bidi and invisible characters, so that `text` is shown on one line and only as itself.
///
/// A line feed becomes `\n`, an escape character `\u{1b}`. Text of every language passes unchanged, with the joiners
/// that Hindi, Persian and emoji need.
pub fn printable(text: &str) -> Cow<'_, str> {
    escape(text, |_| false)
}

/// As [`printable`], but keeps line feeds: for text of several lines whose fields are already [`printable`].
pub fn printable_lines(text: &str) -> Cow<'_, str> {
    escape(text, |c| c == '\n')
}

/// As [`printable_lines`], but also keeps colours (`ESC [ … m`).
pub fn printable_coloured(text: &str) -> Cow<'_, str> {
    if !text.chars().any(must_be_escaped) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find("\u{1b}[") {
        let (before, sequence) = rest.split_at(start);
        shown += &printable_lines(before);
        let n_digits = sequence[2..].chars().take_while(|c| c.is_ascii_digit() || *c == ';').count();
        let is_colour = sequence[2 + n_digits..].starts_with('m');
        let (kept, after) = sequence.split_at(if is_colour { 2 + n_digits + 1 } else { 1 });
        shown += &if is_colour { Cow::Borrowed(kept) } else { printable(kept) };
        rest = after;
    }
    shown += &printable_lines(rest);
    Cow::Owned(shown)
}

/// Escapes JSON so that it can be shown on a terminal: it stays the same JSON.
///
/// serde_json writes C1 controls and bidi characters as they are, and they occur only inside strings, where `\u202e`
/// means the same.
pub fn printable_json(json: &str) -> Cow<'_, str> {
    let is_layout = |c: char| matches!(c, '\n' | '\r' | '\t');
    if !json.chars().any(|c| must_be_escaped(c) && !is_layout(c)) {
        return Cow::Borrowed(json);
    }
    let mut shown = String::with_capacity(json.len());
    for c in json.chars() {
        if must_be_escaped(c) && !is_layout(c) {
            for unit in c.encode_utf16(&mut [0; 2]) {
                write!(shown, "\\u{unit:04x}").expect("writing to a string does not fail");
            }
        } else {
            shown.push(c);
        }
    }
    Cow::Owned(shown)
}

fn escape(text: &str, is_kept: impl Fn(char) -> bool) -> Cow<'_, str> {
    let is_changed = |c: char| must_be_escaped(c) && !is_kept(c);
    if !text.chars().any(is_changed) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        match c {
            _ if !is_changed(c) => shown.push(c),
            '\n' => shown.push_str("\\n"),
            '\r' => shown.push_str("\\r"),
            '\t' => shown.push_str("\\t"),
            _ => shown.extend(c.escape_unicode()),
        }
    }
    Cow::Owned(shown)
}

/// Whether a character acts on a terminal, reorders its neighbours, or is invisible.
///
/// ZERO WIDTH JOINER and NON-JOINER (U+200C, U+200D) and variation selectors change how letters and emoji look, so
/// they pass.
fn must_be_escaped(c: char) -> bool {
    match c {
        // Most text ends here.
        ' '..='~' => false,
        _ => c.is_control() || is_bidi_control(c) || is_invisible(c),
    }
}

/// ALM, LRM, RLM, embeddings, overrides, isolates, and the deprecated shaping controls.
fn is_bidi_control(c: char) -> bool {
    matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{206f}')
}

/// Line and paragraph separators, byte order marks, invisible spaces and fillers, annotations and tags.
fn is_invisible(c: char) -> bool {
    matches!(
        c,
        '\u{ad}'
            | '\u{34f}'
            | '\u{115f}'
            | '\u{1160}'
            | '\u{17b4}'
            | '\u{17b5}'
            | '\u{180e}'
            | '\u{200b}'
            | '\u{2028}'
            | '\u{2029}'
            | '\u{2060}'..='\u{2065}'
            | '\u{3164}'
            | '\u{feff}'
            | '\u{ffa0}'
            | '\u{fff9}'..='\u{fffb}'
            | '\u{1d173}'..='\u{1d17a}'
            | '\u{e0000}'..='\u{e007f}'
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn controls_and_bidi_characters_are_escaped() {
        for (text, shown) in [
            ("a\u{1b}[31mb", "a\\u{1b}[31mb"),
            ("a\nerror: b\r\t", "a\\nerror: b\\r\\t"),
            ("\u{7f}\u{9b}31m\u{85}\0\u{7}", "\\u{7f}\\u{9b}31m\\u{85}\\u{0}\\u{7}"),
            ("\u{202e}x\u{2066}\u{200e}\u{61c}", "\\u{202e}x\\u{2066}\\u{200e}\\u{61c}"),
            ("\u{feff}\u{2028}\u{2029}\u{e0041}", "\\u{feff}\\u{2028}\\u{2029}\\u{e0041}"),
        ] {
            assert_eq!(printable(text), shown);
        }
    }

    #[test]
    fn text_of_every_language_passes_unchanged() {
        for text in [
            "straße",
            "नमस्ते क्\u{200d}ष",
            "می\u{200c}خواهم",
            "שלום",
            "日本語",
            "👩\u{200d}👧",
            "❤\u{fe0f}",
            "C:\\x",
        ] {
            assert!(matches!(printable(text), Cow::Borrowed(same) if same == text), "{text:?}");
        }
    }

    #[test]
    fn lines_and_colours_are_kept_where_they_are_ours() {
        assert_eq!(printable_lines("a\nb\u{1b}[0m"), "a\nb\\u{1b}[0m");
        let coloured = "\u{1b}[1;33mwarning:\u{1b}[0m a\n\u{1b}[2Jb\u{1b}]0;title\u{7}";
        assert_eq!(
            printable_coloured(coloured),
            "\u{1b}[1;33mwarning:\u{1b}[0m a\n\\u{1b}[2Jb\\u{1b}]0;title\\u{7}"
        );
        assert_eq!(printable_coloured("\u{1b}["), "\\u{1b}[");
    }

    #[test]
    fn shown_json_is_the_same_json() {
        let value = serde_json::json!({"text": "a\u{9b}31m\u{202e}\u{e0041}\u{7f}\nü"});
        let json = serde_json::to_string(&value).unwrap() + "\n";
        let shown = printable_json(&json);
        assert!(!shown.contains(['\u{9b}', '\u{202e}', '\u{e0041}', '\u{7f}']) && shown.ends_with("}\n"));
        assert_eq!(serde_json::from_str::<serde_json::Value>(&shown).unwrap(), value);
    }
}
