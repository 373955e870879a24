#!/usr/bin/env bash
# Builds the plugin as a static library for tests and prints its path. It is compiled with AddressSanitizer, with rustc's
# overflow checks and debug assertions (which check the preconditions of unsafe functions), and with coverage counters
# for clang's fuzzer. Link it with clang's -fsanitize=address, which brings the runtime. scripts/build_plugin.sh installs
# a library from the same sources, without sanitizers.
#
# These flags need a nightly toolchain; RUSTC_BOOTSTRAP enables them on any. It also affects the build scripts of
# dependencies: one that tests for a nightly compiler may choose different code than in the installed build. Rust's
# standard library is precompiled without the sanitizer. Its errors are caught only if it calls a system function (such
# as memcpy) or is compiled into the plugin, as generic code is.
set -euo pipefail
cd "$(dirname "$0")/.."
target=${CARGO_TARGET_DIR:-$PWD/target}/plugin-sanitized
# With an explicit target, the flags do not apply to build scripts and procedural macros, which run inside the build.
host=$(rustc -vV | sed -n 's/^host: //p')
RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Zsanitizer=address -Cdebug-assertions -Coverflow-checks -Cforce-frame-pointers -Cdebuginfo=1 \
    -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table" \
    cargo rustc --release --lib --no-default-features --features capi --crate-type staticlib --target "$host" \
    --target-dir "$target" >&2
printf '%s\n' "$target/$host/release/libdetox_gguf.a"
