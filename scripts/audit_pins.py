"""Reads pip-audit's findings on constraints.txt, or else the list in docs/advisories.md; exits with 1 for an advisory.

`--digest` prints the digest of the pins, for that list.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
PIN = re.compile(r"^([A-Za-z0-9][\w.-]*)==([^\s;#]+)", re.MULTILINE)
ROW = re.compile(r"^\| ([\w.-]+) \| (.+?) \| .+ \| ([\d.]+) \|$", re.MULTILINE)
READ = re.compile(r"sha256 (\w+)\.")


def pins(text: str) -> dict[str, str]:
    """{package, in lower case with hyphens: version}."""
    return {name.lower().replace("_", "-"): version for name, version in PIN.findall(text)}


def digest(pinned: Mapping[str, str]) -> str:
    lines = "".join(f"{name}=={pinned[name]}\n" for name in sorted(pinned))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version, for comparison: 2.14.1+cu130 is (2, 14, 1)."""
    return tuple(map(int, re.findall(r"\d+", version.partition("+")[0])))


def problems_found(found: Path) -> tuple[list[str], int]:
    """(one line per advisory that pip-audit found, the packages that it could not ask about)."""
    try:
        packages = json.loads(found.read_text())["dependencies"]
    except (OSError, ValueError, KeyError):
        return [], -1
    lines = [
        f"{its['name']} {its['version']}: {each['id']}, fixed in {', '.join(each['fix_versions']) or 'none yet'}"
        for its in packages
        for each in its.get("vulns", ())
    ]
    return lines, sum("skip_reason" in its for its in packages)


def problems_listed(pinned: Mapping[str, str], page: str) -> list[str]:
    """One line per pin that is older than the list's `fixed in`, and one where the list was read against other pins."""
    read, wanted = READ.search(page), digest(pinned)
    lines = []
    if read is None or read[1] != wanted:
        lines.append(
            f"docs/advisories.md was read against other pins (now {wanted}); read it again, then write the new digest"
        )
    for name, advisory, fixed in ROW.findall(page):
        version = pinned.get(name.lower().replace("_", "-"))
        if version is not None and release(version) < release(fixed):
            lines.append(f"{name} {version}: {advisory}, fixed in {fixed}")
    return lines


def main() -> None:
    pinned = pins((ROOT / "constraints.txt").read_text())
    if sys.argv[1:] == ["--digest"]:
        print(digest(pinned))
        return
    lines, unknown = problems_found(Path(sys.argv[1]))
    if unknown:
        many = "no package" if unknown in (-1, len(pinned)) else f"{len(pinned) - unknown} packages"
        print(f"audit: the index serves advisories for {many}; for the others, docs/advisories.md")
        lines += problems_listed(pinned, (ROOT / "docs" / "advisories.md").read_text())
    for line in lines:
        print(f"audit: {line}")
    if lines:
        raise SystemExit(1)
    print(f"audit: {len(pinned)} pins, no known advisory")


if __name__ == "__main__":
    main()
