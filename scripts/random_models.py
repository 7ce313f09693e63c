"""Random-weight models of published architectures with a byte tokenizer, for benchmarks; nothing is downloaded.

    python scripts/random_models.py Qwen/Qwen2.5-VL-3B-Instruct FOLDER [--layers 4] [--device cuda]

An architecture is a name under configs/pairs/architectures, or a folder with a config.json. The tokenizer has as many
entries as the published one, the special tokens of the config at their ids; a token is a byte. Completions of random
weights practically never end early: an end token has one chance in the vocabulary's size.
"""

from __future__ import annotations

import argparse
from itertools import count
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from vlopd.errors import ConfigError
from vlopd.models import families
from vlopd.models.loaded import LoadedModel

ARCHITECTURES = Path(__file__).parents[1] / "configs" / "pairs" / "architectures"

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}"
    "{{ p.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SPECIAL = {
    "bos_token_id": "<|bos|>",
    "eos_token_id": "<|im_end|>",
    "pad_token_id": "<|endoftext|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}
"""Config field -> the token at its id."""

PROCESSORS = {
    "qwen2_5_vl": (hf.Qwen2_5_VLProcessor, hf.Qwen2VLVideoProcessor),
    "qwen3_vl": (hf.Qwen3VLProcessor, hf.Qwen3VLVideoProcessor),
    "qwen3_5": (hf.Qwen3VLProcessor, hf.Qwen3VLVideoProcessor),
}
"""Model type -> processor and video processor."""


def architectures() -> list[str]:
    """Names of the published architectures, "ORG/NAME"."""
    found = ARCHITECTURES.glob("*/*/config.json")
    return sorted(path.parent.relative_to(ARCHITECTURES).as_posix() for path in found)


def read_config(architecture: str, layers: int | None = None) -> hf.PretrainedConfig:
    """A published config, with the first `layers` layers of its language model (hybrids need a whole period: 4).

    Raises ConfigError.
    """
    folder = ARCHITECTURES / architecture
    folder = folder if folder.is_dir() else Path(architecture)
    if not (folder / "config.json").exists():
        names = ", ".join(architectures())
        raise ConfigError(f"no architecture {architecture!r}: give a folder, or one of {names}")
    config = hf.AutoConfig.from_pretrained(folder)
    if layers is not None:
        text = config.get_text_config()
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    return config


def make_tokenizer(config: hf.PretrainedConfig) -> Any:
    """A tokenizer whose tokens are bytes, with the config's special tokens at their ids and unused entries between."""
    named: dict[int, str] = {}
    for field, word in SPECIAL.items():
        i = getattr(config, field, None)
        for each in i if isinstance(i, (list, tuple)) else [i]:
            if each is not None and each not in named:
                named[each] = word if word not in named.values() else f"<|{field}_{each}|>"
    largest = max(named, default=config.get_text_config().vocab_size - 1)
    free = (i for i in count() if i not in named)
    for word in (*SPECIAL.values(), "<|im_start|>"):
        if word not in named.values():
            named[next(free)] = word
    words = {i: letter for letter, i in zip(sorted(pre_tokenizers.ByteLevel.alphabet()), free)}  # noqa: B905
    rows = {i: named.get(i) or words.get(i) or f"\u0120unused{i}" for i in range(largest + 1)}
    inner = Tokenizer(models.BPE(vocab={word: i for i, word in rows.items()}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(
        [AddedToken(word, special=True, normalized=False) for word in named.values()]
    )
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token=SPECIAL["eos_token_id"],
        pad_token=SPECIAL["pad_token_id"],
        model_specific_special_tokens={
            "vision_start_token": SPECIAL["vision_start_token_id"],
            "vision_end_token": SPECIAL["vision_end_token_id"],
            "image_token": SPECIAL["image_token_id"],
            "video_token": SPECIAL["video_token_id"],
        },
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_processor(config: hf.PretrainedConfig) -> Any:
    """A tokenizer, or an image-text model's processor around it."""
    tokenizer = make_tokenizer(config)
    if not families.sees_images(config):
        return tokenizer
    processor, video = PROCESSORS[config.model_type]
    vision = config.vision_config
    images = hf.Qwen2VLImageProcessor(
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
    )
    return processor(images, tokenizer, video(), chat_template=TEMPLATE)


def make(
    architecture: str,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    layers: int | None = None,
    seed: int = 0,
) -> LoadedModel:
    """A seeded model of the architecture with its processor. Raises ConfigError for a name that is not known."""
    config = read_config(architecture, layers)
    processor = make_processor(config)
    torch.manual_seed(seed)
    with torch.device(device):
        model = families.auto_classes(config)[0].from_config(config, dtype=dtype)
    tokenizer = families.tokenizer_of(processor)
    with torch.no_grad():  # some classes leave an output layer of its own at zero
        head = model.get_output_embeddings().weight
        if head is not model.get_input_embeddings().weight:
            head.normal_(0, 0.02)
    model.generation_config.bos_token_id = None
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return LoadedModel(architecture, model.eval(), processor)


def save(loaded: LoadedModel, folder: Path | str) -> Path:
    """Writes model and processor into a folder that `vlopd` loads."""
    loaded.model.save_pretrained(folder)
    loaded.processor.save_pretrained(folder)
    return Path(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("architecture", help=f"a folder, or one of {', '.join(architectures())}")
    parser.add_argument("folder")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    made = make(asked.architecture, device=asked.device, layers=asked.layers)
    print(f"{save(made, asked.folder)}: {made}")
