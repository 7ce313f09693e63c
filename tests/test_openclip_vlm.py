"""The OpenCLIP student: any open_clip tower, a projector and a language model as one Hugging Face class."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GraniteConfig,
    GraniteForCausalLM,
)

from tests.families.openclip import TOWERS, build_language, build_tiny, build_tower
from vlopd.errors import ConfigError
from vlopd.models.openclip import vlm
from vlopd.models.openclip.assemble import assemble
from vlopd.models.openclip.vlm import OpenClipImageProcessor, image_tokens
from vlopd.models.parameter_names import freeze

ASK = [
    {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "how many red"}],
    }
]


def picture(seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """A random picture of (width, height) pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encode(processor, *images: Image.Image):
    """One prompt an image."""
    text = processor.apply_chat_template(ASK, tokenize=False, add_generation_prompt=True)
    return processor(
        text=[text] * len(images),
        images=[[image] for image in images],
        padding=True,
        return_tensors="pt",
        add_special_tokens=False,
    )


def load(folder: Path, **options):
    vlm.register()
    model = AutoModelForImageTextToText.from_pretrained(
        folder, use_safetensors=True, **{"dtype": torch.float32, **options}
    )
    return model.eval(), AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, str]:
    """Names of a tower of every kind and, under "language", of a language model."""
    root = tmp_path_factory.mktemp("parts")
    towers = {kind: build_tower(root / kind, kind) for kind in TOWERS}
    return {**towers, "language": build_language(root / "language")}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    build_tiny(folder)
    return folder


# ---------------------------------------------------------------------------------- save and reload


@torch.no_grad()
@pytest.mark.parametrize("kind", TOWERS)
def test_round_trip(parts, tmp_path, kind):
    """Saved and loaded by the plain auto classes, weights and logits are the same bits, for every tower."""
    model, processor = assemble(parts[kind], parts["language"])
    model.save_pretrained(tmp_path, save_original_format=False)
    processor.save_pretrained(tmp_path)
    loaded, loaded_processor = load(tmp_path)
    state, other = model.state_dict(), loaded.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[name], other[name]) for name in state)
    batch, again = (encode(each, picture(1), picture(2)) for each in (processor, loaded_processor))
    assert batch.keys() == again.keys() and all(torch.equal(batch[k], again[k]) for k in batch)
    assert torch.equal(model(**batch).logits, loaded(**batch).logits)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json", ".jinja"}


@torch.no_grad()
def test_language_model_and_tower_keep_their_weights(parts):
    """Assembling changes no weight: text alone gives the language model's logits, the tower its features."""
    model, _ = assemble(parts["vit"], parts["language"])
    language = AutoModelForCausalLM.from_pretrained(parts["language"])
    ids = torch.tensor([[1, 5, 30, 31, 6]])
    assert torch.equal(model(input_ids=ids).logits, language(input_ids=ids).logits)
    clip = open_clip.create_model(parts["vit"]).eval()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.model.vision_tower(pixels), clip.encode_image(pixels))


@torch.no_grad()
def test_tied_weights_stay_tied(parts, tmp_path):
    """A language model with tied weights gives a model with tied weights, before and after saving."""
    language = build_language(tmp_path / "language", tie_word_embeddings=True)
    model, processor = assemble(parts["vit"], language)
    model.save_pretrained(tmp_path / "vlm")
    processor.save_pretrained(tmp_path / "vlm")
    loaded, _ = load(tmp_path / "vlm")
    for each in (model, loaded):
        assert each.lm_head.weight is each.get_input_embeddings().weight
    batch = encode(processor, picture(1))
    assert torch.equal(model(**batch).logits, loaded(**batch).logits)
    with pytest.raises(ConfigError, match="head"):  # it has no parameter of its own
        freeze(loaded, ["head"])


# ------------------------------------------------------------------------------------------ forward


