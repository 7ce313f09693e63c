"""Small frozen data types shared by all stages, and the legend of dimension letters.

Letters used in shapes everywhere:
    B sequences   P prompt tokens (padded)   C completion tokens (padded)   T = P + C
    N flat completion tokens of a batch      V shared vocabulary            H hidden size
    K trained coordinates                    m x n a weight matrix          r = min(m, n)

Log-probs are in nats. Names carry units: `_logprobs`, `_seconds`, `_fraction` in [0, 1], `_bytes`.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Example:
    """One prompt, as chat messages, with its images in the order of their image parts.

    >>> Example.ask("q1", "how many red", images=(img,), answer="top-left : 1").messages
    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "how many red"}]}]
    """

    id: str
    messages: tuple[Mapping[str, Any], ...]
    images: tuple[Image.Image, ...] = ()
    answer: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def ask(
        id: str,
        question: str,
        images: Sequence[Image.Image] = (),
        answer: str | None = None,
        fields: Mapping[str, Any] | None = None,
    ) -> Example:
        """An example with a single user turn: the images first, then the question."""
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": question}]
        message = {"role": "user", "content": content}
        return Example(id, (message,), tuple(images), answer, fields or {})

    @property
    def question(self) -> str:
        """The text of the last user turn."""
        content = self.messages[-1]["content"]
        if isinstance(content, str):
            return content
        return " ".join(part["text"] for part in content if part["type"] == "text")

    def _repr_html_(self) -> str:
        """The images, the question and the answer, for a notebook."""
        cells = []
        for image in self.images:
            png = io.BytesIO()
            image.save(png, "png")
            source = base64.b64encode(png.getvalue()).decode()
            cells.append(
                f'<img src="data:image/png;base64,{source}" style="max-height: 14em; image-rendering: auto">'
            )
        cells.append(f"<b>{escape(self.question)}</b>")
        cells += [] if self.answer is None else [f"{escape(self.answer)}"]
        return f"<div><code>{escape(self.id)}</code><br>{'<br>'.join(cells)}</div>"


def parts_at_marks(text: str, mark: str) -> list[dict[str, str]]:
    """Splits a text at image marks into message parts.

    >>> parts_at_marks("<image>how many red", "<image>")
    [{"type": "image"}, {"type": "text", "text": "how many red"}]
    """
    parts: list[dict[str, str]] = []
    for k, piece in enumerate(text.split(mark)):
        parts += [{"type": "image"}] if k else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts as inputs of one model, left-padded. Each model of a pair has its own.

    `per_token` holds further per-token inputs of the model's forward ([B, P], extended over the completion by
    families.py), `per_image` the per-image inputs (concatenated on dim 0). Both are opaque outside
    models/families.py.

    Worked example, two prompts, of 3 and 2 tokens, one image each:
        input_ids      [[1, 5, 9], [0, 1, 7]]
        attention_mask [[1, 1, 1], [0, 1, 1]]
        per_image      {"pixel_values": [2, 3, 48, 48]}
    """

    input_ids: Tensor  # [B, P] int64
    attention_mask: Tensor  # [B, P] int64, 1 on real tokens
    per_token: Mapping[str, Tensor] = field(default_factory=dict)
    per_image: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def n_tokens(self) -> int:
        return int(self.attention_mask.sum())

    @property
    def text(self) -> Prompts:
        """Token ids and mask alone."""
        return Prompts(self.input_ids, self.attention_mask)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Prompts:
        """Moves to a device; floating-point entries (pixels) are cast to the model's dtype."""
        return Prompts(
            self.input_ids.to(device),
            self.attention_mask.to(device),
            {k: v.to(device) for k, v in self.per_token.items()},
            {
                k: v.to(device, dtype) if v.is_floating_point() else v.to(device)
                for k, v in self.per_image.items()
            },
        )


@dataclass(frozen=True)
class Completions:
    """Sampled tokens, shared by student and teacher.

    Worked example, eos = 2, pad = 0; the second row was truncated at the length limit:
        ids      [[5, 2, 0], [6, 7, 8]]
        mask     [[1, 1, 0], [1, 1, 1]]   true up to and including the first end token
        logprobs [[-.1, -.2, 0], [...]]   the sampler's log-probability of each token, 0 on padding
    """

    ids: Tensor  # [B, C] int64
    mask: Tensor  # [B, C] bool
    logprobs: Tensor  # [B, C] float32
    ended: Tensor  # [B] bool, an end token was sampled before the length limit

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def n_tokens(self) -> int:
        return int(self.mask.sum())

    def to(self, device: torch.device) -> Completions:
        """On a device."""
        return Completions(*(column.to(device) for column in vars(self).values()))

    def take(self, rows: Sequence[int]) -> Completions:
        """Selects rows; returns the same object for all of them in order."""
        if list(rows) == list(range(len(self))):
            return self
        index = torch.tensor(rows, dtype=torch.long, device=self.ids.device)
        return Completions(
            self.ids[index], self.mask[index], self.logprobs[index], self.ended[index]
        )

    def trimmed(self) -> Completions:
        """Without the columns after the longest completion."""
        longest = int(self.mask.sum(1).max())
        if longest == self.ids.shape[1]:
            return self
        columns = (self.ids[:, :longest], self.mask[:, :longest], self.logprobs[:, :longest])
        return Completions(*columns, self.ended)

    @staticmethod
    def joined(parts: Sequence[tuple[Sequence[int], Completions]], pad_id: int) -> Completions:
        """Merges (row indices, completions) into one batch in row order, padded to the longest."""
        if len(parts) == 1:
            return parts[0][1]
        n, longest = sum(len(c) for _, c in parts), max(c.ids.shape[1] for _, c in parts)
        first = parts[0][1]
        ids = first.ids.new_full((n, longest), pad_id)
        mask = first.mask.new_zeros(n, longest)
        logprobs = first.logprobs.new_zeros(n, longest)
        ended = first.ended.new_zeros(n)
        for rows, part in parts:
            index = torch.tensor(rows, dtype=torch.long, device=ids.device)
            ids[index, : part.ids.shape[1]] = part.ids
            mask[index, : part.ids.shape[1]] = part.mask
            logprobs[index, : part.ids.shape[1]] = part.logprobs
            ended[index] = part.ended
        return Completions(ids, mask, logprobs, ended)


@dataclass(frozen=True)
class TensorName:
    """A parameter's component (vision, projector, language, embedding, head), layer and module.

    >>> model.language_model.layers.3.mlp.up_proj.weight -> TensorName(..., "language", 3, "up")
    """

    name: str
    component: str
    layer: int | None
    module: str
