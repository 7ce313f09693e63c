"""Reading two checkpoints: exact deltas, honest matching, and refusals that name the file."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from vlopd.errors import RunError
from vlopd.models.parameter_names import classify
from vlopd.weights.delta import TensorDelta, match_report, stream, stream_whole
from vlopd.weights.reader import Weights

TEXT = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)
VISION = CLIPVisionConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=16,
    patch_size=8,
)


def tiny(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "llm":
        return LlamaForCausalLM(TEXT).to(torch.bfloat16)
    config = LlavaConfig(text_config=TEXT, vision_config=VISION, image_token_index=1)
    return LlavaForConditionalGeneration(config).to(torch.bfloat16)


@pytest.fixture(scope="module", params=["llm", "vlm"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A tiny model before and after noise of 1 % of each weight's size, stored in bf16."""
    root = tmp_path_factory.mktemp(request.param)
    model = tiny(request.param)
    model.save_pretrained(root / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            wide = parameter.float()
            parameter.copy_(wide * (1 + 0.01 * torch.randn_like(wide)))
    model.save_pretrained(root / "trained")
    return root / "base", root / "trained"


def folder_of(tensors: dict[str, torch.Tensor], folder: Path) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


def shard(folder: Path, target: Path) -> Path:
    """The same checkpoint in two shards and an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    target.mkdir()
    places = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(names)}
    for place in set(places.values()):
        save_file({n: tensors[n] for n in names if places[n] == place}, target / place)
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return target


def test_base_plus_delta_is_trained(folders):
    """base + delta = trained, bit for bit once stored; the delta is fp32, of stored values."""
    stored = load_file(folders[1] / "model.safetensors")
    seen = 0
    for pair in stream(*folders, classify):
        assert pair.base.dtype == pair.trained.dtype == torch.bfloat16
        assert pair.delta.dtype == torch.float32
        assert torch.equal((pair.base.float() + pair.delta).bfloat16(), stored[pair.name])
        assert pair.where == classify(pair.name)
        seen += 1
    assert seen == len(stored)


def test_delta_is_not_rounded_to_bf16():
    """A delta that bf16 cannot hold survives: 1 - 2^-20 is not 1."""
    base, trained = torch.tensor([2.0**-20]).bfloat16(), torch.tensor([1.0]).bfloat16()
    pair = TensorDelta(classify("lm_head.weight"), base, trained)
    assert pair.delta.item() == 1 - 2.0**-20
    assert (trained - base).item() == 1.0  # what the public reference computes


def test_float64_stays_float64():
    """Checkpoints in float64 are compared in float64, whichever side is stored so."""
    one = torch.ones(1)
    pair = TensorDelta(classify("lm_head.weight"), one, one.double() + 2.0**-40)
    assert pair.delta.dtype == torch.float64 and pair.delta.item() == 2.0**-40


def test_everything_matches(folders):
    """Two checkpoints of one model match in full, by name and in the order of names."""
    report = match_report(*folders)
    assert report.matched == tuple(sorted(load_file(folders[0] / "model.safetensors")))
    assert report.missing == report.extra == report.skipped == ()


def test_shards_and_single_file_agree(folders, tmp_path):
    """A sharded checkpoint is the same checkpoint, and can be iterated twice."""
    pairs = stream(folders[0], shard(folders[1], tmp_path / "shards"), classify)
    for _ in range(2):
        for ours, whole in zip(pairs, stream(*folders, classify), strict=True):
            assert ours.name == whole.name and torch.equal(ours.trained, whole.trained)


def test_index_is_respected(folders, tmp_path):
    """A stray safetensors file that the index does not name is not read."""
    target = shard(folders[1], tmp_path / "shards")
    save_file({"stray.weight": torch.ones(2)}, target / "optimizer.safetensors")
    assert match_report(folders[0], target).extra == ()


def test_index_lies(folders, tmp_path):
    """An index that names a tensor its shard lacks, or a file elsewhere, is refused."""
    target = shard(folders[1], tmp_path / "shards")
    path = target / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps({"weight_map": {**index["weight_map"], "ghost.weight": first}}))
    with pytest.raises(RunError, match=r"lacks ghost\.weight"):
        Weights(target)
    path.write_text(json.dumps({"weight_map": {"ghost.weight": "../elsewhere.safetensors"}}))
    with pytest.raises(RunError, match="elsewhere"):
        Weights(target)
    path.write_text(json.dumps({"weight_map": {"ghost.weight": "pytorch_model.bin"}}))
    with pytest.raises(RunError, match=r"pytorch_model\.bin"):
        Weights(target)


def test_match_report_names_what_differs(tmp_path):
    """Parameters of one side only are listed with their shares, integers skipped, and the rest is streamed."""
    one, ids = torch.ones(20, 20), torch.ones(1, dtype=torch.int64)
    before = folder_of({"a": one, "ids": ids, "old.b": torch.ones(2)}, tmp_path / "before")
    after = folder_of({"a": one * 2, "ids": ids, "new.c": torch.ones(1, 3)}, tmp_path / "after")
    report = match_report(before, after)
    assert (report.matched, report.missing, report.extra) == (("a",), ("old.b",), ("new.c",))
    assert report.skipped == ("ids",)
    assert [its.name for its in report.left_out] == ["new.c", "old.b", "ids"]
    assert report.base_share == pytest.approx(2 / 402)  # ids are no parameter
    assert report.trained_share == pytest.approx(3 / 403)
    assert [pair.name for pair in stream(before, after, classify)] == ["a"]


def test_a_module_of_another_name_is_no_partner(tmp_path):
    """Equal shapes and a last word in common do not make two parameters one."""
    one = torch.ones(60, 60)
    before = folder_of({"a.weight": one, "norm.weight": torch.ones(9)}, tmp_path / "before")
    after = folder_of({"a.weight": one, "gate.weight": torch.ones(9)}, tmp_path / "after")
    report = match_report(before, after)
    assert (report.missing, report.extra) == (("norm.weight",), ("gate.weight",))


def test_other_models_are_refused(tmp_path):
    """A shape mismatch names the tensor and both shapes; no common parameter is an error too."""
    before = folder_of({"a": torch.ones(2, 2)}, tmp_path / "before")
    after = folder_of({"a": torch.ones(2, 3)}, tmp_path / "after")
    with pytest.raises(RunError, match=r"a is \(2, 2\).*\(2, 3\)"):
        match_report(before, after)
    other = folder_of({"b": torch.ones(2, 2)}, tmp_path / "other")
    with pytest.raises(RunError, match="share no floating-point parameter"):
        match_report(before, other)


def test_pickles_are_refused(tmp_path):
    """A folder with only pytorch_model.bin is refused without opening it."""
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n")
    with pytest.raises(RunError, match="pickled"):
        Weights(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "gone"])
def test_damaged_files_are_refused(folders, tmp_path, damage):
    """A truncated, empty, foreign or missing shard gives one line that names the file."""
    target = shard(folders[1], tmp_path / "shards")
    path = next(target.glob("*00002.safetensors"))
    content = path.read_bytes()
    kept = {"cut": content[: len(content) // 2], "empty": b"", "garbage": b"not weights" * 9}
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(kept[damage])
    with pytest.raises(RunError) as caught:
        list(stream(folders[0], target, classify))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(tmp_path, value):
    """A diverged checkpoint is refused by the name of its first broken tensor."""
    before = folder_of({"a": torch.ones(4), "b": torch.ones(4)}, tmp_path / "before")
    broken = torch.tensor([1.0, value, 1.0, 1.0]).bfloat16()
    after = folder_of({"a": torch.ones(4), "b": broken}, tmp_path / "after")
    with pytest.raises(RunError, match="b has 1 values that are not finite"):
        list(stream(before, after, classify))


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize("others", [{}, {"h.0.attn.bias": torch.ones(1, 1, 16, 16)}])
def test_constants_are_named_and_are_no_parameters(dtype, others, tmp_path):
    """A causal mask that old GPT-2 files store is larger than the model here; it is named, has no part in the shares,
    is not compared even where both have one, and a mask of the update may be made, in both directions."""
    weight = {"h.0.attn.c_attn.weight": torch.randn(4, 12), "h.0.attn.c_attn.bias": torch.zeros(12)}
    plain = folder_of(weight | others, tmp_path / "plain")
    mask = torch.ones(1, 1, 32, 32).to(dtype)
    old = folder_of(weight | {"h.0.attn.bias": mask}, tmp_path / "old")
    for base, trained in ((plain, old), (old, plain)):
        report = stream_whole(base, trained, classify).report
        assert report.matched == tuple(sorted(weight))
        (left,) = report.left_out
        assert left.name == "h.0.attn.bias" and "a constant" in left.reason
        assert report.base_share == report.trained_share == 0.0
        assert "h.0.attn.bias" in report.summary()


def test_a_bias_of_a_constants_name_is_a_parameter(tmp_path):
    """attn.bias with a value per unit is compared, and its loss is refused."""
    weights = {"attn.weight": torch.randn(4, 4), "attn.bias": torch.randn(4)}
    base = folder_of(weights, tmp_path / "base")
    assert match_report(base, base).matched == ("attn.bias", "attn.weight")
    lost = folder_of({"attn.weight": weights["attn.weight"]}, tmp_path / "lost")
    with pytest.raises(RunError, match=r"attn\.bias"):
        match_report(base, lost)
