"""All differences between language and vision-language model families; no other file depends on them.

The rest of the code holds a `LoadedModel` (loaded.py) and opaque dicts of model inputs (types.Prompts). To add a
family, see CONTRIBUTING.md: most need nothing here; a family with unusual forward inputs or post-processed
logits needs a line in one of the tables (parameter names: parameter_names.py).
`tests/test_families.py` defines "supported".
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from vlopd.errors import ConfigError, UserError, first_line, is_out_of_memory
from vlopd.types import Completions, Example, Prompts

PER_TOKEN_INPUTS = ("token_type_ids", "mm_token_type_ids")
"""Per-token processor outputs; all others are per image."""

UNUSED_OUTPUTS = ("labels",)
"""Processor outputs that are not passed to the model (PaliGemma's processor always makes labels)."""

COMPLETION_TYPE = {"paligemma": 1}
"""`token_type_ids` of completion tokens where not 0: in PaliGemma 0 means bidirectional attention."""

FIRST_POSITION = {"paligemma": 1}
"""Position of the first token where not 0."""

ENDS_THE_LINE = ("PaliGemmaProcessor",)
"""Processors that append a line break to the prompt themselves."""

HEAD_OF_TEXT_CONFIG = (
    "paligemma",
    "gemma3n",
    "gemma4",
    "gemma4_unified",
    "granite4_vision",
    "granite_docling",
)
"""Image-text families that cap or scale their logits by their text config's fields; others do not."""

AFTER_HEAD = (
    ("final_logit_softcapping", lambda logits, cap: torch.tanh(logits / cap) * cap),  # Gemma
    ("logits_scaling", lambda logits, divisor: logits / divisor),  # Granite
    ("logit_scale", lambda logits, factor: logits * factor),  # Cohere
)
"""Config fields that post-process the output layer's logits, with the function."""

CAUSAL = ("gpt_neox", "gpt_neox_japanese")
"""Causal families whose config has `is_decoder = False` by default."""

PLACEHOLDER = re.compile(r"image|img|video|vision|audio|row_\d+_col_\d+", re.IGNORECASE)
"""Special tokens that are placeholders of images, video or audio."""

PRINTED_PART = re.compile(r"""\{['"]type['"]: ?['"]""", re.IGNORECASE)
"""A message part as printed by Python or JSON."""

PLAIN_TEMPLATE = (
    "{{ first_token }}{% for message in messages %}"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}{{ image_token }}{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{{ '\\n' }}{% endfor %}"
)
"""A chat template without role markers: the images and text of each message, one message per line."""


# ---------------------------------------------------------------------------------- classes to load


def sees_images(config: PretrainedConfig) -> bool:
    """Whether a config is of a vision-language model.

    Raises ConfigError for a model that is neither an image-text model nor a causal language model, and for
    encoder-decoders.
    """
    if config.is_encoder_decoder or config.get_text_config().is_encoder_decoder:
        raise ConfigError(
            f"model type {config.model_type!r} is an encoder-decoder; vlopd/models/families.py reads "
            "prompt and completion as one sequence and needs a decoder-only model"
        )
    own_default = getattr(type(config), "is_decoder", None)
    if own_default is False and not config.is_decoder and config.model_type not in CAUSAL:
        raise ConfigError(
            f"model type {config.model_type!r} is an encoder (is_decoder is false) with bidirectional attention; "
            "vlopd/models/families.py needs a decoder-only model"
        )
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return True
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return False
    raise ConfigError(
        f"model type {config.model_type!r} is neither a causal language model nor an image-text model "
        f"of transformers; add it in vlopd/models/families.py"
    )


def auto_classes(config: PretrainedConfig) -> tuple[Any, Any]:
    """(model class, processor class) to call `from_pretrained` on."""
    if sees_images(config):
        return AutoModelForImageTextToText, AutoProcessor
    return AutoModelForCausalLM, AutoTokenizer


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer inside a processor, or the tokenizer itself."""
    return getattr(processor, "tokenizer", processor)


def missing_parts(processor: Any, with_images: bool) -> str | None:
    """What a processor built by transformers lacks: a vocabulary, an image processor; None if nothing."""
    tokenizer = tokenizer_of(processor)
    made_up = {*tokenizer.get_added_vocab(), *map(str, tokenizer.all_special_tokens)}
    if not tokenizer.get_vocab().keys() - made_up:
        return "no tokens but added ones"
    if with_images and getattr(processor, "image_processor", None) is None:
        return "no image processor"
    return None


def placeholders(config: PretrainedConfig, tokenizer: Any) -> dict[str, int]:
    """Placeholder tokens of images, video or audio, with their ids: those in the config, and those matched by name."""
    special = {i: str(t) for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    found = {token: i for i, token in special.items() if PLACEHOLDER.search(token)}
    for field in ("image_token_id", "image_token_index", "video_token_id", "audio_token_id"):
        i = getattr(config, field, None)
        if i is not None and i < len(tokenizer):
            found[tokenizer.convert_ids_to_tokens(i)] = i
    return found


def unsampleable_ids(config: PretrainedConfig, tokenizer: Any) -> list[int]:
    """Ids that a sampler must not emit: placeholders (a forward pass would expect their images) and padding.

    Also for language models, whose teacher may be a vision-language model. The end token stays sampleable, even where
    it is also the padding token.
    """
    ids: set[int | None] = set(placeholders(config, tokenizer).values())
    if tokenizer.pad_token_id != tokenizer.eos_token_id:
        ids.add(tokenizer.pad_token_id)
    return sorted(i for i in ids if i is not None)


# ------------------------------------------------------------------------------------------ prompts


def set_template(processor: Any, template: str) -> None:
    """Replaces the processor's chat template. Two extra variables are defined for it:

    `image_token`, the processor's image placeholder; `first_token`, the token that the tokenizer prepends by default
    (empty if none: prompts are tokenized without special tokens).
    """
    tokenizer = tokenizer_of(processor)
    bos = tokenizer.bos_token
    starts = bos is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    names = {
        "image_token": getattr(processor, "image_token", ""),
        "first_token": bos if starts else "",
    }
    head = "".join(f"{{%- set {name} = {str(token)!r} -%}}" for name, token in names.items())
    tokenizer.chat_template = processor.chat_template = head + template


def as_parts(text: str) -> list[dict[str, str]]:
    """A text as the parts of a message."""
    return [{"type": "text", "text": text}]


def chat_messages(
    example: Example,
    with_images: bool,
    placeholders: Iterable[str] = (),
    wants_parts: bool = False,
) -> list[Any]:
    """The example's messages in the form that a chat template expects: parts, or plain strings for a language model.

    With `wants_parts`, plain strings become parts too, for templates that omit strings.

    For a vision-language model, a placeholder string within a text (`what does <image> mean`) is broken by a
    space (`< image>`), so that it does not stand for an image. A template that does not allow system messages raises;
    they are never merged into another turn.
    """

    def clean(text: str) -> str:
        for token in placeholders:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    messages: list[Any] = []
    for message in example.messages:
        content = message["content"]
        if not with_images:
            if not isinstance(content, str):
                content = " ".join(part["text"] for part in content if part["type"] == "text")
        elif isinstance(content, str):
            content = clean(content)
        else:
            content = [
                {**part, "text": clean(part["text"])} if part["type"] == "text" else part
                for part in content
            ]
        if wants_parts and isinstance(content, str):
            content = as_parts(content)
        messages.append({**message, "content": content})
    return messages


def encode(
    processor: Any, texts: Sequence[str], images: Sequence[Sequence[Image.Image]], with_images: bool
) -> Prompts:
    """Tokenizes rendered prompts (template already applied) with their images, left-padded."""
    return collate(processor, encode_each(processor, texts, images, with_images))


def encode_each(
    processor: Any, texts: Sequence[str], images: Sequence[Sequence[Image.Image]], with_images: bool
) -> list[Prompts]:
    """Tokenizes rendered prompts with their images, each to a batch of one without padding.

    Prompts whose images agree in number and size are processed in one call, which is faster; others in calls of their
    own, so that a prompt's inputs cannot depend on the rest of the batch.
    """
    if not with_images:
        tokenizer = tokenizer_of(processor)
        rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        ids = [torch.tensor([row], dtype=torch.long) for row in rows]
        return [Prompts(row, torch.ones_like(row)) for row in ids]
    alike: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for k, each in enumerate(images):
        alike.setdefault(tuple(image.size for image in each), []).append(k)
    found: dict[int, Prompts] = {}
    for rows in alike.values():
        inputs = process(processor, [texts[k] for k in rows], [images[k] for k in rows])
        found |= zip(rows, _split(inputs, len(rows)), strict=True)
    return [found[k] for k in range(len(texts))]


def _split(inputs: Mapping[str, Tensor], prompts: int) -> list[Prompts]:
    """The inputs of prompts with images of the same number and sizes, by prompt and without padding."""
    per_token = {name: inputs[name] for name in PER_TOKEN_INPUTS if name in inputs}
    per_image = {
        name: value.reshape(prompts, len(value) // prompts, *value.shape[1:])
        for name, value in inputs.items()
        if name not in ("input_ids", "attention_mask", *PER_TOKEN_INPUTS)
    }
    found = []
    for k in range(prompts):
        kept = inputs["attention_mask"][k].bool()
        ids, mask = (inputs[name][k][kept][None] for name in ("input_ids", "attention_mask"))
        own = {name: value[k][kept][None] for name, value in per_token.items()}
        found.append(Prompts(ids, mask, own, {name: v[k] for name, v in per_image.items()}))
    return found


def collate(processor: Any, rows: Sequence[Prompts]) -> Prompts:
    """One batch of prompts, left-padded; per-image inputs concatenated, with patches and pixels padded."""
    if len(rows) == 1:
        return rows[0]
    pad_id = tokenizer_of(processor).pad_token_id or 0
    per_token = dict.fromkeys(name for row in rows for name in row.per_token)
    per_image = dict.fromkeys(name for row in rows for name in row.per_image)
    return Prompts(
        pad_left([row.input_ids for row in rows], pad_id),
        pad_left([row.attention_mask for row in rows], 0),
        {
            name: pad_left(
                [row.per_token.get(name, torch.zeros_like(row.input_ids)) for row in rows], 0
            )
            for name in per_token
        },
        {
            name: _concatenate_padded(
                [row.per_image[name] for row in rows if name in row.per_image]
            )
            for name in per_image
        },
    )


def process(
    processor: Any, texts: Sequence[str], images: Sequence[Sequence[Image.Image]]
) -> dict[str, Tensor]:
    """Model inputs of prompts whose images agree in number and size, left-padded."""
    if any(map(is_printed_part, texts)) and _prints_parts(processor):
        raise ConfigError(
            "its chat template expects plain strings and prints message parts verbatim; "
            "set `template` to a .jinja file that takes parts"
        )
    if type(processor).__name__ in ENDS_THE_LINE:
        texts = [text.removesuffix("\n") for text in texts]
    tokenizer = tokenizer_of(processor)
    tokenizer.padding_side = "left"
    inputs = processor(
        text=list(texts),
        images=[list(each) for each in images] if images[0] else None,
        return_tensors="pt",
        padding=True,
        add_special_tokens=_adds_first(tokenizer, texts[0]),
    )
    return {name: value for name, value in inputs.items() if name not in UNUSED_OUTPUTS}


def _adds_first(tokenizer: Any, text: str) -> bool:
    """transformers' rule for processors: older templates (LLaVA-1.5) leave the BOS to the tokenizer."""
    return not text.startswith(tokenizer.bos_token or "")


def unexpanded_ids(processor: Any, text: str) -> list[int]:
    """The tokens of a rendered prompt with images, in which each image is its template's placeholder alone."""
    tokenizer = tokenizer_of(processor)
    return tokenizer(text, add_special_tokens=_adds_first(tokenizer, text))["input_ids"]


def _prints_parts(processor: Any) -> bool:
    """Whether the chat template prints a message's parts as if they were a string."""
    message = {"role": "user", "content": as_parts("x")}
    return is_printed_part(processor.apply_chat_template([message], tokenize=False))


def is_printed_part(text: str) -> bool:
    """Whether a text contains message parts as printed by Python or JSON."""
    return PRINTED_PART.search(text) is not None


def pad_left(rows: Sequence[Tensor], value: int) -> Tensor:
    """Tensors [1, P_i] -> [B, P]."""
    longest = max(row.shape[1] for row in rows)
    return torch.cat([pad(row, (longest - row.shape[1], 0), value=value) for row in rows])


def _concatenate_padded(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenates on dim 0, zero-padding the other dimensions (patches, pixels) at their end."""
    sizes = [max(size) for size in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    filled = []
    for tensor in tensors:
        missing = [(0, most - size) for most, size in zip(sizes, tensor.shape[1:], strict=True)]
        filled.append(pad(tensor, [n for pair in reversed(missing) for n in pair]))
    return torch.cat(filled)


# ------------------------------------------------------------------------------------ forward passes


def backbone(model: PreTrainedModel) -> Any:
    """The model without its output layer. Raises ConfigError for a family without such a submodule."""
    if model.base_model is model:
        raise ConfigError(
            f"model type {model.config.model_type!r} has no submodule without the output layer; "
            "it needs a case in vlopd/models/families.py"
        )
    return model.base_model


def position_ids(model: PreTrainedModel, prompts: Prompts, added: int) -> dict[str, Tensor]:
    """Positions of the prompts and of `added` tokens after each, independent of padding.

    {"position_ids": [B, P + added]}, or [axes, B, P + added] in families with M-RoPE (arXiv 2409.12191), which cache
    the image grids of their last forward pass; explicit positions bypass that cache. Empty for a model that takes none.
    """
    base, mask = backbone(model), prompts.attention_mask
    if "position_ids" not in inspect.signature(base.forward).parameters:
        return {}
    if hasattr(base, "get_rope_index") and prompts.per_image:
        inputs = {**prompts.per_token, **prompts.per_image}
        where, _ = base.get_rope_index(prompts.input_ids, attention_mask=mask, **inputs)
        last = where.amax(0).amax(-1, keepdim=True)
    else:
        first = FIRST_POSITION.get(model.config.model_type, 0)
        where = (mask.cumsum(-1) - 1).clamp(min=0) + first
        last = where[:, -1:]
    after = last + torch.arange(1, added + 1, device=last.device)  # [B, added]
    return {"position_ids": torch.cat([where, after.expand(*where.shape[:-1], added)], -1)}


@contextmanager
def reading_pictures(model: PreTrainedModel, prompts: Prompts) -> Iterator[None]:
    """Raises ConfigError where a model's forward pass cannot take what its processor has made of pictures."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError) as error:
        its = isinstance(error, UserError) or is_out_of_memory(error) or "CUDA" in str(error)
        if its or not prompts.per_image:
            raise
        raise ConfigError(
            f"{model.name_or_path}: the model cannot read its processor's pictures ({first_line(error)}); give it the "
            "config.json, processor_config.json and preprocessor_config.json that its weights were saved with"
        ) from None


def check_pictures(model: PreTrainedModel, prompts: Prompts) -> None:
    """Raises ConfigError where a model's forward pass cannot take what its processor has made of pictures."""
    with torch.no_grad(), reading_pictures(model, prompts):
        backbone(model)(
            input_ids=prompts.input_ids,
            attention_mask=prompts.attention_mask,
            use_cache=False,
            **position_ids(model, prompts, 0),
            **prompts.per_token,
            **prompts.per_image,
        )


def completion_hidden(model: PreTrainedModel, prompts: Prompts, completions: Completions) -> Tensor:
    """Hidden states that predict each completion token, flat: [N, H]."""
    added = completions.ids.shape[1]
    kind = COMPLETION_TYPE.get(model.config.model_type, 0)
    with reading_pictures(model, prompts):
        hidden = backbone(model)(
            input_ids=torch.cat([prompts.input_ids, completions.ids], 1),
            attention_mask=torch.cat([prompts.attention_mask, completions.mask.long()], 1),
            use_cache=False,
            **position_ids(model, prompts, added),
            **{
                name: pad(value, (0, added), value=kind)
                for name, value in prompts.per_token.items()
            },
            **prompts.per_image,
        ).last_hidden_state
    return hidden[:, -added - 1 : -1][completions.mask]


def logits_of(model: PreTrainedModel, hidden: Tensor, columns: int | Tensor) -> Tensor:
    """Logits over the first `columns` tokens of the vocabulary, or over the ids `columns` [V]: [N, H] -> [N, V]."""
    logits = model.get_output_embeddings()(hidden)
    logits = (
        logits[..., :columns]
        if isinstance(columns, int)
        else logits[..., columns.to(logits.device)]
    )
    config = model.config
    if config.model_type in HEAD_OF_TEXT_CONFIG:
        config = config.get_text_config()
    for field, change in AFTER_HEAD:
        value = getattr(config, field, None)
        if isinstance(value, (int, float)):
            logits = change(logits, value)
    return logits


@torch.no_grad()
def check_logits(model: PreTrainedModel) -> None:
    """Compares `logits_of` with the model's own logits on three tokens, and checks causality.

    Raises ConfigError where a family post-processes its logits in a way that no table here has, where they are not
    finite, and where a token's hidden state depends on the next token.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    ids = torch.tensor([[5, 6, 7], [5, 6, 8]], device=model.device) % rows
    kind = model.config.model_type
    # mark all tokens as completion for families with bidirectional attention over the prompt
    types = {"token_type_ids": torch.ones_like(ids)} if kind in COMPLETION_TYPE else {}
    hidden = backbone(model)(input_ids=ids, **types).last_hidden_state
    ours = logits_of(model, hidden, 10**9)
    own = model(input_ids=ids, **types).logits
    if not bool(torch.isfinite(own).all()):
        raise ConfigError(
            f"model type {kind!r} has finite weights but logits that are not finite in "
            f'{str(own.dtype).removeprefix("torch.")}: its activations overflow; try precision.compute = "fp32"'
        )
    if not torch.allclose(ours.float(), own.float(), rtol=1e-2, atol=1e-3):
        raise ConfigError(
            f"model type {kind!r} post-processes its logits after the output layer by up to "
            f"{float((ours - own).abs().max()):.3g}; add the config's field to AFTER_HEAD in "
            "vlopd/models/families.py"
        )
    first, second = hidden[:, :2].float()
    if float((first - second).abs().max()) > 1e-2 * float(first.abs().max()):
        raise ConfigError(
            f"model type {kind!r} is not causal: a token's hidden state depends on the next token; "
            "vlopd/models/families.py needs a decoder-only model"
        )
