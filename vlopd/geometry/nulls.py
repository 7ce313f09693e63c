"""Null models: what geometry shows when nothing but the size of an update is kept.

Rounding to bf16 hides small changes of large weights, so sparsity, low-magnitude enrichment and
overlap arise from noise too (arXiv 2606.13657's figures included). Every measure therefore stands
beside the same measure of noise with the norm and the stored precision of the observed update.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vlopd.seeding import generator

TOLERANCE = 0.01
"""Relative error of the null's norm at which the search stops."""


def iid_delta(source: Tensor, delta: Tensor, stored: torch.dtype, *stream: str | int) -> Tensor:
    """I.i.d. Gaussian noise with the Frobenius norm of `delta` after rounding to `stored`.

    source, delta: fp32 or wider, one shape. `stream` names the random draw. Rounding swallows part
    of a small update, or enlarges it to whole steps, so the scale of the fixed noise is searched by
    bisection until the rounded norm is within 1 %; where steps are too coarse for that (a few
    coordinates of a small tensor moved by one step), the nearest that was met. A zero delta has a
    zero null.
    """
    target = float(torch.linalg.vector_norm(delta, dtype=torch.float64))
    if target == 0:
        return torch.zeros_like(delta)
    noise = torch.randn(delta.shape, generator=generator("cpu", "null", *stream), dtype=delta.dtype)
    scale = target / float(torch.linalg.vector_norm(noise, dtype=torch.float64))
    low, high = 0.0, math.inf
    best, best_error = torch.zeros_like(delta), 1.0
    for _ in range(50):
        candidate = (source + scale * noise).to(stored).to(delta.dtype) - source
        error = float(torch.linalg.vector_norm(candidate, dtype=torch.float64)) / target - 1
        if abs(error) < best_error:
            best, best_error = candidate, abs(error)
        if best_error <= TOLERANCE:
            break
        if error > 0:
            high = scale
        else:
            low = scale
        scale = 2 * scale if high == math.inf else (low + high) / 2
    return best
