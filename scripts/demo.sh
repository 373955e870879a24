#!/usr/bin/env bash
# The main job, end to end, on a real model: builds for this CPU, gets SmolLM2-135M-Instruct, samples
# continuations of the program's own prompts in 17 languages, scores and reports them.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh

detox_say "building for this CPU (the first time takes a few minutes: llama.cpp is compiled too)"
cargo build --release --quiet --bin detox-gguf
model=$(python3 scripts/fetch_model.py smollm2-135m-instruct-q4_1)

output="${1:-target/demo/$(date +%Y%m%d-%H%M%S)}"
# Eight prompts a language and four continuations, not 16 and 25: two minutes on two cores are the limit here.
set -x
"$CARGO_TARGET_DIR/release/detox-gguf" eval --model "$model" --limit 8 --samples 4 --seed 1 --output "$output"
