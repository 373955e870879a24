#!/usr/bin/env python3
"""Compares `detox-gguf bench generate` with llama.cpp's own `llama-batched-bench -pps`.

    scripts/bench_generate.py --batched-bench BIN --model FILE [--sequences 100] [--rounds 5]

Both decode 20 tokens for the same number of sequences, after one shared prompt of 16 tokens, on the same
threads. Ours picks every token by top-p sampling; llama-batched-bench feeds random tokens. A machine's speed
drifts, so the two programs alternate, and the result is the ratio of the medians. docs/speed.md explains how
to build both.
"""

import argparse
import json
import os
import statistics
import subprocess
from pathlib import Path

PROGRAM = Path(__file__).resolve().parent.parent / "target" / "release" / "detox-gguf"
N_PROMPT, N_PREDICT = 16, 20


def ours(arguments: argparse.Namespace) -> dict:
    command = [arguments.program, "bench", "generate", "--json", "--runs", "1", "-m", arguments.model,
               "-t", str(arguments.threads), "--sequences", str(arguments.sequences),
               "--n-prompt", str(N_PROMPT), "-n", str(N_PREDICT)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output)["rows"][0]


def batched_bench(arguments: argparse.Namespace) -> float:
    cells = 256 * (arguments.sequences + 1)
    command = [arguments.batched_bench, "-m", arguments.model, "-c", str(cells), "-b", "2048", "-ub", "512",
               "-npp", str(N_PROMPT), "-ntg", str(N_PREDICT), "-npl", str(arguments.sequences), "-pps",
               "-t", str(arguments.threads), "--output-format", "jsonl"]
    output = subprocess.run(command, check=True, capture_output=True, text=True)
    lines = (output.stdout + output.stderr).splitlines()
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    return rows[-1]["speed_tg"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batched-bench", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--program", default=str(PROGRAM))
    parser.add_argument("--sequences", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()

    generated, decoded, sampling, reference = [], [], [], []
    for i in range(arguments.rounds):
        row = ours(arguments)
        generated.append(row["generate_tokens_per_second"])
        decoded.append(row["decode_tokens_per_second"])
        sampling.append(row["sample_share"])
        reference.append(batched_bench(arguments))
        print(f"round {i + 1}: ours {generated[-1]:.1f} tokens/s, llama-batched-bench {reference[-1]:.1f}", flush=True)
    ratio = statistics.median(generated) / statistics.median(reference)
    print(json.dumps({
        "model": Path(arguments.model).name,
        "sequences": arguments.sequences,
        "rounds": arguments.rounds,
        "generate_tokens_per_second": round(statistics.median(generated), 1),
        "decode_tokens_per_second": round(statistics.median(decoded), 1),
        "sample_share": round(statistics.median(sampling), 4),
        "batched_bench_tokens_per_second": round(statistics.median(reference), 1),
        "ratio": round(ratio, 3),
    }, indent=2))


if __name__ == "__main__":
    main()
