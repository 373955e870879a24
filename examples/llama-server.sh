#!/usr/bin/env bash
# Serves a steered model with an unmodified llama-server: no patch, no plugin. Two methods:
#
#     examples/llama-server.sh vector MODEL NEURONS OFFSET FOLDER [llama-server's own arguments]
#     examples/llama-server.sh baked  MODEL NEURONS OFFSET FOLDER [llama-server's own arguments]
#
# `vector` writes a control vector to FOLDER, which the server adds: the model stays unchanged and the file is small.
# Layer 0 is left out, since llama.cpp adds no control vector there. `baked` writes a copy of the model with the edit
# inside, including layer 0. It works for architectures whose graphs read a bias of ffn_down (llama, gpt2, bloom), and the
# server needs no other file.
#
# NEURONS is a file written by `detox-gguf locate`. The output's name has a checksum of the neurons, the offset, and the
# model's name and size. A file of that name is reused if it is newer than the model.
#
# Set LLAMA_SERVER and DETOX_GGUF if the programs are not in PATH.
set -euo pipefail
[ $# -ge 5 ] || { sed -n 's/^#  *\(examples.*\)/usage: \1/p' "$0" >&2; exit 2; }
way=$1 model=$2 neurons=$3 offset=$4 folder=$5
shift 5
server=${LLAMA_SERVER:-llama-server}
detox=${DETOX_GGUF:-detox-gguf}
make=("$detox" steer -m "$model" --neurons "$neurons" --offset "$offset")
mkdir -p "$folder"
# Changes with the model's name and size, the offset and the neurons, so that no stale file is reused.
key=$({ printf '%s\n' "$model" "$offset" && wc -c <"$model" && cat "$neurons"; } | cksum | cut -d' ' -f1)

case "$way" in
    vector)
        file=$folder/steer-$key.gguf
        [ "$file" -nt "$model" ] || "${make[@]}" --without-layer-0 -o "$file"
        exec "$server" -m "$model" --control-vector-scaled "$file:1.0" "$@"
        ;;
    baked)
        file=$folder/steered-$key.gguf
        [ "$file" -nt "$model" ] || "${make[@]}" --bake -o "$file"
        exec "$server" -m "$file" "$@"
        ;;
    *)
        printf 'error: expected vector or baked, found %s\n' "$way" >&2
        exit 2
        ;;
esac
