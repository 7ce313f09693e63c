"""Groups of arms: statistics against scipy and statsmodels, planted worlds, the tables, and the stage of a run."""

import importlib.util
import math
import tomllib
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_ind

from vlopd import pipeline
from vlopd.config.analysis import GeometryConfig
from vlopd.config.input import load_config
from vlopd.config.roles import SignalNulls
from vlopd.files import read_json
from vlopd.run.dependencies import null_groups
from vlopd.run.folder import RunFolder
from vlopd.run.geometry import make_groups
from vlopd.update_geometry.checkpoint import write_table
from vlopd.update_geometry.group_statistics import Part, adjust, jackknife, pair_mean, welch
from vlopd.update_geometry.groups import Value, compare_groups, write_groups
from vlopd.update_geometry.overlap import OverlapRow
from vlopd.update_geometry.schema import Row

spec = importlib.util.spec_from_file_location(
    "study_groups", Path(__file__).parents[1] / "scripts" / "study_groups.py"
)
assert spec is not None and spec.loader is not None
study = importlib.util.module_from_spec(spec)
spec.loader.exec_module(study)

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.toml"
REAL, NULL = ("full", "full-2", "full-3"), ("noise", "noise-2", "noise-3")
GROUP = SignalNulls("rademacher", REAL, NULL)


# ---------------------------------------------------------------------------------------- statistics


def test_arms_are_compared_as_by_scipy_and_statsmodels():
    """Difference, interval and p are scipy's Welch test, equivalence is statsmodels' TOST, q its Benjamini-Hochberg."""
    a, b = [3.33, 3.02, 3.38, 3.1], [3.36, 3.53, 4.02]
    found = welch(a, b, 0.7, 0.9)
    test = stats.ttest_ind(a, b, equal_var=False)
    interval = test.confidence_interval(0.9)
    expected = (np.mean(a) - np.mean(b), interval.low, interval.high, test.pvalue)
    assert found[:4] == pytest.approx(expected)
    assert found.p_equivalent == pytest.approx(ttost_ind(a, b, -0.7, 0.7, usevar="unequal")[0])
    ps = [0.01, 0.04, None, 0.03, 0.8]
    known = [p for p in ps if p is not None]
    assert [q for q in adjust(ps) if q is not None] == pytest.approx(
        multipletests(known, method="fdr_bh")[1]
    )
    assert adjust(ps)[2] is None and adjust([None]) == [None]


def test_pairs_of_few_arms_do_not_count_as_independent():
    """Where a pair's similarity is the sum of its arms', the jackknife over arms is Welch's test of the doubled arms:
    ten pairs of five arms are worth five units."""
    rng = np.random.default_rng(0)
    groups = [[f"{side}{i}" for i in range(n)] for side, n in (("a", 5), ("b", 3))]
    arms = {arm: float(rng.normal()) for group in groups for arm in group}
    pairs = {frozenset(two): sum(arms[x] for x in two) for two in combinations(arms, 2)}

    def difference(a, b):
        return pair_mean(pairs, a, a) - pair_mean(pairs, b, b)

    found = jackknife(difference, groups, 1.0, 0.95, 10)
    doubled = [[2 * arms[arm] for arm in group] for group in groups]
    assert found == pytest.approx(welch(*doubled, 1.0, 0.95))
    more = jackknife(difference, groups, 1.0, 0.95, 10, [Part(1.0, 4)])
    assert more.low < found.low and more.high > found.high


@pytest.mark.parametrize("case", [study.Case(3, 3, 1), study.Case(5, 3, 3)], ids=str)
def test_intervals_hold_the_difference_and_equivalence_errs_seldom(case):
    """Intervals over few seeds cover at least 93 %, of arms and of pairs; groups that differ by the margin are called
    equivalent in at most 5 % (and 2.5 standard errors)."""
    rng = np.random.default_rng(1)
    assert study.coverage(rng, case, 1000) > 0.92
    for mixed in (False, True):
        assert study.coverage(rng, case, 300, dimensions=3, mixed=mixed) > 0.92
    assert study.false_equivalence(rng, case, 1000) < 0.05 + 2.5 * math.sqrt(0.05 * 0.95 / 1000)


def test_a_planted_world_is_found_and_nothing_else():
    """Of 100 studies of four seeds with a signal in one matrix and a null of the same spectrum, the larger share, size
    and shared direction are found, and at most 10 % of what a family flags (and 2.5 standard errors) is false."""
    rng = np.random.default_rng(2)
    shares, found = zip(*(study.outcome(study.study(rng, 4, 4)) for _ in range(100)), strict=True)
    assert np.mean(found) > 0.7
    assert set(shares[0]) == {"spectrum", "size", "place", "direction"}
    for family in shares[0]:
        own = [each[family] for each in shares]
        assert np.mean(own) < study.Q + 2.5 * np.std(own) / 10, family


# --------------------------------------------------------------------------------------- the tables


