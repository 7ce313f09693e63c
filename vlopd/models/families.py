"""The only file that knows a language model from a vision-language model.

Everything else holds a `LoadedModel` (load.py) and opaque dicts of model inputs (types.Prompts). To add a
family, see CONTRIBUTING.md: most need nothing here; those whose forward wants unusual inputs, whose
logits are post-processed, or whose parameters have names of their own need a line in one of the tables.
`tests/test_families.py` is what "supported" means.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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

from vlopd.config import ConfigError
from vlopd.types import Completions, Example, Prompts, TensorName

PER_TOKEN_INPUTS = ("token_type_ids", "mm_token_type_ids")
"""Processor outputs that lie beside the tokens; all others belong to the images."""

UNUSED_OUTPUTS = ("labels",)
"""Processor outputs that are no model input here (PaliGemma's makes labels unasked)."""

COMPLETION_TYPE = {"paligemma": 1}
"""What `token_type_ids` say of a completion token where that is not 0: PaliGemma's 0 sees both ways."""

FIRST_POSITION = {"paligemma": 1}
"""Position of the first token, where it is not 0."""

ENDS_THE_LINE = ("PaliGemmaProcessor",)
"""Processors that put a line break after the prompt themselves."""

HEAD_OF_TEXT_CONFIG = (
    "paligemma",
    "gemma3n",
    "gemma4",
    "gemma4_unified",
    "granite4_vision",
    "granite_docling",
)
"""Image-text families that cap or scale their logits as their language model's config says; others do not."""

AFTER_HEAD = (
    ("final_logit_softcapping", lambda logits, cap: torch.tanh(logits / cap) * cap),  # Gemma
    ("logits_scaling", lambda logits, divisor: logits / divisor),  # Granite
    ("logit_scale", lambda logits, factor: logits * factor),  # Cohere
)
"""Config fields that change the output layer's logits, and how."""

PLACEHOLDER = re.compile(r"image|img|video|vision|audio|row_\d+_col_\d+", re.IGNORECASE)
"""Special tokens that stand for something seen or heard."""

PLAIN_TEMPLATE = (
    "{{ first_token }}{% for message in messages %}"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}{{ image_token }}{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{{ '\\n' }}{% endfor %}"
)
"""A chat template without markers, for models that have none: each message's pictures and text, a line each."""


# ---------------------------------------------------------------------------------- classes to load


def sees_images(config: PretrainedConfig) -> bool:
    """Whether a configuration is of a vision-language model.

    Raises ConfigError for a family that is neither that nor a causal language model, and for those whose
    prompt goes through an encoder.
    """
    if config.is_encoder_decoder or config.get_text_config().is_encoder_decoder:
        raise ConfigError(
            f"model type {config.model_type!r} is an encoder-decoder; vlopd/models/families.py reads "
            "prompt and completion as one sequence and needs a decoder-only model"
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


def placeholders(config: PretrainedConfig, tokenizer: Any) -> dict[str, int]:
    """Tokens that stand for images, video or audio, with their ids: those of the config, and by their names."""
    special = {i: str(t) for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    found = {token: i for i, token in special.items() if PLACEHOLDER.search(token)}
    for field in ("image_token_id", "image_token_index", "video_token_id", "audio_token_id"):
        i = getattr(config, field, None)
        if i is not None and i < len(tokenizer):
            found[tokenizer.convert_ids_to_tokens(i)] = i
    return found


def unsampleable_ids(config: PretrainedConfig, tokenizer: Any) -> list[int]:
    """Ids that a sampler must not emit: placeholders (scoring would look for their images) and padding.

    Language models too: their teacher may have eyes. The end token stays sampleable, also where it
    doubles as padding.
    """
    ids: set[int | None] = set(placeholders(config, tokenizer).values())
    if tokenizer.pad_token_id != tokenizer.eos_token_id:
        ids.add(tokenizer.pad_token_id)
    return sorted(i for i in ids if i is not None)


# ------------------------------------------------------------------------------------------ prompts


def set_template(processor: Any, template: str) -> None:
    """Puts a chat template in place of the processor's own. It may use two names of ours:

    `image_token`, what the processor replaces by an image; `first_token`, what the tokenizer puts first
    by itself (empty where it puts nothing: prompts are tokenized without special tokens).
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


def chat_messages(
    example: Example, with_images: bool, placeholders: Iterable[str] = ()
) -> list[Any]:
    """The example's messages as a chat template wants them: parts, or plain strings for a language model.

    Where there are images, a placeholder's string within a text (`what does <image> mean`) is broken by a
    space (`< image>`): it is the user's word, not an image. Whether a system message is allowed is for the
    template to say: one that refuses it raises, and nothing is merged into another turn.
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
        messages.append({**message, "content": content})
    return messages


def encode(
    processor: Any, texts: Sequence[str], images: Sequence[Sequence[Image.Image]], with_images: bool
) -> Prompts:
    """Tokenizes rendered prompts (template already applied) with their images, padded on the left.

    Each prompt goes through the processor by itself, so that its inputs cannot depend on its neighbours
    (how many images they have, or whether any).
    """
    if with_images:
        rows = [encode_one(processor, *each) for each in zip(texts, images, strict=True)]
    else:
        tokenizer = tokenizer_of(processor)
        rows = [
            {"input_ids": tokenizer(text, add_special_tokens=False)["input_ids"]} for text in texts
        ]
        rows = [{k: torch.tensor([v]) for k, v in row.items()} for row in rows]
    pad_id = tokenizer_of(processor).pad_token_id or 0
    return Prompts(
        pad_left([row["input_ids"] for row in rows], pad_id),
        pad_left([torch.ones_like(row["input_ids"]) for row in rows], 0),
        {
            name: pad_left([row.get(name, torch.zeros_like(row["input_ids"])) for row in rows], 0)
            for name in PER_TOKEN_INPUTS
            if any(name in row for row in rows)
        },
        {
            name: join([row[name] for row in rows if name in row])
            for name in dict.fromkeys(name for row in rows for name in row)
            if name not in ("input_ids", *PER_TOKEN_INPUTS)
        },
    )


def encode_one(processor: Any, text: str, images: Sequence[Image.Image]) -> dict[str, Tensor]:
    """One prompt's model inputs, the first dimension of the tokens' being 1."""
    if "[{'type': " in text and prints_parts(processor):
        raise ConfigError(
            "its chat template prints message parts as they are, it wants plain strings; "
            "set `template` to a .jinja file that takes parts"
        )
    if type(processor).__name__ in ENDS_THE_LINE:
        text = text.removesuffix("\n")
    row = processor(
        text=[text],
        images=[list(images)] if images else None,
        return_tensors="pt",
        add_special_tokens=False,
    )
    return {k: v for k, v in row.items() if k not in ("attention_mask", *UNUSED_OUTPUTS)}


def prints_parts(processor: Any) -> bool:
    """Whether the chat template takes a message's parts for a string."""
    message = {"role": "user", "content": [{"type": "text", "text": "x"}]}
    return "[{'type': " in processor.apply_chat_template([message], tokenize=False)


def pad_left(rows: Sequence[Tensor], value: int) -> Tensor:
    """Tensors [1, P_i] -> [B, P]."""
    longest = max(row.shape[1] for row in rows)
    return torch.cat([pad(row, (longest - row.shape[1], 0), value=value) for row in rows])


def join(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenates on dim 0; other dimensions (patches, pixels) are filled up with zeros at their end."""
    sizes = [max(size) for size in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    filled = []
    for tensor in tensors:
        missing = [(0, most - size) for most, size in zip(sizes, tensor.shape[1:], strict=True)]
        filled.append(pad(tensor, [n for pair in reversed(missing) for n in pair]))
    return torch.cat(filled)


# ------------------------------------------------------------------------------------ forward passes


def body(model: PreTrainedModel) -> Any:
    """The model without its output layer. Raises ConfigError where the family does not divide so."""
    if model.base_model is model:
        raise ConfigError(
            f"model type {model.config.model_type!r} has no part that stops before the output layer; "
            "it needs a case in vlopd/models/families.py"
        )
    return model.base_model


def position_ids(model: PreTrainedModel, prompts: Prompts, added: int) -> dict[str, Tensor]:
    """Positions of the prompts and of `added` tokens after each, independent of padding.

    {"position_ids": [B, P + added]}, or [axes, B, P + added] in families that place an image's tokens on
    a grid (M-RoPE, arXiv 2409.12191). Those remember the grids of their last forward pass; being told the
    positions, they never use what they remember. Empty for a model that takes none.
    """
    base, mask = body(model), prompts.attention_mask
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


def completion_hidden(model: PreTrainedModel, prompts: Prompts, completions: Completions) -> Tensor:
    """Hidden states that predict each completion token, flat: [N, H]."""
    added = completions.ids.shape[1]
    kind = COMPLETION_TYPE.get(model.config.model_type, 0)
    hidden = body(model)(
        input_ids=torch.cat([prompts.input_ids, completions.ids], 1),
        attention_mask=torch.cat([prompts.attention_mask, completions.mask.long()], 1),
        use_cache=False,
        **position_ids(model, prompts, added),
        **{name: pad(value, (0, added), value=kind) for name, value in prompts.per_token.items()},
        **prompts.per_image,
    ).last_hidden_state
    return hidden[:, -added - 1 : -1][completions.mask]


def logits_of(model: PreTrainedModel, hidden: Tensor, columns: int | Tensor) -> Tensor:
    """Logits over the first so many of the vocabulary, or over those ids [V]: [N, H] -> [N, V]."""
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
    """Compares `logits_of` with the model's own logits on three tokens.

    Raises ConfigError where a family treats its logits in a way that no table here knows.
    """
    ids = torch.arange(3, device=model.device)[None] + 5
    ours = logits_of(model, body(model)(input_ids=ids).last_hidden_state, 10**9)
    own = model(input_ids=ids).logits
    if not torch.allclose(ours.float(), own.float(), rtol=1e-2, atol=1e-3):
        raise ConfigError(
            f"model type {model.config.model_type!r} changes its logits after the output layer by up to "
            f"{float((ours - own).abs().max()):.3g}; add the config's field to AFTER_HEAD in "
            "vlopd/models/families.py"
        )


# --------------------------------------------------------------------------------------- the atlas

COMPONENTS = (
    # first match wins; searched in the whole name
    ("head", re.compile(r"(^|\.)(lm_head|embed_out)\.")),
    (
        "projector",
        re.compile(
            r"projector|connector|merger|aligner|visual_projection|image_newline|resampler|qformer"
        ),
    ),
    ("vision", re.compile(r"vision|visual|image_encoder|patch_embed")),
    ("embedding", re.compile(r"embed_tokens|(^|\.)(wte|embed_in|word_embeddings)\.")),
    (
        "language",
        re.compile(
            r"layers\.\d+|(^|\.)h\.\d+|language_model|text_model"
            r"|(^|\.)(norm|ln_f|wpe|embed_positions|final_layer_?norm)\."
        ),
    ),
)
MODULES = (
    # first match wins; searched in the name without its last ".weight" or ".bias"
    ("patch", re.compile(r"patch_embed|patch_conv$|vision_tower\.conv1$|\.stem\.\d+$")),
    ("norm", re.compile(r"(norm\d?|layrnorm|layernorm_\w+|(^|\.)(ln|bn)_?\w+)$")),
    ("scale", re.compile(r"(^|\.)(lambda_\d|gamma(_\d)?|layer_scale\w*)$")),
    (
        "token",  # learned vectors that are nobody's weights: class tokens, line breaks, queries, sinks
        re.compile(
            r"(class_embedding|(cls|mask|register|query)_tokens?|image_newline|latents?|probe"
            r"|attn_pool\.query|attn\.sinks)$"
        ),
    ),
    (
        "position",
        re.compile(r"(^|\.)(wpe|rel_pos\..*|[^.]*pos(ition(al|s)?)?_[^.]*|embed_positions)$"),
    ),
    ("embedding", re.compile(r"(^|\.)(embed_tokens|embed_in|wte|word_embeddings)$")),
    ("head", re.compile(r"(^|\.)(lm_head|embed_out)$")),
    ("router", re.compile(r"(^|\.)(gate|router|shared_expert_gate)$")),
    ("expert_gate_up", re.compile(r"(^|\.)experts\.gate_up_proj(_bias)?$")),
    ("expert_down", re.compile(r"(^|\.)experts\.down_proj(_bias)?$")),
    (
        "qkv",
        re.compile(
            r"(^|\.)(qkv|qkv_proj|c_attn|query_key_value|in_proj|in_proj_(weight|bias|qkvz?))$"
        ),
    ),
    ("q", re.compile(r"(^|\.)(q_proj|query|wq)$")),
    ("k", re.compile(r"(^|\.)(k_proj|key|wk)$")),
    ("v", re.compile(r"(^|\.)(v_proj|value|wv)$")),
    ("state", re.compile(r"(^|\.)(A_log|D|dt_bias|in_proj_(a|b|ba))$")),  # of linear attention
    ("gate_up", re.compile(r"(^|\.)gate_up_proj$")),
    ("gate", re.compile(r"(^|\.)(gate_proj|w1|in_proj_z)$")),
    (
        "up",
        re.compile(
            r"(^|\.)(up_proj|w3|fc1|c_fc|fc_in|linear_fc1|dense_h_to_4h|intermediate\.dense)$"
        ),
    ),
    (
        "down",
        re.compile(r"(^|\.)(down_proj|w2|fc2|fc_out|linear_fc2|dense_4h_to_h|mlp\.c_proj)$"),
    ),
    (
        "o",
        re.compile(
            r"(^|\.)(o_proj|out_proj|wo|c_proj|attn\.proj|projection_layer"
            r"|(self_)?att(entio)?n\.(output\.)?dense)$"
        ),
    ),
    ("conv", re.compile(r"(^|\.)(conv\w*|downsample(\.\d+)?)$")),
    (
        "projection",
        re.compile(r"(^|\.)(linear\w*|merging_layer|fc\d?|\d+|[^.]*proj(ection)?(_\w+)?)$"),
    ),
)
LAYER = re.compile(r"(?:layers?|blocks|h|resblocks)\.(\d+)\.")

CONV1D = ("gpt2",)
"""Language models whose linear layers are stored as [in, out]."""

INPUT_FIRST = re.compile(r"mm_input_projection_weight$|vision_tower\.proj$")
"""Other matrices that are stored as [in, out]."""

SPLIT_QKV = ("phi3", "gpt2")
"""Language models whose fused qkv is all of q, then k, then v. Others interleave the heads: left whole.

All vision towers that fuse them put q, k and v one after the other.
"""

EXPERTS_INPUT_FIRST = ("gpt_oss",)
"""Families whose stacks of experts are [experts, in, out]; others are [experts, out, in]."""

INTERLEAVED_GATE_UP = ("gpt_oss",)
"""Families whose gate and up take turns within a fused matrix: left whole."""


def classify(name: str) -> TensorName:
    """Component, layer and module of a parameter; what no table knows is called "other", for all to see.

    >>> classify("model.language_model.layers.3.mlp.up_proj.weight")
    TensorName(name=..., component="language", layer=3, module="up")
    """
    path = re.sub(r"\.(weight|bias)$", "", name)
    component = next((label for label, pattern in COMPONENTS if pattern.search(name)), "other")
    module = next((label for label, pattern in MODULES if pattern.search(path)), "other")
    if component == "projector" and module in ("up", "down", "o"):
        module = "projection"  # its matrices are a stack, not a transformer's
    layer = LAYER.search(name)
    return TensorName(name, component, int(layer.group(1)) if layer else None, module)


@dataclass(frozen=True)
class Part:
    """One matrix (or its bias) within a stored tensor: `tensor[index]`.

    `transposed` says that it is stored as [in, out] rather than [out, in].
    """

    module: str
    expert: int | None
    index: tuple[slice | int, ...]
    transposed: bool = False


def parts(where: TensorName, shape: Sequence[int], config: PretrainedConfig) -> tuple[Part, ...]:
    """The matrices that a stored tensor holds, which tile it: q, k, v of a fused qkv; gate, up; experts.

    >>> parts(classify("model.layers.0.self_attn.qkv_proj.weight"), (64, 32), phi3_config)
    (Part("q", None, (slice(0, 32), slice(None)), False), Part("k", ...), Part("v", ...))
    """
    text = config.get_text_config()
    stacked = where.module.startswith("expert_")
    module = where.module.removeprefix("expert_")
    transposed = bool(INPUT_FIRST.search(where.name)) or (
        text.model_type in (EXPERTS_INPUT_FIRST if stacked else CONV1D)
        and where.component == "language"
        and module not in ("position", "norm")
    )
    out = len(shape) - 1 if transposed else int(stacked)  # the dimension of output features
    sizes: Mapping[str, int] = {module: shape[out]}
    if module == "qkv":
        sizes = qkv_sizes(where, shape[out], config)
    elif module == "gate_up" and text.model_type not in INTERLEAVED_GATE_UP:
        sizes = {"gate": shape[out] // 2, "up": shape[out] // 2}
    found = []
    for expert in range(shape[0]) if stacked else [None]:
        start = 0
        for name, size in sizes.items():
            index: list[slice | int] = [slice(None)] * len(shape)
            if len(sizes) > 1:
                index[out] = slice(start, start + size)
            if expert is not None:
                index[0] = expert
            found.append(Part(name, expert, tuple(index), transposed and len(shape) > 1))
            start += size
    return tuple(found)


def qkv_sizes(where: TensorName, size: int, config: PretrainedConfig) -> Mapping[str, int]:
    """Output features of q, k and v in a fused tensor with `size` of them; heads as the component's config has."""
    if where.component == "language":
        own = config.get_text_config()
        if own.model_type not in SPLIT_QKV:
            return {"qkv": size}
    else:
        own = getattr(config, "vision_config", None)
    heads = getattr(own, "num_attention_heads", 1)
    groups = getattr(own, "num_key_value_heads", None) or heads
    head = size // (heads + 2 * groups)
    return {"q": heads * head, "k": groups * head, "v": groups * head}


def freeze(model: PreTrainedModel, components: Sequence[str]) -> None:
    """Takes the parameters of these components (vision, projector, language, embedding, head) out of training.

    Raises ConfigError for a component that the model has no parameter of; a tied head counts as embedding.
    """
    parameters = [
        (classify(name).component, parameter) for name, parameter in model.named_parameters()
    ]
    known = {component for component, _ in parameters}
    for component in components:
        if component not in known:
            raise ConfigError(
                f"cannot freeze {component!r}: the model has {', '.join(sorted(known))}"
            )
    for component, parameter in parameters:
        if component in components:
            parameter.requires_grad_(False)
