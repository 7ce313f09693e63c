"""Loads one model with its own processor: a hub id, a local folder, or `builtin:NAME`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from jinja2 import Environment, TemplateSyntaxError, meta
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation
from transformers.utils.peft_utils import find_adapter_config_file

from vlopd.bits import holds, widest
from vlopd.config import TEMPLATE_NAMES, ConfigError, DataError, ModelConfig, UserError
from vlopd.models import families, gguf, openclip_vlm, smollm2, thoughts, whole
from vlopd.models.about import first_line
from vlopd.models.length import context_length
from vlopd.types import Completions, Example, Prompts

BUILTIN = Path(__file__).parents[1] / "builtin"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

TOKENIZER_FILES = (
    "; copy tokenizer.json, tokenizer_config.json and what lies beside them (a processor_config.json, for images) "
    "from the model's own folder"
)

PROBE, ANSWER = "zyzzyva", "quokka"
"""What a chat template is tried with: words that no template has of its own."""


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

    def shows(self, content: Any) -> bool | None:
        """Whether the chat template prints a user's words given as `content`; None where it raises."""
        try:
            text = self.apply_template([{"role": "user", "content": content}])
        except Exception:
            return None
        return PROBE in text.lower() and not families.is_printed_part(text)

    @cached_property
    def wants_parts(self) -> bool:
        """Whether the chat template leaves out a turn that is a plain string, and prints one of parts."""
        return not self.shows(PROBE) and bool(self.shows(families.as_parts(PROBE)))

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
    def own_marks(self) -> tuple[thoughts.Mark, ...]:
        """The marks of thoughts that the tokenizer or the chat template has."""
        return thoughts.marks_of(self.tokenizer.get_added_vocab(), template_text(self.processor))

    @cached_property
    def marks(self) -> tuple[thoughts.Mark, ...]:
        """All marks that are looked for in its completions."""
        return tuple(dict.fromkeys([*thoughts.MARKS, *self.own_marks]))

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
                raise UserError(no_row(self.name, self.tokenizer, i, rows))

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
                raise too_long(example.id, length, new_tokens, self)

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
    ) -> list[thoughts.Reading]:
        """Thought and answer of each row's real tokens; `prompts` as in `decode`."""
        if prompts is None:
            opened = [self.opened_by(self.generation_prompt)] * len(ids)
        else:
            opened = self.opened_thoughts(prompts)
        rows = [row[real].tolist() for row, real in zip(ids, mask, strict=True)]
        plain = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        found = []
        for row, text, mark in zip(rows, plain, opened, strict=True):
            reading = thoughts.split(self.with_marks(row, text), mark, self.marks)
            found.append(thoughts.Reading(None, text) if reading.thought is None else reading)
        return found

    def opened_thoughts(self, prompts: Prompts) -> list[thoughts.Mark | None]:
        """The mark of the thought that each prompt leaves open, None where it leaves none open."""
        longest = 64 + len(
            self.generation_prompt
        )  # in tokens, which are no more than its characters
        tails = self.tokenizer.batch_decode(prompts.input_ids[:, -longest:].tolist())
        return [self.opened_by(tail) for tail in tails]

    def opened_by(self, prompt: str) -> thoughts.Mark | None:
        """The mark of the thought that a rendered prompt leaves open."""
        return thoughts.opened_by(prompt, self.generation_prompt, self.marks)

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
        kept = thoughts.kept_tokens(special.values(), self.marks)
        return {i: token for i, token in special.items() if token in kept}


def too_long(example: str, prompt_tokens: int, new_tokens: int, model: LoadedModel) -> DataError:
    """The error of an example that a model has no room for."""
    return DataError(
        f"example {example!r}: {prompt_tokens} prompt tokens and up to {new_tokens} of completion "
        f"(rollout.max_new_tokens) are {prompt_tokens + new_tokens}, and {model.name} has "
        f"{model.context_length} positions; shorten or drop the row, or lower rollout.max_new_tokens"
    )


def resolve(name: str) -> str:
    """A path or hub id. `builtin:NAME` becomes the packaged folder; a .gguf file its dequantised copy.

    Raises ConfigError for an unknown built-in.
    """
    if name.endswith(".gguf"):
        return str(gguf.converted(Path(name)))
    if not name.startswith("builtin:"):
        return name
    short = name.removeprefix("builtin:")
    if short in smollm2.NAMES:
        return str(smollm2.folder(short))
    if (BUILTIN / short / "config.json").is_file():
        return str(BUILTIN / short)
    shipped = [path.name for path in sorted(BUILTIN.iterdir()) if path.is_dir()]
    known = ", ".join(f"builtin:{each}" for each in [*shipped, *smollm2.NAMES])
    raise ConfigError(f"no built-in model {name!r}; there are {known}")


