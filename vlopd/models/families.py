"""The only file that knows a language model from a vision-language model.

Everything else holds a `LoadedModel` (load.py) and opaque dicts of model inputs (types.Prompts). To add a
family, see CONTRIBUTING.md: most need nothing here; those whose forward wants unusual inputs, whose
logits are post-processed, or whose parameters have names of their own need a line in one of the tables.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from vlopd.config import ConfigError
from vlopd.types import Completions, Example, Prompts, TensorName

PER_TOKEN_INPUTS = ("token_type_ids", "mm_token_type_ids")
"""Processor outputs that lie beside the tokens; all others belong to the images."""

POSITIONS_FROM_MODEL = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v")
"""Families that work out their (multi-axis) positions from the images' grids themselves."""


# ---------------------------------------------------------------------------------- classes to load


def sees_images(config: PretrainedConfig) -> bool:
    """Whether a configuration is of a vision-language model.

    Raises ConfigError for a family that is neither that nor a causal language model.
    """
    if config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return True
    if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
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


def unsampleable_ids(config: PretrainedConfig, tokenizer: Any) -> list[int]:
    """Ids that a sampler must not emit: image placeholders (scoring would look for their images) and padding.

    The end token stays sampleable, also where it doubles as padding.
    """
    names = ("image_token_id", "image_token_index", "video_token_id", "audio_token_id")
    ids = {getattr(config, name, None) for name in names}
    if tokenizer.pad_token_id != tokenizer.eos_token_id:
        ids.add(tokenizer.pad_token_id)
    return sorted(i for i in ids if i is not None)


# ------------------------------------------------------------------------------------------ prompts


def chat_messages(example: Example, with_images: bool) -> list[Any]:
    """The example's messages as a chat template wants them; plain strings where there are no images."""
    if with_images:
        return list(example.messages)
    messages: list[Any] = []
    for message in example.messages:
        content = message["content"]
        if not isinstance(content, str):
            content = " ".join(part["text"] for part in content if part["type"] == "text")
        messages.append({**message, "content": content})
    return messages


def encode(
    processor: Any, texts: Sequence[str], images: Sequence[Sequence[Image.Image]], with_images: bool
) -> Prompts:
    """Tokenizes rendered prompts (template already applied) with their images, padded on the left."""
    tokenizer = tokenizer_of(processor)
    tokenizer.padding_side = "left"
    if with_images and any(images):
        batch = processor(
            text=list(texts),
            images=[list(each) for each in images],
            return_tensors="pt",
            padding=True,
            add_special_tokens=False,
        )
    else:
        batch = tokenizer(list(texts), return_tensors="pt", padding=True, add_special_tokens=False)
    rest = {k: v for k, v in batch.items() if k not in ("input_ids", "attention_mask")}
    if not with_images:
        rest = {}
    return Prompts(
        batch["input_ids"],
        batch["attention_mask"],
        {k: v for k, v in rest.items() if k in PER_TOKEN_INPUTS},
        {k: v for k, v in rest.items() if k not in PER_TOKEN_INPUTS},
    )


# ------------------------------------------------------------------------------------ forward passes


def positions(model: PreTrainedModel, attention_mask: Tensor) -> dict[str, Tensor]:
    """Position ids that ignore left padding, [B, T], unless the family works them out itself."""
    if model.config.model_type in POSITIONS_FROM_MODEL:
        return {}
    return {"position_ids": (attention_mask.cumsum(-1) - 1).clamp(min=0)}


def completion_hidden(model: PreTrainedModel, prompts: Prompts, completions: Completions) -> Tensor:
    """Hidden states that predict each completion token, flat: [N, H]."""
    ids = torch.cat([prompts.input_ids, completions.ids], 1)
    attention = torch.cat([prompts.attention_mask, completions.mask.long()], 1)
    added = completions.ids.shape[1]
    hidden = model.base_model(
        input_ids=ids,
        attention_mask=attention,
        use_cache=False,
        **positions(model, attention),
        **{k: torch.nn.functional.pad(v, (0, added)) for k, v in prompts.per_token.items()},
        **prompts.per_image,
    ).last_hidden_state
    return hidden[:, -added - 1 : -1][completions.mask]


def logits_of(model: PreTrainedModel, hidden: Tensor, rows: int) -> Tensor:
    """Logits over the first `rows` vocabulary rows, [N, rows]."""
    return model.get_output_embeddings()(hidden)[..., :rows]


# --------------------------------------------------------------------------------------- the atlas

COMPONENTS = (
    # first match wins; searched in the whole name
    ("head", re.compile(r"(^|\.)(lm_head|embed_out)\.")),
    ("projector", re.compile(r"projector|connector|merger|aligner|visual_projection")),
    ("vision", re.compile(r"vision|visual|image_encoder|patch_embed")),
    ("embedding", re.compile(r"embed_tokens|(^|\.)wte\.|word_embeddings")),
    (
        "language",
        re.compile(
            r"layers\.\d+|(^|\.)h\.\d+|language_model|(^|\.)(norm|ln_f|wpe)\.|final_layernorm"
        ),
    ),
)
MODULES = (
    # searched in the last part of the name that is not "weight" or "bias"
    ("qkv", re.compile(r"^(qkv|qkv_proj|c_attn|query_key_value|in_proj)$")),
    ("q", re.compile(r"^(q_proj|query|wq)$")),
    ("k", re.compile(r"^(k_proj|key|wk)$")),
    ("v", re.compile(r"^(v_proj|value|wv)$")),
    ("o", re.compile(r"^(o_proj|out_proj|dense|wo|proj)$")),
    ("gate_up", re.compile(r"^gate_up_proj$")),
    ("gate", re.compile(r"^(gate_proj|w1)$")),
    ("up", re.compile(r"^(up_proj|w3|fc1|c_fc|linear_fc1)$")),
    ("down", re.compile(r"^(down_proj|w2|fc2|linear_fc2)$")),
    ("norm", re.compile(r"norm|^ln_|layrnorm")),
    ("patch", re.compile(r"patch_embed")),
    ("position", re.compile(r"pos|^wpe$|class_embedding")),
    ("embedding", re.compile(r"^(embed_tokens|wte|word_embeddings)$")),
    ("head", re.compile(r"^(lm_head|embed_out)$")),
    ("projection", re.compile(r"^(linear|linear_\d|fc\d?|\d+)$")),
)
LAYER = re.compile(r"(?:layers?|blocks|h|resblocks)\.(\d+)\.")


def classify(name: str) -> TensorName:
    """Component, layer and module of a parameter; what no table knows is called "other", for all to see.

    >>> classify("model.language_model.layers.3.mlp.up_proj.weight")
    TensorName(name=..., component="language", layer=3, module="up")
    """
    component = next((label for label, pattern in COMPONENTS if pattern.search(name)), "other")
    parts = [part for part in name.split(".") if part not in ("weight", "bias")]
    leaf = parts[-1]
    if leaf == "c_proj":  # GPT-2 names two matrices alike
        module = "down" if "mlp" in parts else "o"
    else:
        module = next((label for label, pattern in MODULES if pattern.search(leaf)), "other")
    if component == "projector" and module in ("up", "down", "other", "o"):
        module = "projection"
    layer = LAYER.search(name)
    return TensorName(name, component, int(layer.group(1)) if layer else None, module)
