"""Writes the pages and figures of docs/study from docs/study/data: numbers are of the tables, prose of the templates.

    python scripts/study_report.py              # seconds
    python scripts/study_report.py --out FOLDER --data FOLDER

The templates are scripts/study_pages/*.md.j2; what is tested, and how, is in scripts/study_analysis.py.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from evals.report import figures  # noqa: E402
from evals.report.additions import CLOUDS  # noqa: E402
from evals.report.read import read_table  # noqa: E402
from evals.report.verdict import p_value  # noqa: E402
from scripts import study_analysis as analysis  # noqa: E402
from scripts.study_analysis import CLAIMS, KINDS, MASKS, OPD, SIGNAL, WHOLE, Claim, Part, Run  # noqa: E402
from scripts.study_collect import DATA, KEPT, kind_of  # noqa: E402
from vlopd.update_geometry.groups import GroupRow  # noqa: E402

PAGES = ROOT / "scripts" / "study_pages"
SEEDS_A, SEEDS_B, SEEDS_C, SEEDS_E = 10, 5, 4, 3
"""Seeds of the parts, as the protocol has them."""
STUDIES = {
    "s3": "optimizers",
    "s4": "early masks",
    "s5": "one layer",
    "s6": "few questions",
    "s7": "frozen components",
}
MEASURES = {
    "stable_rank": "stable rank",
    "tail_16_energy": "1 - top-16 energy",
    "joint_projection_10": "energy in the top subspaces",
    "low_magnitude_10": "moved: share of small weights",
    "ffn_energy_share": "FFN: energy share",
    "vision_energy_share": "vision: energy share",
    "unmoved_1e-5": "share not moved",
}
"""Words for the measures of S2."""
WIDTH = 7.2

# ----------------------------------------------------------------------------------------- results


@dataclass(frozen=True)
class Geometry:
    """The results on a part's updates: its run, the rows of groups.csv, and the parts of H1 to H3."""

    run: Run
    rows: list[GroupRow]
    parts: list[Part]


def geometry(data: Path, name: str, seeds: int, claims: Sequence[Claim] = CLAIMS) -> Geometry:
    """The results of a run on the measures of `claims` and the signal null."""
    run = analysis.read_run(data, name)
    rows = analysis.geometry_rows(run, OPD, [SIGNAL], claims)
    return Geometry(run, rows, analysis.geometry_parts(rows, seeds - run.excluded, claims))


def results(data: Path) -> dict[str, Any]:
    """Everything that the templates show."""
    first, again = (geometry(data, name, SEEDS_A) for name in ("a-100", "a-200"))
    others = [kind for kind in analysis.kinds_of(first.run) if kind != OPD]
    text_claims = [its for its in CLAIMS if its.name != "[component=vision]"]
    real = {"c": geometry(data, "c", SEEDS_C, text_claims), "e": geometry(data, "e", SEEDS_E)}
    masks, tuned, h4 = {}, {}, []
    for part in ("b", "d"):
        runs = [analysis.read_run(data, name) for name in analysis.runs_of(data, part)]
        masks[part], tuned[part] = analysis.mask_scores(runs), analysis.tuned(runs)
        h4 += analysis.score_parts(masks[part], SEEDS_B, part.upper())
    for part, seeds in (("c", SEEDS_C), ("e", SEEDS_E)):
        masks[part] = analysis.seed_scores(real[part].run)
        tuned[part] = analysis.tuned([real[part].run])
        own = set(masks[part]["kind"])
        claims = {
            "a": ("top", "magnitude", "different"),
            "b": ("top", "random", "different"),
            "c": ("top", "full", "different"),
        }
        shown = {key: its for key, its in claims.items() if its[1] in own} or {"b": claims["b"]}
        found = analysis.score_parts(masks[part], seeds, part.upper(), [10], shown)
        real[f"{part}_scores"] = analysis.with_q(found)
    secondary = {}
    for study in ("s2", *STUDIES):
        runs = [analysis.read_run(data, name) for name in analysis.runs_of(data, study)]
        secondary[study] = analysis.secondary_arms(runs)
    lines = read_table(data / "runs.csv") if (data / "runs.csv").exists() else pd.DataFrame()
    return {
        "a": first,
        "again": again,
        "s1": analysis.geometry_rows(first.run, OPD, others),
        **real,
        "masks": masks,
        "tuned": tuned,
        "verdicts": analysis.verdicts([*first.parts, *h4]),
        "verdicts_again": analysis.verdicts([*again.parts, *h4]),
        "verdicts_c": analysis.verdicts(real["c"].parts),
        "verdicts_e": analysis.verdicts(real["e"].parts),
        "h4": h4,
        "s0": analysis.s0(first.run, SEEDS_A - first.run.excluded),
        "s0_again": analysis.s0(again.run, SEEDS_A - again.run.excluded),
        "s8": analysis.forgetting(first.run),
        "secondary": secondary,
        "runs": lines,
        "exclusions": analysis.exclusions(data).to_dict("records"),
    }


