#!/usr/bin/env bash
# Runs the unit tests of the library without llama.cpp under Miri, which finds undefined behaviour in unsafe code.
# It needs a nightly toolchain with Miri (rustup component add miri --toolchain nightly); without one it says so and
# succeeds. Code that calls llama.cpp, CUDA or C cannot run in Miri; scripts/build_plugin_sanitized.sh covers the plugin.
#
#     scripts/miri.sh [FILTER…]
set -euo pipefail
cd "$(dirname "$0")/.."
if ! cargo +nightly miri --version >/dev/null 2>&1; then
    echo "not run: no toolchain has Miri"
    exit 0
fi
# Tests read files. Without deterministic floats, Miri rounds functions such as exp at random.
# The CPU's own instructions are not emulated, so the flags in .cargo/config.toml must not apply.
MIRIFLAGS="-Zmiri-disable-isolation -Zmiri-deterministic-floats" RUSTFLAGS="" \
    cargo +nightly miri test --quiet --lib --no-default-features --features capi \
    --target-dir "${CARGO_TARGET_DIR:-target}/miri" -- "${@:-plugin::}"
