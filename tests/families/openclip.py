"""Tiny OpenCLIP students with random weights, put together by `assemble` from folders made here."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from vlopd.models.load import BUILTIN
from vlopd.models.openclip import assemble

TOWERS: dict[str, dict[str, Any]] = {
    "vit": dict(image_size=32, layers=2, width=32, head_width=16, patch_size=8),
    "resnet": dict(image_size=64, layers=[1, 1, 1, 1], width=8, head_width=32),
    "timm-map": dict(timm_model_name="test_convnext", image_size=64),
    "timm-tokens": dict(timm_model_name="test_vit_relpos", image_size=160),
}
"""Vision parts of open_clip configs. The last has buffers that are computed, not stored."""


def build_tower(folder: Path, kind: str = "vit", seed: int = 0) -> str:
    """Saves a random CLIP as open_clip's folders are, and returns its `local-dir:` name."""
    text = dict(context_length=8, vocab_size=16, width=16, heads=1, layers=1)
    model_cfg = {"embed_dim": 16, "vision_cfg": TOWERS[kind], "text_cfg": text}
    preprocess_cfg = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    state = open_clip.CLIP(**model_cfg).state_dict()
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()},
        folder / "open_clip_model.safetensors",
    )
    return f"local-dir:{folder}"


def build_language(folder: Path, seed: int = 0, **changes: Any) -> str:
    """Saves a tiny random Llama with the tokenizer of the visual world, and returns the folder."""
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN / "shapes-student")
    sizes: dict[str, Any] = dict(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def build_tiny(folder: Path, kind: str = "vit", seed: int = 0) -> None:
    """Writes a whole tiny student: random tower of this kind, projector, Llama, processor, generation config."""
    with tempfile.TemporaryDirectory() as parts:
        model, processor = assemble.assemble(
            build_tower(Path(parts, "tower"), kind, seed),
            build_language(Path(parts, "language"), seed),
            seed=seed,
        )
    with torch.no_grad():  # livelier than the default initialisation, so that inputs matter
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "vision_tower" not in name:
                parameter.mul_(6)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
