"""`LoadedModel`: a model with its processor, which renders prompts, tokenizes, runs and decodes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from vlopd.errors import ConfigError, DataError, UserError, first_line
from vlopd.models import families, thinking
from vlopd.models.context_length import context_length
from vlopd.models.time_limit import time_limit
from vlopd.models.tokenizers import ANSWER, PROBE, end_ids, missing_row_message, template_text
from vlopd.types import Completions, Example, Prompts

TEMPLATE_SECONDS = 4
"""In which a chat template must render a prompt of one word."""


class ModelUnreadable(ConfigError):
    """A model's config, tokenizer or weights could not be loaded from the given path or hub id."""


@dataclass(frozen=True, repr=False)
class LoadedModel:
    """A model with its processor (or tokenizer): renders prompts, scores and decodes completions."""

    name: str
    model: PreTrainedModel
    processor: Any
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    """The checkpoint folder it was loaded from; None for a model made in memory."""

    def __repr__(self) -> str:
        size, sees = self.model.num_parameters() / 1e6, " with images" if self.sees_images else ""
        return f"{self.name} ({size:,.1f} M parameters{sees})"

    @property
    def tokenizer(self) -> Any:
        return families.tokenizer_of(self.processor)

    @cached_property
    def sees_images(self) -> bool:
        return families.sees_images(self.model.config)

    @property
    def chat_template(self) -> str | None:
        """The processor's template, or its tokenizer's."""
        own = getattr(self.processor, "chat_template", None)
        return own or getattr(self.tokenizer, "chat_template", None)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def vocabulary_rows(self) -> int:
        """Rows of the output layer, padding included."""
        return self.model.get_output_embeddings().weight.shape[0]

    @property
    def hidden_size(self) -> int:
        """H, the input width of the output layer."""
        return self.model.get_output_embeddings().weight.shape[1]

    @cached_property
    def context_length(self) -> int | None:
        """Maximum tokens of prompt and completion together; None without a limit."""
        return context_length(self.model.config)

    @cached_property
    def end_ids(self) -> list[int]:
        """Tokens that end a completion, from the generation config. Raises ConfigError where they are invalid."""
        return end_ids(
            self.name, self.model.generation_config, self.tokenizer, self.vocabulary_rows
        )

    @cached_property
    def turn_end(self) -> int | None:
        """The added token with which the chat template closes an assistant turn, preferably an end token; else None."""
        turns = [("user", PROBE), ("assistant", ANSWER)]
        try:
            text = self.apply_template([self.text_turn(*turn) for turn in turns], False)
        except Exception:  # a template that does not accept these turns
            return None
        after = text.rpartition(ANSWER)[2] if ANSWER in text else ""
        added = {i: word for word, i in self.tokenizer.get_added_vocab().items() if word in after}
        ids = self.tokenizer(after, add_special_tokens=False)["input_ids"]
        closing = [i for i in ids if i in added]
        return next((i for i in closing if i in self.end_ids), next(iter(closing), None))

    @cached_property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.end_ids[0] if pad is None else pad

    @cached_property
    def unsampleable_ids(self) -> list[int]:
        """Ids that a sampler must not emit: image placeholders, padding, and padding rows without a token."""
        named = set(self.tokenizer.get_vocab().values())
        nameless = set(range(self.vocabulary_rows)) - named
        return sorted(nameless | set(families.unsampleable_ids(self.model.config, self.tokenizer)))

    @cached_property
    def placeholders(self) -> dict[str, int]:
        """Placeholder tokens of images, video or audio, with their ids."""
        return families.placeholders(self.model.config, self.tokenizer)

    def apply_template(self, messages: list[Any], add_generation_prompt: bool = True) -> str:
        """Renders messages with this model's chat template, as text. Raises what the template raises."""
        return self.processor.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **self.template_arguments,
        )

    def text_turn(self, role: str, text: str) -> dict[str, Any]:
        """A turn without images, in the form that the chat template expects."""
        return {"role": role, "content": families.as_parts(text) if self.wants_parts else text}

    def prints_user_text(self, content: Any) -> bool | None:
        """Whether the chat template prints a user turn's text given as `content`; None where it raises."""
        slow = ConfigError(
            f"the chat template of {self.name} takes more than {TEMPLATE_SECONDS} seconds to render a word; set "
            "`template` beside its `model` to another"
        )
        try:
            with time_limit(TEMPLATE_SECONDS, slow):
                text = self.apply_template([{"role": "user", "content": content}])
        except UserError:
            raise
        except Exception:
            return None
        return PROBE in text.lower() and not families.is_printed_part(text)

    @cached_property
    def wants_parts(self) -> bool:
        """Whether the chat template omits turns that are plain strings, but prints turns of parts."""
        return not self.prints_user_text(PROBE) and bool(
            self.prints_user_text(families.as_parts(PROBE))
        )

    def render_text(self, example: Example, add_generation_prompt: bool = True) -> str:
        """Renders the example's prompt with this model's chat template, as text."""
        return self.apply_template(
            families.chat_messages(example, self.sees_images, self.placeholders, self.wants_parts),
            add_generation_prompt,
        )

    @cached_property
    def generation_prompt(self) -> str:
        """The generation prompt that the chat template adds before an answer; empty where unknown."""
        probe = Example.ask("", "x")
        try:
            asked, ready = (self.render_text(probe, add) for add in (False, True))
        except Exception:  # for example, a template that requires an image
            return ""
        return ready.removeprefix(asked) if ready.startswith(asked) else ""

    @cached_property
    def own_marks(self) -> tuple[thinking.Mark, ...]:
        """Reasoning delimiters of the tokenizer or the chat template."""
        return thinking.marks_of(self.tokenizer.get_added_vocab(), template_text(self.processor))

    @cached_property
    def marks(self) -> tuple[thinking.Mark, ...]:
        """All reasoning delimiters searched for in completions."""
        return tuple(dict.fromkeys([*thinking.MARKS, *self.own_marks]))

    def encode(self, texts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> Prompts:
        """Rendered prompts with their images -> model inputs, on the model's device. Raises as `tokenize`."""
        return self.tokenize(texts, images).to(self.device, self.model.dtype)

    def tokenize(self, texts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> Prompts:
        """As `encode`, on the CPU."""
        return families.collate(self.processor, self.tokenize_each(texts, images))

    def tokenize_each(
        self, texts: Sequence[str], images: Sequence[Sequence[Image.Image]]
    ) -> list[Prompts]:
        """Rendered prompts with their images -> model inputs of each, on the CPU.

        Raises ConfigError for images and a text-only model, UserError for an empty prompt and for
        a token without a row in the embedding.
        """
        if any(images) and not self.sees_images:
            raise ConfigError(
                f"{self.name} is text-only but the prompt has an image; a text-only teacher needs "
                'teacher.context = {type = "caption", column = ...}, a field with a description of the image'
            )
        prompts = families.encode_each(self.processor, texts, images, self.sees_images)
        self.check_prompts(families.collate(self.processor, [each.text for each in prompts]))
        return prompts

    def collate(self, prompts: Sequence[Prompts]) -> Prompts:
        """Single prompts -> one left-padded batch, on the model's device."""
        return families.collate(self.processor, prompts).to(self.device, self.model.dtype)

    def check_prompts(self, prompts: Prompts) -> None:
        """Raises UserError for a prompt of no tokens, and for a token without a row in the embedding."""
        if not bool(prompts.attention_mask.any(1).all()):
            raise UserError("the rendered prompt is empty: it has no tokens")
        self.check_ids(prompts.input_ids[prompts.attention_mask.bool()])

    def check_ids(self, ids: Tensor) -> None:
        """Raises UserError for a token id without a row in the embedding."""
        rows = self.model.get_input_embeddings().weight.shape[0]
        # some models replace a placeholder without a row by image features
        own = set(self.placeholders.values()) if self.sees_images else set()
        for i in ids.unique().tolist():
            if not 0 <= i < rows and i not in own:
                raise UserError(missing_row_message(self.name, self.tokenizer, i, rows))

    def render(self, examples: Sequence[Example]) -> Prompts:
        """Examples -> model inputs on the model's device, by its template and processor. Raises as `render_each`."""
        return self.collate(self.render_each(examples))

    def prompts_of(self, examples: Sequence[Example]) -> Prompts:
        """As `render`, on the CPU."""
        return families.collate(self.processor, self.render_each(examples))

    def render_each(self, examples: Sequence[Example]) -> list[Prompts]:
        """Examples -> model inputs of each, on the CPU.

        Raises UserError with the example's id where the template or the processor fails on it.
        """
        try:
            return self.tokenize_each(
                [self.render_text(e) for e in examples], [e.images for e in examples]
            )
        except ConfigError:
            raise
        except Exception as error:  # templates and processors raise arbitrary exceptions
            if len(examples) > 1:
                for example in examples:
                    self.render_each([example])
            raise UserError(
                f"example {examples[0].id!r}: {self.name} cannot read its prompt: {first_line(error)}; "
                "if the chat template is at fault, set `template` beside its `model`"
            ) from error

    def check_pictures(self) -> None:
        """Runs the model on a grey picture, before a run depends on it; nothing for a model without images.

        Raises ConfigError where it cannot take what its processor makes of one, UserError where that fails.
        """
        if self.sees_images:
            grey = Image.new("RGB", (224, 224), "grey")
            prompts = self.render([Example.ask("a grey picture", "what is this", images=[grey])])
            families.check_pictures(self.model, prompts)

    def unexpanded_ids(self, example: Example) -> list[int]:
        """The example's prompt, which has images, with one placeholder for each: a server expands them itself."""
        return families.unexpanded_ids(self.processor, self.render_text(example))

    def with_own_processor(self) -> LoadedModel:
        """The same model with a copy of its processor, for another thread: a tokenizer's padding is state."""
        return replace(self, processor=copy.deepcopy(self.processor))

    def refuse_too_long(
        self, examples: Sequence[Example], prompts: Prompts, new_tokens: int
    ) -> None:
        """Raises DataError for the first example whose prompt and `new_tokens` exceed the context length."""
        lengths = prompts.attention_mask.sum(1).tolist()
        for example, length in zip(examples, lengths, strict=True):
            if self.context_length is not None and length + new_tokens > self.context_length:
                raise too_long_error(example.id, length, new_tokens, self)

    def completion_hidden(self, prompts: Prompts, completions: Completions) -> Tensor:
        """[N, H] hidden states that predict each completion token."""
        return families.completion_hidden(self.model, prompts, completions)

    def logits(self, hidden: Tensor, columns: int | Tensor) -> Tensor:
        """[N, H] -> [N, V] logits over the first `columns` tokens of the vocabulary, or over the ids `columns` [V]."""
        return families.logits_of(self.model, hidden, columns)

    def decode(self, completions: Completions, prompts: Prompts | None = None) -> list[str]:
        """Decodes each completion's answer, without special tokens and reasoning; empty if cut off while reasoning.

        `prompts`: those that were completed, which may open a reasoning block; default: the generation prompt of this
        model's template.
        """
        readings = self.read(completions.ids, completions.mask, prompts)
        return [reading.answer.strip() for reading in readings]

    def read(
        self, ids: Tensor, mask: Tensor, prompts: Prompts | None = None
    ) -> list[thinking.Reading]:
        """Splits each row's unmasked tokens into reasoning and answer; `prompts` as in `decode`."""
        if prompts is None:
            opened = [self.opened_by(self.generation_prompt)] * len(ids)
        else:
            opened = self.opened_thoughts(prompts)
        rows = [row[real].tolist() for row, real in zip(ids, mask, strict=True)]
        plain = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        found = []
        for row, text, mark in zip(rows, plain, opened, strict=True):
            reading = thinking.split(self.with_marks(row, text), mark, self.marks)
            found.append(thinking.Reading(None, text) if reading.thought is None else reading)
        return found

    def opened_thoughts(self, prompts: Prompts) -> list[thinking.Mark | None]:
        """The delimiter of the reasoning block that each prompt leaves open, or None."""
        longest = 64 + len(
            self.generation_prompt
        )  # in tokens, which are no more than its characters
        tails = self.tokenizer.batch_decode(prompts.input_ids[:, -longest:].tolist())
        return [self.opened_by(tail) for tail in tails]

    def opened_by(self, prompt: str) -> thinking.Mark | None:
        """The delimiter of the reasoning block that a rendered prompt leaves open, or None."""
        return thinking.opened_by(prompt, self.generation_prompt, self.marks)

    def transcript(self, ids: Sequence[int]) -> str:
        """Decodes a completion without special tokens, except reasoning delimiters."""
        return self.with_marks(ids, self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def with_marks(self, ids: Sequence[int], plain: str) -> str:
        """Inserts the special tokens that delimit reasoning into `plain`, the ids decoded without special tokens."""
        if not any(i in self.mark_tokens for i in ids):
            return plain
        pieces, row = [], []
        for i in (*ids, None):
            if i is not None and i not in self.mark_tokens:
                row.append(i)
                continue
            pieces.append(self.tokenizer.decode(row, skip_special_tokens=True) if row else "")
            pieces.append("" if i is None else self.mark_tokens[i])
            row = []
        return "".join(pieces)

    @cached_property
    def mark_tokens(self) -> dict[int, str]:
        """Special tokens (which decoding drops) that are part of reasoning delimiters, by id."""
        added = self.tokenizer.added_tokens_decoder
        special = {i: str(token) for i, token in added.items() if token.special}
        kept = thinking.kept_tokens(special.values(), self.marks)
        return {i: token for i, token in special.items() if token in kept}


def too_long_error(
    example: str, prompt_tokens: int, new_tokens: int, model: LoadedModel
) -> DataError:
    """The error for an example that exceeds the model's context length."""
    return DataError(
        f"example {example!r}: {prompt_tokens} prompt tokens and up to {new_tokens} of completion "
        f"(rollout.max_new_tokens) are {prompt_tokens + new_tokens}, and {model.name} has "
        f"{model.context_length} positions; shorten or drop the row, or lower rollout.max_new_tokens"
    )
