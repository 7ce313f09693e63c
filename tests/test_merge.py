"""Arms that merge the deltas of others, and transplants of a part of a delta, against float64 references."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vlopd.config.masks import TopFractionMask
from vlopd.errors import RunError
from vlopd.files import read_json
from vlopd.masks.apply import norm_over_tensors
from vlopd.masks.files import load_mask
from vlopd.masks.rules import build_mask
from vlopd.models.parameter_names import classify
from vlopd.pipeline import plan
from vlopd.preflight import inputs
from vlopd.run.folder import RunFolder
from vlopd.run.make import make_arm
from vlopd.run.resolve import checkpoint_deltas, read_tensors
from vlopd.weights.delta import TensorDelta
from vlopd.weights.merging import agreeing, merged, moved
from vlopd.weights.subspace import inner_part

FFN = "model.layers.0.mlp.up_proj.weight"


def updates(n=3, dtype=torch.bfloat16, shape=(12, 8), seed=0):
    """`n` trained checkpoints of one base, with ties, unmoved entries and entries that one alone moves."""
    draws = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=draws).to(dtype)
    found = []
    for _ in range(n):
        change = torch.randn(shape, generator=draws) * (torch.rand(shape, generator=draws) < 0.5)
        found.append(TensorDelta(classify(FFN), base, (base + 0.05 * change).to(dtype)))
    return found


# ------------------------------------------------------------------------------- the functions


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", ["sum", "ties"])
def test_merges_equal_a_loop_over_coordinates(method, dtype):
    """Both methods equal, to the stored precision, a float64 loop that follows their definitions word by word."""
    pairs, scale, density = updates(3, dtype), 0.7, 0.4
    trim = TopFractionMask(fraction=density, scope="global")
    kept = [build_mask(trim, [pair])[FFN] for pair in pairs] if method == "ties" else None
    found = merged(pairs, method, scale, kept)
    assert found.dtype == dtype
    base = pairs[0].base.double().numpy()
    deltas = [(p.trained.double() - p.base.double()).numpy() for p in pairs]
    k = int(np.ceil(density * base.size))
    largest = [set(np.argsort(-np.abs(d).ravel(), kind="stable")[:k]) for d in deltas]
    expected = base.copy()
    for at in np.ndindex(base.shape):
        values = [d[at] for d in deltas]
        if kept is not None:
            flat = np.ravel_multi_index(at, base.shape)
            values = [v if flat in own else 0.0 for v, own in zip(values, largest, strict=True)]
            sign = np.sign(sum(values))
            values = [v for v in values if np.sign(v) == sign and v != 0]
            expected[at] += scale * sum(values) / max(1, len(values))
        else:
            expected[at] += scale * sum(values)
    eps = torch.finfo(dtype).eps
    assert np.abs(found.double().numpy() - expected).max() <= eps * np.abs(expected).max()
    assert (found != pairs[0].base).any()


def test_ties_on_known_numbers():
    """Signs are elected by the sum of sizes, not by count; the mean is over those that agree; a tie moves nothing."""
    base = torch.zeros(4)
    trained = ([3.0, 1.0, 1.0, 0.0], [-1.0, -1.0, 2.0, 0.0], [-1.0, 0.0, 6.0, 5.0])
    pairs = [TensorDelta(classify(FFN), base, torch.tensor(each)) for each in trained]
    assert merged(pairs, "ties").tolist() == [3.0, 0.0, 3.0, 5.0]
    assert merged(pairs, "sum").tolist() == [1.0, 0.0, 9.0, 5.0]
    assert [each.tolist() for each in agreeing([p.trained for p in pairs])][1] == [0, 0, 2, 0]


@pytest.mark.parametrize("method", ["sum", "ties"])
def test_a_merge_of_one_is_that_arm_to_the_bit(method):
    """One update at scale 1, or a coordinate that one alone moves, keeps the trained bits where base + delta would not:
    1e8 + (1e-3 - 1e8) is not 1e-3 in fp32, and a zero keeps its sign."""
    base, trained = torch.tensor([1e8, 0.0, 1.0]), torch.tensor([1e-3, -0.0, 1.0])
    pair = TensorDelta(classify(FFN), base, trained)
    bits = merged([pair], method).view(torch.int32)
    assert torch.equal(bits, trained.view(torch.int32))
    still = TensorDelta(classify(FFN), base, base)
    assert torch.equal(merged([still, pair], method), trained)


@pytest.mark.parametrize("shape", [(12, 8), (6, 20), (4, 3, 5)])
@pytest.mark.parametrize("random", [False, True])
def test_parts_add_up_and_are_projections(shape, random):
    """In and off the subspaces are orthogonal and add up to the delta; the inner part is U U^T D V V^T by an SVD of the
    base, has rank k, and is its own inner part."""
    (pair,) = updates(1, torch.float32, shape)
    delta, k = pair.delta.double(), 3

    def inner(of):
        return inner_part(pair.base, of, k, torch.Generator().manual_seed(5) if random else None)

    inside = inner(delta)
    off = delta - inside
    assert inside.shape == delta.shape and abs(float((inside * off).sum())) < 1e-12
    assert torch.allclose(inner(inside), inside, atol=1e-12)
    assert torch.allclose(inner(off), torch.zeros_like(off), atol=1e-12)
    assert int(torch.linalg.matrix_rank(inside.flatten(1))) == min(k, *inside.flatten(1).shape)
    if not random:
        u, _, vt = torch.linalg.svd(pair.base.flatten(1).double(), full_matrices=False)
        u, v = u[:, :k], vt[:k].T
        expected = u @ u.T @ delta.flatten(1) @ v @ v.T
        assert torch.allclose(inside.flatten(1), expected, atol=1e-6)


def test_a_vector_has_no_inner_part():
    """A vector's delta lies wholly off the subspaces; an update of zero keeps the base's bits."""
    (pair,) = updates(1, torch.bfloat16, (16,))
    assert not inner_part(pair.base, pair.delta, 4).any()
    assert torch.equal(moved(pair, torch.zeros(16, dtype=torch.float64)), pair.base)
    assert torch.equal(moved(pair, pair.delta.double()), pair.trained)


# -------------------------------------------------------------------------------------- in a run

MASKS = {"top": {"type": "top_fraction", "of": "one", "fraction": 0.3}}
DERIVED = {
    "one": {"type": "merge", "of": ["A"]},
    "sum": {"type": "merge", "of": ["A", "B"], "scale": 0.5},
    "ties": {"type": "merge", "of": ["one", "B"], "method": "ties", "components": ["language"], "mask": "top"},
    "principal": {"type": "transplant", "of": "A", "part": "principal", "rank": 4},
    "off": {"type": "transplant", "of": "one", "part": "off_principal", "rank": 4},
    "random": {"type": "transplant", "of": "A", "part": "random", "rank": 4, "seed": 3, "norm_of": "principal"},
}  # fmt: skip


def trained(folder, out, seed):
    """A copy of a checkpoint with a random update of a part of its entries."""
    shutil.copytree(folder, out)
    tensors, draws = load_file(out / "model.safetensors"), torch.Generator().manual_seed(seed)
    for name, value in sorted(tensors.items()):
        change = torch.randn(value.shape, generator=draws) * (
            torch.rand(value.shape, generator=draws) < 0.5
        )
        tensors[name] = (value + 0.05 * change).to(value.dtype)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def test_merged_and_projected_arms(kind, make_config, folders, tmp_path):
    """Every arm is what it says, and only where it says; records and the plan know all of its sources."""
    places = {name: trained(folders[kind, "student"], tmp_path / name, ord(name)) for name in "AB"}
    text = json.dumps(DERIVED)
    for name, place in places.items():
        text = text.replace(f'"{name}"', f'"{place}"')
    config = make_config(kind, masks=MASKS, arms={"base": {"type": "base"}, **json.loads(text)})
    run = RunFolder.create(tmp_path / "run", config)
    assert list(plan(run, config, ["ties"], "arms")) == [
        "arms/base",
        "arms/one",
        "masks/top",
        "arms/ties",
    ]
    for name in ("principal", "sum", "ties", "off", "random"):
        assert make_arm(run, config, name)
    arms = {name: read_tensors(run.checkpoint(name)) for name in ("base", *DERIVED)}
    records = {name: read_json(run.arm_record(name)) for name in DERIVED}
    base = arms["base"]
    a, b = (
        {pair.name: pair.trained for pair in checkpoint_deltas(run, config, str(places[name]))}
        for name in "AB"
    )
    assert all(torch.equal(arms["one"][name], a[name]) for name in a)
    assert set(records["sum"]["inputs"]) >= {"of.0", "of.1", "base"}
    assert records["ties"]["inputs"]["of.0"] == records["one"]["checkpoint_digest"]

    def close(found, expected):  # rounded to bf16
        return bool(
            ((found.double() - expected).abs() <= 2.0**-8 * expected.abs() * 1.01 + 1e-30).all()
        )

    mask, left = load_mask(run.mask("top"))[0], 0
    for name, before in base.items():
        wide = before.double()
        assert close(
            arms["sum"][name], wide + 0.5 * (a[name].double() + b[name].double() - 2 * wide)
        )
        may_move = mask[name] & (classify(name).component == "language")
        assert torch.equal(arms["ties"][name].where(~may_move, before), before)
        left += int(may_move.sum())
        if before.ndim < 2:
            assert torch.equal(arms["principal"][name], before)
            assert torch.equal(arms["off"][name], a[name])
        else:
            inner = inner_part(before, a[name].double() - wide, 4)
            assert close(arms["principal"][name], wide + inner)
            assert close(arms["off"][name], a[name].double() - inner)
    assert (
        records["ties"]["on_mask"]["coordinates"] == left > records["ties"]["on_mask"]["moved"] > 0
    )
    assert records["ties"]["off_mask_unmoved"] and records["principal"]["off_mask"] is None

    def norm(name):
        return norm_over_tensors(t.double() - base[n].double() for n, t in arms[name].items())

    assert 0 < norm("principal") < norm("off") < norm("one")
    assert norm("random") == pytest.approx(norm("principal"), rel=0.05)  # both after rounding
    assert not any(plan(run, config, list(DERIVED), "arms").values())
    again = {n: t * 2 for n, t in load_file(places["B"] / "model.safetensors").items()}
    save_file(again, places["B"] / "model.safetensors", {"format": "pt"})
    stale = {n for n, why in plan(run, config, list(DERIVED), "arms").items() if why}
    assert stale == {"arms/sum", "arms/ties"}


# ------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ({"m": {"type": "merge", "of": ["full", "n"]}, "n": {"type": "merge", "of": ["m"]}}, "m <- full <- n <- m"),
        ({"m": {"type": "merge", "of": ["full", "m"]}}, "arms.m needs itself"),
        ({"m": {"type": "merge", "of": ["full", "nope"]}}, r"arms.m.of.1 names 'nope'"),
        ({"m": {"type": "merge", "of": ["full@9"]}}, r"arms.m.of.0 names 'full@9'"),
        ({"m": {"type": "merge", "of": []}}, "at least 1"),
        ({"m": {"type": "merge", "of": ["full", "full"]}}, "'full' is given twice"),
        ({"m": {"type": "merge", "of": ["full"], "density": 0.2}}, 'density is of method = "ties"'),
        ({"m": {"type": "merge", "of": ["full"], "mask": "nope"}}, "arms.m.mask names 'nope'"),
        ({"m": {"type": "transplant"}}, "give a mask, or a part"),
        ({"m": {"type": "transplant", "part": "principal"}}, "either rank or rank_fraction"),
        ({"m": {"type": "transplant", "part": "random", "rank": 2}}, "a random part needs one"),
        ({"m": {"type": "transplant", "part": "principal", "rank": 2, "seed": 1}}, "others take none"),
        ({"m": {"type": "transplant", "mask": "top", "rank": 2}}, "rank is of a part"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(arms, message, make_config):
    """Cycles, unknown sources and settings without effect are one line with the key and the remedy."""
    with pytest.raises(ValueError, match=message):
        make_config(
            "llm",
            masks={"top": {"type": "magnitude", "fraction": 0.1}},
            arms={"full": {"type": "distill"}, **arms},
        )


def test_what_the_student_lacks_is_found_before_training(make_config):
    """A layer that the model does not have is refused by the arm's name before anything is trained."""
    arms = {"full": {"type": "distill"}, "m": {"type": "merge", "of": ["full"], "layers": [7]}}
    (line,) = inputs.find_problems(make_config("llm", arms=arms), ["full", "m"])
    assert line.startswith("arms.m: layers: the model has no '7'")