def load_model_config(
    name: str, revision: str | None = None, trust_remote_code: bool = False
) -> PretrainedConfig:
    """The model's configuration, without weights.

    Raises ModelUnreadable when it cannot be read, ConfigError where it is of an adapter or of packed weights.
    """
    openclip_vlm.register()
    where = resolve(name)
    try:
        adapter = find_adapter_config_file(where, revision=revision)
        config = None
        if adapter is None:
            config = AutoConfig.from_pretrained(
                where, revision=revision, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # configurations check themselves, and raise what they like
        if is_nowhere(where, revision):
            raise ModelUnreadable(
                f"cannot read the configuration of {name!r}: there is no such folder, and as a model id of the hub "
                "it is not in the cache and could not be fetched"
            ) from None
        raise unreadable(f"read the configuration of {name!r}", error) from None
    if config is None:
        raise ConfigError(
            f"{name} is an adapter (it has {whole.ADAPTER}), not a model; merge it into its base (PEFT's "
            "merge_and_unload, then save_pretrained) and give the merged folder"
        )
    if packed := whole.quantisation(config.to_dict()):
        raise ConfigError(f"{name} is quantised: {packed}")
    return config


def is_nowhere(where: str, revision: str | None) -> bool:
    """Whether there is neither a folder or file of that name nor a hub's model in the cache."""
    if Path(where).exists():
        return False
    try:
        return try_to_load_from_cache(where, "config.json", revision=revision) is None
    except HFValidationError:  # no name of a hub's model
        return True


def unreadable(what: str, error: Exception, remedy: str = "") -> ModelUnreadable:
    """What a library raised over a user's file, as one line of ours with its remedy where there is one."""
    said = str(error)
    if "trust_remote_code" in said:
        remedy = "; set trust_remote_code = true beside its `model` if you trust its code"
    elif "sdpa" in said:
        remedy = '; set attention = "eager" beside its `model`'
    return ModelUnreadable(f"cannot {what}: {first_line(error)}{remedy}")


def load_processor(
    name: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    template: str | None = None,
    template_arguments: Mapping[str, Any] | None = None,
) -> Any:
    """The processor of a vision-language model, or the tokenizer of a language model.

    `template` takes the place of its chat template: a .jinja file, or `plain`.

    Raises ConfigError when it cannot be read, has no chat template, or one that knows none of the arguments.
    """
    config = load_model_config(name, revision, trust_remote_code)
    _, processor_class = families.auto_classes(config)
    try:
        processor = processor_class.from_pretrained(
            resolve(name), revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # processors raise what they like
        raise unreadable(
            f"read the tokenizer or processor of {name!r}", error, TOKENIZER_FILES
        ) from None
    if lacks := families.lacking(processor, families.sees_images(config)):
        raise ModelUnreadable(
            f"cannot read the tokenizer or processor of {name!r}: its files hold {lacks}{TOKENIZER_FILES}"
        )
    if template is not None:
        families.set_template(processor, read_template(template))
    if (
        families.tokenizer_of(processor).chat_template is None
        and getattr(processor, "chat_template", None) is None
    ):
        raise ConfigError(
            f'{name!r} has no chat template; set template = "plain" (bare text) or a .jinja file '
            "beside its `model`"
        )
    check_template_arguments(name, template_text(processor), template_arguments or {})
    return processor


def template_text(processor: Any) -> str:
    """The chat template that renders prompts; of several, the default one."""
    template = getattr(processor, "chat_template", None)
    template = template or families.tokenizer_of(processor).chat_template or ""
    return template.get("default", "") if isinstance(template, dict) else str(template)


def check_template_arguments(name: str, template: str, arguments: Mapping[str, Any]) -> None:
    """Raises ConfigError for an argument that the model's chat template never mentions: it would change nothing."""
    if not arguments:
        return
    # transformers' own tag, which says nothing of names
    plain = re.sub(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}", "", template)
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        known = meta.find_undeclared_variables(environment.parse(plain))
    except TemplateSyntaxError:
        return  # rendering says what is wrong with it
    known -= {*TEMPLATE_NAMES}
    for argument in arguments:
        if argument in known:
            continue
        near = get_close_matches(argument, known, 3, 0.4) or sorted(known)
        has = f"it has {', '.join(near)}" if near else "it has none"
        raise ConfigError(
            f"template_arguments: the chat template of {name!r} has no argument {argument!r}; {has}"
        )


def read_template(template: str) -> str:
    """The text of a chat template: a file's, or our plain one."""
    if template == "plain":
        return families.PLAIN_TEMPLATE
    try:
        return Path(template).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read the chat template {template!r} ({first_line(error)}); "
            'give a .jinja file, or "plain"'
        ) from None


def load_generation_config(name: str, config: PretrainedConfig, revision: str | None = None) -> Any:
    """The model's generation config, without weights; made from its configuration where it has none."""
    where = resolve(name)
    try:
        return GenerationConfig.from_pretrained(where, revision=revision)
    except Exception as error:
        if isinstance(error, OSError) and not (Path(where) / "generation_config.json").exists():
            return GenerationConfig.from_model_config(config)
        raise unreadable(f"read the generation_config.json of {name!r}", error) from None


def end_ids(name: str, generation: Any, tokenizer: Any, rows: int) -> list[int]:
    """Tokens that end a completion: the generation config's, or the tokenizer's.

    Raises ConfigError where there are none, or one is outside the vocabulary of `rows`.
    """
    ends = generation.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    ends = list(ends) if isinstance(ends, (list, tuple)) else [ends]
    wrong = [i for i in ends if type(i) is not int or not 0 <= i < rows]
    if wrong or not ends:
        what = "no eos_token_id" if ends in ([], [None]) else f"eos_token_id {wrong[0]!r}"
        raise ConfigError(
            f"{name} has {what}, and ids are 0 to {rows - 1}: no completion would end; set eos_token_id in its "
            "generation_config.json to the ids of the tokens that end a turn"
        )
    return ends


def no_row(name: str, tokenizer: Any, i: int, rows: int) -> str:
    """Says that a token has no row in the model's embedding, and what to do."""
    return (
        f"token {tokenizer.convert_ids_to_tokens(i)!r} {i} has no row in the {rows} of {name}; give the "
        "tokenizer that the model was trained with, or resize the model (resize_token_embeddings)"
    )


def load(
    name: str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    attention: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    template: str | None = None,
    template_arguments: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Loads weights from safetensors only, in `dtype`, in evaluation mode (no dropout).

    Raises ConfigError naming the model, and the tensor or token, where it is not whole: a file that is missing,
    truncated or pickled, tensors that are missing, packed, not finite or another model's, an adapter, no
    tokenizer, end tokens that are none, a chat template that leaves out the user's words.
    """
    check_builtin(name)
    config = load_model_config(name, revision, trust_remote_code)
    model_class, _ = families.auto_classes(config)
    processor = load_processor(name, revision, trust_remote_code, template, template_arguments)
    # for its errors: transformers passes over a file that it cannot read
    load_generation_config(name, config, revision)
    where = resolve(name)
    is_folder = Path(where).is_dir()
    if is_folder:
        check_files(name, Path(where))
    try:
        model, loading = model_class.from_pretrained(
            where,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            revision=revision,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # whole.refuse_partial names them
        )
        if not is_folder:
            where = snapshot_download(where, revision=revision, local_files_only=True)
    except Exception as error:  # loaders raise what they like
        raise unreadable(f"load the weights of {name!r}", error) from None
    if not is_folder:
        check_files(name, Path(where))
    whole.refuse_partial(name, loading, model)
    model = model.to(device).eval()
    whole.refuse_not_finite(name, model)
    families.check_logits(model)
    loaded = LoadedModel(name, model, processor, template_arguments or {}, Path(where))
    check_tokens(loaded)
    return loaded


def check_unloaded(config: ModelConfig) -> None:
    """Refuses what can be seen of a model without reading its weights."""
    where_from = (config.model, config.revision, config.trust_remote_code)
    load_processor(*where_from, config.template, config.template_arguments)
    where = Path(resolve(config.model))
    if where.is_dir():
        check_files(config.model, where)


def check_files(name: str, folder: Path) -> None:
    """Refuses weights that are damaged, packed, or short of a part of an expert; reads headers only."""
    stored = whole.read_headers(folder)
    if packed := whole.packing(stored):
        raise ConfigError(f"{name} is quantised: {packed}")
    if odd := whole.not_real(stored):
        raise ConfigError(f"{name}: {odd}")
    if short := whole.ragged(stored):
        raise ConfigError(f"{name} is not whole: {short}")


def check_tokens(loaded: LoadedModel) -> None:
    """Refuses a model whose tokenizer and template are not of its vocabulary, or say nothing of the user's words."""
    name, tokenizer, rows = loaded.name, loaded.tokenizer, loaded.vocabulary_rows
    if set(loaded.end_ids) <= set(loaded.unsampleable_ids):
        raise ConfigError(
            f"{name}: none of its end tokens {loaded.end_ids} can be sampled (padding, images and ids without "
            "a token never are), so no completion would end; set eos_token_id in its generation_config.json"
        )
    added = tokenizer.get_added_vocab()
    ordinary = {i for word, i in tokenizer.get_vocab().items() if word not in added}
    if ordinary and max(ordinary) >= rows:
        lost = sum(i >= rows for i in ordinary)
        raise ConfigError(
            f"{no_row(name, tokenizer, max(ordinary), rows)} ({lost} of {len(ordinary)} ordinary tokens have none)"
        )
    if not 0 <= loaded.pad_id < rows:
        raise ConfigError(f"padding: {no_row(name, tokenizer, loaded.pad_id, rows)}")
    shown = [loaded.shows(content) for content in (PROBE, families.as_parts(PROBE))]
    if not any(shown) and False in shown:
        raise ConfigError(
            f"the chat template of {name} leaves out what the user says; set `template` beside its `model` to a "
            '.jinja file, or "plain"'
        )
    if any(shown):
        text = loaded.apply_template([loaded.text_turn("user", PROBE)])
        loaded.check_ids(torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]))


