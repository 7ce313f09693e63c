"""Claims about the sentences of random comparisons: words agree with the corrected p, the units and what is better."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from evals import compare as comparing
from evals.corpus_metrics import CorpusMetric
from evals.paired_scores import PairedScores
from evals.report.headline import headline
from evals.report.verdict import verdict
from tests.test_report import make_config
from vlopd.files import without_nan
from vlopd.run.folder import RunFolder

CONFIG = make_config()
REPLICATED = make_config(
    masks={name: its.model_dump(mode="json") for name, its in CONFIG.masks.items() if name in ("visible", "random-0")},
    arms={
        **{name: {"type": name} for name in ("base", "teacher")},
        **{f"full-{i}" if i else "full": {"type": "distill", "seed": i} for i in range(2)},
        **{f"subnetwork-{i}": {"type": "distill", "seed": i, "mask": "visible"} for i in range(2)},
        "random-0": {"type": "distill", "seed": 0, "mask": "random-0"},
        "jsd": {"type": "distill", "seed": 0, "loss": {"type": "jsd"}},
    },
)  # fmt: skip


def paired(rng: np.random.Generator, task: str, arms: list[str], higher: bool) -> PairedScores:
    """Random scores: 0/1 or not, clustered or not, weighted or not, or a corpus metric; some arms answer alike."""
    n = int(rng.choice([1, 2, 12, 60, 300]))
    kind = str(rng.choice(["binary", "binary", "mean", "f1", "perplexity"]))
    ease = rng.normal(0, 1, n)
    quality = rng.choice([0.0, 0.0, 0.3, 1.5], len(arms))
    chances = {arm: 1 / (1 + np.exp(-ease - q)) for arm, q in zip(arms, quality, strict=True)}
    drawn = rng.random(n)  # shared, so that arms of one quality are equal
    if rng.random() < 0.5:
        scores = {arm: (drawn < its).astype(float) for arm, its in chances.items()}
    else:
        scores = {arm: (rng.random(n) < its).astype(float) for arm, its in chances.items()}
    if kind in ("mean", "perplexity"):
        scores = {arm: (its + drawn) / 2 for arm, its in scores.items()}
    names = np.sort(rng.integers(0, max(1, n // 2), n)).astype(str).tolist()
    corpus = None
    if kind == "f1":
        gold = rng.integers(0, 2, n)
        corpus = CorpusMetric(
            "f1", {arm: np.stack([gold, its], 1).tolist() for arm, its in scores.items()}
        )
    if kind == "perplexity":
        corpus = CorpusMetric(
            "perplexity", {arm: (-3 * its).tolist() for arm, its in scores.items()}
        )
        higher = False
    return PairedScores(
        task,
        "exact_match",
        {} if corpus else scores,
        [None] * n,
        names if rng.random() < 0.5 else None,
        {},
        higher_is_better=higher,
        weights=rng.uniform(0.5, 1.5, n) if corpus is None and rng.random() < 0.3 else None,
        lengths={arm: {} for arm in arms},
        corpus=corpus,
    )  # fmt: skip


def compared(rng: np.random.Generator, monkeypatch) -> dict:
    """A random compare.json."""
    config = [CONFIG, REPLICATED][rng.integers(2)]
    arms = list(config.arms)
    declared = [None, ("full - base", "jsd - base"), ("subnetwork-0 - random-0",)]
    if config is CONFIG:
        declared = [None, ("subnetwork - random", "subnetwork - full"), ("full - teacher",)]
    settings = {"contrasts": declared[rng.integers(3)], "bootstrap_draws": 50}
    of = config.eval.model_copy(update=settings)
    tasks = [
        paired(rng, f"task-{i}", arms, bool(rng.random() < 0.7)) for i in range(rng.integers(1, 4))
    ]
    chance = {"chance": {its.task: {"all": 0.5} for its in tasks}}
    monkeypatch.setattr(comparing, "read_tasks", lambda *_: (tasks, {}))
    results = dict.fromkeys(arms, chance)
    about = {arm: {"training": "on-policy distillation", "seed": 0} for arm in arms}
    record = comparing._comparison(RunFolder(Path("none")), config.roles, of, results, about)
    return without_nan(record)


@pytest.mark.parametrize("n", [14, pytest.param(80, marks=pytest.mark.slow)])
def test_sentences_say_what_the_record_decides(n, monkeypatch):
    """Over random comparisons with one question or many, ties, clusters, weights, seeds and corpus metrics: an arm is
    "distinguishably" better or worse only by a corrected p, on the side that is better there; nothing is non-inferior
    that the test refuses; recoveries are called so only where the gain is established; own units have no percent."""
    for limit in ("FLIPS", "SUPPORT"):  # exactness is not tested here
        monkeypatch.setattr(comparing.stats, limit, 1000)
    rng = np.random.default_rng(11)
    words = {"distinguishably": 0, "non-inferior": 0, "weak": 0, "own": 0, "lower": 0}
    for _ in range(n):
        record = compared(rng, monkeypatch)
        of_all = ("Intervals are", "Differences are called")
        lines = [its for its in (*verdict(record), *headline(record)) if not its.startswith(of_all)]
        for task, entry in record["tasks"].items():
            said = [line for line in lines if len(record["tasks"]) == 1 or f"{task}:" in line]
            check_words(record, entry, said, words)
    assert min(words.values()) > 0, words


def check_words(record: dict, entry: dict, lines: list[str], words: dict[str, int]) -> None:
    """Asserts the claims for the sentences on one task, and counts what was met."""
    alpha, better = 1 - record["confidence"], "above" if entry["higher_is_better"] else "below"
    decided = {}
    for its in entry["contrasts"]:
        p = its["p"] if its["p_holm"] is None else its["p_holm"]
        assert (its["direction"] is not None) == (p <= alpha), its
        if its["direction"]:
            assert its["direction"] == ("above" if its["mean"] > 0 else "below")
        low, high = its["interval"]
        assert low is None or low - 1e-9 <= its["mean"] <= high + 1e-9
        side = "better" if its["direction"] == better else "worse"
        side = side if its["direction"] else None
        decided.setdefault(round(100 * its["mean"], 1), set()).add((its["p_holm"] is None, side))
    own = entry["scale"] == "own"
    for line in lines:
        for found in re.finditer(r"distinguishably (better|worse)", line):
            before = line[: found.start()].rpartition(", p ")[0]
            mean = re.findall(r"([+-][\d.]+) pp", before)
            words["distinguishably"] += 1
            if mean and not own:
                assert (False, found[1]) in decided[float(mean[-1])], (line, decided)
            else:
                assert any((False, found[1]) in its for its in decided.values()), line
            words["lower"] += better == "below"
        if "non-inferior, p" in line:
            words["non-inferior"] += 1
            arm = line.split(": ", 1)[1] if line.startswith("task-") else line
            arm = arm.split(" minus ")[0]
            tests = [
                its["non_inferiority"]
                for its in entry["contrasts"]
                if its["a"] == arm.lower() and "non_inferiority" in its
            ]
            assert tests and tests[0]["holds"] and tests[0]["why"] is None, line
            assert tests[0]["low"] > -tests[0]["margin"]
        if own:
            words["own"] += 1
            assert not re.search(r"\d %(?! power| over)", line), line
        if "recovers" in line or "recovery" in line:
            full = next(its for its in entry["arms"].values() if its["role"] == "full")["recovery"]
            gain = next(its for its in entry["contrasts"] if its["name"] == "full - base")
            assert ("recovers" in line) <= (full["status"] == "ok")
            assert full["status"] != "ok" or gain["direction"] == better
            words["weak"] += "weak" in line


def test_a_lower_score_can_be_the_better_one(monkeypatch):
    """With error rates instead of scores every sentence of gain, recovery, rank and non-inferiority is the same, with
    the signs turned."""
    rng = np.random.default_rng(0)
    arms = list(CONFIG.arms)
    rates = zip(arms, np.linspace(0.4, 0.9, len(arms)), strict=True)
    right = {arm: (rng.random(200) < rate).astype(float) for arm, rate in rates}
    found = []
    for scores, higher in ((right, True), ({arm: 1 - x for arm, x in right.items()}, False)):
        task = PairedScores(
            "task", "m", scores, [None] * 200, None, {}, higher, lengths={arm: {} for arm in arms}
        )
        found.append(comparing._compare_task(task, CONFIG.roles, CONFIG.eval))
    for arm, its in found[0]["arms"].items():
        other = found[1]["arms"][arm]
        assert other["recovery"]["status"] == its["recovery"]["status"]
        assert other["recovery"]["interval"] == pytest.approx(its["recovery"]["interval"])
        assert other["mean"] == pytest.approx(1 - its["mean"])
    (group,), (turned,) = (its["controls"] for its in found)
    assert [group[key] for key in ("rank", "tied", "p")] == [
        turned[key] for key in ("rank", "tied", "p")
    ]
    tests = [
        next(its["non_inferiority"] for its in entry["contrasts"] if "non_inferiority" in its)
        for entry in found
    ]
    assert tests[0]["p"] == pytest.approx(tests[1]["p"]) and tests[0]["holds"] == tests[1]["holds"]


def test_an_only_control_is_compared_once():
    """The mean of one control is that control: declaring both is refused, and either is one test of the family."""
    roles = REPLICATED.roles
    mean, arm = ["subnetwork-0 - random"], ["subnetwork-0 - random-0"]
    assert roles.contrasts(mean) == roles.contrasts(arm)
    for other in (arm, ["random-0 - subnetwork-0"]):
        with pytest.raises(ValueError, match="are one comparison"):
            roles.contrasts(mean + other)
    assert isinstance(CONFIG.roles.contrasts(["subnetwork - random-0"])[0].b, str)
