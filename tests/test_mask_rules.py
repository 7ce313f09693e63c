"""Every mask rule on tensors whose answer is known, and the comparison of masks by counting."""

import math

import pytest
import torch
from pydantic import TypeAdapter

from tests.test_masks import NAMES, pairs
from vlopd.config.masks import MaskConfig
from vlopd.errors import ConfigError
from vlopd.masks.compare import (
    density,
    jaccard,
    overlap,
    overlap_by_class,
    overlap_by_tensor,
    sum_overlaps,
)
from vlopd.masks.rules import binades, build_mask, quantiles, steps_between
from vlopd.masks.select import order_keys, quota, select_energy
from vlopd.models.parameter_names import classify
from vlopd.weights.delta import TensorDelta


def rule(**settings):
    return TypeAdapter(MaskConfig).validate_python(settings)


def one(base, trained, **settings):
    """The rule's mask of a single matrix."""
    name = NAMES[0]
    pair = TensorDelta(classify(name), base, trained)
    return build_mask(rule(**settings), [pair])[name]


# ------------------------------------------------------------------------------ by what changed


def test_tolerances_of_visible():
    """atol, rtol and both add up; all are exclusive, and 0 with any of them is what moved."""
    base = torch.tensor([1.0, 1.0, 100.0, 100.0, 0.0])
    trained = base + torch.tensor([0.0, 0.5, 0.5, 2.0, 0.25])
    for settings, expected in (
        ({}, [0, 1, 1, 1, 1]),
        ({"atol": 0.25}, [0, 1, 1, 1, 0]),
        ({"rtol": 0.01}, [0, 1, 0, 1, 1]),
        ({"rtol": 0.01, "atol": 0.5}, [0, 0, 0, 1, 0]),
    ):
        assert one(base, trained, type="visible", **settings).tolist() == [
            bool(x) for x in expected
        ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ulps_count_the_floats_between(dtype):
    """k applications of nextafter are k steps, across zero and binades too; 0 and -0 are one."""
    for start in (1.0, -2.0, 0.0, 0.24993):
        a = torch.tensor([start], dtype=dtype)
        b = a
        for k in range(5):
            assert int(steps_between(a, b)) == int(steps_between(b, a)) == k
            b = torch.nextafter(b, torch.tensor([float("inf")], dtype=dtype))
    assert int(steps_between(torch.tensor([-0.0]), torch.tensor([0.0]))) == 0
    one_step = torch.tensor([1.0, 1.0078125, 1.015625]).bfloat16()
    still = torch.ones(3).bfloat16()
    assert one(still, one_step, type="visible", ulps=0).tolist() == [False, True, True]
    assert one(still, one_step, type="visible", ulps=1).tolist() == [False, False, True]


def test_visible_in_another_precision():
    """A change that fp32 holds and bf16 rounds away is visible in the first only."""
    base = torch.tensor([1.0, 1.0])
    trained = torch.tensor([1.001, 1.01])
    assert one(base, trained, type="visible").tolist() == [True, True]
    assert one(base, trained, type="visible", precision="bf16").tolist() == [False, True]
    assert one(base, trained, type="visible", precision="bf16", ulps=0).tolist() == [False, True]


def test_relative_delta_puts_small_weights_first():
    """By |delta| / |w| the same change counts more on a small weight, most on a zero, and not at all unmoved."""
    base = torch.tensor([0.0, 0.0, 0.1, 10.0])
    trained = base + torch.tensor([0.0, 0.01, 0.01, 0.1])
    top = {"type": "top_fraction", "by": "relative_delta"}
    assert one(base, trained, fraction=0.25, **top).tolist() == [False, True, False, False]
    assert one(base, trained, fraction=0.5, **top).tolist() == [False, True, True, False]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_energy_is_the_fewest_coordinates_that_hold_it(share, scope):
    """The mask holds the share; without its smallest member it would not; nothing outside is larger."""
    built = build_mask(rule(type="energy", share=share, scope=scope), pairs())
    groups = [[p] for p in pairs()] if scope == "tensor" else [pairs()]
    for group in groups:
        delta = torch.cat([p.delta.double().flatten() for p in group])
        mask = torch.cat([built[p.name].flatten() for p in group])
        whole = delta.square().sum()
        if whole == 0:
            assert not mask.any()
            continue
        held = delta[mask].square()
        assert held.sum() >= share * whole * (1 - 1e-9)
        assert held.sum() - held.min() < share * whole
        assert not (~mask).any() or delta[~mask].abs().max() <= delta[mask].abs().min()


def test_energy_breaks_ties_by_place():
    """Of equal magnitudes the earliest tensor and the lowest index come first, in exactly the number needed."""
    keys = [order_keys(torch.tensor([1.0, -1.0])), order_keys(torch.tensor([1.0, 3.0, -1.0]))]
    chosen = select_energy(lambda: keys, 11 / 13)
    assert [m.tolist() for m in chosen] == [[True, True], [False, True, False]]


# -------------------------------------------------------------------------------- by the base


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_magnitude_takes_the_ends_of_the_base(scope):
    """Low and high are the two ends of a stable sort of |w|."""
    for which in ("low", "high"):
        built = build_mask(rule(type="magnitude", which=which, fraction=0.3, scope=scope), pairs())
        groups = [[p] for p in pairs()] if scope == "tensor" else [pairs()]
        for group in groups:
            flat = torch.cat([p.base.float().abs().flatten() for p in group])
            order = flat.sort(stable=True, descending=which == "high").indices
            expected = torch.zeros(len(flat), dtype=torch.bool)
            expected[order[: quota(0.3, len(flat))]] = True
            assert torch.equal(torch.cat([built[p.name].flatten() for p in group]), expected)


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (4, 3, 2, 2)])
def test_principal_is_the_largest_of_the_low_rank_approximation(shape):
    """Against an SVD in float64; rank and fraction are apart; off-principal is the other end; vectors are |w|."""
    torch.manual_seed(0)
    base = torch.randn(shape)
    u, s, vt = torch.linalg.svd(base.flatten(1).double(), full_matrices=False)
    near = ((u[:, :2] * s[:2]) @ vt[:2]).abs().flatten()
    n = len(near)
    order = near.sort(descending=True).indices
    for which, picked in (
        ("principal", order[: quota(0.25, n)]),
        ("off_principal", order[-quota(0.25, n) :]),
    ):
        got = one(base, base, type="principal", which=which, fraction=0.25, rank=2)
        assert sorted(picked.tolist()) == got.flatten().nonzero()[:, 0].tolist()
    small = min(base.flatten(1).shape)
    by_share = one(
        base, base, type="principal", fraction=0.25, rank_fraction={7: 0.3, 4: 0.5}[small]
    )
    assert torch.equal(by_share, one(base, base, type="principal", fraction=0.25, rank=2))
    vector = torch.tensor([1.0, -3.0, 2.0])
    assert one(vector, vector, type="principal", fraction=0.3, rank=1).tolist() == [
        False,
        True,
        False,
    ]


