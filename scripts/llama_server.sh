#!/usr/bin/env bash
# Prepares a llama-server for the test of examples/llama-server.sh and prints its path.
#
#     scripts/llama_server.sh [--if-cached]       with --if-cached: compile nothing; print nothing if not built
#
# The sources come from llama-cpp-python's source distribution. Only the server's own files are compiled, once; they are
# linked with the llama.cpp that scripts/llama_cpp_python.sh has compiled. The server is stored in the same cache folder.
# It has no web page and no TLS.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh >&2
python=$(scripts/llama_cpp_python.sh "$@")
[ -n "$python" ] || exit 0
read -r version site < <("$python" -c \
    'import llama_cpp, os; print(llama_cpp.__version__, os.path.dirname(os.path.dirname(llama_cpp.__file__)))') ||
    detox_stop "$python cannot import llama_cpp" "see its message above"
cache=${DETOX_GGUF_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/detox-gguf}
# A hash of the build recipe and the library folder is part of the name, so that an outdated server is not reused.
key=$({ printf '%s\n' "$site"; cat scripts/llama_server/CMakeLists.txt; } | cksum | cut -d' ' -f1)
server=$cache/llama-server-$version-$key
if ! "$server" --version >/dev/null 2>&1; then
    [ "${1:-}" != --if-cached ] || exit 0
    mkdir -p "$cache"
    # Left over from interrupted builds.
    rm -f "$server".*
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    detox_say "compiling llama-server $version into $cache"
    detox_quietly python3 -m pip download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-python \
        --dest "$work" "llama-cpp-python==$version" ||
        detox_stop "pip could not download llama-cpp-python $version" "see its message above"
    tar -xzf "$work"/llama_cpp_python-*.tar.gz -C "$work" "llama_cpp_python-$version/vendor/llama.cpp"
    # -O1 compiles faster. The server's own files do no heavy computation, and its speed does not matter to the tests.
    detox_quietly cmake -S scripts/llama_server -B "$work/build" -DCMAKE_BUILD_TYPE=Release \
        -DCMAKE_CXX_FLAGS_RELEASE='-O1 -DNDEBUG' \
        -DLLAMA_SOURCE="$work/llama_cpp_python-$version/vendor/llama.cpp" -DLLAMA_PREFIX="$site" ||
        detox_stop "cmake could not configure llama-server" "see its message above"
    detox_quietly cmake --build "$work/build" --target llama-server \
        --parallel "${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}" || detox_stop "llama-server does not compile" "see the messages above"
    # Copied under a temporary name and renamed, so that an interrupted copy is never used.
    cp "$work/build/bin/llama-server" "$server.$$"
    mv "$server.$$" "$server"
    "$server" --version >&2
fi
printf '%s\n' "$server"
