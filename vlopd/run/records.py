"""Records of arms: record.json, model card, base checkpoint, and counts of changed coordinates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlopd.bits import holds, widest
from vlopd.config.arms import DistillArm
from vlopd.config.experiment import ExperimentConfig
from vlopd.digests import digest_checkpoint
from vlopd.masks.apply import (
    agreement_by_tolerance,
    change_norm,
    moved_off_mask,
    moved_on_mask,
)
from vlopd.models.load import DTYPES, load_configured, load_model_config, resolve
from vlopd.models.loaded import LoadedModel
from vlopd.run.folder import NO_RESULTS, RunFolder
from vlopd.run.resolve import hub_folder, read_tensors
from vlopd.run.stage import Stage
from vlopd.weights.reader import Weights
from vlopd.weights.stored import stored_tensors


def base_arm_is_exact(config: ExperimentConfig) -> bool:
    """Whether the base arm stores the student's weights without rounding."""
    if config.precision.stored == "auto":
        return True
    return all(holds(DTYPES[config.precision.stored], own) for own in _student_dtypes(config))


def _student_dtypes(config: ExperimentConfig) -> set[torch.dtype]:
    """Dtypes of the tensors in the student's checkpoint. Raises UserError where it cannot be read."""
    student = config.student
    load_model_config(student.model, student.revision, student.trust_remote_code)
    return _dtypes_in(hub_folder(resolve(student.model), student.revision))


def _dtypes_in(folder: Path) -> set[torch.dtype]:
    with Weights(folder) as weights:
        return {tensor.dtype for tensor in weights.header().values()}


def load_base(config: ExperimentConfig) -> tuple[LoadedModel, dict[str, Tensor]]:
    """Loads the student; returns it and {name: tensor as the base arm stores it}, each rounded at most once.

    Loaded in the narrowest dtype that represents all weights exactly; each is then cast to precision.stored or, with
    "auto", to its dtype in the checkpoint.
    """
    fixed = None if config.precision.stored == "auto" else DTYPES[config.precision.stored]
    loaded = load_configured(config.student, widest(*_student_dtypes(config)))
    state = loaded.model.state_dict()
    if fixed is None:
        with stored_tensors(loaded) as tensors:
            wanted: Mapping[str, torch.dtype] = tensors.dtypes
    else:
        wanted = {name: fixed for name, tensor in state.items() if tensor.is_floating_point()}
    cast: dict[int, Tensor] = {}  # by address, so that tied parameters stay tied
    for name, dtype in wanted.items():
        if state[name].dtype != dtype:
            place = state[name].data_ptr()
            cast[place] = state[name] = cast.get(place, state[name].to(dtype))
    return loaded, state


def _precision_entry(
    config: ExperimentConfig, folder: Path | None, values: str
) -> dict[str, str | None]:
    """An arm's compute dtype, the dtype of its trained values, and the dtypes in its checkpoint."""
    stored = None
    if folder is not None:
        stored = "+".join(sorted(str(own).removeprefix("torch.") for own in _dtypes_in(folder)))
    return {"compute": config.precision.resolved, "stored": stored, "values": values}


def record_checkpoint(
    its: Stage, config: ExperimentConfig, name: str, kind: str, **about: Any
) -> None:
    """Writes the record of an arm whose checkpoint is in the run folder; marks it done."""
    folder = its.run.checkpoint(name)
    digest = digest_checkpoint(folder, whole=True)
    foreign = its.inputs.get("other_base")
    write_record(its, config, name, kind, digest, folder, **about, other_base=foreign)


def write_record(
    its: Stage,
    config: ExperimentConfig,
    name: str,
    kind: str,
    digest: str,
    folder: Path | None,
    values: str = "fp32",
    **about: Any,
) -> None:
    """Writes the checksums of an arm's files, then its record; marks it done. `values`: the recipe's train.master."""
    content = {
        "arm": name,
        "type": kind,
        **about,
        "precision": _precision_entry(config, folder, values),
        "checkpoint_digest": digest,
    }
    arm = its.run.arm(name)
    files = [path for path in arm.rglob("*") if path.is_file()]
    its.finish(content, [p for p in files if p.relative_to(arm).parts[0] not in NO_RESULTS])


def model_card(
    config: ExperimentConfig, name: str, what: str, inputs: Mapping[str, Any] | None = None
) -> str:
    """The text of an arm's model card; `what` completes "Made by vlopd from STUDENT: ..."."""
    foreign = (inputs or {}).get("other_base")
    warning = (
        f"Other base: {', '.join(foreign)} came from another base checkpoint.\n" if foreign else ""
    )
    return (
        "---\nlibrary_name: transformers\ntags: [vlopd, on-policy-distillation]\n---\n"
        f"# {config.name}: arm {name}\n\nMade by vlopd from {config.student.model}: {what}.\n{warning}"
        "Loads with `transformers`; ../record.json has its inputs, precision and digests.\n"
    )


def count_changed(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], mask: Mapping[str, Tensor] | None
) -> dict[str, Any]:
    """Counts the coordinates of a checkpoint whose bits differ from the base, on and off the mask, and their norm.

    Without a mask all coordinates count as on it, and the off-mask entries are null.
    """
    total = sum(tensor.numel() for tensor in before.values())
    on = total if mask is None else sum(int(marked.sum()) for marked in mask.values())
    found: dict[str, Any] = {
        "delta_norm": change_norm(before, after),
        "on_mask": {"coordinates": on, "moved": moved_on_mask(before, after, mask)},
    }
    if mask is None:
        return found | {"off_mask_unmoved": None, "off_mask": None}
    moved = moved_off_mask(before, after, mask)
    off = {"coordinates": total - on, "moved": moved}
    return found | {"off_mask_unmoved": moved == 0, "off_mask": off}


def weight_agreement(
    run: RunFolder,
    config: ExperimentConfig,
    name: str,
    before: Mapping[str, Tensor],
    mask: Mapping[str, Tensor] | None,
) -> dict[str, Any] | None:
    """Fraction of equal weights between an arm and the trained arms it derives from, by tolerance."""
    derived = config.ancestors(name, replayed=False)
    others = [a for a in derived if isinstance(config.arms[a], DistillArm)]
    arm = read_tensors(run.checkpoint(name))
    found = {
        o: agreement_by_tolerance(before, arm, read_tensors(run.checkpoint(o)), mask)
        for o in others
    }
    return found or None


def discovery_seeds(config: ExperimentConfig, name: str) -> dict[str, int] | None:
    """Seeds of the trained arms that an arm derives from, e.g. of its mask's discovery."""
    arms = {other: config.arms[other] for other in config.ancestors(name, replayed=False)}
    found = {other: arm.seed for other, arm in arms.items() if isinstance(arm, DistillArm)}
    return found or None
