//! The embedded scorer: a linear model over hashed character n-grams, for 17 languages.
//!
//! `scripts/lexical/` trains it; `docs/lexical-scorer.md` documents its abilities and limits. The
//! [normalisation](crate::text::normalise) and the features match `scripts/lexical/features.py` bit for
//! bit, because the weights depend on both. `tests/golden/lexical.json` checks that they agree.
//!
//! A text is normalised to lower-case words without punctuation. Its features are the n-grams of three
//! to six codes inside each word (with a mark at both ends; in Hangul, kana and Han also one and two
//! codes), whole words, and pairs of neighbouring words. Each feature is a 32-bit hash: some of its bits
//! select a slot of the table, others are a fingerprint. A slot with a different fingerprint adds
//! nothing, so n-grams unseen in training do not change the sum.
//!
//! A window is [`SPAN`] neighbouring buckets of [`BUCKET`] columns; its value is
//! `sum / sqrt(count + damping)`. The text's value is that of its highest window, minus a term that
//! grows with the number of windows, because the maximum of many windows is higher by chance. Windows
//! keep long benign text from adding up to a high score, and let a toxic phrase stand out anywhere.

use std::sync::LazyLock;

use sha2::{Digest, Sha256};

use crate::error::Error;
use crate::score::{Scorer, ScorerInfo, Text};
use crate::text::normalise::{DENSE, SEPARATOR, normalise};

/// Name of the embedded scorer.
pub const NAME: &str = "lexical";

/// The languages that the weights were trained on.
pub const LANGUAGES: [&str; 17] =
    ["ar", "cs", "de", "en", "es", "fr", "hi", "id", "it", "ja", "ko", "nl", "pl", "pt", "ru", "sv", "zh"];

const MAGIC: &[u8; 8] = b"DTXLEX01";
const DIGEST: usize = 32;
/// Bytes of magic, version, two sizes, four calibration numbers and one offset per language.
const FIELDS: usize = 8 + 8 + 4 + 4 + 4 * 8 + LANGUAGES.len() * 8;
const HEADER: usize = FIELDS + DIGEST;

/// Codes of the longest n-gram.
const LONGEST: usize = 6;
/// Letters of a word that enter its hash.
const WORD_CAP: usize = 24;
/// Columns of a bucket; a character from [`DENSE`] on takes two.
const BUCKET: u32 = 16;
/// Buckets of a window.
const SPAN: usize = 3;
const SEED: u32 = 0x811C_9DC5;
const PAIR_SEED: u32 = 0x7F4A_7C15;
const MULTIPLIER: u32 = 0x9E37_79B1;

/// Reasons to refuse a weight file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WeightsError {
    /// The file ends inside its header.
    #[error("the lexical weights are truncated: expected at least {HEADER} bytes for the header, found {0}")]
    Truncated(usize),
    /// The file does not start with the magic bytes.
    #[error("not a lexical weight file: it does not start with DTXLEX01")]
    Magic,
    /// A field of the header is out of range or not finite.
    #[error("the header of the lexical weights is invalid: {0}")]
    Header(&'static str),
    /// The size of the table differs from the header.
    #[error("the lexical weights: expected {expected} bytes of entries, found {found}")]
    Size {
        /// Bytes according to the header.
        expected: usize,
        /// Bytes after the header.
        found: usize,
    },
    /// The content does not match its SHA-256.
    #[error("the lexical weights are damaged: their SHA-256 does not match")]
    Digest,
}

/// The multilingual lexical toxicity scorer.
#[derive(Debug)]
pub struct Lexical {
    version: String,
    sha256: String,
    /// The table: fingerprint in the low byte, weight in the high byte.
    entries: Vec<u16>,
    shift: u32,
    damping: f64,
    slope: f64,
    offset: f64,
    crowding: f64,
    offsets: [f64; LANGUAGES.len()],
}

static EMBEDDED: LazyLock<Lexical> = LazyLock::new(|| {
    Lexical::from_bytes(include_bytes!("lexical.bin")).expect("the embedded weights are valid (tested)")
});

