"""The study: its pages are those of its rows, its verdicts are those of planted rows, and rows are those of runs."""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from functools import cache
from itertools import combinations, product

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.weightstats import ttost_paired

from scripts import study_analysis as analysis
from scripts import study_collect, study_report
from scripts.study_analysis import NOT_RUN, WHOLE, Part, Run
from tests.snippets import ROOT
from tests.test_groups import row
from tests.test_report import make_config
from vlopd.files import write_json, write_jsonl
from vlopd.run.folder import RunFolder
from vlopd.update_geometry.checkpoint import write_table
from vlopd.update_geometry.overlap import OverlapRow

STUDY = ROOT / "docs" / "study"
WORLD = {
    # measure: means of OPD, of the signal null, of drawn noise
    "stable_rank [median]": (3.2, 3.3, 32.0),
    "tail_energy_ratio k=16 [median]": (0.07, 0.07, 0.62),
    "energy_share_over_parameter_share [component=vision]": (2.0, 1.0, 2.0),
    "energy_share_over_parameter_share [part=ffn]": (0.9, 1.0, 0.9),
    "delta_cosine [all]": (0.4, 0.0, 0.0),
    "top_mask_overlap_over_chance_within_magnitudes fraction=0.05 [all]": (2.8, 1.0, 1.0),
}
SCORES = {"base": 0.5, "full": 0.9, "top": 0.9, "null": 0.8, "magnitude": 0.8, "random": 0.8}
FFN, COSINE, OVERLAP = list(WORLD)[-3:]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Without statsmodels' collections of garbage, which take longer than all else here."""
    monkeypatch.setattr(gc, "collect", lambda: 0)


# --------------------------------------------------------------------------------------------- pages


def test_pages_and_figures_are_those_of_the_rows():
    """The abstract, and all of docs/study but the protocol, are what the script makes of the committed rows."""
    made = study_report.pages(STUDY / "data")
    found = {str(p.relative_to(STUDY)): p for p in STUDY.rglob("*.*") if p.parent.name != "data"}
    found["../abstract.md"] = STUDY.parent / "abstract.md"
    assert set(made) == set(found) - {"protocol.md"}
    for name, text in made.items():
        assert found[name].read_text() == text, f"{name}: run scripts/study_report.py"


def test_a_study_without_rows_says_not_run_yet(tmp_path):
    """Without any row, every hypothesis is not run yet, and no page lacks a table's head."""
    made = study_report.pages(tmp_path)
    assert (
        made["index.md"].count(f"| {NOT_RUN} |") > 20 and "**H1** | not run yet" in made["index.md"]
    )
    assert not [name for name in made if name.startswith("figures/")]


# ------------------------------------------------------------------------------------- planted rows


def planted_run(world=WORLD, seeds=10) -> Run:
    """Updates and pairs of both kinds whose means are given, with one percent of noise (of cosines 0.01)."""
    rng = np.random.default_rng(0)
    tables = {False: [], True: []}
    for column, kind in enumerate(("full", "signs")):
        arms = [f"{kind}-{i}" for i in range(seeds)]
        for unit in (*arms, *map("|".join, combinations(arms, 2))):
            paired = "|" in unit
            for null, statistic, draws in (
                ("", "", None),
                ("gaussian", "mean", 5),
                ("gaussian", "sd", 5),
            ):
                line = {"unit": unit, "null": null, "statistic": statistic, "draws": draws}
                for key, means in world.items():
                    mean = means[2 if null else column]
                    scale = 0.01 if key == COSINE else 0.01 * mean
                    if (key in (COSINE, OVERLAP)) == paired:
                        noise = scale * rng.normal() / (1 + 9 * bool(null))
                        line[key] = scale if statistic == "sd" else mean + noise
                tables[paired].append(line)
    return Run("a-100", pd.DataFrame(), *map(pd.DataFrame, tables.values()))


@cache
def geometry(seeds=10, **changed) -> list[Part]:
    rows = analysis.geometry_rows(planted_run(WORLD | changed, seeds), nulls=["signs"])
    return analysis.geometry_parts(rows, 10)


