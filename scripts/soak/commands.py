"""The commands that write files, with arguments that make each run last a few tenths of a second."""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = ROOT / "gguf" / "tiny"
MODEL = ["-m", str(TINY / "llama.gguf")]
SAMPLING = "--lang en,de,hi --limit 4 -k 8 -n 16 -np 4 -t 1 -s 5".split()
SHORT = "--lang en --limit 2 -k 2 -n 4 -np 2 -t 1 -s 5".split()
TRAINING = (
    "--rank 2 --targets q,down --max-steps 24 --eval-every 4 --patience 99 --warmup-steps 2 --learning-rate 1e-3 "
    "--max-length 64 --max-prompt 32 -t 1 -s 5"
).split()

TRAINING_VECTOR = (
    "--method vector --max-steps 24 --eval-every 4 --patience 99 --warmup-steps 2 --learning-rate 1e-2 "
    "--max-length 64 --max-prompt 32 -t 1 -s 5"
).split()
# A tiny model writes no insults and repeats itself, so these thresholds lie far below the defaults.
PAIRS = (
    "--min-margin 0 --chosen-below 0.01 --rejected-above 0.01 --min-tokens 1 --min-logprob=-99 --max-logprob-gap 99 "
    "--max-repetition 1"
).split()
LOCATE = "--top 12 --lang en,de --limit 4 -n 16 -t 1".split()


@dataclass(frozen=True)
class Command:
    """A command that writes `output`, a file or a folder, into the folder in which it runs."""

    name: str
    arguments: tuple[str, ...]
    output: str


def commands(seeds: Path) -> list[Command]:
    """Every command that writes, reading its inputs from `seeds`."""

    def command(name: str, output: str, *arguments: str | list[str], flag: str = "-o") -> Command:
        words: list[str] = []
        for argument in arguments:
            words += [argument] if isinstance(argument, str) else argument
        return Command(name, (*words, flag, output), output)

    neurons = ["--neurons", str(seeds / "neurons.json")]
    lora = ["--lora", str(TINY / "llama-lora.gguf")]
    return [
        command("eval", "run", "eval", MODEL, SAMPLING),
        command("eval with an adapter", "run-lora", "eval", MODEL, SAMPLING, lora),
        command("eval of steering", "run-steer", "eval", MODEL, SAMPLING, ["--steer", str(seeds / "steer.json")]),
        command("generate", "g.jsonl", "generate", MODEL, SAMPLING),
        command("pairs", "pairs.jsonl", "pairs", MODEL, SAMPLING, PAIRS),
        command("score", "scores.jsonl", "score", str(seeds / "many.jsonl")),
        command("probe", "probe.gguf", "probe", MODEL, "--limit 60 --epochs 20 -t 1".split()),
        command("locate", "neurons.json", "locate", MODEL, ["--probe", str(seeds / "probe.gguf")], LOCATE),
        command("steer", "steer.json", "steer", MODEL, neurons, ["--offset", "-1"]),
        command("steer --bake", "baked.gguf", "steer", MODEL, neurons, "--offset -1 --bake -t 1".split()),
        command("sweep", "sweep", "sweep", MODEL, neurons, "--offsets 0,-1 --controls 1".split(), SAMPLING),
        command("export", "merged.gguf", "export", MODEL, lora, ["-t", "1"]),
        command("activations", "activations", "activations", MODEL, neurons, "-n 8 --limit 8 --lang en,de -t 1".split()),
        command("train", "train", "train", MODEL, TRAINING),
        command("train a vector", "vector", "train", MODEL, TRAINING_VECTOR),
        command("compare", "compared", "compare", str(seeds / "run"), str(seeds / "run-lora")),
    ]
