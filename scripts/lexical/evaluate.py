#!/usr/bin/env python3
"""Measure the lexical scorer on text that its models have not seen.

    evaluate.py --rtp-lx DIR --parallel DIR [--cache DIR]

`train.py` stores held-out log odds in the cache. Each rated prompt is scored by a model trained on the
other four fifths, and each benign source by a model trained without that source. The tables use these
odds, with two exceptions: the last table trains one more model, and the final list uses the finished
weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import train  # first: it sets the number of threads
import numpy as np
from features import LANGUAGES


def auc(toxic: np.ndarray, benign: np.ndarray) -> float:
    """Probability that a toxic text scores higher than a benign one. Ties count half."""
    if not len(toxic) or not len(benign):
        return float("nan")
    order = np.sort(benign)
    below = np.searchsorted(order, toxic, "left") + np.searchsorted(order, toxic, "right")
    return float(below.mean() / 2 / len(benign))


def table(title: str, heads: list[str], rows: list[list]) -> None:
    print(f"\n### {title}\n\n| | " + " | ".join(heads) + " |\n|---|" + "---:|" * len(heads))
    numbers = np.array([row[1:] for row in rows], dtype=float)
    rows = rows + [["mean", *np.nanmean(numbers, axis=0)]]
    for name, *values in rows:
        print(f"| {name} | " + " | ".join("–" if np.isnan(v) else f"{v:.3f}" for v in values) + " |")


# Benign text whose form or language differs from the training data. Most of it should score low.
UNUSUAL = {
    "turkish": "Yarın sabah erkenden çarşıya gidip ekmek alacağız ve sonra kahvaltı edeceğiz",
    "greek": "Το πρωί πήγαμε στην αγορά και αγοράσαμε φρέσκα λαχανικά και ψωμί",
    "thai": "เมื่อวานนี้เราไปตลาดและซื้อผักสดกับผลไม้มาทำอาหารเย็น",
    "vietnamese": "Sáng nay tôi đi chợ mua rau tươi và hoa quả để nấu bữa tối cho gia đình",
    "finnish": "Huomenna menemme junalla mummolaan ja leivomme yhdessä pullaa",
    "hungarian": "Holnap vonattal megyünk a nagymamához, és együtt sütünk süteményt",
    "digits": "3.14159 26535 8979 32384 62643 2024-11-03 12:45 +49 30 123456",
    "code": "for (int i = 0; i < n; ++i) { sum += values[i]; } return sum / n;",
    "emoji": "😀😀😀 🎉🎉",
    "empty": "",
    "letter": "q",
}


def same_sources(data: train.Set, calibration: np.ndarray) -> None:
    """Trains a model on four fifths of every source and scores the remaining fifth. This is the best
    estimate of how the finished weights do on new text from known sources."""
    language, source, _, fold, rating = data.arrays()
    draw = np.random.default_rng(train.SEED).random(len(source)) < 0.2
    tested = ((source == "rtp") & (fold == 0)) | (np.isin(source, sum(train.ROUNDS, [])) & draw)
    model = train.train(data, ~tested & (source != "parallel"))
    slope, offset, model.crowding = calibration
    model.slope, model.offset = model.slope * slope, model.offset * slope + offset
    score = np.full(len(source), np.nan)
    score[tested] = model.score([data.text[i] for i in np.flatnonzero(tested)])
    rows = []
    for code in LANGUAGES:
        here = (language == code) & tested
        hot = score[here & (source == "rtp") & (rating >= 3)]
        parts = [score[here & np.isin(source, names)] for names in (["web"], ["own", "talk"], ["chat"])]
        every = score[here & (source != "rtp")]
        shares = [(part >= 0.5).mean() if len(part) else np.nan for part in (*parts, every)]
        rows.append([code, *[auc(hot, part) for part in (*parts, every)], *shares, (hot >= 0.5).mean()])
    kinds = ["web", "own + talk", "chat", "all"]
    heads = [f"AUC {kind}" for kind in kinds] + [f"≥ 0.5 {kind}" for kind in kinds] + ["rated 3+ ≥ 0.5"]
    table("New lines of known sources", heads, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rtp-lx", type=Path, required=True)
    parser.add_argument("--parallel", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=train.HERE / "../../target/lexical-cache")
    parser.add_argument("--weights", type=Path, default=train.HERE / "../../src/score/lexical.bin")
    arguments = parser.parse_args()
    data = train.load(arguments.rtp_lx, arguments.parallel, arguments.cache)
    language, source, _, _, rating = data.arrays()
    stored = np.load(arguments.cache / "held_out.npz")
    odds = stored["odds"]
    assert len(odds) == len(source), "the cache does not match the inputs; run train.py on them first"
    score = 1 / (1 + np.exp(-odds))
    sources = [name for names in train.ROUNDS for name in names]
    rated = source == "rtp"
    toxic = rated & (rating >= 3)

    rows, alarms, tails, means = [], [], [], []
    for code in LANGUAGES:
        here = language == code
        parts = [odds[here & (source == name)] for name in sources]
        low = odds[here & rated & (rating < 1.5)]
        hot = odds[here & toxic]
        every = np.concatenate(parts)
        mild = odds[here & rated & (rating >= 2)]
        values = [auc(hot, part) for part in parts]
        rows.append([code, *values, np.nanmin(values), auc(mild, every), auc(hot, low)])
        alarms.append([code, *[(p >= 0).mean() if len(p) else np.nan for p in parts], (low >= 0).mean()])
        chosen = [score[here & (source == n)] for n in sources]
        tails.append([code, *[np.quantile(p, 0.98) if len(p) else np.nan for p in chosen]])
        means.append([code, *[p.mean() if len(p) else np.nan for p in chosen]])
    table("AUC: prompts rated 3 or more against each benign source", [*sources, "worst", "2+ v. all", "v. low-rated"], rows)
    table("Share of benign text at or over 0.5", [*sources, "low-rated prompts"], alarms)
    table("98th percentile of benign scores", sources, tails)
    table("Mean benign score", sources, means)

    bands = [(1, 1.5), (1.5, 2), (2, 2.5), (2.5, 3), (3, 3.5), (3.5, 4), (4, 5.01)]
    rows = [
        [code, *[(odds[(language == code) & rated & (rating >= a) & (rating < b)] >= 0).mean() for a, b in bands]]
        for code in LANGUAGES
    ]
    table("Share of rated prompts at or over 0.5, by mean human rating", [f"{a}–{min(b, 5)}" for a, b in bands], rows)

    rows = []
    for code in LANGUAGES:
        chosen = np.flatnonzero((language == code) & np.isin(source, ["web", "own", "talk", "fantasy"]))
        lengths = np.array([len(data.text[i]) for i in chosen])
        rows.append([code, np.corrcoef(lengths, odds[chosen])[0, 1]])
    table("Correlation of the log odds with length, benign text", ["r"], rows)

    same_sources(data, stored["calibration"])
    model = train.Model.read(arguments.weights)
    print("\n### Unusual text, finished weights\n")
    for name, value in zip(UNUSUAL, model.score(list(UNUSUAL.values())), strict=True):
        print(f"- {name}: {value:.3f}")


if __name__ == "__main__":
    main()
