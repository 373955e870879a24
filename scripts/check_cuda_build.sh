#!/usr/bin/env bash
# Checks the build with --features cuda on a machine without a GPU, using the nvcc of NVIDIA's packages on PyPI. It
# compiles and links the program, checks its error message on a machine without a GPU, and checks the assembler's report
# on the kernels for every default GPU architecture. The packages (about 1 GB) stay in the user's cache folder. At run
# time cuBLASLt also loads nvidia-cuda-nvrtc; it is not installed here, because nothing runs on a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh

requirements=scripts/requirements-cuda.txt
cache=${DETOX_GGUF_CUDA_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/detox-gguf/cuda}
# The folder's name depends on the requirements: other packages get another folder.
folder=$cache/$(sha256sum "$requirements" | cut -c1-16)
if [ ! -f "$folder/complete" ]; then
    detox_say "installing NVIDIA's compiler (about 1 GB) into $folder"
    # Installed into a temporary folder and renamed, so that another run finds either all of it or nothing.
    unfinished=$folder.$$
    trap 'rm -rf "$unfinished"' EXIT
    mkdir -p "$unfinished/tmp"
    free=$(df --output=avail -k "$unfinished" | tail -1)
    [ "$free" -gt 4000000 ] || detox_stop "$cache: expected 4 GB of free space, found less" "free some space, or set DETOX_GGUF_CUDA_CACHE"
    detox_quietly env TMPDIR="$unfinished/tmp" PIP_ROOT_USER_ACTION=ignore python3 -m pip install --quiet --no-deps --no-cache-dir \
        --only-binary :all: --disable-pip-version-check --target "$unfinished" -r "$requirements" ||
        detox_stop "pip cannot install the packages of $requirements" "see its message above"
    rm -rf "$unfinished/tmp" "$folder"
    touch "$unfinished/complete"
    mv "$unfinished" "$folder"
    trap - EXIT
fi
toolkit=$folder/nvidia/cu13
[ -x "$toolkit/bin/nvcc" ] || detox_stop "no nvcc in $toolkit/bin" "delete $folder, then run this again"

# Check registers and shared memory. The report is cached by a hash of the sources and the compiler's version.
kernels=$CARGO_TARGET_DIR/cuda-kernels
mkdir -p "$kernels"
sources=$(cat vendor/cuda/*.cu vendor/cuda/*.cuh vendor/cuda/*.h scripts/check_kernels.py "$requirements" | sha256sum | cut -c1-16)
if [ ! -f "$kernels/$sources" ]; then
    scripts/check_kernels.py --nvcc "$toolkit/bin/nvcc" >"$kernels/unfinished" || { cat "$kernels/unfinished" >&2; exit 1; }
    mv "$kernels/unfinished" "$kernels/$sources"
fi
cat "$kernels/$sources" >&2

# To save time, build for one GPU architecture and do not optimise this package's Rust code: nothing here is timed. All
# other settings match the other builds, so that llama.cpp is not recompiled.
export CUDA_HOME=$toolkit DETOX_CUDA_ARCH=80
as_built=(--release --config profile.release.package.detox-gguf.opt-level=0 --features cuda)
cargo build "${as_built[@]}" --bin detox-gguf
# Move it: other scripts expect an optimised program without CUDA at that path.
program=$CARGO_TARGET_DIR/detox-gguf-cuda
mv "$CARGO_TARGET_DIR/release/detox-gguf" "$program"

# The link succeeded, so every function is defined. Now check that the shared libraries are found.
libraries=$(ldd "$program")
case "$libraries" in
    *"not found"*) detox_stop "the program does not find its shared libraries" "see: $libraries" ;;
    *libcublasLt*) ;;
    *) detox_stop "the program was linked without cuBLASLt" "see build.rs" ;;
esac

# Without a GPU, the program must report that before it writes anything. With a GPU, skip this check.
if [ ! -e /dev/nvidiactl ]; then
    output=$(mktemp -d)
    trap 'rm -rf "$output"' EXIT
    if "$program" train -m gguf/tiny/llama.gguf --device cuda -o "$output/run" >"$output/log" 2>&1; then
        detox_stop "train --device cuda succeeded without a GPU" "see src/train/device/cuda"
    fi
    cat "$output/log" >&2
    if ! grep -q '^error: cuda:0: ' "$output/log" || ! grep -q -- '--device cpu' "$output/log" || [ -e "$output/run" ]; then
        detox_stop "the message above is not the expected one for a machine without a GPU" "see src/train/device/cuda/handle.rs"
    fi
fi
# Lint the code that only this feature compiles.
cargo clippy "${as_built[@]}" --all-targets -- -D warnings
detox_say "ok: the CUDA build compiles and links"
