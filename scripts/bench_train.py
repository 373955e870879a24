#!/usr/bin/env python3
"""Compares `detox-gguf train` with TRL and PEFT (scripts/trl_baseline.py).

    pip install -r scripts/requirements-train.txt
    scripts/bench_train.py --model SmolLM2-135M-Instruct.Q4_1.gguf [--random-1b] [--rounds 3] [--json bench.json]

All programs train a LoRA adapter of the same rank with the same pairs, batch size and threads. Ours trains from the
GGUF; TRL trains from the same weights dequantised, in float32 and in bfloat16. A machine's speed drifts, so the programs
alternate, and the result is the ratio of the medians over all rounds. The first two steps of each run are not counted.
Memory is the peak resident set size of the training process.

TRL computes the reference's log-probabilities in every step, ours only in the first epoch. So ours is measured in the
first epoch and in later ones. "recipe" is the paper's run of five epochs (1 / (0.2 / first + 0.8 / later)). Use more
--steps than an epoch has: 64 pairs with batch size 4 make 16 steps.

Without --pairs, 64 made-up pairs are used, with prompts of about 20 tokens and answers of about 15, of varying lengths.
--random-1b also measures a model of Llama-3.2-1B's shape with random weights in Q4_K_M's types (make_random_model.py).
It learns nothing useful, but its cost is realistic. TRL needs about 10 GB of memory for it.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent
PROGRAM = SCRIPTS.parent / "target" / "release" / "detox-gguf"
N_PAIRS, N_WARMUP, N_EPOCHS = 64, 2, 5
GIB = 1 << 30

PEOPLE = ["the old gardener", "my neighbour", "a young teacher", "the baker's daughter", "our librarian", "the ferryman"]
TIMES = ["Early on Monday morning", "Late in the autumn", "Just before lunch", "On the first warm day of spring"]
PLACES = ["down to the harbour", "across the market square", "up the hill behind the school", "along the river path"]
THINGS = ["a basket of apples", "two letters", "a wooden ladder and some rope", "a map of the islands", "a blue umbrella"]
ENDS = ["sat down by the window", "bought a loaf of bread", "watched the boats come in", "talked with a friend for a while",
        "found that the gate was already open", "waited until the rain had stopped"]
AFTER = ["before going home", "and told everyone about it the next day", "because there was no hurry at all",
         "while the children played outside"]


def made_up_pairs(path: Path) -> None:
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(N_PAIRS):
            prompt = " ".join([f"{draw.choice(TIMES)},", draw.choice(PEOPLE), "walked", draw.choice(PLACES), "with",
                               draw.choice(THINGS), "and then"])
            chosen, rejected = (f" {first} {draw.choice(AFTER)}." for first in draw.sample(ENDS, 2))
            file.write(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) + "\n")


PRODUCTS = ["exact", "fast"]


def ours(args: argparse.Namespace, products: str, model: Path, pairs: Path, folder: Path) -> dict:
    """Runs our trainer once. The only function that knows its command line and its run folder."""
    command = [args.program, "train", "-m", model, "--pairs", pairs, "--method", "lora", "--max-steps", args.steps,
               "--learning-rate", 1e-5, "--batch-size", args.batch_size, "--rank", args.rank, "-t", args.threads,
               "--held-out", 0, "--products", products, "-o", folder, *args.ours_arguments]
    run(command, args)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [row for row in map(json.loads, lines) if "step_seconds" in row][: args.steps]
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return {"seconds": [step["step_seconds"] for step in steps[N_WARMUP:] if step["epoch"] <= 1],
            "later_seconds": [step["step_seconds"] for step in steps if step["epoch"] > 1],
            "peak_rss_bytes": report["peak_rss_bytes"]}


def trl(args: argparse.Namespace, dtype: str, hf_folder: Path, pairs: Path) -> dict:
    output = run([args.python, SCRIPTS / "trl_baseline.py", "train", hf_folder, "--pairs", pairs, "--dtype", dtype,
                  "--steps", args.trl_steps, "--batch-size", args.batch_size, "--rank", args.rank,
                  "--threads", args.threads], args)
    result = json.loads(output.splitlines()[-1])
    return {"seconds": result["step_seconds"][N_WARMUP:], "peak_rss_bytes": result["peak_rss_bytes"]}


def run(command: list, args: argparse.Namespace) -> str:
    """Runs a command and returns its standard output. Shows its standard error only if it fails."""
    command = [str(part) for part in command]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": str(args.threads)})
    if done.returncode != 0:
        sys.exit(f"{done.stderr}error: exit code {done.returncode}: {' '.join(command)}")
    return done.stdout


def measure(args: argparse.Namespace, name: str, model: Path, pairs: Path, folder: Path) -> list[dict]:
    """Measures one model. Returns the rows of the result table."""
    hf_folder = folder / f"{name}-hf"
    if not (hf_folder / "config.json").exists():
        print(f"{name}: dequantising for TRL", file=sys.stderr)
        run([args.python, SCRIPTS / "trl_baseline.py", "convert", model, hf_folder], args)
    programs = {f"TRL {dtype}": lambda _i, dtype=dtype: trl(args, dtype, hf_folder, pairs) for dtype in args.dtypes}
    if not args.without_ours:
        runs_in = folder / f"{name}-run-{os.getpid()}"
        own = {f"detox-gguf {products}": lambda i, products=products:
               ours(args, products, model, pairs, runs_in / f"{products}-{i}") for products in PRODUCTS}
        programs = own | programs
    runs = {program: [] for program in programs}
    for i in range(args.rounds):
        for program, once in programs.items():
            runs[program].append(once(i))
            print(f"{name}, round {i + 1}: {program}: {rates(args, runs[program][-1:])[0]:.2f} pairs/s", file=sys.stderr)
    rows = []
    for program, results in runs.items():
        by_round = rates(args, results)
        rows.append({
            "model": name,
            "program": program,
            "pairs_per_second": rate(args, results),
            "slowest_round": min(by_round),
            "fastest_round": max(by_round),
            "first_epoch": args.batch_size / median_of(results, "seconds"),
            "peak_rss_bytes": max(result["peak_rss_bytes"] for result in results),
        })
    for row in rows:
        if row["program"].startswith("TRL"):
            continue
        for other in rows:
            if other["program"].startswith("TRL"):
                row[f"speed / {other['program']}"] = row["pairs_per_second"] / other["pairs_per_second"]
                row[f"memory / {other['program']}"] = row["peak_rss_bytes"] / other["peak_rss_bytes"]
    return rows


def median_of(results: list[dict], key: str) -> float:
    return statistics.median(second for result in results for second in result[key])


def rate(args: argparse.Namespace, results: list[dict]) -> float:
    """Pairs per second over the recipe's epochs."""
    first = median_of(results, "seconds")
    later = median_of(results, "later_seconds") if results[0].get("later_seconds") else first
    return args.batch_size * N_EPOCHS / (first + (N_EPOCHS - 1) * later)


