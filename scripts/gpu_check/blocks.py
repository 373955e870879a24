"""Random blocks of ggml's types, and their dequantisation in NumPy."""

from __future__ import annotations

import numpy as np

# For each type: ggml's number, numbers per block, bytes per block, and byte offsets of the block's F16 fields.
TYPES = {
    "F32": (0, 1, 4, ()),
    "F16": (1, 1, 2, ()),
    "BF16": (30, 1, 2, ()),
    "Q4_0": (2, 32, 18, (0,)),
    "Q4_1": (3, 32, 20, (0, 2)),
    "Q5_0": (6, 32, 22, (0,)),
    "Q5_1": (7, 32, 24, (0, 2)),
    "Q8_0": (8, 32, 34, (0,)),
    "Q4_K": (12, 256, 144, (0, 2)),
    "Q5_K": (13, 256, 176, (0, 2)),
    "Q6_K": (14, 256, 210, (208,)),
}


def random_blocks(name: str, n: int, random: np.random.Generator) -> np.ndarray:
    """The bytes of n random numbers, about as large as a model's weights."""
    _, length, n_bytes, scales = TYPES[name]
    if name == "F32":
        return random.standard_normal(n).astype(np.float32).view(np.uint8) if n else np.zeros(0, np.uint8)
    if name == "F16":
        values = random.standard_normal(n).astype(np.float16)
        values[: n // 8] *= np.float16(1e-6)  # make some subnormal
        return values.view(np.uint8)
    if name == "BF16":
        return (random.standard_normal(n).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    blocks = random.integers(0, 256, (n // length, n_bytes), dtype=np.uint8)
    for at in scales:
        magnitude = 0.001 if name in ("Q4_K", "Q5_K", "Q6_K", "Q8_0") else 0.05
        values = (magnitude * (1 + random.random(n // length)) * random.choice([-1, 1], n // length)).astype(np.float16)
        blocks[:, at:at + 2] = values.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(-1)


def f16(blocks: np.ndarray, at: int) -> np.ndarray:
    return blocks[:, at:at + 2].copy().view(np.float16).astype(np.float64)


def halves(codes: np.ndarray) -> np.ndarray:
    return np.concatenate([codes & 15, codes >> 4], axis=-1).astype(np.int64)


def fifth(bits: np.ndarray) -> np.ndarray:
    return np.unpackbits(bits, axis=1, bitorder="little").astype(np.int64) * 16


def k_scales(scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unpacks twelve bytes per block into scales and minima, each [blocks][8]."""
    low, high, rest = (scales[:, i:i + 4].astype(np.int64) for i in (0, 4, 8))
    scale = np.concatenate([low & 63, (rest & 15) | (low >> 6) << 4], axis=1)
    minimum = np.concatenate([high & 63, (rest >> 4) | (high >> 6) << 4], axis=1)
    return scale, minimum


def dequantised(name: str, data: np.ndarray) -> np.ndarray:
    _, length, n_bytes, _ = TYPES[name]
    if name == "F32":
        return data.view(np.float32).astype(np.float64)
    if name == "F16":
        return data.view(np.float16).astype(np.float64)
    if name == "BF16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    blocks = data.reshape(-1, n_bytes)
    d = f16(blocks, 208 if name == "Q6_K" else 0)
    if name == "Q4_0":
        values = d * (halves(blocks[:, 2:]) - 8)
    elif name == "Q4_1":
        values = d * halves(blocks[:, 4:]) + f16(blocks, 2)
    elif name == "Q5_0":
        values = d * ((halves(blocks[:, 6:]) | fifth(blocks[:, 2:6])) - 16)
    elif name == "Q5_1":
        values = d * (halves(blocks[:, 8:]) | fifth(blocks[:, 4:8])) + f16(blocks, 2)
    elif name == "Q8_0":
        values = d * blocks[:, 2:].view(np.int8).astype(np.float64)
    elif name in ("Q4_K", "Q5_K"):
        scale, minimum = k_scales(blocks[:, 4:16])
        codes = blocks[:, -128:].reshape(-1, 4, 32)
        codes = np.stack([codes & 15, codes >> 4], axis=2).reshape(-1, 8, 32).astype(np.int64)
        if name == "Q5_K":
            bits = blocks[:, 16:48].astype(np.int64)
            codes |= np.stack([(bits >> j & 1) << 4 for j in range(8)], axis=1)
        values = (d * scale)[:, :, None] * codes - (f16(blocks, 2) * minimum)[:, :, None]
    else:
        low, high = blocks[:, :128].reshape(-1, 2, 2, 32), blocks[:, 128:192].reshape(-1, 2, 32)
        quarters = [(low[:, :, q % 2] >> (q // 2 * 4) & 15).astype(np.int64) | (high >> (2 * q) & 3).astype(np.int64) << 4
                    for q in range(4)]
        codes = np.stack(quarters, axis=2).reshape(-1, 16, 16) - 32
        values = (d * blocks[:, 192:208].view(np.int8))[:, :, None] * codes
    return values.reshape(-1)
