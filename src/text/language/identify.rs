//! Identifies the language of a text.
//!
//! [`LanguageIdentifier`] is the crate `lingua` restricted to the 17 languages, in its high-accuracy
//! mode (n-grams of 1 to 5 letters instead of 3 only). Measured on 120 prompts, translated into each of
//! the 17 languages (2,040 texts of 50 characters on average), on one thread of a 2-core machine under
//! other load (under heavier load, high accuracy managed 1,300 to 1,600 texts per second):
//!
//! | mode | correct | texts per second | first text | memory: heap + mapped from the executable |
//! |---|---|---|---|---|
//! | high accuracy | 97.4% | 2,900 | 13 ms | 2.9 + 57 MiB |
//! | low accuracy | 95.5% | 4,000 | 12 ms | 3.0 + 61 MiB |
//!
//! The low-accuracy mode makes nearly twice as many errors for a third more speed. It needs no less
//! memory: the models, 70 MiB of the executable, are mapped, not loaded. Both modes are far faster than
//! text generation. Most errors of the high-accuracy mode are texts in two languages, such as a foreign
//! title with three words about it.
//!
//! # The rule
//! A text has kept its language if lingua's confidence for that language is at least half
//! ([`KEPT_RATIO`]) of the highest confidence. Half, because related languages (es and pt, cs and pl)
//! and texts with a name or a quotation often come a close second. The rule measures the main language
//! of a text: in a text of two scripts, the script with more words.
//!
//! On the same 2,040 texts, without the 0.8% that have too few letters, by the required ratio:
//!
//! | ratio | own language judged "not kept" | another language judged "kept", mean over the 16 others |
//! |---|---|---|
//! | 1 | 2.3% | 0.14% |
//! | 0.7 | 1.7% | 0.25% |
//! | **0.5** | **1.4%** | **0.36%** |
//! | 0.3 | 1.0% | 0.76% |
//!
//! At 0.5, nearly all errors of the first kind are texts that quote English. The most frequent error of
//! the second kind is Portuguese judged "kept" for Spanish (11 of 120).
//!
//! Measured by this module's ignored test on a folder of `{lang}.jsonl` files whose lines correspond:
//! `DETOX_GGUF_PARALLEL_PROMPTS=DIR cargo test --release --lib language -- --ignored --nocapture`
//!
//! # Too few letters
//! The same texts, cut after a number of letters, by script, at ratio 0.5 (own judged "not kept", other judged "kept"):
//!
//! | letters | 3 | 4 | 6 | 8 | 10 | 12 | 15 | 20 | 30 |
//! |---|---|---|---|---|---|---|---|---|---|
//! | Latin, % | 19, 22 | 17, 16 | 13, 11 | 11, 7.0 | 8.3, 5.4 | 5.9, 4.3 | 4.1, 3.0 | 3.3, 2.0 | 2.2, 0.8 |
//! | others, % | 3.9, 0.9 | 3.1, 0.6 | 2.9, 0.4 | 2.4, 0.3 | 2.4, 0.2 | 2.7, 0.3 | 2.8, 0.4 | 3.2, 0.5 | 4.2, 0.4 |
//!
//! Hence a minimum of 15 letters if at least half are Latin ([`MIN_LATIN_LETTERS`]), else 4
//! ([`MIN_OTHER_LETTERS`]). In other scripts, the script almost decides alone, but Japanese without kana
//! looks like Chinese: in 8.4% of the texts at 3 letters, and 2.5% at 4.
//!
//! # Limits
//! A language outside the 17 is identified as the most similar of them: Ukrainian as ru, Danish as sv,
//! Malay as id, Persian as ar. Scripts that none of the 17 uses (Thai, Greek, Hebrew) are undecided.

use std::collections::HashMap;

use lingua::{LanguageDetector, LanguageDetectorBuilder};

use super::{LANGUAGES, find, normalize};

/// A language is kept if its confidence is at least this fraction of the highest; see the
/// [rule](self#the-rule).
pub const KEPT_RATIO: f64 = 0.5;
/// Minimum number of letters if at least half are Latin; see [too few letters](self#too-few-letters).
pub const MIN_LATIN_LETTERS: usize = 15;
/// Minimum number of letters in other scripts; see [too few letters](self#too-few-letters).
pub const MIN_OTHER_LETTERS: usize = 4;

/// Identifies which of the 17 languages a text is in.
///
/// Threads can share one value. Creating it takes a few milliseconds.
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
        // Load the models now, so that no thread waits in the middle of a run.
        let detector =
            LanguageDetectorBuilder::from_languages(&models).with_preloaded_language_models().build();
        let codes = models.into_iter().zip(LANGUAGES.iter().map(|language| language.code)).collect();
        LanguageIdentifier { detector, codes }
    }

    /// The most likely of the 17 languages.
    ///
    /// `None` for a text with too few letters ([`MIN_LATIN_LETTERS`], [`MIN_OTHER_LETTERS`]) or only
    /// letters that none of the 17 uses, and if two languages tie at the top.
    pub fn identify(&self, text: &str) -> Option<&'static str> {
        let confidences = self.confidences(text)?;
        match confidences[..] {
            // Values are in descending order. A tie at the top is undecided.
            [(best, highest), (_, second), ..] if highest > second => self.codes.get(&best).copied(),
            _ => None,
        }
    }

    /// Whether the text is in the expected language, by the module's [rule](self#the-rule).
    ///
    /// `None` if undecided: for too few or unknown letters as in [`identify`](Self::identify), or if
    /// `expected` is not one of the 17. Do not count `None` as either answer.
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

    /// lingua's confidences, highest first; `None` if the text is undecidable.
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

/// Whether `c` is a letter up to Latin Extended-B or in Latin Extended Additional.
fn is_latin(c: char) -> bool {
    c.is_alphabetic() && (c <= '\u{24F}' || ('\u{1E00}'..='\u{1EFF}').contains(&c))
}
