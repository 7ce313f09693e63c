"""Decode steps of a batch: its cache, positions and masks, by one of three engines.

    eager   transformers' dynamic cache; full-attention layers write into a buffer instead of concatenating, and masks
            are prepared once where the family accepts that
    static  transformers' static cache: tensors of fixed shape
    graphs  the static cache and a CUDA graph of the forward pass, captured again when rows leave

An engine is used for a family that passes a conformance test on a few tokens (`chosen_engine`), else eager.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from vlopd.errors import first_line
from vlopd.models import attention_masks, families
from vlopd.models.loaded import LoadedModel
from vlopd.types import Prompts

Engine = Literal["eager", "static", "graphs"]

SHRINK = {"eager": 0.75, "static": 0.5, "graphs": 0.5}
"""Share of a batch's rows, unfinished, at which the others leave it."""

FIRST_ROOM = 64
"""Tokens for which a cache has room at first beyond the prompts, at least."""

WARM_UP = 2
"""Forward passes before a CUDA graph is captured."""


class BufferedLayer(DynamicLayer):
    """A full-attention cache layer that writes into buffers and returns views of them.

    The buffers grow by half, up to `limit` tokens: nothing is concatenated per token.
    """

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self.buffers: list[Tensor] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends [B, heads, new, width] states; returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.buffers = [
                x.new_empty(*x.shape[:2], 0, x.shape[3]) for x in (key_states, value_states)
            ]
            self.keys, self.values = self.buffers
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        if end > self.buffers[0].shape[2]:
            room = max(end, min(self.limit, end + max(end // 2, FIRST_ROOM)))
            self.buffers = [with_room(x[:, :, :start], room) for x in self.buffers]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Selects rows, any number of times each."""
        super().reorder_cache(beam_idx)
        self.buffers = [self.keys, self.values]


def with_room(states: Tensor, room: int) -> Tensor:
    """[B, heads, n, width] copied to the beginning of a new [B, heads, room, width]."""
    buffer = states.new_empty(*states.shape[:2], room, states.shape[3])
    buffer[:, :, : states.shape[2]] = states
    return buffer


class Decoder:
    """A batch being decoded: `prefill` reads the prompts, `step` one token a row, `select` keeps or repeats rows."""

    def __init__(
        self,
        loaded: LoadedModel,
        prompts: Prompts,
        added: int,
        engine: Engine,
        prepares_masks: bool,
    ) -> None:
        self.engine, self.prepares_masks = engine, prepares_masks
        self.model, self.body = loaded.model, families.backbone(loaded.model)
        self.prompts = prompts
        mask = prompts.attention_mask
        self.seen, self.limit = 0, mask.shape[1] + added
        self.padding = torch.cat([mask, mask.new_ones(len(mask), added)], 1)  # [B, P + added]
        self.where = families.position_ids(self.model, prompts, added)
        config = self.model.config.get_text_config()
        if engine == "eager":
            self.cache: Any = DynamicCache(config=config)
            self.cache.layers = [
                BufferedLayer(self.limit) if type(layer) is DynamicLayer else layer
                for layer in self.cache.layers
            ]
        else:
            self.cache = StaticCache(config=config, max_cache_len=self.limit)
        self.prepared: Tensor | None = None
        self.unmasked = False
        self.captured: Captured | None = None

    def prefill(self) -> Tensor:
        """Runs the prompts: [B, H] hidden states that predict the first tokens."""
        self.seen = self.prompts.input_ids.shape[1]
        now = slice(0, self.seen)
        with families.reading_pictures(self.model, self.prompts):
            out = self.body(
                input_ids=self.prompts.input_ids,
                attention_mask=self.prompts.attention_mask,
                past_key_values=self.cache,
                use_cache=True,
                **{name: values[..., now] for name, values in self.where.items()},
                **self.prompts.per_token,
                **self.prompts.per_image,
            )
        self._prepare()
        return out.last_hidden_state[:, -1]

    def select(self, rows: Tensor) -> None:
        """Goes on with rows [B'] of the batch; a row may occur several times."""
        self.cache.reorder_cache(rows)
        self.padding = self.padding.index_select(0, rows)
        self.where = {name: x.index_select(-2, rows) for name, x in self.where.items()}
        self._prepare()

    def _prepare(self) -> None:
        """Masks and graphs belong to a batch's rows."""
        self.captured, self.prepared, self.unmasked = None, None, False
        if self.prepares_masks:
            self.prepared = attention_masks.prepare(self.model, self.cache, self.padding)
            self.unmasked = self.prepared is not None and attention_masks.needs_none(
                self.model, self.padding
            )

    def _mask(self) -> Any:
        """The mask of the next token, in the form that the model takes."""
        if self.engine != "eager":
            return self.padding  # of fixed shape: the cache's length hides what follows
        if self.unmasked:
            return None
        if self.prepared is None:
            return self.padding[:, : self.seen + 1]
        return attention_masks.at_step(self.model, self.cache, self.prepared)

    def step(self, tokens: Tensor) -> Tensor:
        """Runs tokens [B] that follow: [B, H] hidden states that predict the next ones."""
        now = slice(self.seen, self.seen + 1)
        inputs = {"input_ids": tokens[:, None]}
        inputs.update({name: values[..., now] for name, values in self.where.items()})
        if self.engine == "graphs":
            if self.captured is None:
                self.captured = Captured(self._forward, inputs, self.cache, self.seen)
            hidden = self.captured(inputs)
        else:
            hidden = self._forward(inputs)
        self.seen += 1
        return hidden

    def _forward(self, inputs: dict[str, Tensor]) -> Tensor:
        out = self.body(
            attention_mask=self._mask(), past_key_values=self.cache, use_cache=True, **inputs
        )
        return out.last_hidden_state[:, -1]


class Captured:
    """A CUDA graph of a forward pass over a static cache that holds `seen` tokens, with inputs at fixed addresses.

    So are the weights, which therefore must not move while it lives: one call of `generation.sample`, which a resting
    teacher (offload.Resting) is awake for as a whole, and whose last host sync is after the last replay.
    """

    def __init__(
        self,
        forward: Callable[[dict[str, Tensor]], Tensor],
        inputs: dict[str, Tensor],
        cache: StaticCache,
        seen: int,
    ) -> None:
        self.inputs = {name: value.clone() for name, value in inputs.items()}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                # each pass writes the same place, which the first replay writes again
                forward(self.inputs)
                rewind(cache, seen)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.hidden = forward(self.inputs)

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        """Replays the pass; the result is overwritten by the next replay."""
        for name, value in inputs.items():
            self.inputs[name].copy_(value)
        self.graph.replay()
        return self.hidden


def rewind(cache: StaticCache, seen: int) -> None:
    """Sets the length of a cache of full-attention layers back to `seen` tokens."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(seen)


# ------------------------------------------------------------------------------------------ conformance

FOUND: dict[tuple[object, ...], str | None] = {}
"""(what, kind of model) -> why it cannot be used, None if it can. It depends on no weight's value."""

CONFORMANCE_TOKENS = 4


def chosen_engine(loaded: LoadedModel, engine: Engine) -> tuple[Engine, str | None]:
    """The engine that sampling uses where `engine` is asked for, and why it is another one."""
    if engine == "eager":
        return "eager", None
    why = cached(loaded, engine, lambda: why_not(loaded, engine))
    return (
        (engine, None)
        if why is None
        else ("eager", f"rollout.engine = {engine!r}: {why}; eager instead")
    )


def accepts_prepared_masks(loaded: LoadedModel) -> bool:
    """Whether decode steps with masks prepared once equal those with a padding mask per token."""

    def find() -> str | None:
        plain = decoded(loaded, "eager", False)
        return difference(plain, lambda: decoded(loaded, "eager", True))

    return cached(loaded, "masks", find) is None


def cached(loaded: LoadedModel, what: str, find: Callable[[], str | None]) -> str | None:
    """Looks a finding up by kind of model."""
    model, text = loaded.model, loaded.model.config.get_text_config()
    types = tuple(str(layer) for layer in DynamicCache(config=text).layers)
    about = (text.model_type, text._attn_implementation, model.dtype, model.device.type)
    kind = (what, type(model), *about, types)
    if kind not in FOUND:
        FOUND[kind] = find()
    return FOUND[kind]


def why_not(loaded: LoadedModel, engine: Engine) -> str | None:
    """Why the engine cannot be used for a model, else None."""
    if engine == "graphs" and loaded.device.type != "cuda":
        return "CUDA graphs need a CUDA device"
    try:
        layers = StaticCache(config=loaded.model.config.get_text_config(), max_cache_len=8).layers
    except Exception as error:  # a layer type without a static layer
        return f"{loaded.model.config.model_type} has no static cache ({first_line(error)})"
    if engine == "graphs" and not all(type(layer) is StaticLayer for layer in layers):
        return f"{loaded.model.config.model_type} has layers other than full attention"
    plain = decoded(loaded, "eager", False)
    return difference(plain, lambda: decoded(loaded, engine, False))


def difference(expected: Tensor, run: Callable[[], Tensor]) -> str | None:
    """How the result of `run` differs from the expected hidden states, else None."""
    try:
        found = run()
    except (
        Exception
    ) as error:  # a forward pass that does not take a form of mask or cache raises anything
        return f"the forward pass fails ({first_line(error)})"
    if not bool(torch.isfinite(found).all()):
        return "hidden states are not finite"
    largest = float((found - expected).float().abs().max())
    if largest > (1e-4 if found.dtype == torch.float32 else 3e-2) * float(expected.abs().max()):
        return f"hidden states differ from eager's by {largest:.2g}"
    return None


@torch.no_grad()
def decoded(loaded: LoadedModel, engine: Engine, prepares_masks: bool) -> Tensor:
    """Hidden states [tokens, B, H] of a short decode of two prompts: one padded and repeated, then only the other."""
    allowed = range(min(4096, loaded.vocabulary_rows))
    usable = sorted(set(allowed) - set(loaded.unsampleable_ids) - set(loaded.end_ids))
    ids = torch.tensor((usable * 12)[:12], device=loaded.device).view(2, 6)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    types = {}
    if loaded.model.config.model_type in families.COMPLETION_TYPE:
        types = {"token_type_ids": torch.zeros_like(ids)}
    prompts = Prompts(ids, mask, types)
    decoder = Decoder(loaded, prompts, CONFORMANCE_TOKENS, engine, prepares_masks)
    decoder.prefill()
    decoder.select(torch.tensor([0, 0, 1], device=loaded.device))
    found = []
    for k in range(CONFORMANCE_TOKENS):
        if k == CONFORMANCE_TOKENS // 2:  # only unpadded rows
            decoder.select(torch.tensor([1, 0, 1], device=loaded.device))
        found.append(decoder.step(ids[[0, 1, 1], k]).clone())
    return torch.stack(found)
