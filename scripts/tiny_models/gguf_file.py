"""Writes a model as GGUF."""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer

from . import tokenizer


def write(path: Path, arch, model: torch.nn.Module, tok: Tokenizer) -> None:
    """Write `model` with its metadata and its tokenizer."""
    writer = gguf.GGUFWriter(path, arch.arch)
    writer.add_name(f"tiny {arch.name}")
    writer.add_description("seeded random weights, for tests only")
    quantized = arch.quantization is not None
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0 if quantized else gguf.LlamaFileType.ALL_F32)
    if quantized:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(tok.get_vocab_size())
    for key, value in arch.metadata.items():
        _add(writer, f"{arch.arch}.{key}", value)
    _add_tokenizer(writer, arch, tok)
    for name, value in arch.tensors(model).items():
        assert value.dtype == np.float32, f"{name} is {value.dtype}"
        if quantized and value.ndim == 2:
            blocks = gguf.quantize(value, arch.quantization)
            # The goldens use the dequantised weights. Quantising those again must lose nothing.
            assert np.array_equal(gguf.dequantize(blocks, arch.quantization), value), name
            writer.add_tensor(name, blocks, raw_dtype=arch.quantization)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: gguf.GGUFWriter, key: str, value: int | float | bool | str | list[int]) -> None:
    """Adds a key with the type that llama.cpp reads: u32, f32, bool, string or array of i32."""
    match value:
        case bool():  # before int, because in Python a bool is an int
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)


def _add_tokenizer(writer: gguf.GGUFWriter, arch, tok: Tokenizer) -> None:
    tokens = [tok.id_to_token(i) for i in range(tok.get_vocab_size())]
    types = [gguf.TokenType.CONTROL if token in tokenizer.CONTROL_TOKENS else gguf.TokenType.NORMAL for token in tokens]
    merges = json.loads(tok.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tok.token_to_id(tokenizer.BOS))
    writer.add_eos_token_id(tok.token_to_id(tokenizer.EOS))
    writer.add_unk_token_id(tok.token_to_id(tokenizer.UNK))
    writer.add_pad_token_id(tok.token_to_id(tokenizer.PAD))
    # Always written. Without the key, the default in llama.cpp depends on the kind of tokenizer.
    writer.add_add_bos_token(arch.add_bos)
    for key, value in arch.tokenizer_metadata.items():
        _add(writer, f"tokenizer.ggml.{key}", value)
