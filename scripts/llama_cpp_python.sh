#!/usr/bin/env bash
# Prepares a Python with llama-cpp-python for the test of the Python example, and prints its path. One that
# DETOX_GGUF_TEST_PYTHON names is taken where it has llama-cpp-python with its libraries.
#
#     scripts/llama_cpp_python.sh [--if-cached]       with the flag prints nothing where none is there, and compiles nothing
#
# PyPI has it as source alone: compiling takes some minutes, once for each kind of CPU, since it is compiled for the one
# that it runs on. The folder is $DETOX_GGUF_CACHE, else detox-gguf in the user's cache folder.
set -euo pipefail
cd "$(dirname "$0")/.."
version=0.3.36
cache=${DETOX_GGUF_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/detox-gguf}
cpu=$({ sed -n -e '/^flags/{p;q}' -e '/^Features/{p;q}' /proc/cpuinfo 2>/dev/null || true; uname -m; } | cksum | cut -d' ' -f1)
folder=$cache/llama-cpp-python-$version-$cpu
# Whether a Python has it whole: an installation that was broken off may lack the libraries that scripts/llama_server.sh
# links, though it is imported without them.
is_whole() {
    "$1" - <<'END' >/dev/null 2>&1
import llama_cpp, os
lib = os.path.join(os.path.dirname(os.path.dirname(llama_cpp.__file__)), "lib")
for name in ("ggml-base", "ggml-cpu", "ggml", "llama", "llama-common"):
    os.stat(os.path.join(lib, f"lib{name}.so"))
END
}
if [ -n "${DETOX_GGUF_TEST_PYTHON:-}" ] && is_whole "$DETOX_GGUF_TEST_PYTHON"; then
    printf '%s\n' "$DETOX_GGUF_TEST_PYTHON"
    exit 0
fi
if ! is_whole "$folder/bin/python"; then
    [ "${1:-}" != --if-cached ] || exit 0
    . scripts/setup.sh >&2
    # One at a time: what follows clears the folder, which another run may be filling.
    mkdir -p "$cache"
    exec 9>"$folder.lock"
    if detox_has flock; then flock 9; fi
fi
if ! is_whole "$folder/bin/python"; then
    # Debian has the part that puts pip into a new environment in a package of its own: without it the system's pip does.
    # Cleared: pip leaves alone what it finds half installed.
    pip=("$folder/bin/pip")
    if ! python3 -m venv --clear "$folder" >/dev/null 2>&1; then
        python3 -m venv --clear --without-pip "$folder" >&2
        site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
        pip=(python3 -m pip --disable-pip-version-check)
        target=(--target "$site")
    fi
    # Its tools and servers are not needed, and OpenMP is not found under clang.
    CMAKE_ARGS="-DGGML_NATIVE=ON -DGGML_OPENMP=OFF -DLLAMA_CURL=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAVA_BUILD=OFF" \
        CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)} \
        "${pip[@]}" install --quiet ${target[@]+"${target[@]}"} "llama-cpp-python==$version" >&2
    is_whole "$folder/bin/python" || detox_stop "llama-cpp-python $version in $folder is not whole" \
        "see the messages above; $folder/bin/python -c 'import llama_cpp' and lib/ beside llama_cpp/ tell what is missing"
fi
printf '%s\n' "$folder/bin/python"