@cache
def scores(runs=5, where=("B", "D"), **changed) -> list[Part]:
    """The parts of H4 on two pairs of models whose mean scores are given, with 0.2 points of noise."""
    rng = np.random.default_rng(0)
    rows = [
        (run, kind, density, mean + rng.normal(0, 0.002))
        for run in range(runs)
        for kind, mean in (SCORES | changed).items()
        for density in ((WHOLE,) if kind in ("base", "full") else (5, 1))
    ]
    table = pd.DataFrame(rows, columns=["run", "kind", "density", "score"])
    return [part for name in where for part in analysis.score_parts(table, 5, name)]


def verdicts_of(*parts: Sequence[Part]) -> dict[str, analysis.Verdict]:
    return {its.hypothesis: its for its in analysis.verdicts([p for own in parts for p in own])}


def test_planted_effects_hold():
    """Where the spectrum is shared, but no direction, place or mask, all four hypotheses hold, and S0 does not."""
    found = verdicts_of(geometry(), scores())
    verdicts = {name: its.verdict for name, its in found.items()}
    assert verdicts == dict.fromkeys(("H1", "H2", "H3", "H4"), "holds")
    assert len(found["H4"].parts) == 20 and {its.n for its in found["H4"].parts} == {5}
    assert all(its.n == 10 for name in ("H1", "H2", "H3") for its in found[name].parts)
    for its in found.values():
        assert its.p == max(part.p for part in its.parts) <= its.p_holm
    for its in analysis.s0(planted_run(), 10):
        assert its.p > 0.05 and its.q >= its.p
    rank, (cosine, drawn, overlap, _) = found["H1"].parts[0], found["H2"].parts
    assert [its.than for its in found["H2"].parts] == ["signal null", "drawn noise"] * 2
    assert cosine.is_different and not Part(*"abcde", low=-0.1, high=0.1).is_different
    assert rank.estimate == pytest.approx(3.2 / 3.3, rel=0.02) and rank.scale == "ratio"
    assert cosine.estimate == pytest.approx(0.4, abs=0.02) and drawn.than == "drawn noise"
    assert overlap.low < 2.8 < overlap.high


@pytest.mark.parametrize(
    ("hypothesis", "changed", "verdict"),
    [
        ("H1", {"stable_rank [median]": (3.2, 5.0, 32.0)}, "reversed"),
        ("H1", {"stable_rank [median]": (3.2, 4.0, 32.0)}, "not shown"),  # at the margin
        ("H2", {OVERLAP: (0.8, 1.0, 1.0)}, "reversed"),
        ("H2", {COSINE: (0.0, 0.0, 0.0)}, "not shown"),
        ("H2", {COSINE: (0.4, 0.0, 0.5)}, "reversed"),
        ("H3", {FFN: (1.0, 1.0, 1.0)}, "not shown"),
    ],
    ids=str,
)
def test_one_wrong_part_of_the_geometry_fails_its_hypothesis_alone(hypothesis, changed, verdict):
    """A part whose difference is the opposite reverses the hypothesis, one without a difference leaves it not shown."""
    found = verdicts_of(geometry(**changed), scores())
    its = found.pop(hypothesis)
    assert its.verdict == verdict and its.p > 0.05
    assert {its.verdict for its in found.values()} == {"holds"}


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({"random": 0.9}, "reversed"),  # the null's mask is ten points below
        ({"top": 0.7, "full": 0.7}, "reversed"),
        ({"full": 0.93}, "reversed"),
        ({"full": 0.92}, "not shown"),  # at the margin, as the next
        ({"magnitude": 0.78}, "not shown"),
    ],
    ids=str,
)
def test_one_wrong_part_of_the_scores_fails_h4_alone(changed, verdict):
    """The same of masks: beaten by random ones, unlike the null's, or inferior to full by two points."""
    found = verdicts_of(geometry(), scores(**changed))
    assert found.pop("H4").verdict == verdict
    assert {its.verdict for its in found.values()} == {"holds"}


def test_too_few_seeds_and_absent_parts_are_not_run_yet():
    """Nine of ten seeds, or four of five pairs, give no verdict; nor does H4 have one without D."""
    found = verdicts_of(geometry(seeds=9), scores(runs=4))
    assert {its.verdict for its in found.values()} == {NOT_RUN}
    assert all(its.p is not None and "9 of 10" in its.reason for its in found["H1"].parts)
    absent = analysis.score_parts(pd.DataFrame(columns=["run", "kind", "density", "score"]), 5, "D")
    found = verdicts_of(geometry(), scores(where=("B",)), absent)
    assert found["H4"].verdict == NOT_RUN and found["H4"].p is None
    assert found["H1"].verdict == "holds" and sum(its.is_run for its in found["H4"].parts) == 10