def load_configured(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    folder: Path | str | None = None,
) -> LoadedModel:
    """The model that a config names or, with `folder`, a checkpoint of it, loaded in the same way."""
    return load(
        str(folder or config.model),
        dtype,
        device,
        attention=config.attention,
        revision=None if folder else config.revision,
        trust_remote_code=config.trust_remote_code,
        template=config.template,
        template_arguments=config.template_arguments,
    )


def save(
    loaded: LoadedModel, folder: Path, card: str, state: dict[str, Tensor] | None = None
) -> None:
    """Writes a Hugging Face folder: weights (`state` in place of the model's own), configs, processor, card.

    `card` is the text of the model card. Tensor names are the model's own, so that masks, deltas and
    checkpoints share one naming. config.json states the dtype that loads the weights as they are (`reload_dtype`),
    whatever the dtype of the model in memory.

    Raises UserError for a tensor of `state` with values that its dtype cannot hold.
    """
    refuse_overflow(state or {})
    dtype = reload_dtype(loaded.model, state or loaded.model.state_dict())
    before = loaded.model.config.dtype
    try:
        loaded.model.save_pretrained(folder, state_dict=state, save_original_format=False)
    finally:
        loaded.model.config.dtype = before
    write_dtype(folder / "config.json", dtype)
    loaded.processor.save_pretrained(folder)
    (folder / "README.md").write_text(card)


