"""Masks: exact counts, ties that do not depend on the machine, files that cannot lie."""

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vlopd.config.masks import RandomMask, TopFractionMask, VisibleMask
from vlopd.errors import RunError
from vlopd.files import read_json
from vlopd.masks.apply import transplanted
from vlopd.masks.compare import density, jaccard
from vlopd.masks.files import check_mask, load_mask, save_mask
from vlopd.masks.rules import build_mask, random_like, visible
from vlopd.masks.select import largest, quota, smallest
from vlopd.models.parameter_names import classify
from vlopd.run.folder import up_to_date
from vlopd.weights.delta import TensorDelta

NAMES = (
    "model.language_model.layers.0.mlp.up_proj.weight",
    "model.language_model.layers.1.self_attn.q_proj.weight",
    "model.vision_tower.encoder.layers.0.mlp.fc1.weight",
    "lm_head.weight",
)
INPUTS = {
    "rule": {"type": "visible", "of": "full", "atol": 0.0},
    "base": "s" * 64,
    "of": "f" * 64,
}


def pairs(seed: int = 0) -> list[TensorDelta]:
    """Four bf16 matrices of odd sizes with sparse, tied updates; the last did not move."""
    torch.manual_seed(seed)
    found = []
    for index, name in enumerate(NAMES):
        base = (torch.randn(5 + index, 7) * 0.02).bfloat16()
        moved = (base.float() + 1e-4 * torch.randn(5 + index, 7)).bfloat16()
        found.append(TensorDelta(classify(name), base, base if name == NAMES[-1] else moved))
    return found


@pytest.fixture
def mask() -> dict[str, Tensor]:
    return build_mask(VisibleMask(), pairs())


@pytest.fixture
def saved(mask: dict[str, Tensor], tmp_path: Path) -> Path:
    save_mask(tmp_path / "visible.v1.safetensors", mask, INPUTS, classify)
    return tmp_path / "visible.v1.safetensors"


# ----------------------------------------------------------------------------------------- rules


def test_visible_is_what_changed_in_storage():
    """|delta| > 0 marks just the coordinates whose stored bits differ; atol is exclusive."""
    for pair in pairs():
        assert torch.equal(visible(pair.delta), pair.base != pair.trained)
    assert visible(torch.tensor([0.0, 0.5, -0.5, 1.0]), 0.5).tolist() == [False, False, False, True]


def test_quota_takes_the_decimal_that_was_written():
    """ceil(fraction * n) without binary surprises: 7 % of 100 is 7, any part of one is one."""
    assert [quota(0.07, 100), quota(0.1, 30), quota(0.1, 31), quota(1e-9, 5)] == [7, 3, 4, 1]
    assert math.ceil(0.07 * 100) == 8


@pytest.mark.parametrize("n", [1, 2, 63, 1000])
def test_largest_and_smallest_match_a_stable_sort(n):
    """Exact counts, ties to the lowest index, on values tied by the dozen."""
    torch.manual_seed(n)
    values = (torch.randn(n) * 2).round() / 2**20
    for count in {0, 1, n // 3, n - 1, n}:
        for take, descending in ((largest, True), (smallest, False)):
            order = values.abs().sort(stable=True, descending=descending).indices[:count]
            assert take(values, count).nonzero().squeeze(1).tolist() == sorted(order.tolist())


def test_largest_tells_neighbouring_floats_apart():
    """Values that differ in the last bit only are not ties."""
    one = torch.tensor(1.0)
    values = torch.stack([one, torch.nextafter(one, one * 2), one, torch.nextafter(one, one * 0)])
    assert largest(values, 1).tolist() == [False, True, False, False]
    assert smallest(values, 1).tolist() == [False, False, False, True]


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 1.0])
def test_top_fraction_gives_every_tensor_its_quota(fraction):
    """Each tensor gets exactly ceil(fraction * numel), also one that did not move."""
    rule = TopFractionMask(fraction=fraction, scope="tensor")
    for name, chosen in build_mask(rule, pairs()).items():
        assert int(chosen.sum()) == quota(fraction, chosen.numel()), name
    flat = TensorDelta(classify("lm_head.weight"), torch.zeros(10), torch.zeros(10))
    still = build_mask(TopFractionMask(fraction=0.2), [flat])["lm_head.weight"]
    assert still.nonzero().squeeze(1).tolist() == [0, 1]


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.9])
def test_global_top_fraction_is_one_sort_of_everything(fraction):
    """The global rule equals a stable sort of all deltas laid end to end."""
    built = build_mask(TopFractionMask(fraction=fraction, scope="global"), pairs())
    flat = torch.cat([pair.delta.abs().flatten() for pair in pairs()])
    order = flat.sort(stable=True, descending=True).indices[: quota(fraction, len(flat))]
    expected = torch.zeros(len(flat), dtype=torch.bool)
    expected[order] = True
    assert torch.equal(torch.cat([built[name].flatten() for name in NAMES]), expected)


def test_random_mask_keeps_counts_and_forgets_places(mask):
    """Per tensor the same count; another seed, another draw; the order of tensors is irrelevant."""
    drawn = build_mask(RandomMask(like="visible", seed=1), masks={"visible": mask})
    assert {n: int(m.sum()) for n, m in drawn.items()} == {n: int(m.sum()) for n, m in mask.items()}
    again = random_like(dict(reversed(mask.items())), 1)
    assert all(torch.equal(drawn[name], again[name]) for name in NAMES)
    assert jaccard(drawn, random_like(mask, 2)) < 0.9


