"""Claims about the paper's tables and the section "What distillation adds", on a run of files from a seeded world."""

from __future__ import annotations

import re
import tomllib
from itertools import combinations, product

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import vlopd
from evals.compare import compare
from evals.report.additions import (
    WHY,
    WORDS,
    Comparison,
    _recovers,
    _retrained,
    additions,
    decide,
    sentence,
)
from evals.report.groups import read_groups
from evals.report.markdown import markdown
from evals.report.page import environment
from evals.report.paper.pages import lay_out
from evals.report.paper.tables import TABLES
from tests.command import call
from tests.snippets import ROOT, module_of
from tests.test_report import SKILL, make_config, make_run
from vlopd.errors import ConfigError, RunError
from vlopd.files import read_json, write_json, write_jsonl
from vlopd.run.folder import RunFolder

REAL, NULLS = (
    ("full", "replicate-0", "replicate-1"),
    ("rademacher-0", "rademacher-1", "rademacher-2"),
)
WORLD = {
    # (family, metric, parameter, name): mean of OPD, of the null, of noise, deviation
    ("spectrum", "stable_rank", "", "[median]"): (3.2, 3.2, 32, 0.02),
    ("spectrum", "top_energy_ratio", "k=16", "[median]"): (0.93, 0.93, 0.38, 0.002),
    ("spectrum", "principal_projection_energy_ratio", "ratio=0.1", "[median]"): (0.06, 0.05, 0.007, 0.02),
    ("place", "low_magnitude_update_overlap_ratio", "ratio=0.1,atol=1e-05", "[all]"): (0.11, 0.11, 0.11, 0.001),
    ("place", "principal_update_overlap_ratio", "ratio=0.1,atol=1e-05", "[all]"): (0.09, 0.09, 0.09, 0.001),
    ("place", "energy_share", "", "[part=ffn]"): (0.45, 0.55, 0.5, 0.002),
    ("place", "energy_share", "", "[component=vision]"): (0.36, 0.16, 0.2, 0.003),
    ("size", "frac_isclose_zero", "atol=1e-05", "[all]"): (0.13, 0.13, 0.14, 0.002),
    ("size", "relative_delta_fro", "", "[all]"): (0.013, 0.013, 0.013, 0.0001),
}  # fmt: skip
MARGIN = 0.1


