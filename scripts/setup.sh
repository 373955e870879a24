# shellcheck shell=bash
# Sourced by the other scripts: finds or installs the build's dependencies and chooses the compiler.
#
# The build needs a Rust toolchain, cmake with make or ninja, a C++ compiler, libclang (for bindgen), and
# python3 with pip.
# CPUs with AMX require clang 16 or later: GCC 12 miscompiles ggml's AMX code (the program crashes), and
# clang 14 leaves AMX out. Other CPUs get clang too, so that all measurements come from the same compiler.

# In order of preference, both for finding and for installing a compiler: two runs must choose the same
# one. 16 comes first because it is the tested version.
detox_clang_versions=(16 17 18 19 20 21 22)

detox_say() { printf '%s\n' "$*" >&2; }

detox_stop() {
    detox_say "error: $1"
    detox_say "hint: $2"
    exit 1
}

detox_has() { command -v "$1" >/dev/null 2>&1; }

# Never override a compiler that the user chose.
detox_compiler_is_chosen() { [ -n "${CC:-}" ] && [ -n "${CXX:-}" ]; }

# Runs a command silently. Prints its output only if it fails.
detox_quietly() {
    local log status=0
    log=$(mktemp)
    "$@" >"$log" 2>&1 || status=$?
    [ "$status" -eq 0 ] || cat "$log" >&2
    rm -f "$log"
    return "$status"
}

# Prints the name of the preferred clang, 16 or later.
detox_clang() {
    local candidate version
    for candidate in "${detox_clang_versions[@]/#/clang-}" clang; do
        detox_has "$candidate" || continue
        detox_has "${candidate/clang/clang++}" || continue
        version=$("$candidate" -dumpversion 2>/dev/null | cut -d. -f1)
        if [ "${version:-0}" -ge 16 ]; then
            printf '%s' "$candidate"
            return 0
        fi
    done
    return 1
}

detox_libclang() {
    local folder pattern
    for folder in ${LIBCLANG_PATH:-} /usr/lib/llvm-*/lib /usr/lib64 /usr/lib/*-linux-gnu /usr/local/lib \
        /opt/homebrew/opt/llvm/lib /Library/Developer/CommandLineTools/usr/lib; do
        # These patterns skip libclang-cpp, which bindgen cannot use.
        for pattern in 'libclang.so*' 'libclang-[0-9]*.so*' libclang.dylib; do
            compgen -G "$folder/$pattern" >/dev/null && return 0
        done
    done
    return 1
}

# Prints the missing dependencies, separated by spaces.
detox_missing() {
    detox_has cmake || printf 'cmake '
    detox_has make || detox_has ninja || printf 'make '
    if ! detox_compiler_is_chosen; then
        detox_clang >/dev/null || printf 'clang '
        # clang links against GCC's C++ standard library.
        detox_has c++ || detox_has g++ || printf 'g++ '
    fi
    detox_libclang || printf 'libclang '
}

# Prints the first version that apt offers. The package name has N in place of the version.
detox_apt_version() {
    local name=$1 version candidate
    shift
    for version in "$@"; do
        # The word "Candidate" is translated in other locales.
        candidate=$(LC_ALL=C apt-cache policy "${name/N/$version}" 2>/dev/null | sed -n 's/^ *Candidate: *//p')
        if [ -n "$candidate" ] && [ "$candidate" != "(none)" ]; then
            printf '%s' "$version"
            return 0
        fi
    done
    return 1
}

# Prints the apt packages for the missing dependencies. Fails if apt has no suitable clang.
detox_apt_packages() {
    local what version clang
    for what in "$@"; do
        case "$what" in
            clang)
                version=$(detox_apt_version clang-N "${detox_clang_versions[@]}") || return 1
                printf '%s ' "clang-$version" "libclang-$version-dev"
                ;;
            libclang)
                case " $* " in *" clang "*) continue ;; esac
                # Match the installed compiler's version, if there is one.
                version=
                if clang=$(detox_clang); then version=$("$clang" -dumpversion | cut -d. -f1); fi
                version=$(detox_apt_version libclang-N-dev ${version:+"$version"} "${detox_clang_versions[@]}") || return 1
                printf '%s ' "libclang-$version-dev"
                ;;
            *) printf '%s ' "$what" ;;
        esac
    done
}

