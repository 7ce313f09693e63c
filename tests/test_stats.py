"""Claims about evals/stats.py: agreement with scipy, statsmodels and closed forms, and coverage."""

from __future__ import annotations

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats as scipy_stats
from scipy.optimize import minimize_scalar
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
    """For scores that are not 0/1 the interval is scipy's of the paired t test, and the p of the sign flips is near its
    p."""
    rng = np.random.default_rng(2)
    a, b = rng.normal(0.2, 1, 150), rng.normal(0, 1, 150)
    found, theirs = stats.paired_difference(a, b), scipy_stats.ttest_rel(a, b)
    assert found.test == "sign_flip" and found.p == pytest.approx(theirs.pvalue, abs=0.01)
    assert (found.low, found.high) == pytest.approx(tuple(theirs.confidence_interval()))


@pytest.mark.parametrize("scale", [1, 1 / 3, np.pi, 1e-12, 1e200])
def test_sign_flips_agree_with_scipy(scale):
    """The p of ten clusters is that of scipy's permutation test with all 2^10 signs, whatever the scores' unit."""
    rng = np.random.default_rng(1)
    sums = scale * rng.integers(-3, 5, 10)
    theirs = scipy_stats.permutation_test(
        (sums,), np.sum, permutation_type="samples", n_resamples=np.inf, vectorized=False
    )
    assert stats.sign_flip(sums) == pytest.approx(theirs.pvalue)
    assert stats.sign_flip([1.0] * 6 + [-1.0, 0.0]) == pytest.approx(
        scipy_stats.binomtest(6, 7).pvalue
    )


def test_sampled_sign_flips_are_near_the_exact_ones(monkeypatch):
    """Where the exact distribution is too large it is sampled with a seed, to two standard errors."""
    sums = np.random.default_rng(2).normal(0.4, 1, 14)
    exact = stats.sign_flip(sums)
    monkeypatch.setattr(stats, "SUPPORT", 10)
    assert stats.sign_flip(sums) == pytest.approx(exact, abs=2 * (exact / stats.FLIPS) ** 0.5)
    assert stats.sign_flip(sums) == stats.sign_flip(sums)


