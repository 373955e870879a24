#!/usr/bin/env bash
# Prepares a Python with llama-cpp-python for the test of the Python example and prints the interpreter's path. Uses
# $DETOX_GGUF_TEST_PYTHON if that Python has llama-cpp-python with its libraries.
#
#     scripts/llama_cpp_python.sh [--if-cached]       with --if-cached: compile nothing; print nothing if not installed
#
# PyPI has only the source, so it is compiled here, for this CPU. That takes some minutes, once for each kind of CPU. The
# cache folder is $DETOX_GGUF_CACHE, or else detox-gguf in the user's cache folder.
set -euo pipefail
cd "$(dirname "$0")/.."
version=0.3.36
cache=${DETOX_GGUF_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/detox-gguf}
cpu=$({ sed -n -e '/^flags/{p;q}' -e '/^Features/{p;q}' /proc/cpuinfo 2>/dev/null || true; uname -m; } | cksum | cut -d' ' -f1)
folder=$cache/llama-cpp-python-$version-$cpu
# Succeeds if a Python has a complete llama-cpp-python. An interrupted installation can be importable but lack the
# libraries that scripts/llama_server.sh links.
is_complete() {
    "$1" - <<'END' >/dev/null 2>&1
import llama_cpp, os
lib = os.path.join(os.path.dirname(os.path.dirname(llama_cpp.__file__)), "lib")
for name in ("ggml-base", "ggml-cpu", "ggml", "llama", "llama-common"):
    os.stat(os.path.join(lib, f"lib{name}.so"))
END
}
if [ -n "${DETOX_GGUF_TEST_PYTHON:-}" ] && is_complete "$DETOX_GGUF_TEST_PYTHON"; then
    printf '%s\n' "$DETOX_GGUF_TEST_PYTHON"
    exit 0
fi
if ! is_complete "$folder/bin/python"; then
    [ "${1:-}" != --if-cached ] || exit 0
    . scripts/setup.sh >&2
    # Run one installation at a time: the code below clears the folder, which another run may be filling.
    mkdir -p "$cache"
    exec 9>"$folder.lock"
    if detox_has flock; then flock 9; fi
fi
if ! is_complete "$folder/bin/python"; then
    detox_say "compiling llama-cpp-python $version into $folder (takes some minutes)"
    # On Debian, venv can install pip only if a separate package is present; otherwise use the system's pip.
    # --clear, because pip would not repair a partial installation.
    pip=("$folder/bin/pip")
    if ! python3 -m venv --clear "$folder" >/dev/null 2>&1; then
        python3 -m venv --clear --without-pip "$folder" >&2
        site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
        pip=(python3 -m pip --disable-pip-version-check)
        target=(--target "$site")
    fi
    # Skip its tools and servers, and skip OpenMP, which cmake does not find for clang.
    CMAKE_ARGS="-DGGML_NATIVE=ON -DGGML_OPENMP=OFF -DLLAMA_CURL=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAVA_BUILD=OFF" \
        CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)} \
        detox_quietly "${pip[@]}" install --quiet ${target[@]+"${target[@]}"} "llama-cpp-python==$version" ||
        detox_stop "pip could not install llama-cpp-python $version" "see its message above"
    is_complete "$folder/bin/python" || detox_stop "llama-cpp-python $version in $folder is incomplete" \
        "try $folder/bin/python -c 'import llama_cpp', and look for missing libraries in lib/ beside llama_cpp/"
fi
printf '%s\n' "$folder/bin/python"
