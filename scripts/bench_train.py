#!/usr/bin/env python3
"""Compares `detox-gguf train` with TRL and PEFT (scripts/trl_baseline.py), in turns.

    pip install -r scripts/requirements-train.txt
    scripts/bench_train.py --model SmolLM2-135M-Instruct.Q4_1.gguf [--random-1b] [--rounds 3] [--json bench.json]

Every program trains a LoRA adapter of the same rank on the same pairs, batch and threads: ours from the GGUF, TRL from
the same weights dequantised, in float32 and in bfloat16. A machine's speed drifts, so they run in turns, and what
counts is the ratio of the medians over all rounds. The first two steps of each run are not counted. Memory is the
largest resident set of the training process.

TRL computes the reference's log-probabilities in every step, ours in the first epoch alone, so ours are measured in
both; "recipe" is a run of five epochs (1 / (0.2 / first + 0.8 / later)), the paper's. Give more --steps than an epoch
has: 64 pairs make 16 of 4.

Without --pairs, the pairs are 64 made-up ones: prompts of about 20 tokens, answers of about 15, of different lengths.
--random-1b measures a model of Llama-3.2-1B's shape too, with random weights in Q4_K_M's types (make_random_model.py):
what it learns means nothing, what it costs does. TRL needs about 10 GB of memory for it.
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
    """One run of our trainer. Everything that is known of its command line and of its run folder is in here."""
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


def theirs(args: argparse.Namespace, dtype: str, hf_folder: Path, pairs: Path) -> dict:
    output = run([args.python, SCRIPTS / "trl_baseline.py", "train", hf_folder, "--pairs", pairs, "--dtype", dtype,
                  "--steps", args.trl_steps, "--batch-size", args.batch_size, "--rank", args.rank,
                  "--threads", args.threads], args)
    result = json.loads(output.splitlines()[-1])
    return {"seconds": result["step_seconds"][N_WARMUP:], "peak_rss_bytes": result["peak_rss_bytes"]}


def run(command: list, args: argparse.Namespace) -> str:
    """Standard output; what a program says on standard error is shown if it fails."""
    command = [str(part) for part in command]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": str(args.threads)})
    if done.returncode != 0:
        sys.exit(f"{done.stderr}error: exit code {done.returncode}: {' '.join(command)}")
    return done.stdout


def measure(args: argparse.Namespace, name: str, model: Path, pairs: Path, folder: Path) -> list[dict]:
    """The rows of one model."""
    hf_folder = folder / f"{name}-hf"
    if not (hf_folder / "config.json").exists():
        print(f"{name}: dequantising for TRL", file=sys.stderr)
        run([args.python, SCRIPTS / "trl_baseline.py", "convert", model, hf_folder], args)
    programs = {f"TRL {dtype}": lambda _i, dtype=dtype: theirs(args, dtype, hf_folder, pairs) for dtype in args.dtypes}
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
    """Pairs a second over the recipe's epochs."""
    first = median_of(results, "seconds")
    later = median_of(results, "later_seconds") if results[0].get("later_seconds") else first
    return args.batch_size * N_EPOCHS / (first + (N_EPOCHS - 1) * later)


def rates(args: argparse.Namespace, results: list[dict]) -> list[float]:
    """Pairs a second of each run."""
    return [rate(args, [result]) for result in results]


def table(rows: list[dict]) -> str:
    """Markdown. The ratios are ours to TRL's: speed should be high, memory low."""
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
    parser.add_argument("--random-1b", action="store_true", help="a random model of Llama-3.2-1B's shape too")
    parser.add_argument("--program", type=Path, default=PROGRAM)
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="the Python that has TRL (default: this one)")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24, help="of ours")
    parser.add_argument("--trl-steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, help="for the dequantised models and the runs; kept (default: temporary)")
    parser.add_argument("--json", type=Path, help="write the rows there too")
    parser.add_argument("--without-ours", action="store_true", help="TRL alone")
    parser.add_argument("--ours-arguments", nargs=argparse.REMAINDER, default=[], help="the rest goes to our trainer")
    args = parser.parse_args()
    # Not resolved: a virtual environment's Python is a link, and is known by where it lies.
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
