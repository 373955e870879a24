#!/usr/bin/env python3
"""Check that stock llama.cpp and this program compute the same log-probs with this program's exports.

The exports are a control vector, a model with baked-in steering, and a trained LoRA adapter.

    pip install llama-cpp-python==0.3.36 gguf==0.17.1 numpy
    cargo build --release --bins
    python scripts/check_stock.py [--target target/release]

Uses the tiny models in gguf/tiny, which are F32. The largest difference of any log-prob must be below 1e-3.
"""

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
TOKENS = [1, 60, 70, 80, 90, 100, 110, 120, 130]
NEURONS = [[1, 3], [1, 40], [1, 60]]
OFFSET = 4.0
TOLERANCE = 1e-3


def ours(target: Path, model: Path, *steer: str) -> np.ndarray:
    """Log-probs after the last token."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "logprobs.npy"
        exact = ["-fa", "off", "-ctk", "f32", "-ctv", "f32", "-t", "1"]
        ids = ",".join(map(str, TOKENS))
        command = [target / "detox-gguf", "logits", "-m", model, "--ids", ids, *exact, *steer, "-o", output]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        return np.load(output)[-1]


def stock(model: Path, control_vector: Path | None, n_layer: int, n_embd: int, lora: Path | None = None) -> np.ndarray:
    """Log-probs after the last token, computed only with llama.cpp's C API."""
    llama_cpp.llama_backend_init()
    loaded = llama_cpp.llama_model_load_from_file(str(model).encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = 256
    params.type_k = params.type_v = 0  # F32
    params.flash_attn_type = 0  # disabled
    context = llama_cpp.llama_init_from_model(loaded, params)
    if control_vector is not None:
        rows = np.zeros((n_layer - 1, n_embd), dtype=np.float32)
        for tensor in gguf.GGUFReader(control_vector).tensors:
            rows[int(tensor.name.removeprefix("direction.")) - 1] += tensor.data
        data = rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        code = llama_cpp.llama_set_adapter_cvec(context, data, rows.size, n_embd, 1, n_layer - 1)
        assert code == 0, "llama.cpp refused the control vector"
    if lora is not None:
        adapter = llama_cpp.llama_adapter_lora_init(loaded, str(lora).encode())
        assert adapter, "llama.cpp refused the adapter"
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
        code = llama_cpp.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1.0))
        assert code == 0, "llama.cpp refused to use the adapter"
    tokens = (llama_cpp.llama_token * len(TOKENS))(*TOKENS)
    batch = llama_cpp.llama_batch_get_one(tokens, len(TOKENS))
    assert llama_cpp.llama_decode(context, batch) == 0
    n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(loaded))
    logits = np.array(llama_cpp.llama_get_logits_ith(context, -1)[:n_vocab])
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(loaded)
    return logits - np.logaddexp.reduce(logits.astype(np.float64))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, default=ROOT / "target" / "release")
    args = parser.parse_args()
    program, failed = args.target / "detox-gguf", False
    with tempfile.TemporaryDirectory() as folder:
        neurons, steer, baked = (Path(folder) / name for name in ("neurons.json", "steer.gguf", "baked.gguf"))
        neurons.write_text(json.dumps(NEURONS))
        for name in ("llama", "command-r", "gpt2", "bloom", "qwen2", "qwen3"):
            model = ROOT / "gguf" / "tiny" / f"{name}.gguf"
            fields = gguf.GGUFReader(model).fields
            n_layer, n_embd = (int(fields[f"{name}.{key}"].contents()) for key in ("block_count", "embedding_length"))
            make = [program, "steer", "-m", model, "--neurons", neurons, "--offset", str(OFFSET), "-o"]
            subprocess.run([*make, steer], check=True, stderr=subprocess.DEVNULL)
            plain = ours(args.target, model)
            rows = [("control vector", ours(args.target, model, "--steer", str(steer)), stock(model, steer, n_layer, n_embd))]
            if name in ("llama", "gpt2", "bloom"):
                subprocess.run([*make, baked, "--bake"], check=True, stderr=subprocess.DEVNULL)
                rows.append(("baked model", rows[0][1], stock(baked, None, n_layer, n_embd)))
            # Enough steps at a high learning rate that the adapter has a visible effect.
            run = Path(folder) / f"{name}-dpo"
            subprocess.run([program, "train", "-m", model, "-o", run, "--rank", "4", "--max-steps", "20", "--warmup-steps", "0",
                            "--learning-rate", "1e-2", "--held-out", "0", "-t", "1"],
                           check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            adapter = run / "adapter.gguf"
            rows.append(("trained adapter", ours(args.target, model, "--lora", str(adapter)),
                         stock(model, None, n_layer, n_embd, adapter)))
            for what, a, b in rows:
                effect, difference = np.abs(a - plain).max(), np.abs(a - b).max()
                good = difference < TOLERANCE < effect
                failed |= not good
                print(f"{name:10} {what:15} effect {effect:7.3f}, ours against stock {difference:.1e} {'' if good else 'FAILED'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
