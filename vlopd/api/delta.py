"""`delta`: the difference of two checkpoints, tensor by tensor, and as a table."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import pandas as pd
from torch import Tensor

from vlopd.api.checkpoints import Checkpoint, folder_of, path_or_id
from vlopd.models.parameter_names import classify
from vlopd.types import TensorName
from vlopd.weights.checks import refuse_unlike_config
from vlopd.weights.delta import Deltas, TensorDelta, stream


def tensor_columns(where: TensorName, tensor: Tensor) -> dict[str, Any]:
    """What the rows of every frame of tensors begin with."""
    return {
        "tensor": where.name,
        "component": where.component,
        "layer": where.layer,
        "module": where.module,
        "shape": tuple(tensor.shape),
        "parameters": tensor.numel(),
    }


class Delta:
    """The update from a base to a trained checkpoint; iterating streams one TensorDelta at a time from disk."""

    def __init__(self, base: Checkpoint, trained: Checkpoint, deltas: Deltas):
        self.base, self.trained, self._deltas = base, trained, deltas

    def __iter__(self) -> Iterator[TensorDelta]:
        return iter(self._deltas)

    def __len__(self) -> int:
        return len(self._deltas)

    @property
    def left_out(self) -> str:
        """One line on the tensors that only one checkpoint has; empty where everything is compared."""
        return self._deltas.report.summary()

    @cached_property
    def frame(self) -> pd.DataFrame:
        """One row a tensor; the first use reads both checkpoints.

        tensor, component, layer, module, shape, parameters; changed: coordinates whose stored value differs;
        changed_fraction; base_norm, delta_norm: Frobenius norms; relative_norm: their ratio.
        """
        rows = []
        for pair in self:
            changed = int((pair.delta != 0).sum())
            base, norm = float(pair.base.double().norm()), float(pair.delta.double().norm())
            rows.append(
                {
                    **tensor_columns(pair.where, pair.base),
                    "changed": changed,
                    "changed_fraction": changed / pair.base.numel() if pair.base.numel() else 0.0,
                    "base_norm": base,
                    "delta_norm": norm,
                    "relative_norm": norm / base if base else float("nan"),
                }
            )
        return pd.DataFrame(rows).astype({"layer": "Int64"})

    def by_component(self) -> pd.DataFrame:
        """The frame summed over the tensors of each component, and over the whole model."""
        squared = self.frame.assign(
            base_norm=self.frame.base_norm**2, delta_norm=self.frame.delta_norm**2
        )
        columns = ["parameters", "changed", "base_norm", "delta_norm"]
        summed = squared.groupby("component", sort=False)[columns].sum()
        summed.loc["all"] = summed.sum()
        summed[["base_norm", "delta_norm"]] **= 0.5
        summed["changed_fraction"] = summed.changed / summed.parameters
        summed["relative_norm"] = summed.delta_norm / summed.base_norm
        return summed.astype({"parameters": int, "changed": int})

    def __repr__(self) -> str:
        base, trained = map(path_or_id, (self.base, self.trained))
        return f"Delta({base} -> {trained}: {len(self)} tensors)"

    def _repr_html_(self) -> str:
        return f"<p>{self!r}</p>{self.by_component().to_html()}<p>{self.left_out}</p>"


def delta(base: Checkpoint, trained: Checkpoint) -> Delta:
    """Compares two checkpoints of one model, tensor by tensor.

    Args:
        base: a folder, hub id, .gguf file, `builtin:NAME`, or the result of `distill`.
        trained: the same, or the folder of a LoRA adapter of the base.

    Returns a Delta: an iterable of TensorDelta(where, base, trained) with `.delta` in fp32, one pair of tensors in
    memory at a time, and `.frame`, a row a tensor. Raises RunError where a checkpoint cannot be read or is of another
    model.

    >>> update = delta("builtin:shapes-student", trained)
    >>> update.frame.sort_values("relative_norm").tail()
    >>> largest = max(update, key=lambda pair: pair.delta.abs().max())
    """
    before, after = folder_of(base), folder_of(trained)
    for folder in (before, after):
        refuse_unlike_config(folder)
    return Delta(base, trained, stream(before, after, classify))
