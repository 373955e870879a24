#!/usr/bin/env python3
"""Draw docs/eval.svg, the README's picture: a terminal session of the demo's evaluation.

    scripts/make_picture.py [--program target/release/detox-gguf] [--output docs/eval.svg]

Runs the program on SmolLM2-135M-Instruct in a pseudo-terminal of 80 columns (about a minute on two cores) and draws
what it printed, from the first line to the end of the toxicity table, and the last line. A line of dots stands for the
lines left out. No generated text is shown.
"""

import argparse
import fcntl
import html
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = "smollm2-135m-instruct-q4_1"
COLUMNS = 80

# Pixels: the width of a character, the height of a line, the margin around the text, the title bar.
CELL, LINE, MARGIN, BAR = 8.4, 19, 20, 34
FONT = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'Liberation Mono', monospace"
BACKGROUND, BORDER, TEXT, DIM, BRIGHT, GREEN, YELLOW = (
    "#0d1117", "#3d444d", "#c9d1d9", "#8b949e", "#ffffff", "#7ee787", "#e3b341")


def run(program: Path, model: Path) -> tuple[list[str], str]:
    """The command as lines to show, and everything it printed on a terminal."""
    shown = [f"detox-gguf eval -m {model.name} \\", "    --limit 8 -k 4 -s 1 -o runs/demo"]
    arguments = ["eval", "-m", model.name, "--limit", "8", "-k", "4", "-s", "1", "-o", "runs/demo"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / model.name).symlink_to(model)
        ours, theirs = pty.openpty()
        set_size(theirs)
        process = subprocess.Popen([program, *arguments], cwd=folder, stdin=subprocess.DEVNULL, stdout=theirs,
                                   stderr=theirs, env={**os.environ, "TERM": "xterm-256color"})
        os.close(theirs)
        output = bytearray()
        try:
            while block := os.read(ours, 65536):
                output += block
        except OSError:  # Linux reports the closed terminal as an error.
            pass
        os.close(ours)
        if process.wait() != 0:
            sys.exit(f"error: {program} failed:\n{output.decode()}")
    return shown, output.decode()


def set_size(terminal: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS, 0, 0))


def lines_left(output: str) -> list[str]:
    """The lines that remain on the screen: a progress bar overwrites itself, and only its last state is kept."""
    lines = [line.rstrip("\r").rsplit("\x1b[2K", 1)[-1].rsplit("\r", 1)[-1] for line in output.split("\n")]
    return [line.rstrip() for line in lines]


def plain(line: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", line)


def excerpt(lines: list[str]) -> list[str]:
    """Everything up to the end of the first table, whose last row is the mean; then the last line."""
    ends = [i for i, line in enumerate(lines) if plain(line).startswith("mean ")]
    last = [line for line in lines if line.strip()][-1]
    if not ends or not plain(last).startswith("report:"):
        sys.exit("error: expected a table that ends with its mean, and the report's path on the last line")
    return [*lines[: ends[0] + 1], "\x1b[2m⋮\x1b[0m", last]


def spans(line: str) -> list[tuple[int, str, str]]:
    """The words of a line: column, text and SVG attributes. Each group of words has its own place on the grid."""
    found, column, style = [], 0, ""
    for part in re.split(r"(\x1b\[[0-9;]*m)", line):
        if part.startswith("\x1b["):
            codes = part[2:-1].split(";")
            style = ""
            if "1" in codes:
                style = f' fill="{YELLOW if "33" in codes else BRIGHT}" font-weight="bold"'
            elif "2" in codes:
                style = f' fill="{DIM}"'
            elif "32" in codes:
                style = f' fill="{GREEN}"'
            continue
        for word in re.finditer(r"\S+(?: \S+)*", part):
            found.append((column + word.start(), word.group(), style))
        column += len(part)
    return found


def svg(lines: list[str], version: str) -> str:
    width, height = 2 * MARGIN + COLUMNS * CELL, BAR + MARGIN + len(lines) * LINE + MARGIN / 2
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}"'
        f' viewBox="0 0 {width:g} {height:g}" role="img" aria-label="A terminal session of detox-gguf eval">',
        f"<!-- Made by scripts/make_picture.py with {html.escape(version)}. -->",
        f'<rect x="0.5" y="0.5" width="{width - 1:g}" height="{height - 1:g}" rx="8" fill="{BACKGROUND}"'
        f' stroke="{BORDER}"/>',
        *(f'<circle cx="{MARGIN + 4 + 18 * i}" cy="{BAR / 2 + 2:g}" r="5" fill="{BORDER}"/>' for i in range(3)),
        f'<g font-family="{FONT}" font-size="14" fill="{TEXT}">',
    ]
    for i, line in enumerate(lines):
        y = BAR + MARGIN / 2 + (i + 1) * LINE - 5
        for column, text, style in spans(line):
            # The length keeps columns aligned in fonts whose characters have another width.
            length = f' textLength="{len(text) * CELL:g}"' if len(text) > 1 else ""
            drawn.append(f'<text x="{MARGIN + column * CELL:g}" y="{y:g}"{length}{style}>{html.escape(text)}</text>')
    return "\n".join([*drawn, "</g>", "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--program", type=Path, default=ROOT / "target/release/detox-gguf")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/eval.svg")
    args = parser.parse_args()
    program = args.program.resolve()
    version = subprocess.run([program, "--version"], check=True, capture_output=True, text=True).stdout.strip()
    fetched = subprocess.run([sys.executable, ROOT / "scripts/fetch_model.py", MODEL], check=True, capture_output=True,
                             text=True)
    command, output = run(program, Path(fetched.stdout.strip()))
    prompt = [f"\x1b[32m$\x1b[0m {command[0]}", *command[1:]]
    args.output.write_text(svg(prompt + excerpt(lines_left(output)), version), encoding="utf-8")


if __name__ == "__main__":
    main()
