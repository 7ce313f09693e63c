"""Claims about evals/stats.py: agreement with scipy, statsmodels and closed forms, and coverage."""

from __future__ import annotations

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats as scipy_stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.power import TTestPower
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import DescrStatsW

from evals import stats


def flips(rng, n, p):
    return (rng.random(n) < p).astype(float)


def test_mean_agrees_with_scipy_and_statsmodels():
    """Without clusters the error is scipy's sem and the interval statsmodels' t interval."""
    x = np.random.default_rng(0).normal(2, 3, 250)
    found = stats.mean_with_error(x, confidence=0.9)
    assert found.standard_error == pytest.approx(scipy_stats.sem(x))
    assert (found.low, found.high) == pytest.approx(DescrStatsW(x).tconfint_mean(alpha=0.1))
    assert (found.n, found.mean) == (250, pytest.approx(x.mean()))


def test_clustered_error_agrees_with_statsmodels():
    """Clustered errors are those of OLS on a constant; clusters of one change nothing."""
    rng = np.random.default_rng(1)
    clusters = np.repeat([f"c{i}" for i in range(40)], 5)
    x = rng.normal(size=200) + np.repeat(rng.normal(size=40), 5)
    codes = np.repeat(np.arange(40), 5)
    fit = sm.OLS(x, np.ones(200)).fit(
        cov_type="cluster", cov_kwds={"groups": codes, "use_correction": True}, use_t=True
    )
    found = stats.mean_with_error(x, clusters)
    assert found.standard_error == pytest.approx(fit.bse[0])
    assert (found.low, found.high) == pytest.approx(tuple(fit.conf_int()[0]))
    alone = stats.mean_with_error(x, np.arange(200))
    assert alone.standard_error == pytest.approx(scipy_stats.sem(x))
    assert found.standard_error > 1.5 * alone.standard_error


@pytest.mark.parametrize(("right", "n"), [(0, 30), (29, 30), (40, 80), (998, 1000)])
def test_few_questions_or_few_errors_get_wilson(right, n):
    """The interval of 0/1 scores stays in [0, 1] and does not vanish at 0 or 100 %."""
    found = stats.mean_with_error(np.arange(n) < right)
    wilson = proportion_confint(right, n, method="wilson")
    assert (found.low, found.high) == pytest.approx(wilson)
    assert 0 <= found.low < found.high <= 1


@pytest.mark.parametrize("n", [60, 400])
def test_mcnemar_agrees_with_statsmodels(n):
    """The p-value of paired 0/1 scores is the exact McNemar p of their table."""
    rng = np.random.default_rng(n)
    b = flips(rng, n, 0.5)
    a = np.where(rng.random(n) < 0.2, 1.0, b)
    table = [[np.sum((a == i) & (b == j)) for j in (1, 0)] for i in (1, 0)]
    found = stats.paired_difference(a, b)
    assert found.test == "mcnemar"
    assert found.p == pytest.approx(mcnemar(table, exact=True).pvalue)
    assert stats.paired_difference(b, b).p == 1


def test_paired_difference_agrees_with_the_paired_t_test():
    """For scores that are not 0/1 the p-value and interval are scipy's ttest_rel."""
    rng = np.random.default_rng(2)
    a, b = rng.normal(0.2, 1, 150), rng.normal(0, 1, 150)
    found, theirs = stats.paired_difference(a, b), scipy_stats.ttest_rel(a, b)
    assert found.test == "paired_t" and found.p == pytest.approx(theirs.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(theirs.confidence_interval()))


def test_pairing_narrows_the_interval():
    """Arms that fail on the same questions are compared more sharply than independent ones."""
    rng = np.random.default_rng(3)
    b = flips(rng, 1000, 0.6)
    a = np.where(rng.random(1000) < 0.1, 1 - b, b)
    apart = np.hypot(scipy_stats.sem(a), scipy_stats.sem(b))
    assert stats.paired_difference(a, b).standard_error < 0.6 * apart


@pytest.mark.parametrize(("n", "discordant"), [(50, 0.2), (400, 0.02), (400, 0.3)])
def test_intervals_cover(n, discordant):
    """95 % intervals of a paired difference hold the truth in 93 % of samples or more."""
    rng = np.random.default_rng(4)
    wins = 0.7 * discordant
    truth = wins - 0.3 * discordant
    held = 0
    for _ in range(400):
        u = rng.random(n)
        a, b = (u < wins).astype(float), ((u >= wins) & (u < discordant)).astype(float)
        found = stats.paired_difference(a, b)
        held += found.low <= truth <= found.high
    assert held / 400 >= 0.93


