"""Bytes of the tensors that operations make, counted operation by operation."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Counts the bytes of living tensors that operations made (`peak`), and those read and written (`moved`).

    On any device, meta included; not an operation's own temporaries. With `counts`, of those tensors that it names, and
    of the operations that make one.
    """

    def __init__(self, counts: Callable[[Tensor], bool] | None = None) -> None:
        super().__init__()
        self.counts = counts
        self.living: dict[int, int] = {}
        self.now = self.peak = self.moved = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [out] if isinstance(out, Tensor) else tensors_in(out)
        if self.counts is not None:
            made = [each for each in made if self.counts(each)]
            if not made:  # nearly all operations: a step must not take much longer
                return out
        read = tensors_in((args, kwargs))
        if not func.is_view:
            self.moved += sum(each.nbytes for each in (*read, *made))
        known = {each.untyped_storage()._cdata for each in read}
        for storage in (each.untyped_storage() for each in made):
            key = storage._cdata
            if key not in known and key not in self.living:  # neither a view nor in place
                self.living[key] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, key)
        self.peak = max(self.peak, self.now)
        return out

    def _free(self, key: int) -> None:
        self.now -= self.living.pop(key)


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors among nested values."""
    return [each for each in tree_leaves(values) if isinstance(each, Tensor)]
