"""Parameter names: component, layer and module of a parameter, and the matrices within a stored tensor.

A name that no table matches is "other". A family with its own parameter names needs a pattern in `COMPONENTS` or
`MODULES`; one with its own fused layout, an entry in the tables below.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig

from vlopd.errors import ConfigError
from vlopd.types import TensorName

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
        "token",  # learned vectors of no matrix: class tokens, line breaks, queries, sinks
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
WRAPPERS = {
    "_checkpoint_wrapped_module",  # activation checkpointing
    "_fsdp_wrapped_module",
    "_fpw_module",  # fairscale's FSDP
    "_orig_mod",  # torch.compile
    "_forward_module",  # Lightning Fabric
    "_module",  # Opacus
    "module",  # DataParallel, DDP, DeepSpeed
    "base_layer",  # PEFT, around an adapted module
}
"""Parts that training frameworks insert anywhere into a name."""
FACTOR = re.compile(r"\.lora_(embedding_)?[AB](\.default)?(?=\.|$)")
"""A factor of PEFT's LoRA, after the name of the module that it is an update of."""
LAYER = re.compile(r"(?:layers?|blocks|h|resblocks)\.(\d+)\.")

CONV1D = ("gpt2",)
"""Model types of language models whose linear layers are stored as [in, out]."""

INPUT_FIRST = re.compile(r"mm_input_projection_weight$|vision_tower\.proj$")
"""Other matrices that are stored as [in, out]."""

SPLIT_QKV = ("phi3", "gpt2")
"""Language models whose fused qkv is q, then k, then v. Others interleave the heads and are not split.

All vision towers that fuse them concatenate q, k and v.
"""

EXPERTS_INPUT_FIRST = ("gpt_oss",)
"""Families whose stacks of experts are [experts, in, out]; others are [experts, out, in]."""

INTERLEAVED_GATE_UP = ("gpt_oss",)
"""Families whose gate and up rows alternate within a fused matrix, which is not split."""


def classify(name: str) -> TensorName:
    """Component, layer and module of a parameter; "other" where no pattern matches.

    >>> classify("model.language_model.layers.3.mlp.up_proj.weight")
    TensorName(name=..., component="language", layer=3, module="up")
    """
    plain = unwrapped_name(name)
    path = FACTOR.sub("", re.sub(r"\.(weight|bias)$", "", plain))
    component = next((label for label, pattern in COMPONENTS if pattern.search(plain)), "other")
    module = next((label for label, pattern in MODULES if pattern.search(path)), "other")
    if component == "projector" and module in ("up", "down", "o"):
        module = "projection"  # an MLP, not a transformer's matrices
    layer = LAYER.search(plain)
    return TensorName(name, component, int(layer.group(1)) if layer else None, module)


def unwrapped_name(name: str) -> str:
    """>>> unwrapped_name("model._orig_mod.layers.0.mlp.up_proj.base_layer.weight")
    "model.layers.0.mlp.up_proj.weight"
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


@dataclass(frozen=True)
class Part:
    """One matrix (or its bias) within a stored tensor: `tensor[index]`.

    `transposed`: stored as [in, out] rather than [out, in].
    """

    module: str
    expert: int | None
    index: tuple[slice | int, ...]
    transposed: bool = False


def parts(where: TensorName, shape: Sequence[int], config: PretrainedConfig) -> tuple[Part, ...]:
    """The matrices that tile a stored tensor: q, k, v of a fused qkv; gate, up; experts.

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
    if stacked and len(shape) == 3 and shape[1] != shape[2]:
        width = getattr(
            text, "hidden_size", None
        )  # hub checkpoints of a family may have the other order
        if width in shape[1:]:
            transposed = (shape[1] == width) != (module == "down")
    out = len(shape) - 1 if transposed else int(stacked)  # the dimension of output features
    sizes: Mapping[str, int] = {module: shape[out]}
    if module == "qkv":
        sizes = _qkv_sizes(where, shape[out], config)
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


def _qkv_sizes(where: TensorName, size: int, config: PretrainedConfig) -> Mapping[str, int]:
    """Output features of q, k and v in a fused tensor with `size` of them, from the component's head counts."""
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


def freeze(model: nn.Module, components: Sequence[str]) -> None:
    """Freezes the parameters of these components (vision, projector, language, embedding, head).

    Raises ConfigError for a component without parameters in the model; a tied head counts as embedding.
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
    if not any(parameter.requires_grad for _, parameter in parameters):
        raise ConfigError(
            f"train.freeze = {list(components)} leaves nothing to train: the model has "
            f"{', '.join(sorted(known))}; leave one out"
        )