def test_whole_takes_components_layers_and_modules():
    """Lists narrow each other; `ffn` is a group; what there is not is refused by name, with what there is."""
    up, q, fc1, head = NAMES
    for settings, expected in (
        ({"components": ["vision"]}, {fc1}),
        ({"modules": ["ffn"]}, {up, fc1}),
        ({"modules": ["ffn"], "components": ["language"]}, {up}),
        ({"layers": [1]}, {q}),
        ({"modules": ["attention", "head"]}, {q, head}),
    ):
        built = build_mask(rule(type="whole", **settings), pairs())
        assert {n for n, m in built.items() if m.all()} == expected
        assert not any(m.any() for n, m in built.items() if n not in expected)
    with pytest.raises(ConfigError, match=r"no 'router'; it has .*attention.*ffn"):
        build_mask(rule(type="whole", modules=["router"]), pairs())
    with pytest.raises(ConfigError, match="no parameter matches"):
        build_mask(rule(type="whole", modules=["head"], layers=[0]), pairs())


# ------------------------------------------------------------------------------------ by chance


def large(seed=0):
    """Two bf16 matrices of one module and one of another, larger, with heavy tails and ties."""
    torch.manual_seed(seed)
    names = [NAMES[0], NAMES[0].replace("layers.0", "layers.1"), NAMES[1]]
    bases = [(torch.randn(40, 50) ** 3 * 0.02).bfloat16() for _ in names]
    return [TensorDelta(classify(n), s, s) for n, s in zip(names, bases, strict=True)]


@pytest.mark.parametrize("match", ["global", "module", "tensor", "magnitude", "visibility"])
def test_random_masks_match_in_every_class_and_nothing_else(match):
    """Counts agree class by class; seeds differ; inside a class the draw is uniform (5 deviations)."""
    like = {p.name: p.base.float().abs() < 0.01 * (k + 1) for k, p in enumerate(large())}
    like[NAMES[1]][:, 25:] = False  # so that "tensor" and "module" matter
    draw = [
        build_mask(rule(type="random", like="it", seed=seed, match=match), large(), {"it": like})
        for seed in range(30)
    ]
    assert jaccard(draw[0], draw[1]) < 0.98

    def classes(pair):
        if match in ("magnitude", "visibility"):
            inside = quantiles(pair.base) if match == "magnitude" else binades(pair.base)
            return [(pair.name, int(c)) for c in inside.flatten()]
        label = {"global": "", "module": pair.where.module, "tensor": pair.name}[match]
        return [label] * pair.base.numel()

    labels = [label for pair in large() for label in classes(pair)]
    numbers = {label: k for k, label in enumerate(dict.fromkeys(labels))}
    index = torch.tensor([numbers[label] for label in labels])

    def counted(mask):
        flat = torch.cat([mask[pair.name].flatten() for pair in large()])
        return torch.bincount(index[flat], minlength=len(numbers)), flat

    expected, _ = counted(like)
    sizes = torch.bincount(index)
    mean = torch.zeros(len(index))
    for mask in draw:
        counts, flat = counted(mask)
        assert torch.equal(counts, expected)
        mean += flat / len(draw)
    p = (expected / sizes)[index]
    assert ((mean - p).abs() <= 6 * (p * (1 - p) / len(draw)).sqrt() + 1e-6).float().mean() > 0.999


