"""Seeded weights: every value depends only on the architecture's seed and the parameter's name."""

import zlib

import gguf
import numpy as np
import torch

EMBEDDINGS = ("embed_tokens", "wte", "wpe", "embeddings", "token_embd")
OUTPUT_NORMS = ("model.norm.", "transformer.ln_f.", "output_norm.")
RESIDUAL_WRITERS = tuple(f"{module}.weight" for module in (
    "self_attn.o_proj", "mlp.down_proj",  # llama, command-r, gemma3, qwen2
    "attn.c_proj", "mlp.c_proj",  # gpt2
    "self_attention.dense", "mlp.dense_4h_to_h",  # bloom
))

def fill(model: torch.nn.Module, arch) -> None:
    """Overwrite every parameter of `model`.

    Each parameter has its own random stream, so adding a layer or renaming one does not change the others.
    The numbers come from numpy, because torch's normal generator gives different bits with different
    vector instruction sets, and the GGUF files must be the same everywhere.
    """
    # named_parameters() lists a tied embedding once, under its embedding's name.
    for name, param in model.named_parameters():
        rng = np.random.default_rng([arch.seed, zlib.crc32(name.encode())])
        value = rng.standard_normal(tuple(param.shape), dtype=np.float32)
        value = (value * np.float32(_std(arch, name, param)) + np.float32(_mean(arch, name, param))).astype(np.float32)
        if arch.quantization is not None and value.ndim == 2:
            # A quantised model's goldens are computed from the dequantised values of its file.
            value = gguf.dequantize(gguf.quantize(value, arch.quantization), arch.quantization)
        with torch.no_grad():
            param.copy_(torch.from_numpy(value))
    model.eval()


def _mean(arch, name: str, param: torch.Tensor) -> float:
    if param.ndim > 1 or not name.endswith((".weight", "_norm")):  # plamo2 has norms without ".weight"
        return 0.0  # matrices and biases
    gain = arch.output_norm_gain if name.startswith(OUTPUT_NORMS) else 1.0
    # Gemma stores w and multiplies by 1 + w.
    return gain - arch.norm_offset


def _std(arch, name: str, param: torch.Tensor) -> float:
    if param.ndim == 1:
        return 0.1  # norm gains and biases, spread so that a test notices if two of them are swapped
    if any(part in name for part in EMBEDDINGS):
        return arch.embd_std
    # GPT-2's Conv1D keeps [n_in, n_out]; Linear keeps [n_out, n_in].
    n_in = param.shape[0 if arch.transposed_matrices else 1]
    # Unit variance in, variance gain^2 out: this keeps activations at a size that F16 represents well.
    gain = arch.residual_gain if name.endswith(RESIDUAL_WRITERS) else 1.0
    return gain / n_in**0.5
