"""Downloads the drawings of the task `emoji` to data/emoji: two npm packages, 136 MB, of which 25 MB are kept.

    .venv/bin/python scripts/download_emoji.py [--out data/emoji]

Needs npm with a configured registry. The packages are verified by SHA-512; only emoji.json and the 64-pixel
drawings are unpacked. ATTRIBUTION.md has the copyright holders and licences.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

VERSION = "16.0.0"
SHA512 = {
    "twitter": "7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
    "google": "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
}
"""Digests of the packages' archives, in base64, as in npm."""

ATTRIBUTION = f"""# Whose drawings these are

- `img/twitter`: Twemoji, copyright Twitter, Inc. and other contributors, licensed under the Creative Commons
  Attribution 4.0 International licence (https://creativecommons.org/licenses/by/4.0/). Unchanged.
- `img/google`: Noto Emoji, copyright Google LLC, licensed under the Apache License 2.0
  (https://www.apache.org/licenses/LICENSE-2.0). Unchanged.
- `emoji.json`: emoji-data, copyright Cal Henderson, MIT licence.

From the npm packages emoji-datasource-twitter and emoji-datasource-google, version {VERSION}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("data/emoji"))
    out = parser.parse_args().out
    if out.exists():
        sys.exit(f"download_emoji: {out} exists already; remove it to download again")
    if shutil.which("npm") is None:
        sys.exit("download_emoji: npm is needed (Debian: apt-get install npm)")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        made = Path(scratch) / "emoji"
        for artist in SHA512:
            archive = fetch(f"emoji-datasource-{artist}@{VERSION}", Path(scratch))
            check(archive, SHA512[artist])
            extract(archive, artist, made)
        (made / "ATTRIBUTION.md").write_text(ATTRIBUTION)
        made.rename(out)  # atomic
    print(f"download_emoji: {len(list(out.glob('img/*/64/*.png')))} drawings in {out}")


def fetch(package: str, folder: Path) -> Path:
    """Downloads a package; returns its archive."""
    print(f"download_emoji: downloading {package}")
    words = ["npm", "pack", package, "--silent"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        sys.exit(f"download_emoji: npm could not fetch {package}: {reason}")
    return folder / done.stdout.strip().splitlines()[-1]


def check(archive: Path, sha512: str) -> None:
    """Exits where the archive's digest differs from the expected one."""
    found = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if found != sha512:
        sys.exit(
            f"download_emoji: {archive.name} has SHA-512 {found}, not {sha512}; nothing was kept"
        )


def extract(archive: Path, artist: str, out: Path) -> None:
    """Extracts emoji.json and the artist's 64-pixel drawings, under their names in the package."""
    wanted = re.compile(rf"package/(emoji\.json|img/{artist}/64/[0-9a-f-]+\.png)")
    with tarfile.open(archive) as members:
        for member in members:
            if member.isfile() and (name := wanted.fullmatch(member.name)):
                content = members.extractfile(member)
                assert content is not None  # it is a file
                path = out / name[1]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content.read())


if __name__ == "__main__":
    main()