def test_random_mask_is_uniform():
    """Every coordinate is drawn equally often: 25 % of 16 over 2000 seeds, within 5 deviations."""
    like = {"w": torch.arange(16).view(4, 4) < 4}
    drawn = torch.stack([random_like(like, seed)["w"] for seed in range(2000)]).float().mean(0)
    assert (drawn - 0.25).abs().max() < 5 * math.sqrt(0.25 * 0.75 / 2000)


def test_transplant_is_bit_exact_on_both_sides(mask):
    """On the mask the trained bits, off it the base bits, in the stored dtype."""
    for pair in pairs():
        chosen = random_like(mask, 0)[pair.name]
        result = transplanted(pair, chosen)
        assert result.dtype == torch.bfloat16
        assert torch.equal(result[chosen], pair.trained[chosen])
        assert torch.equal(result[~chosen], pair.base[~chosen])
        assert torch.equal(transplanted(pair, mask[pair.name]), pair.trained)


def test_density_and_jaccard():
    """Density counts coordinates, not tensors; two empty masks have no Jaccard index."""
    a = {"x": torch.tensor([True, True, False, False]), "y": torch.zeros(4, dtype=torch.bool)}
    b = {"x": torch.tensor([True, False, True, False]), "y": torch.zeros(4, dtype=torch.bool)}
    assert density(a) == 0.25 and jaccard(a, b) == 1 / 3 and jaccard(a, a) == 1
    empty = {name: torch.zeros_like(m) for name, m in a.items()}
    assert math.isnan(jaccard(empty, empty))
    with pytest.raises(ValueError, match="differ at y"):
        jaccard(a, {"x": b["x"]})


# ----------------------------------------------------------------------------------------- files


def test_packed_bits_survive_a_round_trip(mask, saved):
    """Masks of odd sizes come back bit for bit, with their origin, at one bit a coordinate."""
    loaded, metadata = load_mask(saved)
    assert loaded.keys() == mask.keys()
    assert all(loaded[n].dtype == torch.bool and torch.equal(loaded[n], mask[n]) for n in mask)
    assert metadata["inputs"] == INPUTS
    assert metadata["counts"] == {n: int(m.sum()) for n, m in mask.items()}


def test_readable_record(mask, saved):
    """NAME.json says density overall, by component and module, and lets the stage be skipped."""
    record = read_json(saved.with_name("visible.v1.json"))
    assert record["density"] == density(mask)
    assert set(record["density_by_component"]) == {"head", "language", "vision"}
    assert record["density_by_component"]["head"] == 0
    assert record["digest"] == load_mask(saved)[1]["digest"]
    assert up_to_date(saved.with_name("visible.v1.json"), INPUTS)


def test_equal_masks_are_equal_files(mask, saved, tmp_path):
    """Saving the same mask twice gives the same bytes, so that digests of stages agree."""
    save_mask(tmp_path / "again.safetensors", mask, INPUTS, classify)
    assert (tmp_path / "again.safetensors").read_bytes() == saved.read_bytes()


@pytest.mark.parametrize("damage", ["cut", "empty", "flip", "header", "gone"])
def test_damaged_masks_are_refused(saved, damage):
    """A file cut short, emptied, or with one flipped bit is refused in one line naming it."""
    content = saved.read_bytes()
    count = re.compile(rb"(up_proj\.weight\\\": )\d")  # the header is under the digest too
    kept = {
        "cut": content[:-3],
        "empty": b"",
        "flip": content[:-1] + bytes([content[-1] ^ 1]),
        "header": count.sub(rb"\g<1>9", content, count=1),
        "gone": content,
    }[damage]
    assert kept != content or damage == "gone"
    saved.write_bytes(kept)
    if damage == "gone":
        saved.unlink()
    with pytest.raises(RunError) as caught:
        load_mask(saved)
    assert str(saved) in str(caught.value) and "\n" not in str(caught.value)


def test_foreign_masks_are_refused(saved):
    """A mask of another model or another base is refused by tensor or digest."""
    mask, metadata = load_mask(saved)
    shapes = {name: m.shape for name, m in mask.items()}
    check_mask(mask, metadata, shapes, INPUTS["base"])
    up, first = NAMES[0], sorted(NAMES)[0]
    with pytest.raises(RunError, match="it lacks extra"):
        check_mask(mask, metadata, {**shapes, "extra": torch.Size([1])}, INPUTS["base"])
    with pytest.raises(RunError, match=f"it has {first}"):
        check_mask(mask, metadata, {}, INPUTS["base"])
    with pytest.raises(RunError, match=rf"{up} is \(5, 7\) there, \(7, 5\) here"):
        check_mask(mask, metadata, {**shapes, up: torch.Size([7, 5])}, INPUTS["base"])
    with pytest.raises(RunError, match="from base checkpoint ssss"):
        check_mask(mask, metadata, shapes, "t" * 64)


def test_a_new_mask_never_keeps_an_old_record(mask, saved):
    """The record goes before the mask is replaced, so a crash between leaves no stale record."""
    unwritable = {**INPUTS, "rule": float("nan")}  # the mask can be written, its strict JSON cannot
    with pytest.raises(ValueError):
        save_mask(saved, mask, unwritable, classify)
    assert not saved.with_name("visible.v1.json").exists()