def rates(args: argparse.Namespace, results: list[dict]) -> list[float]:
    """Pairs per second of each run."""
    return [rate(args, [result]) for result in results]


def table(rows: list[dict]) -> str:
    """Formats the rows as Markdown. Ratios are ours to TRL's: high is good for speed, low is good for memory."""
    ratios = [key for row in rows for key in row if " / " in key]
    ratios = list(dict.fromkeys(ratios))
    lines = ["| " + " | ".join(["model", "program", "first epoch, pairs/s", "recipe, pairs/s (rounds)", "peak memory", *ratios]) + " |",
             "|---" * (5 + len(ratios)) + "|"]
    for row in rows:
        lines.append("| " + " | ".join([
            row["model"], row["program"], f"{row['first_epoch']:.2f}",
            f"{row['pairs_per_second']:.2f} ({row['slowest_round']:.2f} to {row['fastest_round']:.2f})",
            f"{row['peak_rss_bytes'] / GIB:.2f} GiB", *[f"{row[key]:.2f}" if key in row else "" for key in ratios],
        ]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a GGUF that transformers can dequantise")
    parser.add_argument("--pairs", type=Path, help="JSONL of prompt, chosen, rejected (default: made up)")
    parser.add_argument("--random-1b", action="store_true", help="also measure a random model of Llama-3.2-1B's shape")
    parser.add_argument("--program", type=Path, default=PROGRAM)
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="a Python with TRL (default: this one)")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24, help="steps of our trainer")
    parser.add_argument("--trl-steps", type=int, default=10, help="steps of TRL")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, help="keep the dequantised models and the runs here (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--without-ours", action="store_true", help="measure only TRL")
    parser.add_argument("--ours-arguments", nargs=argparse.REMAINDER, default=[], help="pass all further arguments to our trainer")
    args = parser.parse_args()
    # Do not resolve links: a virtual environment's Python is a link, and finds its packages by its own path.
    args.program, args.python = args.program.absolute(), args.python.absolute()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        pairs = args.pairs or folder / "pairs.jsonl"
        if args.pairs is None:
            made_up_pairs(pairs)
        rows = measure(args, args.model.stem, args.model, pairs, folder)
        if args.random_1b:
            model = folder / "random-1b.gguf"
            if not model.exists():
                run([args.python, SCRIPTS / "make_random_model.py", "--shape", "llama-1b", "--tokenizer", args.model, model], args)
            rows += measure(args, model.stem, model, pairs, folder)
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, "rounds": args.rounds, "steps": args.steps, "trl_steps": args.trl_steps, "rank": args.rank,
                                         "batch_size": args.batch_size, "threads": args.threads}, indent=2) + "\n")


if __name__ == "__main__":
    main()
