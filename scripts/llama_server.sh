#!/usr/bin/env bash
# Prepares a llama-server for the test of examples/llama-server.sh, and prints its path.
#
#     scripts/llama_server.sh [--if-cached]       with the flag prints nothing where none is there, and compiles nothing
#
# llama-cpp-python's source distribution has the server's sources too, and scripts/llama_cpp_python.sh has compiled the
# llama.cpp beneath: it is linked, so that the server's own files alone are compiled, once. The program lies in the same
# cache folder. It has no web page and no TLS.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh >&2
python=$(scripts/llama_cpp_python.sh "$@")
[ -n "$python" ] || exit 0
read -r version site < <("$python" -c \
    'import llama_cpp, os; print(llama_cpp.__version__, os.path.dirname(os.path.dirname(llama_cpp.__file__)))') ||
    detox_stop "$python does not import llama_cpp" "see its message above"
cache=${DETOX_GGUF_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/detox-gguf}
# Of how it is made, and where it looks for its libraries: one that was made otherwise is not taken for it.
key=$({ printf '%s\n' "$site"; cat scripts/llama_server/CMakeLists.txt; } | cksum | cut -d' ' -f1)
server=$cache/llama-server-$version-$key
if ! "$server" --version >/dev/null 2>&1; then
    [ "${1:-}" != --if-cached ] || exit 0
    mkdir -p "$cache"
    # Of builds that were broken off.
    rm -f "$server".*
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-python \
        --dest "$work" "llama-cpp-python==$version" >&2
    tar -xzf "$work"/llama_cpp_python-*.tar.gz -C "$work" "llama_cpp_python-$version/vendor/llama.cpp"
    # None of it computes: for the tests the compiler's time counts, not the server's.
    cmake -S scripts/llama_server -B "$work/build" -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_FLAGS_RELEASE='-O1 -DNDEBUG' \
        -DLLAMA_SOURCE="$work/llama_cpp_python-$version/vendor/llama.cpp" -DLLAMA_PREFIX="$site" >&2
    cmake --build "$work/build" --target llama-server --parallel "${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}" >&2
    # Renamed into its place, so that what is there is whole.
    cp "$work/build/bin/llama-server" "$server.$$"
    mv "$server.$$" "$server"
    "$server" --version >&2
fi
printf '%s\n' "$server"
