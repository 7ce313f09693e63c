"""Tiny vision-language models of many families, each with a processor made here, for the conformance tests.

`VLMS` maps a family to a function (folder, seed=0) that saves a seeded random model (fp32, under 70k
parameters), its generation config and its complete processor; no network. All tokenizers extend that of
the visual world: its 58 words keep their ids, a family's own markers follow. To add a family, write a
function that returns its `Recipe` and add it to `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers as hf
from tokenizers import AddedToken

from vlopd.models.load import BUILTIN

PAD, BOS, EOS, IMAGE = 0, 1, 2, 4  # ids in the tokenizer of the visual world
SQUARE = {"height": 32, "width": 32}
TEXT: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=512,
    pad_token_id=PAD,
    bos_token_id=BOS,
    eos_token_id=EOS,
)
VISION: dict[str, Any] = dict(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=32,
    patch_size=8,
)
SIGLIP = {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False}


class Recipe(NamedTuple):
    """What a family is made of: the model's configuration (with its `model_type`), processor, end tokens."""

    config: dict[str, Any]
    processor: Any
    ends: tuple[int, ...] = (EOS,)


def build(family: str, folder: Path, seed: int = 0) -> None:
    """Saves a tiny model of the family, with weights scaled up so that inputs, pictures too, matter."""
    save(FAMILIES[family](), folder, seed)


def save(recipe: Recipe, folder: Path, seed: int = 0) -> None:
    """Saves a tiny model of a recipe, as `build`."""
    config, processor, ends = recipe
    torch.manual_seed(seed)
    model = hf.AutoModelForImageTextToText.from_config(hf.AutoConfig.for_model(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(6)
            parameter.add_(torch.randn_like(parameter), alpha=0.05)  # some begin as all 0 or all 1
    model.generation_config.bos_token_id = BOS
    model.generation_config.eos_token_id = list(ends)
    model.generation_config.pad_token_id = PAD
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


# --------------------------------------------------------------------------- tokenizers and templates


def make_tokenizer(special: Sequence[str] = (), words: Sequence[str] = (), **named: str) -> Any:
    """The tokenizer of the visual world with added tokens; `named` ones become attributes (`image_token`).

    `special` and `named` tokens vanish when decoding; `words` (line breaks) do not.
    """
    tokenizer = hf.AutoTokenizer.from_pretrained(
        BUILTIN / "shapes-student", model_specific_special_tokens=named
    )
    tokenizer.chat_template = None
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
        + [AddedToken(token, special=False, normalized=False) for token in words]
    )
    return tokenizer


def chat_template(image: str, end: str, first: str = "", turn: str = "") -> str:
    """`first`; each message as `turn`, its role's marker, its parts, `end`; then the answer's opening."""
    return (
        f"{first}{{% for m in messages %}}{turn}<{{{{ m.role }}}}>{parts(image)}{end}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{turn}<assistant>{{% endif %}}"
    )


def parts(image: str) -> str:
    """The piece of a template that writes message `m`: `image` for a picture, its words for a text."""
    return (
        "{% if m.content is string %} {{ m.content }}{% else %}{% for part in m.content %}"
        f"{{% if part.type == 'image' %}}{image}{{% else %}} {{{{ part.text }}}}{{% endif %}}"
        "{% endfor %}{% endif %}"
    )


# -------------------------------------------------------------------------------------- the families


def llava() -> Recipe:
    """CLIP tower; the features of its last layer but one, without the class token; a picture is 16 tokens."""
    config = dict(
        model_type="llava",
        vision_config={**VISION, "model_type": "clip_vision_model"},
        text_config={**TEXT, "model_type": "llama", "vocab_size": 64},  # six rows without a token
        image_token_index=IMAGE,
        image_seq_length=16,
    )
    processor = hf.LlavaProcessor(
        hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE),
        make_tokenizer(image_token="<image>"),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template("<image>", "<eos>", first="<bos>"),
    )
    return Recipe(config, processor)


def llava_onevision() -> Recipe:
    """Siglip tower over the picture and up to four tiles of it, with a learned line-break embedding."""
    tokenizer = make_tokenizer(("<|im_start|>",), image_token="<image>", video_token="<video>")
    grids = [[32, 32], [32, 64], [64, 32], [64, 64]]
    config = dict(
        model_type="llava_onevision",
        vision_config={**SIGLIP, "patch_size": 16},
        text_config={**TEXT, "model_type": "qwen2", "vocab_size": len(tokenizer)},
        image_token_index=IMAGE,
        video_token_index=tokenizer.video_token_id,
        image_grid_pinpoints=grids,
    )
    processor = hf.LlavaOnevisionProcessor(
        hf.LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=grids),
        tokenizer,
        hf.LlavaOnevisionVideoProcessor(size=SQUARE),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=chat_template("<image>", "<eos>", turn="<|im_start|>"),
    )
    return Recipe(config, processor)


QWEN_GRID = dict(patch_size=8, temporal_patch_size=2)
QWEN_PIXELS = dict(
    **QWEN_GRID, merge_size=2, size={"shortest_edge": 256, "longest_edge": 4096}
)  # at most 16 tokens a picture


