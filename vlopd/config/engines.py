"""Settings of engines: other processes that hold a model's weights."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import field_validator

from vlopd.config.base import Count, Section, between


class ServedEngine(Section):
    """Another process of vlopd that holds the weights (`vlopd serve`), on another device or machine.

    The numbers are those of weights in this process.
    """

    type: Literal["vlopd"] = "vlopd"
    url: str | None = None
    """Address of a running `vlopd serve`, such as "http://127.0.0.1:8100"; null starts one on this machine."""
    device: str | None = None
    """Of the process that is started, such as "cuda:1"; null for its default. Not with url."""
    timeout_seconds: Annotated[float, between(0.1, 1e6)] = 600.0
    """Longest time to wait for one answer."""
    attempts: Count = 6
    """Attempts at a request, at growing intervals, before training stops; its state stays."""

    @field_validator("url")
    @classmethod
    def check_url(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith(("http://", "https://")):
            raise ValueError(f'{url!r} must be an address such as "http://127.0.0.1:8100"')
        return None if url is None else url.rstrip("/")


class ServedRollout(ServedEngine):
    """Another process of vlopd (`vlopd serve` of the student) that samples; it gets what changed after every step."""

    decode: Literal["eager", "static", "graphs"] = "eager"
    """Its decode steps, as of `rollout.engine` without a table."""


EngineConfig = ServedEngine
"""Where a teacher's weights are, if not in this process."""

RolloutEngineConfig = ServedRollout
"""Where completions are sampled, if not in this process."""
