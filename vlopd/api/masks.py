"""`make_mask`: a mask of two checkpoints, or of other masks, by any rule."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from vlopd.api.checkpoints import Checkpoint, folder_of
from vlopd.api.delta import tensor_columns
from vlopd.bits import pack
from vlopd.config.input import value_of
from vlopd.config.masks import DeltaRule, FileMask, FunctionMask, MaskConfig, MaskRule, RandomMask
from vlopd.digests import digest_checkpoint
from vlopd.errors import ConfigError, RunError
from vlopd.masks.compare import density
from vlopd.masks.files import check_base, load_mask, save_mask
from vlopd.masks.foreign import is_foreign
from vlopd.masks.importing import import_mask
from vlopd.masks.rules import build_mask
from vlopd.models.parameter_names import classify
from vlopd.run.resolve import plugin_content
from vlopd.weights.checks import refuse_unlike_config
from vlopd.weights.delta import Deltas, stream


class MaskTensors(dict[str, Tensor]):
    """A mask: {parameter: bool tensor of its shape}, true where it trains; `distill(mask=...)` takes it as it is.

    `inputs` are its rule and the digests of what it was made from, `left_out` one line on the tensors that the rule
    did not see.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], inputs: Mapping[str, Any] = {}, left_out: str = ""
    ):
        super().__init__(tensors)
        self.inputs, self.left_out = dict(inputs), left_out

    @property
    def density(self) -> float:
        """Fraction of the coordinates that are in the mask, in [0, 1]."""
        return density(self)

    @cached_property
    def digest(self) -> str:
        """The sha256 of all names, shapes and bits; of a mask file, the one in its record."""
        total = hashlib.sha256()
        for name in sorted(self):
            total.update(f"{name} {list(self[name].shape)}\n".encode())
            total.update(pack(self[name].cpu()).numpy().tobytes())
        return total.hexdigest()

    @property
    def frame(self) -> pd.DataFrame:
        """One row a tensor: tensor, component, layer, module, shape, parameters, selected, density."""
        rows = []
        for name, marked in self.items():
            selected = int(marked.sum())
            rows.append(
                {
                    **tensor_columns(classify(name), marked),
                    "selected": selected,
                    "density": selected / marked.numel() if marked.numel() else 0.0,
                }
            )
        columns = ("tensor", "component", "layer", "module", "shape", "parameters", "selected")
        return pd.DataFrame(rows, columns=[*columns, "density"]).astype({"layer": "Int64"})

    def save(self, path: Path | str) -> Path:
        """Writes the mask as .safetensors (packed bits) with its record beside it (docs/run-folder.md).

        A config takes it by `{type = "file", path = ...}`. Raises RunError where the base that it is for is unknown.
        """
        path = Path(path)
        if "base" not in self.inputs:
            raise RunError(
                "the mask's base checkpoint is unknown: make it with make_mask(rule, base, ...)"
            )
        save_mask(path, self, self.inputs, classify)
        return path

    def __repr__(self) -> str:
        rule = self.inputs.get("rule", {}).get("type", "")
        count, total = (
            sum(int(m.sum()) for m in self.values()),
            sum(m.numel() for m in self.values()),
        )
        return f"MaskTensors({rule}: {count:,} of {total:,} coordinates, {self.density:.2%})"

    def _repr_html_(self) -> str:
        sums = self.frame.groupby(["component", "module"], sort=False)[
            ["parameters", "selected"]
        ].sum()
        sums["density"] = sums.selected / sums.parameters
        return f"<p>{self!r}</p>{sums.to_html(formatters={'density': '{:.2%}'.format})}<p>{self.left_out}</p>"


