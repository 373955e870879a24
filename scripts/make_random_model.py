#!/usr/bin/env python3
"""Write a model with random weights, in Q4_K_M's types and Llama-3's shapes, to measure speed and memory.

    pip install gguf==0.17.1 numpy
    python scripts/make_random_model.py random-8b.gguf
    detox-gguf bench locate -m random-8b.gguf

    python scripts/make_random_model.py --shape llama-1b --tokenizer SmolLM2-135M-Instruct.Q4_1.gguf random-1b.gguf
    scripts/bench_train.py --random-1b …

`locate-8b` holds only the tensors that `locate` reads (1.3 GB): 32 layers of `ffn_down`, [14336, 4096], half of them
Q6_K and half Q4_K. It cannot generate text.

`llama-1b` is a complete model of Llama-3.2-1B's shape (0.8 GB), with its vocabulary size, tied output and rope factors.
The tokenizer is copied from another GGUF and padded with unused tokens.
"""

import argparse

import gguf
import numpy as np

Q4_K, Q6_K, F32 = gguf.GGMLQuantizationType.Q4_K, gguf.GGMLQuantizationType.Q6_K, gguf.GGMLQuantizationType.F32
# Bytes of a block of 256, and {byte offset: value} of its F16 scales. The values make random blocks dequantise to
# weights of about 0.02. Q4_K's weights are d (scale q) - dmin (min); their mean is 0 if dmin is 7.5 d.
TYPES = {
    Q4_K: (144, {0: 8e-5, 2: 6e-4}),
    Q6_K: (210, {208: 1.5e-5}),
}


def random_blocks(random: np.random.Generator, quant: gguf.GGMLQuantizationType, n_out: int, n_in: int) -> np.ndarray:
    """Random blocks [n_out, bytes of a row], with scales that give weights of a realistic size."""
    n_bytes, scales = TYPES[quant]
    blocks = random.integers(0, 256, size=(n_out * n_in // 256, n_bytes), dtype=np.uint8)
    for at, scale in scales.items():
        blocks[:, at : at + 2] = np.frombuffer(np.float16(scale).tobytes(), dtype=np.uint8)
    return blocks.reshape(n_out, -1)


def write_locate_8b(path: str, random: np.random.Generator) -> None:
    n_layer, n_embd, n_ff = 32, 4096, 14336
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(n_layer)
    writer.add_embedding_length(n_embd)
    writer.add_feed_forward_length(n_ff)
    writer.add_context_length(8192)
    writer.add_head_count(32)
    # Reuse one matrix of each type in all layers. The amount of data to read from disk is the same.
    blocks = {quant: random_blocks(random, quant, n_embd, n_ff) for quant in TYPES}
    for il in range(n_layer):
        quant = Q6_K if il % 2 else Q4_K
        writer.add_tensor(f"blk.{il}.ffn_down.weight", blocks[quant], raw_dtype=quant)
    finish(writer)


def write_llama_1b(path: str, random: np.random.Generator, tokenizer: str) -> None:
    n_layer, n_embd, n_ff, n_vocab, n_embd_kv, n_rot = 16, 2048, 8192, 128256, 512, 64
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("random weights of Llama-3.2-1B's shape")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(n_layer)
    writer.add_context_length(131072)
    writer.add_embedding_length(n_embd)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(32)
    writer.add_head_count_kv(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_rope_dimension_count(n_rot)
    writer.add_vocab_size(n_vocab)
    copy_tokenizer(writer, gguf.GGUFReader(tokenizer), n_vocab)

    def add(name: str, quant: gguf.GGMLQuantizationType, n_out: int, n_in: int) -> None:
        writer.add_tensor(f"{name}.weight", random_blocks(random, quant, n_out, n_in), raw_dtype=quant)

    add("token_embd", Q6_K, n_vocab, n_embd)
    writer.add_tensor("output_norm.weight", np.ones(n_embd, dtype=np.float32))
    writer.add_tensor("rope_freqs.weight", rope_factors(n_rot))
    for il in range(n_layer):
        better = Q6_K if il % 2 else Q4_K  # as Q4_K_M does, in about half the layers
        add(f"blk.{il}.attn_q", Q4_K, n_embd, n_embd)
        add(f"blk.{il}.attn_k", Q4_K, n_embd_kv, n_embd)
        add(f"blk.{il}.attn_v", better, n_embd_kv, n_embd)
        add(f"blk.{il}.attn_output", Q4_K, n_embd, n_embd)
        add(f"blk.{il}.ffn_gate", Q4_K, n_ff, n_embd)
        add(f"blk.{il}.ffn_up", Q4_K, n_ff, n_embd)
        add(f"blk.{il}.ffn_down", better, n_embd, n_ff)
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{il}.{norm}.weight", np.ones(n_embd, dtype=np.float32))
    finish(writer)


def rope_factors(n_rot: int, base: float = 500000.0, factor: float = 32.0, low: float = 1.0, high: float = 4.0,
                 n_ctx_old: int = 8192) -> np.ndarray:
    """Llama 3.2's divisors of the rope frequencies: `factor` for long waves, 1 for short ones, interpolated between."""
    waves = 2 * np.pi * base ** (np.arange(0, n_rot, 2) / n_rot)
    smooth = np.clip((n_ctx_old / waves - low) / (high - low), 0.0, 1.0)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def copy_tokenizer(writer: gguf.GGUFWriter, source: gguf.GGUFReader, n_vocab: int) -> None:
    """Copies the tokenizer's keys and adds unused tokens up to `n_vocab`."""
    for key, entry in source.fields.items():
        if not key.startswith("tokenizer."):
            continue
        value = entry.contents()
        if key in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type"):
            added = range(len(value), n_vocab)
            value += [f"<|unused_{i}|>" for i in added] if key.endswith("tokens") else [gguf.TokenType.UNUSED] * len(added)
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, entry.types[0])


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=False)
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path")
    parser.add_argument("--shape", choices=["locate-8b", "llama-1b"], default="locate-8b")
    parser.add_argument("--tokenizer", help="GGUF to copy the tokenizer from (for llama-1b)")
    args = parser.parse_args()
    random = np.random.Generator(np.random.PCG64(0))
    if args.shape == "locate-8b":
        write_locate_8b(args.path, random)
    elif args.tokenizer is None:
        parser.error("--shape llama-1b needs --tokenizer: a GGUF to copy the tokenizer from")
    else:
        write_llama_1b(args.path, random, args.tokenizer)


if __name__ == "__main__":
    main()