# ------------------------------------------------------------------------------------------- numbers


def score(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def mean_of(scores: pd.DataFrame, kind: str, density: float | None = None) -> str:
    """The mean score of an arm, or of a kind of mask at a density in percent, over pairs of seeds."""
    its = scores[scores["kind"] == kind] if len(scores) else scores
    its = its if density is None or not len(its) else its[its["density"] == density]
    return score(its["score"].mean() if len(its) else None)


def number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:#.3g}".removesuffix(".")


def of_part(value: float | None, part: Part) -> str:
    """A mean on the scale of a part."""
    if part.scale == "points":
        return score(value)
    return number(value) if value is None or part.scale == "ratio" else f"{value:z.3f}"


def estimate(part: Part) -> str:
    """The ratio or difference of a part with its interval."""
    if part.estimate is None:
        return "-"
    form = {"points": "+.1f", "ratio": "#.3g", "difference": "z.3f"}[part.scale]
    factor = 100 if part.scale == "points" else 1
    shown = f"{factor * part.estimate:{form}}"
    if part.low is None or part.high is None:
        return shown
    return f"{shown} [{factor * part.low:{form}}, {factor * part.high:{form}}]"


def p_text(part: Part) -> str:
    """The p of a part, or why it has none."""
    if part.p is None:
        return part.reason or "-"
    why = f" ({part.reason.removeprefix('not run yet: ')})" if part.reason else ""
    return p_value(part.p) + why + " **reversed**" * part.is_reversed


def spread(values: Sequence[float] | pd.Series, form: str = "#.3g", factor: float = 1) -> str:
    """Mean ± standard deviation."""
    known = [factor * x for x in values if not math.isnan(x)]
    if not known:
        return "-"
    if len(known) == 1:
        return f"{known[0]:{form}}".removesuffix(".")
    deviation = float(np.std(known, ddof=1))
    mean = f"{np.mean(known):{form}}".removesuffix(".")
    return f"{mean} ± {deviation:{'.0f' if deviation >= 10 else '.2g'}}"


# -------------------------------------------------------------------------------------------- tables


def table(head: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """A Markdown table whose first `texts` columns are text."""
    lines = [list(head), ["---"] * texts + ["---:"] * (len(head) - texts), *rows]
    return "\n".join(
        f"| {' | '.join(x.replace('|', chr(92) + '|') for x in line)} |" for line in lines
    )


def verdict_table(found: Sequence[analysis.Verdict], again: Sequence[analysis.Verdict] = ()) -> str:
    """Verdicts with the largest p of their parts."""
    others = {its.hypothesis: its for its in again}
    head = [
        "",
        "verdict",
        "decided by part",
        "p",
        "p, Holm",
        *(["verdict of the rerun", "p"] * bool(again)),
    ]
    rows = []
    for its in found:
        deciding = [part for part in its.parts if part.is_reversed and part.is_run]
        deciding = deciding or [part for part in [its.decisive] if part]
        where = "; ".join(f"{part.where} {part.part}".strip() for part in deciding) or "-"
        run = sum(part.is_run for part in its.parts)
        p = f"{run} of {len(its.parts)} parts run" if its.p is None and run else p_value(its.p)
        row = [f"**{its.hypothesis}**", its.verdict, where, p, p_value(its.p_holm)]
        if again:
            other = others[its.hypothesis]
            same = other.parts == its.parts and run > 0
            row += ["not rerun", "-"] if same else [other.verdict, p_value(other.p)]
        rows.append(row)
    return table(head, rows, 3)


def geometry_table(parts: Sequence[Part], again: Sequence[Part] = (), kind: str = "OPD") -> str:
    """The parts of H1 to H3 (or of S0, on another kind), with both nulls; the rerun's estimates beside them."""
    head = ["part", "claim", kind, *(["signal null"] * (kind == "OPD")), "drawn noise"]
    head += ["ratio or difference", "n", "p", *(["rerun", "p"] * bool(again))]
    rows = []
    for i, its in enumerate(parts):
        row = [f"{its.hypothesis}{its.part}", f"{its.words} {claim_words(its)}"]
        means = [its.one, its.other, its.drawn] if kind == "OPD" else [its.one, its.drawn]
        row += [of_part(mean, its) for mean in means]
        if its.hypothesis == "H3" and its.estimate is not None:
            row[-1] = "as OPD"
        row += [estimate(its), counts(its), p_text(its)]
        if again:
            row += [estimate(again[i]), p_text(again[i])]
        rows.append(row)
    return table(head, rows, 2)


def claim_words(part: Part) -> str:
    return {
        "equivalent": f"equivalent to the {part.than}",
        "above": f"above the {part.than}".replace("the drawn noise", "drawn noise"),
        "different": f"different from the {part.than}",
        "not inferior": f"not inferior to {part.than}",
    }[part.claim]


def counts(part: Part) -> str:
    """Seeds of both sides; of drawn noise draws."""
    if not part.n:
        return "-"
    return f"{part.n}, {part.n_other}" + " draws" * (part.than == "drawn noise")


def shown(parts: Sequence[Part], letters: str) -> bool:
    """Whether the parts of these letters are all shown, each by itself."""
    return all(its.is_shown for its in parts if its.part in letters)


def points(parts: Sequence[Part], letters: str) -> str:
    """The differences of the parts of these letters with their intervals, in points, by density."""
    own = [its for its in parts if its.part in letters]
    densities = dict.fromkeys(its.where.rpartition(", ")[2] for its in own)
    return "; ".join(
        f"at {density} {' and '.join(map(estimate, its))}"
        for density in densities
        if (its := [part for part in own if part.where.endswith(f", {density}")])
    )


def parts_of(its: Geometry) -> dict[str, Part]:
    """The parts of H1 to H3 by name, such as "H1a"."""
    return {f"{part.hypothesis}{part.part}": part for part in its.parts}


def seed_mean(its: Geometry, part: str, kind: str) -> str:
    """The mean over seeds of a kind of training of the measure that a part compares, as in `kinds_table`."""
    claim = next(c for c in CLAIMS if f"{c.hypothesis}{c.part}" == part)
    return number(
        float(np.mean(analysis.cloud(its.run, kind, claim.metric, claim.name) or math.nan))
    )


def arm_words(arm: str) -> str:
    """The kind of an arm's mask, with its density."""
    kind, _, density = arm.partition("-")
    return MASKS.get(kind, kind) + f" at {density} %" * density.isdigit()


def edges(tuned: pd.DataFrame) -> str:
    """The arms of which more than half of the seeds chose an edge of their grid."""
    found = []
    for arm, own in tuned.groupby("arm", sort=False):
        count = int(own["at_edge"].astype(bool).sum())
        if 2 * count > len(own):
            found.append(f"{arm_words(arm)} ({count} of {len(own)})")
    return "; ".join(found)


def score_table(parts: Sequence[Part], q: bool = False) -> str:
    """Paired differences of scores, or of logarithms."""
    head = ["", "claim", "mean", "of the other", "difference", "n", "p", *(["q"] * q)]
    rows = []
    for its in parts:
        claim = {
            "above": f"{its.words} above {its.than}",
            "equivalent": f"{its.words} equivalent to {its.than}",
            "not inferior": f"{its.words} not inferior to {its.than}",
            "different": f"{its.words} against {its.than}",
        }[its.claim]
        row = [
            f"{its.where} {its.part}".strip(),
            claim,
            of_part(its.one, its),
            of_part(its.other, its),
        ]
        rows.append([*row, estimate(its), str(its.n or "-"), p_text(its), *([p_value(its.q)] * q)])
    return table(head, rows, 2)


def kinds_table(its: Geometry) -> str:
    """The primary measures of every kind of training, means and deviations over seeds, and of drawn noise."""
    kinds = analysis.kinds_of(its.run)
    measures = list(dict.fromkeys((c.metric, c.name, c.words) for c in CLAIMS))
    rows = []
    for kind in kinds:
        clouds = [analysis.cloud(its.run, kind, *measure[:2]) for measure in measures]
        rows.append([KINDS.get(kind, kind), str(len(clouds[0])), *map(spread, clouds)])
    drawn = [analysis.cloud(its.run, OPD, *m[:2], drawn=True) for m in measures]
    shown = [
        spread(x) if m[0] != analysis.SHARES else "as OPD"
        for x, m in zip(drawn, measures, strict=True)
    ]
    if kinds:
        rows.append(["drawn noise (of OPD's norms)", str(len(drawn[0])), *shown])
    return table(["kind of training", "seeds", *(m[2] for m in measures)], rows)


def training_table(run: Run) -> str:
    """Scores, KL to the base, norm and cost of every kind of training: means and deviations over seeds."""
    arms = run.arms[run.arms["task"].notna()] if len(run.arms) else run.arms
    tasks = list(arms["task"].unique()) if len(arms) else []
    rows = []
    kinds = arms[arms["mask"].isna()] if len(arms) else arms
    names = kinds["arm"].map(kind_of) if len(kinds) else []
    for kind, own in kinds.groupby(names, sort=False) if len(kinds) else ():
        one = own[own["task"] == tasks[0]]
        scores = [spread(own.loc[own["task"] == task, "score"], ".1f", 100) for task in tasks]
        sizes = [spread(one[column]) for column in ("kl_to_base", "delta_norm")]
        costs = [spread(one[column], ".0f") for column in ("tokens", "seconds")]
        untrained = kind in ("base", "teacher")
        costs = ["-", "-"] if untrained else costs
        rows.append([KINDS.get(str(kind), str(kind)), str(len(one)), *scores, *sizes, *costs])
    head = [
        "",
        "seeds",
        *(f"{task}, %" for task in tasks),
        "KL to base, nats",
        "norm of the update",
    ]
    return table([*head, "tokens", "seconds"], rows)


def mask_table(scores: pd.DataFrame, tuned: pd.DataFrame) -> str:
    """Test scores by kind of mask and density, with the learning rates that the seeds chose."""
    rows = []
    for density in sorted(set(scores["density"]), reverse=True):
        for kind in ("teacher", "base", *MASKS):
            own = scores[(scores["density"] == density) & (scores["kind"] == kind)]
            if own.empty:
                continue
            pattern = rf"{kind}(-\d+)?" if density == WHOLE else rf"{kind}-\d+"
            arms = tuned[tuned["arm"].str.fullmatch(pattern)]
            if density != WHOLE and arms["arm"].str.endswith(f"-{density}").any():
                arms = arms[arms["arm"] == f"{kind}-{density}"]
            rates = arms["learning_rate"].value_counts().sort_index()
            chosen = ", ".join(f"{rate:g} ({n})" for rate, n in rates.items())
            edge = f"{int(arms['at_edge'].sum())} of {len(arms)}" if len(arms) else "-"
            name = MASKS.get(kind, kind)
            part = f"{density} %" if density != WHOLE or kind == "full" else "-"
            span = f"{score(own['score'].min())} to {score(own['score'].max())}"
            values = spread(own["score"], ".1f", 100)
            rows.append([name, part, str(len(own)), values, span, chosen or "-", edge])
    head = [
        "mask",
        "density",
        "seeds",
        "test score, %",
        "range",
        "chosen rates (seeds)",
        "at the edge",
    ]
    return table(head, rows)


def curve_table(tuned: pd.DataFrame) -> str:
    """Validation scores over the grid, means over seeds."""
    rows = []
    for (arm, grid), own in tuned.groupby(["arm", "grid"], sort=False):
        points = [[float(x) for x in str(cell).split()] for cell in own["validation"]]
        means = np.mean(points, axis=0)
        cells = [f"{rate}: {100 * x:.1f}" for rate, x in zip(str(grid).split(), means, strict=True)]
        rows.append([arm_words(str(arm)), str(len(own)), "; ".join(cells)])
    return table(["arm", "seeds", "rate: mean validation score, %"], rows, 3)


def flagged(rows: Sequence[GroupRow], kind: str, family: str) -> tuple[int, int, int]:
    """How many rows of a family differ between OPD and a kind of training, are equivalent, and have a test."""
    own = [r for r in rows if (r.null, r.family, r.kind) == (kind, family, "signal")]
    own = [r for r in own if r.p is not None]
    differ = sum(r.q is not None and r.q <= analysis.SHARE for r in own)
    return differ, sum(bool(r.equivalent) for r in own), len(own)


def not_equivalent(rows: Sequence[GroupRow], metric: str) -> str:
    """The components in which a measure of OPD is not equivalent to the signal null's, with their ratios."""
    own = [r for r in rows if (r.metric, r.null, r.kind) == (metric, SIGNAL, "signal")]
    own = [r for r in own if r.name.startswith("[component=") and r.equivalent is False]
    return ", ".join(f"{r.name[11:-1]} ({row_estimate(r)})" for r in own)


def row_estimate(row: GroupRow) -> str:
    """The ratio (x) or difference of a row with its interval."""
    assert row.difference is not None
    log = row.scale == "log"
    shown = (
        [row.difference]
        if row.low is None or row.high is None
        else [row.difference, row.low, row.high]
    )
    words = [number(math.exp(x)) if log else f"{x:z.3f}" for x in shown]
    return f"{'x' if log else ''}{words[0]}" + f" [{', '.join(words[1:])}]" * (len(words) > 1)


def flagged_table(rows: Sequence[GroupRow]) -> str:
    """How many rows of each family differ from OPD at q <= 10 %, and how many are equivalent, by kind of training."""
    families = list(dict.fromkeys(row.family for row in rows))
    found = []
    for kind in dict.fromkeys(row.null for row in rows if row.kind == "signal"):
        cells = []
        for family in families:
            cells.append("{}, {} of {}".format(*flagged(rows, kind, family)))
        found.append([KINDS.get(kind, kind), *cells])
    return table(["OPD against", *(f"{family}: differ, equivalent" for family in families)], found)


SHOWN = ("[all]", "[median]", "[component=vision]", "[part=ffn]", "[part=attention]")
"""Names of the rows that the page of S1 shows."""


def rows_table(rows: Sequence[GroupRow], others: Sequence[str]) -> str:
    """OPD against `others` (drawn noise by its name): ratio or difference, * at q <= 10 %, = equivalent."""
    own = {
        (r.null, r.metric, r.parameter, r.name): r
        for null in others
        for r in rows
        if r.null == null and r.kind in ("signal", "drawn")
    }
    found = []
    for key in dict.fromkeys(k[1:] for k in own if k[3] in SHOWN):
        cells, mean = [], "-"
        for kind in others:
            row = own.get((kind, *key))
            if row is None or row.difference is None:
                cells.append("as OPD" if kind == analysis.DRAWN and key[0] in KEPT else "-")
                continue
            mean = number(row.real_mean)
            marks = "*" * (row.q is not None and row.q <= analysis.SHARE)
            marks += "=" * bool(row.equivalent)
            cells.append(f"{row_estimate(row)} {marks}".strip())
        words = f"{key[0].replace('_', ' ')}{f' ({key[1]})' if key[1] else ''}"
        found.append([words, key[2].strip("[]"), mean, *cells])
    names = [KINDS.get(kind, "drawn noise") for kind in others]
    return table(["measure", "of", "OPD", *names], found, 2)


def secondary_table(study: str, arms: pd.DataFrame) -> str:
    """The arms of S3 to S7: score over seeds, chosen rates, size and spectrum, difference to the reference."""
    parts = {its.part: its for its in analysis.secondary_parts(study, arms)}
    rows = []
    for arm in arms["arm"].unique() if len(arms) else ():
        own = arms[arms["arm"] == arm]
        rates = own["learning_rate"].value_counts().sort_index()
        part = parts.get(arm)
        row = [arm, str(len(own)), spread(own["score"], ".1f", 100)]
        row += [", ".join(f"{rate:g} ({n})" for rate, n in rates.items()) or "-"]
        row += [spread(own[column]) for column in ("delta_norm", "stable_rank", "tail_16_energy")]
        row += (
            ["-"] * 4
            if part is None
            else [part.than, estimate(part), p_text(part), p_value(part.q)]
        )
        rows.append(row)
    head = [
        "arm",
        "seeds",
        "test score, %",
        "rates (seeds)",
        "norm",
        "stable rank",
        "1 - top-16 energy",
    ]
    return table([*head, "against", "difference, points", "p", "q"], rows)


def spectrum_table(study: str, arms: pd.DataFrame) -> str:
    """The same arms' spectra against the reference's, as ratios."""
    columns = {"stable_rank": "stable rank", "tail_16_energy": "1 - top-16 energy"}
    parts = [
        replace(its, words=f"{its.part}, {words}", part="")
        for column, words in columns.items()
        for its in analysis.secondary_parts(study, arms, column)
    ]
    return score_table(parts, True)


def recipe_table(arms: pd.DataFrame) -> str:
    """S2: every recipe's measures at equal norm, and their ratios to reverse KL's; * at q <= 10 %."""
    values = analysis.at_equal_norm(arms)
    parts = {(its.part, its.words): its for its in analysis.recipe_parts(values)}
    measures = list(dict.fromkeys(values["measure"]))
    rows = []
    for recipe in dict.fromkeys(values["recipe"]):
        cells = []
        for measure in measures:
            own = values[(values["recipe"] == recipe) & (values["measure"] == measure)]
            part = parts.get((recipe, measure))
            star = (
                " *" if part is not None and part.q is not None and part.q <= analysis.SHARE else ""
            )
            ratio = (
                "" if part is None or part.estimate is None else f" (x{part.estimate:.3g}{star})"
            )
            cells.append(spread(own["value"]) + ratio)
        rows.append([recipe, *cells])
    return table(["recipe", *(MEASURES[measure] for measure in measures)], rows)


def correlation_table(found: Sequence[analysis.Correlation]) -> str:
    words = {"kl_to_base": "KL(student, base)", "delta_norm": "norm of the update"}
    rows = [
        [
            words[its.of],
            str(its.n),
            f"{its.value:.2f} [{its.low:.2f}, {its.high:.2f}]",
            p_value(its.p),
            p_value(its.q),
            f"{its.within:.2f}",
        ]
        for its in found
    ]
    head = ["score on the own palette against", "arms", "rank correlation", "p", "q"]
    return table([*head, "within a kind of training"], rows)


def runs_table(lines: pd.DataFrame) -> str:
    rows = []
    for its in lines.itertuples():
        wall = f"{its.wall_seconds / 60:.0f}" + ("" if its.finished else " so far")
        machine = f"{its.cores} cores" + (
            f", {its.processor}" if isinstance(its.processor, str) else ""
        )
        row = [its.run, its.begun, wall, f"{its.training_seconds / 60:.0f}", str(its.trainings)]
        device = its.device if isinstance(its.device, str) else "-"
        rows.append([*row, machine, device, str(its.torch), str(its.commit)[:7]])
    head = [
        "run",
        "begun",
        "wall, min",
        "training, min",
        "trainings",
        "machine",
        "device",
        "torch",
        "commit",
    ]
    return table(head, rows, 2)


# ------------------------------------------------------------------------------------------- figures

SPREAD = 0.13


def clouds(
    its: Geometry, again: Geometry | None = None, claims: Sequence[Claim] = CLAIMS
) -> Figure:
    """A panel per primary measure with three clouds, a point per seed; the rerun's are hollow."""
    measures = list(dict.fromkeys((c.metric, c.name, c.words) for c in claims))
    groups = (
        ("OPD", OPD, False, "real"),
        ("signal null", SIGNAL, False, "signal"),
        ("drawn noise", OPD, True, "drawn"),
    )
    with matplotlib.rc_context(figures.STYLE):
        rows = -(-len(measures) // 2)
        figure = Figure(figsize=(WIDTH, 1.45 * rows))
        figure.subplots_adjust(hspace=0.7, wspace=0.45)  # a layout engine takes seconds
        panels = figure.subplots(rows, 2, squeeze=False).flat
        for (metric, name, words), axes in zip(measures, panels, strict=False):
            kept = metric == analysis.SHARES
            everything: list[float] = []
            for y, (_, kind, drawn, colour) in enumerate(groups):
                if kept and drawn:
                    continue
                for side, source in ((-1, its), (1, again)):
                    if source is None:
                        continue
                    values = analysis.cloud(source.run, kind, metric, name, drawn)
                    if not values:
                        continue
                    everything += values
                    middle = y + (0 if again is None else 0.2 * side)
                    heights = middle + np.linspace(-SPREAD, SPREAD, len(values))
                    face = CLOUDS[colour] if side < 0 else "none"
                    axes.plot(
                        values, heights, "o", ms=4, mfc=face, mec=CLOUDS[colour], mew=0.8, alpha=0.8
                    )
                    axes.plot(
                        [np.mean(values)] * 2,
                        [middle - 0.18, middle + 0.18],
                        color=CLOUDS[colour],
                        lw=1.4,
                    )
            if kept:
                axes.text(0.5, 2, "equal to OPD by construction", transform=axes.get_yaxis_transform(),
                          ha="center", va="center", fontsize=8, alpha=0.7)  # fmt: skip
            axes.set_yticks(range(3), [group[0] for group in groups])
            axes.set_ylim(2.5, -0.5)
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
            if everything and min(everything) > 0:
                axes.set_xscale("log")
                axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5), numticks=6))
                if max(everything) < 3 * min(everything):
                    axes.xaxis.set_major_locator(MaxNLocator(4))
                axes.xaxis.set_major_formatter("{x:g}")
                axes.xaxis.set_minor_formatter(NullFormatter())
                axes.minorticks_off()
            else:
                axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.set_xlabel(words)
            axes.grid(axis="x")
        for axes in panels:
            axes.set_visible(False)
    return figure


