#!/usr/bin/env bash
# Builds the plugin, the library without llama.cpp that programs of their own link, and installs it.
#
#     scripts/build_plugin.sh [PREFIX]        target/plugin, unless said otherwise
#
# Needs a Rust toolchain and a C compiler, on a system with ELF libraries. rustc gives a library's symbols no versions
# of their own: its version script names none, and linkers take no second one beside it. So it makes a static library,
# and the C compiler links that with vendor/detox_gguf.map. RUSTFLAGS= builds for all CPUs of an architecture, not for
# this one alone (.cargo/config.toml).
set -euo pipefail
cd "$(dirname "$0")/.."
target=${CARGO_TARGET_DIR:-$PWD/target}
prefix=${1:-$target/plugin}
cc=${CC:-cc}
version=$(sed -n 's/^version *= *"\(.*\)"/\1/p' Cargo.toml | head -n 1)
# Of the interface, not of the program: it is in the library's name.
abi=$(sed -n 's/^#define DETOX_ABI_VERSION \([0-9]*\)$/\1/p' vendor/include/detox_gguf.h)

# A folder of its own, so that the program's build keeps its features.
build=$target/plugin-build
# For the machine that links it, whatever is set for other builds: cargo would put the library elsewhere.
unset CARGO_BUILD_TARGET
cargo rustc --release --lib --no-default-features --features capi --crate-type staticlib --target-dir "$build"

mkdir -p "$prefix/lib/pkgconfig" "$prefix/include"
library=libdetox_gguf.so.$abi.0.0
exports=()
while read -r name; do exports+=("-Wl,--undefined=$name"); done < <(sed -n 's/^ *\(detox_[a-z_]*\);$/\1/p' vendor/detox_gguf.map)
# Beside its place and renamed, so that a program that has it open keeps what it has. With -z defs nothing may be
# missing: least of all a function of llama.cpp.
"$cc" -shared -o "$prefix/lib/.$library" "-Wl,-soname,libdetox_gguf.so.$abi" -Wl,--version-script=vendor/detox_gguf.map \
    -Wl,--gc-sections -Wl,-z,defs -Wl,-z,relro,-z,now -Wl,--strip-debug "${exports[@]}" \
    "$build/release/libdetox_gguf.a" -lgcc_s -lpthread -lm -ldl -lc
mv "$prefix/lib/.$library" "$prefix/lib/$library"
ln -sf "$library" "$prefix/lib/libdetox_gguf.so.$abi"
ln -sf "libdetox_gguf.so.$abi" "$prefix/lib/libdetox_gguf.so"
cp vendor/include/detox_gguf.h "$prefix/include/"
sed -e "s|@prefix@|$(cd "$prefix" && pwd)|" -e "s|@version@|$version|" vendor/detox_gguf.pc.in >"$prefix/lib/pkgconfig/detox_gguf.pc"
printf '%s\n' "$prefix"
