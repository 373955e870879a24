"""Kills the commands that write at random moments, then lets each finish, and compares the final files.

A killed command is repeated until it ends by itself. Then its files must be those of a run that was never killed, byte
for byte, and nothing else may be left beside them. Other commands write into the same folder meanwhile.
"""

import hashlib
import random
import re
import shutil
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from .commands import Command, commands
from .program import Faults, Outcome, Run, run

# Files of a training run whose bytes depend on the clock, since they hold its duration. The adapter is compared.
TIMED = {"checkpoint.gguf", "best.gguf", "report.html", "report.md"}
TIMES = re.compile(rb'"(seconds|step_seconds|pairs_per_second|peak_rss_bytes)": ?[-+0-9.e]+')
SIGNALS = [signal.SIGKILL] * 6 + [signal.SIGTERM, signal.SIGHUP, signal.SIGINT]


def files(output: Path) -> dict[str, str]:
    """The hash of each file of an output, without the fields that hold times."""
    if not output.exists():
        return {}
    paths = [output] if output.is_file() else sorted(p for p in output.rglob("*") if p.is_file())
    return {
        str(path.relative_to(output.parent)): hashlib.sha256(TIMES.sub(b"", path.read_bytes())).hexdigest()
        for path in paths
        if not (path.name in TIMED and (output / "checkpoint.gguf").exists())
    }


@dataclass
class Result:
    """What the kills found."""

    kills: Counter = field(default_factory=Counter)
    endings: Counter = field(default_factory=Counter)
    faults: Faults = field(default_factory=Faults)


class Kills:
    """One folder of seeds and references, and the loop over random kills."""

    def __init__(self, program: Path, folder: Path, seeds: Path, choose: random.Random):
        self.program, self.folder, self.choose = program, folder, choose
        self.result = Result()
        self.commands = commands(seeds)
        self.reference: dict[str, tuple[dict[str, str], set[str], float]] = {}

    def measure(self, command: Command) -> tuple[dict[str, str], set[str], float]:
        """The files and the duration of a run that nothing disturbs."""
        if command.name not in self.reference:
            folder = self.folder / "reference"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            outcome = run(self.program, list(command.arguments), folder)
            if outcome.code != 0:
                raise SystemExit(f"{command.name} failed without a kill:\n{outcome.stderr}")
            names = {str(p.relative_to(folder)) for p in folder.rglob("*")}
            self.reference[command.name] = (files(folder / command.output), names, outcome.seconds)
        return self.reference[command.name]

    def once(self) -> None:
        """Kills one command one to three times, finishes it, and compares."""
        command, beside = self.choose.sample(self.commands, 2)
        expected, names, seconds = self.measure(command)
        others, other_names, _ = self.measure(beside)
        folder = self.folder / "work"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        neighbour = Run(self.program, list(beside.arguments), folder) if self.choose.random() < 0.5 else None
        twin = self.choose.random() < 0.2
        for _ in range(self.choose.randint(1, 3)):
            running = Run(self.program, list(command.arguments), folder)
            second = Run(self.program, list(command.arguments), folder) if twin else None
            which = self.choose.choice(SIGNALS)
            # Up to a fifth longer than the whole run, so that a few runs end first.
            time.sleep(self.choose.uniform(0, seconds * (1.2 if second is None else 2.4)))
            running.send(which)
            self.end(f"{command.name}, killed", running.wait())
            self.result.kills[which.name] += 1
            if second is not None:
                self.end(f"{command.name}, beside itself", second.wait())
        if neighbour is not None:
            self.finish(beside, neighbour.wait(), folder, others)
        last = run(self.program, list(command.arguments), folder)
        self.finish(command, last, folder, expected)
        left = {str(p.relative_to(folder)) for p in folder.rglob("*")} - names
        if neighbour is not None:
            left -= other_names
        if left:
            self.result.faults.append(f"{command.name}: left {sorted(left)}")

    def end(self, name: str, outcome: Outcome) -> None:
        """Counts how a run ended, and notes a fault."""
        self.result.endings[outcome.code] += 1
        if fault := outcome.fault():
            self.result.faults.append(f"{name}: {fault}\n{outcome.stderr[-2000:]}")

    def finish(self, command: Command, outcome: Outcome, folder: Path, expected: dict[str, str]) -> None:
        """Checks a run that nothing killed: it succeeds, and its files are those of the reference."""
        self.end(command.name, outcome)
        if outcome.code != 0:
            self.result.faults.append(f"{command.name}: exit code {outcome.code} after kills\n{outcome.stderr[-2000:]}")
            return
        found = files(folder / command.output)
        if found != expected:
            differing = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
            self.result.faults.append(f"{command.name}: differs from a run without kills: {differing}")