# --------------------------------------------------------------------------------------- arithmetic


def test_holm_is_that_by_hand():
    """Of p .005, .01, .03, .04 Holm makes .02, .03, .06, .06; one that is not run counts as 1 and is not adjusted."""
    ps = {"H1": 0.01, "H2": 0.04, "H3": 0.03, "H4": 0.005}
    parts = [Part(name, "a", "", "different", "", p=p) for name, p in ps.items()]
    found = analysis.verdicts([*parts, Part("H1", "b", "", "different", "", p=0.002)])
    assert [its.p_holm for its in found] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert [its.verdict for its in found] == ["holds", "not shown", "not shown", "holds"]
    parts[0] = Part("H1", "a", "", "different", "", reason=NOT_RUN)
    first, *others = analysis.verdicts(parts)
    assert (first.p, first.p_holm, first.verdict) == (None, None, NOT_RUN)
    assert [its.p_holm for its in others] == pytest.approx([0.09, 0.09, 0.02])
    parts[0] = Part("H1", "a", "", "different", "", reason="equal in all seeds: no test")
    assert analysis.verdicts(parts)[0].verdict == "not shown"


def test_scores_are_compared_as_by_scipy_and_statsmodels():
    """One-sided paired t, TOST at two points, and the interval."""
    one, other = (
        pd.Series([0.97, 0.95, 0.96, 0.98, 0.94]),
        pd.Series([0.96, 0.95, 0.94, 0.96, 0.94]),
    )

    def of(claim):
        return analysis.paired(Part("H4", "a", "", claim, ""), one, other, 5)

    above = stats.ttest_rel(one, other, alternative="greater").pvalue
    assert of("above").p == pytest.approx(above) and not of("above").reason
    table = pd.concat(
        pd.DataFrame({"run": range(5), "kind": kind, "density": 5, "score": values[::-1]})
        for kind, values in (("top", one), ("random", other))
    )
    (part,) = analysis.score_parts(table, 5, "B", [5], {"b": ("top", "random", "above")})
    assert part.p == pytest.approx(above)  # paired within a run
    assert of("equivalent").p == pytest.approx(
        ttost_paired(one.values, other.values, -0.02, 0.02)[0]
    )
    shifted = stats.ttest_rel(one + 0.02, other, alternative="greater").pvalue
    assert of("not inferior").p == pytest.approx(shifted)
    interval = stats.ttest_rel(one, other).confidence_interval(0.95)
    assert (of("different").low, of("different").high) == pytest.approx(tuple(interval))
    same = analysis.paired(Part("H4", "a", "", "above", ""), one, one, 5)
    assert same.p is None and "no test" in same.reason and same.is_run


def test_an_excluded_seed_leaves_the_geometry_and_has_the_score_of_the_base():
    """As the protocol says of an arm that stops twice: of all kinds of training, by its seed."""
    arms = pd.DataFrame(
        [
            ("base", None, "t", 0.5),
            ("full-0", 1, "t", 0.9),
            ("signs-0", 1, "t", 0.6),
            ("full-1", 2, "t", 0.8),
        ],
        columns=["arm", "seed", "task", "score"],
    )
    updates = pd.DataFrame({"unit": ["full-0", "signs-0", "full-1"]})
    pairs = pd.DataFrame({"unit": ["full-0|full-1", "full-1|full-2"]})
    excluded = pd.DataFrame({"run": ["a"], "arm": ["signs-0"], "seed": [1]})
    found = analysis.without(Run("a", arms, updates, pairs), excluded)
    assert list(found.updates["unit"]) == ["full-1"] and list(found.pairs["unit"]) == [
        "full-1|full-2"
    ]
    scores = analysis.scores_of(found)
    assert (scores["signs-0"], scores["full-0"], found.excluded) == (0.5, 0.9, 1)