def qwen(
    model_type: str,
    processor_class: type[Any],
    video_processor_class: type[Any],
    vision: dict[str, Any],
    text: dict[str, Any] | None = None,
    interleaved: bool = False,
) -> Recipe:
    """Shared by the generations: markers, padded vocabulary, a picture's own shape, positions on three axes."""
    tokenizer = make_tokenizer(
        ("<|im_start|>", "<|im_end|>"),
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
    )
    rope: dict[str, Any] = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3])
    if interleaved:
        rope["mrope_interleaved"] = True
    config = dict(
        model_type=model_type,
        text_config={**TEXT, "vocab_size": 72, "rope_parameters": rope, **(text or {})},
        vision_config=dict(**QWEN_GRID, depth=2, num_heads=2, spatial_merge_size=2, **vision),
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        vision_start_token_id=tokenizer.vision_start_token_id,
        vision_end_token_id=tokenizer.vision_end_token_id,
    )
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    processor = processor_class(
        hf.Qwen2VLImageProcessor(**QWEN_PIXELS),
        tokenizer,
        video_processor_class(**QWEN_PIXELS),
        chat_template=chat_template(image, "<|im_end|>", turn="<|im_start|>"),
    )
    return Recipe(config, processor, (tokenizer.convert_tokens_to_ids("<|im_end|>"), EOS))


def qwen2_vl() -> Recipe:
    """Full attention in the tower."""
    vision = dict(embed_dim=16, hidden_size=32)
    return qwen("qwen2_vl", hf.Qwen2VLProcessor, hf.Qwen2VLVideoProcessor, vision)


def qwen2_5_vl() -> Recipe:
    """Attention in windows in the tower's first block; a gated perceptron in each."""
    vision = dict(
        hidden_size=16,
        out_hidden_size=32,
        intermediate_size=32,
        window_size=32,
        fullatt_block_indexes=[1],
    )
    return qwen("qwen2_5_vl", hf.Qwen2_5_VLProcessor, hf.Qwen2VLVideoProcessor, vision)


QWEN3_VISION: dict[str, Any] = dict(
    hidden_size=16,
    out_hidden_size=32,
    intermediate_size=32,
    num_position_embeddings=16,
    deepstack_visual_indexes=[0],
)


def qwen3_vl() -> Recipe:
    """The tower's first block also feeds a layer of the language model; learned, interpolated positions."""
    text = dict(head_dim=16)
    return qwen("qwen3_vl", hf.Qwen3VLProcessor, hf.Qwen3VLVideoProcessor, QWEN3_VISION, text, True)


def qwen3_vl_moe() -> Recipe:
    """As Qwen3-VL, with four experts a layer, two of them used for a token."""
    text = dict(head_dim=16, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2)
    return qwen(
        "qwen3_vl_moe", hf.Qwen3VLProcessor, hf.Qwen3VLVideoProcessor, QWEN3_VISION, text, True
    )


def tiled(model_type: str, make_processor: Callable[..., Any]) -> Recipe:
    """Shared by Idefics3 and SmolVLM: tiles, each behind a marker of its row and column, four tokens a tile.

    `make_processor` takes tokenizer, sizes and further arguments.
    """
    end = "<end_of_utterance>"
    places = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    tokenizer = make_tokenizer(
        ("<fake_token_around_image>", end, "<global-img>", *places), words=("\n",)
    )
    config = dict(
        model_type=model_type,
        vision_config=VISION,
        text_config={**TEXT, "model_type": "llama", "vocab_size": len(tokenizer)},
        image_token_id=IMAGE,
        scale_factor=2,
    )
    processor = make_processor(
        tokenizer,
        dict(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}),
        image_seq_len=4,
        chat_template=chat_template("<image>", end + "\n", first="<bos>"),
    )
    return Recipe(config, processor, (tokenizer.convert_tokens_to_ids(end), EOS))


def qwen3_5() -> Recipe:
    """Qwen3-VL without DeepStack; every other layer is linear attention."""
    text = dict(
        head_dim=16,
        layer_types=["linear_attention", "full_attention"],
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        tie_word_embeddings=False,
    )
    vision = dict(
        hidden_size=16, out_hidden_size=32, intermediate_size=32, num_position_embeddings=16
    )
    return qwen("qwen3_5", hf.Qwen3VLProcessor, hf.Qwen3VLVideoProcessor, vision, text, True)


def idefics3() -> Recipe:
    """Pictures of any shape, cut into up to four tiles beside a small version of the whole."""

    def make_processor(tokenizer: Any, sizes: dict[str, Any], **options: Any) -> Any:
        return hf.Idefics3Processor(hf.Idefics3ImageProcessor(**sizes), tokenizer, **options)

    return tiled("idefics3", make_processor)


def smolvlm() -> Recipe:
    """As Idefics3, with videos too."""

    def make_processor(tokenizer: Any, sizes: dict[str, Any], **options: Any) -> Any:
        image, video = hf.SmolVLMImageProcessor(**sizes), hf.SmolVLMVideoProcessor(**sizes)
        return hf.SmolVLMProcessor(image, tokenizer, video, **options)

    return tiled("smolvlm", make_processor)