impl Lexical {
    /// The scorer with the embedded weights.
    pub fn embedded() -> &'static Lexical {
        &EMBEDDED
    }

    /// Reads a weight file of `scripts/lexical/train.py`.
    ///
    /// # Errors
    /// [`WeightsError`] if the file is truncated, damaged or of another kind.
    pub fn from_bytes(bytes: &[u8]) -> Result<Lexical, WeightsError> {
        if bytes.len() < HEADER {
            return Err(WeightsError::Truncated(bytes.len()));
        }
        if &bytes[..8] != MAGIC {
            return Err(WeightsError::Magic);
        }
        let version = std::str::from_utf8(&bytes[8..16])
            .map_err(|_| WeightsError::Header("the version is not text"))?
            .trim_end_matches('\0')
            .to_owned();
        let integer = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let number = |at: usize| f64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        let (bits, expected) = (integer(16), integer(20) as usize);
        let found = bytes.len() - HEADER;
        if !(8..=24).contains(&bits) || expected != 2 << bits {
            return Err(WeightsError::Header("the table size is out of range"));
        }
        if found != expected {
            return Err(WeightsError::Size { expected, found });
        }
        let mut digest = Sha256::new();
        digest.update(&bytes[..FIELDS]);
        digest.update(&bytes[HEADER..]);
        if digest.finalize()[..] != bytes[FIELDS..HEADER] {
            return Err(WeightsError::Digest);
        }
        let (damping, slope, offset, crowding) = (number(24), number(32), number(40), number(48));
        let offsets = std::array::from_fn::<f64, { LANGUAGES.len() }, _>(|i| number(56 + 8 * i));
        let finite =
            [damping, slope, offset, crowding].iter().chain(&offsets).all(|number| number.is_finite());
        if !finite || damping <= 0.0 || slope <= 0.0 {
            return Err(WeightsError::Header("the calibration is not finite and positive"));
        }
        let entries = bytes[HEADER..].chunks_exact(2).map(|e| u16::from_le_bytes([e[0], e[1]])).collect();
        let sha256 = crate::file::hex(&Sha256::digest(bytes));
        Ok(Lexical { version, sha256, entries, shift: 32 - bits, damping, slope, offset, crowding, offsets })
    }

    /// The probability in [0, 1] that a reader finds `text` toxic; the threshold is 0.5.
    ///
    /// Text without a word (empty, only punctuation or emoji) scores 0. `language` is a hint: a covered
    /// language shifts the score by that language's calibration, any other has no effect.
    pub fn toxicity(&self, text: &str, language: Option<&str>) -> f32 {
        let hint = language.and_then(|language| LANGUAGES.iter().position(|known| *known == language));
        let offset = self.offset + hint.map_or(0.0, |at| self.offsets[at]);
        match self.highest_window(&normalise(text)) {
            Some((value, windows)) => {
                let odds = self.slope * value + offset - self.crowding * f64::from(windows).ln();
                (1.0 / (1.0 + (-odds).exp())) as f32
            }
            None => 0.0,
        }
    }

    /// The version of the weights.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// The SHA-256 of the whole weight file, in hexadecimal.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    #[inline]
    fn weight(&self, hash: u32) -> i32 {
        let entry = self.entries[(hash >> self.shift) as usize];
        // A mask instead of a branch, which would be unpredictable.
        let matches = -i32::from((entry ^ hash as u16) & 0xFF == 0);
        i32::from((entry >> 8) as i8) & matches
    }

    /// Value of the highest window and the number of windows; `None` without a feature.
    fn highest_window(&self, codes: &[u16]) -> Option<(f64, u32)> {
        let value = |recent: &[(i32, u32); SPAN]| {
            let (sum, count) = recent.iter().fold((0, 0), |total, part| (total.0 + part.0, total.1 + part.1));
            f64::from(sum) / (f64::from(count) + self.damping).sqrt()
        };
        let (mut highest, mut windows) = (f64::NEG_INFINITY, 0);
        // Sum and count of the last buckets; the current one is at the end.
        let mut recent = [(0_i32, 0_u32); SPAN];
        let (mut bucket, mut column) = (0, 0);
        let mut previous_word: Option<u32> = None;
        for (start, &first) in codes.iter().enumerate() {
            if column / BUCKET != bucket {
                if bucket as usize + 1 >= SPAN {
                    highest = highest.max(value(&recent));
                    windows += 1;
                }
                recent.rotate_left(1);
                recent[SPAN - 1] = (0, 0);
                bucket = column / BUCKET;
            }
            column += 1 + u32::from(first >= DENSE);

            let (mut sum, mut count) = (0, 0);
            let mut hash = mix(SEED, u32::from(first));
            if first >= DENSE {
                sum += self.weight(hash);
                count += 1;
            }
            let rest = &codes[start + 1..];
            let mut closed = false;
            for (extra, &code) in rest.iter().take(LONGEST - 1).enumerate() {
                hash = mix(hash, u32::from(code));
                if extra > 0 || first >= DENSE || code >= DENSE {
                    sum += self.weight(hash);
                    count += 1;
                }
                if code == SEPARATOR {
                    closed = true;
                    break;
                }
            }
            if first == SEPARATOR && !rest.is_empty() {
                if !closed {
                    // The word is longer than an n-gram: extend the hash to its end or to the cap.
                    let end =
                        rest.iter().take(WORD_CAP).position(|&code| code == SEPARATOR).unwrap_or(WORD_CAP);
                    for &code in &rest[LONGEST - 1..end] {
                        hash = mix(hash, u32::from(code));
                    }
                    hash = mix(hash, 0);
                    sum += self.weight(hash);
                    count += 1;
                }
                if let Some(previous) = previous_word.replace(hash) {
                    sum += self.weight(mix(mix(PAIR_SEED, previous), hash));
                    count += 1;
                }
            }
            recent[SPAN - 1].0 += sum;
            recent[SPAN - 1].1 += count;
        }
        // A last bucket without features, such as the last letter alone, does not end a new window.
        let ends_one = recent[SPAN - 1].1 > 0 || (bucket as usize) < SPAN;
        if ends_one && recent.iter().any(|part| part.1 > 0) {
            highest = highest.max(value(&recent));
            windows += 1;
        }
        (windows > 0).then_some((highest, windows))
    }
}

/// One step of the n-gram hash.
#[inline]
fn mix(hash: u32, code: u32) -> u32 {
    let mixed = (hash ^ code).wrapping_mul(MULTIPLIER);
    mixed ^ (mixed >> 15)
}

/// [`Lexical::embedded`] as a scorer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Embedded;

impl Scorer for Embedded {
    fn info(&self) -> ScorerInfo {
        let weights = Lexical::embedded();
        ScorerInfo {
            name: NAME.into(),
            version: weights.version().into(),
            sha256: Some(weights.sha256().into()),
            languages: LANGUAGES.map(str::to_owned).to_vec(),
        }
    }

    fn toxicity(&self, Text { text, language }: Text<'_>) -> Result<f64, Error> {
        // In a language outside the training data, the number would mean nothing.
        if let Some(language) = language
            && !LANGUAGES.contains(&language)
        {
            return Err(Error::scorer(NAME, format!("does not cover language {language:?}")));
        }
        // An f32 has about six correct decimals; print no others.
        let score = f64::from(Lexical::embedded().toxicity(text, language));
        Ok((score * 1e6).round() / 1e6)
    }
}

#[cfg(test)]
mod tests;
