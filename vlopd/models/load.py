"""Loads one model with its own processor: a hub id, a local folder, or `builtin:NAME`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel

from vlopd.config import ConfigError, DataError, ModelConfig, UserError
from vlopd.models import families, gguf, openclip_vlm, smollm2
from vlopd.models.about import first_line
from vlopd.models.length import context_length
from vlopd.types import Completions, Example, Prompts

BUILTIN = Path(__file__).parents[1] / "builtin"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class ModelUnreadable(ConfigError):
    """A model's configuration, tokenizer or weights cannot be had, from where its name points."""


@dataclass(frozen=True)
class LoadedModel:
    """A model, its processor (or tokenizer), and how it renders prompts and scores completions."""

    name: str
    model: PreTrainedModel
    processor: Any

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
        """Tokens that end a completion, from the generation config."""
        return end_ids(self.model.generation_config, self.tokenizer)

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

    def render_text(self, example: Example, add_generation_prompt: bool = True) -> str:
        """The example's prompt in this model's own chat template, as text."""
        return self.processor.apply_chat_template(
            families.chat_messages(example, self.sees_images, self.placeholders),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )

    def encode(self, texts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> Prompts:
        """Rendered prompts with their images -> model inputs, on the model's device.

        Raises ConfigError when images are given to a model without eyes.
        """
        if any(images) and not self.sees_images:
            raise ConfigError(
                f"{self.name} is text-only but the prompt has an image; a text-only teacher needs "
                'teacher.context = {type = "caption", column = ...}, a field that says what is in it'
            )
        prompts = families.encode(self.processor, texts, images, self.sees_images)
        return prompts.to(self.device, self.model.dtype)

    def render(self, examples: Sequence[Example]) -> Prompts:
        """Examples -> model inputs, in this model's template, resolution and padding.

        Raises UserError with the example's id where the template or the processor cannot take it.
        """
        try:
            return self.encode(
                [self.render_text(e) for e in examples], [e.images for e in examples]
            )
        except UserError:
            raise
        except Exception as error:  # templates and processors raise what they like
            if len(examples) > 1:
                for example in examples:
                    self.render([example])
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

    def decode(self, completions: Completions) -> list[str]:
        """Each completion as text, without special tokens."""
        rows = [
            row[keep].tolist() for row, keep in zip(completions.ids, completions.mask, strict=True)
        ]
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [text.strip() for text in texts]


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
    """The model's configuration, without weights. Raises ConfigError when it cannot be had."""
    openclip_vlm.register()
    try:
        return AutoConfig.from_pretrained(
            resolve(name), revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelUnreadable(
            f"cannot read the configuration of {name!r}: {first_line(error)}"
        ) from None


def load_processor(
    name: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    template: str | None = None,
) -> Any:
    """The processor of a vision-language model, or the tokenizer of a language model.

    `template` takes the place of its chat template: a .jinja file, or `plain`.

    Raises ConfigError when it cannot be read or has no chat template.
    """
    config = load_model_config(name, revision, trust_remote_code)
    _, processor_class = families.auto_classes(config)
    try:
        processor = processor_class.from_pretrained(
            resolve(name), revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelUnreadable(
            f"cannot read the tokenizer or processor of {name!r}: {first_line(error)}"
        ) from None
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
    return processor


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
    try:
        return GenerationConfig.from_pretrained(resolve(name), revision=revision)
    except OSError:
        return GenerationConfig.from_model_config(config)


def end_ids(generation: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a completion: the generation config's, or the tokenizer's."""
    ends = generation.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    return list(ends) if isinstance(ends, (list, tuple)) else [ends]


def load(
    name: str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    attention: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    template: str | None = None,
) -> LoadedModel:
    """Loads weights from safetensors only, in `dtype`, in evaluation mode (no dropout).

    Raises ConfigError naming the model when a file is missing, truncated or pickled.
    """
    check_builtin(name)
    config = load_model_config(name, revision, trust_remote_code)
    model_class, _ = families.auto_classes(config)
    try:
        model = model_class.from_pretrained(
            resolve(name),
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError, SafetensorError) as error:
        remedy = '; set attention = "eager" beside its `model`' if "sdpa" in str(error) else ""
        raise ModelUnreadable(
            f"cannot load the weights of {name!r}: {first_line(error)}{remedy}"
        ) from None
    processor = load_processor(name, revision, trust_remote_code, template)
    model = model.to(device).eval()
    families.check_logits(model)
    return LoadedModel(name, model, processor)


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
    )


def save(
    loaded: LoadedModel, folder: Path, card: str, state: dict[str, Tensor] | None = None
) -> None:
    """Writes a Hugging Face folder: weights (`state` in place of the model's own), configs, processor, card.

    `card` is the text of the model card. Tensor names are the model's own, so that masks, deltas and
    checkpoints share one naming.
    """
    dtypes = {tensor.dtype for tensor in (state or loaded.model.state_dict()).values()}
    before = loaded.model.config.dtype
    loaded.model.config.dtype = next(iter(dtypes)) if len(dtypes) == 1 else torch.float32
    try:
        loaded.model.save_pretrained(folder, state_dict=state, save_original_format=False)
    finally:
        loaded.model.config.dtype = before
    loaded.processor.save_pretrained(folder)
    (folder / "README.md").write_text(card)


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
