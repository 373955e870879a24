"""LoRA adapters on a few matrices, as GGUF and in the PyTorch model."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
import torch

RANK = 4
# A matrix W becomes W + scale * ALPHA / RANK * B A. ALPHA is twice the rank, so that a test notices a missing factor.
ALPHA = 8.0
# With unit gain of A, the change at scale 1 is about as large as the matrix itself.
B_STD = 0.2


def factors(arch, model: torch.nn.Module) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A [rank, n_in] and B [n_out, rank] by base tensor name, drawn as in weights.fill()."""
    result = {}
    for name, param in _matrices(arch, model).items():
        n_out, n_in = reversed(param.shape) if arch.transposed_matrices else param.shape
        a, b = (
            np.random.default_rng([arch.seed, zlib.crc32(f"{name}.{part}".encode())])
            .standard_normal(shape, dtype=np.float32) * np.float32(std)
            for part, shape, std in (("lora_a", (RANK, n_in), n_in**-0.5), ("lora_b", (n_out, RANK), B_STD))
        )
        result[name] = (a, b)
    return result


def write(path: Path, arch, model: torch.nn.Module) -> None:
    """Write the adapter as llama.cpp's `convert_lora_to_gguf.py` would."""
    writer = gguf.GGUFWriter(path, arch.arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(f"tiny {arch.name} adapter")
    writer.add_description("seeded random weights, for tests only")
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, ALPHA)
    for name, (a, b) in factors(arch, model).items():
        writer.add_tensor(f"{name}.lora_a", a)
        writer.add_tensor(f"{name}.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextmanager
def applied(arch, model: torch.nn.Module, scale: float) -> Iterator[None]:
    """Adds the adapter to the model's weights within a `with` block. Restores them exactly afterwards."""
    matrices = _matrices(arch, model)
    before = {name: param.detach().clone() for name, param in matrices.items()}
    with torch.no_grad():
        for name, (a, b) in factors(arch, model).items():
            change = torch.from_numpy(b) @ torch.from_numpy(a) * (scale * ALPHA / RANK)
            # GPT-2's Conv1D keeps [n_in, n_out].
            matrices[name] += change.T if arch.transposed_matrices else change
    try:
        yield
    finally:
        with torch.no_grad():
            for name, param in matrices.items():
                param.copy_(before[name])


def _matrices(arch, model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """GGUF name -> parameter. None of these matrices is reordered in the file."""
    return {
        f"blk.{il}.{name}.weight": block.get_submodule(module).weight
        for il, block in enumerate(model.get_submodule(arch.blocks))
        for module, name in arch.lora.items()
    }
