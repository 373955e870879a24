#!/usr/bin/env bash
# Builds and runs every test. Tests of the whole program need a small real model, which is downloaded.
# Arguments, such as test names, are passed to cargo nextest run (or to cargo test if nextest is not installed).
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh

# Without the model, the tests that need it fail if CI=true; otherwise they print that they are skipped.
if model=$(python3 scripts/fetch_model.py smollm2-135m-instruct-q4_1); then
    export DETOX_GGUF_TEST_MODEL="$model"
elif [ "${CI:-}" = true ]; then
    detox_stop "cannot download the model for the tests" "see pip's message above"
fi
# The plugin's tests run on Linux. In CI they also require a Python with llama.cpp, a llama-server, and clang's
# sanitizers. A run of selected tests does not compile the server; if it is not cached, the server's tests fail.
is_linux=$([ "$(uname -s)" != Linux ] || printf true)
if [ "${CI:-}" = true ] && [ -n "$is_linux" ]; then
    if [ -z "${DETOX_GGUF_TEST_PYTHON:-}" ]; then
        DETOX_GGUF_TEST_PYTHON=$(scripts/llama_cpp_python.sh) ||
            detox_stop "cannot install llama-cpp-python" "see pip's message above"
        export DETOX_GGUF_TEST_PYTHON
    fi
    if [ -z "${DETOX_GGUF_TEST_LLAMA_SERVER:-}" ]; then
        if_cached=()
        [ $# -eq 0 ] || if_cached=(--if-cached)
        DETOX_GGUF_TEST_LLAMA_SERVER=$(scripts/llama_server.sh ${if_cached[@]+"${if_cached[@]}"}) ||
            detox_stop "cannot build llama-server" "see the messages above"
        [ -z "$DETOX_GGUF_TEST_LLAMA_SERVER" ] || export DETOX_GGUF_TEST_LLAMA_SERVER
    fi
    detox_need_sanitizers
fi
# Unit tests of the plugin, which is the crate without llama.cpp. The tests below use the plugin from outside.
[ $# -gt 0 ] || cargo test --quiet --lib --no-default-features --features capi --target-dir "$CARGO_TARGET_DIR/plugin-build"
# Build the plugin's libraries in advance, so that no test spends its time limit on building one. Skipped for a run of
# selected tests.
[ $# -gt 0 ] || [ -z "$is_linux" ] || scripts/build_plugin.sh "$CARGO_TARGET_DIR/plugin-tests/prefix" >/dev/null
[ $# -gt 0 ] || [ "${CI:-}" != true ] || [ -z "$is_linux" ] || scripts/build_plugin_sanitized.sh >/dev/null
if cargo nextest --version >/dev/null 2>&1; then
    cargo nextest run --release "$@"
else
    # As in .config/nextest.toml: tests that compute run one at a time, the others in parallel.
    rest=()
    for file in tests/*.rs tests/*/main.rs; do
        name=${file#tests/}
        name=${name%/main.rs}
        name=${name%.rs}
        case "$name" in engine | cli | export | plugin) continue ;; esac
        [ ! -f "$file" ] || rest+=(--test "$name")
    done
    cargo test --release --lib --bins "${rest[@]}" "$@"
    # The same as --test-threads=1, but it leaves the part after -- to the arguments.
    RUST_TEST_THREADS=1 cargo test --release --test engine --test cli --test export --test plugin "$@"
fi
# nextest does not run doc tests.
cargo test --release --quiet --doc
