"""The one place where randomness is seeded.

Every random stream is named by the values that decide it (what it is for, the arm's seed, the step, the
process), so a resumed run draws what an uninterrupted one would without any state being saved.
"""

from __future__ import annotations

import hashlib

import torch


def derive_seed(*names: str | int) -> int:
    """A 63-bit seed from a stream's name, e.g. ("rollout", 3, 120, 0)."""
    digest = hashlib.sha256(repr(names).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(device: torch.device | str, *names: str | int) -> torch.Generator:
    """A fresh generator on `device` for the named stream."""
    return torch.Generator(device).manual_seed(derive_seed(*names))


def uniforms(rows: int, tokens: int, *names: str | int) -> torch.Tensor:
    """[rows, tokens] float64 uniforms of the named stream, on the CPU: one for each token that may be sampled.

    They are all drawn at once, so that what a row samples does not depend on which others are batched with it.
    """
    draws = generator("cpu", *names)
    return torch.rand(tokens, rows, generator=draws, dtype=torch.float64).T.contiguous()
