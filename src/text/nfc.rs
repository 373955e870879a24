//! Unicode's normalisation form C, which some tokenizers expect.

use std::borrow::Cow;

use unicode_normalization::UnicodeNormalization;

/// Whether a text is in NFC.
pub fn is_nfc(text: &str) -> bool {
    unicode_normalization::is_nfc(text)
}

/// The text in NFC: "e" with a combining acute accent becomes "é".
pub fn to_nfc(text: &str) -> Cow<'_, str> {
    if is_nfc(text) { Cow::Borrowed(text) } else { Cow::Owned(text.nfc().collect()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_text_that_is_not_nfc_is_changed() {
        for (text, expected) in [
            ("", ""),
            ("plain", "plain"),
            ("caf\u{e9}", "caf\u{e9}"),
            ("cafe\u{301}", "caf\u{e9}"),
            ("\u{1112}\u{1161}\u{11ab}", "\u{d55c}"), // Hangul jamo
            ("\u{95c}", "\u{921}\u{93c}"),            // Devanagari dddha is excluded from composition
            ("\u{212b}", "\u{c5}"),                   // the ångström sign is an Å
        ] {
            assert_eq!(to_nfc(text), expected);
            assert_eq!(is_nfc(text), text == expected, "{text:?}");
            assert!(is_nfc(&to_nfc(text)));
        }
    }
}
