#!/usr/bin/env bash
# Fuzzes the readers of files with libFuzzer and AddressSanitizer, each target for some seconds.
#
#     scripts/fuzz.sh [SECONDS [TARGET…]]     # 30 seconds and every target by default
#
# Prints for each target how many inputs it ran. The corpus grows in target/fuzz/corpus and starts from fuzz/corpus.
# A crash, a hang over 20 s or more than 4 GiB stops the script; the input is kept in target/fuzz/found.
#
# As in build_plugin_sanitized.sh, RUSTC_BOOTSTRAP enables the nightly flags on any toolchain. With an explicit target,
# the flags do not apply to build scripts and procedural macros. `cargo fuzz run TARGET` works too.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
seconds=${1:-30}
shift || true
targets=("$@")
[ ${#targets[@]} -gt 0 ] || for file in fuzz/targets/*.rs; do targets+=("$(basename "$file" .rs)"); done
work=$CARGO_TARGET_DIR/fuzz
host=$(rustc -vV | sed -n 's/^host: //p')
RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Zsanitizer=address -Cdebug-assertions -Coverflow-checks -Cforce-frame-pointers \
    -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing" \
    cargo build --release --quiet --bins --manifest-path fuzz/Cargo.toml --target "$host" --target-dir "$work/build"
mkdir -p "$work/found"
# In memory where the system has such a folder: each input is written to a file.
memory=/dev/shm
[ -d "$memory" ] || memory=${TMPDIR:-/tmp}
DETOX_GGUF_FUZZ_FOLDER=$(mktemp -d "$memory/detox-gguf-fuzz.XXXXXX")
export DETOX_GGUF_FUZZ_FOLDER
trap 'rm -rf "$DETOX_GGUF_FUZZ_FOLDER"' EXIT
for target in "${targets[@]}"; do
    mkdir -p "$work/corpus/$target"
    options=(-max_total_time="$seconds" -timeout=20 -rss_limit_mb=4096 -artifact_prefix="$work/found/$target-" -print_final_stats=1 -verbosity=0
        -dict=fuzz/formats.dict)
    log=$work/$target.log
    if ! "$work/build/$host/release/$target" "${options[@]}" "$work/corpus/$target" "fuzz/corpus/$target" >"$log" 2>&1; then
        tail -n 60 "$log" >&2
        detox_stop "the fuzz target $target failed" "the input is in $work/found; run the target with its path to repeat it"
    fi
    inputs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
    printf '%s: %s inputs, no fault\n' "$target" "$inputs"
done
