#!/usr/bin/env bash
# Builds, and runs every test. Tests of the whole program need the small real model, which is fetched.
# Arguments (names of tests, say) go to cargo nextest run, or without nextest to cargo test.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh

# With CI=true a missing model fails the tests that need it; at a desk without network they say so.
if model=$(python3 scripts/fetch_model.py smollm2-135m-instruct-q4_1); then
    export DETOX_GGUF_TEST_MODEL="$model"
elif [ "${CI:-}" = true ]; then
    detox_stop "the model for the tests cannot be had" "see pip's message above"
fi
# So do a Python with llama.cpp, a llama-server and clang's sanitizers, for the tests of the plugin, which are for Linux.
# Before single tests no server is compiled: those of a server that is not there fail then.
is_linux=$([ "$(uname -s)" != Linux ] || printf true)
if [ "${CI:-}" = true ] && [ -n "$is_linux" ]; then
    if [ -z "${DETOX_GGUF_TEST_PYTHON:-}" ]; then
        DETOX_GGUF_TEST_PYTHON=$(scripts/llama_cpp_python.sh) ||
            detox_stop "llama-cpp-python cannot be had" "see pip's message above"
        export DETOX_GGUF_TEST_PYTHON
    fi
    if [ -z "${DETOX_GGUF_TEST_LLAMA_SERVER:-}" ]; then
        if_cached=()
        [ $# -eq 0 ] || if_cached=(--if-cached)
        DETOX_GGUF_TEST_LLAMA_SERVER=$(scripts/llama_server.sh ${if_cached[@]+"${if_cached[@]}"}) ||
            detox_stop "llama-server cannot be had" "see the messages above"
        [ -z "$DETOX_GGUF_TEST_LLAMA_SERVER" ] || export DETOX_GGUF_TEST_LLAMA_SERVER
    fi
    detox_need_sanitizers
fi
# The crate without llama.cpp, which is the plugin: its own tests, besides those below that use it from outside.
[ $# -gt 0 ] || cargo test --quiet --lib --no-default-features --features capi --target-dir "$CARGO_TARGET_DIR/plugin-build"
# The plugin's libraries, as its tests build them, so that none of them builds one within its own time. Before single
# tests not.
[ $# -gt 0 ] || [ -z "$is_linux" ] || scripts/build_plugin.sh "$CARGO_TARGET_DIR/plugin-tests/prefix" >/dev/null
[ $# -gt 0 ] || [ "${CI:-}" != true ] || [ -z "$is_linux" ] || scripts/build_plugin_sanitized.sh >/dev/null
if cargo nextest --version >/dev/null 2>&1; then
    cargo nextest run --release "$@"
else
    # As in .config/nextest.toml: tests that compute run one after the other, the rest in parallel.
    rest=()
    for file in tests/*.rs tests/*/main.rs; do
        name=${file#tests/}
        name=${name%/main.rs}
        name=${name%.rs}
        case "$name" in engine | cli | export | plugin) continue ;; esac
        [ ! -f "$file" ] || rest+=(--test "$name")
    done
    cargo test --release --lib --bins "${rest[@]}" "$@"
    # The variable means --test-threads=1, and leaves the place after -- to the arguments.
    RUST_TEST_THREADS=1 cargo test --release --test engine --test cli --test export --test plugin "$@"
fi
# nextest leaves out the examples in the documentation.
cargo test --release --quiet --doc