@torch.no_grad()
@pytest.mark.parametrize("kind", TOWERS)
def test_image_changes_logits(tmp_path, kind):
    """Another picture gives other logits, for every tower; each prompt of a batch reads its own picture."""
    build_tiny(tmp_path, kind)
    model, processor = load(tmp_path)
    together = model(**encode(processor, picture(1), picture(2))).logits
    alone = [model(**encode(processor, picture(seed))).logits[0] for seed in (1, 2)]
    assert (alone[0] - alone[1]).abs().max() > 1e-3
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_several_images_in_order(tiny):
    """The images of a prompt fill its placeholders from left to right."""
    model, processor = load(tiny)
    first, second = picture(1), picture(2)
    batch = processor(text=["<image> red <image>"], images=[[first, second]], return_tensors="pt")
    features = model.get_image_features(batch["pixel_values"])
    embedded = model.model.embed(batch["input_ids"], batch["pixel_values"])
    places = batch["input_ids"] == model.config.image_token_id
    assert places.sum() == 2 * model.config.image_seq_length
    assert torch.equal(embedded[places], features.flatten(0, 1))
    swapped = processor.image_processor([second, first], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"].flip(0), swapped)


@torch.no_grad()
def test_generate(tiny):
    """`generate` reads the image once, and gives what full forwards without a cache give."""
    model, processor = load(tiny)
    batch = encode(processor, picture(1), picture(2))
    made = model.generate(**batch, max_new_tokens=5, do_sample=False, eos_token_id=None)
    ids = batch["input_ids"]
    for _ in range(5):
        logits = model(input_ids=ids, pixel_values=batch["pixel_values"]).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(made, ids)


def test_mismatch_refused(tiny):
    """Placeholders and features of different number are an error that names both numbers."""
    model, processor = load(tiny)
    batch = encode(processor, picture(1))
    ids, n = batch["input_ids"], model.config.image_seq_length
    fewer = torch.cat([ids[:, :3], ids[:, 4:]], 1)
    with pytest.raises(ValueError, match=rf"{n - 1} image tokens .* {n} features"):
        model(input_ids=fewer, pixel_values=batch["pixel_values"])
    with pytest.raises(ValueError, match=rf"{n} image tokens .* 0 features"):
        model(input_ids=ids)


def test_bf16_and_gradients(tiny):
    """In bf16 the loss is finite and gradients reach tower, projector and language model."""
    model, processor = load(tiny, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    batch = encode(processor, picture(1))  # fp32 pixels
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == model.config.image_token_id, -100)
    loss = model(**batch, labels=labels).loss
    loss.backward()
    assert torch.isfinite(loss)
    inner = model.model
    for weight in (
        inner.vision_tower.conv1.weight,
        inner.vision_tower.transformer.resblocks[0].attn.in_proj_weight,
        inner.multi_modal_projector.linear_1.weight,
        inner.language_model.layers[0].self_attn.q_proj.weight,
        model.lm_head.weight,
    ):
        assert weight.grad is not None and weight.grad.abs().sum() > 0


# ------------------------------------------------------------------------------------------- towers


@torch.no_grad()
def test_tokens_are_the_towers_own():
    """By default a ViT's tokens are those that open_clip itself gives; a class token goes before them."""
    torch.manual_seed(0)
    for changes in ({}, {"final_ln_after_pool": True}, {"attentional_pool": True}):
        vision_cfg = {**TOWERS["vit"], **changes, "attn_pooler_queries": 5, "attn_pooler_heads": 2}
        tower = vlm.build_tower({"embed_dim": 16, "vision_cfg": vision_cfg}).eval()
        pixels = torch.randn(2, 3, 32, 32)
        tokens = image_tokens(tower, pixels, None, False)
        tower.output_tokens = True
        assert torch.equal(tokens, tower(pixels)[1])
        if "attentional_pool" in changes:
            with pytest.raises(ConfigError, match="class token"):
                vlm.check_tower(tower, None, True)
        else:
            with_class = image_tokens(tower, pixels, None, True)
            assert torch.equal(with_class[:, 1:], tokens)


@torch.no_grad()
def test_inner_layer():
    """A vision layer gives that block's output without the final norm, in the order of the tokens."""
    torch.manual_seed(0)
    tower = vlm.build_tower({"embed_dim": 16, "vision_cfg": TOWERS["vit"]}).eval()
    pixels = torch.randn(2, 3, 32, 32)
    seen = []
    tower.transformer.resblocks[0].register_forward_hook(lambda *args: seen.append(args[-1]))
    tokens = image_tokens(tower, pixels, 0, True)
    assert torch.equal(tokens, seen[0])


def test_missing_layer_refused(parts):
    """A vision layer that the tower does not have is refused by its number."""
    with pytest.raises(ConfigError, match="vision_layer 2"):
        assemble(parts["vit"], parts["language"], vision_layer=2)
    model, _ = assemble(parts["vit"], parts["language"], vision_layer=-2, keep_class_token=True)
    assert model.config.image_seq_length == 17


@torch.no_grad()
@pytest.mark.parametrize("name", ["test_convnext", "test_mambaout", "test_vit"])
def test_timm_tokens(name):
    """A timm trunk's tokens run along the rows of the picture, whatever the layout of its features."""
    torch.manual_seed(0)
    tower = vlm.build_tower({"embed_dim": 16, "vision_cfg": {"timm_model_name": name}})
    pixels = torch.randn(1, 3, 160, 160)
    features = tower.eval().trunk.forward_features(pixels)[0]
    tokens = image_tokens(tower, pixels, None, False)[0]
    row, column = 1, 2
    expected, across = {
        "test_convnext": lambda: (features[:, row, column], features.shape[2]),  # C, h, w
        "test_mambaout": lambda: (features[row, column], features.shape[1]),  # h, w, C
        "test_vit": lambda: (features[1 + 10 * row + column], 10),  # class token and h x w, C
    }[name]()
    assert tokens.shape == (across**2, tower.trunk.num_features)
    assert torch.equal(tokens[across * row + column], expected)


# -------------------------------------------------------------------------------- images and prompts


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(48, 40), (20, 90)])
def test_image_transform_is_open_clips(tmp_path, resize_mode, size):
    """Pixels equal those of open_clip's own transform, non-square pictures and saved processors included."""
    cfg = PreprocessCfg(
        size=(32, 32),
        mean=(0.1, 0.2, 0.3),
        std=(0.5, 0.6, 0.7),
        interpolation="bilinear",
        resize_mode=resize_mode,
        fill_color=7,
    )
    expected = image_transform_v2(cfg, is_train=False)(picture(3, size))
    processor = OpenClipImageProcessor(**vars(cfg))
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "preprocessor_config.json").exists()
    again = OpenClipImageProcessor.from_pretrained(tmp_path)
    for each in (processor, again):
        pixels = each([[picture(3, size)]], return_tensors="pt")["pixel_values"]
        assert torch.equal(pixels[0], expected)