def invented_run(root):
    """A run folder with three seeds of training and of a null: what differs between them is written in WORLD."""
    masks = {
        "top": {"type": "top_fraction", "of": "full", "fraction": 0.05},
        "top-null": {"type": "top_fraction", "of": "rademacher-0", "fraction": 0.05},
        "random": {"type": "random", "like": "top", "seeds": [1, 2]},
    }
    adamw, sgd = ({"optim": {"type": its, "learning_rate": 1e-2}} for its in ("adamw", "sgd"))
    arms = {
        "base": {"type": "base"},
        "full": {"type": "distill", "seed": 1, "role": "full"},
        "replicate": {"type": "distill", "seeds": [2, 3]},
        "rademacher": {"type": "distill", "seeds": [1, 2, 3], "null": "rademacher"},
        "subnetwork": {"type": "distill", "seed": 2, "mask": "top"},
        "null-mask": {"type": "distill", "seed": 2, "mask": "top-null", "role": "control"},
        "random": {"type": "distill", "seed": 2, "mask": "random"},
        "sgd": {"type": "distill", "seed": 2, **sgd},
        "adamw": {"type": "distill", "seed": 2, "role": "variant", **adamw},
    }
    measured = {"arms": [*REAL, *NULLS], "null_draws": 5}
    config = make_config(masks=masks, arms=arms, geometry=measured, eval={"bootstrap_draws": 200})
    with pytest.MonkeyPatch.context() as patched:
        for arm in config.arms:
            skill = 0.45 if arm in NULLS else 0.6 if "mask" in arm or "random" in arm else 0.8
            patched.setitem(SKILL, arm, SKILL.get(arm, skill))
        make_run(root, config, n=200, images=False)
    run, rng = RunFolder(root), np.random.default_rng(0)
    write_json(root / "run.json", {**read_json(root / "run.json"), "format": 2, "history": []})
    values, rows = [], []
    for (family, *key), (real, null, noise, sd) in WORLD.items():
        for kind, of, mean in (
            ("real", REAL, real),
            ("signal", NULLS, null),
            ("drawn", REAL, noise),
        ):
            label = {"real": "", "signal": "rademacher", "drawn": "gaussian"}[kind]
            values += [[kind, label, "full", arm, family, *key, rng.normal(mean, sd)] for arm in of]
    for kind, two, cosine in (
        ("real", combinations(REAL, 2), 0.4), ("signal", combinations(NULLS, 2), 0.0),
        ("mixed", product(REAL, NULLS), 0.1),
    ):  # fmt: skip
        label = "" if kind == "real" else "rademacher"
        for a, b in two:
            key = ["direction", "delta_cosine", "", "[all]"]
            values.append([kind, label, "full", f"{a}|{b}", *key, rng.normal(cosine, 0.01)])
    columns = ["kind", "null", "of", "unit", "family", "metric", "parameter", "name", "value"]
    table = pd.DataFrame(values, columns=columns)
    for key, part in table.groupby(["family", "metric", "parameter", "name"], sort=False):
        one = part[part.kind == "real"].value
        for kind, label in (("signal", "rademacher"), ("drawn", "gaussian")):
            other = part[part.kind == kind].value
            if other.empty:
                continue
            test = stats.ttest_ind(one, other, equal_var=False)
            low, high = test.confidence_interval(0.9)
            gap = one.mean() - other.mean()
            numbers = [3, 3, one.mean(), other.mean(), "linear", gap, low, high, "welch"]
            p = test.pvalue
            is_equal = bool(-MARGIN * abs(other.mean()) < low and high < MARGIN * abs(other.mean()))
            rows.append(["full", label, kind, *key, *numbers, p, p, MARGIN, 0.5, is_equal, ""])
    names = "n_real n_null real_mean null_mean scale difference low high test p q margin p_equivalent equivalent reason"
    columns = ["of", "null", "kind", "family", "metric", "parameter", "name", *names.split()]
    table.to_csv(root / "geometry/group_values.csv", index=False)
    pd.DataFrame(rows, columns=columns).to_csv(root / "geometry/groups.csv", index=False)
    for arm in config.geometry.arms:
        own = table[(table.unit == arm) & table.kind.isin(("real", "signal"))]
        own = own.assign(null="gaussian", null_mean=own.value / 2, null_sd=0.01, p=0.5, excess=0.1)
        own = own.assign(status="ok", reason="", component="", layer=None, module="", shape="")
        run.geometry(arm).mkdir(exist_ok=True)
        own.drop(columns=["kind", "of", "unit", "family"]).to_csv(
            run.geometry(arm) / "geometry.csv"
        )
        write_json(
            run.geometry(arm) / "summary.json",
            {"inputs": {}, "headline": [], "left_out": {"summary": ""}},
        )
    overlaps = []
    for a, b in combinations(config.geometry.arms, 2):
        numbers = {
            "update_jaccard": 0.4,
            "first_covered_by_second": 0.6,
            "second_covered_by_first": 0.5,
        }
        numbers |= {"overlap_enrichment_vs_random": 3.0}
        numbers["overlap_enrichment_vs_random_within_tensors_and_magnitudes"] = 1.2
        for metric, value in numbers.items():
            own = ["[all]", metric, "atol=1e-05", value, "gaussian", value / 2, 0.01, 0.03, a, b]
            overlaps.append(own)
    columns = [
        "name",
        "metric",
        "parameter",
        "value",
        "null",
        "null_mean",
        "null_sd",
        "p",
        "first",
        "second",
    ]
    pd.DataFrame(overlaps, columns=columns).to_csv(root / "geometry/overlap.csv", index=False)
    for arm in (*REAL, "sgd", "adamw", *NULLS, "subnetwork", "null-mask", "random-0", "random-1"):
        curve = [
            {"step": s, "task": "shapes_validation", "limit": 9, "exact_match": s / 50}
            for s in (0, 20, 40)
        ]
        write_jsonl(run.arm(arm) / "heldout.jsonl", curve)
        keys = ("momentum_alignment", "sqrt_v_variation", "unmoved_bf16_fraction")
        spread = [0.4, None if arm == "sgd" else 1.2, 0.9]
        evidence = [
            {"step": s, "module": "all", **dict(zip(keys, spread, strict=True))} for s in (10, 30)
        ]
        write_jsonl(run.arm(arm) / "optimizer.jsonl", evidence)
    compare(run, config)
    return run, config


