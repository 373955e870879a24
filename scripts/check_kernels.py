#!/usr/bin/env python3
"""What the assembler says of the kernels in vendor/cuda: registers, memory that they spill, shared memory of fixed size.

    scripts/check_kernels.py --nvcc PATH [--arch 80,86,89,90] [--verbose]

Exit code 1 where a kernel spills registers, or has more shared memory of fixed size than every GPU gives. It needs no GPU.
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

# Without asking, which kernels do for shared memory whose size is known at the launch alone.
MOST_SHARED_BYTES = 48 << 10

KERNEL = re.compile(
    r"Compiling entry function '(?P<name>[^']+)' for 'sm_(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def compiled(nvcc: Path, source: Path, archs: list[str], folder: Path) -> list[dict]:
    """What is said of each kernel of a file, for each kind of GPU."""
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    # As build.rs compiles them; the object is not wanted.
    command = [str(nvcc), "-std=c++17", "-O3", "-Xptxas", "-v", *codes, f"-I{nvcc.parent.parent / 'include'}", "-c", str(source),
               "-o", str(folder / f"{source.name}.o")]
    result = subprocess.run(command, capture_output=True, text=True)
    said = result.stdout + result.stderr
    if result.returncode != 0:
        sys.exit(f"error: nvcc cannot compile {source}\n{said}")
    return read(source.name, said)


def read(source: str, said: str) -> list[dict]:
    kernels = []
    for match in KERNEL.finditer(said):
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
            found.append(f"{what} has {kernel['shared']} bytes of shared memory of fixed size, more than {MOST_SHARED_BYTES}")
    return found


# What ptxas 13 writes, shortened, of a kernel that is right and of two that are not.
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
    """A compiler that words this otherwise must not pass for one that found nothing."""
    kernels = read("example.cu", EXAMPLE)
    assert [kernel["registers"] for kernel in kernels] == [22, 255, 32]
    assert [fault.split()[1] for fault in faults(kernels)] == ["spills", "large"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nvcc", type=Path, required=True)
    parser.add_argument("--arch", default="80,86,89,90", help="compute capabilities without their points [80,86,89,90]")
    parser.add_argument("--verbose", action="store_true", help="a line for each kernel")
    arguments = parser.parse_args()
    check_reader()
    archs, sources = arguments.arch.split(","), sorted(SOURCES.glob("*.cu"))
    # The largest first, so that none is left over at the end.
    sources.sort(key=lambda path: -path.stat().st_size)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        of_files = list(pool.map(lambda source: compiled(arguments.nvcc, source, archs, Path(folder)), sources))
    kernels = [kernel for of_file in of_files for kernel in of_file]
    for source, of_file in zip(sources, of_files):
        text = source.read_text(encoding="utf-8")
        if "__global__" in text and {kernel["arch"] for kernel in of_file} != set(archs):
            sys.exit(f"error: the compiler says nothing of the kernels in {source} for some of {arguments.arch}")
        if arguments.verbose:
            for kernel in of_file:
                print("{source} {name} sm_{arch}: {registers} registers, {stack} bytes of stack, {stores} spilt, {shared} shared"
                      .format(**kernel))
    if found := faults(kernels):
        print("\n".join(f"error: {fault}" for fault in found))
        print("hint: fewer numbers a thread, or launch bounds that leave it more registers")
        sys.exit(1)
    most = max(kernels, key=lambda kernel: kernel["registers"])
    print(f"{len(kernels)} kernels for {arguments.arch}: none spills; {most['source']} has the most registers, {most['registers']}, "
          f"for sm_{most['arch']}; {max(kernel['stack'] for kernel in kernels)} bytes of stack and "
          f"{max(kernel['shared'] for kernel in kernels)} of shared memory of fixed size at most")


if __name__ == "__main__":
    main()