def test_transform_comes_from_the_tower(parts):
    """An assembled processor transforms pictures as open_clip does for that tower."""
    _, processor = assemble(parts["vit"], parts["language"])
    _, _, transform = open_clip.create_model_and_transforms(parts["vit"])
    pixels = encode(processor, picture(4, (70, 33)))["pixel_values"]
    assert torch.equal(pixels[0], transform(picture(4, (70, 33))))


def test_text_template_learns_images(parts, tmp_path):
    """A chat template that wants strings is wrapped: images become placeholders, the rest stays as it was."""
    language = Path(build_language(tmp_path))
    own = "{% for m in messages %}{{ '<' + m.role + '> ' + m.content + m.get('tail', '') }} {% endfor %}"
    (language / "chat_template.jinja").write_text(own)
    _, processor = assemble(parts["vit"], str(language))
    messages = [
        {"role": "user", "content": "red", "tail": " blue"},
        {**ASK[0], "tail": " green"},
    ]
    text = processor.apply_chat_template(messages, tokenize=False)
    assert text == "<user> red blue <user> <image>how many red green "


def test_template_with_images_is_kept(parts):
    """A chat template that writes image parts already is not touched."""
    _, processor = assemble(parts["vit"], parts["language"])
    own = AutoTokenizer.from_pretrained(parts["language"]).chat_template
    assert processor.chat_template == own