def test_clustered_intervals_cover_where_plain_ones_do_not():
    """With questions that share a passage, only the clustered interval keeps its promise."""
    rng = np.random.default_rng(5)
    clusters = np.repeat(np.arange(40), 8)
    held = np.zeros(2)
    for _ in range(250):
        x = rng.normal(size=320) + np.repeat(rng.normal(size=40), 8)
        for i, names in enumerate((clusters, None)):
            found = stats.mean_with_error(x, names)
            held[i] += found.low <= 0 <= found.high
    assert held[0] / 250 >= 0.91 and held[1] / 250 < 0.75


def test_recovery_agrees_with_fieller():
    """The bootstrap interval is Fieller's closed form for a ratio of means, to a few per cent."""
    rng = np.random.default_rng(6)
    n = 3000
    base, full = flips(rng, n, 0.4), flips(rng, n, 0.8)
    sub = np.where(rng.random(n) < 0.7, full, base)
    found = stats.recovery(sub, base, full, draws=8000)
    x, y = sub - base, full - base
    assert found.value == pytest.approx(x.mean() / y.mean())
    (vx, c), (_, vy) = np.cov(x, y) / n
    z2 = scipy_stats.norm.ppf(0.975) ** 2
    roots = np.roots(
        [y.mean() ** 2 - z2 * vy, -2 * (x.mean() * y.mean() - z2 * c), x.mean() ** 2 - z2 * vx]
    )
    assert (found.low, found.high) == pytest.approx(tuple(sorted(roots)), abs=0.004)


def test_recovery_is_seeded_and_anchored():
    """The same seed gives the same interval; base recovers 0 and full 1, exactly."""
    rng = np.random.default_rng(7)
    base, full, sub = flips(rng, 300, 0.3), flips(rng, 300, 0.7), rng.random(300)
    one, two = (stats.recovery(sub, base, full, draws=500, seed=1) for _ in range(2))
    assert one == two != stats.recovery(sub, base, full, draws=500, seed=2)
    assert stats.recovery(base, base, full, draws=50) == stats.Recovery(0, 0, 0, "ok")
    assert stats.recovery(full, base, full, draws=50) == stats.Recovery(1, 1, 1, "ok")


def test_recovery_of_no_gain_is_undefined():
    """Where full - base cannot be told from 0 there is no ratio to report; a loss is not a gain."""
    rng = np.random.default_rng(8)
    base, sub = flips(rng, 200, 0.5), flips(rng, 200, 0.5)
    full = np.where(rng.random(200) < 0.1, 1 - base, base)
    assert stats.recovery(sub, base, full) == stats.Recovery(None, None, None, "undefined")
    assert stats.recovery(sub, base, base).status == "undefined"
    assert stats.recovery(sub, base, base * flips(rng, 200, 0.3)).status == "negative"


def test_clustered_recovery_is_wider():
    """Drawing whole clusters leaves the value and widens its interval."""
    rng = np.random.default_rng(9)
    clusters = np.repeat(np.arange(50), 6)
    shift = np.repeat(rng.normal(size=50), 6)
    base = rng.normal(size=300) / 5
    full, sub = base + 1 + shift / 5, base + 0.5 + shift
    plain = stats.recovery(sub, base, full, draws=2000)
    whole = stats.recovery(sub, base, full, draws=2000, clusters=clusters)
    assert whole.value == plain.value
    assert whole.high - whole.low > 1.5 * (plain.high - plain.low)


def test_holm_is_the_step_down_rule():
    """Holm's adjustment by hand: p times the hypotheses left, never falling, at most 1."""
    assert stats.holm([0.01, 0.04, 0.03, 0.9]) == pytest.approx([0.04, 0.09, 0.09, 0.9])
    assert stats.holm([]) == []


def test_minimum_detectable_effect_has_the_power_it_claims():
    """An effect of just this size is found with the given power, by statsmodels' own account."""
    effect = stats.minimum_detectable_effect(0.5, 1000)
    power = TTestPower().power(effect / 0.5, 1000, 0.05)
    assert effect == pytest.approx(0.0443, abs=1e-4) and power == pytest.approx(0.8, abs=0.002)


def test_rank_among_controls_has_a_floor():
    """The best of k + 1 has p = 1/(k + 1) and no less; ties do not count as wins."""
    best = stats.rank_among(0.9, [0.5, 0.6, 0.7])
    assert (best.rank, best.of, best.p, best.smallest_possible_p) == (1, 4, 0.25, 0.25)
    assert stats.rank_among(0.6, [0.5, 0.6, 0.7]).rank == 3


def test_wrong_input_is_refused():
    """Missing or infinite scores, or those of other questions, are an error and not a number."""
    for bad in ([], [1.0, np.nan], [[1.0]]):
        with pytest.raises(ValueError, match="one finite number a question"):
            stats.mean_with_error(bad)
    with pytest.raises(ValueError, match="got 2 and 3"):
        stats.paired_difference([0, 1], [0, 1, 1])
    with pytest.raises(ValueError, match="cluster names"):
        stats.mean_with_error([0, 1, 1], ["a", "b"])