@pytest.fixture(scope="module")
def invented(tmp_path_factory):
    return invented_run(tmp_path_factory.mktemp("paper") / "run")


# -------------------------------------------------------------------------------------------- tables


def test_every_table_is_filled_and_no_cell_is_empty_without_a_reason(invented):
    """All tables have rows of the pair; a number without a value, or a null without a p, says why."""
    made = vlopd.paper(invented[0].root)
    assert set(made.tables) == set(TABLES)
    for name, table in made.tables.items():
        assert table.numbers and not table.lacking, name
        assert {n.kind for n in table.numbers} == {"update", "drawn", "signal"}, name
        for number in table.numbers:
            assert number.column in table.columns
            assert number.value is not None or number.reason, number
            if number.kind != "update" and number.column not in ("density %", "learning rate"):
                assert number.p is not None or number.reason, number


def test_numbers_are_means_over_seeds_with_their_interval_and_tests(invented):
    """The row of three seeds has their mean and t interval; the nulls' p are those of groups.csv."""
    run, _ = invented
    numbers = vlopd.paper(run.root).numbers
    own = numbers[(numbers.table == "main") & (numbers.column == "stable rank")].set_index("kind")
    values = pd.read_csv(run.root / "geometry/group_values.csv").query("metric == 'stable_rank'")
    real = values[values.kind == "real"].value
    assert own.value["update"] == pytest.approx(real.mean()) and own.n["update"] == 3
    low, high = stats.t.interval(0.95, 2, real.mean(), stats.sem(real))
    assert (own.low["update"], own.high["update"]) == pytest.approx((low, high))
    tests = pd.read_csv(run.root / "geometry/groups.csv").query("metric == 'stable_rank'")
    for kind in ("signal", "drawn"):
        assert own.p[kind] == pytest.approx(tests.set_index("kind").p[kind])
    assert own.null["signal"] == "rademacher" and own.n["signal"] == 3


def test_retraining_stands_beside_random_and_signal_null_masks(invented):
    """Full has the null's own scores beside it, a masked arm those of random masks and of the null's mask."""
    numbers = vlopd.paper(invented[0].root).numbers
    test = numbers[(numbers.table == "retraining") & (numbers.column == "test %")]
    own = test[test.row.str.startswith("subnetwork")].set_index("kind")
    scores = read_json(invented[0].compare)["tasks"]["shapes"]["arms"]
    assert own.value["signal"] == pytest.approx(100 * scores["null-mask"]["mean"])
    means = [100 * scores[f"random-{i}"]["mean"] for i in (0, 1)]
    assert own.value["drawn"] == pytest.approx(np.mean(means)) and own.p["drawn"] >= 0
    full = test[test.row.str.startswith("full")].set_index("kind")
    assert full.value["signal"] == pytest.approx(100 * np.mean([scores[a]["mean"] for a in NULLS]))


