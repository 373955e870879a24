#!/usr/bin/env python3
"""Make the golden numbers for dequantisation, with the gguf package's own implementation.

    python -m venv venv && venv/bin/pip install gguf==0.17.1 numpy==2.4.6
    venv/bin/python scripts/make_dequantize_golden.py            # write tests/golden/dequantize.json
    venv/bin/python scripts/make_dequantize_golden.py --check    # make it again and compare it with the committed file

Each type gets a few blocks of random bytes. Every bit pattern of the small integers is valid, so no
quantiser is needed, and a mistake shared by quantiser and dequantiser cannot cancel out. Only the 16-bit
scales are set, to finite numbers of either sign, because random bits could be NaN or infinity.

The gguf package implements these formats in numpy, independently of ggml's C code, so agreement is real
evidence. Values are stored as the hex of little-endian F32, because decimals could be rounded.
"""

import argparse
import json
import sys
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden" / "dequantize.json"

SEED = 20240623
N_BLOCKS = 2

# Byte offsets of the F16 scales in a block, from the structs in ggml-common.h.
F16_SCALES = {
    Type.Q4_0: [0],
    Type.Q4_1: [0, 2],
    Type.Q5_0: [0],
    Type.Q5_1: [0, 2],
    Type.Q8_0: [0],
    Type.Q2_K: [80, 82],
    Type.Q3_K: [108],
    Type.Q4_K: [0, 2],
    Type.Q5_K: [0, 2],
    Type.Q6_K: [208],
    Type.IQ2_XXS: [0],
    Type.IQ2_XS: [0],
    Type.IQ2_S: [0],
    Type.IQ3_XXS: [0],
    Type.IQ3_S: [0],
    Type.IQ1_S: [0],
    Type.IQ4_NL: [0],
    Type.IQ4_XS: [0],
    Type.TQ1_0: [52],
    Type.TQ2_0: [64],
}


def golden_block(random: np.random.Generator, kind: Type, scales: list[int]) -> dict:
    """Random blocks of one type and their dequantised numbers."""
    block_len, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (N_BLOCKS, block_bytes), dtype=np.uint8)
    for offset in scales:
        sign = random.choice([-1.0, 1.0], N_BLOCKS)
        scale = (sign * random.uniform(1e-3, 1e-1, N_BLOCKS)).astype("<f2")
        blocks[:, offset : offset + 2] = scale.view(np.uint8).reshape(N_BLOCKS, 2)
    values = gguf.dequantize(blocks.reshape(-1), kind).astype("<f4").reshape(-1)
    assert values.size == N_BLOCKS * block_len and np.isfinite(values).all(), kind.name
    return {"bytes": blocks.tobytes().hex(), "values": values.tobytes().hex()}


def make() -> str:
    types = {}
    for kind, scales in F16_SCALES.items():
        # Each type has its own random stream, so adding a type does not change the others.
        types[kind.name] = golden_block(np.random.default_rng([SEED, kind.value]), kind, scales)
    versions = {"gguf": gguf_version(), "numpy": np.__version__}
    return json.dumps({"script": "scripts/make_dequantize_golden.py", "versions": versions, "types": types}, indent=1) + "\n"


def gguf_version() -> str:
    from importlib.metadata import version

    return version("gguf")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the committed file and write nothing")
    arguments = parser.parse_args()
    made = make()
    if arguments.check:
        same = GOLDEN.read_text(encoding="utf-8") == made
        print(f"{GOLDEN}: {'the same' if same else 'different'}")
        return 0 if same else 1
    GOLDEN.write_text(made, encoding="utf-8")
    print(f"{GOLDEN}: {len(F16_SCALES)} types, {len(made)} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