def test_forgetting_is_scipys_rank_correlation_with_an_interval():
    """That of scipy, which lies in its bootstrap interval; that within kinds of training can have the other sign."""
    rng = np.random.default_rng(0)
    kl, norm = rng.normal(size=(2, 40))
    rows = {"arm": "x", "task": analysis.PALETTE, "kl_to_base": kl, "delta_norm": norm}
    found = analysis.forgetting(
        Run("a", pd.DataFrame({**rows, "score": -kl + rng.normal(size=40)}))
    )
    expected = stats.spearmanr(kl, -kl).statistic
    first, second = found
    assert expected < first.value < 0 and first.low < first.value < first.high < 0 < second.high
    assert first.n == 40 and first.q == pytest.approx(2 * first.p)
    assert first.within == pytest.approx(first.value)  # of one kind
    kl, score = [0, 1, 2, 10, 11, 12], [10, 11, 12, 0, 1, 2]
    two = {
        "arm": [f"{kind}-{i}" for kind in "xy" for i in range(3)],
        "kl_to_base": kl,
        "score": score,
    }
    its, _ = analysis.forgetting(Run("a", pd.DataFrame({**rows, **two, "delta_norm": kl})), 10)
    assert its.value < 0 and its.within == pytest.approx(1)


def test_recipes_are_compared_at_the_norm_of_the_middle_rate():
    """A measure is read off between two rates on log scales; outside of them there is none."""
    rows = []
    for run, (recipe, factor) in product("xyz", (("reverse-kl", 1), ("sft", 2), ("grpo", 100))):
        for rate, norm in (("1e-4", 1), ("3e-4", 3), ("1e-3", 9)):
            rank = (norm * factor) ** -0.5
            rows.append(
                {"run": run, "arm": f"{recipe}-{rate}", "delta_norm": norm * factor}
                | dict.fromkeys(analysis.RECIPE_MEASURES, rank)
            )
    found = analysis.at_equal_norm(pd.DataFrame(rows))
    own = found[found["measure"] == "stable_rank"].groupby("recipe")["value"].mean()
    assert own["sft"] == pytest.approx(own["reverse-kl"]) and own["sft"] == pytest.approx(3**-0.5)
    assert math.isnan(own["grpo"])


def test_secondary_arms_are_paired_with_their_reference():
    """Arms of S4 are compared with the final mask of their density, in the same run, and corrected together."""
    rng = np.random.default_rng(0)
    means = {
        "base": 0.5,
        "discovery": 0.9,
        "final-5": 0.9,
        "early-2-5": 0.8,
        "random-5": 0.9,
        "final-1": 0.7,
        "early-2-1": 0.7,
    }
    rows = [
        {"run": run, "arm": arm, "score": mean + 0.1 * run + 0.001 * rng.normal()}
        for run in range(3) for arm, mean in means.items()
    ]  # fmt: skip
    table = pd.DataFrame(rows)
    found = {its.part: its for its in analysis.secondary_parts("s4", table)}
    assert {name: its.than for name, its in found.items()} == {
        "early-2-5": "final-5", "random-5": "final-5", "early-2-1": "final-1",
    }  # fmt: skip
    first = found["early-2-5"]
    scores = table.pivot(index="run", columns="arm", values="score")
    test = stats.ttest_rel(scores["early-2-5"], scores["final-5"])
    assert first.p == pytest.approx(test.pvalue) and first.q == pytest.approx(3 * first.p)
    assert first.n == 3 and first.low < -0.09 < first.high + 0.02


def test_masks_of_a_pair_of_real_weights_are_paired_by_their_training_seed():
    """In C a mask's arm is beside full training of the same seed, whatever the arms' numbers."""
    rows = [("base", None, None, 0.0, 0.1)]
    rows += [(f"full-{i}", None, 41 + i, 1.0, 0.5 + i / 10) for i in range(3)]
    rows += [
        (f"top-{i}", f"top-{i}", 41 + (i + 1) % 3, 0.1, 0.4 + (i + 1) % 3 / 10 + i / 100)
        for i in range(3)
    ]
    arms = pd.DataFrame(rows, columns=["arm", "mask", "seed", "density", "score"]).assign(
        task="capitals"
    )
    table = analysis.seed_scores(Run("c", arms))
    assert set(table["kind"]) == {"base", "full", "top"} and set(table["density"]) == {10, WHOLE}
    (part,) = analysis.score_parts(table, 3, "C", [10], {"": ("top", "full", "different")})
    assert part.estimate == pytest.approx(-0.09) and (part.n, part.reason) == (3, "")


