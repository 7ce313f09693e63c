"""A training run's saved state: one safetensors file, whole or absent, from which training resumes bit for bit.

A step waits for the copy to host memory alone; hashing and writing run in a background thread (both release the GIL).
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, uint8

from vlopd.errors import RunError
from vlopd.files import is_first_process, whole_file
from vlopd.train.optimizers import Optimizers
from vlopd.train.sparse import Trainable

Averages = list[tuple[Trainable, float]]
"""Fp32 values of teachers that are moving averages of the student, each with its decay per step."""


class BackgroundWriter:
    """Runs one piece of work at a time in a background thread; the end of its `with` block waits for the last.

    An error of the work is raised by the next `start` or `wait`; after another error the block ends with that one.
    """

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1, "vlopd-writer")
        self.last: Future[None] | None = None

    def wait(self) -> None:
        """Waits for the work under way, if any, and raises its error."""
        last, self.last = self.last, None
        if last is not None:
            last.result()

    def start(self, work: Callable[[], None]) -> None:
        """Starts `work`, after `wait`."""
        self.wait()
        self.last = self.pool.submit(work)

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.pool.shutdown()
        if kind is None:
            self.wait()


def save_state(
    folder: Path,
    step: int,
    trainable: Trainable,
    optimizer: Optimizers,
    averages: Averages,
    identity: str,
    chosen: Mapping[str, int] = {},
    writer: BackgroundWriter | None = None,
    writes: bool = True,
) -> None:
    """Writes one safetensors file, atomically: values, the optimizer's state, averages, the step, and what was chosen
    by the memory that was free.

    With a `writer` it returns once everything is copied to host memory. The copy before is written and freed first,
    so there is one at a time; an error of that write is raised here. Of sharded values all processes call it, of which
    one `writes`.
    """
    if writer is not None:
        writer.wait()
    found = {f"values/{n}": trainable.whole(n, x) for n, x in trainable.state().items()}
    plain: dict[str, dict[str, Any]] = {}  # not tensors: into the header, as JSON
    for name, entries in optimizer.state().items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                is_one_each = value.shape == trainable.slots[name].values.shape
                whole = trainable.whole(name, value) if is_one_each and value.ndim else value
                found[f"optimizer.{key}/{name}"] = whole
            else:
                plain.setdefault(name, {})[key] = value
    for k, (average, _) in enumerate(averages):
        found |= {f"average-{k}/{n}": average.whole(n, x) for n, x in average.state().items()}
    if not writes:
        return
    tensors = {label: tensor for label, tensor in found.items() if tensor is not None}
    about = {"step": str(step), "identity": identity, "optimizer": json.dumps(plain)}
    about["chosen"] = json.dumps(dict(chosen))
    if writer is None:
        _write(folder, about, {label: tensor.contiguous() for label, tensor in tensors.items()})
        return
    copies = {
        label: tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
        for label, tensor in tensors.items()
    }
    writer.start(partial(_write, folder, about, copies))


def _write(folder: Path, about: Mapping[str, str], tensors: dict[str, Tensor]) -> None:
    """Writes the state's header entries and tensors, with their digest."""
    path = folder / "state.safetensors"
    with whole_file(path) as temporary:
        save_file(tensors, temporary, {**about, "digest": digest(about, tensors)})


def digest(about: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """A sha256 over the whole state: its header's entries, and every tensor's name, dtype, shape and bits."""
    total = hashlib.sha256(json.dumps(dict(about), sort_keys=True).encode())
    for label in sorted(tensors):
        tensor = tensors[label].detach().cpu()
        total.update(f"{label} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(uint8).numpy().data)
    return total.hexdigest()


def is_state_of(folder: Path, identity: str) -> bool:
    """Whether there is a state that `resume` would load with this identity, or refuse as damaged."""
    path = folder / "state.safetensors"
    if not path.exists():
        return False
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("identity") == identity
    except (OSError, SafetensorError):
        return True


def chosen_before(folder: Path) -> dict[str, int]:
    """What the run that saved the state had chosen."""
    with safe_open(folder / "state.safetensors", "pt") as file:
        return dict(json.loads((file.metadata() or {}).get("chosen", "{}")))


def resume(
    folder: Path,
    trainable: Trainable,
    optimizer: Optimizers,
    averages: Averages,
    identity: str,
) -> int:
    """Loads the saved state, if there is one with this `identity`, and returns its step; 0 without.

    A state of another identity is ignored, with a warning. Raises RunError for a damaged one.
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
    expected = about.pop("digest", None)
    if expected != digest(about, tensors):
        raise RunError(
            f"{path} is damaged (its digest does not match); delete it to train this arm from its start"
        )
    if about.get("identity") != identity:
        # of a killed run whose data or models have changed since, under the same names
        if is_first_process():
            why = "was made from other inputs than the present ones: training from the start"
            print(f"vlopd: {path} {why}", file=sys.stderr)
        return 0
    trainable.load_state({name: tensors[f"values/{name}"] for name in trainable.slots})
    state: dict[str, dict[str, Any]] = json.loads(about["optimizer"])
    for label, tensor in tensors.items():
        kind, name = label.split("/", 1)
        if kind.startswith("optimizer."):
            own = trainable.part(name, tensor) if tensor.ndim else tensor
            state.setdefault(name, {})[kind.removeprefix("optimizer.")] = own
    optimizer.load_state(state)
    for k, (average, _) in enumerate(averages):
        average.load_state({name: tensors[f"average-{k}/{name}"] for name in average.slots})
    return int(about["step"])
