"""Assembles an OpenCLIP student: an open_clip vision tower, a new projector, a causal language model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch
from tokenizers import AddedToken
from torch import nn
from transformers import PreTrainedModel

from vlopd.errors import ConfigError, first_line
from vlopd.models.load import load
from vlopd.models.openclip.vlm import (
    OpenClipImageProcessor,
    OpenClipVlmConfig,
    OpenClipVlmForConditionalGeneration,
    OpenClipVlmProcessor,
    OpenClipVlmProjector,
    check_tower,
    image_tokens,
)

IMAGE_PARTS = """{%- set plain = namespace(messages=[]) %}
{%- for message in messages %}
{%- if message['content'] is string or message['content'] is not iterable %}
{%- set plain.messages = plain.messages + [message] %}
{%- else %}
{%- set said = namespace(text='') %}
{%- for part in message['content'] %}
{%- set said.text = said.text + (IMAGE if part['type'] == 'image' else part['text']) %}
{%- endfor %}
{%- set plain.messages = plain.messages + [dict(message, content=said.text)] %}
{%- endif %}
{%- endfor %}
{%- set messages = plain.messages %}
"""
"""Prefix for a chat template that expects strings: joins the parts of a message, images as placeholders."""


def _template_with_images(tokenizer: Any, image_token: str) -> str:
    """The tokenizer's chat template, extended if needed to write image parts as `image_token`.

    Raises ConfigError where neither writes exactly one placeholder per image.
    """
    probe = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]
    own = tokenizer.get_chat_template()
    for template in (own, IMAGE_PARTS.replace("IMAGE", repr(image_token)) + own):
        try:
            text = tokenizer.apply_chat_template(probe, chat_template=template, tokenize=False)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError):
            continue  # expects strings
        if text.count(image_token) == 1:
            return template
    raise ConfigError(
        f"the chat template does not write one {image_token!r} per image; give another `template`"
    )


def _load_tower(vision: str, pretrained: str | None) -> tuple[Any, dict[str, Any]]:
    """Loads open_clip's vision tower with its weights, and the `open_clip` entry of the config.

    Raises ConfigError for an unknown tower or tag, pickled or missing weights, and an activation mismatch.
    """
    import open_clip

    try:
        model_cfg = open_clip.get_model_config(vision)
        if model_cfg is None:
            raise ConfigError(
                f"open_clip has no model {vision!r}; `open_clip.list_models()` has the names, a folder "
                "is local-dir:PATH"
            )
        check_weights(vision, pretrained, bool(model_cfg.get("quick_gelu", False)))
        clip = open_clip.create_model(vision, pretrained=pretrained)
    except (RuntimeError, ValueError, OSError) as error:
        raise ConfigError(f"cannot load the vision tower {vision!r}: {first_line(error)}") from None
    entry = {
        "embed_dim": model_cfg["embed_dim"],
        "quick_gelu": bool(model_cfg.get("quick_gelu", False)),
        "vision_cfg": {**model_cfg["vision_cfg"], "timm_model_pretrained": False},
    }
    return clip.visual.eval(), entry


def check_weights(vision: str, pretrained: str | None, quick_gelu: bool) -> None:
    """Locates (or downloads) the file that open_clip would load, and refuses all but safetensors.

    Raises ConfigError for a pickle, for missing weights, and for an activation mismatch.
    """
    import open_clip
    from open_clip.factory import _find_checkpoint_in_dir, parse_model_name
    from open_clip.pretrained import download_pretrained_from_hf

    schema, where = parse_model_name(vision)
    if schema and pretrained:
        raise ConfigError(f"{vision!r} brings its own weights; leave out pretrained={pretrained!r}")
    if not schema and pretrained is None:
        return  # random weights
    tag = {} if schema else open_clip.get_pretrained_cfg(vision, pretrained)
    if tag and bool(tag.get("quick_gelu", False)) != quick_gelu:
        raise ConfigError(
            f"the weights {pretrained!r} were trained with quick_gelu={not quick_gelu}, {vision!r} has "
            f"quick_gelu={quick_gelu}; take the model of the other activation (its name has -quickgelu)"
        )
    if schema == "local-dir":
        path = _find_checkpoint_in_dir(Path(where))
    elif schema == "hf-hub":
        path = download_pretrained_from_hf(where)
    else:
        path = open_clip.download_pretrained(tag) if tag else pretrained
    if path is None or not Path(path).is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(vision)) or "none"
        raise ConfigError(
            f"no weights for {vision!r}: {path or where} is neither a file nor a tag (tags: {tags})"
        )
    if Path(path).suffix != ".safetensors":
        raise ConfigError(
            f"the weights of {vision!r} are in {path}; only safetensors are read: convert the file"
        )


@torch.no_grad()
def _check_language(name: str, language: PreTrainedModel) -> None:
    """Raises ConfigError where the logits are not the output layer applied to the last hidden state.

    Compares logits rather than config fields, since caps, scales and biases have many names.
    """
    ids = torch.arange(4)[None]
    hidden = language.base_model(input_ids=ids).last_hidden_state
    expected = nn.functional.linear(hidden, language.get_output_embeddings().weight)
    difference = (language(input_ids=ids).logits - expected).abs().max().item()
    if difference > 0:
        raise ConfigError(
            f"{name!r} post-processes its logits after the output layer (by up to {difference:.1e} here: a cap, "
            "a scale or a bias), which an OpenCLIP student does not support; choose another language model"
        )


def assemble(
    vision: str,
    language: str,
    *,
    pretrained: str | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    vision_layer: int | None = None,
    keep_class_token: bool = False,
    projector_hidden_size: int | None = None,
    image_token: str = "<image>",
    template: str | None = None,
) -> tuple[OpenClipVlmForConditionalGeneration, OpenClipVlmProcessor]:
    """Assembles a vision tower, a new projector and a language model.

    `vision` is an open_clip model name (with `pretrained`, a tag or a .safetensors file; without, random
    weights), `local-dir:PATH` or `hf-hub:ID`. `language` and `template` are as a config's model and
    template. `seed` seeds the projector, random tower weights, and an embedding for `image_token` if the
    tokenizer lacks it. Does not change the global random state.

    Raises ConfigError for an unsupported tower, weights or language model.
    """
    source = load(language, dtype, template=template)
    if source.sees_images:
        raise ConfigError(
            f"{language!r} is a vision-language model; give a text-only language model"
        )
    lm, tokenizer = source.model, source.tokenizer
    _check_language(language, lm)
    tokenizer.add_tokens([AddedToken(image_token, special=True, normalized=False)])
    image_token_id = tokenizer.convert_tokens_to_ids(image_token)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tower, open_clip = _load_tower(vision, pretrained)
        check_tower(tower, vision_layer, keep_class_token)
        if image_token_id >= source.vocabulary_rows:
            lm.resize_token_embeddings(image_token_id + 1, mean_resizing=False)
        image_processor = OpenClipImageProcessor(**tower.preprocess_cfg)
        blank = torch.zeros(1, 3, *_size_pair(image_processor.size))
        try:
            with torch.no_grad():
                features = image_tokens(tower, blank, vision_layer, keep_class_token)
        except (AssertionError, IndexError) as error:
            raise ConfigError(
                f"the tower {vision!r} has no features for vision_layer {vision_layer} ({error})"
            ) from None
        config = OpenClipVlmConfig(
            open_clip=open_clip,
            preprocess=dict(tower.preprocess_cfg),
            text_config=lm.config,
            image_token_id=image_token_id,
            image_seq_length=features.shape[1],
            vision_hidden_size=features.shape[2],
            vision_layer=vision_layer,
            keep_class_token=keep_class_token,
            projector_hidden_size=projector_hidden_size,
        )
        projector = OpenClipVlmProjector(config)
    with torch.device("meta"):  # the parts exist already; only the module structure is needed
        model = OpenClipVlmForConditionalGeneration(config)
    if type(model.model.language_model) is not type(lm.base_model):
        raise ConfigError(
            f"{language!r} contains a {type(lm.base_model).__name__}, which transformers would rebuild as "
            f"{type(model.model.language_model).__name__}; choose another language model"
        )
    model.model.vision_tower = tower.to(dtype)
    model.model.multi_modal_projector = projector.to(dtype)
    model.model.language_model = lm.base_model
    model.lm_head.weight = lm.get_output_embeddings().weight
    model.generation_config = lm.generation_config
    tokenizer.chat_template = _template_with_images(tokenizer, image_token)
    processor = OpenClipVlmProcessor(
        image_processor,
        tokenizer,
        image_seq_length=config.image_seq_length,
        image_token=image_token,
        chat_template=tokenizer.chat_template,
    )
    return model.eval(), processor


def _size_pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) from either form of open_clip's image size."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])
