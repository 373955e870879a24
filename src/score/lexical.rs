//! The embedded scorer: a linear model over hashed character n-grams, for 17 languages at once.
//!
//! `scripts/lexical/` trains it and `docs/lexical-scorer.md` says what it can and cannot do. The
//! normalisation and the features here are those of `scripts/lexical/features.py`, to the last bit:
//! the weights are worth nothing under any other definition. `tests/golden/lexical.json` holds both
//! sides to one another.
//!
//! A text becomes lower-case words without punctuation. Its features are the n-grams of three to six
//! codes inside each word (with a mark at both ends; one and two codes too in Hangul, kana and Han),
//! whole words, and pairs of neighbouring words. Each is a 32-bit hash that names a slot and a
//! fingerprint; a slot with another fingerprint counts nothing, so n-grams never seen in training
//! leave the sum alone.
//!
//! The value of a window is `sum / sqrt(count + damping)`, and the text's is that of its highest
//! window, less a little for the number of windows, since the highest of many is higher by chance
//! alone. A window is [`SPAN`] neighbouring buckets of [`BUCKET`] columns: long benign text cannot add
//! up to a high score, and a toxic phrase stands out wherever it is.

use std::sync::LazyLock;

use sha2::{Digest, Sha256};
use unicode_normalization::UnicodeNormalization;

/// The languages that the weights were trained on.
pub const LANGUAGES: [&str; 17] =
    ["ar", "cs", "de", "en", "es", "fr", "hi", "id", "it", "ja", "ko", "nl", "pl", "pt", "ru", "sv", "zh"];

const MAGIC: &[u8; 8] = b"DTXLEX01";
const DIGEST: usize = 32;
/// Magic, version, two sizes, four calibration numbers and one offset for each language.
const FIELDS: usize = 8 + 8 + 4 + 4 + 4 * 8 + LANGUAGES.len() * 8;
const HEADER: usize = FIELDS + DIGEST;

/// Codes of the longest n-gram.
const LONGEST: usize = 6;
/// Letters of a word that its hash takes in.
const WORD_CAP: usize = 24;
/// Columns of a bucket; a character from [`DENSE`] on takes two.
const BUCKET: u32 = 16;
/// Buckets of a window.
const SPAN: usize = 3;
/// From here on (Hangul, kana, Han) single characters carry meaning.
const DENSE: u16 = 0x1100;
const SEED: u32 = 0x811C_9DC5;
const PAIR_SEED: u32 = 0x7F4A_7C15;
const MULTIPLIER: u32 = 0x9E37_79B1;

/// Why a weight file was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WeightsError {
    /// The file ends before its header does.
    #[error("the lexical weights are cut off: {0} bytes, and the header alone takes {HEADER}")]
    Truncated(usize),
    /// The file starts with other bytes than a weight file.
    #[error("not a lexical weight file: it does not start with DTXLEX01")]
    Magic,
    /// The version is no text, or a number of the calibration is not finite.
    #[error("the header of the lexical weights is invalid: {0}")]
    Header(&'static str),
    /// The table has another size than the header says.
    #[error("the lexical weights hold {found} bytes of entries instead of {expected}")]
    Size {
        /// Bytes that the header asks for.
        expected: usize,
        /// Bytes after the header.
        found: usize,
    },
    /// The content does not match its digest.
    #[error("the lexical weights are damaged: their SHA-256 does not match")]
    Digest,
}