def row(name, metric, parameter, value, mean=None, sd=None, null="gaussian"):
    where = (name, "", None, "", "", metric, parameter)
    return Row(*where, value, null, mean, sd, None, None, None, "ok", "")


def write_tables(folder: Path, pairs=True) -> None:
    """geometry.parquet of all arms and overlap.parquet, with a few rows of known values."""
    for i, arm in enumerate((*REAL, *NULL)):
        noise, is_null = 0.01 * (i % 3), i >= len(REAL)
        rows = [
            row("[median]", "stable_rank", "", 3.2 + noise, 32.0, 0.1),
            row("[median]", "stable_rank", "", 3.2 + noise, 30.0, 0.2, "closed_form"),
            row("[median]", "top_energy_ratio", "k=16", 0.9 + noise, 0.4, 0.01),
            row("[module=up]", "energy_share", "", 0.3 + noise - 0.2 * is_null, 0.3, 1e-9),
            row("[all]", "frac_delta_eq_0", "", 0.0, 0.0, 0.0),
            row("[all]", "relative_delta_fro", "", i % 3, 1.0, 0.1),
            row("[all]", "delta_rms", "", 0.3, 0.3, 0.0),  # no measure of the comparison
            row("layers.0.up.weight", "stable_rank", "", 1.0, 2.0, 0.1),  # of one tensor
        ]
        write_table(folder / arm, "geometry", rows)
    rows = []
    for i, (a, b) in enumerate(combinations((*REAL, *NULL), 2)):
        cosine = 0.4 if b in REAL else 0.1 if a in REAL else 0.0
        for null in ("gaussian", "adam"):
            its = row("[all]", "delta_cosine", "", cosine + 0.001 * i, 0.0, 0.001, null)
            rows.append(OverlapRow(**vars(its), first=a, second=b))
    write_table(folder, "overlap", rows)