def refuse_overflow(state: Mapping[str, Tensor]) -> None:
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            bad = int((~tensor.isfinite()).sum())
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(
                f"{name}: {bad} of {tensor.numel()} values are not finite in {kind}, in which it is to be stored; "
                'set precision.stored = "fp32", or lower the learning rate (or factor) that moved them'
            )


def reload_dtype(model: PreTrainedModel, state: Mapping[str, Tensor]) -> torch.dtype:
    """The narrowest dtype under which transformers loads every tensor of `state` as it is stored, unrounded.

    Of one dtype: that. Of several: the narrowest that holds them all, but for tensors that the model class keeps in
    float32 anyway (a router's bias beside bfloat16 weights: bfloat16).
    """
    stored = {name: t.dtype for name, t in state.items() if t.is_floating_point()}
    present = sorted(set(stored.values()), key=lambda dtype: (dtype.itemsize, str(dtype)))
    for dtype in present:
        plan = model._get_dtype_plan(dtype)
        kept = build_glob_alternation(list(plan))[0] if plan else None
        loaded = {n: torch.float32 if kept and kept.search(n) else dtype for n in stored}
        if all(holds(loaded[n], own) for n, own in stored.items()):
            return dtype
    return widest(torch.float32, *present)


def write_dtype(path: Path, dtype: torch.dtype) -> None:
    """States `dtype` in a config.json and in the configs of its parts."""

    def put(section: dict[str, Any], top: bool) -> None:
        for key, value in section.items():
            if isinstance(value, dict) and key.endswith("_config"):
                put(value, False)
        for key in {"dtype", "torch_dtype"} & section.keys() | ({"dtype"} if top else set()):
            section[key] = str(dtype).removeprefix("torch.")

    config = json.loads(path.read_text())
    put(config, True)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def check_builtin(name: str) -> None:
    """Refuses a packaged built-in whose files are not those it was shipped with."""
    folder = BUILTIN / name.removeprefix("builtin:")
    if not name.startswith("builtin:") or not folder.is_dir():
        return
    digests = json.loads((BUILTIN / "digests.json").read_text())
    for path in sorted(folder.glob("*.safetensors")):
        known = digests.get(f"{folder.name}/{path.name}")
        if hashlib.sha256(path.read_bytes()).hexdigest() != known:
            raise ConfigError(f"{path} is not the file that was shipped; reinstall vlopd")
