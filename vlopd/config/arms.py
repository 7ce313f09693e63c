"""The arms of an experiment: how each evaluated model is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from vlopd.config.base import Count, Name, Section, Seed, Share, Unique, Weight, later
from vlopd.config.functions import with_names
from vlopd.config.lora import Lora
from vlopd.config.masks import Selection
from vlopd.config.recipe import ArmRecipe
from vlopd.config.signal_nulls import SignalNullConfig, replayed_by
from vlopd.config.sweeps import Grid

Role = Literal[
    "base",
    "teacher",
    "full",
    "replicate",
    "variant",
    "subnetwork",
    "control",
    "transplant",
    "projection",
    "null",
    "other",
]
"""What an arm is for in the comparison (config/roles.py has the defaults).

full        the trained student that the others are compared with; one an experiment
replicate   full with another training seed
variant     trained otherwise than full: another loss, data, optimizer, ...
subnetwork  retrained from the base under a mask; transplant: the base plus another arm's delta on it
control     as a subnetwork or transplant, under a mask that is not chosen by the update: random, low-magnitude, ...
projection  from an early checkpoint's subspace or direction, or a delta's part in or off a subspace
null        trained as another arm, on a signal that carries nothing
"""


class BaseArm(Section):
    """The student before any training."""

    type: Literal["base"] = "base"
    role: Literal["base"] | None = None
    """Role in the comparison; null for `base`."""


class TeacherArm(Section):
    """A teacher without its context."""

    type: Literal["teacher"] = "teacher"
    role: Literal["teacher"] | None = None
    """Role in the comparison; null for `teacher`."""
    teacher: str | None = None
    """Name of the teacher, where there are several."""


Table = Annotated[dict[str, Any], BeforeValidator(with_names)]


"""Settings of a section that override the run's."""


class Subspace(Section):
    """The subspace spanned by an early update, matrix by matrix ("subspace locking", arXiv 2606.07082).

    Each matrix's gradient is projected onto it before clipping and the optimizer step. Matrices unchanged in the early
    checkpoint stay fixed; vectors train without projection.
    """

    of: str
    """The checkpoint whose delta from the base defines the subspace, e.g. `full@12`; see masks."""
    rank: Count = 16
    """Singular directions kept per matrix."""
    side: Literal["right", "left", "both"] = "right"
    """Side of the projection: `right` is G V V^T, `left` U U^T G."""