/// The multilingual lexical toxicity scorer.
#[derive(Debug)]
pub struct Lexical {
    version: String,
    sha256: String,
    /// Fingerprint in the low byte, weight in the high one.
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
    /// The scorer with the weights that the program carries.
    pub fn embedded() -> &'static Lexical {
        &EMBEDDED
    }

    /// Read a weight file as `scripts/lexical/train.py` writes it.
    ///
    /// # Errors
    /// [`WeightsError`] if the bytes are not a whole and undamaged weight file.
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

    /// The probability, from 0 to 1, that a reader finds `text` toxic; 0.5 is the threshold.
    ///
    /// Text without a word (empty, punctuation, emoji alone) scores 0. `language` is a hint: one of
    /// [`LANGUAGES`] shifts the score by that language's calibration, anything else changes nothing.
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
        // A mask, not a branch: whether a fingerprint matches is unpredictable.
        let matches = -i32::from((entry ^ hash as u16) & 0xFF == 0);
        i32::from((entry >> 8) as i8) & matches
    }

    /// `sum / sqrt(count + damping)` of the highest window and how many windows there are, or nothing
    /// where there is no feature.
    fn highest_window(&self, codes: &[u16]) -> Option<(f64, u32)> {
        let value = |recent: &[(i32, u32); SPAN]| {
            let (sum, count) = recent.iter().fold((0, 0), |total, part| (total.0 + part.0, total.1 + part.1));
            f64::from(sum) / (f64::from(count) + self.damping).sqrt()
        };
        let (mut highest, mut windows) = (f64::NEG_INFINITY, 0);
        // Sum and count of the last buckets; the bucket that is being filled is at the end.
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
                if code == 0 {
                    closed = true;
                    break;
                }
            }
            if first == 0 && !rest.is_empty() {
                if !closed {
                    // The word is longer than an n-gram: its hash goes on to its end or to the cap.
                    let end = rest.iter().take(WORD_CAP).position(|&code| code == 0).unwrap_or(WORD_CAP);
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
        // A last bucket without features (it may hold the last letter alone) ends no new window.
        let ends_one = recent[SPAN - 1].1 > 0 || (bucket as usize) < SPAN;
        if ends_one && recent.iter().any(|part| part.1 > 0) {
            highest = highest.max(value(&recent));
            windows += 1;
        }
        (windows > 0).then_some((highest, windows))
    }
}

#[inline]
fn mix(hash: u32, code: u32) -> u32 {
    let mixed = (hash ^ code).wrapping_mul(MULTIPLIER);
    mixed ^ (mixed >> 15)
}

/// Marks in [`CODES`]; neither is a letter's code.
const SEPARATOR: u16 = 0;
const REMOVED: u16 = 1;

/// What each character of the basic plane becomes.
static CODES: LazyLock<Box<[u16]>> = LazyLock::new(|| {
    let mut codes = vec![SEPARATOR; 0x1_0000].into_boxed_slice();
    for (first, last) in LETTERS {
        for code in first..=last {
            let letter = char::from_u32(u32::from(code)).and_then(|c| c.to_lowercase().next());
            codes[usize::from(code)] = letter.map_or(SEPARATOR, |letter| folded(letter as u16));
        }
    }
    for zero in [0x30, 0x660, 0x6F0, 0x966] {
        codes[zero..zero + 10].fill(u16::from(b'0'));
    }
    for (first, last) in INVISIBLE {
        codes[usize::from(first)..=usize::from(last)].fill(REMOVED);
    }
    for mask in MASKS {
        codes[usize::from(mask)] = mask;
    }
    codes
});

const MASKS: [u16; 3] = [b'*' as u16, b'@' as u16, b'$' as u16];

/// Letters that writers use for one another.
fn folded(letter: u16) -> u16 {
    match letter {
        0x622 | 0x623 | 0x625 | 0x671 => 0x627,         // alef
        0x649 | 0x6CC => 0x64A,                         // yeh
        0x6A9 => 0x643,                                 // kaf
        0x629 | 0x6C0 | 0x6C1 | 0x6C3 | 0x6D5 => 0x647, // heh and teh marbuta
        0x451 => 0x435,                                 // Cyrillic yo
        0x30A1..=0x30F6 => letter - 0x60,               // katakana
        0x131 => 0x69,                                  // dotless i
        0x958..=0x95F => {
            [0x915, 0x916, 0x917, 0x91C, 0x921, 0x922, 0x92B, 0x92F][usize::from(letter - 0x958)]
        }
        _ => letter,
    }
}