def test_the_score_interval_is_where_the_likelihood_ratio_of_tango_is():
    """At both ends of the interval of 0/1 scores the score statistic, with the loss rate that maximizes the
    multinomial likelihood numerically, is the normal quantile."""
    wins, losses, n = 9, 3, 60
    a = np.repeat([1.0, 0.0, 1.0], [wins, losses, n - wins - losses])
    b = np.repeat([0.0, 1.0, 1.0], [wins, losses, n - wins - losses])
    found = stats.paired_difference(a, b)
    for end, sign in ((found.low, 1), (found.high, -1)):

        def cost(rate, end=end):
            return -(
                wins * np.log(rate + end)
                + losses * np.log(rate)
                + (n - wins - losses) * np.log(1 - 2 * rate - end)
            )

        bounds = (max(0, -end) + 1e-9, (1 - end) / 2 - 1e-9)
        rate = minimize_scalar(cost, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
        z = (wins - losses - n * end) / (n * (2 * rate + end - end**2)) ** 0.5
        assert sign * z == pytest.approx(scipy_stats.norm.ppf(0.975), abs=1e-3)


def test_clusters_of_copies_count_once():
    """With every question four times, intervals are those of the questions once, up to the guards for few clusters."""
    rng = np.random.default_rng(5)
    a, b = flips(rng, 3000, 0.7), flips(rng, 3000, 0.6)
    names = np.repeat(np.arange(3000), 4)
    for once, copied in (
        (stats.paired_difference(a, b), stats.paired_difference(a.repeat(4), b.repeat(4), names)),
        (stats.mean_with_error(a), stats.mean_with_error(a.repeat(4), names)),
    ):
        assert (copied.low, copied.high) == pytest.approx((once.low, once.high), abs=2e-4)
        assert copied.standard_error == pytest.approx(once.standard_error, rel=1e-3)


def test_weights_are_repeated_questions():
    """The weighted mean and difference are those of questions repeated so often, each repeated one a cluster."""
    rng = np.random.default_rng(6)
    a, b, times = flips(rng, 400, 0.7), flips(rng, 400, 0.5), rng.integers(1, 4, 400)
    names = np.repeat(np.arange(400), times)
    for clusters in (None, np.arange(400) // 4):
        more = names if clusters is None else clusters[names]
        for its, copied in (
            (
                stats.mean_with_error(a, clusters, weights=times),
                stats.mean_with_error(a[names], more),
            ),
            (
                stats.paired_difference(a, b, clusters, weights=times),
                stats.paired_difference(a[names], b[names], more),
            ),
        ):
            assert its.mean == pytest.approx(copied.mean)
            assert its.standard_error == pytest.approx(copied.standard_error)
            assert (its.low, its.high) == pytest.approx((copied.low, copied.high), abs=2e-3)


def test_identical_arms_are_not_certain():
    """Equal answers have an interval as wide as no event among so many clusters allows, not [0, 0]: on 40 questions of
    20 pictures they are no evidence of non-inferiority, on 1,000 they are."""
    x = np.repeat([0.0, 1.0], 20)
    names = np.arange(40) // 2
    found = stats.paired_difference(x, x, names)
    assert (found.mean, found.p) == (0, 1) and found.low < -0.1 and found.high > 0.1
    assert not stats.non_inferiority(x, x, 0.02, names).holds
    many = np.ones(1000)
    assert stats.non_inferiority(many, many, 0.02, np.arange(1000) // 2).holds
    assert stats.non_inferiority(many, many, 0.02).holds
    for scores in (many[:50], np.full(50, 0.5)):
        assert stats.mean_with_error(scores).low < 0.95 * scores.mean()
        assert stats.mean_with_error(scores, np.arange(50) // 2).low < 0.9 * scores.mean()
    both = stats.seed_difference(np.ones((3, 300)), np.ones((3, 300)))
    assert both.low < -0.005 < 0.005 < both.high
    alike = stats.recovery(many, np.zeros(1000), many)
    assert alike.value == 1 and alike.low < 1 < alike.high


def test_few_discordant_clusters_are_no_evidence():
    """A small p from a handful of losing clusters does not state non-inferiority, and says why."""
    b = np.ones(500)
    names = np.arange(500) // 5
    a = b.copy()
    a[[0, 5]] = 0
    found = stats.non_inferiority(a, b, 0.05, names)
    assert found.p < 0.025 and not found.holds
    assert found.why == "2 discordant clusters of the 10 needed"
    assert stats.non_inferiority(a, b, 0.1, names).holds


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
    """The interval is Fieller's closed form for a ratio of means, and near the percentile bootstrap's."""
    rng = np.random.default_rng(6)
    n = 3000
    base, full = flips(rng, n, 0.4), flips(rng, n, 0.8)
    sub = np.where(rng.random(n) < 0.7, full, base)
    found = stats.recovery(sub, base, full)
    x, y = sub - base, full - base
    assert found.value == pytest.approx(x.mean() / y.mean())
    (vx, c), (_, vy) = np.cov(x, y) / n
    z2 = scipy_stats.t.ppf(0.975, n - 1) ** 2
    roots = np.roots(
        [y.mean() ** 2 - z2 * vy, -2 * (x.mean() * y.mean() - z2 * c), x.mean() ** 2 - z2 * vx]
    )
    assert (found.low, found.high) == pytest.approx(tuple(sorted(roots)))
    drawn = rng.integers(0, n, size=(2000, n))
    ratios = x[drawn].mean(1) / y[drawn].mean(1)
    assert (found.low, found.high) == pytest.approx(np.quantile(ratios, [0.025, 0.975]), abs=0.004)


def test_recovery_covers_without_a_condition_on_the_gain():
    """Over 1,000 experiments with a true recovery of 1 and a gain of 5 points on 300 questions, Fieller's interval
    covers in at least 93 %; it is bounded in a minority, whose median value is far too small."""
    rng = np.random.default_rng(7)
    held, bounded = 0, []
    for _ in range(1000):
        base = flips(rng, 300, 0.5)
        sub, full = (
            np.where(base > 0, rng.random(300) >= 0.25, rng.random(300) < 0.35).astype(float)
            for _ in range(2)
        )
        found = stats.recovery(sub, base, full)
        known = found.low is not None
        held += found.status != "negative" and (not known or found.low <= 1 <= found.high)
        bounded += [found.value] if known else []
    assert held >= 930 and len(bounded) < 600
    assert np.median(bounded) < 0.85


def test_recovery_of_no_gain_is_flagged():
    """Where full - base cannot be told from 0 every ratio is compatible with the data; a loss is not a gain."""
    rng = np.random.default_rng(8)
    base, sub = flips(rng, 200, 0.5), flips(rng, 200, 0.5)
    full = np.where(rng.random(200) < 0.1, 1 - base, base)
    found = stats.recovery(sub, base, full)
    ratio = (sub - base).mean() / (full - base).mean()
    assert found == stats.Recovery(pytest.approx(ratio), None, None, "weak")
    assert stats.recovery(sub, base, base) == stats.Recovery(None, None, None, "undefined")
    assert stats.recovery(sub, base, base * flips(rng, 200, 0.3)).status == "negative"


def test_clustered_recovery_is_wider():
    """Clusters that share noise leave the value and widen its interval."""
    rng = np.random.default_rng(9)
    clusters = np.repeat(np.arange(50), 6)
    shift = np.repeat(rng.normal(size=50), 6)
    base = rng.normal(size=300) / 5
    full, sub = base + 1 + shift / 5, base + 0.5 + shift
    plain = stats.recovery(sub, base, full)
    whole = stats.recovery(sub, base, full, clusters=clusters)
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
    alike = stats.rank_among(0.6, [0.6, 0.6, 0.6])
    assert (alike.rank, alike.tied, alike.p) == (4, 3, 1)


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
    assert found.p == pytest.approx(stats.tango(wins, losses, 800, 0.1))
    assert found.holds and found.p < 0.025
    assert not stats.non_inferiority(a, b, 1e-4).holds
    a, b = rng.random(50), rng.random(50)
    expected = scipy_stats.ttest_1samp(a - b, -0.3, alternative="greater").pvalue
    assert stats.non_inferiority(a, b, 0.3).p == pytest.approx(expected)
    assert not stats.non_inferiority([0.5], [0.5], 0.3).holds


@pytest.mark.parametrize("sizes", ["2", "2-5"])
@pytest.mark.parametrize(
    ("n", "wins", "losses"), [(60, 0, 0.05), (100, 0.03, 0.05), (500, 0.1, 0.15)]
)
def test_clustered_differences_keep_their_promise(n, sizes, wins, losses):
    """Over 600 experiments with clusters of two to five alike questions, one-sided or not, a that is worse by the
    margin is called no worse in at most 2.5 %, and intervals cover in 93 % or more."""
    rng = np.random.default_rng(n)
    low, _, high = sizes.partition("-")
    names = np.repeat(np.arange(n), rng.integers(int(low), int(high or low) + 1, n))[:n]
    erred = covered = 0
    for _ in range(600):
        z = 0.6 * rng.normal(size=n) + 0.8 * rng.normal(size=names[-1] + 1)[names]
        a, b = np.ones(n), np.ones(n)
        b[z > scipy_stats.norm.isf(wins)] = 0
        a[z < scipy_stats.norm.ppf(losses)] = 0
        found = stats.non_inferiority(a, b, losses - wins, names)
        erred += found.holds
        if found.low <= wins - losses:
            covered += wins - losses <= -stats.non_inferiority(b, a, 0.1, names).low
    chance_of_three_errors = 3 * (0.025 * 0.975 / 600) ** 0.5
    assert erred / 600 <= 0.025 + chance_of_three_errors
    assert covered / 600 >= 0.93


def test_the_score_test_without_a_margin_is_mcnemars():
    """At a margin of 0 Tango's statistic is McNemar's (wins - losses) / sqrt(wins + losses)."""
    for wins, losses in ((30, 12), (5, 9), (40, 40)):
        z = (wins - losses) / (wins + losses) ** 0.5
        assert stats.tango(wins, losses, 200, 1e-12) == pytest.approx(
            scipy_stats.norm.sf(z), rel=1e-6
        )


@pytest.mark.parametrize("seeds", [2, 3])
def test_seed_differences_cover_training_noise(seeds):
    """Over 1,500 experiments of few seeds an arm, whose scores have a standard deviation of 3 points over seeds, the
    interval covers in at least 93 %, one over questions alone far less; means and deviations are the seeds' own."""
    rng = np.random.default_rng(2)
    n, covered, covered_by_items = 300, 0, 0
    for _ in range(1500):
        levels = rng.normal(0.5, 0.03, size=(2, seeds, 1))  # an arm's true score by seed
        ease = 0.2 * rng.normal(size=n)
        a, b = levels + ease + 0.1 * rng.normal(size=(2, seeds, n))
        found = stats.seed_difference(a, b)
        covered += found.low <= 0 <= found.high
        half = 1.96 * stats.standard_error(a.mean(0) - b.mean(0), None)[0]
        covered_by_items += abs(found.mean) <= half
    assert covered / 1500 >= 0.93
    assert covered_by_items / 1500 < 0.5
    assert found.sd_a == pytest.approx(a.mean(1).std(ddof=1))
    assert found.mean == pytest.approx(a.mean() - b.mean())


def test_seed_differences_without_questions_noise_are_welchs():
    """Where all questions have one score per seed, the interval is that of scipy's Welch test of the seeds' scores."""
    a, b = [0.5, 0.53, 0.61], [0.4, 0.42]
    found = stats.seed_difference(*(np.repeat(np.array(x)[:, None], 5000, 1) for x in (a, b)))
    theirs = scipy_stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=2e-3)


def test_the_bootstrap_agrees_with_the_closed_form():
    """Of many questions, plain or clustered, the paired bootstrap's interval is that of the score test, and of one seed
    the interval over seeds is that of the questions."""
    rng = np.random.default_rng(3)
    a, b = (x[0].astype(float) for x in correlated(rng, 1, 900, 0.7, 0.5, 0.5))
    clusters = np.repeat(np.arange(180), 5)
    for groups in (None, clusters):
        closed = stats.paired_difference(a, b, groups)
        low, high = stats.paired_bootstrap(a, b, 4000, clusters=groups)
        assert (low, high) == pytest.approx((closed.low, closed.high), abs=0.008)
        both = stats.seed_difference([a], [b], clusters=groups)
        assert (both.low, both.high) == pytest.approx((closed.low, closed.high), abs=0.004)
        assert np.isnan(both.sd_a)


def test_pass_at_k_is_the_mean_over_all_choices():
    """1 - C(n - c, k) / C(n, k) is the share of all k-subsets of the samples with a right one among them."""
    from itertools import combinations

    for n, c, k in ((5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 4), (4, 1, 4)):
        samples = [1] * c + [0] * (n - c)
        chosen = [max(subset) for subset in combinations(samples, k)]
        assert stats.pass_at_k([c], n, k)[0] == pytest.approx(np.mean(chosen))
    with pytest.raises(ValueError, match="needs at least 3 samples"):
        stats.pass_at_k([1], 2, 3)
