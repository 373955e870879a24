#!/usr/bin/env python3
"""Write the down projections of a model of Llama-3-8B's shape, with random weights in Q4_K_M's types.

    pip install gguf==0.17.1 numpy
    python scripts/make_random_model.py random-8b.gguf
    detox-gguf bench locate -m random-8b.gguf

The file has what `locate` reads (1.3 GB): 32 layers of `ffn_down`, [14336, 4096], half of them Q6_K and half
Q4_K, and no other tensor. No program can generate with it.
"""

import argparse

import gguf
import numpy as np

N_LAYER, N_EMBD, N_FF = 32, 4096, 14336
# Bytes of a block of 256, and where in it the F16 scales lie.
TYPES = {
    gguf.GGMLQuantizationType.Q4_K: (144, [0, 2]),
    gguf.GGMLQuantizationType.Q6_K: (210, [208]),
}


def random_blocks(random: np.random.Generator, quant: gguf.GGMLQuantizationType) -> np.ndarray:
    """[N_EMBD, bytes of a row]: random bytes with scales of 1e-4, so that weights are of a usual size."""
    n_bytes, scales = TYPES[quant]
    blocks = random.integers(0, 256, size=(N_EMBD * N_FF // 256, n_bytes), dtype=np.uint8)
    for at in scales:
        blocks[:, at : at + 2] = np.frombuffer(np.float16(1e-4).tobytes(), dtype=np.uint8)
    return blocks.reshape(N_EMBD, -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path")
    args = parser.parse_args()
    writer = gguf.GGUFWriter(args.path, "llama")
    writer.add_block_count(N_LAYER)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(N_FF)
    writer.add_context_length(8192)
    writer.add_head_count(32)
    random = np.random.Generator(np.random.PCG64(0))
    # One matrix of each type, written for all layers: what is read from disk is not less for that.
    blocks = {quant: random_blocks(random, quant) for quant in TYPES}
    for il in range(N_LAYER):
        quant = gguf.GGMLQuantizationType.Q6_K if il % 2 else gguf.GGMLQuantizationType.Q4_K
        writer.add_tensor(f"blk.{il}.ffn_down.weight", blocks[quant], raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=False)
    writer.close()


if __name__ == "__main__":
    main()
