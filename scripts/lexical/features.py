"""Normalisation, n-gram hashing and scoring of the lexical scorer.

The Rust scorer (src/text/normalise.rs, src/score/lexical.rs) implements the same definitions, and
`tests/golden/lexical.json` keeps the two in agreement. If you change one, change the other and train again.

Normalisation
    1. Text that contains a character of `COMPOSED` (combining marks, jamo, presentation and width
       forms, mathematical letters) is converted to NFKC. Other text is left as it is.
    2. Each character is removed (format characters, Arabic and Hebrew points, the nukta), becomes a
       separator (punctuation, symbols, everything outside the ranges of `WORD`), or becomes a letter:
       lower case, digits folded to "0", spelling variants of Arabic, Persian and Russian letters
       folded, katakana converted to hiragana.
    3. A run of `*`, `@`, `$` between two letters belongs to the word (as `*`, `a`, `s`).
    4. A letter repeated three or more times in a row is kept once.
    Punctuation and case are removed entirely, so the model cannot use them as shortcuts.

Features of a text. Each word is written as `0 letters 0`, where 0 marks both ends.
    * every n-gram of 3 to `LONGEST` codes in the word; from U+1100 on (Hangul, kana, Han) also
      n-grams of 1 and 2 codes;
    * the whole word (its first 24 letters), if it is longer than the longest n-gram;
    * each pair of neighbouring words.
"""

from __future__ import annotations

import re
import sys
import unicodedata

import numpy as np

LANGUAGES = "ar cs de en es fr hi id it ja ko nl pl pt ru sv zh".split()

LONGEST = 6  # codes of the longest n-gram
WORD_CAP = 24  # letters of a word that its hash includes
BUCKET = 16  # columns per bucket; characters from U+1100 on take two columns
SPAN = 3  # buckets per window
MULTIPLIER = 0x9E3779B1
SEED = 0x811C9DC5
PAIR_SEED = 0x7F4A7C15
DENSE = 0x1100  # from here on, single characters carry meaning

COMPOSED = re.compile(
    "[\u0300-\u036f\u1100-\u11ff\u3099\u309a\uf900-\ufefe\uff00-\uffef\U0001d400-\U0001d7ff]"
)
# fmt: off
WORD = [
    (0x30, 0x39), (0x41, 0x5A), (0x61, 0x7A), (0xAA, 0xAA), (0xB5, 0xB5), (0xBA, 0xBA),
    (0xC0, 0xD6), (0xD8, 0xF6), (0xF8, 0x2AF), (0x370, 0x373), (0x376, 0x377), (0x37B, 0x37D),
    (0x37F, 0x37F), (0x386, 0x386), (0x388, 0x481), (0x48A, 0x52F), (0x531, 0x556), (0x560, 0x588),
    (0x5D0, 0x5EA), (0x620, 0x64A), (0x660, 0x669), (0x66E, 0x66F), (0x671, 0x6D3), (0x6EE, 0x6FC),
    (0x750, 0x77F), (0x900, 0x963), (0x966, 0x96F), (0x971, 0xDFF), (0xE01, 0xE3A), (0xE40, 0xE4E),
    (0x10A0, 0x10FA), (0x1100, 0x11FF), (0x1E00, 0x1FBC), (0x3005, 0x3007), (0x3041, 0x3096),
    (0x30A1, 0x30FA), (0x30FC, 0x30FE), (0x3105, 0x312F), (0x3131, 0x318E), (0x31F0, 0x31FF),
    (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3),
]
REMOVED = [
    (0xAD, 0xAD), (0x300, 0x36F), (0x483, 0x487), (0x591, 0x5BD), (0x610, 0x61A), (0x640, 0x640),
    (0x64B, 0x65F), (0x670, 0x670), (0x6D6, 0x6DC), (0x93C, 0x93C), (0x200B, 0x200F),
    (0x202A, 0x202E), (0x2060, 0x2064), (0x3099, 0x309A), (0xFE00, 0xFE0F), (0xFEFF, 0xFEFF),
]
# fmt: on
# Letters that writers use interchangeably: alef and yeh forms, Persian code points, Cyrillic yo,
# dotless i, Devanagari letters with a nukta. Katakana becomes hiragana.
FOLDED = dict(zip("أإآٱىیکۃةەہۀёı", "اااايیكهههههеi", strict=True))
FOLDED["ی"] = "ي"
FOLDED |= {chr(0x958 + place): base for place, base in enumerate("कखगजडढफय")}
FOLDED |= {chr(code): chr(code - 0x60) for code in range(0x30A1, 0x30F7)}
MASKS = "*@$"


def _table() -> dict[int, str | None]:
    table: dict[int, str | None] = {code: " " for code in range(sys.maxunicode + 1)}
    for first, last in WORD:
        for code in range(first, last + 1):
            letter = chr(code).lower()[0]
            table[code] = FOLDED.get(letter, letter)
    for zero in (0x30, 0x660, 0x6F0, 0x966):
        table |= {zero + digit: "0" for digit in range(10)}
    for first, last in REMOVED:
        table |= {code: None for code in range(first, last + 1)}
    return table | {ord(mask): mask for mask in MASKS}


TABLE = _table()
_MASKED = re.compile(r"(?<=[^ *@$])[*@$]+(?=[^ *@$])")
_UNMASKED = str.maketrans("@$", "as")
_LONE = re.compile(r"[*@$]")
_REPEATED = re.compile(r"([^ ])\1{2,}")


