//! Normalises text into words, for the lexical scorer and other comparisons of words.
//!
//! It matches `scripts/lexical/features.py` bit for bit; `tests/golden/lexical.json` checks this
//! through the scores. The rules are in `docs/lexical-scorer.md`.

use std::sync::LazyLock;

use unicode_normalization::UnicodeNormalization;

/// From this code on (Hangul, kana, Han), a single character carries meaning.
pub const DENSE: u16 = 0x1100;

/// Code between words. No letter has it.
pub const SEPARATOR: u16 = 0;
/// Entry of [`CODES`] for characters that are dropped. No letter has it.
const REMOVED: u16 = 1;

/// The code of each character of the Basic Multilingual Plane.
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

/// Characters that mask a letter, as in `sh*t`.
const MASKS: [u16; 3] = [b'*' as u16, b'@' as u16, b'$' as u16];

/// One code for letters that writers use interchangeably.
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

/// Characters of words: first and last code of each range.
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

/// Characters that are dropped: format characters, points, tatweel, nukta, combining marks.
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

/// Whether NFKC can change `letter`. Text without such letters skips that step.
fn is_composed(letter: char) -> bool {
    matches!(letter,
        '\u{300}'..='\u{36F}' | '\u{1100}'..='\u{11FF}' | '\u{3099}'..='\u{309A}'
        | '\u{F900}'..='\u{FEFE}' | '\u{FF00}'..='\u{FFEF}' | '\u{1D400}'..='\u{1D7FF}')
}

/// The words of a text as codes, with a [`SEPARATOR`] before, between and after them.
///
/// Lower case, without punctuation; a run of three or more equal letters becomes one letter.
pub fn normalise(text: &str) -> Vec<u16> {
    let mut words = Words::with_capacity(text.len());
    // NFKC changes neither ASCII nor most other text.
    if !text.is_ascii() && text.chars().any(is_composed) {
        text.nfkc().for_each(|letter| words.push(letter));
    } else {
        text.chars().for_each(|letter| words.push(letter));
    }
    words.finish()
}

/// A text being normalised.
struct Words {
    table: &'static [u16],
    codes: Vec<u16>,
    /// Length of the current run of equal codes in the text.
    run: u32,
    /// Masks (`*`, `@`, `$`) after a letter. They belong to the word only if a letter follows.
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

    /// Adds a letter. Of three or more equal letters in a row, one stays.
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
