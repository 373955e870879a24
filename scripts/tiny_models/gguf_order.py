"""A Hugging Face model as a differentiable function of its GGUF tensors, in float32 or in true float64.

The gradients must have the file's order: in the file, llama's rows of q and k are interleaved for llama.cpp's rope,
BLOOM's qkv is split by heads, and GPT-2's matrices are transposed. So the file's tensors are the leaves, and the
model's parameters are derived from them by the inverse of the mapping that wrote the file.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

from . import weights

Tensors = dict[str, torch.Tensor]
_FLOAT32 = torch.float32


@contextmanager
def precision(dtype: torch.dtype) -> Iterator[None]:
    """Compute in `dtype` throughout.

    transformers hard-codes float32 in its norms, rope and softmax, so a float64 model would still round there. In
    float64 mode the name torch.float32 is therefore patched to mean float64, and any operation that still returns
    float32 raises an error.
    """
    if dtype == _FLOAT32:
        yield
        return
    names = {"float32": torch.float32, "float": torch.float}
    to_float = torch.Tensor.float
    torch.set_default_dtype(dtype)
    for name in names:
        setattr(torch, name, dtype)
    torch.Tensor.float = torch.Tensor.double
    try:
        with _NoFloat32():
            yield
    finally:
        torch.Tensor.float = to_float
        for name, value in names.items():
            setattr(torch, name, value)
        torch.set_default_dtype(_FLOAT32)


class _NoFloat32(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            assert not (isinstance(value, torch.Tensor) and value.dtype == _FLOAT32), f"{function} computes in float32"
        return result


class GgufModel:
    """One tiny model. Create it and call it inside `precision(dtype)`."""

    def __init__(self, arch, tok: Tokenizer, base: dict[str, np.ndarray], dtype: torch.dtype):
        self.arch, self.dtype = arch, dtype
        self.model = arch.build(tok.get_vocab_size()).to(dtype)
        self.base = {name: torch.from_numpy(value.astype(np.float64)).to(dtype) for name, value in base.items()}
        self._places = _places(arch, self.model)

    def leaf(self, value: np.ndarray | torch.Tensor) -> torch.Tensor:
        """A tensor to differentiate by."""
        return torch.tensor(np.asarray(value, dtype=np.float64)).to(self.dtype).requires_grad_()

    def forward(self, tensors: Tensors, tokens: list[int], directions: list[torch.Tensor] | None = None,
                record: list[torch.Tensor] | None = None) -> torch.Tensor:
        """Logits [n_tokens, n_vocab]. Adds `directions[il]` to block il's output at every token, and appends the
        result, [n_tokens, n_embd], to `record`."""
        handles = []
        for il, block in enumerate(self.model.get_submodule(self.arch.blocks)):
            def change(_module, _args, out, il=il):
                stream = out[0] if isinstance(out, tuple) else out
                if directions is not None:
                    stream = stream + directions[il]
                if record is not None:
                    record.append(stream[0])
                return (stream,) + out[1:] if isinstance(out, tuple) else stream
            handles.append(block.register_forward_hook(change))
        try:
            out = torch.func.functional_call(self.model, self._parameters(tensors), (torch.tensor([tokens]),),
                                             {"use_cache": False})
            return out.logits[0]
        finally:
            for handle in handles:
                handle.remove()

    def _parameters(self, tensors: Tensors) -> Tensors:
        return {hf_name: (tensors[name].flatten() - offset)[inverse].view(shape)
                for name, (hf_name, shape, inverse, offset) in self._places.items()}

    def rows(self, name: str) -> np.ndarray:
        """For each row of a matrix in the file, the index of the Hugging Face module's output."""
        hf_name, shape, inverse, _ = self._places[name]
        index = np.argsort(inverse.numpy(), kind="stable").reshape(self.base[name].shape)
        return index[:, 0] % shape[1] if self.arch.transposed_matrices else index[:, 0] // shape[1]

    def module(self, name: str) -> str:
        """The Hugging Face module that holds a matrix of the file."""
        return self._places[name][0].removesuffix(".weight")


def _places(arch, model: torch.nn.Module) -> dict[str, tuple[str, torch.Size, torch.Tensor, torch.Tensor]]:
    """By GGUF name: the parameter, its shape, the position of each of its values in the GGUF tensor, and the offset
    added in the file (gemma3's norms hold 1 + w). Found by sending numbered values through the mapping."""
    numbered = copy.deepcopy(model).double()
    starts, n = {}, 0
    with torch.no_grad():
        for name, param in numbered.named_parameters():
            starts[n] = name, param.shape
            param.copy_(torch.arange(n, n + param.numel()).view(param.shape))
            n += param.numel()
        indices = {name: value.copy() for name, value in arch.tensors(numbered).items()}  # not views of the parameters
        for param in numbered.parameters():
            param.zero_()
        offsets = arch.tensors(numbered)
    result = {}
    for name, value in indices.items():
        index = (value - offsets[name]).astype(np.int64).flatten()
        start = index.min()
        hf_name, shape = starts[int(start)]
        inverse = np.argsort(index, kind="stable")
        assert np.array_equal(index[inverse], np.arange(start, start + index.size)) and index.size == shape.numel(), name
        offset = torch.from_numpy(offsets[name].flatten()).to(next(model.parameters()).dtype)
        result[name] = hf_name, shape, torch.from_numpy(inverse), offset
    return result


def base_tensors(arch, tok: Tokenizer, path: Path) -> dict[str, np.ndarray]:
    """The seeded weights, dequantised and in GGUF order. Checks that they equal those of the file at `path`."""
    model = arch.build(tok.get_vocab_size())
    weights.fill(model, arch)
    tensors = arch.tensors(model)
    in_file = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    assert set(in_file) == set(tensors), f"{path}: the tensor names differ from the seeded model's"
    for name, value in tensors.items():
        assert np.array_equal(in_file[name].reshape(value.shape), value), f"{path}: {name} differs from the seeded weights"
    return tensors
