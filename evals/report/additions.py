"""The section "What distillation adds": each claim about OPD's updates against training on an uninformative signal.

A claim survives where OPD's seeds differ from the signal null's in the claimed direction. Reads groups.csv,
group_values.csv and compare.json; `decide` alone chooses the word, and `sentence` writes it down.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from evals.report import figures
from evals.report.groups import Groups, read_groups
from evals.report.page import Context, add_figure
from evals.report.verdict import ABBREVIATIONS, p_value, plain
from vlopd.config.arms import DistillArm, mask_of
from vlopd.config.experiment import ExperimentConfig
from vlopd.config.masks import RandomMask
from vlopd.run.folder import RunFolder

Decision = Literal["survives", "reversed", "small", "not", "undecided", "untested"]
WORDS: dict[Decision, str] = {
    "survives": "survives",
    "reversed": "is reversed",
    "small": "does not survive",
    "not": "does not survive",
    "undecided": "is undecided",
    "untested": "is undecided",
}
WHY: dict[Decision, str] = {
    "survives": "distinguishable from {}",
    "reversed": "there is more of it from {}",
    "small": "distinguishable from {}, by less than the margin",
    "not": "it comes from {} as well",
    "undecided": "neither distinguishable from {} nor equivalent",
    "untested": "no test against {}",
}
NOTHING = "training on nothing"
WIDTH = 4.2
"""Of a figure in inches: narrower than the others, to be read in a column."""
CLOUDS = {"real": "#2b83c6", "mixed": "#7a6fb0", "signal": "#d55e00", "drawn": "#8a8f98"}
Side = Literal[-1, 0, 1]
"""The claimed sign of the difference to the null; 0 for either."""


@dataclass(frozen=True)
class Claim:
    """A claim of arXiv 2606.13657 or of a relative, and the measures that it is about, the first that a run has."""

    title: str
    measure: str
    side: Side
    keys: tuple[tuple[str, str, str], ...]
    """(metric, parameter, name) as in geometry/groups.csv."""


CLAIMS = (
    Claim("Low rank", "stable rank, median over matrices", -1, (("stable_rank", "", "[median]"),)),
    Claim(
        "Energy in few singular directions",
        "energy of the top 16 singular values, median",
        1,
        (("top_energy_ratio", "k=16", "[median]"),),
    ),
    Claim(
        "Off the principal directions",
        "energy in the 10 % principal subspaces, median",
        -1,
        (("principal_projection_energy_ratio", "ratio=0.1", "[median]"),),
    ),
    Claim(
        "Onto near-zero weights",
        "moved coordinates on the 10 % smallest weights",
        1,
        (
            ("low_magnitude_update_overlap_ratio", "ratio=0.1,atol=1e-05", "[all]"),
            ("low_magnitude_update_overlap_ratio", "ratio=0.1,atol=0", "[all]"),
        ),
    ),
    Claim(
        "Sparse",
        "unmoved coordinates",
        1,
        (("frac_isclose_zero", "atol=1e-05", "[all]"), ("frac_delta_eq_0", "", "[all]")),
    ),
    Claim(
        "In few coordinates",
        "energy of the 10 % largest entries",
        1,
        (("coord_top_energy_ratio", "ratio=0.1", "[all]"),),
    ),
    Claim(
        "Mostly in the FFN",
        "FFN's share of the energy",
        1,
        (("energy_share", "", "[part=ffn]"), ("energy_share", "", "[module=ffn]")),
    ),
    Claim(
        "In the vision tower",
        "vision tower's share of the energy",
        1,
        (("energy_share", "", "[component=vision]"),),
    ),
    Claim(
        "One direction over seeds", "cosine of the updates of two seeds", 1,
        (("delta_cosine", "", "[all]"),),
    ),
    Claim(
        "The same coordinates over seeds",
        "overlap of the 5 % largest entries of two seeds, over chance",
        1,
        (
            ("top_mask_overlap_over_chance_within_magnitudes", "fraction=0.05", "[all]"),
            ("top_mask_overlap_over_chance", "fraction=0.05", "[all]"),
        ),
    ),
)  # fmt: skip
OPTIONAL = ("In the vision tower",)
"""Claims that are left out where a model has no such part."""


class Comparison(NamedTuple):
    """OPD against one null: means, counts, difference, p (corrected where there is a correction) and equivalence."""

    null: str
    real: float | None
    other: float | None
    n_real: int
    n_null: int
    difference: float | None
    p: float | None
    equivalent: bool
    reason: str = ""
    corrected: bool = False


def decide(
    p: float | None, difference: float | None, equivalent: bool, side: Side, alpha: float
) -> Decision:
    """Whether a claim survives one null; p is of the difference, `equivalent` by two one-sided tests at a margin."""
    if p is None or difference is None:
        return "not" if equivalent else "untested"
    differs = p <= alpha
    if differs and equivalent:
        return "small"
    if differs:
        return "survives" if side == 0 or difference * side > 0 else "reversed"
    return "not" if equivalent else "undecided"


def sentence(
    claim: str,
    of: str,
    unit: str,
    found: Sequence[Comparison],
    side: Side,
    alpha: float,
    other: str = NOTHING,
) -> str:
    """`Low rank does not survive: it comes from training on nothing as well (OPD 3.2, rademacher 3.6, p = 0.4, ...).`

    With several nulls the claim has the weakest of their decisions, and each is named.
    """
    parts: dict[Decision, list[str]] = {}
    for its in found:
        decision = decide(its.p, its.difference, its.equivalent, side, alpha)
        parts.setdefault(decision, []).append(_numbers(its, of, unit))
    order: tuple[Decision, ...] = ("reversed", "not", "small", "undecided", "untested", "survives")
    known = [decision for decision in order if decision in parts]
    text = f"{claim} {WORDS[known[0]]}: "
    return text + "; ".join(f"{WHY[d].format(other)} ({'; '.join(parts[d])})" for d in known) + "."


def _numbers(its: Comparison, of: str, unit: str, form: str = ".3g") -> str:
    if its.real is None or its.other is None:
        return f"{its.null}: {its.reason or 'not measured'}"
    words = f"{of} {plain(its.real, form)}, {its.null} {plain(its.other, form)}"
    if its.p is None:
        words += f", no p: {its.reason or 'not tested'}"
    else:
        p = p_value(its.p)
        words += (
            f", {'corrected ' if its.corrected else ''}p {p if p.startswith('<') else '= ' + p}"
        )
    return f"{words}, {its.n_real} against {its.n_null} {unit}"


# ------------------------------------------------------------------------------------------- section


def additions(
    run: RunFolder, config: ExperimentConfig, compared: Mapping[str, Any], drawn: dict[str, str]
) -> Context | None:
    """The section's claims, each with its sentence and figure; `missing` where the run has no signal null.

    None for a run that trains nothing.
    """
    full = config.roles.first("full")
    if full is None or not isinstance(config.arms[full], DistillArm):
        return None
    groups = read_groups(run)
    if not groups.found:
        return {"missing": _missing(full), "claims": []}
    of = (
        full
        if groups.arms_of(full)
        else str(groups.values[groups.values.kind == "real"].of.iloc[0])
    )
    training = (compared.get("arms", {}).get(of) or {}).get("training") or "training"
    name, alpha = ABBREVIATIONS.get(training, training), 1 - config.eval.confidence
    nulls = groups.nulls_of(of)
    claims = [
        its
        for claim in CLAIMS
        if (its := _claim(claim, groups, of, name, list(nulls), alpha, drawn))
    ]
    claims += _retrained(config, groups, compared, alpha, drawn)
    counts = ", ".join(f"{label} ({len(arms)})" for label, arms in nulls.items())
    about = (
        f"{name}: {', '.join(groups.arms_of(of))}. Signal nulls, trained like it on a signal that carries nothing: "
        f"{counts}. p over training seeds, corrected for false discoveries within each family of measures."
    )
    return {"missing": "", "about": about, "claims": claims}


def _missing(full: str) -> str:
    return (
        "No signal null in this run, so nothing here shows what distillation adds to training on an uninformative "
        f'signal: add arms like {full} with null = "rademacher", one for each of its seeds, and name them in '
        "geometry.arms."
    )


def _claim(
    claim: Claim,
    groups: Groups,
    of: str,
    name: str,
    nulls: Sequence[str],
    alpha: float,
    drawn: dict[str, str],
) -> Context | None:
    key = next((key for key in claim.keys if not groups.of_measure(of, key).empty), None)
    if key is None:
        if claim.title in OPTIONAL:
            return None
        return {"text": f"{claim.title}: not measured in this run.", "figure": None, "caption": ""}
    values = groups.of_measure(of, key)
    found = [_compared(groups, values, of, null, key) for null in nulls]
    text = sentence(claim.title, name, "seeds", found, claim.side, alpha)
    figure = f"adds-{claim.title.lower().replace(' ', '-')}"
    clouds = [(name, "real", values[values.kind == "real"].value.tolist())]
    for kind, words in (("mixed", f"{name} with "), ("signal", ""), ("drawn", "drawn: ")):
        for null, part in values[values.kind == kind].groupby("null", sort=False):
            clouds.append((f"{words}{str(null).replace('_', ' ')}", kind, part.value.tolist()))
    add_figure(drawn, figure, draw_clouds(clouds, claim.measure))
    return {
        "text": text,
        "figure": figure,
        "caption": f"{claim.title}: one point an arm or pair, of drawn nulls its mean over draws; lines: means",
    }


def _compared(
    groups: Groups, values: pd.DataFrame, of: str, null: str, key: tuple[str, str, str]
) -> Comparison:
    """The group against a signal null, as groups.csv has it."""
    row = groups.comparison(of, "signal", null, key)
    if row is None:
        real = values[values.kind == "real"].value
        other = values[(values.kind == "signal") & (values.null == null)].value
        first, second = (None if part.empty else float(part.mean()) for part in (real, other))
        n = len(real), len(other)
        return Comparison(null, first, second, *n, None, None, False, "no row in groups.csv")
    numbers = (row["real_mean"], row["null_mean"], int(row["n_real"]), int(row["n_null"]))
    p = row["p"] if row["q"] is None else row["q"]
    is_equivalent = str(row["equivalent"]) == "True"
    reason, corrected = str(row["reason"]), row["q"] is not None
    return Comparison(null, *numbers, row["difference"], p, is_equivalent, reason, corrected)


def _retrained(
    config: ExperimentConfig,
    groups: Groups,
    compared: Mapping[str, Any],
    alpha: float,
    drawn: dict[str, str],
) -> list[Context]:
    """The claims about retraining, task by task: full is recovered, and it matters which coordinates train."""
    labels, found = groups.labels(), []
    for task, entry in compared.get("tasks", {}).items():
        if entry["group"]:
            continue
        for arm in (a for a, its in entry["arms"].items() if its["role"] == "subnetwork"):
            controls = [its for its in entry["controls"] if its["arm"] == arm]
            if controls or _non_inferior(entry, arm):
                found.append(_retraining(config, labels, task, entry, arm, controls, alpha, drawn))
    return found


def _retraining(
    config: ExperimentConfig,
    labels: Mapping[str, str],
    task: str,
    entry: Mapping[str, Any],
    arm: str,
    controls: Sequence[Mapping[str, Any]],
    alpha: float,
    drawn: dict[str, str],
) -> Context:
    score = entry["arms"][arm]["mean"]
    margin = config.eval.margin
    up = 1 if entry["higher_is_better"] else -1
    comparisons = []
    clouds = [(arm, "real", [score])]
    for its in controls:
        rule = config.masks[_mask_of(config, its["arms"][0])]
        of = (rule.reads or "").partition("@")[0]
        null = f"mask of {labels[of]}" if of in labels else f"{its['kind']} mask"
        own = its["difference"]
        low, high = own["interval"]
        comparisons.append(
            Comparison(
                null,
                score,
                its["pooled"]["mean"],
                1,
                len(its["arms"]),
                up * own["mean"],
                own["p"] if own["p_holm"] is None else own["p_holm"],
                -margin < low and high < margin,
                corrected=own["p_holm"] is not None,
            )
        )
        kind = "signal" if of in labels else "drawn" if isinstance(rule, RandomMask) else "signal"
        clouds.append((null, kind, [entry["arms"][a]["mean"] for a in its["arms"]]))
    text = [_recovers(entry, arm, task)]
    if comparisons:
        missing = "" if any(its.null.startswith("mask of") for its in comparisons) else (
            " No arm is retrained under a signal null's mask (mask = {of = \"NULL ARM\"}), so this is against random "
            "coordinates alone."
        )  # fmt: skip
        title = f"That {arm}'s coordinates do better than others on {task}"
        unit = "arms, p over questions"
        text.append(
            sentence(title, arm, unit, comparisons, 1, alpha, "other coordinates") + missing
        )
    figure = f"adds-{arm}-{task}".replace("_", "-").replace("@", "-")
    ends = {role: entry["arms"][a]["mean"] for a, its in entry["arms"].items()
            if (role := its["role"]) in ("base", "full")}  # fmt: skip
    add_figure(drawn, figure, draw_clouds(clouds, f"{task}: {entry['metric']}", ends))
    return {
        "text": " ".join(text),
        "figure": figure,
        "caption": f"Retrained under masks, {task}: every arm, and the means as lines",
    }


def _mask_of(config: ExperimentConfig, arm: str) -> str:
    mask = mask_of(config.arms[arm])
    assert mask is not None
    return mask


def _non_inferior(entry: Mapping[str, Any], arm: str) -> Mapping[str, Any] | None:
    rows = (its for its in entry["contrasts"] if its["a"] == arm and its.get("non_inferiority"))
    return next(rows, None)


def _recovers(entry: Mapping[str, Any], arm: str, task: str) -> str:
    """Whether retraining under the mask recovers full training."""
    its, recovery = _non_inferior(entry, arm), entry["arms"][arm]["recovery"]
    share = (
        f"recovery {recovery['value']:.2f}"
        if recovery["status"] == "ok"
        else "no established gain to recover"
    )
    title = f"That {arm} recovers full training on {task}"
    if its is None:
        return f"{title} is undecided: there is no contrast with full ({share})."
    if recovery["status"] != "ok":
        return f"{title} is undecided: {share}."
    result = its["non_inferiority"]
    points = (
        f"{100 * its['mean']:+.1f} pp" if entry["scale"] == "fraction" else f"{its['mean']:+.3g}"
    )
    if result["holds"]:
        return f"{title} survives: not worse by more than the margin ({points}, {share})."
    worse = its["direction"] == ("below" if entry["higher_is_better"] else "above")
    word = "does not survive: it is worse" if worse else "is undecided at this number of questions"
    return f"{title} {word} ({points}, {share})."


# -------------------------------------------------------------------------------------------- figure


def draw_clouds(
    clouds: Sequence[tuple[str, str, Sequence[float]]],
    label: str,
    lines: Mapping[str, float] | None = None,
) -> Figure:
    """Points of each cloud (words, kind, values) on a line of its own, with its mean; the kinds differ in colour."""
    shown = [its for its in clouds if its[2]]
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(WIDTH, 0.62 + 0.3 * len(shown)), layout="constrained")
        axes = figure.subplots()
        for y, (_, kind, values) in enumerate(shown):
            colour = CLOUDS[kind]
            spread = np.linspace(-0.14, 0.14, len(values)) if len(values) > 1 else [0.0]
            axes.plot(values, y + np.array(spread), "o", ms=5.5, alpha=0.75, mew=0, color=colour)
            axes.plot([np.mean(values)] * 2, [y - 0.32, y + 0.32], color=colour, lw=1.6)
        for text, value in (lines or {}).items():
            axes.axvline(value, color=figures.INK, lw=0.8, ls=(0, (3, 3)), alpha=0.6, zorder=0)
            axes.text(value, -0.62, text, ha="center", va="bottom", fontsize=9, alpha=0.8)
        axes.set_yticks(range(len(shown)), [figures.short(words, 26) for words, _, _ in shown])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.margins(x=0.08)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_xlabel(label)
        axes.grid(axis="x")
    return figure
