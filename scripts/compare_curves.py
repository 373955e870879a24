#!/usr/bin/env python3
"""Compare the loss curves of `detox-gguf train` runs that differ only in `--products` and the seed.

    for seed in 0 1 2; do for products in exact fast; do
        detox-gguf train -m MODEL -s $seed --products $products --max-steps 200 … -o runs/$products-$seed
    done; done
    scripts/compare_curves.py runs/exact-{0,1,2} runs/fast-{0,1,2}

Prints the mean distance between two curves, for training losses (averaged over --window steps) and held-out losses.
Runs with the same seed see the same pairs in the same order; runs with different seeds do not.
"""

import argparse
import itertools
import json
import statistics
from pathlib import Path


def curves(folder: Path, window: int) -> dict:
    settings = json.loads((folder / "run.json").read_text(encoding="utf-8"))["settings"]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    return {
        "products": settings["products"],
        "seed": settings["seed"],
        "train": [statistics.mean(losses[i : i + window]) for i in range(0, len(losses) - window + 1, window)],
        "held_out": {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row},
    }


def distance(a: list[float], b: list[float]) -> float:
    return statistics.mean(abs(x - y) for x, y in zip(a, b, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--window", type=int, default=20, help="steps per average")
    args = parser.parse_args()
    runs = [curves(folder, args.window) for folder in args.runs]
    print(f"training loss, averaged over {args.window} steps\n")
    for run in runs:
        print(f"{run['products']:6} seed {run['seed']}  ", " ".join(f"{x:.3f}" for x in run["train"]))
    print("\nheld-out loss\n")
    for run in runs:
        print(f"{run['products']:6} seed {run['seed']}  ",
              "  ".join(f"{step}: {loss:.4f}" for step, loss in run["held_out"].items()))
    groups = {"products differ, same seed": [], "seeds differ, same products": []}
    for a, b in itertools.combinations(runs, 2):
        if a["seed"] == b["seed"] and a["products"] != b["products"]:
            groups["products differ, same seed"].append((a, b))
        elif a["seed"] != b["seed"] and a["products"] == b["products"]:
            groups["seeds differ, same products"].append((a, b))
    print("\nmean distance between two curves\n")
    for name, pairs in groups.items():
        train = statistics.mean(distance(a["train"], b["train"]) for a, b in pairs)
        held_out = statistics.mean(
            distance(list(a["held_out"].values()), list(b["held_out"].values())) for a, b in pairs)
        print(f"{name:36} training {train:.4f}, held-out {held_out:.4f}")


if __name__ == "__main__":
    main()
