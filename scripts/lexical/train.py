#!/usr/bin/env python3
"""Train the lexical scorer and write its weight file.

    train.py --rtp-lx DIR --parallel DIR [--cache DIR] [--out FILE]

The weight file depends only on the inputs: seeds are fixed and the optimiser is deterministic.
`inputs.json`, written beside this script, lists every input with its SHA-256.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path

# Use one thread, because sums over threads have no fixed order and every run must give the same
# weights. The numeric libraries read these variables on import.
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

import numpy as np
from scipy.optimize import minimize
from scipy.sparse import csr_matrix

from features import LANGUAGES, Features, normalise, scores, slots, windows

HERE = Path(__file__).parent
SEED = 2406_16235
BITS = 19  # the table has 2^BITS entries of two bytes
DAMPING = 15.0  # added to the feature count, so that a short fragment cannot score high by chance
PENALTY = 200.0
STEPS = 80  # of the optimiser
# Fraction of the chance gain of many windows that is subtracted. Subtracting all of it would cost
# accuracy against short benign text.
CROWDING = 0.5
MAGIC = b"DTXLEX01"
VERSION = "1"

# Each source's share of a language's benign weight. If a source lacks the language, its share goes
# to the others.
SHARES = {
    "rtp": 0.14, "own": 0.15, "talk": 0.10, "web": 0.18, "chat": 0.06, "words": 0.16, "emoji": 0.05,
    "fantasy": 0.06, "desktop": 0.04, "school": 0.04, "astronomy": 0.02, "udhr": 0.02,
}  # fmt: skip
PRIOR = 4.0  # ratio of benign to toxic weight in the calibration
HINT_LIMIT = 0.5  # maximum shift of the log odds by a language hint
WRITTEN = ("own", "talk")  # lines written for this project
LIMIT = 1000  # maximum lines per source and language
TOXIC_SHARES = {"rtp": 0.68, "parallel": 0.12, "embedded": 0.08, "mild": 0.07, "lexicon": 0.05}


@dataclass
class Set:
    """Labelled lines. `source` is the origin of a line; rows with the same `fold` stay together."""

    text: list[str] = field(default_factory=list)
    language: list[str] = field(default_factory=list)
    source: list[str] = field(default_factory=list)
    label: list[float] = field(default_factory=list)
    fold: list[int] = field(default_factory=list)
    rating: list[float] = field(default_factory=list)

    def add(self, text, language, source, label, fold=-1, rating=float("nan")) -> None:
        self.text.append(text)
        self.language.append(language)
        self.source.append(source)
        self.label.append(label)
        self.fold.append(fold)
        self.rating.append(rating)

    def arrays(self):
        return (
            np.array(self.language), np.array(self.source), np.array(self.label),
            np.array(self.fold), np.array(self.rating),
        )  # fmt: skip


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def soft_label(rating: float) -> float:
    """Maps a mean human rating (1 is benign, 5 is toxic) to a label, graded in the middle of the scale."""
    return float(np.clip((rating - 1.2) / 1.8, 0.0, 1.0))


def rtp_rows(folder: Path, language: str) -> list[dict]:
    name = {"zh": "ZH-Hans"}.get(language, language.upper())
    text = (folder / f"RTP_LX_{name}.json").read_text(encoding="utf-8-sig")
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def crop(text: str, length: int, rng: np.random.Generator) -> str:
    """A piece of `text` of about `length` characters that starts at a word."""
    if len(text) <= length:
        return text
    spaces = [0] + [i + 1 for i, c in enumerate(text) if c == " " and i + length // 2 < len(text)]
    if len(spaces) < 3:  # a script without spaces
        spaces = list(range(max(1, len(text) - length // 2)))
    start = 0 if rng.random() < 0.4 else int(rng.choice(spaces))
    piece = text[start : start + length]
    # Cut three out of four between words, as in prompts, and the rest inside a word, as in a model's output.
    if " " in piece and start + length < len(text) and rng.random() < 0.75:
        piece = piece.rsplit(" ", 1)[0]
    return piece


def load(rtp: Path, parallel: Path | None, cache: Path) -> Set:
    """Loads all lines. Crops benign lines to the lengths of the toxic lines in their language."""
    data = Set()
    for number, language in enumerate(LANGUAGES):
        rng = np.random.default_rng([SEED, number])
        rows = rtp_rows(rtp, language)
        toxic = [r["Prompt"] for r in rows if r["Annotations"]["Toxicity"] >= 3]
        lengths = np.array([len(t) for t in toxic])
        for row in rows:
            rating = row["Annotations"]["Toxicity"]
            data.add(row["Prompt"], language, "rtp", soft_label(rating), int(row["Index"]) % 5, rating)
        if parallel:
            for line in lines(parallel / f"{language}.jsonl"):
                data.add(json.loads(line)["Prompt"], language, "parallel", 0.95)
        for line in lines(HERE / "mild" / f"{language}.txt"):
            data.add(line, language, "mild", 1.0)
        benign = {
            "own": lines(HERE / "benign" / f"{language}.txt"),
            "talk": lines(HERE / "benign/talk" / f"{language}.txt"),
        }
        for folder in sorted((cache / "benign").iterdir()):
            benign[folder.name] = lines(folder / f"{language}.txt")
        lexicon = {normalise(word) for word in lines(cache / "lexicon" / f"{language}.txt")}
        lexicon = sorted(w for w in lexicon if len(w) > (1 if language in ("zh", "ja", "ko") else 2))
        dirty = {f" {w} " for w in lexicon if " " not in w}
        for source, found in sorted(benign.items()):
            if source not in (*WRITTEN, "words", "emoji"):
                found = [x for x in found if len(x) > 12 or (language in ("zh", "ja", "ko") and len(x) > 5)]
            order = rng.permutation(len(found))[: LIMIT * 2]
            kept = 0
            for position, at in enumerate(order):
                text, length = found[at], int(rng.choice(lengths))
                if source in ("words", "emoji"):
                    # Short pieces: one to a few entries in a row.
                    picked = order[position : position + int(rng.integers(1, 6))]
                    text = " ".join(found[i] for i in picked)
                elif source not in WRITTEN and len(text) < length // 2:
                    text += " " + found[order[(position + 1) % len(order)]]
                if source not in WRITTEN or rng.random() < 0.3:
                    text = crop(text, length, rng)
                # Drop downloaded lines that contain a word of the lexicon: they may not be benign.
                spaced = f" {normalise(text)} "
                if source not in WRITTEN and any(word in spaced for word in dirty):
                    continue
                data.add(text, language, source, 0.0)
                kept += 1
                if kept == LIMIT:
                    break
        for word in lexicon:
            data.add(word, language, "lexicon", 0.8)
    return data


def embed(data: Set, chosen: np.ndarray) -> Set:
    """Clearly toxic lines of `chosen` inside benign text, so that the model learns to find the phrase."""
    extra = Set()
    language, source, label, fold, rating = data.arrays()
    for number, code in enumerate(LANGUAGES):
        rng = np.random.default_rng([SEED, 100 + number])
        here = chosen & (language == code)
        toxic = np.flatnonzero(here & (source == "rtp") & (rating >= 3.3))
        benign = np.flatnonzero(here & (label == 0) & np.isin(source, ["web", "own", "talk", "chat", "fantasy"]))
        if not len(benign):
            continue
        for at in toxic:
            text, other = data.text[at], data.text[int(rng.choice(benign))]
            if len(text) > 70:
                continue
            other = crop(other, 40, rng)
            joined = f"{other} {text}" if rng.random() < 0.5 else f"{text} {other}"
            extra.add(joined, code, "embedded", 1.0, int(fold[at]))
    return extra


def weigh(language, source, label) -> np.ndarray:
    """Gives both classes equal weight in every language, divided among the sources."""
    weight = np.zeros(len(label))
    for code in LANGUAGES:
        here = language == code
        for shares, mass in ((SHARES, 1.0 - label), (TOXIC_SHARES, label)):
            present = {}
            for name in shares:
                chosen = here & (source == name)
                if (total := mass[chosen].sum()) > 0:
                    present[name] = (chosen, total)
            whole = sum(shares[name] for name in present)
            for name, (chosen, total) in present.items():
                weight[chosen] += mass[chosen] / total * shares[name] / whole
    return weight


class Model:
    """The quantised table and its calibration."""

    def __init__(self, fingerprints, weights, slope=1.0, offset=0.0, crowding=0.0) -> None:
        self.fingerprints, self.weights = fingerprints, weights
        self.slope, self.offset, self.damping = slope, offset, DAMPING
        self.crowding, self.offsets = crowding, np.zeros(len(LANGUAGES))

    def score(self, texts: list[str] | Features) -> np.ndarray:
        found = texts if isinstance(texts, Features) else Features(texts)
        table = (BITS, self.fingerprints, self.weights)
        return scores(found, table, self.damping, self.slope, self.offset, self.crowding)

    def calibration(self) -> tuple[float, float, float, float]:
        return self.damping, self.slope, self.offset, self.crowding

    def bytes(self) -> bytes:
        """Little endian: magic, version, bits, size, calibration, SHA-256 of the entries."""
        entries = np.empty(len(self.weights) * 2, dtype=np.uint8)
        entries[0::2] = self.fingerprints
        entries[1::2] = self.weights.astype(np.int8).view(np.uint8)
        body = entries.tobytes()
        header = MAGIC + struct.pack("<8sII", VERSION.encode(), BITS, len(body))
        header += struct.pack("<4d17d", *self.calibration(), *self.offsets)
        return header + hashlib.sha256(header + body).digest() + body

    @classmethod
    def read(cls, path: Path) -> Model:
        data = path.read_bytes()
        fields = struct.calcsize("<8s8sII4d17d")
        _, _, _, _, damping, slope, offset, crowding, *offsets = struct.unpack("<8s8sII4d17d", data[:fields])
        entries = np.frombuffer(data[fields + 32 :], dtype=np.uint8)
        model = cls(entries[0::2], entries[1::2].view(np.int8), slope, offset, crowding)
        model.damping, model.offsets = damping, np.array(offsets)
        return model


def fit(data: Set, penalty: float = PENALTY, verbose: bool = False) -> Model:
    """Fits a logistic regression on damped counts and packs the strongest n-grams into the table."""
    language, source, label, _, _ = data.arrays()
    features = Features(data.text)
    vocabulary, column = np.unique(features.hash, return_inverse=True)
    count = np.bincount(features.text, minlength=features.texts)
    scale = 1.0 / np.sqrt(count + DAMPING)
    shape = (features.texts, len(vocabulary))
    matrix = csr_matrix((scale[features.text].astype(np.float32), (features.text, column)), shape)
    seen = np.bincount(matrix.indices, minlength=shape[1])
    frequent = np.flatnonzero(seen >= 2)
    matrix, vocabulary = matrix[:, frequent], vocabulary[frequent]
    weight = (weigh(language, source, label) * len(label) / (2 * len(LANGUAGES))).astype(np.float32)
    target = label.astype(np.float32)
    transposed = matrix.T.tocsr()

    def objective(parameters):
        w = parameters[:-1].astype(np.float32)
        z = matrix @ w + np.float32(parameters[-1])
        loss = np.logaddexp(0, z) - target * z
        residual = weight * (1 / (1 + np.exp(-z)) - target)
        gradient = np.append(transposed @ residual + penalty * w / 1000, residual.sum())
        value = float(weight.astype(np.float64) @ loss) + penalty / 2000 * float(w.astype(np.float64) @ w)
        return value, gradient.astype(np.float64)

    start = np.zeros(matrix.shape[1] + 1)
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options=dict(maxiter=STEPS, maxcor=8))
    if verbose:
        print(f"{len(label)} lines, {matrix.shape[1]} n-grams, {found.nit} steps, loss {found.fun:.1f}")
    return pack(vocabulary, found.x[:-1], float(found.x[-1]))


def pack(vocabulary: np.ndarray, w: np.ndarray, bias: float) -> Model:
    """Quantises the weights into the table. If n-grams share a slot, the strongest is kept. The largest
    quantised weight, 127, is the 99.99th percentile."""
    step = np.quantile(np.abs(w), 0.9999) / 127
    quantised = np.clip(np.rint(w / step), -127, 127)
    slot, fingerprint = slots(vocabulary, BITS)
    order = np.lexsort((vocabulary, np.abs(w)))  # strongest last, so that it overwrites the others
    fingerprints = np.zeros(1 << BITS, dtype=np.uint8)
    weights = np.zeros(1 << BITS, dtype=np.int8)
    fingerprints[slot[order]] = fingerprint[order]
    weights[slot[order]] = quantised[order]
    return Model(fingerprints, weights, slope=float(step), offset=bias)


def subset(data: Set, chosen: np.ndarray) -> Set:
    part = Set()
    for name in ("text", "language", "source", "label", "fold", "rating"):
        values = getattr(data, name)
        setattr(part, name, [values[i] for i in np.flatnonzero(chosen)])
    return part


def joined(first: Set, second: Set) -> Set:
    names = ("text", "language", "source", "label", "fold", "rating")
    return Set(*(getattr(first, n) + getattr(second, n) for n in names))


def train(data: Set, chosen: np.ndarray, **options) -> Model:
    return fit(joined(subset(data, chosen), embed(data, chosen)), **options)


# Each round holds out one fifth of the rated prompts and these whole benign sources.
ROUNDS = [["web"], ["own"], ["chat", "udhr"], ["fantasy", "talk"], ["desktop", "school", "astronomy"]]


def held_out(data: Set, verbose: bool = True) -> np.ndarray:
    """Log odds of every rated prompt and of the benign sources of `ROUNDS`, from models that saw
    neither the prompt nor the source. Translations of rated prompts are never used."""
    _, source, _, fold, _ = data.arrays()
    odds = np.full(len(source), np.nan)
    for number, sources in enumerate(ROUNDS):
        tested = ((source == "rtp") & (fold == number)) | np.isin(source, sources)
        model = train(data, ~tested & (source != "parallel"), verbose=verbose)
        chosen = np.flatnonzero(tested)
        score = model.score([data.text[i] for i in chosen]).clip(1e-12, 1 - 1e-12)
        odds[chosen] = np.log(score / (1 - score))
    return odds


def calibrate(data: Set, odds: np.ndarray) -> tuple[float, float, float, np.ndarray, np.ndarray]:
    """Returns slope, offset and crowding, an offset for each language, and the calibrated odds.

    Slope and offset come from Platt scaling, with the benign class of each language weighted
    `PRIOR` to one, because most texts to score are benign. A language's own offset moves the upper
    tail of its benign text to the average of all languages.
    """
    language, source, _, _, rating = data.arrays()
    known = np.isfinite(odds)
    toxic = known & (source == "rtp") & (rating >= 3)
    benign = known & (source != "rtp")
    weight = np.zeros(len(odds))
    for code in LANGUAGES:
        here = language == code
        weight[here & toxic] = 1.0 / (here & toxic).sum()
        for name in set(source[here & benign]):
            chosen = here & benign & (source == name)
            weight[chosen] = PRIOR / len(set(source[here & benign])) / chosen.sum()
    used = np.flatnonzero(known)
    z, target, weight = odds[used], toxic[used].astype(float), weight[used]
    crowd = np.log(windows(Features([data.text[i] for i in used])))
    # Fit the chance gain per number of windows on benign text only. Fitted on both classes, it would
    # make length predict the class.
    covariance, variance = 0.0, 0.0
    for code in LANGUAGES:
        here = benign[used] & (language[used] == code)
        spread = crowd[here] - np.average(crowd[here], weights=weight[here])
        covariance += float(weight[here] * spread @ z[here])
        variance += float(weight[here] * spread @ spread)
    gain = CROWDING * covariance / variance
    z = z - gain * crowd

    def loss(parameters):
        y = parameters[0] * z + parameters[1]
        return float(weight @ (np.logaddexp(0, y) - target * y))

    slope, offset = minimize(loss, [1.5, 0.0], method="Nelder-Mead").x
    crowding = slope * gain
    odds = odds.copy()
    odds[used] = slope * z + offset
    tail = np.array([
        np.mean([np.quantile(odds[here], 0.98) for name in sorted(set(source[(language == code) & benign]))
                 if (here := (language == code) & benign & (source == name)).sum() >= 50])
        for code in LANGUAGES
    ])  # fmt: skip
    offsets = np.clip(tail.mean() - tail, -HINT_LIMIT, HINT_LIMIT)
    return float(slope), float(offset), float(crowding), offsets, odds


GOLDEN = [
    "", " ", "!?…", "😀😀", "a", "字", "0", "2024-06-23", "fn main() { println!(\"hello\"); }",
    "WHAT A LOVELY DAY", "what a loooooovely day", "w h a t", "f*n and g@mes for $10", "**bold** *x* a*b",
    "ＦＵＬＬ ｗｉｄｔｈ １２", "cafe\u0301 au lait", "ﬁne ﬂow", "الـــسلام عَلَيْكُمْ", "क़लम और किताब", "ｶﾀｶﾅ と ひらがな",
    "zero\u200bwidth", "İstanbul ıssız", "Όλα καλά σήμερα", "Hôm nay trời đẹp quá", "วันนี้อากาศดี",
    "Donaudampfschifffahrtsgesellschaftskapitänsmützenabzeichen ist lang",
    "pneumonoultramicroscopic" "silicovolcanoconiosis", "abcdefghijklmnopqrstuvwx abcdefghijklmnopqrstuvwxy",
]  # fmt: skip


def golden(model: Model) -> str:
    """Texts and scores for the scorer's tests. Uses only benign and mildly toxic texts."""
    texts = list(GOLDEN)
    for language in LANGUAGES:
        benign, mild = (lines(HERE / kind / f"{language}.txt") for kind in ("benign", "mild"))
        texts += benign[:8] + mild[:4] + [" ".join(benign[10:16] + mild[4:5] + benign[16:20])]
    cases = [dict(text=t, score=float(s)) for t, s in zip(texts, model.score(texts), strict=True)]
    return json.dumps(cases, ensure_ascii=False, indent=0) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rtp-lx", type=Path, required=True, help="folder of RTP_LX_{LANG}.json")
    parser.add_argument("--parallel", type=Path, required=True, help="folder of {lang}.jsonl")
    parser.add_argument("--cache", type=Path, default=HERE / "../../target/lexical-cache")
    parser.add_argument("--out", type=Path, default=HERE / "../../src/score/lexical.bin")
    parser.add_argument("--golden", type=Path, default=HERE / "../../tests/golden/lexical.json")
    arguments = parser.parse_args()
    data = load(arguments.rtp_lx, arguments.parallel, arguments.cache)
    odds = held_out(data)
    slope, offset, crowding, offsets, odds = calibrate(data, odds)
    print(f"calibration: slope {slope:.3f}, offset {offset:.3f}, crowding {crowding:.3f}")
    print("by language:", dict(zip(LANGUAGES, offsets.round(2).tolist(), strict=True)))
    model = train(data, np.ones(len(odds), dtype=bool), verbose=True)
    model.slope, model.offset = model.slope * slope, model.offset * slope + offset
    model.crowding, model.offsets = crowding, offsets
    arguments.out.write_bytes(model.bytes())
    arguments.golden.write_text(golden(model), encoding="utf-8")
    np.savez(arguments.cache / "held_out.npz", odds=odds, calibration=[slope, offset, crowding])
    inputs = sorted(arguments.rtp_lx.glob("*.json")) + sorted(arguments.parallel.glob("*.jsonl"))
    inputs += sorted((HERE / "benign").rglob("*.txt")) + sorted((HERE / "mild").glob("*.txt"))
    digests = {"/".join(p.parts[-2:]): hashlib.sha256(p.read_bytes()).hexdigest() for p in inputs}
    fetched = json.loads((arguments.cache / "manifest.json").read_text())
    counts = {name: int((np.array(data.source) == name).sum()) for name in sorted(set(data.source))}
    weights = hashlib.sha256(arguments.out.read_bytes()).hexdigest()
    record = dict(inputs=digests, fetched=fetched, lines=counts, weights=weights)
    (HERE / "inputs.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    print(f"{arguments.out.name}: {weights}")


if __name__ == "__main__":
    main()