/// Characters that belong to words.
const LETTERS: [(u16, u16); 43] = [
    (0x30, 0x39),
    (0x41, 0x5A),
    (0x61, 0x7A),
    (0xAA, 0xAA),
    (0xB5, 0xB5),
    (0xBA, 0xBA),
    (0xC0, 0xD6),
    (0xD8, 0xF6),
    (0xF8, 0x2AF),
    (0x370, 0x373),
    (0x376, 0x377),
    (0x37B, 0x37D),
    (0x37F, 0x37F),
    (0x386, 0x386),
    (0x388, 0x481),
    (0x48A, 0x52F),
    (0x531, 0x556),
    (0x560, 0x588),
    (0x5D0, 0x5EA),
    (0x620, 0x64A),
    (0x660, 0x669),
    (0x66E, 0x66F),
    (0x671, 0x6D3),
    (0x6EE, 0x6FC),
    (0x750, 0x77F),
    (0x900, 0x963),
    (0x966, 0x96F),
    (0x971, 0xDFF),
    (0xE01, 0xE3A),
    (0xE40, 0xE4E),
    (0x10A0, 0x10FA),
    (0x1100, 0x11FF),
    (0x1E00, 0x1FBC),
    (0x3005, 0x3007),
    (0x3041, 0x3096),
    (0x30A1, 0x30FA),
    (0x30FC, 0x30FE),
    (0x3105, 0x312F),
    (0x3131, 0x318E),
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A3),
];

/// Characters that leave no trace: format characters, points, tatweel, nukta, combining marks.
const INVISIBLE: [(u16, u16); 16] = [
    (0xAD, 0xAD),
    (0x300, 0x36F),
    (0x483, 0x487),
    (0x591, 0x5BD),
    (0x610, 0x61A),
    (0x640, 0x640),
    (0x64B, 0x65F),
    (0x670, 0x670),
    (0x6D6, 0x6DC),
    (0x93C, 0x93C),
    (0x200B, 0x200F),
    (0x202A, 0x202E),
    (0x2060, 0x2064),
    (0x3099, 0x309A),
    (0xFE00, 0xFE0F),
    (0xFEFF, 0xFEFF),
];

/// Whether `letter` can have another form that NFKC unites it with; other text skips that step.
fn is_composed(letter: char) -> bool {
    matches!(letter,
        '\u{300}'..='\u{36F}' | '\u{1100}'..='\u{11FF}' | '\u{3099}'..='\u{309A}'
        | '\u{F900}'..='\u{FEFE}' | '\u{FF00}'..='\u{FFEF}' | '\u{1D400}'..='\u{1D7FF}')
}

/// Words as codes, with a zero before, between and after them.
fn normalise(text: &str) -> Vec<u16> {
    let mut words = Words::with_capacity(text.len());
    // ASCII and most other text has no form to unite.
    if !text.is_ascii() && text.chars().any(is_composed) {
        text.nfkc().for_each(|letter| words.push(letter));
    } else {
        text.chars().for_each(|letter| words.push(letter));
    }
    words.finish()
}

struct Words {
    table: &'static [u16],
    codes: Vec<u16>,
    /// How often the last code was met in a row.
    run: u32,
    /// Masks (`*`, `@`, `$`) after a letter: part of the word only if a letter follows.
    pending: Vec<u16>,
}

impl Words {
    fn with_capacity(bytes: usize) -> Words {
        let mut codes = Vec::with_capacity(bytes + 2);
        codes.push(SEPARATOR);
        Words { table: &CODES, codes, run: 0, pending: Vec::new() }
    }

    #[inline]
    fn push(&mut self, letter: char) {
        let code = self.table.get(letter as usize).copied().unwrap_or(SEPARATOR);
        match code {
            REMOVED => {}
            SEPARATOR => self.separate(),
            _ if MASKS.contains(&code) => {
                if self.codes.last() != Some(&SEPARATOR) {
                    self.pending.push(match code as u8 {
                        b'@' => u16::from(b'a'),
                        b'$' => u16::from(b's'),
                        _ => code,
                    });
                }
            }
            _ => {
                if !self.pending.is_empty() {
                    for mask in std::mem::take(&mut self.pending) {
                        self.letter(mask);
                    }
                }
                self.letter(code);
            }
        }
    }

    #[inline]
    fn separate(&mut self) {
        self.pending.clear();
        if self.codes.last() != Some(&SEPARATOR) {
            self.codes.push(SEPARATOR);
        }
        self.run = 0;
    }

    /// Add a letter; of three or more in a row one stays.
    #[inline]
    fn letter(&mut self, code: u16) {
        if self.codes.last() != Some(&code) {
            self.codes.push(code);
            self.run = 1;
            return;
        }
        self.run += 1;
        match self.run {
            2 => self.codes.push(code),
            3 => drop(self.codes.pop()),
            _ => {}
        }
    }

    fn finish(mut self) -> Vec<u16> {
        self.separate();
        self.codes
    }
}

#[cfg(test)]
mod tests;
