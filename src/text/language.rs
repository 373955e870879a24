//! The 17 languages, and which of them a text is in.
//!
//! # Identification
//! [`LanguageIdentifier`] is the crate `lingua` restricted to the 17 languages, in its high-accuracy
//! mode (n-grams of 1 to 5 letters, not 3 alone). Measured on 120 prompts, the same in each of the 17
//! languages (2,040 texts of 50 characters on average), on one thread of a 2-core machine that was
//! busy with other work (at busier times the better mode did 1,300 to 1,600 texts a second):
//!
//! | mode | right | texts a second | first text | memory: heap + mapped from the program's file |
//! |---|---|---|---|---|
//! | high accuracy | 97.4% | 2,900 | 13 ms | 2.9 + 57 MiB |
//! | low accuracy | 95.5% | 4,000 | 12 ms | 3.0 + 61 MiB |
//!
//! The low-accuracy mode makes nearly twice the errors for a third more speed and no less memory (the
//! models, 70 MiB of the program, are mapped, not loaded), and either is far faster than a model
//! writes. Most of what the better mode gets wrong are texts of two languages, such as a foreign title
//! and three words about it.
//!
//! # The rule
//! A text has kept its language when lingua's confidence for that language is at least half
//! ([`KEPT_RATIO`]) of the highest confidence. Half, because related languages (es and pt, cs and pl)
//! and texts with a name or a quotation in them often come second by little. What is measured is the
//! text's main language: in a text of two scripts that is the script with more words.
//!
//! On the same 2,040 texts (those with too few letters apart: 0.8%), by the least ratio:
//!
//! | ratio | own language judged "not kept" | another language judged "kept", mean over the 16 others |
//! |---|---|---|
//! | 1 | 2.3% | 0.14% |
//! | 0.7 | 1.7% | 0.25% |
//! | **0.5** | **1.4%** | **0.36%** |
//! | 0.3 | 1.0% | 0.76% |
//!
//! Of the errors at 0.5, the first kind are nearly all texts that quote English; of the second kind
//! the most frequent is Portuguese judged "kept" for Spanish (11 of 120).
//!
//! Measured by this module's ignored test, on a folder of `{lang}.jsonl` files, parallel by line:
//! `DETOX_GGUF_PARALLEL_PROMPTS=DIR cargo test --release --lib language -- --ignored --nocapture`
//!
//! # Too few letters
//! The same texts, cut after so many letters, at the ratio 0.5 (own judged "not kept", other judged "kept"):
//!
//! | letters | 3 | 4 | 6 | 8 | 10 | 12 | 15 | 20 | 30 |
//! |---|---|---|---|---|---|---|---|---|---|
//! | Latin script, % | 19, 22 | 17, 16 | 13, 11 | 11, 7.0 | 8.3, 5.4 | 5.9, 4.3 | 4.1, 3.0 | 3.3, 2.0 | 2.2, 0.8 |
//! | other scripts, % | 3.9, 0.9 | 3.1, 0.6 | 2.9, 0.4 | 2.4, 0.3 | 2.4, 0.2 | 2.7, 0.3 | 2.8, 0.4 | 3.2, 0.5 | 4.2, 0.4 |
//!
//! Hence 15 letters where at least half are Latin ([`MIN_LATIN_LETTERS`]), else 4
//! ([`MIN_OTHER_LETTERS`]: the script decides almost alone, but Japanese without kana reads as
//! Chinese, in 8.4% of the texts at 3 letters and 2.5% at 4).
//!
//! # Limits
//! A language outside the 17 is taken for the likest of them: Ukrainian for ru, Danish for sv, Malay
//! for id, Persian for ar. Scripts that none of the 17 uses (Thai, Greek, Hebrew) are undecided.

use std::collections::HashMap;

use lingua::{LanguageDetector, LanguageDetectorBuilder};

use crate::error::{Error, Result};

/// A language is kept when its confidence is at least this share of the highest; see the
/// [module](self#the-rule).
pub const KEPT_RATIO: f64 = 0.5;
/// Fewer letters than this, at least half of them Latin, are undecidable; see the
/// [module](self#too-few-letters).
pub const MIN_LATIN_LETTERS: usize = 15;
/// Fewer letters than this, mostly of other scripts, are undecidable; see the
/// [module](self#too-few-letters).
pub const MIN_OTHER_LETTERS: usize = 4;