def tables(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    return tuple(
        pd.read_csv(folder / f"{name}.csv", keep_default_na=False, na_values={"value": [""]})
        for name in ("group_values", "groups")
    )


def test_each_cell_of_the_tables_has_a_number_or_a_reason(tmp_path):
    """group_values.csv has every arm, pair and drawn null; groups.csv a test of each measure, or why there is none."""
    write_tables(tmp_path)
    write_groups(tmp_path, [GROUP], GeometryConfig(null_draws=5), 0.95)
    values, groups = tables(tmp_path)
    assert not values.name.str.startswith("layers").any() and "delta_rms" not in set(values.metric)
    cosines = values[values.metric.eq("delta_cosine")]
    assert cosines.groupby(["kind", "null"]).size().to_dict() == {
        ("drawn", "adam"): 3, ("drawn", "gaussian"): 3, ("mixed", "rademacher"): 9,
        ("real", ""): 3, ("signal", "rademacher"): 3,
    }  # fmt: skip
    ranks = values[values.metric.eq("stable_rank")]
    assert ranks.groupby("kind").size().to_dict() == {"real": 3, "signal": 3, "drawn": 3}

    def of(metric, kind="signal", null="rademacher"):
        found = groups[groups.metric.eq(metric) & groups.kind.eq(kind) & groups.null.eq(null)]
        (one,) = found.to_dict("records")
        assert one["reason"] or one["p"] != ""
        return one

    assert set(groups.of) == {"full"}
    # a share that differs is found; only a signal null can say so
    assert float(of("energy_share")["q"]) < 0.01 and of("energy_share")["equivalent"] == "false"
    assert "by construction" in of("energy_share", "drawn", "gaussian")["reason"]
    # a spectrum that does not differ is equivalent, and far from the drawn null
    same = of("stable_rank")
    assert float(same["p"]) == 1.0 and same["equivalent"] == "true" and same["scale"] == "log"
    drawn = of("stable_rank", "drawn", "gaussian")
    assert float(drawn["difference"]) == pytest.approx(math.log(3.21 / 32), abs=1e-4)
    assert float(drawn["q"]) < 0.001 and drawn["n_null"] == 5
    assert float(drawn["null_mean"]) == pytest.approx(32)
    tail = of("tail_energy_ratio", "drawn", "gaussian")
    assert float(tail["null_mean"]) == pytest.approx(0.6)
    # directions: seeds against seeds of the null, against pairs across, and against noise
    assert float(of("delta_cosine")["difference"]) == pytest.approx(0.4, abs=0.02)
    assert float(of("delta_cosine", "mixed")["difference"]) == pytest.approx(0.3, abs=0.02)
    for one in (
        of("delta_cosine"),
        of("delta_cosine", "mixed"),
        of("delta_cosine", "drawn", "adam"),
    ):
        assert float(one["q"]) < 0.01 and one["test"] == "jackknife" and one["n_real"] == 3
    assert "equal in all arms" in of("frac_delta_eq_0")["reason"]
    assert "0 in full: no logarithm" in of("relative_delta_fro")["reason"]


@pytest.mark.parametrize(
    ("of", "arms", "draws", "metric", "kind", "reason"),
    [
        (REAL, NULL[:1], 5, "stable_rank", "signal", "1 arm of rademacher; a test needs 2"),
        (REAL[:1], NULL, 5, "stable_rank", "signal", "1 arm with the signal; a test needs 2"),
        (REAL, NULL, 3, "stable_rank", "drawn", "3 draws of gaussian; a test needs 5"),
        (REAL, NULL[:2], 5, "delta_cosine", "signal", "2 arms of rademacher; a test needs 3"),
        (REAL, NULL[:1], 5, "delta_cosine", "signal", "1 arm of rademacher; a test needs 3"),
        (REAL, NULL[:1], 5, "delta_cosine", "mixed", "1 arm of rademacher; a test needs 2"),
        (REAL[:1], NULL, 5, "delta_cosine", "mixed", "1 arm with the signal; a test needs 3"),
    ],
)
def test_too_few_arms_give_a_difference_and_the_reason(
    tmp_path, of, arms, draws, metric, kind, reason
):
    """With too few seeds or draws there is neither an interval nor a p, but the means and why."""
    write_tables(tmp_path)
    write_groups(
        tmp_path, [SignalNulls("rademacher", of, arms)], GeometryConfig(null_draws=draws), 0.95
    )
    _, groups = tables(tmp_path)
    chosen = groups.metric.eq(metric) & groups.kind.eq(kind) & groups.null.ne("adam")
    (one,) = groups[chosen].to_dict("records")
    assert one["reason"] == reason
    assert (one["low"], one["p"], one["q"], one["equivalent"]) == ("", "", "", "")
    assert one["difference"] != "" or (metric == "delta_cosine" and 1 in (len(of), len(arms)))


@pytest.mark.parametrize("undefined", [None, math.nan, math.inf])
def test_a_measure_without_a_value_in_some_arm_says_where(undefined):
    """An arm in which a measure is undefined leaves the row without a difference, never a comparison of the others, and
    the family's other rows with their q."""
    key = ("spectrum", "stable_rank", "", "[median]")
    values = [Value("real", "", "full", arm, *key, 3.0 + i) for i, arm in enumerate(REAL)]
    values += [Value("signal", "rademacher", "full", arm, *key, undefined) for arm in NULL]
    other = ("spectrum", "stable_rank", "", "[component=vision]")
    values += [Value("real", "", "full", arm, *other, 3.0 + i) for i, arm in enumerate(REAL)]
    values += [
        Value("signal", "rademacher", "full", arm, *other, 4.0 + i) for i, arm in enumerate(NULL)
    ]
    found, whole = compare_groups(values, GeometryConfig(), 0.95)
    assert found.reason == "not measured in noise" and found.p is None and found.difference is None
    assert whole.q == whole.p and 0 < whole.p < 1


# ------------------------------------------------------------------------------------------ the stage


def test_the_stage_is_made_from_tables_and_again_where_they_change(tmp_path):
    """geometry/groups is planned after the tables of its arms, made from them alone, kept while they and the margins
    stay, and made again with a margin's change, which touches no table."""
    arms = {arm: {"type": "distill", "seed": i} for i, arm in enumerate(REAL)}
    arms |= {a: {"type": "distill", "seed": i, "null": "rademacher"} for i, a in enumerate(NULL)}
    tree = tomllib.loads(QUICKSTART.read_text())
    tree |= {"arms": {"base": {"type": "base"}, **arms}, "masks": {}}
    tree |= {"geometry": {"arms": list(arms), "null_draws": 5}}
    config, run = load_config(tree), RunFolder(tmp_path)
    write_tables(tmp_path / "geometry")
    for artifact in (*(f"geometry/{arm}" for arm in arms), "geometry/overlap"):
        folder = tmp_path / artifact
        files = folder.glob("*") if folder.is_dir() else folder.parent.glob("overlap.*")
        run.checksums.finish(artifact, {}, list(files))

    def planned(config) -> str | None:
        planner = pipeline.Planner(run, config)
        needs = [f"geometry/{arm}" for arm in arms]
        planner.plan = dict.fromkeys([*needs, "geometry/overlap"])
        planner.groups(list(arms))
        return planner.plan["geometry/groups"]

    assert null_groups(config, list(arms)) == [GROUP]
    assert null_groups(config, list(REAL)) == []
    assert planned(config) == "new"
    assert make_groups(run, config, list(arms))
    assert planned(config) is None and not make_groups(run, config, list(arms))
    found = tables(tmp_path / "geometry")[1]
    assert set(found.margin) == {math.log(1.25), 0.05}
    assert read_json(tmp_path / "geometry" / "groups.json")["inputs"]["groups"]
    (tmp_path / "geometry" / "groups.csv").write_text("changed")
    assert make_groups(run, config, list(arms))  # derived: made again
    wider = load_config(tree, ["geometry.equal_ratio=1.5"])
    assert "equal_ratio" in (planned(wider) or "")
    assert wider.geometry.of_update == config.geometry.of_update
    assert make_groups(run, wider, list(arms))
