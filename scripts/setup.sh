# Sourced by the other scripts: finds or installs what the build needs, and chooses the compiler.
#
# Needed: a Rust toolchain, cmake, a C++ compiler, libclang (for bindgen), python3 with pip.
# On a CPU with AMX the compiler must be clang 16 or later: GCC 12 compiles ggml's AMX code into a
# program that dies, and clang 14 leaves AMX out. Elsewhere clang is taken too, so that one build is
# measured everywhere.

detox_say() { printf '%s\n' "$*" >&2; }

detox_stop() {
    detox_say "error: $1"
    detox_say "hint: $2"
    exit 1
}

# The newest clang from 16 up, by name.
detox_clang() {
    local candidate version
    for candidate in clang-21 clang-20 clang-19 clang-18 clang-17 clang-16 clang; do
        command -v "$candidate" >/dev/null 2>&1 || continue
        command -v "${candidate/clang/clang++}" >/dev/null 2>&1 || continue
        version=$("$candidate" -dumpversion | cut -d. -f1)
        if [ "$version" -ge 16 ]; then
            printf '%s' "$candidate"
            return 0
        fi
    done
    return 1
}

detox_libclang() {
    local folder
    for folder in ${LIBCLANG_PATH:-} /usr/lib/llvm-*/lib /usr/lib64 /usr/lib/*-linux-gnu /usr/local/lib \
        /opt/homebrew/opt/llvm/lib /Library/Developer/CommandLineTools/usr/lib; do
        compgen -G "$folder/libclang*.so*" >/dev/null && return 0
        compgen -G "$folder/libclang*.dylib" >/dev/null && return 0
    done
    return 1
}

detox_missing() {
    command -v cmake >/dev/null 2>&1 || printf 'cmake '
    detox_clang >/dev/null || printf 'clang-16 '
    detox_libclang || printf 'libclang-16-dev '
    # clang links against GCC's C++ library.
    command -v c++ >/dev/null 2>&1 || command -v g++ >/dev/null 2>&1 || printf 'g++ '
}

command -v cargo >/dev/null 2>&1 || { [ -f "$HOME/.cargo/env" ] && . "$HOME/.cargo/env"; }
command -v cargo >/dev/null 2>&1 || detox_stop "no Rust toolchain" "install one from https://rustup.rs"
command -v python3 >/dev/null 2>&1 || detox_stop "no python3" "install Python 3.9 or later with pip"
python3 -m pip --version >/dev/null 2>&1 || detox_stop "no pip for python3" "install it (Debian: apt-get install python3-pip)"

# A compiler that the user chose stays chosen.
if [ -n "${CC:-}" ] && [ -n "${CXX:-}" ] && command -v cmake >/dev/null 2>&1 && detox_libclang; then
    :
else
    missing=$(detox_missing)
    if [ -n "$missing" ]; then
        command -v apt-get >/dev/null 2>&1 || detox_stop "missing: $missing" \
            "install cmake, clang 16 or later with libclang, and a C++ library with your package manager, then run this again"
        if [ "$(id -u)" -eq 0 ]; then as_root=(); elif command -v sudo >/dev/null 2>&1; then as_root=(sudo); else
            detox_stop "missing: $missing" "run as root: apt-get install $missing"
        fi
        detox_say "installing: $missing"
        "${as_root[@]}" apt-get update -qq >&2 && "${as_root[@]}" apt-get install -y -qq $missing >&2 \
            || detox_stop "apt-get could not install: $missing" "install clang 16 or later, libclang and cmake by hand, then run this again"
    fi
    clang=$(detox_clang) || detox_stop "no clang 16 or later" "install one, or set CC and CXX to compilers of your choice"
    export CC="${CC:-$clang}" CXX="${CXX:-${clang/clang/clang++}}"
fi
# One folder for every profile and script, so that llama.cpp is compiled once.
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$PWD/target}"
