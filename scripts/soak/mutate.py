"""Mutates bytes at random: flips, cuts, repeats, zeroed blocks, numbers at their limits, words of the format."""

import random
import struct

LIMITS = [0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]
WORDS = [
    b"null", b"NaN", b"-Infinity", b"1e999", b"-1", b"0.0", b"[]", b"{}", b'""', b"\\ud800", b"\xff\xfe", b"\x00", b"\r",
    b"\n\n", b"\t", b";", b",,", b'"', b"\x1b[2J", "\u202e".encode(), b"true", b"99999999999999999999", b"[" * 200,
]


def mutate(data: bytes, others: list[bytes], choose: random.Random) -> bytes:
    """Applies one to four random changes."""
    changed = bytearray(data)
    for _ in range(choose.randint(1, 4)):
        CHANGES[choose.randrange(len(CHANGES))](changed, others, choose)
    return bytes(changed)


def _place(data: bytearray, choose: random.Random) -> int:
    # Half of the changes hit the start, where formats keep their counts and names.
    return choose.randrange(min(len(data), 4096) if choose.random() < 0.5 else len(data)) if data else 0


def _flip(data: bytearray, _, choose: random.Random) -> None:
    if data:
        data[_place(data, choose)] ^= 1 << choose.randrange(8)


def _byte(data: bytearray, _, choose: random.Random) -> None:
    if data:
        data[_place(data, choose)] = choose.randrange(256)


def _cut(data: bytearray, _, choose: random.Random) -> None:
    del data[_place(data, choose):]


def _remove(data: bytearray, _, choose: random.Random) -> None:
    at = _place(data, choose)
    del data[at : at + choose.randint(1, 64)]


def _zero(data: bytearray, _, choose: random.Random) -> None:
    at = _place(data, choose)
    n = min(choose.choice([8, 512, 4096]), len(data) - at)
    data[at : at + n] = bytes(n)


def _repeat(data: bytearray, _, choose: random.Random) -> None:
    at = _place(data, choose)
    data[at:at] = data[at : at + choose.randint(1, 256)] * choose.randint(1, 4)


def _number(data: bytearray, _, choose: random.Random) -> None:
    form = choose.choice(["<B", "<H", "<I", "<Q"])
    n = struct.calcsize(form)
    at = _place(data, choose)
    if at + n <= len(data):
        data[at : at + n] = struct.pack(form, choose.choice(LIMITS) & ((1 << 8 * n) - 1))


def _float(data: bytearray, _, choose: random.Random) -> None:
    at = _place(data, choose) & ~3
    if at + 4 <= len(data):
        data[at : at + 4] = struct.pack("<f", choose.choice([float("nan"), float("inf"), -1.0, 3e38, 1e-40]))


def _word(data: bytearray, _, choose: random.Random) -> None:
    at = _place(data, choose)
    data[at : at + choose.randint(0, 4)] = choose.choice(WORDS)


def _splice(data: bytearray, others: list[bytes], choose: random.Random) -> None:
    other = choose.choice(others)
    if other:
        start = choose.randrange(len(other))
        at = _place(data, choose)
        data[at : at + choose.randint(0, 64)] = other[start : start + choose.randint(1, 256)]


CHANGES = [_flip, _byte, _cut, _remove, _zero, _repeat, _number, _float, _word, _splice]