@torch.no_grad()
def test_new_image_token(parts):
    """A placeholder that the tokenizer lacks is added, with an embedding; the others keep theirs."""
    plain, _ = assemble(parts["vit"], parts["language"])
    template = str(Path(parts["language"]) / "chat_template.jinja")
    text = Path(template).read_text().replace("<image>", "<picture>")
    other = Path(parts["language"]).parent / "picture.jinja"
    other.write_text(text)
    model, processor = assemble(
        parts["vit"], parts["language"], image_token="<picture>", template=str(other)
    )
    rows = plain.lm_head.weight.shape[0]
    assert model.config.image_token_id == rows
    assert model.lm_head.weight.shape[0] == model.config.text_config.vocab_size == rows + 1
    assert torch.equal(model.lm_head.weight[:rows], plain.lm_head.weight)
    assert model(**encode(processor, picture(1))).logits.shape[-1] == rows + 1


# ----------------------------------------------------------------------------- assembly and freezing


def test_seed_draws_the_projector(parts):
    """One seed, one projector; another seed, another; the global random state is left alone."""
    before = torch.random.get_rng_state()
    first, same, other = (
        assemble(parts["vit"], parts["language"], seed=seed)[0].model.multi_modal_projector
        for seed in (0, 0, 1)
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.linear_1.weight, same.linear_1.weight)
    assert not torch.equal(first.linear_1.weight, other.linear_1.weight)


def test_pickled_weights_refused(parts, tmp_path):
    """Weights of a tower are read from safetensors only, and only where there are some."""
    base = Path(parts["vit"].removeprefix("local-dir:"))
    (tmp_path / "open_clip_config.json").write_text((base / "open_clip_config.json").read_text())
    name = f"local-dir:{tmp_path}"
    with pytest.raises(ConfigError, match="no weights"):
        assemble(name, parts["language"])
    torch.save({}, tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(ConfigError, match="only safetensors"):
        assemble(name, parts["language"])
    torch.save({}, tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match="only safetensors"):
        assemble("ViT-B-32", parts["language"], pretrained=str(tmp_path / "weights.pt"))


@torch.no_grad()
def test_named_tower_with_a_file(parts, tmp_path):
    """A named tower takes its weights from a safetensors file; unknown names and tags are refused."""
    base = Path(parts["vit"].removeprefix("local-dir:"))
    config = json.loads((base / "open_clip_config.json").read_text())
    (tmp_path / "tiny-for-tests.json").write_text(json.dumps(config["model_cfg"]))
    open_clip.add_model_config(tmp_path)
    file = str(base / "open_clip_model.safetensors")
    model, _ = assemble("tiny-for-tests", parts["language"], pretrained=file)
    expected, _ = assemble(parts["vit"], parts["language"])
    assert torch.equal(
        model.model.vision_tower.conv1.weight, expected.model.vision_tower.conv1.weight
    )
    with pytest.raises(ConfigError, match="no model 'no-such-tower'"):
        assemble("no-such-tower", parts["language"])
    with pytest.raises(ConfigError, match="no weights for 'tiny-for-tests'"):
        assemble("tiny-for-tests", parts["language"], pretrained="no-such-tag")
    with pytest.raises(ConfigError, match="quick_gelu"):
        assemble("ViT-B-32", parts["language"], pretrained="openai")


def test_scaled_logits_refused(parts, tmp_path):
    """A language model that scales its logits is refused, since the scale would be lost."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    config = GraniteConfig(vocab_size=58, num_key_value_heads=1, logits_scaling=4.0, **sizes)
    GraniteForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(parts["language"]).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="post-processes its logits"):
        assemble(parts["vit"], str(tmp_path))


def test_freeze(tiny):
    """Freezing a component takes its parameters out of training, and no others; unknown ones are refused."""
    model, _ = load(tiny)
    freeze(model, ["vision", "embedding"])
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    vision = {
        name for name, _ in model.named_parameters() if name.startswith("model.vision_tower.")
    }
    assert vision and frozen == vision | {"model.language_model.embed_tokens.weight"}
    with pytest.raises(ConfigError, match=r"'eyes'.*projector"):
        freeze(model, ["eyes"])