# -------------------------------------------------------------------------------------------- collect


def test_rows_are_those_of_the_run_also_of_an_unfinished_one(tmp_path):
    """Without compare.json, arms have the scores of their own evaluation; geometry comes back in six digits."""
    root = tmp_path / "a-100"
    kinds = {"full": None, "signs": "rademacher"}
    arms = {
        k: {"type": "distill", "seeds": [1, 2, 3]} | ({"null": n} if n else {})
        for k, n in kinds.items()
    }
    names = [f"{kind}-{i}" for kind in kinds for i in range(3)]
    arms["full"]["sweep"] = {"optim.learning_rate": [1e-4, 3e-4]}
    config = make_config(
        arms={"base": {"type": "base"}, **arms}, masks={}, geometry={"arms": names},
        eval={"validation": {"tasks": ["shapes_validation"]}},
    )  # fmt: skip
    run, rng = (
        RunFolder.create(
            root,
            config.model_copy(
                update={"precision": config.precision.model_copy(update={"compute": "fp32"})}
            ),
        ),
        np.random.default_rng(0),
    )
    sweep = {"chosen": {"optim.learning_rate": 3e-4}, "at_edge": ["optim.learning_rate"]}
    sweep["curve"] = [
        {"settings": {"optim.learning_rate": r}, "score": s} for r, s in ((1e-4, 0.5), (3e-4, 0.75))
    ]
    for arm in ("base", *names[:-1]):  # the last arm is not trained yet
        record = {
            "type": "distill",
            "checkpoint_digest": "x",
            "arm": arm,
            "seconds": 10.0,
            "seed": 1,
            "density": 1.0,
            "inputs": {},
        }
        write_json(
            run.arm_record(arm), record | ({"sweep": sweep} if arm.startswith("full") else {})
        )
        write_jsonl(run.arm(arm) / "metrics.jsonl", [{"step": 0, "completion_tokens": 7}])
    its = {"exact_match,none": 0.8, "exact_match_stderr,none": 0.01, "sample_len": 500}
    results = {
        "leaves": {"shapes": ["shapes"]},
        "primary_metric": {"shapes": "exact_match"},
        "results": {"shapes": its},
    }
    write_json(run.eval("full-0") / "results.json", results)
    for arm in names[:-1]:
        ranks = row("[median]", "stable_rank", "", rng.uniform(3, 4), 32.0, 0.1)
        write_table(run.geometry(arm), "geometry", [ranks])
    cosines = {pair: rng.uniform() for pair in combinations(names[:-1], 2)}
    write_table(root / "geometry", "overlap", [
        OverlapRow(**vars(row("[all]", "delta_cosine", "", x, 0.0, 0.01)), first=a, second=b)
        for (a, b), x in cosines.items()
    ])  # fmt: skip
    study_collect.main([str(root), "--out", str(tmp_path)])
    found = analysis.read_run(tmp_path, "a-100")
    own = found.arms.set_index("arm")
    assert list(own.index) == ["full-0"] and own.score["full-0"] == 0.8 and own.n["full-0"] == 500
    assert own.validation["full-0"] == "0.5 0.75" and own.grid["full-0"] == "0.0001 0.0003"
    assert (
        own.at_edge["full-0"] and own.learning_rate["full-0"] == 3e-4 and own.tokens["full-0"] == 7
    )
    units = set(found.pairs["unit"])
    assert units == {"|".join(pair) for pair in cosines}
    values = {
        v.unit: v
        for v in analysis.values_of(found, "full", ["signs"])
        if v.metric == "delta_cosine" and v.kind != "drawn"
    }
    for pair, x in cosines.items():
        assert values["|".join(pair)].value == pytest.approx(x, rel=1e-5)
    kinds_found = {v.unit: v.kind for v in values.values()}
    assert kinds_found["full-0|full-1"] == "real" and kinds_found["signs-0|signs-1"] == "signal"
    assert kinds_found["full-0|signs-1"] == "mixed"
    line = pd.read_csv(tmp_path / "runs.csv").iloc[0]
    assert line["run"] == "a-100" and not line.finished and line.training_seconds == 60