def test_what_a_run_lacks_is_said_for_each_table(invented, tmp_path):
    """A run without geometry, curves and optimizers ends in reasons, beside the rows of another run."""
    config = make_config(geometry={"arms": []})
    bare = make_run(tmp_path / "bare", config, n=20, images=False)
    write_json(
        bare.root / "run.json", {**read_json(bare.root / "run.json"), "format": 2, "history": []}
    )
    for path in bare.root.glob("geometry/*/*"):
        path.unlink()
    made = vlopd.paper(invented[0].root, bare.root)
    for name, table in made.tables.items():
        assert table.numbers and list(table.lacking) == ["bare"], name
        assert "run" in {number.pair for number in table.numbers}
    with pytest.raises(ConfigError, match="no run"):
        vlopd.paper()
    with pytest.raises(RunError, match="not a run folder"):
        vlopd.paper(tmp_path)
    with pytest.raises(ConfigError, match="bare is given twice"):
        vlopd.paper(bare.root, bare.root)


def test_tables_are_written_and_printed(invented, tmp_path, monkeypatch, capsys):
    """Markdown and LaTeX have every line and footnote, CSV every number; the command prints the same."""
    made = vlopd.paper(invented[0].root)
    code, printed = call(monkeypatch, capsys, "paper", invented[0].root, "--out", tmp_path)
    assert code == 0
    for name, table in made.tables.items():
        assert table.title in " ".join(printed.split()) or name in printed
        laid = lay_out(table)
        markdown, latex = ((tmp_path / f"{name}.{end}").read_text() for end in ("md", "tex"))
        assert markdown.count("\n| ") == len(laid.lines) + 2
        assert latex.count(r"\\") == len(laid.lines) + 1 and r"\toprule" in latex
        assert all(note in markdown and note[:3] in latex for note in laid.notes)
        assert len(pd.read_csv(tmp_path / f"{name}.csv")) == len(table.numbers)


# -------------------------------------------------------------------------------------------- section


def test_a_sentence_never_contradicts_its_numbers():
    """Over random p, differences and equivalence: survival needs a small p on the claimed side, and says so."""
    rng = np.random.default_rng(0)
    for _ in range(400):
        side, found = int(rng.integers(-1, 2)), []
        for null in ("rademacher", "shuffled_teacher")[: rng.integers(1, 3)]:
            p = None if rng.random() < 0.2 else float(rng.choice([0.0001, 0.01, 0.05, 0.051, 0.7]))
            gap, equal = float(rng.normal()), bool(rng.random() < 0.4)
            found.append(Comparison(null, 1 + gap, 1.0, 3, 3, gap, p, equal))
        text = sentence("X", "OPD", "seeds", found, side, 0.05)
        differs = [c.p is not None and c.p <= 0.05 for c in found]
        agrees = [side == 0 or c.difference * side > 0 for c in found]
        survives = [
            d and a and not c.equivalent for d, a, c in zip(differs, agrees, found, strict=True)
        ]
        assert text.startswith("X survives:") == all(survives)
        gone = [c.equivalent for c in found]
        assert not text.startswith("X does not survive") or any(gone)
        assert not text.startswith("X is undecided") or not any(gone)
        assert all("no test against" in text for c in found if c.p is None and not c.equivalent)
        for its in found:
            decision = decide(its.p, its.difference, its.equivalent, side, 0.05)
            clause = next(part for part in re.split(r"(?<=\)); ", text) if f"{its.null} 1" in part)
            assert WHY[decision].format("training on nothing") in clause
    assert len(set(WHY.values())) == len(WORDS) and set(WHY) == set(WORDS)


def test_the_section_finds_what_was_planted(invented):
    """Of the invented world, direction and the vision tower's share survive, rank does not, the FFN's is reversed."""
    run, config = invented
    drawn: dict[str, str] = {}
    found = additions(run, config, read_json(run.compare), drawn)
    template = environment().get_template("additions.html.j2")
    page = template.render(additions=found, figures=drawn)
    text = markdown(page)
    assert "Low rank does not survive: it comes from training on nothing as well" in text
    assert "In the vision tower survives" in text and "One direction over seeds survives" in text
    assert "Mostly in the FFN is reversed" in text
    assert "Off the principal directions is undecided" in text
    assert "The same coordinates over seeds: not measured in this run." in text
    assert "mask of rademacher" in text and "recovers full training on shapes" in text
    assert page.count('data-name="adds-') == len(drawn) >= 8
    assert "## What distillation adds" in text and "figures/adds-low-rank.svg" in text


