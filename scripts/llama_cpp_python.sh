#!/usr/bin/env bash
# Prepares a Python with llama-cpp-python for the test of the Python example, and prints its path.
#
# PyPI has it as source alone: compiling takes some minutes, once. The folder is $DETOX_GGUF_CACHE, else
# detox-gguf in the user's cache folder.
set -euo pipefail
cd "$(dirname "$0")/.."
version=0.3.36
cache=${DETOX_GGUF_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/detox-gguf}
folder=$cache/llama-cpp-python-$version
if ! "$folder/bin/python" -c 'import llama_cpp' >/dev/null 2>&1; then
    . scripts/setup.sh >&2
    python3 -m venv "$folder" >&2
    # Its tools and servers are not needed, and OpenMP is not found under clang.
    CMAKE_ARGS="-DGGML_NATIVE=ON -DGGML_OPENMP=OFF -DLLAMA_CURL=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAVA_BUILD=OFF" \
        CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)} \
        "$folder/bin/pip" install --quiet "llama-cpp-python==$version" >&2
    "$folder/bin/python" -c 'import llama_cpp' >&2
fi
printf '%s\n' "$folder/bin/python"
