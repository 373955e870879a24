#!/usr/bin/env python3
"""Convert the files of the paper's repository (BatsResearch/cross-lingual-detox) for this program.

    pip install gguf==0.17.1 numpy
    python scripts/convert_paper_assets.py probe english-probe.pt -o probe.gguf
    python scripts/convert_paper_assets.py neurons actual_sources_of_toxicity.pkl -o neurons.json

Both files are pickles, and loading a pickle can run arbitrary code. This script runs none of it: it accepts only
the few names that such files need, and refuses any other. PyTorch is not needed.
"""

import argparse
import collections
import json
import pickle
import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np


class Module:
    """Stands in for torch.nn.Linear. Keeps its state, runs none of its code."""

    def __setstate__(self, state):
        self.state = state


def rebuild_tensor(storage, offset, size, stride, *_):
    """torch._utils._rebuild_tensor_v2 for a contiguous tensor."""
    expected = [int(np.prod(size[i + 1 :])) for i in range(len(size))]
    if list(stride) != expected:
        raise pickle.UnpicklingError(f"expected a contiguous tensor, found strides {stride} of {size}")
    return storage[offset : offset + int(np.prod(size))].reshape(size)


KNOWN = {
    ("torch.nn.modules.linear", "Linear"): Module,
    ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch", "FloatStorage"): np.dtype("<f4"),
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
}


class Restricted(pickle.Unpickler):
    """An unpickler that accepts only the names in KNOWN."""

    def __init__(self, file, archive: zipfile.ZipFile | None = None, folder: str = ""):
        super().__init__(file)
        self.archive, self.folder = archive, folder

    def find_class(self, module, name):
        if (module, name) not in KNOWN:
            raise pickle.UnpicklingError(f"expected only names that such a file needs, found {module}.{name}")
        return KNOWN[module, name]

    def persistent_load(self, pid):
        kind, dtype, key, _location, n = pid
        if kind != "storage" or self.archive is None:
            raise pickle.UnpicklingError(f"expected a tensor's storage, found {kind!r}")
        values = np.frombuffer(self.archive.read(f"{self.folder}/data/{key}"), dtype=dtype)
        if len(values) != n:
            raise pickle.UnpicklingError(f"expected {n} numbers, found {len(values)}")
        return values


def probe(path: Path, output: Path) -> str:
    """Converts a pickled Linear(n_embd, 1, bias=None) to a probe."""
    with zipfile.ZipFile(path) as archive:
        data = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        with archive.open(data) as file:
            module = Restricted(file, archive, data.removesuffix("/data.pkl")).load()
    parameters = module.state["_parameters"]
    weight = np.asarray(parameters["weight"], dtype=np.float32)
    if parameters.get("bias") is not None or weight.shape[0] != 1:
        raise ValueError(f"expected one output and no bias, found weights of shape {weight.shape}")
    weight = weight[0]
    writer = gguf.GGUFWriter(output, "detox-gguf.probe")
    writer.add_uint32("probe.format", 1)
    writer.add_int32("probe.layer", -1)  # after the final norm
    writer.add_string("probe.pooling", "mean")
    writer.add_uint32("probe.n_embd", len(weight))
    writer.add_float32("probe.bias", 0.0)
    writer.add_string("probe.source", path.name)
    writer.add_tensor("probe.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return f"probe of {len(weight)} numbers, length {np.linalg.norm(weight):.4f}"


def neurons(path: Path, output: Path) -> str:
    """Converts a pickled list of (layer, index) to JSON."""
    with path.open("rb") as file:
        found = Restricted(file).load()
    pairs = [[int(layer), int(index)] for layer, index in found]
    output.write_text(json.dumps(pairs) + "\n", encoding="utf-8")
    return f"{len(pairs)} neurons"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=["probe", "neurons"])
    parser.add_argument("path", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    try:
        summary = {"probe": probe, "neurons": neurons}[args.kind](args.path, args.output)
    except (OSError, pickle.UnpicklingError, zipfile.BadZipFile, ValueError, KeyError, AttributeError) as error:
        print(f"error: {args.path}: {error}", file=sys.stderr)
        return 1
    print(f"{summary}: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
