"""Base class of the generated data sets: an unlimited stream of examples of a split, cut at `size`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from vlopd.types import Example

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class SyntheticDataset(Sequence[Example]):
    """`len` is `size`, but any index is valid; example `i` depends on (split, seed, i), not on `size`."""

    split: Split
    size: int
    seed: int = 0

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(self.size))

    @abstractmethod
    def __getitem__(self, index) -> Example: ...  # type: ignore[override]
