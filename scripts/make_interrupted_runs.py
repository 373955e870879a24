#!/usr/bin/env python3
"""Make the interrupted run folders that tests/cli/formats resumes, with a build of the past.

    python scripts/make_interrupted_runs.py OLD_BINARY    # writes tests/golden/formats/interrupted/

The tests prove that today's program resumes folders that an older one left behind. The folders in the repository were
made by version 0.1.0 (17a851291285). Make them again only after a change of format that is meant to break old folders,
and say so in CHANGELOG.md: new folders from a new build would prove nothing.

The flags below must equal those in tests/cli/formats/resume.rs.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FORMATS = ROOT / "tests" / "golden" / "formats"
OUTPUT = FORMATS / "interrupted"
MODEL = "gguf/tiny/llama.gguf"
# Three prompts in each of two languages, in units of two prompts: 8 continuations a unit.
SAMPLING = "--lang en,de --limit 3 -k 4 -n 6 -np 2 -t 1 -s 5".split()
UNIT_ROWS = 8
TRAINING = (
    "--rank 2 --targets q,down --max-steps 16 --eval-every 4 --patience 99 --warmup-steps 2 --learning-rate 1e-3 "
    "--max-length 64 --max-prompt 32 --products exact -t 1 -s 5"
).split()


def run(binary, *arguments):
    subprocess.run([binary, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def cut_after_first_unit(path):
    """Leave one whole unit and half a row, as a kill in the middle of a write does."""
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:UNIT_ROWS]) + lines[UNIT_ROWS][: len(lines[UNIT_ROWS]) // 2])


def make_eval(binary):
    folder = OUTPUT / "eval"
    run(binary, "eval", *SAMPLING, "-m", MODEL, "-o", folder)
    for path in [*folder.glob("report.*"), folder / "scores.jsonl"]:
        path.unlink()
    cut_after_first_unit(folder / "generations.jsonl")


def make_sweep(binary):
    """The baseline is finished, the first setting interrupted, the rest not started."""
    folder = OUTPUT / "sweep"
    neurons = FORMATS / "input" / "neurons.json"
    run(binary, "sweep", *SAMPLING, "--neurons", neurons, "--offsets", "-1,-2", "-m", MODEL, "-o", folder)
    for path in folder.iterdir():
        if path.name not in ("baseline", "chosen_-1"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / "chosen_-1" / "scores.jsonl").unlink()
    cut_after_first_unit(folder / "chosen_-1" / "generations.jsonl")


def make_train(binary, method, signal_number, least_step):
    folder = OUTPUT / f"train_{method}"
    command = [binary, "train", *TRAINING, "--method", method, "-m", MODEL, "-o", folder]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = folder / "metrics.jsonl"
    while child.poll() is None and not (metrics.exists() and f'"step":{least_step},' in metrics.read_text()):
        time.sleep(0.001)
    child.send_signal(signal_number)
    child.wait()
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    print(f"{folder.name}: exit {child.returncode}, last step in metrics.jsonl {steps[-1]}")
    assert steps[-1] < 8, "interrupted too late: run again"


def main():
    binary = Path(sys.argv[1]).resolve()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir(parents=True)
    make_eval(binary)
    make_sweep(binary)
    # Ctrl-C saves a checkpoint after the step in progress.
    make_train(binary, "lora", signal.SIGINT, 5)
    # A kill leaves the checkpoint of step 4 and metrics beyond it.
    make_train(binary, "vector", signal.SIGKILL, 6)


if __name__ == "__main__":
    main()