/// One of the 17 languages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Language {
    /// ISO 639-1 code, lower case.
    pub code: &'static str,
    /// Its name in English.
    pub name: &'static str,
    /// Its name in itself.
    pub native_name: &'static str,
}

const fn language(code: &'static str, name: &'static str, native_name: &'static str) -> Language {
    Language { code, name, native_name }
}

/// The languages of the paper (arXiv 2406.16235, figure 1), by code. `zh` is written in simplified
/// characters there.
pub const LANGUAGES: [Language; 17] = [
    language("ar", "Arabic", "العربية"),
    language("cs", "Czech", "čeština"),
    language("de", "German", "Deutsch"),
    language("en", "English", "English"),
    language("es", "Spanish", "español"),
    language("fr", "French", "français"),
    language("hi", "Hindi", "हिन्दी"),
    language("id", "Indonesian", "Bahasa Indonesia"),
    language("it", "Italian", "italiano"),
    language("ja", "Japanese", "日本語"),
    language("ko", "Korean", "한국어"),
    language("nl", "Dutch", "Nederlands"),
    language("pl", "Polish", "polski"),
    language("pt", "Portuguese", "português"),
    language("ru", "Russian", "русский"),
    language("sv", "Swedish", "svenska"),
    language("zh", "Chinese", "中文"),
];

/// Languages that RTP-LX has beyond the 17: their prompts can be read and continued, but this
/// program makes no statement about the language of a continuation there.
const OTHER_CODES: [&str; 11] = ["bcms", "da", "fi", "he", "hu", "nb", "sw", "th", "tr", "uk", "zh-hant"];

/// Script subtags that may follow a language code, as in `zh-Hans` and FLORES' `arb_Arab`.
const SCRIPTS: [&str; 9] = ["arab", "cyrl", "deva", "hang", "hans", "hant", "jpan", "kore", "latn"];

/// The language of this code, if it is one of the 17.
pub fn find(code: &str) -> Option<&'static Language> {
    LANGUAGES.iter().find(|language| language.code == code)
}

/// Every code that [`normalize`] returns: the 17, then those that only RTP-LX has.
pub fn known_codes() -> Vec<&'static str> {
    LANGUAGES.iter().map(|language| language.code).chain(OTHER_CODES).collect()
}

/// The code as this program spells it: RTP-LX's locales (`EN`, `Pt-Br`, `NO-NB`, `ZH-Hans`), upper
/// case, `_` for `-`, and regions (`es-MX`, `pt_PT`) come down to the language.
///
/// Traditional Chinese (`zh-Hant`, `zh-TW`) stays apart as `zh-hant`, outside the 17: RTP-LX has a
/// file for each, and merging them would mix two sets of prompts under one figure.
pub fn normalize(code: &str) -> Option<&'static str> {
    let code = code.trim().to_ascii_lowercase().replace('_', "-");
    let (primary, rest) = code.split_once('-').map_or((code.as_str(), None), |(p, r)| (p, Some(r)));
    let subtags: Vec<&str> = rest.map(|rest| rest.split('-').collect()).unwrap_or_default();
    let is_region = |tag: &str| {
        (tag.len() == 2 && tag.bytes().all(|byte| byte.is_ascii_alphabetic()))
            || (tag.len() == 3 && tag.bytes().all(|byte| byte.is_ascii_digit()))
    };
    if !subtags.iter().all(|tag| is_region(tag) || SCRIPTS.contains(tag)) {
        return None;
    }
    let is_traditional = subtags.contains(&"hant")
        || (!subtags.contains(&"hans") && subtags.iter().any(|tag| ["tw", "hk", "mo"].contains(tag)));
    match primary {
        "zh" if is_traditional => Some("zh-hant"),
        "no" => Some("nb"),
        primary => known_codes().into_iter().find(|known| *known == primary),
    }
}