def mask_figure(scores: pd.DataFrame) -> Figure:
    """Score by kind of mask, a panel per density; a colour and a line per seed, full and base are marked."""
    densities = sorted(set(scores["density"]) - {WHOLE}, reverse=True)
    seeds = sorted(set(scores["run"]))
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(WIDTH, 2.5 * len(densities)))
        figure.subplots_adjust(hspace=0.45)
        panels = figure.subplots(len(densities), 1, squeeze=False)[:, 0]
        for axes, density in zip(panels, densities, strict=True):
            own = scores[scores["density"].isin([density, WHOLE])]
            kinds = [kind for kind in MASKS if kind in set(own["kind"])]
            values = own.pivot(index="run", columns="kind", values="score") * 100
            for i, seed in enumerate(seeds):
                colour = figures.VARIANTS[i % len(figures.VARIANTS)]
                line = values.loc[seed].reindex(kinds)
                axes.plot(range(len(kinds)), line, "-", lw=0.9, alpha=0.5, color=colour)
                axes.plot(range(len(kinds)), line, "o", ms=4.5, color=colour, label=str(seed))
            for x, kind in enumerate(kinds):
                axes.plot(
                    [x - 0.25, x + 0.25], [values[kind].mean()] * 2, color=figures.INK, lw=1.6
                )
            lowest, highest = values[kinds].min().min(), values[kinds].max().max()
            for kind in ("base", "teacher"):
                if kind not in values:
                    continue
                mean = values[kind].mean()
                if lowest - (highest - lowest) <= mean <= highest + (highest - lowest):
                    axes.axhline(
                        mean, color=figures.INK, lw=0.8, ls=(0, (3, 3)), alpha=0.6, zorder=0
                    )
                    axes.annotate(
                        kind,
                        (1, mean),
                        xycoords=("axes fraction", "data"),
                        ha="right",
                        va="bottom",
                        fontsize=8,
                    )
                elif mean < lowest:
                    axes.set_title(f"{kind} {mean:.1f}, below", loc="left", fontsize=8)
            if "full" in values:
                axes.axhline(
                    values["full"].mean(),
                    color=figures.COLOURS["full"],
                    lw=0.9,
                    ls=(0, (3, 3)),
                    zorder=0,
                )
            words = [MASKS[kind].replace(", ", ",\n").replace("-m", "-\nm") for kind in kinds]
            axes.set_xticks(range(len(kinds)), words, fontsize=8)
            axes.tick_params(axis="x", length=0)
            axes.set_ylabel(f"test score, %\n({density} % trained)")
            axes.grid(axis="y")
    return figure