def test_a_part_of_nothing_has_no_direction(make_config, tmp_path):
    """A delta of zero cannot be scaled to a norm."""
    zero = {"type": "transplant", "of": "same", "part": "principal", "rank": 2, "norm_of": "same"}
    same = {"type": "transplant", "of": "base", "part": "principal", "rank": 2}
    config = make_config("llm", arms={"base": {"type": "base"}, "same": same, "x": zero})
    run = RunFolder.create(tmp_path / "run", config)
    with pytest.raises(RunError, match="the part of same is zero"):
        make_arm(run, config, "x")


def test_roles_and_recorded_settings(make_config, tmp_path):
    """A merge is `other`, a part a projection; a plain transplant is recorded by the settings it had before parts."""
    arms = {
        "base": {"type": "base"},
        "m": {"type": "merge", "of": ["base"]},
        "off": {"type": "transplant", "of": "m", "part": "off_random", "rank": 2, "seeds": [1, 2]},
        "plain": {"type": "transplant", "of": "base", "mask": "top"},
    }
    config = make_config("llm", masks={"top": {"type": "magnitude", "fraction": 0.1}}, arms=arms)
    assert config.roles.of == {
        **{"base": "base", "m": "other", "off-0": "projection", "off-1": "projection"},
        "plain": "transplant",
    }
    assert config.ancestors("off-1") == ["m", "base"] and config.is_derived("m")
    run = RunFolder.create(tmp_path / "run", config)
    make_arm(run, config, "plain")
    about = read_json(run.arm_record("plain"))["inputs"]["arm"]
    assert about == {"type": "transplant", "of": "base", "mask": "top"}