def test_a_null_arm_may_be_called_null(invented, tmp_path):
    """Not read as a missing cell, as pandas has it: the arm keeps its label, and random masks are none of its."""
    run, config = invented
    for name in ("groups", "group_values"):
        text = (run.root / f"geometry/{name}.csv").read_text().replace("rademacher-0", "null")
        (tmp_path / "geometry").mkdir(exist_ok=True)
        (tmp_path / f"geometry/{name}.csv").write_text(text)
    other = RunFolder(tmp_path)
    assert read_groups(other).labels() == dict.fromkeys(("null", *NULLS[1:]), "rademacher")
    assert read_groups(other).nulls_of("full") == {"rademacher": ("null", *NULLS[1:])}
    (found,) = _retrained(config, read_groups(other), read_json(run.compare), 0.05, {})
    assert "random mask 0." in found["text"] and "mask of" not in found["text"]


def test_what_gained_nothing_is_not_recovered(invented):
    """Without an established gain of full training, an arm that is as good as it recovers nothing."""
    run, _ = invented
    entry = read_json(run.compare)["tasks"]["shapes"]
    for its in entry["contrasts"]:
        if its.get("non_inferiority"):
            its["non_inferiority"]["holds"] = True
    texts = []
    for status in ("ok", "weak"):
        entry["arms"]["subnetwork"]["recovery"] = {"status": status, "value": 1.0}
        texts.append(_recovers(entry, "subnetwork", "shapes"))
    assert "recovers full training on shapes survives" in texts[0]
    assert "recovers full training on shapes is undecided: no established gain" in texts[1]


def test_without_a_signal_null_the_section_says_what_to_add(tmp_path):
    """One line names the setting, nothing is claimed, and a run that trains nothing has no section."""
    drawn: dict[str, str] = {}
    found = additions(RunFolder(tmp_path), make_config(), {}, drawn)
    assert 'null = "rademacher"' in found["missing"] and not found["claims"] and not drawn
    untrained = make_config(arms={"base": {"type": "base"}}, masks={}, geometry={"arms": []})
    assert additions(RunFolder(tmp_path), untrained, {}, drawn) is None


# ----------------------------------------------------------------------------------------------- rows


def test_rows_of_a_study_are_those_of_its_files(invented, tmp_path):
    """The exported rows have every arm's score, difference to full, null and geometry; what is missing is empty."""
    run, config = invented
    module_of("scripts/study_rows.py").main([str(run.root), "--out", str(tmp_path)])
    rows = pd.read_csv(tmp_path / f"{config.name}.csv").set_index("arm")
    entry = read_json(run.compare)["tasks"]["shapes"]["arms"]
    assert set(rows.index) == set(config.arms) and set(rows.task) == {"shapes"}
    for arm, its in entry.items():
        assert rows.score[arm] == pytest.approx(its["mean"], rel=1e-5)
        gap = its["difference_to_full"]["mean"]
        assert rows.difference_to_full[arm] == pytest.approx(gap, rel=1e-5)
    assert rows["null"]["rademacher-1"] == "rademacher" and pd.isna(rows["null"]["full"])
    assert rows.optimizer["sgd"] == "sgd" and rows.learning_rate["sgd"] == 0.01
    assert 3 < rows.stable_rank["full"] < 3.4 and pd.isna(rows.stable_rank["sgd"])


RESULTS = sorted((ROOT / "docs" / "results").glob("*.csv"))


def test_committed_rows_are_of_a_config():
    """Every file of docs/results has the columns of the export, and a config under configs/ with its name."""
    columns = list(module_of("scripts/study_rows.py").COLUMNS)
    names = {tomllib.loads(p.read_text())["name"]: p for p in ROOT.glob("configs/**/*.toml")}
    assert {"paper", "paper-smollm2"} <= set(names)
    for path in RESULTS:
        rows = pd.read_csv(path)
        assert list(rows.columns) == columns and set(rows.study) == {path.stem}, path
        assert path.stem in names and len(rows), path
