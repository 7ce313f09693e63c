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
    """Over 2,000 experiments, 95 % intervals of a paired difference hold the truth in 93 to 97 % (or more, where few
    pairs are discordant)."""
    rng = np.random.default_rng(4)
    wins = 0.7 * discordant
    truth = wins - 0.3 * discordant
    counts = rng.multinomial(n, [wins, discordant - wins, 1 - discordant], size=2000)
    held = 0
    for (up, down, same), times in zip(*np.unique(counts, axis=0, return_counts=True), strict=True):
        a = np.repeat([1.0, 0.0, 0.0], [up, down, same])
        b = np.repeat([0.0, 1.0, 0.0], [up, down, same])
        found = stats.paired_difference(a, b)
        held += times * (found.low <= truth <= found.high)
    assert 0.93 <= held / 2000 <= (0.97 if n * discordant > 50 else 1.0)


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
        with pytest.raises(ValueError, match="one finite number per question"):
            stats.mean_with_error(bad)
    with pytest.raises(ValueError, match="got 2 and 3"):
        stats.paired_difference([0, 1], [0, 1, 1])
    with pytest.raises(ValueError, match="cluster names"):
        stats.mean_with_error([0, 1, 1], ["a", "b"])


def correlated(rng, experiments: int, n: int, rate_a: float, rate_b: float, rho: float):
    """0/1 scores [experiments, n] of two arms whose difficulty is partly shared."""
    shared = rng.normal(size=(experiments, n))

    def right(rate):
        own = rng.normal(size=(experiments, n))
        return rho**0.5 * shared + (1 - rho) ** 0.5 * own < scipy_stats.norm.ppf(rate)

    return right(rate_a), right(rate_b)


@pytest.mark.parametrize("n", [60, 500])
@pytest.mark.parametrize("rates", [(0.6, 0.7, 0.5), (0.85, 0.95, 0.3)])
def test_non_inferiority_errs_at_most_at_its_level(n, rates):
    """Over 2,000 experiments in which a is worse by just the margin, it is called no worse in at most 2.5 %."""
    rng = np.random.default_rng(n)
    a, b = correlated(rng, 2000, n, *rates)
    margin = rates[1] - rates[0]
    wins, losses = (a & ~b).sum(1), (~a & b).sum(1)
    counts, repeats = np.unique(np.stack([wins, losses], 1), axis=0, return_counts=True)
    found = [stats.tango(int(w), int(lo), n, margin) <= 0.025 for w, lo in counts]
    chance_of_three_errors = 3 * (0.025 * 0.975 / 2000) ** 0.5
    assert np.dot(found, repeats) / 2000 <= 0.025 + chance_of_three_errors


def test_non_inferiority_says_what_its_test_says():
    """0/1 scores go to the score test, others to the t of differences above -margin; one unit says nothing."""
    rng = np.random.default_rng(1)
    a, b = (x[0].astype(float) for x in correlated(rng, 1, 800, 0.7, 0.7, 0.8))
    found = stats.non_inferiority(a, b, 0.1)
    wins, losses = int((a > b).sum()), int((a < b).sum())
    assert found.p == stats.tango(wins, losses, 800, 0.1) and found.holds and found.p < 0.025
    assert not stats.non_inferiority(a, b, 1e-4).holds
    a, b = rng.random(50), rng.random(50)
    expected = scipy_stats.ttest_1samp(a - b, -0.3, alternative="greater").pvalue
    assert stats.non_inferiority(a, b, 0.3).p == pytest.approx(expected)
    assert not stats.non_inferiority([0.5], [0.5], 0.3).holds


def test_the_score_test_without_a_margin_is_mcnemars():
    """At a margin of 0 Tango's statistic is McNemar's (wins - losses) / sqrt(wins + losses)."""
    for wins, losses in ((30, 12), (5, 9), (40, 40)):
        z = (wins - losses) / (wins + losses) ** 0.5
        assert stats.tango(wins, losses, 200, 1e-12) == pytest.approx(
            scipy_stats.norm.sf(z), rel=1e-6
        )


def test_seed_differences_cover_training_noise():
    """Over 2,000 experiments of six seeds an arm the two-level interval covers in 91 to 97 %, one over questions
    alone far less; means and deviations are the seeds' own."""
    rng = np.random.default_rng(2)
    seeds, n, covered, covered_by_items = 6, 20, 0, 0
    for _ in range(2000):
        levels = rng.normal(0.5, 0.1, size=(2, seeds, 1))  # an arm's true score by seed
        ease = 0.2 * rng.normal(size=n)
        a, b = levels + ease + 0.1 * rng.normal(size=(2, seeds, n))
        found = stats.seed_difference(a, b, draws=100)
        covered += found.low <= 0 <= found.high
        items = stats.paired_difference(a.mean(0), b.mean(0))
        covered_by_items += items.low <= 0 <= items.high
    assert 0.91 <= covered / 2000 <= 0.97
    assert covered_by_items / 2000 < 0.5
    assert found.sd_a == pytest.approx(a.mean(1).std(ddof=1))
    assert found.mean == pytest.approx(a.mean() - b.mean())


def test_the_bootstrap_agrees_with_the_closed_form():
    """Of many questions, plain or clustered, the paired bootstrap's interval is that of the t, and of one seed the
    two-level interval is the paired bootstrap's."""
    rng = np.random.default_rng(3)
    a, b = (x[0].astype(float) for x in correlated(rng, 1, 900, 0.7, 0.5, 0.5))
    clusters = np.repeat(np.arange(180), 5)
    for groups in (None, clusters):
        closed = stats.paired_difference(a, b, groups)
        low, high = stats.paired_bootstrap(a, b, 4000, clusters=groups)
        assert (low, high) == pytest.approx((closed.low, closed.high), abs=0.006)
        both = stats.seed_difference([a], [b], 4000, clusters=groups)
        assert (both.low, both.high) == (low, high) and np.isnan(both.sd_a)


def test_pass_at_k_is_the_mean_over_all_choices():
    """1 - C(n - c, k) / C(n, k) is the share of all k-subsets of the samples with a right one among them."""
    from itertools import combinations

    for n, c, k in ((5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 4), (4, 1, 4)):
        samples = [1] * c + [0] * (n - c)
        chosen = [max(subset) for subset in combinations(samples, k)]
        assert stats.pass_at_k([c], n, k)[0] == pytest.approx(np.mean(chosen))
    with pytest.raises(ValueError, match="needs at least 3 samples"):
        stats.pass_at_k([1], 2, 3)
