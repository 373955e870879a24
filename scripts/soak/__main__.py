"""The command line of the soak test; see scripts/soak.sh."""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from . import seeds
from .inputs import Inputs
from .kills import Kills


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/soak.sh", description="Kills the program at random and gives it mutated inputs.")
    parser.add_argument("--seconds", type=float, default=3600, help="how long to run [default: 3600]")
    parser.add_argument("--seed", type=int, default=None, help="seed of the random choices [default: from the clock]")
    parser.add_argument("--kills", type=float, default=0.5, metavar="SHARE", help="share of the time for kills [default: 0.5]")
    parser.add_argument("--program", type=Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--keep", type=Path, required=True, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else time.time_ns() % (1 << 32)
    print(f"seed {seed}, {arguments.seconds:g} s, {arguments.program}", flush=True)
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        seeds.make(arguments.program, folder / "seeds")
        kills = Kills(arguments.program, folder / "kills", folder / "seeds", random.Random(seed))
        inputs = Inputs(arguments.program, folder / "inputs", folder / "seeds", arguments.keep / str(seed), random.Random(seed + 1))
        end = time.monotonic() + arguments.seconds
        try:
            while time.monotonic() < end:
                # The two take turns, in proportion to their shares of the time.
                spent = time.monotonic()
                if arguments.kills > 0:
                    kills.once()
                    spent = time.monotonic() - spent
                    until = time.monotonic() + spent * (1 / arguments.kills - 1)
                else:
                    until = end
                while time.monotonic() < min(until, end):
                    inputs.once()
        except KeyboardInterrupt:
            print("interrupted", flush=True)
    return report(kills, inputs)


def report(kills: Kills, inputs: Inputs) -> int:
    """Prints the counts. Returns the exit code."""
    def counts(counter) -> str:
        return ", ".join(f"{key}: {n}" for key, n in sorted(counter.items(), key=lambda item: str(item[0])))

    print(f"kills: {kills.result.kills.total()} ({counts(kills.result.kills)})")
    print(f"exit codes beside kills: {counts(kills.result.endings)}")
    print(f"mutated inputs: {inputs.result.inputs.total()} ({counts(inputs.result.inputs)})")
    print(f"exit codes on inputs: {counts(inputs.result.endings)}; new messages kept: {inputs.result.corpus}")
    print(f"slowest input {inputs.result.slowest:.1f} s, largest {inputs.result.largest / (1 << 20):.0f} MiB")
    n_faults = len(kills.result.faults) + len(inputs.result.faults)
    print(f"faults: {n_faults}")
    return 1 if n_faults else 0


if __name__ == "__main__":
    sys.exit(main())
