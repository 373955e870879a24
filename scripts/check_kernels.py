#!/usr/bin/env python3
"""Checks the assembler's report on the kernels in vendor/cuda: registers, register spills, and static shared memory.

    scripts/check_kernels.py --nvcc PATH [--arch 80,86,89,90] [--verbose]

Exits with code 1 if a kernel spills registers, or has more static shared memory than every GPU supports. Needs no GPU.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).resolve().parent.parent / "vendor" / "cuda"

# The limit for static shared memory. Kernels can request more only for dynamic shared memory, sized at launch.
MOST_SHARED_BYTES = 48 << 10

KERNEL = re.compile(
    r"Compiling entry function '(?P<name>[^']+)' for 'sm_(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def compiled(nvcc: Path, source: Path, archs: list[str], folder: Path) -> list[dict]:
    """Compiles a file and returns the report on each of its kernels for each architecture."""
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    # The flags of build.rs. The object file is discarded.
    command = [str(nvcc), "-std=c++17", "-O3", "-Xptxas", "-v", *codes, f"-I{nvcc.parent.parent / 'include'}", "-c", str(source),
               "-o", str(folder / f"{source.name}.o")]
    result = subprocess.run(command, capture_output=True, text=True)
    report = result.stdout + result.stderr
    if result.returncode != 0:
        sys.exit(f"error: nvcc cannot compile {source}\n{report}")
    return read(source.name, report)


def read(source: str, report: str) -> list[dict]:
    """Parses the assembler's report."""
    kernels = []
    for match in KERNEL.finditer(report):
        smem = re.search(r"(\d+) bytes smem", match["rest"])
        numbers = {key: int(match[key]) for key in ("stack", "stores", "loads", "registers")}
        kernels.append({"source": source, "name": match["name"], "arch": match["arch"], **numbers,
                        "shared": int(smem[1]) if smem else 0})
    return kernels


def faults(kernels: list[dict]) -> list[str]:
    found = []
    for kernel in kernels:
        what = f"{kernel['source']}: {kernel['name']} for sm_{kernel['arch']}"
        if kernel["stores"] or kernel["loads"]:
            found.append(f"{what} spills {kernel['stores']} bytes and reads {kernel['loads']}, with {kernel['registers']} registers")
        if kernel["shared"] > MOST_SHARED_BYTES:
            found.append(f"{what} has {kernel['shared']} bytes of static shared memory, more than {MOST_SHARED_BYTES}")
    return found


# A shortened report of ptxas 13, on a correct kernel and on two with faults.
EXAMPLE = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'right' for 'sm_80'
ptxas info    : Function properties for right
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 22 registers, used 1 barriers, 400 bytes cmem[0]
ptxas info    : Compiling entry function 'spills' for 'sm_90'
ptxas info    : Function properties for spills
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 16 bytes cumulative stack size, 400 bytes cmem[0]
ptxas info    : Compiling entry function 'large' for 'sm_80'
ptxas info    : Function properties for large
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 49156 bytes smem, 400 bytes cmem[0]
"""


def check_reader() -> None:
    """Checks that the parser finds faults, so that a parser that matches nothing cannot pass for success."""
    kernels = read("example.cu", EXAMPLE)
    assert [kernel["registers"] for kernel in kernels] == [22, 255, 32]
    assert [fault.split()[1] for fault in faults(kernels)] == ["spills", "large"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nvcc", type=Path, required=True)
    parser.add_argument("--arch", default="80,86,89,90", help="compute capabilities without the dot [80,86,89,90]")
    parser.add_argument("--verbose", action="store_true", help="print a line for each kernel")
    arguments = parser.parse_args()
    check_reader()
    archs, sources = arguments.arch.split(","), sorted(SOURCES.glob("*.cu"))
    # Compile the largest files first, so that no long one is left for the end.
    sources.sort(key=lambda path: -path.stat().st_size)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        by_file = list(pool.map(lambda source: compiled(arguments.nvcc, source, archs, Path(folder)), sources))
    kernels = [kernel for file_kernels in by_file for kernel in file_kernels]
    for source, file_kernels in zip(sources, by_file):
        text = source.read_text(encoding="utf-8")
        if "__global__" in text and {kernel["arch"] for kernel in file_kernels} != set(archs):
            sys.exit(f"error: {source}: expected a report on its kernels for {arguments.arch}, found none for some of them")
        if arguments.verbose:
            for kernel in file_kernels:
                print("{source} {name} sm_{arch}: {registers} registers, {stack} bytes of stack, {stores} spilt, {shared} shared"
                      .format(**kernel))
    if found := faults(kernels):
        print("\n".join(f"error: {fault}" for fault in found))
        print("hint: keep fewer numbers per thread, or set launch bounds that allow more registers")
        sys.exit(1)
    most = max(kernels, key=lambda kernel: kernel["registers"])
    print(f"{len(kernels)} kernels for {arguments.arch}: none spills; maximum {most['registers']} registers "
          f"({most['source']} for sm_{most['arch']}), {max(kernel['stack'] for kernel in kernels)} bytes of stack, "
          f"{max(kernel['shared'] for kernel in kernels)} bytes of static shared memory")


if __name__ == "__main__":
    main()
