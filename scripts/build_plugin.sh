#!/usr/bin/env bash
# Builds and installs the plugin: the library for programs that link their own llama.cpp. It contains no llama.cpp.
#
#     scripts/build_plugin.sh [PREFIX]        default: target/plugin
#
# Needs a Rust toolchain and a C compiler, on a system with ELF libraries. rustc cannot give a library's symbols
# versions: its own version script names none, and linkers accept no second one. So rustc builds a static library, and
# the C compiler links it with vendor/detox_gguf.map. Set RUSTFLAGS= (empty) to build for every CPU of the architecture;
# by default .cargo/config.toml builds for this CPU only.
set -euo pipefail
cd "$(dirname "$0")/.."
target=${CARGO_TARGET_DIR:-$PWD/target}
prefix=${1:-$target/plugin}
cc=${CC:-cc}
version=$(sed -n 's/^version *= *"\(.*\)"/\1/p' Cargo.toml | head -n 1)
# The version of the interface, not of the program. It is part of the library's name.
abi=$(sed -n 's/^#define DETOX_ABI_VERSION \([0-9]*\)$/\1/p' vendor/include/detox_gguf.h)

# A separate folder, so that the program's build keeps its own features.
build=$target/plugin-build
# Always build for the host. With CARGO_BUILD_TARGET, cargo would put the library in another folder.
unset CARGO_BUILD_TARGET
cargo rustc --release --lib --no-default-features --features capi --crate-type staticlib --target-dir "$build"

mkdir -p "$prefix/lib/pkgconfig" "$prefix/include"
library=libdetox_gguf.so.$abi.0.0
exports=()
while read -r name; do exports+=("-Wl,--undefined=$name"); done < <(sed -n 's/^ *\(detox_[a-z_]*\);$/\1/p' vendor/detox_gguf.map)
# Linked under a temporary name and renamed, so that running programs keep the old library. -z defs forbids undefined
# symbols, above all functions of llama.cpp.
"$cc" -shared -o "$prefix/lib/.$library" "-Wl,-soname,libdetox_gguf.so.$abi" -Wl,--version-script=vendor/detox_gguf.map \
    -Wl,--gc-sections -Wl,-z,defs -Wl,-z,relro,-z,now -Wl,--strip-debug "${exports[@]}" \
    "$build/release/libdetox_gguf.a" -lgcc_s -lpthread -lm -ldl -lc
mv "$prefix/lib/.$library" "$prefix/lib/$library"
ln -sf "$library" "$prefix/lib/libdetox_gguf.so.$abi"
ln -sf "libdetox_gguf.so.$abi" "$prefix/lib/libdetox_gguf.so"
cp vendor/include/detox_gguf.h "$prefix/include/"
sed -e "s|@prefix@|$(cd "$prefix" && pwd)|" -e "s|@version@|$version|" vendor/detox_gguf.pc.in >"$prefix/lib/pkgconfig/detox_gguf.pc"
printf '%s\n' "$prefix"