detox_install() {
    local missing=$* packages apt
    detox_has apt-get || detox_stop "missing: $missing" \
        "install with your package manager: $missing (clang 16 or later), then run this again"
    # Never prompt: the script may run unattended.
    apt=(env DEBIAN_FRONTEND=noninteractive apt-get)
    if [ "$(id -u)" -ne 0 ]; then
        if ! detox_has sudo; then
            packages=$(detox_apt_packages "$@") || detox_stop "missing: $missing" \
                "run this as root, or install them by hand (clang 16 or later)"
            detox_stop "missing: $missing" "run as root: apt-get install ${packages% }"
        fi
        apt=(sudo "${apt[@]}")
    fi
    # Must come before choosing packages: a fresh container has no package lists.
    detox_quietly "${apt[@]}" update -qq || detox_stop "apt-get update failed; still missing: $missing" \
        "see its message above, or install them by hand (clang 16 or later), then run this again"
    packages=$(detox_apt_packages "$@") || detox_stop "apt has no clang from 16 to 22 with its libclang" \
        "add the packages of https://apt.llvm.org, then run this again"
    packages=${packages% }
    detox_say "installing: $packages"
    # shellcheck disable=SC2086 # split into words on purpose
    detox_quietly "${apt[@]}" install -y -qq $packages || detox_stop "apt-get could not install: $packages" \
        "see its message above, or install them by hand, then run this again"
    missing=$(detox_missing)
    [ -z "$missing" ] || detox_stop "still missing after installing $packages: $missing" \
        "install them by hand (clang 16 or later), then run this again"
}

# Succeeds if the C compiler can link with its sanitizers.
detox_has_sanitizers() {
    local folder
    folder=$(mktemp -d)
    printf 'int LLVMFuzzerTestOneInput(const char *d, long n) { (void) d; (void) n; return 0; }\n' >"$folder/x.c"
    "$CC" -fsanitize=address,undefined,fuzzer "$folder/x.c" -o "$folder/x" >/dev/null 2>&1
    local result=$?
    rm -rf "$folder"
    return $result
}

# Installs clang's sanitizers if they are missing.
detox_need_sanitizers() {
    local version package
    local -a apt=(env DEBIAN_FRONTEND=noninteractive apt-get)
    if detox_has_sanitizers; then return 0; fi
    version=$("$CC" -dumpversion | cut -d. -f1)
    package=libclang-rt-$version-dev
    detox_has apt-get || detox_stop "$CC has no sanitizers" "install its runtime libraries (Debian: $package)"
    [ "$(id -u)" -eq 0 ] || apt=(sudo "${apt[@]}")
    detox_say "installing: $package"
    detox_quietly "${apt[@]}" update -qq && detox_quietly "${apt[@]}" install -y -qq "$package" ||
        detox_stop "apt-get could not install $package" "see its message above"
    detox_has_sanitizers || detox_stop "$CC has no sanitizers even with $package" "set CC to a clang that has them"
}

# Checks the toolchain's version. An old one would fail on the edition or in a dependency, with an unhelpful message.
detox_check_rust() {
    local needed found version
    needed=$(sed -n 's/^rust-version *= *"\([0-9.]*\)".*/\1/p' Cargo.toml)
    version=$(rustc --version) || detox_stop "rustc does not run" "install a Rust toolchain from https://rustup.rs"
    found=${version#rustc }
    found=${found%%[!0-9.]*}
    local -a n f
    IFS=. read -r -a n <<<"$needed"
    IFS=. read -r -a f <<<"$found"
    local i
    for i in 0 1 2; do
        [ "${f[i]:-0}" -gt "${n[i]:-0}" ] && return 0
        [ "${f[i]:-0}" -eq "${n[i]:-0}" ] || detox_stop "$version is too old: Rust $needed or later is needed" \
            "rustup update stable && rustup default stable (without rustup: https://rustup.rs)"
    done
}

# shellcheck source=/dev/null
detox_has cargo || { [ -f "${HOME:-}/.cargo/env" ] && . "$HOME/.cargo/env"; }
detox_has cargo || detox_stop "no Rust toolchain" "install one from https://rustup.rs"
detox_check_rust
detox_has python3 || detox_stop "no python3" "install Python 3.9 or later with pip"
python3 -m pip --version >/dev/null 2>&1 || detox_stop "no pip for python3" "install it (Debian: apt-get install python3-pip)"

missing=$(detox_missing)
# shellcheck disable=SC2086 # split into words on purpose
[ -z "$missing" ] || detox_install $missing
if ! detox_compiler_is_chosen; then
    clang=$(detox_clang) || detox_stop "no clang 16 or later" "install one, or set CC and CXX to compilers of your choice"
    export CC="${CC:-$clang}" CXX="${CXX:-${clang/clang/clang++}}"
fi
# cmake uses make by default.
detox_has make || export CMAKE_GENERATOR="${CMAKE_GENERATOR:-Ninja}"
# All profiles and scripts share one folder, so that llama.cpp is compiled only once.
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$PWD/target}"