def arms_figure(study: str, arms: pd.DataFrame) -> Figure:
    """S3 to S7: test score, a line per arm and a point per seed; the reference's mean is dashed."""
    names = [name for name in arms["arm"].unique() if name not in ("base", "teacher", "discovery")]
    values = arms.assign(score=100 * arms["score"]).pivot(
        index="run", columns="arm", values="score"
    )
    wanted = {analysis.REFERENCES[study](name) for name in names}
    references = [name for name in names if name in wanted]
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(WIDTH, 0.7 + 0.27 * len(names)))
        axes = figure.subplots()
        seed_dots(axes, [values[name] for name in names])
        for name in references:
            own = [analysis.REFERENCES[study](other) == name for other in names]
            rows = [i for i, its in enumerate(own) if its]
            ends = min(rows) - 0.4, max(rows) + 0.4
            axes.plot(
                [values[name].mean()] * 2, ends, ls=(0, (3, 3)), lw=0.9, color=figures.INK, zorder=0
            )
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("test score, %")
    return figure


def recipe_figure(arms: pd.DataFrame) -> Figure:
    """S2: measures of the spectrum and of place at equal norm, a panel each, a line per recipe and a point per seed."""
    values = analysis.at_equal_norm(arms)
    recipes = list(dict.fromkeys(values["recipe"]))
    shown = [its for its, family in analysis.RECIPE_MEASURES.items() if family != "size"]
    with matplotlib.rc_context(figures.STYLE):
        rows = -(-len(shown) // 2)
        figure = Figure(figsize=(WIDTH, rows * (0.75 + 0.2 * len(recipes))))
        figure.subplots_adjust(hspace=0.5, wspace=0.08)
        panels = figure.subplots(rows, 2, squeeze=False, sharey=True).flat
        for measure, axes in zip(shown, panels, strict=False):
            own = values[values["measure"] == measure]
            own = own.pivot(index="run", columns="recipe", values="value")
            seed_dots(axes, [own[recipe].dropna() for recipe in recipes])
            mean = own["reverse-kl"].mean() if "reverse-kl" in own else math.nan
            axes.axvline(mean, ls=(0, (3, 3)), lw=0.9, color=figures.INK, zorder=0)
            axes.set_yticks(range(len(recipes)), recipes)
            axes.set_xlabel(MEASURES[measure])
            axes.xaxis.set_major_locator(MaxNLocator(4))
        for axes in panels:
            axes.set_visible(False)
    return figure


def seed_dots(axes: Axes, lines: Sequence[pd.Series]) -> None:
    """Points of each line's values, indexed by run, at the heights 0, 1, ... downwards; a mark at each mean."""
    runs = sorted({run for line in lines for run in line.index})
    for y, line in enumerate(lines):
        for i, run in enumerate(runs):
            if run in line.index:
                colour = figures.VARIANTS[i % len(figures.VARIANTS)]
                axes.plot(line[run], y + 0.12 * (i - (len(runs) - 1) / 2), "o", ms=4, color=colour)
        axes.plot([line.mean()] * 2, [y - 0.3, y + 0.3], color=figures.INK, lw=1.4)
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")


def forgetting_figure(run: Run) -> Figure:
    """Score on the student's own palette against KL to the base and the update's norm, a point per trained arm."""
    own = run.arms[(run.arms["task"] == analysis.PALETTE) & run.arms["kl_to_base"].notna()]
    names = own["arm"].map(kind_of)
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(WIDTH, 2.9))
        panels = figure.subplots(1, 2, sharey=True)
        axis = {"kl_to_base": "KL(student, base), nats a token", "delta_norm": "norm of the update"}
        for axes, (column, words) in zip(panels, axis.items(), strict=True):
            for i, (kind, part) in enumerate(own.groupby(names, sort=False)):
                colour = figures.VARIANTS[i % len(figures.VARIANTS)]
                axes.plot(
                    part[column],
                    100 * part["score"],
                    "o",
                    ms=4,
                    color=colour,
                    label=KINDS.get(str(kind), str(kind)),
                )
            axes.set_xlabel(words)
            axes.grid()
        panels[0].set_ylabel("own palette, %")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="lower left", bbox_to_anchor=(0.1, 0.88), ncols=3, fontsize=8.5
        )
    return figure


