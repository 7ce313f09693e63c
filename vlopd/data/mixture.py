"""`MixtureDataset`: several data sets, of which each example of the training stream is drawn by weight."""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from vlopd import seeding
from vlopd.data.dataset import StoredDataset
from vlopd.data.order import shuffled
from vlopd.types import Example

BLOCK = 4096
"""Positions of the stream whose sources are drawn at once."""


class MixtureDataset(StoredDataset):
    """By index, the sources one after the other; by `order`, a stream whose positions draw their source by weight.

    The n-th draw of a source is the n-th example of its own shuffled stream. The source's name is put before its ids.
    """

    def __init__(self, sources: Mapping[str, Sequence[Example]], weights: Mapping[str, float]):
        self.names, self.parts = list(sources), list(sources.values())
        self.ends = list(accumulate(map(len, self.parts)))
        shares = torch.tensor([weights.get(name, 1.0) for name in sources], dtype=torch.float64)
        self.shares = shares / shares.sum()
        stored = [part for part in self.parts if isinstance(part, StoredDataset)]
        self.notes = tuple(note for part in stored for note in part.notes)
        self._drawn: dict[int, list[Tensor]] = {}

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index) -> Example:  # type: ignore[override]
        part, place = self._place(range(len(self))[index])
        example = self.parts[part][place]
        return replace(example, id=f"{self.names[part]}/{example.id}")

    def _place(self, index: int) -> tuple[int, int]:
        part = bisect_right(self.ends, index)
        return part, index - (self.ends[part - 1] if part else 0)

    def order(self, start: int, count: int, seed: int) -> list[int]:
        """Indices of the examples at `start` to `start + count` of the stream, a function of the arguments alone."""
        if count == 0:
            return []
        block, offset = divmod(start, BLOCK)
        last = (start + count - 1) // BLOCK
        sources = torch.cat([self._sources(each, seed) for each in range(block, last + 1)])
        before = self._counts_before(block, seed) + self._count(sources[:offset])
        drawn = sources[offset : offset + count]
        found = torch.empty(count, dtype=torch.int64)
        for part, (n, first) in enumerate(zip(self._count(drawn), before, strict=True)):
            if n:
                stream = (seed, self.names[part])
                places = shuffled(len(self.parts[part]), int(first), int(n), *stream)
                begin = self.ends[part - 1] if part else 0
                found[drawn == part] = torch.tensor(places) + begin
        return found.tolist()

    def _sources(self, block: int, seed: int) -> Tensor:
        """The sources of a block's positions, int64 [BLOCK]."""
        draws = seeding.generator("cpu", "data mixture", seed, block)
        uniform = torch.rand(BLOCK, generator=draws, dtype=torch.float64)
        return torch.searchsorted(self.shares.cumsum(0), uniform, right=True).clamp(
            max=len(self.parts) - 1
        )

    def _count(self, sources: Tensor) -> Tensor:
        return torch.bincount(sources, minlength=len(self.parts))

    def _counts_before(self, block: int, seed: int) -> Tensor:
        """Draws of each source in the blocks before; kept, so that a long run counts each block once."""
        known = self._drawn.setdefault(seed, [torch.zeros(len(self.parts), dtype=torch.int64)])
        while len(known) <= block:
            known.append(known[-1] + self._count(self._sources(len(known) - 1, seed)))
        return known[block]

    def first(self, count: int) -> list[int]:
        """Indices of the first examples of the sources in turn."""
        ahead = range(max(map(len, self.parts)))
        begins = [0, *self.ends]
        turns = [
            begins[part] + k
            for k in ahead[:count]
            for part in range(len(self.parts))
            if k < len(self.parts[part])
        ]
        return turns[:count]

    def at_most(self, indices: Sequence[int], count: int, generated: bool = False) -> list[int]:
        """The first `count` indices of each source, or of each that is `generated` and all of the others."""
        seen: Counter[int] = Counter()
        kept = []
        for index in indices:
            part, _ = self._place(index)
            seen[part] += 1
            if seen[part] <= count or (generated and isinstance(self.parts[part], StoredDataset)):
                kept.append(index)
        return kept

    def with_headers_only(self) -> MixtureDataset:
        other = copy.copy(self)
        other.parts = [
            part.with_headers_only() if isinstance(part, StoredDataset) else part
            for part in self.parts
        ]
        return other

    def files(self) -> list[Path]:
        """The files of the stored sources."""
        stored = [part for part in self.parts if isinstance(part, StoredDataset)]
        return list(dict.fromkeys(path for part in stored for path in part.files()))

    def counts(self) -> dict[str, str]:
        found = {}
        for name, part, share in zip(self.names, self.parts, self.shares, strict=True):
            rows = "generated"
            if isinstance(part, StoredDataset):
                rows = "; ".join(f"{where}: {text}" for where, text in part.counts().items())
            found[f"{name} ({share:.1%} of the prompts)"] = rows
        return found
