"""Mask rules, which select the coordinates that may train; one class each."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, NamedTuple

from pydantic import ConfigDict, Field, model_validator

from vlopd.config.base import Count, NonNegative, Number, Section, Seed, Share, Unique
from vlopd.config.functions import IS_BUILT_IN, IS_OWN, KIND, Function


class Reference(NamedTuple):
    """A checkpoint that a rule or an arm reads: of an arm of this run, or a folder.

    >>> Reference.parse("full@12"), Reference.parse("runs/other/arms/full")
    (Reference("full", None, 12), Reference(None, "runs/other/arms/full", None))
    """

    arm: str | None
    path: str | None
    """An arm's folder in another run, or a checkpoint folder; any name with a slash."""
    step: int | None
    """An early checkpoint, one of train.keep_steps; null for the last."""

    @staticmethod
    def parse(text: str) -> Reference:
        name, at, step = text.rpartition("@") if "@" in text else (text, "", "")
        if at and not step.isdecimal():
            raise ValueError(f"{text!r}: @ must be followed by a step number, as in 'full@12'")
        is_path = "/" in name
        return Reference(
            None if is_path else name, name if is_path else None, int(step) if at else None
        )


class MaskRule(Section):
    """A rule for the coordinates that may train. Ties go to the lowest flat index; counts are exact."""

    @property
    def reads(self) -> str | None:
        """The trained checkpoint that the rule reads, as a `Reference`."""
        return None

    @property
    def combines(self) -> tuple[str, ...]:
        """The names of the masks that the rule combines."""
        return ()


class DeltaRule(MaskRule):
    """A rule on the delta of a trained checkpoint."""

    of: str = "full"
    """An arm; an early checkpoint of it, `full@12`; or a folder: another run's `runs/other/arms/full`."""

    @property
    def reads(self) -> str | None:
        return self.of


Scope = Literal["tensor", "global"]


"""Whether a fraction applies to every tensor, or to the whole model."""


class VisibleMask(DeltaRule):
    """Coordinates whose value changed by more than a tolerance, in the given precision.

    Selected are |delta| > atol + rtol |w| and, if `ulps` is given, more than that many ulps of the precision (0: any
    change).
    """

    type: Literal["visible"] = "visible"
    atol: NonNegative = 0.0
    """Absolute tolerance on |delta|, in units of the weights."""
    rtol: NonNegative = 0.0
    """Relative tolerance, a multiple of |w|."""
    ulps: Number | None = None
    """Tolerance in ulps (units in the last place) of `precision`; null for none."""
    precision: Literal["stored", "fp32", "bf16", "fp16"] = "stored"
    """Precision to which both values are rounded first."""


class TopFractionMask(DeltaRule):
    """The fraction of coordinates with the largest |delta|, or the largest |delta| / |w|."""

    type: Literal["top_fraction"] = "top_fraction"
    fraction: Share
    """Fraction of the coordinates that is selected."""
    by: Literal["delta", "relative_delta"] = "delta"
    """The magnitude that ranks coordinates: `delta` is |delta|, `relative_delta` is |delta| / |w|."""
    scope: Scope = "tensor"
    """Whether the fraction is of each tensor or of the whole model."""


class EnergyMask(DeltaRule):
    """The fewest coordinates, largest |delta| first, that hold this share of the sum of delta^2."""

    type: Literal["energy"] = "energy"
    share: Share
    """Fraction of the sum of delta^2 that the selected coordinates hold."""
    scope: Scope = "tensor"
    """Whether the share is of each tensor or of the whole model."""


class MagnitudeMask(MaskRule):
    """The fraction of coordinates with the smallest or largest |w| of the base."""

    type: Literal["magnitude"] = "magnitude"
    which: Literal["low", "high"] = "low"
    """`low` selects the smallest |w|, `high` the largest."""
    fraction: Share
    """Fraction of the coordinates that is selected."""
    scope: Scope = "tensor"
    """Whether the fraction is of each tensor or of the whole model."""


