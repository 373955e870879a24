#!/usr/bin/env python3
"""Checks and times vendor/cuda on its own. Needs nvcc, g++ and PyTorch, but no Rust.

    scripts/gpu_check.py                    # with a GPU: build, check every operation and a DPO step, time the step
    scripts/gpu_check.py --emulation        # without a GPU: the same checks on the emulated GPU, no times

Compares every operation with PyTorch in float64, and one DPO step on a small model with PyTorch's autograd. Then times a
step on a model of Llama-3-8B's shape (random weights, --layers of its 32 layers) and the same step in PyTorch in bf16.
Exits with code 1 if a check fails. Uses only the folders scripts/gpu_check and vendor/cuda.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from gpu_check import library, operations, step  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emulation", action="store_true", help="use the emulated GPU")
    parser.add_argument("--sanitize", action="store_true", help="compile the emulation with AddressSanitizer (preload its runtime)")
    parser.add_argument("--arch", default="native", help="nvcc's -arch [native]")
    parser.add_argument("--build-dir", type=Path, help="where to build [a temporary folder]")
    parser.add_argument("--only", help="run only checks whose name contains this")
    parser.add_argument("--layers", type=int, default=8, help="layers of the timed model [8]")
    parser.add_argument("--no-times", action="store_true", help="run only the checks")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        started = time.monotonic()
        folder = arguments.build_dir or Path(temporary)
        built = library.build(folder, arguments.emulation, arguments.arch, arguments.sanitize)
        print(f"built in {time.monotonic() - started:.0f} s", file=sys.stderr)
        faults = run(arguments, library.Gpu(built))
    if faults:
        print("\n".join(f"fault: {fault}" for fault in faults))
        sys.exit(1)


def run(arguments: argparse.Namespace, gpu: library.Gpu) -> list[str]:
    import numpy as np

    print(f"device: {gpu.name()}")
    check = operations.Checker()
    for function in (*operations.ALL, step.check_step):
        if arguments.only and arguments.only not in function.__name__:
            continue
        started = time.monotonic()
        function(gpu, check, np.random.default_rng(7))
        print(f"{function.__name__}: {time.monotonic() - started:.1f} s", file=sys.stderr)
    print(f"{'operation':<26} largest error, as a multiple of its bound")
    for operation, worst in check.worst.items():
        print(f"{operation:<26} {worst:.3f}{'  FAULT' if worst > 1 else ''}")
    print(f"{check.n} comparisons, {len(check.faults)} faults")
    if not (arguments.emulation or arguments.no_times or check.faults):
        from gpu_check import times

        times.report(gpu, arguments.layers)
    return check.faults


if __name__ == "__main__":
    main()
