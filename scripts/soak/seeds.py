"""Makes the inputs of the soak test, with the program itself and from a few rows written here."""

import json
import shutil
from pathlib import Path

from .commands import LOCATE, MODEL, SAMPLING, SHORT, TINY, TRAINING
from .program import run

ROWS = {
    "prompts.jsonl": '{"prompt": "The weather is", "language": "en", "id": "a"}\n{"prompt": "Das Wetter ist", "language": "de"}\n',
    "prompts.json": '[{"prompt": "The weather is", "lang": "en"}, {"prompt": "Das Wetter", "lang": null}]\n',
    "prompts.txt": "The weather is\nThe house, the tree\n",
    "prompts.csv": 'prompt,language\n"The weather, again",en\nDas Wetter,de\n',
    "prompts.tsv": "prompt\tlanguage\nThe weather is\ten\n",
    "pairs.jsonl": "".join(
        json.dumps({"prompt": f"The weather {i}", "chosen": " is fine", "rejected": " is bad", "language": "en"}) + "\n"
        for i in range(12)
    ),
    "pairs.csv": "prompt;chosen;rejected\n" + "".join(f"The weather {i};is fine;is bad\n" for i in range(12)),
    "contrast.jsonl": "".join(json.dumps({"toxic": f"bad {i}", "benign": f"good {i}"}) + "\n" for i in range(6)),
    "contrast.csv": "toxic,benign\n" + "".join(f"bad {i},good {i}\n" for i in range(6)),
    "labelled.csv": "text,label\n" + "".join(f"a text {i},{i % 2}\n" for i in range(24)),
    "labelled.jsonl": "".join(json.dumps({"text": f"a text {i}", "label": bool(i % 2)}) + "\n" for i in range(24)),
}


def make(program: Path, folder: Path) -> None:
    """Writes every seed into `folder`, which is replaced."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "rows").mkdir(parents=True)
    for name, text in ROWS.items():
        (folder / "rows" / name).write_text(text)
    many = [json.dumps({"text": f"a plain sentence with the number {i}", "language": "en"}) for i in range(20_000)]
    (folder / "many.jsonl").write_text("\n".join(many) + "\n")
    shutil.copy(folder / "rows" / "pairs.jsonl", folder / "pairs.jsonl")

    def must(*words: str | list[str]) -> None:
        arguments: list[str] = []
        for word in words:
            arguments += [word] if isinstance(word, str) else word
        outcome = run(program, arguments, folder)
        if outcome.code != 0:
            raise SystemExit(f"cannot make the seeds: {' '.join(arguments)}\n{outcome.stderr}")

    must("probe", MODEL, "-o", "probe.gguf", "--limit 60 --epochs 2 -t 1".split())
    must("locate", MODEL, "--probe", "probe.gguf", "-o", "neurons.json", LOCATE)
    must("steer", MODEL, "--neurons", "neurons.json", "--offset", "-1", "-o", "steer.json")
    must("steer", MODEL, "--neurons", "neurons.json", "--offset", "-1", "--without-layer-0", "-o", "vector.gguf")
    must("eval", MODEL, SHORT, "-o", "run")
    must("eval", MODEL, SHORT, "--lora", str(TINY / "llama-lora.gguf"), "-o", "run-lora")
    must("train", MODEL, TRAINING, "-o", "train")