class DistillArm(Section):
    """The student trained from the base, by on-policy distillation unless the recipe says otherwise; with a mask, only
    its coordinates train.

    Sections given here override the run's for this arm: `loss = {type = "forward_kl"}` varies one factor.
    """

    type: Literal["distill"] = "distill"
    role: (
        Literal[
            "full",
            "replicate",
            "variant",
            "subnetwork",
            "control",
            "projection",
            "null",
            "other",
        ]
        | None
    ) = None
    """Role in the comparison; null for the default of config/roles.py, which must be unambiguous."""
    seed: Seed
    """Seed of data order and sampling. An arm with a mask has another by default, since evaluating a mask on the data
    that selected it is optimistically biased; `seeds = [1, 2]` makes one arm per seed."""
    mask: str | None = None
    """Name of the mask whose coordinates train; null for all coordinates."""
    null: SignalNullConfig | None = None
    """A signal null (docs/geometry.md): trains on a signal that carries nothing; null for the recipe's own."""
    teacher: Table | None = None
    """Overrides settings of `teacher` for this arm."""
    data: Table | None = None
    """Overrides settings of `data` for this arm."""
    rollout: Table | None = None
    """Overrides settings of `rollout` for this arm."""
    loss: Table | None = None
    """Overrides settings of `loss` for this arm; another `type` replaces the whole section."""
    reward: Table | None = None
    """Overrides settings of `reward` for this arm, or adds a reward to it."""
    optim: Table | None = None
    """Overrides settings of `optim` for this arm; another `type` replaces the whole section."""
    train: Table | None = None
    """Overrides settings of `train` for this arm."""
    subspace: Subspace | None = None
    """Projects gradients onto the subspace of an early update; null for none."""
    lora: Lora | None = later(None)
    """Trains low-rank updates of linear layers in place of the weights; null for none."""
    sweep: Grid | None = None
    """Tunes the arm: trains it at each point of the grid of these recipe keys, {"optim.learning_rate" = [3e-4, 1e-3]},
    and keeps that with the best mean score on eval.validation; null for no tuning."""
    sweep_group: Name | None = None
    """Name shared by the tuned arms that take one choice, the best by the mean over them; null for the arm's own name,
    or that before `seeds` made several of it. Of an arm without a sweep: the group whose choice it takes untried, as a
    signal null takes its real arm's."""

    @property
    def own(self) -> dict[str, Table]:
        """The sections that this arm overrides, by name."""
        tables = self.model_dump(include=set(ArmRecipe.model_fields))
        return {name: table for name, table in tables.items() if table is not None}

    @model_validator(mode="before")
    @classmethod
    def fill_seed(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {"seed": 2 if value.get("mask") or value.get("subspace") else 1, **value}
        return value

    @model_validator(mode="after")
    def check_mask(self) -> DistillArm:
        if self.role in ("subnetwork", "control") and self.mask is None:
            raise ValueError(f'role = "{self.role}" is of an arm under a mask; give it a mask')
        if self.role == "null" and self.null is None:
            raise ValueError('role = "null" is of an arm with a signal null; give it null = TYPE')
        if self.null is not None and self.role not in (None, "null", "other"):
            raise ValueError(f'role = "{self.role}" is not of an arm with a signal null')
        if self.null is not None and self.null.type == "random_gradient" and self.subspace:
            raise ValueError("null random_gradient has no gradient to project; leave subspace out")
        if self.lora is not None:
            for key, other in (("mask", self.mask), ("subspace", self.subspace)):
                if other is not None:
                    raise ValueError(f"lora trains no coordinate of the weights; leave {key} out")
        return self

    @model_validator(mode="after")
    def check_sweep(self) -> DistillArm:
        sections = set(ArmRecipe.model_fields)
        for key in self.sweep or ():
            if key.partition(".")[0] not in sections or "." not in key:
                raise ValueError(
                    f"sweep of {key!r}: must be a key of {', '.join(sorted(sections))}, as optim.learning_rate"
                )
        return self


class TransplantArm(Section):
    """The base plus another arm's delta on the mask, or a part of that delta, without training.

    With the base's leading k singular vectors U_k and V_k of a matrix and its delta D, the principal part is
    U_k U_k^T D V_k V_k^T, and the off-principal part all else of D; together they are the delta (arXiv 2607.03065 puts
    the gain of RL into the base's spectral space). A vector's delta is wholly off, in every kind of part.
    """

    type: Literal["transplant"] = "transplant"
    role: Literal["transplant", "control", "projection", "other"] | None = None
    """Role in the comparison; null for `transplant`, or `control` under a random mask, or `projection` of a part."""
    of: str = "full"
    """The checkpoint whose delta is transplanted: an arm, `full@12`, or a folder."""
    mask: str | None = later(None)
    """Name of the mask on which the delta is applied; null for all coordinates, with a `part`."""
    part: Literal["principal", "off_principal", "random", "off_random"] | None = later(None)
    """The part of each matrix's delta: in, or off, the base's principal subspaces, or random ones of the same rank, the
    control; null for the whole delta."""
    rank: Count | None = later(None)
    """Rank k of the subspaces, in singular directions; give this or `rank_fraction`."""
    rank_fraction: Share | None = later(None)
    """Rank as a fraction of the smaller side, rounded down, at least 1."""
    seed: Seed | None = later(None)
    """Seed of random subspaces; `seeds = [1, 2]` makes one arm per seed."""
    norm_of: str | None = later(None)
    """The checkpoint whose delta norm, over the whole model, the part is scaled to; null leaves it as it is."""

    @model_validator(mode="after")
    def check_part(self) -> TransplantArm:
        if self.part is None:
            if self.mask is None:
                raise ValueError("give a mask, or a part")
            for key in ("rank", "rank_fraction", "seed", "norm_of"):
                if dict(self)[key] is not None:
                    raise ValueError(f"{key} is of a part; give part, or leave {key} out")
        elif (self.rank is None) == (self.rank_fraction is None):
            raise ValueError("a part needs either rank or rank_fraction")
        elif (self.seed is None) == (self.part in ("random", "off_random")):
            raise ValueError(
                "seed is of random subspaces: a random part needs one, others take none"
            )
        if self.role == "control" and self.mask is None:
            raise ValueError('role = "control" is of an arm under a mask; give it a mask')
        return self


class ExtrapolateArm(Section):
    """The base plus a multiple of an early delta, on the mask if given, without training.

    EffOPD (arXiv 2605.11739). The early checkpoint is read as stored: precision.stored = "fp32" avoids rounding.
    """

    type: Literal["extrapolate"] = "extrapolate"
    role: Literal["projection", "control", "other"] | None = None
    """Role in the comparison; null for `projection`."""
    of: str
    """The early checkpoint, e.g. `full@12`; see masks."""
    factor: Annotated[Weight, Field(gt=0)] | None = None
    """Multiple of the early delta."""
    norm_of: str | None = None
    """Instead of a factor: the arm whose delta norm, over the whole model, is matched."""
    mask: str | None = None
    """Name of the mask on which the delta is applied; null for all coordinates."""

    @model_validator(mode="after")
    def check_length(self) -> ExtrapolateArm:
        if (self.factor is None) == (self.norm_of is None):
            raise ValueError("give either factor or norm_of")
        if self.role == "control" and self.mask is None:
            raise ValueError('role = "control" is of an arm under a mask; give it a mask')
        return self


class MergeArm(Selection):
    """The base plus the merged deltas of several arms, without training.

    On the parameters that match every given list of `components`, `layers` and `modules`, all without one, and there on
    the mask if given; elsewhere the base.
    """

    type: Literal["merge"] = "merge"
    role: Literal["variant", "other"] | None = None
    """Role in the comparison; null for `other`."""
    of: Annotated[tuple[str, ...], Unique] = Field(min_length=1)
    """The checkpoints whose deltas are merged: arms, `full@12`, or folders."""
    method: Literal["sum", "ties"] = "sum"
    """`sum` adds the deltas (task arithmetic, arXiv 2212.04089); `ties` trims each to its largest entries, elects a
    sign for every coordinate and takes the mean of those that agree with it (TIES, arXiv 2306.01708)."""
    density: Share | None = None
    """Fraction of each delta's coordinates, over the whole model, that `ties` keeps; null for 0.2, as published."""
    scale: Annotated[Weight, Field(gt=0)] = 1.0
    """Multiple of the merged delta; 0.5 makes the mean of the sum of two."""
    mask: str | None = None
    """Name of the mask on which the merged delta is applied; null for all coordinates."""

    @model_validator(mode="after")
    def check_density(self) -> MergeArm:
        if self.density is not None and self.method != "ties":
            raise ValueError('density is of method = "ties"; leave it out')
        return self


class CheckpointArm(Section):
    """Any model, evaluated without training."""

    type: Literal["checkpoint"] = "checkpoint"
    role: Literal["base", "teacher", "full", "variant", "other"] | None = None
    """Role in the comparison; null for `other`."""
    model: str
    """A folder, a hub id or `builtin:NAME`."""


class ImportedArm(Section):
    """Scores imported from an lm-eval run on the same questions, without a model."""

    type: Literal["imported"] = "imported"
    role: Literal["base", "teacher", "full", "variant", "other"] | None = None
    """Role in the comparison; null for `other`."""
    results: str
    """lm-eval's output folder: results_*.json and samples_*.jsonl (its --log_samples)."""


UntrainedArm = TransplantArm | ExtrapolateArm | MergeArm
"""The base with deltas of other arms, without training."""


ArmConfig = Annotated[
    BaseArm
    | TeacherArm
    | DistillArm
    | TransplantArm
    | ExtrapolateArm
    | MergeArm
    | CheckpointArm
    | ImportedArm,
    Field(discriminator="type"),
]


def expand_seeds(tree: Any) -> Any:
    """Expands a mask or arm with `seeds = [7, 8]` into name-0 and name-1, and likewise an arm with such a mask."""
    if not isinstance(tree, Mapping):
        return tree
    masks, drawn = expanded(tree.get("masks", {}), {})
    arms, copies = expanded(tree.get("arms", {}), drawn)
    arms = {**arms, **_with_replays(arms, copies)}
    return {**tree, **({"masks": masks} if "masks" in tree else {}), "arms": arms}


def _with_replays(arms: Mapping[str, Any], copies: Mapping[str, int]) -> dict[str, Any]:
    """The arms that replay an expanded arm: the copy of an index replays the copy of that index."""
    found = {}
    index = {f"{name}-{k}": (name, k) for name, count in copies.items() for k in range(count)}
    for name, table in arms.items():
        replayed = replayed_by(table)
        if replayed is not None and replayed in copies:
            own, k = index.get(name, (name, 0))
            if copies.get(own) != copies[replayed]:
                raise ValueError(
                    f"{own}.null.replay = {replayed!r}, which has {copies[replayed]} seeds; give {own} the same seeds"
                )
            found[name] = {**table, "null": {**table["null"], "replay": f"{replayed}-{k}"}}
    return found


def expanded(
    tables: Mapping[str, Any], masks: Mapping[str, int]
) -> tuple[dict[str, Any], dict[str, int]]:
    """The tables with several seeds expanded, and {name: number of copies} of the expanded ones."""
    found: dict[str, Any] = {}
    counts: dict[str, int] = {}
    for name, table in tables.items():
        is_table = isinstance(table, Mapping)
        seeds = table.get("seeds") if is_table else None
        mask = table.get("mask") if is_table else None
        count = masks.get(mask) if isinstance(mask, str) else None
        if seeds is None and count is None:
            copies = {name: table}
        else:
            if seeds is not None and (not isinstance(seeds, list | tuple) or not seeds):
                raise ValueError(f"{name}.seeds = {seeds!r} must be a list of seeds")
            if seeds is not None and any(seed in seeds[:i] for i, seed in enumerate(seeds)):
                raise ValueError(f"{name}.seeds = {list(seeds)} has a seed twice")
            if seeds is not None and count is not None and len(seeds) != count:
                raise ValueError(
                    f"{name} has {len(seeds)} seeds, and its mask {mask!r} has {count}; give as many"
                )
            copies = {}
            for k in range(count or len(seeds or ())):
                own = {key: value for key, value in table.items() if key != "seeds"}
                own |= {"seed": seeds[k]} if seeds is not None else {}
                own |= {"mask": f"{mask}-{k}"} if count is not None else {}
                if table.get("sweep") is not None:
                    own = {"sweep_group": name, **own}
                copies[f"{name}-{k}"] = own
            counts[name] = len(copies)
        for copy in copies:
            if copy in found:
                raise ValueError(f"{copy!r} is given twice: as itself and by the seeds of another")
        found |= copies
    return found, counts


def checkpoints_of(arm: ArmConfig) -> dict[str, str]:
    """The checkpoints that an arm reads, by config key."""
    if isinstance(arm, DistillArm) and arm.subspace is not None:
        return {"subspace.of": arm.subspace.of}
    if isinstance(arm, MergeArm):
        return {f"of.{i}": text for i, text in enumerate(arm.of)}
    if isinstance(arm, (TransplantArm, ExtrapolateArm)):
        return {"of": arm.of} | ({} if arm.norm_of is None else {"norm_of": arm.norm_of})
    return {}


def replay_of(arm: ArmConfig) -> str | None:
    """The arm whose completions an arm replays."""
    return arm.null.replay if isinstance(arm, DistillArm) and arm.null is not None else None


def mask_of(arm: ArmConfig) -> str | None:
    return arm.mask if isinstance(arm, DistillArm | UntrainedArm) else None


def masks_read(arm: ArmConfig) -> list[str]:
    """The masks that an arm is made with: its own, or the one whose coordinates its LoRA counts."""
    like = arm.lora.like if isinstance(arm, DistillArm) and arm.lora is not None else None
    return [mask for mask in (mask_of(arm), like) if mask is not None]
