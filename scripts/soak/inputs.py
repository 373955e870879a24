"""Gives mutated files of every format to the program.

The corpus grows: an input whose message is new is mutated further, so that later inputs reach deeper.
"""

import random
import re
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from .commands import MODEL, SHORT, TINY, TRAINING
from .mutate import mutate
from .program import Faults, Outcome, run

PROMPTS = ["--limit", "2", "-k", "1", "-n", "2", "-t", "1"]
ONE_STEP = "--max-steps 1 --rank 1 --targets q --max-length 64 --max-prompt 32 -t 1".split()


@dataclass
class Format:
    """A kind of input: its seeds, the name of the mutated file, and the commands that read it."""

    name: str
    seeds: list[bytes]
    file: str
    uses: list[list[str]]
    # A run folder to copy first, for files inside one.
    around: Path | None = None
    corpus: list[bytes] = field(default_factory=list)

    def __post_init__(self):
        self.corpus = list(self.seeds)


def formats(seeds: Path) -> list[Format]:
    """Every format the program reads. `{}` in a command is the mutated file."""
    read = Path.read_bytes
    generate = ["generate", "--lang", "en", *PROMPTS]
    own = [*generate, "--limit", "1"]
    neurons = ["--neurons", str(seeds / "neurons.json")]

    def model(name: str) -> Format:
        uses = [["generate", "-m", "{}", "--lang", "en", "--limit", "1", "-k", "1", "-n", "1", "-t", "1"]]
        uses.append(["train", "-m", "{}", "-o", "out", *ONE_STEP])
        return Format(f"model {name}", [read(TINY / f"{name}.gguf")], "m.gguf", uses)

    prompts = [[*generate, *MODEL, "--prompts", "{}"], ["generate", *PROMPTS, *MODEL, "--prompts", "{}"]]
    train = ["train", *MODEL, "-o", "out", *ONE_STEP]
    lora = [[*own, *MODEL, "--lora", "{}"], ["export", *MODEL, "--lora", "{}", "-o", "e.gguf", "-t", "1"]]
    steer = [[*own, *MODEL, "--steer", "{}"], ["steer", *MODEL, "--steer", "{}", "--bake", "-o", "b.gguf", "-t", "1"]]
    rows = [read(path) for path in sorted((seeds / "rows").iterdir())]
    run_folder, train_folder = seeds / "run", seeds / "train"
    resume_run = [["eval", *MODEL, *SHORT, "-o", "."]]
    resume_train = [["train", *MODEL, *TRAINING, "-o", "."]]
    return [
        *map(model, ["llama", "llama-q8_0", "gpt2", "bloom", "gemma3", "qwen3", "command-r", "plamo2", "bert"]),
        Format("adapter", [read(TINY / "llama-lora.gguf")], "l.gguf", lora),
        Format("control vector", [read(seeds / "vector.gguf")], "v.gguf", steer),
        Format("interventions", [read(seeds / "steer.json")], "s.json", steer),
        Format("neurons", [read(seeds / "neurons.json")], "n.json", [
            ["steer", *MODEL, "--neurons", "{}", "--offset", "-1", "-o", "s.json"],
            ["activations", *MODEL, "--neurons", "{}", "-o", "out", "-n", "1", "--limit", "1", "--lang", "en", "-t", "1"],
        ]),
        Format("probe", [read(seeds / "probe.gguf")], "p.gguf", [
            ["locate", *MODEL, "--probe", "{}", "-o", "n.json", "--no-activations", "-t", "1"],
            ["steer", *MODEL, "--method", "probe", "--probe", "{}", "--scale", "1", "-o", "v.gguf"],
        ]),
        Format("prompts", rows, "p.txt", prompts),
        Format("pairs", [*rows, read(seeds / "pairs.jsonl")], "p.jsonl", [[*train, "--pairs", "{}"]]),
        Format("texts", [*rows, read(seeds / "many.jsonl")], "t.jsonl", [["score", "{}"], ["score", "{}", "--lang", "de"]]),
        Format("generations", [read(run_folder / "generations.jsonl"), *rows], "g.jsonl", [
            ["eval", "--generations", "{}", "-o", "out"],
            ["eval", "--generations", "{}", *MODEL, "--base", str(TINY / "llama.gguf"), "-o", "out", "-t", "1"],
        ]),
        Format("labelled texts", rows, "d.csv", [
            ["probe", *MODEL, "--data", "{}", "-o", "p.gguf", "--limit", "20", "--epochs", "1", "-t", "1"]
        ]),
        Format("contrast", [read(seeds / "rows" / "contrast.jsonl"), read(seeds / "rows" / "contrast.csv")], "c.jsonl", [
            ["steer", *MODEL, "--contrast", "{}", "-o", "v.gguf", "-t", "1"]
        ]),
        Format("text", [b"The weather is fine.\n", "Das Wetter – naß\n".encode()], "t.txt", [
            ["tokenize", *MODEL, "--file", "{}"],
            ["logits", *MODEL, "--file", "{}", "--top", "1", "-t", "1"],
        ]),
        Format("tokenizer", [read(TINY / "tokenizer.json")], "t.json", [
            ["eval", "--generations", str(run_folder / "generations.jsonl"), "--tokenizer", "{}", "-o", "out"]
        ]),
        *(Format(f"run/{name}", [read(run_folder / name)], name, resume_run, run_folder)
          for name in ["run.json", "generations.jsonl"]),
        *(Format(f"train/{name}", [read(train_folder / name)], name, resume_train, train_folder)
          for name in ["run.json", "metrics.jsonl", "checkpoint.gguf", "reference.jsonl"]),
        *(Format(f"finished run/{name}", [read(run_folder / name)], name, [
            ["compare", ".", str(seeds / "run-lora"), "-o", "../compared"],
            ["eval", "--rescore", ".", "--base", str(TINY / "llama.gguf"), "-o", "../compared", "-t", "1"],
        ], run_folder) for name in ["report.json", "run.json", "generations.jsonl", "scores.jsonl"]),
        Format("steer argument", [b"steer.json:0.5"], "a", [[*own, *MODEL, "--steer", neurons[1] + ":{}"]]),
    ]


