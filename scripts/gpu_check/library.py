"""Builds vendor/cuda into a shared library and calls it through ctypes."""

from __future__ import annotations

import contextlib
import ctypes as c
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

SOURCES = Path(__file__).resolve().parent.parent.parent / "vendor" / "cuda"

f32, i32, i64, size = c.c_float, c.c_int32, c.c_int64, c.c_size_t
pointer = c.c_void_p


class Matrix(c.Structure):
    _fields_ = [("type", i32), ("n_in", i64), ("n_out", i64), ("blocks", pointer), ("rounded", pointer)]


class Gemm(c.Structure):
    _fields_ = [("m", i64), ("n", i64), ("k", i64), ("transpose_a", i32), ("transpose_b", i32), ("alpha", f32),
                ("beta", f32)]


class Segment(c.Structure):
    _fields_ = [("first", i32), ("end", i32), ("prefix_first", i32), ("prefix_end", i32)]


class Batch(c.Structure):
    _fields_ = [("n_rows", i64), ("n_segments", i64), ("n_outputs", i64), ("n_answers", i64), ("tokens", pointer), ("positions", pointer),
                ("segments", c.POINTER(Segment)), ("output_rows", pointer), ("output_tokens", pointer),
                ("answer_ends", pointer)]


class NormKind(c.Structure):
    _fields_ = [("is_layer", i32), ("epsilon", f32)]


class AttentionKind(c.Structure):
    _fields_ = [("n_head", i32), ("n_head_kv", i32), ("head_dim", i32), ("scale", f32), ("window", i32),
                ("slopes", pointer)]


class Preference(c.Structure):
    _fields_ = [("loss", i32), ("beta", c.c_double), ("label_smoothing", c.c_double), ("n_pairs", i64)]


# The fields of detox_cuda_pair_cost, as columns of an array.
PAIR_COST = ("policy_chosen", "policy_rejected", "loss", "dchosen", "drejected")


class Parameter(c.Structure):
    _fields_ = [("n", i64), ("gradient", pointer), ("mean", pointer), ("mean_square", pointer), ("value", pointer)]


class RmspropStep(c.Structure):
    _fields_ = [("learning_rate", f32), ("alpha", f32), ("epsilon", f32), ("gradient_scale", f32)]


class AdamwStep(c.Structure):
    _fields_ = [("learning_rate", f32), ("beta1", f32), ("beta2", f32), ("epsilon", f32), ("weight_decay", f32),
                ("gradient_scale", f32), ("correction1", f32), ("correction2", f32)]


class Properties(c.Structure):
    _fields_ = [("name", c.c_char * 256), ("major", i32), ("minor", i32), ("n_multiprocessors", i32),
                ("driver_version", i32), ("runtime_version", i32)]


P = pointer
# The arguments of each function after the device.
SIGNATURES = {
    "describe": [c.POINTER(Properties)],
    "memory": [c.POINTER(size), c.POINTER(size)],
    "allocate": [size, c.POINTER(pointer)],
    "release": [P],
    "clear": [size, P],
    "write": [P, size, P],
    "read": [P, size, P],
    "rows_open": [c.POINTER(Batch), c.POINTER(pointer)],
    "round_blocks": [i32, P, i64, P],
    "products": [c.POINTER(Matrix), i64, P, i64, c.POINTER(pointer)],
    "product_back": [c.POINTER(Matrix), P, i64, P],
    "set_part": [size],
    "multiply": [c.POINTER(Gemm), P, P, P],
    "embed": [c.POINTER(Matrix), P, f32, P],
    "gather": [P, i64, i32, i64, i64, P, f32, P],
    "scatter_add": [P, i64, i32, i64, i64, P, f32, P],
    "norm": [c.POINTER(NormKind), P, P, P, i64, i64, P],
    "norm_back": [c.POINTER(NormKind), P, P, P, i64, i64, P, P, P],
    "rope": [P, P, i32, i32, i32, i64, i64, P],
    "attention": [c.POINTER(AttentionKind), P, P, P, P, P, P],
    "attention_back": [c.POINTER(AttentionKind)] + [P] * 10,
    "activate": [i32, P, P, i64, P],
    "activate_back": [i32, P, P, P, i64, P, P],
    "add": [f32, P, i64, P],
    "copy": [P, i64, P],
    "add_to_rows": [P, i64, i64, P],
    "sum_rows": [P, i64, i64, P],
    "scale_rows": [P, i64, i64, P],
    "add_columns": [P, i64, i64, i64, P, i64, i64, i64],
    "logprobs": [P, i64, i64, f32, i64, i32, P, P],
    "preference_loss": [c.POINTER(Preference), P, P, P, P, P],
    "trim": [],
    "square_sum": [P, P, i64, c.POINTER(c.c_double)],
    "rmsprop": [c.POINTER(RmspropStep), c.POINTER(Parameter), i64],
    "adamw": [c.POINTER(AdamwStep), c.POINTER(Parameter), i64],
}

