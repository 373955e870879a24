#!/usr/bin/env python3
"""Make the golden numbers of preference tuning that our trainer must reproduce, with PyTorch, PEFT and TRL.

    pip install -r scripts/requirements-train.txt
    python scripts/make_train_goldens.py            # write tests/golden/train_*.json and train_*.gguf
    python scripts/make_train_goldens.py --check    # make them again in a temporary folder and compare

Data flow, for each trainable tiny model of make_tiny_models.py:

    seed --numpy--> weights, compared with gguf/tiny/{name}.gguf
                      |
                      +-- float64 autograd: residual streams, log-probs, losses, gradients --+
                      |                                                                      |
                      +-- ten steps of TRL's DPOTrainer with PEFT, then the same by hand ----+
                                                                                             |
        numbers and token ids in tests/golden/train_{name}.json, tensors in tests/golden/train_{name}.gguf

Tensors are F32, in the order of the model's own GGUF (`general.architecture` is "golden"). {base} is the name of a
tensor of the model, {il} is a block counted from 0. Shapes are written slowest axis first:

    hidden/chosen/{il}, hidden/rejected/{il}  [n_tokens, n_embd]  the residual stream after block il, for
                                              prompt + answer of pair 0 in the base model
    logits/chosen, logits/rejected            [n_answer, n_vocab]  the rows that predict the answer's tokens
    {base}.lora_a, {base}.lora_b              [rank, n_in], [n_out, rank]; for token_embd.weight [n_vocab, rank],
                                              [n_embd, rank]: token t's row gains alpha / rank * B a[t]
    grad/{base}.lora_a, .lora_b               gradients of the sigmoid loss, adapters on every matrix of every block
    grad_embd/{base}.lora_a, .lora_b          the same with adapters on token_embd and output as well (llama)
    full/{base}                               gradient by each weight of the base, reference shifted by the offsets; a
                                              tied embedding's gradient sums both uses (not for a quantised file)
    dir/{il}                                  [n_embd]  gradient by a vector added to block il's output at every
                                              token, at zero; reference shifted by the same offsets
    trl_init/{base}.lora_a                    start of TRL's run; B is zero
    trl_final/{base}.lora_a, .lora_b          after its ten steps

Neither our trainer nor llama.cpp is used here. The numbers are computed in float64 and stored as float32; TRL's are
computed in its own float32. `float32_differs_by` and `trl.float64.differs_by` in the JSON hold the error of float32,
and thus the tolerance that a test needs.
"""

import argparse
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before importing transformers: download nothing

import gguf
import numpy as np
import torch
import transformers

from tiny_models import architectures, golden, gguf_order, tokenizer, train_golden, trl_golden

ROOT = Path(__file__).resolve().parent.parent
MODELS = ["llama", "command-r", "gpt2", "bloom", "gemma3", "qwen2", "qwen3", "llama-q8_0"]
# Allowed difference of a tensor on another CPU, relative to its largest value: for float64 rounded to float32, and for
# TRL's float32.
TENSOR_TOLERANCE = 1e-6
TRL_TOLERANCE = 1e-2


def make_all(root: Path, models: Path) -> list[Path]:
    """Write every file below `root` and return their paths relative to it; `models` holds the tiny models' files."""
    torch.set_num_threads(1)  # one order of summation
    torch.use_deterministic_algorithms(True)
    transformers.logging.set_verbosity_error()
    golden_dir = root / "tests" / "golden"
    golden_dir.mkdir(parents=True, exist_ok=True)
    tok = tokenizer.train()
    written = []
    for arch in architectures.ALL:
        if arch.name not in MODELS:
            continue
        base = gguf_order.base_tensors(arch, tok, models / f"{arch.name}.gguf")
        content, tensors = train_golden.make(arch, tok, base)
        if arch.quantization is None:  # TRL cannot train a quantised file
            content["trl"], trl_tensors = trl_golden.make(arch, tok, base)
            tensors |= trl_tensors
        path = golden_dir / f"train_{arch.name}.gguf"
        write_tensors(path, tensors)
        head = {"generator": generator(), "tensors": f"tests/golden/{path.name}"}
        golden.write_json(path.with_suffix(".json"), head | content)
        written += [path.with_suffix(".json"), path]
        print(f"{arch.name:10s} float32 differs by {content['float32_differs_by']}", file=sys.stderr)
        if "trl" in content:
            print(f"{'':10s} TRL's losses {[round(step['loss'], 4) for step in content['trl']['steps']]}, "
                  f"differ by {content['trl']['float64']['differs_by']}", file=sys.stderr)
    return [path.relative_to(root) for path in written]


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    writer = gguf.GGUFWriter(path, "golden")
    for name, value in tensors.items():
        assert value.dtype == np.float32 and len(name.encode()) <= 63, name
        assert np.isfinite(value).all(), name
        writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def generator() -> dict[str, str]:
    """The script and package versions that made a golden file."""
    packages = {package: version(package) for package in ("trl", "peft", "accelerate")}
    return golden.generator() | {"script": "scripts/make_train_goldens.py"} | packages


def check(root: Path) -> int:
    """Make everything in a temporary folder; return how many files differ from those below `root`."""
    differing = 0
    with tempfile.TemporaryDirectory() as fresh:
        for path in make_all(Path(fresh), root / "gguf" / "tiny"):
            old, new = root / path, Path(fresh) / path
            if not old.is_file():
                print(f"missing: {path}")
            elif old.read_bytes() == new.read_bytes():
                continue
            elif path.suffix == ".json" and (difference := golden.largest_difference(old, new)) <= golden.CPU_TOLERANCE:
                print(f"same to within {difference:.1e}: {path}")
                continue
            elif path.suffix == ".gguf" and (difference := tensor_difference(old, new)) <= 1.0:
                print(f"same to {difference:.1e} of the tolerance: {path}")
                continue
            else:
                print(f"differs: {path}")
            differing += 1
    return differing


def tensor_difference(old: Path, new: Path) -> float:
    """The largest difference as a fraction of its tolerance. Infinite if names or shapes differ."""
    a, b = ({t.name: t.data for t in gguf.GGUFReader(path).tensors} for path in (old, new))
    if list(a) != list(b) or any(a[name].shape != b[name].shape for name in a):
        return float("inf")
    return max(float(np.abs(a[name] - b[name]).max() / np.abs(a[name]).max())
               / (TRL_TOLERANCE if name.startswith("trl_final/") else TENSOR_TOLERANCE) for name in a)


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
    for path in make_all(args.root, args.root / "gguf" / "tiny"):
        print(f"{(args.root / path).stat().st_size:8d}  {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