def internvl() -> Recipe:
    """A picture as up to three tiles and a thumbnail, four tokens each; tied embeddings."""
    tokenizer = make_tokenizer(
        ("<|im_start|>",),
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    config = dict(
        model_type="internvl",
        vision_config=VISION,
        text_config={**TEXT, "model_type": "qwen2", "vocab_size": len(tokenizer)},
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=4,
    )
    processor = hf.InternVLProcessor(
        hf.GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, max_patches=3),
        tokenizer,
        hf.InternVLVideoProcessor(size=SQUARE),
        image_seq_length=4,
        chat_template=chat_template("<IMG_CONTEXT>", "<eos>", turn="<|im_start|>"),
    )
    return Recipe(config, processor)


def gemma3() -> Recipe:
    """A picture's four tokens attend to each other; a sliding window; tied, scaled embeddings; two ends."""
    tokenizer = make_tokenizer(
        ("<start_of_turn>", "<end_of_turn>"),
        words=("\n", "\n\n"),
        image_token="<image_soft_token>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
    )
    config = dict(
        model_type="gemma3",
        vision_config=SIGLIP,
        text_config=dict(
            **TEXT,
            vocab_size=len(tokenizer),
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
        ),
        mm_tokens_per_image=4,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    template = chat_template("<start_of_image>", "<end_of_turn>\n", "<bos>", "<start_of_turn>")
    processor = hf.Gemma3Processor(
        hf.Gemma3ImageProcessor(size=SQUARE), tokenizer, template, image_seq_length=4
    )
    return Recipe(config, processor, (EOS, tokenizer.convert_tokens_to_ids("<end_of_turn>")))


def pixtral_based(model_type: str, patch: int, merge: int, **more: Any) -> Recipe:
    """Pixtral tower with axial positions: a picture at its own shape, a marker after each row of tokens.

    `merge` by `merge` patches of `patch` pixels become one token.
    """
    tokenizer = make_tokenizer(("[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"))
    vision = {**VISION, "model_type": "pixtral", "image_size": 64, "patch_size": patch}
    text = {**TEXT, "model_type": "mistral", "vocab_size": len(tokenizer), "head_dim": 16}
    config = dict(
        model_type=model_type,
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        **more,
    )
    message = parts("[IMG]")
    processor = hf.PixtralProcessor(
        hf.PixtralImageProcessor(size={"longest_edge": 64}, patch_size=patch),
        tokenizer,
        patch_size=patch,
        spatial_merge_size=merge,
        chat_template=f"<bos>{{% for m in messages %}}{{% if m.role == 'assistant' %}}{message}<eos>"
        f"{{% else %}}[INST]{message}[/INST]{{% endif %}}{{% endfor %}}",
    )
    return Recipe(config, processor)


def mistral3() -> Recipe:
    """Merges two by two patches before the projector; tied embeddings."""
    return pixtral_based("mistral3", patch=8, merge=2, spatial_merge_size=2)


def pixtral() -> Recipe:
    """Pixtral itself is a LLaVA model; one token a patch."""
    features = dict(vision_feature_layer=-1, vision_feature_select_strategy="full")
    return pixtral_based("llava", patch=16, merge=1, **features)


def paligemma(text: dict[str, Any] | None = None) -> Recipe:
    """Prompt and picture attend both ways; no chat template: the processor adds picture, start, line break."""
    tokenizer = make_tokenizer(words=("\n",), image_token="<image>")
    processor = hf.PaliGemmaProcessor(
        hf.SiglipImageProcessor(size=SQUARE, image_seq_length=16), tokenizer
    )
    shape = {**TEXT, "vocab_size": len(tokenizer), "head_dim": 16}
    config = dict(
        model_type="paligemma",
        vision_config=SIGLIP,
        text_config={**shape, **(text or {"model_type": "gemma"})},
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
    )
    return Recipe(config, processor)


def paligemma2() -> Recipe:
    """On Gemma 2: logits are capped after the head, layers alternate between a sliding window and none."""
    return paligemma(
        dict(
            model_type="gemma2",
            query_pre_attn_scalar=16,
            sliding_window=8,
            final_logit_softcapping=2.0,
        )
    )


FAMILIES: dict[str, Callable[[], Recipe]] = {
    "llava": llava,
    "llava_onevision": llava_onevision,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "qwen3_vl_moe": qwen3_vl_moe,
    "qwen3_5": qwen3_5,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "internvl": internvl,
    "gemma3": gemma3,
    "mistral3": mistral3,
    "pixtral": pixtral,
    "paligemma": paligemma,
    "paligemma2": paligemma2,
}
MISSING = {"smolvlm"} if find_spec("num2words") is None else set()
"""Families that cannot be made here: SmolVLM's processor needs the package num2words."""

VLMS: dict[str, Callable[..., None]] = {
    family: partial(build, family) for family in FAMILIES if family not in MISSING
}
