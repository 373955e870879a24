#!/usr/bin/env bash
# Serves a steered model with a llama-server as it is: no patch, no plugin. Two ways:
#
#     examples/llama-server.sh vector MODEL NEURONS OFFSET FOLDER [llama-server's own arguments]
#     examples/llama-server.sh baked  MODEL NEURONS OFFSET FOLDER [llama-server's own arguments]
#
# `vector` writes a control vector to FOLDER and has the server add it: the model stays as it is, and the file is small.
# Layer 0 is left out, since llama.cpp adds no control vector there. `baked` writes a copy of the model with the edit
# inside, layer 0 too, for architectures whose graphs read a bias of ffn_down (llama, gpt2, bloom); nothing else is
# needed then. NEURONS is a file of `detox-gguf locate`. A file that is there already is used again where it was made of
# the same neurons and offset and of a model of this name and size, whose checksum is in its name, and is newer than that.
#
# LLAMA_SERVER and DETOX_GGUF name the programs where they are not in PATH.
set -euo pipefail
[ $# -ge 5 ] || { sed -n 's/^#  *\(examples.*\)/usage: \1/p' "$0" >&2; exit 2; }
way=$1 model=$2 neurons=$3 offset=$4 folder=$5
shift 5
server=${LLAMA_SERVER:-llama-server}
detox=${DETOX_GGUF:-detox-gguf}
make=("$detox" steer -m "$model" --neurons "$neurons" --offset "$offset")
mkdir -p "$folder"
# Of both ways, so that what changes is made anew.
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
