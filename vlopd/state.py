"""A training run's resumable state: one safetensors file, whole or not there, that goes on bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlopd.checkpoint import RunError, whole_file
from vlopd.optimizers import Optimizers
from vlopd.trainable import Trainable

Averages = list[tuple[Trainable, float]]
"""Fp32 values of teachers that are moving averages of the student, each with its decay a step."""


def save_state(
    folder: Path,
    step: int,
    trainable: Trainable,
    optimizer: Optimizers,
    averages: Averages,
    identity: str,
) -> None:
    """One safetensors file: values, the optimizer's state, averages and the step, whole or not at all."""
    tensors = {f"values/{n}": values.contiguous() for n, values in trainable.state().items()}
    plain: dict[str, dict[str, Any]] = {}  # what is no tensor goes to the header, as JSON
    for name, entries in optimizer.state().items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{key}/{name}"] = value.contiguous()
            else:
                plain.setdefault(name, {})[key] = value
    for k, (average, _) in enumerate(averages):
        tensors |= {
            f"average-{k}/{n}": values.contiguous() for n, values in average.state().items()
        }
    about = {"step": str(step), "identity": identity, "optimizer": json.dumps(plain)}
    with whole_file(folder / "state.safetensors") as temporary:
        save_file(tensors, temporary, about)


def resume(
    folder: Path,
    trainable: Trainable,
    optimizer: Optimizers,
    averages: Averages,
    identity: str,
) -> int:
    """Loads the state, if there is one, and returns the step to go on from.

    Raises RunError for a damaged state or one of another configuration.
    """
    path = folder / "state.safetensors"
    if not path.exists():
        return 0
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"{path} is damaged ({error}); delete it to train this arm from its start"
        ) from None
    if about.get("identity") != identity:
        raise RunError(
            f"{path} is of another configuration; delete it to train this arm from its start"
        )
    trainable.load_state({name: tensors[f"values/{name}"] for name in trainable.slots})
    state: dict[str, dict[str, Any]] = json.loads(about["optimizer"])
    for label, tensor in tensors.items():
        kind, name = label.split("/", 1)
        if kind.startswith("optimizer."):
            state.setdefault(name, {})[kind.removeprefix("optimizer.")] = tensor
    optimizer.load_state(state)
    for k, (average, _) in enumerate(averages):
        average.load_state({name: tensors[f"average-{k}/{name}"] for name in average.slots})
    return int(about["step"])
