"""What is written down of an arm: its record, its card, the proof that its mask held."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlopd.checkpoint import RunFolder, digest_checkpoint
from vlopd.config import DistillArm, ExperimentConfig
from vlopd.masks.apply import identity, moved_off_mask
from vlopd.models.load import DTYPES, load_model_config
from vlopd.stages.places import read_tensors


def stored_dtype(config: ExperimentConfig) -> torch.dtype:
    """The precision of checkpoints: as configured, or the student's own."""
    if config.precision.stored != "source":
        return DTYPES[config.precision.stored]
    student = config.student
    own = load_model_config(student.model, student.revision, student.trust_remote_code).dtype
    return own if isinstance(own, torch.dtype) else torch.float32


def precision(config: ExperimentConfig) -> dict[str, str]:
    stored = str(stored_dtype(config)).removeprefix("torch.")
    return {"compute": config.precision.compute, "stored": stored, "values": "fp32"}


def record(
    run: RunFolder,
    config: ExperimentConfig,
    name: str,
    kind: str,
    inputs: Mapping[str, Any],
    **about: Any,
) -> None:
    note(
        run,
        config,
        name,
        kind,
        inputs,
        digest_checkpoint(run.checkpoint(name), whole=True),
        **about,
        other_source=inputs.get("other_source"),
    )


def note(
    run: RunFolder,
    config: ExperimentConfig,
    name: str,
    kind: str,
    inputs: Mapping[str, Any],
    digest: str,
    **about: Any,
) -> None:
    """Writes an arm's record, and first the checksums of its files: it is done."""
    content = {
        "arm": name,
        "type": kind,
        **about,
        "precision": precision(config),
        "checkpoint_digest": digest,
        "inputs": dict(inputs),
    }
    state = run.arm(name) / "state"
    files = [
        path for path in run.arm(name).rglob("*") if path.is_file() and state not in path.parents
    ]
    run.checksums.finish(f"arms/{name}", run.arm_record(name), content, files)


def card(
    config: ExperimentConfig, name: str, what: str, inputs: Mapping[str, Any] | None = None
) -> str:
    """The text of an arm's model card."""
    foreign = (inputs or {}).get("other_source")
    note = (
        f"Other source: {', '.join(foreign)} came from another source checkpoint.\n"
        if foreign
        else ""
    )
    return (
        "---\nlibrary_name: transformers\ntags: [vlopd, on-policy-distillation]\n---\n"
        f"# {config.name}: arm {name}\n\nMade by vlopd from {config.student.model}: {what}.\n{note}"
        "Loads with `transformers`; ../record.json has its inputs, precision and digests.\n"
    )


def off_mask(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], mask: Mapping[str, Tensor] | None
) -> dict[str, Any]:
    """Whether every coordinate off the mask is the source's, bit for bit; nothing to say without a mask."""
    if mask is None:
        return {"off_mask_unmoved": None, "off_mask": None}
    total = sum(tensor.numel() for tensor in before.values())
    off = total - sum(int(marked.sum()) for marked in mask.values())
    moved = moved_off_mask(before, after, mask)
    return {"off_mask_unmoved": moved == 0, "off_mask": {"coordinates": off, "moved": moved}}


def identities(
    run: RunFolder,
    config: ExperimentConfig,
    name: str,
    before: Mapping[str, Tensor],
    mask: Mapping[str, Tensor] | None,
) -> dict[str, Any] | None:
    """How equal an arm's weights are to those of the trained arms that it was made from."""
    others = [a for a in config.ancestors(name) if isinstance(config.arms[a], DistillArm)]
    arm = read_tensors(run.checkpoint(name))
    found = {o: identity(before, arm, read_tensors(run.checkpoint(o)), mask) for o in others}
    return found or None


def seeds_of(config: ExperimentConfig, name: str) -> dict[str, int] | None:
    """The seeds of the trained arms that an arm was made from: of its mask's discovery."""
    arms = {other: config.arms[other] for other in config.ancestors(name)}
    found = {other: arm.seed for other, arm in arms.items() if isinstance(arm, DistillArm)}
    return found or None
