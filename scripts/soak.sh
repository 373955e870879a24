#!/usr/bin/env bash
# Soak test: kills every command that writes at random moments and compares its final files with an undisturbed run's
# (without the durations that training records), and gives mutated inputs of every format to the program. No run may
# crash, panic, take longer than 20 s or use more than 4 GiB.
#
#     scripts/soak.sh                     # one hour
#     scripts/soak.sh --seconds 300       # as in CI
#     scripts/soak.sh --seed 7            # the same random choices again; when a kill hits still depends on the clock
#
# Prints its seed first and the counts last. Inputs that found a fault are kept in target/soak/SEED/.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
cargo build --release --quiet
exec python3 -P -c 'import sys; sys.path.insert(0, "scripts"); from soak.__main__ import main; sys.exit(main())' \
    --program "$CARGO_TARGET_DIR/release/detox-gguf" --keep "$CARGO_TARGET_DIR/soak" "$@"