@dataclass
class Result:
    """What the inputs found."""

    inputs: Counter = field(default_factory=Counter)
    endings: Counter = field(default_factory=Counter)
    faults: Faults = field(default_factory=Faults)
    corpus: int = 0
    slowest: float = 0.0
    largest: int = 0


class Inputs:
    """The loop over mutated inputs."""

    def __init__(self, program: Path, folder: Path, seeds: Path, keep: Path, choose: random.Random):
        self.program, self.folder, self.keep, self.choose = program, folder, keep, choose
        self.formats = formats(seeds)
        self.known: set[tuple[str, int, str]] = set()
        self.result = Result()

    def once(self) -> None:
        """Mutates one input and runs one command on it."""
        form = self.choose.choice(self.formats)
        data = mutate(self.choose.choice(form.corpus), form.corpus, self.choose)
        folder = self.folder / "input"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(self.folder / "compared", ignore_errors=True)
        if form.around is None:
            folder.mkdir(parents=True)
        else:
            shutil.copytree(form.around, folder)
        (folder / form.file).write_bytes(data)
        use = [word.replace("{}", form.file) for word in self.choose.choice(form.uses)]
        outcome = run(self.program, use, folder)
        self.note(form, use, data, outcome)

    def note(self, form: Format, use: list[str], data: bytes, outcome: Outcome) -> None:
        """Counts the run, keeps an input that found something new, and saves one that found a fault."""
        result = self.result
        result.inputs[form.name] += 1
        result.endings[outcome.code] += 1
        result.slowest = max(result.slowest, outcome.seconds)
        result.largest = max(result.largest, outcome.peak_bytes)
        # The message without its numbers and quoted parts says which check refused the input.
        message = next((line for line in outcome.stderr.splitlines() if line.startswith("error: ")), "")
        kind = (form.name, outcome.code, re.sub(r'"[^"]*"|\d+', "", message)[:120])
        if kind not in self.known:
            self.known.add(kind)
            form.corpus.append(data)
            result.corpus += 1
        if fault := outcome.fault():
            self.keep.mkdir(parents=True, exist_ok=True)
            path = self.keep / f"{len(result.faults)}-{form.file}"
            path.write_bytes(data)
            result.faults.append(f"{form.name}: {fault}: {path}: {' '.join(use)}\n{outcome.stderr[-2000:]}")
