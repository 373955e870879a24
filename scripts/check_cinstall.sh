#!/usr/bin/env bash
# Checks what `cargo cinstall` installs: file names, soname, functions, and that the C example steers when it is compiled
# with pkg-config's flags and linked with the shared and with the static library. Needs cargo-c (cargo install cargo-c).
# CI skips this check, because compiling cargo-c takes longer than the check itself.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
cargo cinstall --version >&2 || detox_stop "no cargo-c" "cargo install cargo-c --locked"
detox_has pkg-config || detox_stop "no pkg-config" "install it (Debian: apt-get install pkg-config)"
# The example links the llama.cpp of the program's build.
cargo build --release --quiet --bin detox-gguf
library=$(ls -t "$CARGO_TARGET_DIR"/release/build/llama-cpp-sys-2-*/out/lib/libllama.a 2>/dev/null | head -n 1) ||
    detox_stop "no libllama.a in $CARGO_TARGET_DIR/release/build" \
        "unset CARGO_BUILD_TARGET, then cargo clean --release -p llama-cpp-sys-2, so that it is rebuilt there"
llama=${library%/lib/libllama.a}
prefix=$(mktemp -d)
trap 'rm -rf "$prefix"' EXIT
cargo cinstall --release --no-default-features --prefix "$prefix" --libdir lib --target-dir "$CARGO_TARGET_DIR/cinstall"

abi=$(sed -n 's/^#define DETOX_ABI_VERSION \([0-9]*\)$/\1/p' vendor/include/detox_gguf.h)
cmp vendor/include/detox_gguf.h "$prefix/include/detox_gguf.h"
[ "$(readlink "$prefix/lib/libdetox_gguf.so.$abi")" = "libdetox_gguf.so.$abi.0.0" ] ||
    detox_stop "libdetox_gguf.so.$abi is not a link to libdetox_gguf.so.$abi.0.0" "see [package.metadata.capi.library]"
readelf -d "$prefix/lib/libdetox_gguf.so" | grep -q "SONAME.*\[libdetox_gguf.so.$abi\]" ||
    detox_stop "the soname is not libdetox_gguf.so.$abi" "see [package.metadata.capi.library]"
declared=$(sed -n 's/^ *\(detox_[a-z_]*\);$/\1/p' vendor/detox_gguf.map | sort)
defined=$(nm -D --defined-only "$prefix/lib/libdetox_gguf.so" | sed -n 's/.* //p' | sort)
[ "$declared" = "$defined" ] ||
    detox_stop "the exported functions differ from the declared ones: $(diff <(printf '%s\n' "$declared") <(printf '%s\n' "$defined"))" \
        "see vendor/detox_gguf.map"

export PKG_CONFIG_PATH=$prefix/lib/pkgconfig
[ "$(pkg-config --modversion detox_gguf)" = "$(sed -n 's/^version *= *"\(.*\)"/\1/p' Cargo.toml | head -n 1)" ] ||
    detox_stop "pkg-config finds no detox_gguf, or not Cargo.toml's version" "see $PKG_CONFIG_PATH/detox_gguf.pc"
printf '{"detox_gguf": "interventions", "format": 1, "interventions": [{"what": {"neurons": [[0, 9], [1, 3]]}, "edit": {"offset": 3}}]}\n' \
    >"$prefix/steer.json"
run() { "$prefix/steer" -m gguf/tiny/llama.gguf -t 1,60,70,80 "$@"; }
# shellcheck disable=SC2046 # split into words on purpose
"$CC" -std=c11 $(pkg-config --cflags detox_gguf) -I"$llama/include" -c examples/c/steer.c -o "$prefix/steer.o"
answers=
for kind in shared static; do
    if [ $kind = shared ]; then
        libraries="$(pkg-config --libs detox_gguf) -Wl,-rpath,$prefix/lib"
    else
        # Remove the shared library, so that the linker uses the static one.
        rm "$prefix"/lib/libdetox_gguf.so*
        libraries=$(pkg-config --static --libs detox_gguf)
    fi
    # shellcheck disable=SC2086 # split into words on purpose
    "$CXX" "$prefix/steer.o" $libraries -L"$llama/lib" -o "$prefix/steer" -lllama -lggml -lggml-cpu -lggml-base -lpthread -lm -ldl
    plain=$(run | cksum) || detox_stop "the C example fails with the $kind library, unsteered" "see its output above, if any"
    steered=$(run --steer "$prefix/steer.json" | cksum) ||
        detox_stop "the C example fails with the $kind library, steered" "see its output above, if any"
    [ "$plain" != "$steered" ] || detox_stop "steering with the $kind library has no effect" "compare with tests/plugin"
    [ "$plain" = "$(run --steer "$prefix/steer.json" --coefficient 0 | cksum)" ] ||
        detox_stop "the $kind library changes the output at a coefficient of 0" "compare with tests/plugin"
    answers="$answers$steered"$'\n'
done
[ "$(printf '%s' "$answers" | sort -u | wc -l)" = 1 ] || detox_stop "the shared and the static library steer differently" "compare with tests/plugin"
detox_say "ok: programs built with the libraries from cargo cinstall steer"