/// The languages of `--lang` (comma separated, repeatable), each once, in the order given.
pub fn parse_languages<S: AsRef<str>>(values: &[S]) -> Result<Vec<&'static str>> {
    let mut languages = Vec::new();
    for code in values.iter().flat_map(|value| value.as_ref().split(',')) {
        let Some(language) = normalize(code) else {
            return Err(Error::setting("--lang", format!("expected a known language code, found {code:?}"))
                .with_hint(format!("known: {}", known_codes().join(", "))));
        };
        if !languages.contains(&language) {
            languages.push(language);
        }
    }
    Ok(languages)
}

/// Tells which of the 17 languages a text is in.
///
/// One value serves all threads; making one takes a few milliseconds.
pub struct LanguageIdentifier {
    detector: LanguageDetector,
    codes: HashMap<lingua::Language, &'static str>,
}

impl std::fmt::Debug for LanguageIdentifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LanguageIdentifier").finish_non_exhaustive()
    }
}

impl Default for LanguageIdentifier {
    fn default() -> Self {
        LanguageIdentifier::new()
    }
}

impl LanguageIdentifier {
    /// Loads the models of the 17 languages.
    pub fn new() -> LanguageIdentifier {
        use lingua::Language::{
            Arabic, Chinese, Czech, Dutch, English, French, German, Hindi, Indonesian, Italian, Japanese,
            Korean, Polish, Portuguese, Russian, Spanish, Swedish,
        };
        // In the order of LANGUAGES.
        let models = [
            Arabic, Czech, German, English, Spanish, French, Hindi, Indonesian, Italian, Japanese, Korean,
            Dutch, Polish, Portuguese, Russian, Swedish, Chinese,
        ];
        // Loaded now rather than at the first text, so that no thread waits in the middle of a run.
        let detector =
            LanguageDetectorBuilder::from_languages(&models).with_preloaded_language_models().build();
        let codes = models.into_iter().zip(LANGUAGES.iter().map(|language| language.code)).collect();
        LanguageIdentifier { detector, codes }
    }

    /// The most likely of the 17 languages.
    ///
    /// None when the text has no letters, too few of them ([`MIN_LATIN_LETTERS`],
    /// [`MIN_OTHER_LETTERS`]), only letters that none of the 17 uses, or two languages at the top.
    pub fn identify(&self, text: &str) -> Option<&'static str> {
        let confidences = self.confidences(text)?;
        match confidences[..] {
            // A tie at the top is no answer. Values come in descending order.
            [(best, highest), (_, second), ..] if highest > second => self.codes.get(&best).copied(),
            _ => None,
        }
    }

    /// Whether the text is in the expected language, by the [rule](self#the-rule) of this module.
    ///
    /// None when that cannot be decided: as for [`identify`](Self::identify) (a tie apart), or when
    /// `expected` is not one of the 17. Count these apart from both answers.
    pub fn language_kept(&self, expected: &str, text: &str) -> Option<bool> {
        let expected = find(normalize(expected)?)?;
        let confidences = self.confidences(text)?;
        let (_, highest) = confidences.first()?;
        let confidence = confidences
            .iter()
            .find(|(language, _)| self.codes.get(language) == Some(&expected.code))
            .map_or(0.0, |(_, confidence)| *confidence);
        Some(confidence >= KEPT_RATIO * highest)
    }

    /// lingua's confidences, highest first; None where the highest would mean nothing.
    fn confidences(&self, text: &str) -> Option<Vec<(lingua::Language, f64)>> {
        let n_letters = text.chars().filter(|c| c.is_alphabetic()).count();
        let n_latin = text.chars().filter(|c| is_latin(*c)).count();
        let min = if 2 * n_latin >= n_letters { MIN_LATIN_LETTERS } else { MIN_OTHER_LETTERS };
        if n_letters < min {
            return None;
        }
        let confidences = self.detector.compute_language_confidence_values(text);
        confidences.first().is_some_and(|(_, highest)| *highest > 0.0).then_some(confidences)
    }
}

/// Letters of the Latin script: up to Latin Extended-B, and Latin Extended Additional.
fn is_latin(c: char) -> bool {
    c.is_alphabetic() && (c <= '\u{24F}' || ('\u{1E00}'..='\u{1EFF}').contains(&c))
}

#[cfg(test)]
mod tests;
