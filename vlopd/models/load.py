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
from huggingface_hub import snapshot_download
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from vlopd.config import ConfigError, ModelConfig, UserError
from vlopd.models import families, gguf, openclip_vlm, smollm2, whole
from vlopd.models.about import first_line
from vlopd.types import Completions, Example, Prompts

BUILTIN = Path(__file__).parents[1] / "builtin"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

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
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
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
        """Examples -> model inputs, in this model's template, resolution and padding. Raises as `read`."""
        return self.read(examples).to(self.device, self.model.dtype)

    def read(self, examples: Sequence[Example]) -> Prompts:
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
                    self.read([example])
            raise UserError(
                f"example {examples[0].id!r}: {self.name} cannot read its prompt: {first_line(error)}; "
                "if its chat template is at fault, set `template` beside its `model`"
            ) from error

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
        raise unreadable(f"read the configuration of {name!r}", error) from None
    if config is None:
        raise ConfigError(
            f"{name} is an adapter (it has {whole.ADAPTER}), not a model; merge it into its base (PEFT's "
            "merge_and_unload, then save_pretrained) and give the merged folder"
        )
    if packed := whole.quantisation(config.to_dict()):
        raise ConfigError(f"{name} is quantised: {packed}")
    return config


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
) -> LoadedModel:
    """Loads weights from safetensors only, in `dtype`, in evaluation mode (no dropout).

    Raises ConfigError naming the model, and the tensor or token, where it is not whole: a file that is missing,
    truncated or pickled, tensors that are missing, packed, not finite or another model's, an adapter, no
    tokenizer, end tokens that are none, a chat template that leaves out the user's words.
    """
    check_builtin(name)
    config = load_model_config(name, revision, trust_remote_code)
    model_class, _ = families.auto_classes(config)
    processor = load_processor(name, revision, trust_remote_code, template)
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
    loaded = LoadedModel(name, model, processor)
    check_tokens(loaded)
    return loaded


def check_unloaded(config: ModelConfig) -> None:
    """Refuses what can be seen of a model without reading its weights."""
    load_processor(config.model, config.revision, config.trust_remote_code, config.template)
    where = Path(resolve(config.model))
    if where.is_dir():
        check_files(config.model, where)


def check_files(name: str, folder: Path) -> None:
    """Refuses weights that are damaged, packed, or short of a part of an expert; reads headers only."""
    stored = whole.stored_tensors(folder)
    if packed := whole.packing(stored):
        raise ConfigError(f"{name} is quantised: {packed}")
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