def test_quantiles_part_no_ties_and_fill_evenly():
    """Equal |w| share a quantile; without ties the sixteen hold equally many."""
    values = torch.randperm(1600).float() + 1
    assert torch.bincount(quantiles(values)).tolist() == [100] * 16
    tied = (torch.randn(1000) * 2).round()
    for size in tied.abs().unique():
        assert len(quantiles(tied)[tied.abs() == size].unique()) == 1
    assert binades(torch.tensor([1.0, 1.99, 2.0, -3.0, 0.5])).tolist() == [127, 127, 128, 128, 126]


# ---------------------------------------------------------------------------------- combinations


def test_set_algebra():
    """Union, intersection, difference and complement, element by element; masks of two models are refused."""
    torch.manual_seed(0)
    a, b, c = ({"x": torch.rand(5, 4) < 0.5, "y": torch.rand(3) < 0.5} for _ in range(3))
    named = {"a": a, "b": b, "c": c}
    for how, expected in (
        ("union", lambda x, y, z: x | y | z),
        ("intersection", lambda x, y, z: x & y & z),
        ("difference", lambda x, y, z: x & ~y & ~z),
    ):
        got = build_mask(rule(type=how, masks=["a", "b", "c"]), masks=named)
        assert all(torch.equal(got[n], expected(a[n], b[n], c[n])) for n in a)
    got = build_mask(rule(type="complement", mask="a"), masks=named)
    assert density(got) == pytest.approx(1 - density(a)) and jaccard(got, a) == 0
    other = {"a": a, "b": {"x": b["x"]}}
    with pytest.raises(ValueError, match="differ at y"):
        build_mask(rule(type="union", masks=["a", "b"]), masks=other)


# ------------------------------------------------------------------------------------ comparison


def test_overlap_counts_and_chance():
    """Jaccard, both coverages and enrichment from sets of indices; chance by tensor and by class adds up."""
    torch.manual_seed(1)
    a = {"x": torch.rand(40, 5) < 0.3, "y": torch.rand(300) < 0.1}
    b = {"x": torch.rand(40, 5) < 0.5, "y": torch.rand(300) < 0.1}
    flat_a, flat_b = (torch.cat([m["x"].flatten(), m["y"]]) for m in (a, b))
    set_a, set_b = (set(f.nonzero()[:, 0].tolist()) for f in (flat_a, flat_b))
    found = overlap(a, b)
    both = len(set_a & set_b)
    assert found.jaccard == both / len(set_a | set_b) == jaccard(a, b)
    assert (found.coverage_of_a, found.coverage_of_b) == (both / len(set_a), both / len(set_b))
    assert found.enrichment == pytest.approx(both * 500 / len(set_a) / len(set_b))

    tensors = overlap_by_tensor(a, b)
    by_tensor = sum_overlaps(tensors.values())
    chance = sum(int(a[n].sum()) * int(b[n].sum()) / a[n].numel() for n in a)
    assert by_tensor.both == both and by_tensor.expected == pytest.approx(chance)
    assert by_tensor.enrichment < found.enrichment  # both prefer x: no enrichment within tensors
    same = overlap_by_class(
        a, b, [(n, torch.zeros_like(m, dtype=torch.long)) for n, m in a.items()]
    )
    assert same.expected == pytest.approx(chance)
    halves = overlap_by_class(
        a, b, [(n, torch.arange(m.numel()).view(m.shape) % 2) for n, m in a.items()]
    )
    parts = [(a[n].flatten()[k::2], b[n].flatten()[k::2]) for n in a for k in (0, 1)]
    assert halves.expected == pytest.approx(
        sum(int(x.sum()) * int(y.sum()) / len(x) for x, y in parts)
    )


def test_overlap_of_empty_masks_is_undefined_not_one():
    """0/0 is NaN, and null as JSON."""
    empty = {"x": torch.zeros(4, dtype=torch.bool)}
    found = overlap(empty, empty)
    assert all(map(math.isnan, (found.jaccard, found.coverage_of_a, found.enrichment)))
    assert found.row()["jaccard"] is None
