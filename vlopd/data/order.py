"""The order of training examples: an endless stream over the data that is reshuffled every epoch."""

from __future__ import annotations

import torch

from vlopd import seeding


def shuffled(n: int, start: int, count: int, *stream: int | str) -> list[int]:
    """Indices at `start` to `start + count` of an endless stream over `range(n)`, reshuffled every epoch.

    A function of its arguments alone, so that a resumed run needs no saved position. `stream` names the random draws.
    """
    indices = []
    epoch, order = -1, torch.empty(0)
    for position in range(start, start + count):
        if position // n != epoch:
            epoch = position // n
            draws = seeding.generator("cpu", "data order", *stream, epoch)
            order = torch.randperm(n, generator=draws)
        indices.append(int(order[position % n]))
    return indices
