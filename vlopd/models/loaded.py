"""A model with its processor: how it renders prompts and reads examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
from vlopd.models.tokenizers import ANSWER, PROBE, end_ids, missing_row_message, template_text
from vlopd.types import Completions, Example, Prompts


class ModelUnreadable(ConfigError):
    """A model's configuration, tokenizer or weights cannot be had, from where its name points."""


@dataclass(frozen=True)
class LoadedModel:
    """A model, its processor (or tokenizer), and how it renders prompts and scores completions."""

    name: str
    model: PreTrainedModel
    processor: Any
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    """Where its weights were read from; None for a model made in memory."""

    @property
    def tokenizer(self) -> Any:
        return families.tokenizer_of(self.processor)

    @cached_property
    def sees_images(self) -> bool:
        return families.sees_images(self.model.config)

    @property
    def chat_template(self) -> str | None:
        """The processor's own, or its tokenizer's."""
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
        """H, of the states that the output layer reads."""
        return self.model.get_output_embeddings().weight.shape[1]

    @cached_property
    def context_length(self) -> int | None:
        """Tokens of prompt and completion together; None where there is no limit."""
        return context_length(self.model.config)

    @cached_property
    def end_ids(self) -> list[int]:
        """Tokens that end a completion, from the generation config. Raises ConfigError where they are none."""
        return end_ids(
            self.name, self.model.generation_config, self.tokenizer, self.vocabulary_rows
        )

    @cached_property
    def turn_end(self) -> int | None:
        """The added token that the chat template closes the model's own turn with, an end if any is; else None."""
        turns = [("user", PROBE), ("assistant", ANSWER)]
        try:
            text = self.apply_template([self.text_turn(*turn) for turn in turns], False)
        except Exception:  # a template that takes no such turns
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
        """Ids that a sampler must not emit: image placeholders, padding, and padded rows without a token."""
        named = set(self.tokenizer.get_vocab().values())
        nameless = set(range(self.vocabulary_rows)) - named
        return sorted(nameless | set(families.unsampleable_ids(self.model.config, self.tokenizer)))

    @cached_property
    def placeholders(self) -> dict[str, int]:
        """Tokens that stand for images, video or audio, with their ids."""
        return families.placeholders(self.model.config, self.tokenizer)

    def apply_template(self, messages: list[Any], add_generation_prompt: bool = True) -> str:
        """Messages in this model's own chat template, as text. Raises what the template raises."""
        return self.processor.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **self.template_arguments,
        )

    def text_turn(self, role: str, text: str) -> dict[str, Any]:
        """A turn without images, as the chat template takes it."""
        return {"role": role, "content": families.as_parts(text) if self.wants_parts else text}

    def prints_user_text(self, content: Any) -> bool | None:
        """Whether the chat template prints a user's words given as `content`; None where it raises."""
        try:
            text = self.apply_template([{"role": "user", "content": content}])
        except Exception:
            return None
        return PROBE in text.lower() and not families.is_printed_part(text)

    @cached_property
    def wants_parts(self) -> bool:
        """Whether the chat template leaves out a turn that is a plain string, and prints one of parts."""
        return not self.prints_user_text(PROBE) and bool(
            self.prints_user_text(families.as_parts(PROBE))
        )

    def render_text(self, example: Example, add_generation_prompt: bool = True) -> str:
        """The example's prompt in this model's own chat template, as text."""
        return self.apply_template(
            families.chat_messages(example, self.sees_images, self.placeholders, self.wants_parts),
            add_generation_prompt,
        )

    @cached_property
    def generation_prompt(self) -> str:
        """What the chat template puts before an answer; empty where it cannot be told."""
        probe = Example.ask("", "x")
        try:
            asked, ready = (self.render_text(probe, add) for add in (False, True))
        except Exception:  # a template that wants a picture, say
            return ""
        return ready.removeprefix(asked) if ready.startswith(asked) else ""

    @cached_property
    def own_marks(self) -> tuple[thinking.Mark, ...]:
        """The marks of thoughts that the tokenizer or the chat template has."""
        return thinking.marks_of(self.tokenizer.get_added_vocab(), template_text(self.processor))

    @cached_property
    def marks(self) -> tuple[thinking.Mark, ...]:
        """All marks that are looked for in its completions."""
        return tuple(dict.fromkeys([*thinking.MARKS, *self.own_marks]))

    def encode(self, texts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> Prompts:
        """Rendered prompts with their images -> model inputs, on the model's device. Raises as `tokenize`."""
        return self.tokenize(texts, images).to(self.device, self.model.dtype)

    def tokenize(self, texts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> Prompts:
        """Rendered prompts with their images -> model inputs, on the CPU.

        Raises ConfigError when images are given to a text-only model, UserError for an empty prompt and for
        a token that the model has no row for.
        """
        if any(images) and not self.sees_images:
            raise ConfigError(
                f"{self.name} is text-only but the prompt has an image; a text-only teacher needs "
                'teacher.context = {type = "caption", column = ...}, a field that says what is in it'
            )
        prompts = families.encode(self.processor, texts, images, self.sees_images)
        self.check_prompts(prompts)
        return prompts

    def check_prompts(self, prompts: Prompts) -> None:
        """Raises UserError for a prompt of no tokens, and for a token without a row in the embedding."""
        if not bool(prompts.attention_mask.any(1).all()):
            raise UserError("the prompt came out empty: it has no tokens")
        self.check_ids(prompts.input_ids[prompts.attention_mask.bool()])

    def check_ids(self, ids: Tensor) -> None:
        """Raises UserError for a token id that the model has no row for."""
        rows = self.model.get_input_embeddings().weight.shape[0]
        # some models read their image's features in place of a token that has no row
        own = set(self.placeholders.values()) if self.sees_images else set()
        for i in ids.unique().tolist():
            if not 0 <= i < rows and i not in own:
                raise UserError(missing_row_message(self.name, self.tokenizer, i, rows))

    def render(self, examples: Sequence[Example]) -> Prompts:
        """Examples -> model inputs, in this model's template, resolution and padding. Raises as `prompts_of`."""
        return self.prompts_of(examples).to(self.device, self.model.dtype)

    def prompts_of(self, examples: Sequence[Example]) -> Prompts:
        """As `render`, on the CPU.

        Raises UserError with the example's id where the template or the processor cannot take it.
        """
        try:
            return self.tokenize(
                [self.render_text(e) for e in examples], [e.images for e in examples]
            )
        except ConfigError:
            raise
        except Exception as error:  # templates and processors raise what they like
            if len(examples) > 1:
                for example in examples:
                    self.prompts_of([example])
            raise UserError(
                f"example {examples[0].id!r}: {self.name} cannot read its prompt: {first_line(error)}; "
                "if its chat template is at fault, set `template` beside its `model`"
            ) from error

    def refuse_too_long(
        self, examples: Sequence[Example], prompts: Prompts, new_tokens: int
    ) -> None:
        """Raises DataError for the first example whose prompt leaves no room for so many more tokens."""
        lengths = prompts.attention_mask.sum(1).tolist()
        for example, length in zip(examples, lengths, strict=True):
            if self.context_length is not None and length + new_tokens > self.context_length:
                raise too_long_error(example.id, length, new_tokens, self)

    def completion_hidden(self, prompts: Prompts, completions: Completions) -> Tensor:
        """[N, H] hidden states that predict each completion token."""
        return families.completion_hidden(self.model, prompts, completions)

    def logits(self, hidden: Tensor, columns: int | Tensor) -> Tensor:
        """[N, H] -> [N, V] logits over the first so many of the vocabulary, or over those ids [V]."""
        return families.logits_of(self.model, hidden, columns)

    def decode(self, completions: Completions, prompts: Prompts | None = None) -> list[str]:
        """Each completion's answer as text, without special tokens and thoughts; empty where a thought was cut off.

        `prompts` are those that were completed, which may have opened a thought; without them, any that this
        model's own template renders.
        """
        readings = self.read(completions.ids, completions.mask, prompts)
        return [reading.answer.strip() for reading in readings]

    def read(
        self, ids: Tensor, mask: Tensor, prompts: Prompts | None = None
    ) -> list[thinking.Reading]:
        """Thought and answer of each row's real tokens; `prompts` as in `decode`."""
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
        """The mark of the thought that each prompt leaves open, None where it leaves none open."""
        longest = 64 + len(
            self.generation_prompt
        )  # in tokens, which are no more than its characters
        tails = self.tokenizer.batch_decode(prompts.input_ids[:, -longest:].tolist())
        return [self.opened_by(tail) for tail in tails]

    def opened_by(self, prompt: str) -> thinking.Mark | None:
        """The mark of the thought that a rendered prompt leaves open."""
        return thinking.opened_by(prompt, self.generation_prompt, self.marks)

    def transcript(self, ids: Sequence[int]) -> str:
        """A completion as text without special tokens, but with the marks of thoughts."""
        return self.with_marks(ids, self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def with_marks(self, ids: Sequence[int], plain: str) -> str:
        """`plain`, the text of the ids without special tokens, with those of them that mark thoughts."""
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
        """Special tokens, which decoding drops, that marks of thoughts are made of; by id."""
        added = self.tokenizer.added_tokens_decoder
        special = {i: str(token) for i, token in added.items() if token.special}
        kept = thinking.kept_tokens(special.values(), self.marks)
        return {i: token for i, token in special.items() if token in kept}


def too_long_error(
    example: str, prompt_tokens: int, new_tokens: int, model: LoadedModel
) -> DataError:
    """The error of an example that a model has no room for."""
    return DataError(
        f"example {example!r}: {prompt_tokens} prompt tokens and up to {new_tokens} of completion "
        f"(rollout.max_new_tokens) are {prompt_tokens + new_tokens}, and {model.name} has "
        f"{model.context_length} positions; shorten or drop the row, or lower rollout.max_new_tokens"
    )
