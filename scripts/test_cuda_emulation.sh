#!/usr/bin/env bash
# Tests training on the emulated GPU: single operations, whole steps, running out of memory, and loading the result in
# llama.cpp. If PyTorch is installed, every operation is also compared with PyTorch.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh

if cargo nextest --version >/dev/null 2>&1; then
    cargo nextest run --release --features cuda-emulation --lib --test cuda -E 'test(/train::device::cuda::/) | binary(cuda)'
else
    cargo test --release --features cuda-emulation --lib train::device::cuda::
    cargo test --release --features cuda-emulation --test cuda
fi
if python3 -c 'import torch, numpy' 2>/dev/null; then
    python3 scripts/gpu_check.py --emulation
else
    detox_say "no PyTorch: skipping scripts/gpu_check.py"
fi
