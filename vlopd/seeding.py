"""Named random streams; all randomness is seeded here.

A stream is named by the values that determine it (purpose, the arm's seed, step, process), so a resumed run
draws the same numbers as an uninterrupted one without saving random states.
"""

from __future__ import annotations

import hashlib

import torch


def _derive_seed(*names: str | int) -> int:
    """A 63-bit seed from a stream's name, e.g. ("rollout", 3, 120, 0)."""
    digest = hashlib.sha256(repr(names).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(device: torch.device | str, *names: str | int) -> torch.Generator:
    """A new generator on `device` for the named stream."""
    return torch.Generator(device).manual_seed(_derive_seed(*names))


def uniforms(rows: int, tokens: int, *names: str | int) -> torch.Tensor:
    """[rows, tokens] float64 uniforms of the named stream, on the CPU, one per token to sample.

    Drawn at once, so that a row's samples do not depend on the batch.
    """
    draws = generator("cpu", *names)
    return torch.rand(tokens, rows, generator=draws, dtype=torch.float64).T.contiguous()
