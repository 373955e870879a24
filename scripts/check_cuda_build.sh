#!/usr/bin/env bash
# Compiles and links the program with --features cuda on a machine without a GPU, by the nvcc of NVIDIA's packages on PyPI,
# looks at what the program says there, and at what the assembler says of the kernels for every kind of GPU that they are
# built for by default. The packages (about 1 GB) stay in the user's cache folder. cuBLASLt loads one more where it runs,
# nvidia-cuda-nvrtc, which pip brings along elsewhere; nothing runs here.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh

requirements=scripts/requirements-cuda.txt
cache=${DETOX_GGUF_CUDA_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/detox-gguf/cuda}
# Other packages get another folder.
folder=$cache/$(sha256sum "$requirements" | cut -c1-16)
if [ ! -f "$folder/complete" ]; then
    detox_say "fetching NVIDIA's compiler into $folder"
    # Beside its place, so that another run finds all of it or nothing.
    unfinished=$folder.$$
    trap 'rm -rf "$unfinished"' EXIT
    mkdir -p "$unfinished/tmp"
    free=$(df --output=avail -k "$unfinished" | tail -1)
    [ "$free" -gt 4000000 ] || detox_stop "less than 4 GB are free in $cache" "free some space, or set DETOX_GGUF_CUDA_CACHE"
    TMPDIR=$unfinished/tmp PIP_ROOT_USER_ACTION=ignore python3 -m pip install --quiet --no-deps --no-cache-dir \
        --only-binary :all: --disable-pip-version-check --target "$unfinished" -r "$requirements" >&2 ||
        detox_stop "pip cannot install the packages of $requirements" "see its message above"
    rm -rf "$unfinished/tmp" "$folder"
    touch "$unfinished/complete"
    mv "$unfinished" "$folder"
    trap - EXIT
fi
toolkit=$folder/nvidia/cu13
[ -x "$toolkit/bin/nvcc" ] || detox_stop "no nvcc in $toolkit/bin" "delete $folder, then run this again"

# Registers and shared memory, once for the same sources and compiler.
kernels=$CARGO_TARGET_DIR/cuda-kernels
mkdir -p "$kernels"
sources=$(cat vendor/cuda/*.cu vendor/cuda/*.cuh vendor/cuda/*.h scripts/check_kernels.py "$requirements" | sha256sum | cut -c1-16)
if [ ! -f "$kernels/$sources" ]; then
    scripts/check_kernels.py --nvcc "$toolkit/bin/nvcc" >"$kernels/unfinished" || { cat "$kernels/unfinished" >&2; exit 1; }
    mv "$kernels/unfinished" "$kernels/$sources"
fi
cat "$kernels/$sources" >&2

# One kind of GPU, and this package's own Rust not optimised, keep it short: nothing here is timed. The rest is as in the
# other builds, so that llama.cpp is not compiled again.
export CUDA_HOME=$toolkit DETOX_CUDA_ARCH=80
as_built=(--release --config profile.release.package.detox-gguf.opt-level=0 --features cuda)
cargo build "${as_built[@]}" --bin detox-gguf
# Not left where an optimised one without CUDA is looked for.
program=$CARGO_TARGET_DIR/detox-gguf-cuda
mv "$CARGO_TARGET_DIR/release/detox-gguf" "$program"

# Every function of the interface is defined, and the libraries that it needs are found.
libraries=$(ldd "$program")
case "$libraries" in
    *"not found"*) detox_stop "the program does not find its libraries" "see: $libraries" ;;
    *libcublasLt*) ;;
    *) detox_stop "the program was linked without cuBLASLt" "look at build.rs" ;;
esac

# Without a GPU the program says so, before it writes anything. With one this has nothing to check.
if [ ! -e /dev/nvidiactl ]; then
    output=$(mktemp -d)
    trap 'rm -rf "$output"' EXIT
    if "$program" train -m gguf/tiny/llama.gguf --device cuda -o "$output/run" >"$output/log" 2>&1; then
        detox_stop "the program trained on a GPU that is not there" "look at src/train/device/cuda"
    fi
    cat "$output/log" >&2
    if ! grep -q '^error: cuda:0: ' "$output/log" || ! grep -q -- '--device cpu' "$output/log" || [ -e "$output/run" ]; then
        detox_stop "that is not what it should say without a GPU" "look at src/train/device/cuda/handle.rs"
    fi
fi
# What is compiled with this feature alone.
cargo clippy "${as_built[@]}" --all-targets -- -D warnings
detox_say "the CUDA build links"
