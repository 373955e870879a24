#!/usr/bin/env bash
# Runs the main job end to end on a real model: builds for this CPU, downloads SmolLM2-135M-Instruct, samples
# continuations of the built-in prompts in 17 languages, scores them, and prints a report.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh

detox_say "building for this CPU (the first build takes several minutes: it includes llama.cpp)"
# Download the model while the program compiles.
fetched=$(mktemp)
trap 'rm -f "$fetched"' EXIT
python3 scripts/fetch_model.py smollm2-135m-instruct-q4_1 >"$fetched" &
download=$!
cargo build --release --quiet --bin detox-gguf
wait "$download"
model=$(cat "$fetched")

output="${1:-target/demo/$(date +%Y%m%d-%H%M%S)}"
# Eight prompts a language and four continuations each (instead of 16 and 25), to stay within two minutes on two cores.
set -x
"$CARGO_TARGET_DIR/release/detox-gguf" eval --model "$model" --limit 8 --samples 4 --seed 1 --output "$output"