class PrincipalMask(MaskRule):
    """The fraction of each tensor where the base's rank-k approximation has the largest, or smallest, magnitude.

    Vectors are used unchanged. Rank and fraction are independent (arXiv 2511.08567).
    """

    type: Literal["principal"] = "principal"
    which: Literal["principal", "off_principal"] = "principal"
    """`principal` selects the largest magnitudes of the approximation, `off_principal` the smallest."""
    fraction: Share
    """Fraction of each tensor's coordinates that is selected."""
    rank: Count | None = None
    """Rank of the approximation, in singular directions; give this or `rank_fraction`."""
    rank_fraction: Share | None = None
    """Rank as a fraction of the smaller side, rounded down, at least 1."""

    @model_validator(mode="after")
    def check_rank(self) -> PrincipalMask:
        if (self.rank is None) == (self.rank_fraction is None):
            raise ValueError("give either rank or rank_fraction")
        return self


class RandomMask(MaskRule):
    """Uniformly drawn coordinates, exactly as many as the mask `like` has in every class of `match`."""

    type: Literal["random"] = "random"
    like: str
    """Name of the mask whose counts are copied."""
    seed: Seed
    """Seed of the draw; `seeds = [1, 2]` makes one mask per seed."""
    match: Literal["global", "module", "tensor", "magnitude", "visibility"] = "tensor"
    """The classes. global: the whole model; module: the tensors of one component and module; tensor: each tensor;
    magnitude: sixteen quantiles of |w| per tensor; visibility: binades of |w| per tensor, within which the ulp, and so
    the visibility of an update of a given size, is constant."""

    @property
    def combines(self) -> tuple[str, ...]:
        return (self.like,)


class Selection(Section):
    """The parameters that match every given list, with the names that `vlopd mask show` prints.

    `{components = ["language"], modules = ["ffn"]}` is the language model's feed-forward layers.
    """

    components: tuple[str, ...] = ()
    """Components: `vision`, `projector`, `language`, `embedding`, `head`; empty for all."""
    layers: tuple[Number, ...] = ()
    """Layer numbers from 0; empty for all."""
    modules: tuple[str, ...] = ()
    """Modules, such as `up` and `q`; `ffn` and `attention` stand for their matrices; empty for all."""

    @property
    def is_given(self) -> bool:
        return bool(self.components or self.layers or self.modules)


class WholeMask(Selection, MaskRule):
    """All coordinates of the parameters that match every given list."""

    type: Literal["whole"] = "whole"

    @model_validator(mode="after")
    def check_any(self) -> WholeMask:
        if not self.is_given:
            raise ValueError("give components, layers or modules")
        return self


class Combination(MaskRule):
    """A set operation on several masks."""

    masks: Annotated[tuple[str, ...], Unique] = Field(min_length=2)
    """Names of the combined masks."""

    @property
    def combines(self) -> tuple[str, ...]:
        return self.masks


class UnionMask(Combination):
    """Coordinates in any of the masks."""

    type: Literal["union"] = "union"


class IntersectionMask(Combination):
    """Coordinates in all of the masks."""

    type: Literal["intersection"] = "intersection"


class DifferenceMask(Combination):
    """Coordinates in the first mask and in none of the others."""

    type: Literal["difference"] = "difference"


class ComplementMask(MaskRule):
    """Coordinates not in the mask."""

    type: Literal["complement"] = "complement"
    mask: str
    """Name of the mask whose complement is taken."""

    @property
    def combines(self) -> tuple[str, ...]:
        return (self.mask,)


class FileMask(MaskRule):
    """An existing mask file, such as another run's masks/top.safetensors, or one of another format (docs/masks.md)."""

    type: Literal["file"] = "file"
    path: str
    """A mask file, a safetensors file of booleans or of index lists by parameter, or the folder of a SHiRA adapter."""


class FunctionMask(Function, MaskRule):
    """A function (pairs, **arguments) -> {parameter: bool tensor} (docs/plugins.md)."""

    model_config = ConfigDict(extra="allow")
    takes: ClassVar[tuple[str, ...]] = ("pairs",)
    of: str | None = None
    """The trained checkpoint that it reads beside the base, as for other rules; null for the base alone."""

    @property
    def reads(self) -> str | None:
        return self.of


BuiltInMask = Annotated[
    VisibleMask
    | TopFractionMask
    | EnergyMask
    | MagnitudeMask
    | PrincipalMask
    | RandomMask
    | WholeMask
    | UnionMask
    | IntersectionMask
    | DifferenceMask
    | ComplementMask
    | FileMask,
    Field(discriminator="type"),
]

MaskConfig = Annotated[Annotated[BuiltInMask, IS_BUILT_IN] | Annotated[FunctionMask, IS_OWN], KIND]
