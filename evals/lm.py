"""The one lm-eval model class for our loaded models, text and image alike.

Prompts go through the model's own template and processor exactly as in training, and generation through
the sampler that training uses, at temperature 0. Text and image requests may come in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from PIL import Image
from tqdm import tqdm

from vlopd.config import ConfigError
from vlopd.losses import logprobs_at
from vlopd.models.load import LoadedModel
from vlopd.rollout import sample
from vlopd.types import Completions, Example, Prompts, parts_at_marks

PLACEHOLDER = "<image>"
"""How lm-eval's image tasks mark an image in a prompt, whatever the model's own token is."""

DEFAULT_MAX_GEN_TOKS = 256


class ArmLM(LM):
    """Scores one loaded model; results do not depend on the batch size in fp32."""

    MULTIMODAL = True  # lm-eval asks before it hands out requests with pictures

    def __init__(
        self, loaded: LoadedModel, batch_size: int = 16, title: str = "", quiet: bool = False
    ):
        super().__init__()
        self.loaded, self.batch_size, self.title, self.quiet = loaded, batch_size, title, quiet
        self._device = loaded.device

    @property
    def tokenizer_name(self) -> str:
        return self.loaded.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template's text, for lm-eval's record."""
        processor = self.loaded.processor
        return getattr(processor, "chat_template", None) or self.loaded.tokenizer.chat_template

    def apply_chat_template(
        self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """Messages whose text marks images with <image>, as this model's own prompt."""
        messages = [{**turn, "content": parts(turn["content"])} for turn in chat_history]
        return self.loaded.render_text(Example("", tuple(messages)), add_generation_prompt)

    # ------------------------------------------------------------------------------ lm-eval's requests

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, cut at the first stop string of each request."""

        def answer(batch: Sequence[Instance]) -> list[str]:
            longest = max(r.args[1].get("max_gen_toks", DEFAULT_MAX_GEN_TOKS) for r in batch)
            completions = sample(self.loaded, self.encode(batch), longest, temperature=0)
            texts = self.loaded.decode(completions)
            return [cut(t, r.args[1].get("until") or []) for t, r in zip(texts, batch, strict=True)]

        for request in requests:
            kwargs = request.args[1]
            if kwargs.get("do_sample") or kwargs.get("temperature", 0.0) > 0:
                raise ConfigError(f"task {request.task_name}: only greedy generation is supported")
        return self.in_batches(
            requests, answer, disable_tqdm, key=lambda r: r.args[1].get("max_gen_toks", 0)
        )

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether greedy decoding would say it)."""

        def score(batch: Sequence[Instance]) -> list[tuple[float, bool]]:
            rows = [self.continuation_ids(r.args[0], r.args[1]) for r in batch]
            return self.score(self.encode(batch), rows)

        return self.in_batches(requests, score, disable_tqdm)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of whole texts, in windows of the model's context length."""
        totals = []
        longest = self.loaded.model.config.get_text_config().max_position_embeddings
        prefix = self.loaded.tokenizer.bos_token_id or self.loaded.end_ids[0]
        for request in tqdm(requests, disable=disable_tqdm or self.quiet, desc=self.title):
            ids = self.loaded.tokenizer(request.args[0], add_special_tokens=False)["input_ids"]
            windows = map(
                make_disjoint_window, get_rolling_token_windows(ids, prefix, longest - 1, 1)
            )
            total = 0.0
            for context, continuation in windows:
                context_ids = torch.tensor([context], device=self.device)
                prompts = Prompts(context_ids, torch.ones_like(context_ids))
                total += self.score(prompts, [continuation])[0][0]
            totals.append(total)
        return totals

    # ----------------------------------------------------------------------------------------- helpers

    def in_batches(
        self,
        requests: Sequence[Instance],
        answer: Callable[[Sequence[Instance]], list[Any]],
        disable_tqdm: bool,
        key: Callable[[Instance], int] = lambda r: 0,
    ) -> list[Any]:
        """Batches of like kind (images or not, then `key`), longest prompt first; answers in request order."""
        order = sorted(
            range(len(requests)),
            key=lambda i: (has_images(requests[i]), key(requests[i]), -len(requests[i].args[0])),
        )
        answers: list[Any] = [None] * len(requests)
        with tqdm(
            total=len(requests),
            disable=disable_tqdm or self.quiet,
            desc=self.title,
            unit="question",
        ) as bar:
            start = 0
            while start < len(order):
                kind = has_images(requests[order[start]])
                batch = order[start : start + self.batch_size]
                batch = [i for i in batch if has_images(requests[i]) == kind]
                for i, value in zip(batch, answer([requests[i] for i in batch]), strict=True):
                    answers[i] = value
                start += len(batch)
                bar.update(len(batch))
        return answers

    def encode(self, batch: Sequence[Instance]) -> Prompts:
        images = [images_of(request) for request in batch]
        return self.loaded.encode([request.args[0] for request in batch], images)

    def continuation_ids(self, context: str, continuation: str) -> list[int]:
        """The continuation's tokens as they come after the context (lm-eval's convention)."""
        spaces = len(context) - len(context.rstrip())
        if spaces:
            continuation, context = context[-spaces:] + continuation, context[:-spaces]
        encode = self.loaded.tokenizer
        whole = encode(context + continuation, add_special_tokens=False)["input_ids"]
        return whole[len(encode(context, add_special_tokens=False)["input_ids"]) :]

    @torch.no_grad()
    def score(self, prompts: Prompts, rows: list[list[int]]) -> list[tuple[float, bool]]:
        """Total log-probability and greedy agreement of given tokens after each prompt."""
        length = max(map(len, rows))
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        mask = torch.zeros(len(rows), length, dtype=torch.bool)
        for k, row in enumerate(rows):
            ids[k, : len(row)] = torch.tensor(row)
            mask[k, : len(row)] = True
        ids, mask = ids.to(self.device), mask.to(self.device)
        given = Completions(
            ids, mask, torch.zeros(ids.shape), torch.ones(len(rows), dtype=torch.bool)
        )
        hidden = self.loaded.completion_hidden(prompts, given)
        logits = self.loaded.logits(hidden, self.loaded.vocabulary_rows).float()
        logprobs = logprobs_at(logits, ids[mask])
        greedy = logits.argmax(-1) == ids[mask]
        counts = mask.sum(1).tolist()
        return [
            (float(values.double().sum()), bool(agrees.all()))
            for values, agrees in zip(logprobs.split(counts), greedy.split(counts), strict=True)
        ]


def parts(content: str | list[Any]) -> str | list[Any]:
    """`<image>how many` -> an image part and a text part; text without a mark stays a string."""
    if not isinstance(content, str) or PLACEHOLDER not in content:
        return content
    return parts_at_marks(content, PLACEHOLDER)


def has_images(request: Instance) -> bool:
    return bool(images_of(request))


def images_of(request: Instance) -> list[Image.Image]:
    if len(request.args) < 3:
        return []
    return [image.convert("RGB") for image in request.args[2].get("visual") or []]


def cut(text: str, until: str | Sequence[str]) -> str:
    for stop in [until] if isinstance(until, str) else until:
        if stop:
            text = text.split(stop)[0]
    return text