TOKEN, POSITION, OUTPUT = 0, 1, 2


def stop(reason: str, hint: str) -> None:
    sys.exit(f"error: {reason}\nhint: {hint}")


def find_nvcc() -> Path:
    folders = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if on_path := shutil.which("nvcc"):
        folders.append(Path(on_path).resolve().parent)
    folders.append(Path("/usr/local/cuda/bin"))
    folders += [Path(folder) / "nvidia" / "cu13" / "bin" for folder in sys.path]
    for folder in folders:
        if (folder / "nvcc").is_file():
            return folder / "nvcc"
    stop("no nvcc", "set CUDA_HOME, or pip install nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-runtime "
                    "nvidia-cuda-cccl nvidia-cublas")


def run_all(commands: list[list[str]]) -> None:
    """Runs the commands in parallel, one per core."""
    waiting, running = list(commands), []
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            running.append((waiting[0], subprocess.Popen(waiting.pop(0))))
        command, process = running.pop(0)
        if process.wait() != 0:
            stop(f"the compiler failed: {' '.join(command)}", "see its message above")


def build(folder: Path, emulation: bool, arch: str, sanitize: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / ("libdetox_cuda_emulation.so" if emulation else "libdetox_cuda.so")
    sources = sorted(SOURCES.glob("*.cu"))
    if emulation:
        compiler = next(filter(None, map(shutil.which, ["clang++-16", "clang++", "g++"])), None)
        if compiler is None:
            stop("no C++ compiler", "install clang++ or g++")
        sources = [path for path in sources if path.name != "multiply.cu"]
        sources += sorted((SOURCES / "emulation").glob("*.cpp"))
        flags = ["-x", "c++", "-std=c++17", "-O2", "-fPIC", "-ffp-contract=off", "-DDETOX_CUDA_EMULATION"]
        flags += ["-fsanitize=address", "-g"] if sanitize else []
        objects = [folder / f"{path.name}.emulated.o" for path in sources]
        run_all([[compiler, *flags, "-c", str(s), "-o", str(o)] for s, o in zip(sources, objects)])
        link = [compiler, "-shared", *(["-fsanitize=address", "-shared-libasan"] if sanitize else [])]
        run_all([[*link, "-o", str(library), *map(str, objects)]])
        return library
    nvcc = find_nvcc()
    toolkit = nvcc.parent.parent
    libraries = [folder for folder in (toolkit / "lib64", toolkit / "lib") if folder.is_dir()]
    flags = ["-std=c++17", "-O3", f"-arch={arch}", "-Xcompiler", "-fPIC", f"-I{toolkit / 'include'}"]
    objects = [folder / f"{path.name}.o" for path in sources]
    run_all([[str(nvcc), *flags, "-c", str(s), "-o", str(o)] for s, o in zip(sources, objects)])
    blas = next((str(path) for folder in libraries for path in sorted(folder.glob("libcublasLt.so*"))), None)
    if blas is None:
        stop(f"no libcublasLt.so in {toolkit}", "install cuBLAS, or pip install nvidia-cublas")
    rpath = [option for folder in libraries for option in ("-Xlinker", "-rpath", "-Xlinker", str(folder), f"-L{folder}")]
    run_all([[str(nvcc), "-shared", f"-arch={arch}", "-o", str(library), *map(str, objects), "-Xlinker", blas, *rpath]])
    return library


class Gpu:
    """A device and its arrays. An array lives until it is released, its scope ends, or the device goes."""

    def __init__(self, library: Path):
        self.library = c.CDLL(str(library))
        self.library.detox_cuda_last_error.restype = c.c_char_p
        self.library.detox_cuda_open.argtypes = [i32, c.POINTER(pointer)]
        for name, arguments in SIGNATURES.items():
            getattr(self.library, f"detox_cuda_{name}").argtypes = [pointer, *arguments]
        self.library.detox_cuda_rows_close.argtypes = [pointer]
        self.library.detox_cuda_close.argtypes = [pointer]
        self.arrays: set[int] = set()
        self.batches: set[int] = set()
        self.device = pointer()
        self.check(self.library.detox_cuda_open(0, c.byref(self.device)), "open")

    def check(self, status: int, what: str) -> None:
        if status != 0:
            raise RuntimeError(f"{what}: {self.library.detox_cuda_last_error().decode()}")

    def call(self, name: str, *arguments) -> None:
        self.check(getattr(self.library, f"detox_cuda_{name}")(self.device, *arguments), name)

    def name(self) -> str:
        properties = Properties()
        self.call("describe", c.byref(properties))
        return f"{properties.name.decode()} ({properties.major}.{properties.minor})"

    def memory(self, n_bytes: int) -> int:
        at = pointer()
        self.call("allocate", n_bytes, c.byref(at))
        self.arrays.add(at.value)
        return at.value

    def release(self, *arrays: int | None) -> None:
        for at in arrays:
            self.call("release", at)
            self.arrays.discard(at)

    @contextlib.contextmanager
    def scope(self):
        """Releases all memory allocated within the scope at its end, even after an error."""
        arrays, batches = set(self.arrays), set(self.batches)
        try:
            yield
        finally:
            for rows in self.batches - batches:
                self.close_rows(rows)
            self.release(*(self.arrays - arrays))
            self.call("trim")

    def free_bytes(self) -> int:
        n_free, n_total = size(), size()
        self.call("memory", c.byref(n_free), c.byref(n_total))
        return n_free.value

    def bytes(self, data: np.ndarray) -> int:
        data = np.ascontiguousarray(data)
        at = self.memory(data.nbytes)
        self.call("write", data.ctypes.data, data.nbytes, at)
        return at

    def array(self, data) -> int:
        """Copies an array-like to the device as f32."""
        return self.bytes(np.asarray(data, dtype=np.float32))

    def poison(self, *shape: int) -> int:
        """An array filled with NaN, to detect outputs that were not written."""
        return self.array(np.full(shape, np.nan, dtype=np.float32))

    def read(self, at: int, *shape: int, dtype=np.float32) -> np.ndarray:
        out = np.empty(shape, dtype=dtype)
        self.call("read", at, out.nbytes, out.ctypes.data)
        return out

    def wait(self) -> None:
        """Waits for all operations, by reading nothing."""
        self.call("read", None, 0, None)

    def product(self, matrix: Matrix, x: int, n_rows: int, y: int) -> None:
        """y[R][O] = x[R][I] W^T"""
        self.call("products", c.byref(matrix), 1, x, n_rows, (c.c_void_p * 1)(y))

    def rows(self, batch: "Packed") -> int:
        rows = pointer()
        self.call("rows_open", c.byref(batch.raw()), c.byref(rows))
        self.batches.add(rows.value)
        return rows.value

    def close_rows(self, rows: int) -> None:
        self.library.detox_cuda_rows_close(rows)
        self.batches.discard(rows)


class Packed:
    """Pairs packed as in the trainer: each prompt once, then both answers without their last token."""

    def __init__(self, pairs: list[tuple[list[int], list[int], list[int]]]):
        self.tokens, self.positions, self.segments = [], [], []
        self.output_rows, self.output_tokens, self.answers = [], [], []
        for prompt, chosen, rejected in pairs:
            prefix = self.push(prompt, 0, (0, 0))
            for answer in (chosen, rejected):
                first = len(self.output_rows)
                rows = self.push(answer[:-1], len(prompt), prefix)
                self.output_rows += [prefix[1] - 1, *range(*rows)]
                self.output_tokens += answer
                self.answers.append((first, len(self.output_rows)))

    def push(self, tokens, position, prefix):
        first = len(self.tokens)
        self.tokens += tokens
        self.positions += range(position, position + len(tokens))
        if tokens:
            self.segments.append((first, len(self.tokens), *prefix))
        return first, len(self.tokens)

    def raw(self) -> Batch:
        numbers = lambda values: np.array(values, dtype=np.int32)  # noqa: E731
        self.kept = [numbers(values) for values in (self.tokens, self.positions, self.output_rows, self.output_tokens,
                                                    [end for _, end in self.answers])]
        tokens, positions, output_rows, output_tokens, answer_ends = (array.ctypes.data for array in self.kept)
        self.kept_segments = (Segment * len(self.segments))(*self.segments)
        return Batch(len(self.tokens), len(self.segments), len(self.output_rows), len(self.answers), tokens, positions,
                     self.kept_segments, output_rows, output_tokens, answer_ends)

    def sees(self, window: int = 0) -> np.ndarray:
        """The attention mask [R][R]: whether a row attends to another."""
        n = len(self.tokens)
        mask = np.zeros((n, n), dtype=bool)
        for first, end, prefix_first, prefix_end in self.segments:
            for row in range(first, end):
                mask[row, prefix_first:prefix_end] = True
                mask[row, first:row + 1] = True
        positions = np.array(self.positions)
        if window:
            mask &= positions[:, None] - positions[None, :] < window
        return mask
