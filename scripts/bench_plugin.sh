#!/usr/bin/env bash
# Measures the overhead of steering: builds examples/c/overhead.c against the llama.cpp of this repository's build and
# runs it.
#
#     scripts/bench_plugin.sh MODEL STEER [--tokens N] [--threads N] [--pool] [--cpu] [--force]
#
# For figures to publish, use an otherwise idle machine, or --cpu.
set -euo pipefail
[ $# -ge 2 ] || { sed -n 's/^#  *\(scripts.*\)/usage: \1/p' "$0" >&2; exit 2; }
model=$(realpath "$1") steer=$(realpath "$2")
shift 2
cd "$(dirname "$0")/.."
. scripts/setup.sh
cargo build --release --quiet --bin detox-gguf
prefix=$(scripts/build_plugin.sh)
library=$(ls -t "$CARGO_TARGET_DIR"/release/build/llama-cpp-sys-2-*/out/lib/libllama.a 2>/dev/null | head -n 1) ||
    detox_stop "no libllama.a in $CARGO_TARGET_DIR/release/build" \
        "unset CARGO_BUILD_TARGET, then cargo clean --release -p llama-cpp-sys-2, so that it is rebuilt there"
llama=${library%/lib/libllama.a}
program=$CARGO_TARGET_DIR/plugin/overhead
"$CC" -std=c11 -O2 -I"$prefix/include" -I"$llama/include" -c examples/c/overhead.c -o "$program.o"
"$CXX" "$program.o" -L"$prefix/lib" -Wl,-rpath,"$prefix/lib" -L"$llama/lib" -o "$program" \
    -ldetox_gguf -lllama -lggml -lggml-cpu -lggml-base -lpthread -lm -ldl
exec "$program" -m "$model" --steer "$steer" -t 1,60,70,80,90 "$@"