def normalise(text: str) -> str:
    """Lower-case words separated by single spaces."""
    if COMPOSED.search(text):
        text = unicodedata.normalize("NFKC", text)
    text = text.translate(TABLE)
    if "*" in text or "@" in text or "$" in text:
        # Within words, the asterisk is kept (as \x01 for now); the other two become letters.
        text = _MASKED.sub(lambda m: m[0].translate(_UNMASKED).replace("*", "\x01"), text)
        text = _LONE.sub(" ", text).replace("\x01", "*")
    return " ".join(_REPEATED.sub(r"\1", text).split())


def _mix(hashes: np.ndarray, codes: np.ndarray) -> np.ndarray:
    mixed = (hashes ^ codes) * np.uint32(MULTIPLIER)
    return mixed ^ (mixed >> np.uint32(15))


class Features:
    """Hashed features of many texts, as parallel arrays: text number, hash and bucket."""

    def __init__(self, texts: list[str], normalised: bool = False) -> None:
        lines = texts if normalised else [normalise(text) for text in texts]
        padded = "".join("\0" + line.replace(" ", "\0") + "\0" for line in lines)
        lengths = np.array([len(line) + 2 for line in lines], dtype=np.int64)
        codes = np.frombuffer(padded.encode("utf-16-le"), dtype=np.uint16).astype(np.uint32)
        assert len(codes) == lengths.sum()
        owner = np.repeat(np.arange(len(lines), dtype=np.int32), lengths)
        widths = np.where(codes >= DENSE, 2, 1)
        before = np.cumsum(widths) - widths
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        bucket = ((before - np.repeat(before[starts], lengths)) // BUCKET).astype(np.int32)

        found: list[tuple[np.ndarray, np.ndarray]] = []  # positions of the first code, hashes
        size = len(codes)
        live = np.arange(size)
        hashes = _mix(np.full(size, SEED, dtype=np.uint32), codes)
        dense = live[codes >= DENSE]
        found.append((dense, hashes[dense]))
        hashes = hashes[live]
        word_at: list[np.ndarray] = []
        word_hash: list[np.ndarray] = []
        for length in range(2, WORD_CAP + 3):
            inside = live + length - 1 < size
            live, hashes = live[inside], hashes[inside]
            last = codes[live + length - 1]
            same = owner[live] == owner[live + length - 1]
            live, hashes, last = live[same], hashes[same], last[same]
            first = codes[live]
            closing = last == 0
            # Beyond the longest n-gram, keep only whole words.
            if length > LONGEST:
                whole = first == 0
                live, hashes, last, closing = live[whole], hashes[whole], last[whole], closing[whole]
                if length == WORD_CAP + 2:
                    # Longer words are cut: hash them as if they ended here.
                    last, closing = np.zeros_like(last), np.ones_like(closing)
                hashes = _mix(hashes, last)
                found.append((live[closing], hashes[closing]))
            else:
                hashes = _mix(hashes, last)
                if length == 2:
                    keep = (first >= DENSE) | (last >= DENSE)
                else:
                    keep = np.ones(len(live), dtype=bool)
                found.append((live[keep], hashes[keep]))
            ending = closing & (codes[live] == 0)
            if length > 2:
                word_at.append(live[ending])
                word_hash.append(hashes[ending])
            live, hashes = live[~closing], hashes[~closing]
        at, word = np.concatenate(word_at), np.concatenate(word_hash)
        order = np.argsort(at, kind="stable")
        at, word = at[order], word[order]
        if len(at) > 1:
            pair = owner[at[1:]] == owner[at[:-1]]
            seed = np.full(len(at) - 1, PAIR_SEED, dtype=np.uint32)
            both = _mix(_mix(seed, word[:-1]), word[1:])
            found.append((at[1:][pair], both[pair]))
        position = np.concatenate([f[0] for f in found])
        self.texts = len(lines)
        self.text = owner[position]
        self.hash = np.concatenate([f[1] for f in found])
        self.bucket = bucket[position]


def slots(hashes: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Table slot and fingerprint of each hash, for a table of 2^bits entries."""
    return hashes >> np.uint32(32 - bits), (hashes & np.uint32(0xFF)).astype(np.uint8)


def windows(features: Features) -> np.ndarray:
    """Number of windows of each text, at least one."""
    last = np.zeros(features.texts, dtype=np.int64)
    np.maximum.at(last, features.text, features.bucket)
    return np.maximum(last - SPAN + 1, 0) + 1


def scores(
    features: Features, table, damping: float, slope: float, offset: float, crowding: float
) -> np.ndarray:
    """Toxicity of each text: the logistic function of its highest window.

    The maximum over many windows is higher by chance, so `crowding` times the logarithm of their
    number is subtracted.

    `table` is (bits, fingerprints, weights). A window is `SPAN` neighbouring buckets; its value is
    sum / sqrt(count + damping).
    """
    bits, fingerprints, weights = table
    slot, fingerprint = slots(features.hash, bits)
    weight = np.where(fingerprints[slot] == fingerprint, weights[slot], 0).astype(np.float64)
    width = int(features.bucket.max(initial=0)) + SPAN
    cell = features.text.astype(np.int64) * width + features.bucket
    total = np.bincount(cell, weight, features.texts * width).reshape(features.texts, width)
    count = np.bincount(cell, minlength=features.texts * width).reshape(features.texts, width)
    places = width - SPAN + 1
    sums = sum(total[:, shift : shift + places] for shift in range(SPAN))
    counts = sum(count[:, shift : shift + places] for shift in range(SPAN))
    value = sums / np.sqrt(counts + damping)
    # A text shorter than a window has one window. Longer texts have only full windows.
    number = windows(features)
    allowed = np.arange(places)[None, :] < number[:, None]
    value = np.where(allowed, value, -np.inf).max(axis=1)
    value = np.where(count.sum(axis=1) == 0, -np.inf, value)
    with np.errstate(over="ignore"):
        return 1.0 / (1.0 + np.exp(-(slope * value + offset - crowding * np.log(number))))
