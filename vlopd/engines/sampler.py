"""Samples from a copy of the student in another process (`vlopd serve`), whose weights follow the student's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from vlopd.engines.client import Client, Doubtful, EngineError, LostWeights, finite
from vlopd.engines.process import Server
from vlopd.engines.wire import BrokenMessage, pack_prompts, unpack_completions
from vlopd.types import Completions, Example, Prompts

HIGHEST_LOGPROB = 1e-4
"""Above 0 by rounding."""


def ask_for_completions(
    client: Client,
    check_header: Callable[[Mapping[str, Any]], None],
    prompts: Prompts,
    max_new_tokens: int,
    temperature: float,
    uniforms: Tensor,
    columns: int | Tensor,
    top_k: int | None,
    top_p: float,
    banned_ids: Sequence[int],
    rows: Sequence[int] | None,
    engine: str,
) -> Completions:
    """Completions on the CPU, as of train.generation.sample. check_header raises for one that cannot be used.

    Raises EngineError.
    """
    allowed = torch.arange(columns) if isinstance(columns, int) else columns.cpu()
    index = torch.arange(len(prompts)) if rows is None else torch.tensor(list(rows))
    tensors = {**pack_prompts(prompts), "uniforms": uniforms, "columns": allowed, "rows": index}
    about = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "banned_ids": list(banned_ids),
        "engine": engine,
    }

    def check(found: dict[str, Tensor], header: dict[str, Any]) -> None:
        check_header(header)
        try:
            refuse_other_completions(unpack_completions(found), len(index), max_new_tokens, allowed)
        except BrokenMessage as error:
            raise Doubtful(f"its completions cannot be used: {error}") from None

    found, _ = client.ask("/sample", tensors, about, check)
    return unpack_completions(found)


def refuse_other_completions(its: Completions, rows: int, longest: int, allowed: Tensor) -> None:
    """Raises BrokenMessage for completions that no sampler of `rows` prompts over the ids `allowed` [V] writes."""
    n, length = its.ids.shape
    if n != rows or not 0 < length <= longest:
        raise BrokenMessage(
            f"[{n}, {length}] tokens where [{rows}, up to {longest}] were asked for"
        )
    if (its.mask.dtype, its.ended.dtype, its.ids.dtype) != (torch.bool, torch.bool, torch.int64):
        raise BrokenMessage("tensors of other types")
    first = its.mask.long().cumprod(1).bool()
    if not torch.equal(first, its.mask) or not bool(its.mask[:, 0].all()):
        raise BrokenMessage("a mask with gaps")
    if not bool(torch.isin(its.ids[its.mask], allowed).all()):
        raise BrokenMessage("a token outside of the shared vocabulary")
    logprobs = its.logprobs[its.mask]
    if not finite(logprobs) or bool((logprobs > HIGHEST_LOGPROB).any()):
        raise BrokenMessage("log-probs that are none")


class Updates(Protocol):
    """What changed in a student's weights, as of train.weight_updates.WeightUpdates."""

    def forget(self) -> None: ...
    def next(self) -> dict[str, Tensor]: ...
    def checksum(self) -> str: ...
    def state(self) -> dict[str, Tensor]: ...


class Sampler:
    """A student's copy behind `vlopd serve`. session: a name of the training that no other has. server: the process
    that was started for it, if any.

    After `send`, completions are of exactly those weights: the engine's checksum over all its parameters is the
    student's, and every answer names the version.
    """

    def __init__(self, client: Client, session: str, server: Server | None = None):
        self.client, self.session, self.server = client, session, server
        self.version = -1

    def send(self, version: int, updates: Updates, first: bool) -> int:
        """Brings the copy to a version; returns the bytes that were sent. first: from the checkpoint's weights.

        Raises LostWeights where the engine does not hold the version before, EngineError.
        """
        before = None if first else self.version
        if first:
            updates.forget()
        update, checksum = updates.next(), updates.checksum()
        about = {"session": self.session, "version": version, "before": before}

        def check(_: dict[str, Tensor], header: dict[str, Any]) -> None:
            if header.get("lost"):
                raise LostWeights
            if header.get("version") != version or header.get("session") != self.session:
                raise Doubtful("it did not take the weights")
            if header.get("checksum") != checksum:
                raise LostWeights

        self.client.ask("/weights", update, about, check)
        self.version = version
        return sum(tensor.nbytes for tensor in update.values())

    def sample(
        self,
        prompts: Prompts,
        *arguments: Any,
        device: torch.device,
        examples: Sequence[Example] | None = None,
    ) -> Completions:
        """As train.generation.sample, with its arguments after the prompts. Raises LostWeights, EngineError."""

        def check(header: Mapping[str, Any]) -> None:
            held = header.get("session"), header.get("version")
            if held[0] not in (None, self.session):
                raise EngineError(
                    f"{self.client.url} serves another training now; each needs a `vlopd serve` of its own"
                )
            if held != (self.session, self.version):
                raise LostWeights

        return ask_for_completions(self.client, check, prompts, *arguments).to(device)
