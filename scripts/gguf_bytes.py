"""Reads and writes GGUF files as raw bytes, so that a test can write files that no correct writer produces.

Keys, strings and tensor names are bytes, and nothing is checked. Only the standard library is used.
"""

import struct

U8, I8, U16, I16, U32, I32, F32, BOOL, STR, ARR, U64, I64, F64 = range(13)
FORMATS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}
# Elements and bytes of a block, by the number of the tensor type.
BLOCKS = {0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36),
          10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292),
          20: (32, 18), 23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 30: (1, 2),
          34: (256, 54), 35: (256, 66), 39: (32, 17)}


def n_bytes(shape: list[int], kind: int) -> int:
    """Bytes of a tensor, rounded down to whole blocks."""
    elements = 1
    for n in shape:
        elements *= n
    length, size = BLOCKS[kind]
    return elements // length * size


class Tensor:
    """Name, shape (fastest axis first), type number and data."""

    def __init__(self, name: bytes, shape: list[int], kind: int, data: bytes):
        self.name, self.shape, self.kind, self.data = name, shape, kind, data


class Gguf:
    """A whole file: `keys` maps a key to (type, value), where an array's value is (element type, list)."""

    def __init__(self, path):
        with open(path, "rb") as file:
            self._bytes = file.read()
        self._at = 4
        self.version, n_tensors, n_keys = self._take("I"), self._take("Q"), self._take("Q")
        self.keys = {}
        for _ in range(n_keys):
            key, kind = self._string(), self._take("I")
            self.keys[key] = (kind, self._value(kind))
        entries = []
        for _ in range(n_tensors):
            name = self._string()
            shape = [self._take("Q") for _ in range(self._take("I"))]
            entries.append((name, shape, self._take("I"), self._take("Q")))
        start = -(-self._at // self.alignment()) * self.alignment()
        self.tensors = []
        for name, shape, kind, offset in entries:
            data = self._bytes[start + offset:start + offset + n_bytes(shape, kind)]
            self.tensors.append(Tensor(name, shape, kind, data))

    def alignment(self) -> int:
        kind, value = self.keys.get(b"general.alignment", (U32, 32))
        return value if kind == U32 and 0 < value <= 1 << 16 else 32

    def _take(self, form: str):
        value, = struct.unpack_from("<" + form, self._bytes, self._at)
        self._at += struct.calcsize("<" + form)
        return value

    def _string(self) -> bytes:
        length = self._take("Q")
        self._at += length
        return self._bytes[self._at - length:self._at]

    def _value(self, kind: int):
        if kind == STR:
            return self._string()
        if kind == ARR:
            element, n = self._take("I"), self._take("Q")
            return element, [self._value(element) for _ in range(n)]
        return self._take(FORMATS[kind])

    def write(self, path) -> None:
        """Writes the file, with the tensors one after another at the alignment."""
        head = bytearray(b"GGUF" + struct.pack("<IQQ", self.version, len(self.tensors), len(self.keys)))
        for key, (kind, value) in self.keys.items():
            head += _sized(key) + struct.pack("<I", kind) + _packed(kind, value)
        alignment, offset = self.alignment(), 0
        for tensor in self.tensors:
            head += _sized(tensor.name) + struct.pack("<I", len(tensor.shape))
            head += struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape) + struct.pack("<IQ", tensor.kind, offset)
            offset += -(-len(tensor.data) // alignment) * alignment
        head += bytes(-len(head) % alignment)
        with open(path, "wb") as file:
            file.write(head)
            for tensor in self.tensors:
                file.write(tensor.data + bytes(-len(tensor.data) % alignment))


def _sized(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _packed(kind: int, value) -> bytes:
    if kind == STR:
        return _sized(value)
    if kind == ARR:
        element, values = value
        return struct.pack("<IQ", element, len(values)) + b"".join(_packed(element, v) for v in values)
    return struct.pack("<" + FORMATS[kind], value)
