#!/usr/bin/env bash
# Compiles the plugin as a static library with the address sanitizer, rustc's checks of overflow and of what unsafe
# functions require, and marks for clang's fuzzer, and prints its path. For tests: what links it needs clang's
# -fsanitize=address, whose runtime it works with. The shared library that scripts/build_plugin.sh installs is of the same
# sources, but not sanitized.
#
# The flags are those of a nightly toolchain, which RUSTC_BOOTSTRAP lets any take. It acts on the build scripts of
# dependencies too: one that asks whether the compiler is a nightly one may choose other code than in the build that is
# installed. Rust's own library comes compiled, without the sanitizer: what it does is seen where it calls the system's
# functions (memcpy, say) or is compiled into the plugin, as generic code is.
set -euo pipefail
cd "$(dirname "$0")/.."
target=${CARGO_TARGET_DIR:-$PWD/target}/plugin-sanitized
# Named, so that the flags are not for build scripts and macros, which rustc itself runs.
host=$(rustc -vV | sed -n 's/^host: //p')
RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Zsanitizer=address -Cdebug-assertions -Coverflow-checks -Cforce-frame-pointers -Cdebuginfo=1 \
    -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table" \
    cargo rustc --release --lib --no-default-features --features capi --crate-type staticlib --target "$host" \
    --target-dir "$target" >&2
printf '%s\n' "$target/$host/release/libdetox_gguf.a"