def drawings(found: dict[str, Any]) -> dict[str, str]:
    """{name: SVG} of the figures whose data exist."""
    made = {}
    again = found["again"] if found["again"].rows else None
    if found["a"].rows:
        made["a"] = clouds(found["a"], again)
        made["forgetting"] = forgetting_figure(found["a"].run) if found["s8"] else None
    for part in ("c", "e"):
        if found[part].rows:
            kept = [c for c in CLAIMS if part == "e" or c.name != "[component=vision]"]
            made[part] = clouds(found[part], claims=kept)
    for part, scores in found["masks"].items():
        if len(set(scores["density"]) - {WHOLE}):
            made[part if part in "bd" else f"{part}-scores"] = mask_figure(scores)
    for study, arms in found["secondary"].items():
        if len(arms):
            made[study] = recipe_figure(arms) if study == "s2" else arms_figure(study, arms)
    return {
        name: figures.standalone(figures.to_svg(figure, name))
        for name, figure in made.items()
        if figure
    }


# ---------------------------------------------------------------------------------------------- pages


def pages(data: Path) -> dict[str, str]:
    """{path below docs/study: content} of all pages and figures."""
    found = results(data)
    drawn = drawings(found)
    env = Environment(
        loader=FileSystemLoader(PAGES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made = (verdict_table, geometry_table, score_table, kinds_table, training_table, mask_table)
    made += (curve_table, flagged_table, rows_table, secondary_table, recipe_table)
    made += (spectrum_table, correlation_table, runs_table, shown, points, seed_mean, edges)
    made += (flagged, not_equivalent, parts_of)
    env.globals.update({its.__name__: its for its in made})
    env.globals.update(
        commands=[f"scripts/{path.name}" for path in sorted((ROOT / "scripts").glob("study_?.sh"))],
        drawn=set(drawn),
        studies=STUDIES,
        by_name={v.hypothesis: v for v in found["verdicts"]},
        part=parts_of(found["a"]),
    )
    env.filters.update(
        of_part=of_part,
        p_value=p_value,
        estimate=estimate,
        score=score,
        number=number,
        mean_of=mean_of,
    )
    texts = {}
    for path in sorted(PAGES.glob("[!_]*.md.j2")):
        name = path.stem if path.stem != "abstract.md" else "../abstract.md"
        texts[name] = env.get_template(path.name).render(found)
    return {**texts, **{f"figures/{name}.svg": svg for name, svg in drawn.items()}}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "study")
    parser.add_argument("--data", type=Path, default=DATA)
    given = parser.parse_args(words)
    for name, text in pages(given.data).items():
        path = given.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        print(path)


if __name__ == "__main__":
    main()
