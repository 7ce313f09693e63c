"""Checkpoints as the functions of the front door accept them: a folder, a hub id, a built-in, or a trained student."""

from __future__ import annotations

from pathlib import Path

from vlopd.loop import Trained
from vlopd.models.load import resolve
from vlopd.run.resolve import hub_folder

Checkpoint = str | Path | Trained
"""A checkpoint folder, a hub id, `builtin:NAME`, a .gguf file, or what `distill` returned."""


def folder_of(checkpoint: Checkpoint) -> Path:
    """The local folder of a checkpoint; a trained student is saved into its output folder first.

    Raises RunError for a path or hub id that does not exist.
    """
    if isinstance(checkpoint, Trained):
        folder = checkpoint.out / "checkpoint"
        checkpoint.save(folder)
        return folder
    return hub_folder(resolve(str(checkpoint)), None)
