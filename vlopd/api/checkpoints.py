"""Checkpoints as the functions of the front door accept them: a folder, a hub id, a built-in, or a trained student.

A path that is something else is refused with what it is.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vlopd.errors import ConfigError, RunError
from vlopd.files import read_json, shortest_distinct_names
from vlopd.loop import Trained
from vlopd.masks.files import HEADER
from vlopd.models.load import resolve
from vlopd.run.checksums import check_within_run
from vlopd.run.resolve import hub_folder, is_score_file, score_files

Checkpoint = str | Path | Trained
"""A checkpoint folder, a hub id, `builtin:NAME`, a .gguf file, or what `distill` returned."""


def folder_of(checkpoint: Checkpoint) -> Path:
    """The local folder of a checkpoint; a trained student is saved into its output folder first.

    Raises RunError for a path that is no checkpoint, with what it is, and for a hub id that cannot be fetched.
    """
    return hub_folder(resolve(model_of(checkpoint)), None)


def model_of(checkpoint: Checkpoint) -> str:
    """The path, hub id or built-in that a checkpoint is loaded from; of an arm's folder, its checkpoint/.

    Raises RunError for a path that is no checkpoint, with what it is.
    """
    if isinstance(checkpoint, Trained):
        folder = checkpoint.out / "checkpoint"
        checkpoint.save(folder)
        return str(folder)
    refuse_other_kinds(checkpoint)
    path = Path(checkpoint)
    if path.exists():
        check_within_run(path)
        if not _holds_weights(path) and _holds_weights(path / "checkpoint"):
            return str(path / "checkpoint")
        if (what := what_it_is(path)) is not None:
            raise RunError(f"{path} is {what}")
    return str(checkpoint)


def path_or_id(checkpoint: Checkpoint) -> str:
    """A checkpoint as the caller named it; a trained student by its output folder."""
    return str(checkpoint.out if isinstance(checkpoint, Trained) else checkpoint)


def refuse_other_kinds(checkpoint: Any) -> None:
    """Raises ConfigError for what is no path, id or result of `distill`."""
    if not isinstance(checkpoint, str | Path | Trained):
        raise ConfigError(
            f"a checkpoint is a folder, a hub id, builtin:NAME, a .gguf file or what `distill` returned, not a "
            f"{type(checkpoint).__name__}"
        )


def names_of(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Distinct short names: the ends of their paths or ids. Raises ConfigError for one given twice."""
    for each in checkpoints:
        refuse_other_kinds(each)
    parts = [_parts_of(each) for each in checkpoints]
    if len({tuple(own) for own in parts}) < len(parts):  # two evaluations of one folder
        parts = [_parts_of(each, True) for each in checkpoints]
    for i, own in enumerate(parts):
        if own in parts[:i]:
            raise ConfigError(f"{checkpoints[i]} is given twice")
    return shortest_distinct_names(parts)


def _parts_of(checkpoint: Checkpoint, with_files: bool = False) -> list[str]:
    """The parts of a path or id, without `checkpoint` and, unless `with_files`, the name of a file of scores."""
    text = path_or_id(checkpoint)
    path = Path(text)
    # not `resolve`: a link's name is the one that the user knows
    parts = Path(os.path.abspath(path)).parts if path.exists() else text.split("/")
    scores = path.is_file() and is_score_file(path) and not with_files
    if len(parts) > 1 and (parts[-1] == "checkpoint" or scores):
        parts = parts[:-1]
    parts = [part.removeprefix("builtin:") for part in parts]
    return [re.sub(r"[^\w.-]+", "-", part).strip("-.") or "root" for part in parts]


def temporary_folder() -> Path:
    """A new folder that is removed when the process ends, for results without an `out`."""
    folder = Path(tempfile.mkdtemp(prefix="vlopd-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def is_scores(path: Path) -> bool:
    """Whether a path holds finished evaluations (resolve.score_files) rather than a model."""
    if path.is_file():
        return is_score_file(path)
    if not path.is_dir() or (path / "config.json").exists() or (path / "run.json").exists():
        return False
    try:
        return bool(score_files(path))
    except RunError:
        return False


def what_it_is(path: Path) -> str | None:
    """What an existing path is instead of a checkpoint, with the remedy; None for a folder that may be one."""
    if path.is_file():
        return _what_a_file_is(path)
    if not any(path.iterdir()):
        return "an empty folder"
    if (path / "run.json").is_file():
        arms = [each.parent.name for each in sorted(path.glob("arms/*/checkpoint"))]
        return (
            f"a run folder; give {path}/arms/NAME of it ({', '.join(arms) or 'no arm is made yet'})"
        )
    weights = sorted(path.glob("*.safetensors"))
    if weights and _is_mask(weights[0]):
        return "a folder of mask files; give a checkpoint"
    if _holds_weights(path):
        return None
    about = read_json(path / "record.json") if (path / "record.json").is_file() else {}
    if isinstance(about, dict) and (model := about.get("model")):
        return f"an arm without a checkpoint of its own; give its model, {model}"
    if is_scores(path):
        return "a folder of evaluated scores, without weights"
    for kind, within in (
        ("checkpoints", "*/config.json"),
        ("arms", "*/checkpoint"),
        ("evaluations", "*/results.json"),
    ):
        inside = [each.parent.name for each in sorted(path.glob(within))]
        if inside:
            return f"a folder of {kind}; give one of them ({', '.join(inside)})"
    return "not a checkpoint: it has neither config.json nor *.safetensors"


def _holds_weights(folder: Path) -> bool:
    """Whether a folder has weights of any format, or a model's or an adapter's config."""
    configs = ("config.json", "adapter_config.json")
    return any((folder / name).is_file() for name in configs) or any(
        any(folder.glob(ending)) for ending in ("*.safetensors", "*.bin")
    )


def _what_a_file_is(path: Path) -> str | None:
    if path.suffix == ".gguf":
        return None
    if path.suffix == ".toml":
        return f"a config; use `vlopd run {path}`"
    if path.suffix == ".safetensors":
        return (
            "a mask file; give a checkpoint folder"
            if _is_mask(path)
            else "a file of weights; give its folder, with config.json and the tokenizer"
        )
    if is_score_file(path):
        return "a file of evaluated scores, without weights"
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        return "a file of pickled weights, which are refused; save them as safetensors"
    return "not a checkpoint folder, nor results_*.json or samples_*.jsonl of lm-eval"


def _is_mask(path: Path) -> bool:
    """Whether a safetensors file is a mask of vlopd; reads its header alone."""
    try:
        with safe_open(path, framework="numpy") as file:
            return bool(json.loads((file.metadata() or {}).get(HEADER, "{}")))
    except (SafetensorError, OSError, ValueError):
        return False
