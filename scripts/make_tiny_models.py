#!/usr/bin/env python3
"""Make the tiny seeded models that the tests use, and the golden numbers that they must reproduce.

    pip install -r scripts/requirements-tiny.txt
    python scripts/make_tiny_models.py            # write gguf/tiny/ and tests/golden/
    python scripts/make_tiny_models.py --check    # make them again in a temporary folder and compare

Data flow:

    corpus --tokenizers--> tokenizer.json --------------------------> gguf/tiny/tokenizer.json
                               |                                      tests/golden/tiny_tokenizer.json
    seed --numpy--> weights in a Hugging Face model --mapping-------> gguf/tiny/{name}.gguf
                               |
                           forward pass in PyTorch, F32, CPU -------> tests/golden/tiny_{name}.json
                                                                      tests/golden/tiny_{name}_activations.json
                               |
                           the same with forward hooks -------------> tests/golden/tiny_{name}_interventions.json
                               |                                      tests/golden/tiny_{name}_sentences.json
                               |
    seed --numpy--> low-rank changes of a few matrices --------------> gguf/tiny/{name}-lora.gguf
                               |
                           the same with W + scale alpha/rank B A --> tests/golden/tiny_{name}_lora.json

Two models have no goldens. bert is an encoder, which the program must refuse. plamo2 is a decoder whose graph in
llama.cpp ignores control vectors, so the program must refuse a control vector for it.

The goldens come from PyTorch and never from llama.cpp. Agreement is therefore real evidence: it requires the same
tensor mapping, metadata, tokenizer and graph in both programs.

The weights are drawn by numpy, whose random streams do not depend on the machine, so the GGUF files are
the same everywhere. The logits are sums of floats in an order that depends on the CPU's vector width.
A second run on the same machine gives the same bytes. On another machine `--check` may report that the
goldens differ in the last digits, by about 1e-5.
"""

import argparse
import filecmp
import sys
import tempfile
from pathlib import Path

from tiny_models import architectures, gguf_file, golden, lora, tokenizer, weights

ROOT = Path(__file__).resolve().parent.parent


def make_all(root: Path) -> list[Path]:
    """Write every file below `root` and return their paths relative to it."""
    gguf_dir, golden_dir = root / "gguf" / "tiny", root / "tests" / "golden"
    gguf_dir.mkdir(parents=True, exist_ok=True)
    golden_dir.mkdir(parents=True, exist_ok=True)

    tok = tokenizer.train()
    tok_path = gguf_dir / "tokenizer.json"
    tok_path.write_text(tokenizer.to_json(tok), encoding="utf-8")
    written = [tok_path]

    tok_golden = golden_dir / "tiny_tokenizer.json"
    golden.write_json(tok_golden, golden.tokenizer_golden(tok))
    written.append(tok_golden)

    for arch in architectures.ALL:
        model = arch.build(tok.get_vocab_size())
        weights.fill(model, arch)
        path = gguf_dir / f"{arch.name}.gguf"
        gguf_file.write(path, arch, model, tok)
        written.append(path)
        if not arch.has_goldens:
            continue  # tests only check that the model is refused
        logits, activations = golden.model_goldens(arch, model, tok)
        goldens = {
            "": logits,
            "_activations": activations,
            "_interventions": golden.intervention_golden(arch, model, tok),
        }
        if arch.quantization is None:
            goldens["_sentences"] = golden.sentence_golden(arch, model, tok)
        if arch.lora:
            adapter_path = gguf_dir / f"{arch.name}-lora.gguf"
            lora.write(adapter_path, arch, model)
            written.append(adapter_path)
            goldens["_lora"] = golden.lora_golden(arch, model, tok)
        for suffix, content in goldens.items():
            golden_path = golden_dir / f"tiny_{arch.name}{suffix}.json"
            golden.write_json(golden_path, content)
            written.append(golden_path)
        print(golden.summary(arch, logits), file=sys.stderr)

    return [path.relative_to(root) for path in written]


def check(root: Path) -> int:
    """Make everything in a temporary folder; return how many files differ from those below `root`."""
    differing = 0
    with tempfile.TemporaryDirectory() as fresh:
        for path in make_all(Path(fresh)):
            old, new = root / path, Path(fresh) / path
            if not old.is_file():
                print(f"missing: {path}")
            elif filecmp.cmp(old, new, shallow=False):
                continue
            elif path.suffix == ".json" and (difference := golden.largest_difference(old, new)) <= golden.CPU_TOLERANCE:
                print(f"same to within {difference:.1e}: {path}")
                continue
            else:
                print(f"differs: {path}")
            differing += 1
    return differing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=ROOT,
                        help="folder that holds gguf/ and tests/ (default: the repository)")
    parser.add_argument("--check", action="store_true",
                        help="write nothing and compare a fresh run with the files below --root")
    args = parser.parse_args()
    if args.check:
        differing = check(args.root)
        print(f"{differing} files differ" if differing else "nothing differs")
        return 1 if differing else 0
    for path in make_all(args.root):
        print(f"{(args.root / path).stat().st_size:8d}  {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
