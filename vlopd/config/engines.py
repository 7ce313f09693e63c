"""Settings of engines: other processes that hold a model's weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from vlopd.config.base import Count, Positive, Section, between
from vlopd.config.explain import NAME, TABLE

Seconds = Annotated[float, between(0.1, 1e6)]


class Engine(Section):
    """Another process that holds a model's weights, started here or joined at an address."""

    url: str | None = None
    """Address of a running server, such as "http://127.0.0.1:8100"; null starts one on this machine."""
    device: str | None = None
    """Of the process that is started, such as "cuda:1"; null for its default. Not with url."""
    timeout_seconds: Seconds = 600.0
    """Longest time to wait for one answer."""
    attempts: Count = 10
    """Attempts at a request, at growing intervals, before training stops; its state stays."""

    @field_validator("url")
    @classmethod
    def check_url(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith(("http://", "https://")):
            raise ValueError(f'{url!r} must be an address such as "http://127.0.0.1:8100"')
        return None if url is None else url.rstrip("/")

    @model_validator(mode="after")
    def check_device(self) -> Engine:
        if self.url is not None and self.device is not None:
            raise ValueError(
                f"device = {self.device!r} is of a server that is started here, and one runs at {self.url}; leave out "
                "device or url"
            )
        return self


class ServedEngine(Engine):
    """Another process of vlopd that holds the weights (`vlopd serve`), on another device or machine.

    The numbers are those of weights in this process.
    """

    type: Literal["vlopd"] = "vlopd"


class ServedRollout(ServedEngine):
    """Another process of vlopd (`vlopd serve` of the student) that samples; it gets what changed after every step."""

    decode: Literal["eager", "static", "graphs"] = "eager"
    """Its decode steps, as of `rollout.engine` without a table."""


class VllmEngine(Engine):
    """A vLLM server that holds the weights.

    It gives log-probs of the completion's tokens and of the teacher's k most likely ones: enough for nll, k1, k2, k3,
    and for a divergence with support = {type = "teacher_top_k"}.
    """

    type: Literal["vllm"]
    python: str | None = None
    """The Python of the environment that vLLM is installed in, such as ".venv-engines/bin/python"; not with url."""
    arguments: tuple[str, ...] = ()
    """Further arguments of the server that is started, such as ["--max-model-len", "8192"]."""
    start_seconds: Seconds = 1800.0
    """Longest time to wait for the server to start."""
    at_once: Count = 64
    """Requests that it gets at a time."""

    @model_validator(mode="after")
    def check_python(self) -> VllmEngine:
        if (self.url is None) == (self.python is None):
            raise ValueError(
                'vllm needs either url = "http://127.0.0.1:8000" of a running server, or python = '
                '".venv-engines/bin/python" to start one with'
            )
        return self


class VllmRollout(VllmEngine):
    """A vLLM server that samples with its own random numbers; it gets the student's weights after every step."""

    weights: Literal["changes", "whole"] = "changes"
    """`changes`: after the first step only what changed, which vLLM's workers merge by an extension of vlopd. `whole`:
    a checkpoint each time, for any server that can reload one."""
    folder: str | None = None
    """Folder through which the weights go, which the server sees too; null for a temporary one on this machine."""
    tolerance: Positive | None = None
    """Largest difference, in nats, between vLLM's and the training's log-probs of fixed completions after an update;
    null: 1e-4 in fp32, 0.5 in bf16."""

    @property
    def decode(self) -> Literal["eager"]:
        """Of decode steps in this process."""
        return "eager"


def _typed(value: Any) -> Any:
    return {"type": "vlopd", **value} if isinstance(value, Mapping) else value


EngineConfig = Annotated[
    Annotated[ServedEngine | VllmEngine, Field(discriminator="type")], BeforeValidator(_typed)
]
"""Where a teacher's weights are, if not in this process."""

Decode = Literal["eager", "static", "graphs"]
"""Decode steps in this process."""

RolloutEngineConfig = Annotated[
    Annotated[Decode, Tag(NAME)]
    | Annotated[
        Annotated[ServedRollout | VllmRollout, Field(discriminator="type")],
        BeforeValidator(_typed),
        Tag(TABLE),
    ],
    Discriminator(lambda value: NAME if isinstance(value, str) else TABLE),
]
"""How or where completions are sampled."""