def make_mask(
    rule: Mapping[str, Any] | MaskRule | Callable[..., Any] | str,
    base: Checkpoint | None = None,
    trained: Checkpoint | None = None,
    *,
    masks: Mapping[str, Mapping[str, Tensor]] = {},
    allow_other_base: bool = False,
) -> MaskTensors:
    """Makes a mask of two checkpoints, or of other masks.

    Args:
        rule: a table as in a config's [masks], a section object of vlopd.config.masks, or a plug-in: a function, or its
            "module:function" (docs/plugins.md).
        base: the checkpoint before training; not needed by rules that only combine masks.
        trained: the checkpoint after training, for rules that read the update.
        masks: masks by the names that the rule combines (`like`, `mask`, `masks`); a name that is not among them is
            a mask file.
        allow_other_base: combine masks of different base checkpoints (recorded in every later artifact).

    Returns MaskTensors, in the names and shapes of the base's tensors. Raises ConfigError for an invalid rule or a
    missing checkpoint or mask, RunError for checkpoints or masks of different models.

    >>> top = make_mask({"type": "top_fraction", "fraction": 0.05}, "builtin:shapes-student", trained)
    >>> random = make_mask({"type": "random", "like": "top", "seed": 7}, masks={"top": top})
    >>> make_mask({"type": "whole", "modules": ["ffn"]}, "builtin:shapes-student").save("ffn.safetensors")
    """
    if isinstance(rule, str) or callable(rule):
        rule = {"type": rule}
    parsed = value_of(MaskConfig, rule, "rule")
    if isinstance(parsed, FileMask) and parsed.path not in masks and is_foreign(Path(parsed.path)):
        return _imported(Path(parsed.path), base)
    own = parsed.use("rule") if isinstance(parsed, FunctionMask) else None
    reads = parsed.reads is not None or (own is not None and trained is not None)
    named = {name: _named(name, masks) for name in _names(parsed)}
    inputs: dict[str, Any] = {"rule": parsed.model_dump(mode="json")}
    if parsed.reads is not None and "of" in parsed.model_fields_set:
        raise ConfigError(
            f"rule.of = {parsed.reads!r} names an arm of a run; give the checkpoint itself as `trained`"
        )
    if base is None:
        _refuse_without_base(parsed, trained)
        mask = _build(parsed, (), named)
        return MaskTensors(mask, inputs | _origin(parsed, named, allow_other_base))
    if own is not None:
        inputs["plugins"] = plugin_content([own], whole=True)
        own.check()
    if reads and trained is None:
        raise ConfigError(f"a mask of type {parsed.type!r} reads the update; give base and trained")
    if not reads and trained is not None:
        raise ConfigError(
            f"a mask of type {parsed.type!r} does not read the update; leave out trained"
        )
    before = folder_of(base)
    after = before if trained is None else folder_of(trained)
    for folder in dict.fromkeys((before, after)):
        refuse_unlike_config(folder)
    for mask in named.values():
        check_base(mask, before)
    inputs |= _origin(parsed, named, allow_other_base) | {
        "base": digest_checkpoint(before, whole=True)
    }
    if trained is not None:
        inputs["of"] = digest_checkpoint(after, whole=True)
    deltas = stream(before, after, classify)
    left_out = deltas.report.summary() if reads else ""
    if left_out:
        inputs["left_out"] = [its.name for its in deltas.report.left_out]
    return MaskTensors(_build(parsed, deltas, named), inputs, left_out)


def _imported(path: Path, base: Checkpoint | None) -> MaskTensors:
    """A mask file of another tool, in the names of the base's tensors."""
    if base is None:
        raise ConfigError(f"{path} is a mask of another tool; give the base that it is for")
    found, inputs = import_mask(path, folder_of(base))
    return MaskTensors(found.mask, inputs)


def read_mask(path: Path | str) -> MaskTensors:
    """Reads a mask file. Raises RunError where it is missing or damaged."""
    tensors, about = load_mask(Path(path))
    mask = MaskTensors(tensors, about["inputs"])
    mask.digest = about["digest"]
    return mask


def _names(rule: MaskRule) -> tuple[str, ...]:
    """The names of the masks that a rule reads."""
    return (rule.path,) if isinstance(rule, FileMask) else rule.combines


def _named(name: str, masks: Mapping[str, Mapping[str, Tensor]]) -> MaskTensors:
    if name in masks:
        mask = masks[name]
        return mask if isinstance(mask, MaskTensors) else MaskTensors(mask)
    if not Path(name).is_file():
        known = f", and masks has {', '.join(masks)}" if masks else ""
        if any(isinstance(mask, Tensor) for mask in masks.values()):
            known = f"; masks is a single mask: give masks = {{{name!r}: mask}}"
        raise ConfigError(f"no mask {name!r}: there is no such file{known}")
    return read_mask(name)


def _refuse_without_base(rule: MaskConfig, trained: Checkpoint | None) -> None:
    """Raises ConfigError for a rule that reads a checkpoint."""
    draws = isinstance(rule, RandomMask) and rule.match in ("tensor", "global")
    made_of_masks = bool(_names(rule)) and (draws or not isinstance(rule, RandomMask))
    if trained is not None or not made_of_masks:
        needs = "base and trained" if isinstance(rule, DeltaRule) else "base"
        raise ConfigError(f"a mask of type {rule.type!r} reads checkpoints; give {needs}")


def _origin(
    rule: MaskRule, named: Mapping[str, MaskTensors], allow_other_base: bool
) -> dict[str, Any]:
    """The digests of the masks that a rule reads, the first one's base, and the other bases."""
    found: dict[str, Any] = {}
    if isinstance(rule, RandomMask):
        found["like"] = named[rule.like].digest
    elif named:
        found["masks"] = {name: mask.digest for name, mask in named.items()}
    others: dict[str, str] = {}
    for name, mask in named.items():
        its = mask.inputs.get("base")
        if its is not None and its != found.setdefault("base", its):
            if not allow_other_base:
                raise RunError(
                    f"{name} was made from base checkpoint {its[:12]}, {next(iter(named))} from {found['base'][:12]}; "
                    "allow it with allow_other_base (--allow-other-base), recorded in every later artifact"
                )
            others[name] = its
        others |= mask.inputs.get("other_base", {})
    return found | ({"other_base": others} if others else {})


def _build(rule: MaskConfig, deltas: Deltas | tuple[()], named: Mapping[str, MaskTensors]) -> Any:
    try:
        return build_mask(rule, deltas, {name: dict(mask) for name, mask in named.items()})
    except (ConfigError, RunError):
        raise
    except ValueError as error:
        raise RunError(f"{', '.join(named) or rule.type}: {error}") from None
