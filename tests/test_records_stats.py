"""The statistics against scipy, against their definitions, and against simulated experiments."""
import itertools
import math
import statistics

import numpy as np
import pytest
from scipy import integrate, stats as scipy_stats

from records import stats

SIGMA = 0.0013          # the final loss of 124M speedruns
EXPERIMENTS = 2000


def arms(seed, count_a, count_b, effect=0.0, spread_b=SIGMA):
    rng = np.random.default_rng(seed)
    return list(rng.normal(3.28, SIGMA, count_a)), list(rng.normal(3.28 + effect, spread_b, count_b))


def at_most(rate, nominal, experiments=EXPERIMENTS):
    """Whether a simulated rate is at most the nominal one, three standard errors allowed."""
    return rate <= nominal + 3 * math.sqrt(nominal * (1 - nominal) / experiments)


@pytest.mark.parametrize("count_a, count_b", [(2, 2), (3, 2), (5, 9), (30, 30)])
def test_welch(count_a, count_b):
    a, b = arms(1, count_a, count_b, 0.001, 3 * SIGMA)
    found = stats.welch(a, b, level=0.9)
    test = scipy_stats.ttest_ind(b, a, equal_var=False)
    interval = test.confidence_interval(0.9)
    expected = (statistics.fmean(b) - statistics.fmean(a), interval.low, interval.high, test.pvalue, test.df)
    assert (found.difference, found.low, found.high, found.p, found.df) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert stats.welch(b, a, level=0.9).high == pytest.approx(-found.low)
    assert stats.welch(a, b).high > found.high      # 95 % unless told


@pytest.mark.parametrize("a, b", [
    arms(1, 2, 2, 0.004), arms(2, 4, 4, 0.004), arms(3, 3, 6, -0.002), arms(4, 2, 5), arms(5, 8, 8, 0.001),
    ([1.0, 2.0, 3.0], [2.0, 3.0, 4.0, 4.0]), ([0.1 + 0.2, 0.3], [0.3, 0.1 + 0.2]), ([1.0] * 3, [1.0] * 3)])
def test_the_exact_permutation_test(a, b):
    expected = scipy_stats.permutation_test((b, a), lambda x, y, axis: np.mean(x, axis=axis) - np.mean(y, axis=axis),
                                            n_resamples=np.inf, vectorized=True)
    assert stats.permutation_p(a, b) == pytest.approx(expected.pvalue, abs=1e-9)


def test_arrangements_that_tie_but_for_rounding():
    a, b = [3.2800, 3.2813, 3.2787, 3.2806, 3.2794], [3.2811, 3.2792, 3.2801, 3.2783, 3.2815]
    exact = stats.permutation_p([round(10_000 * value) for value in a], [round(10_000 * value) for value in b])
    assert stats.permutation_p(a, b) == exact == 246 / 252


def test_the_drawn_permutation_test(monkeypatch):
    a, b = arms(6, 9, 8, 0.0012)
    exact = stats.permutation_p(a, b)
    monkeypatch.setattr(stats, "EXACT", 100)
    drawn = stats.permutation_p(a, b)
    assert drawn != exact and abs(drawn - exact) < 4 * math.sqrt(2 * exact / stats.RESAMPLES)
    assert drawn == stats.permutation_p(a, b) != stats.permutation_p(a, b, seed=1)
    # The arrangement that was observed counts: p is never 0.
    assert stats.permutation_p(list(range(20)), list(range(100, 120))) == 2 / (stats.RESAMPLES + 1)
    with pytest.raises(ValueError, match="no runs"):
        stats.permutation_p([], [1.0])


@pytest.mark.parametrize("direction, alternative", [("down", "less"), ("up", "greater")])
def test_the_claim_against_a_target(direction, alternative):
    values = arms(7, 5, 0)[0]
    expected = scipy_stats.ttest_1samp(values, 3.281, alternative=alternative).pvalue
    assert stats.target_p(values, 3.281, direction) == pytest.approx(expected, abs=1e-9)
    assert (stats.target_p(values, 3.29, direction) < 0.01) == (direction == "down")
    with pytest.raises(ValueError, match="n = 1: a t-test needs at least two runs"):
        stats.target_p([3.2], 3.28)
    with pytest.raises(ValueError, match="identical to the last digit"):
        stats.target_p([3.2, 3.2, 3.2], 3.28)


def test_spread_and_mean():
    sd, low, high = stats.spread([1.0, 2.0, 4.0], [7.0], [10.0, 13.0])
    squares = 2 * statistics.variance([1.0, 2.0, 4.0]) + statistics.variance([10.0, 13.0])
    assert sd == pytest.approx(math.sqrt(squares / 3))
    assert scipy_stats.chi2.sf(squares / low**2, 3) == pytest.approx(0.025)
    assert scipy_stats.chi2.cdf(squares / high**2, 3) == pytest.approx(0.025)
    for wrong, message in ((([1.0], [2.0]), "no arm has two runs$"), (([1.0, 1.0], [2.0]), "two runs that differ")):
        with pytest.raises(ValueError, match=message):
            stats.spread(*wrong)
    values = arms(8, 6, 0)[0]
    assert stats.mean_interval(values, 0.9) == pytest.approx(
        scipy_stats.ttest_1samp(values, 0).confidence_interval(0.9), rel=1e-12)


def test_holm():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.02, None, 0.5]) == [0.04, None, 0.5]
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0] and stats.holm([]) == [] and stats.holm([None]) == [None]
    rng = np.random.default_rng(0)
    wrong = [min(stats.holm(list(rng.uniform(size=5)))) <= 0.05 for _ in range(EXPERIMENTS)]
    assert at_most(np.mean(wrong), 0.05) and np.mean(wrong) > 0.03


# -- false positives -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("count", [2, 3, 8])
def test_equal_arms_are_called_different_at_most_as_often_as_promised(count):
    rng = np.random.default_rng(count)
    runs = rng.normal(3.28, SIGMA, (EXPERIMENTS, 2, count)).tolist()
    for test in (lambda a, b: stats.welch(a, b).p, stats.permutation_p):
        if test is stats.permutation_p and count == 8:
            continue        # exact by construction, and 12,870 arrangements each
        p = np.array([test(a, b) for a, b in runs])
        for alpha in (0.01, 0.05):
            assert at_most(np.mean(p <= alpha), alpha), (count, alpha)
    if count == 8:
        assert np.mean([stats.welch(a, b).p <= 0.05 for a, b in runs]) > 0.03      # and it can say so at all


@pytest.mark.parametrize("alpha, spread_b, most", [(0.05, SIGMA, 20), (0.01, SIGMA, 20), (0.05, 10 * SIGMA, 20),
                                                   (0.05, SIGMA, 3), (0.2, SIGMA, 40)])
def test_the_sequential_test_after_every_pair(alpha, spread_b, most):
    rng = np.random.default_rng(most)
    a = rng.normal(3.28, SIGMA, (EXPERIMENTS, most))
    b = rng.normal(3.28, spread_b, (EXPERIMENTS, most))
    found = [stats.sequential(x, y, alpha) for x, y in zip(a.tolist(), b.tolist())]
    decided = np.mean([test.decided_at is not None for test in found])
    assert at_most(decided, alpha)
    assert at_most(np.mean([test.p <= alpha for test in found]), alpha)
    misses = np.mean([test.low is not None and not test.low <= 0 <= test.high for test in found])
    assert misses == decided        # the interval and the test say the same
    if most == 20 and alpha == 0.05:
        naive = np.zeros(EXPERIMENTS, bool)     # the simulation does catch a test that must not be looked at
        for count in range(2, most + 1):
            naive |= scipy_stats.ttest_ind(a[:, :count], b[:, :count], axis=1, equal_var=False).pvalue <= alpha
        assert naive.mean() > 0.15 and decided > 0.005


def test_the_interval_of_the_sequential_test_holds_at_every_look_at_once():
    rng = np.random.default_rng(5)
    effect = 0.002
    runs = rng.normal(3.28, SIGMA, (EXPERIMENTS, 2, 20)) + np.array([[[0.0], [effect]]])
    missed = 0
    for a, b in runs.tolist():
        last = stats.sequential(a, b)       # its interval is the intersection of those before
        missed += not last.low <= effect <= last.high
    assert at_most(missed / EXPERIMENTS, 0.05) and missed > 0
    widths = [stats.sequential(*runs[0, :, :count].tolist()) for count in range(1, 21)]
    assert [test.low is None for test in widths[:4]] == [True, True, True, False]
    assert all(later.low >= earlier.low and later.high <= earlier.high
               for earlier, later in itertools.pairwise(widths[3:]))


def test_the_e_value_is_the_ratio_of_the_mixtures():
    d = np.array([0.4, 1.3, 0.7])

    def likelihood(log_sigma, shift):       # right-Haar prior d(sigma)/sigma: flat in its logarithm
        return np.prod(scipy_stats.norm.pdf(d, shift * math.exp(log_sigma), math.exp(log_sigma)))

    def mixed(shift, log_sigma):
        return likelihood(log_sigma, shift) * scipy_stats.norm.pdf(shift, 0, math.sqrt(1 / stats.PRIOR))
    above = integrate.dblquad(mixed, -6, 6, -9, 9, epsrel=1e-5)[0]
    below = integrate.quad(likelihood, -9, 9, args=(0.0,), points=[0], epsrel=1e-9)[0]
    assert stats.log_e_values(d)[-1] == pytest.approx(math.log(above / below), abs=1e-4)


def test_the_e_value_has_mean_one_under_no_difference_and_no_unit():
    d = np.random.default_rng(9).normal(0, 7.0, (400_000, 4))
    e = np.exp(stats.log_e_values(d))
    assert e[:, 0] == pytest.approx(1.0)        # one difference says nothing
    for count in (2, 3, 4):
        error = e[:, count - 1].std() / math.sqrt(len(d))
        assert abs(e[:, count - 1].mean() - 1) < 4 * error < 0.02
    # A martingale: of those at a high value after two pairs, the mean after three is the same.
    high = e[:, 1] > 1.5
    assert e[high, 2].mean() == pytest.approx(e[high, 1].mean(), rel=0.03)
    assert stats.log_e_values(d[:50] * 1e-6) == pytest.approx(stats.log_e_values(d[:50]), abs=1e-9)
    assert (stats.log_e_values(np.zeros(5)) <= 0).all()


def test_what_the_sequential_test_says():
    a, b = [3.280, 3.281, 3.279, 3.2805, 3.2795], [3.270, 3.2712, 3.2691, 3.2703, 3.2697, 3.1]
    found = stats.sequential(a, b)
    assert (found.pairs, found.decided_at) == (5, 4) and found.p == 1 / found.e < 0.05 and found.high < 0
    assert found.difference == pytest.approx(np.mean(b[:5]) - np.mean(a))
    assert stats.sequential(a[:1], b).e == pytest.approx(1.0) and stats.sequential(a[:1], b).low is None
    later = stats.sequential(a + [3.28] * 3, b[:5] + [3.29, 3.30, 3.31])       # what was decided stays decided
    assert later.decided_at == 4 and later.e >= found.e * (1 - 1e-12) and later.high < 0
    with pytest.raises(ValueError, match="identical to the last digit"):
        stats.sequential([3.2] * 4, [3.1] * 4)
    with pytest.raises(ValueError, match="no runs"):
        stats.sequential([], [3.1])


# -- how many runs ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("effect, wanted", [(0.001, 0.8), (0.002, 0.8), (0.002, 0.95), (0.005, 0.8), (0.014, 0.8)])
def test_the_planned_runs_have_the_promised_power(effect, wanted):
    count = stats.runs_needed(lambda n: stats.power(n, effect, SIGMA), wanted)
    rng = np.random.default_rng(count)
    a, b = rng.normal(0, SIGMA, (2, 8000, count))
    seen = np.mean(scipy_stats.ttest_ind(a, b + effect, axis=1, equal_var=False).pvalue <= 0.05)
    assert abs(seen - stats.power(count, effect, SIGMA)) < 0.015 and seen > wanted - 0.03
    assert count == 2 or stats.power(count - 1, effect, SIGMA) < wanted <= stats.power(count, effect, SIGMA)


def test_power_where_it_is_known():
    # With many runs Welch's test is the normal one; with no effect the power is the rate of false positives.
    assert stats.power(2000, 0.001, 0.01) == pytest.approx(scipy_stats.norm.sf(1.96 - 0.1 * math.sqrt(1000)), abs=0.002)
    assert stats.power(20, 0.0, 1.0) == pytest.approx(0.05, abs=0.002)
    assert stats.runs_needed(lambda n: stats.target_power(n, 0.002, SIGMA), 0.8) == 8       # the community's estimate
    runs = np.random.default_rng(3).normal(3.278, SIGMA, (8000, 8))
    passed = np.mean(scipy_stats.ttest_1samp(runs, 3.28, axis=1, alternative="less").pvalue < 0.01)
    assert stats.target_power(8, 0.002, SIGMA) == pytest.approx(passed, abs=0.015)
    assert stats.runs_needed(lambda n: stats.power(n, 1e-9, SIGMA)) is None
    assert stats.runs_needed(lambda n: 1.0) == 2 and stats.runs_needed(lambda n: float(n >= 77)) == 77


@pytest.mark.parametrize("count, alpha", [(2, 0.05), (2, 0.001), (8, 0.05), (64, 0.01)])
def test_the_smallest_difference_that_shows(count, alpha):
    smallest = stats.detectable(count, SIGMA, alpha)
    assert stats.power(count, smallest, SIGMA, alpha) == pytest.approx(0.8, abs=1e-4)


def test_how_long_the_sequential_test_takes():
    chances = stats.sequential_chances(0.002, SIGMA, most=40)
    rng = np.random.default_rng(8)
    decided = [stats.sequential(a, b).decided_at for a, b in zip(rng.normal(0, SIGMA, (1000, 40)).tolist(),
                                                                 rng.normal(0.002, SIGMA, (1000, 40)).tolist())]
    for pairs in (5, 10, 20, 40):
        assert chances[pairs - 1] == pytest.approx(np.mean([n is not None and n <= pairs for n in decided]), abs=0.06)
    assert chances[39] > 0.95 and (np.diff(chances) >= 0).all() and chances[2] == 0


@pytest.mark.parametrize("a, b, message", [
    ([1.0], [1.0, 2.0], "an interval needs two runs in each arm"),
    ([], [], "needs two runs"), ([1.0, 1.0], [2.0, 2.0], "identical to the last digit: is it one seed")])
def test_arms_that_allow_no_interval(a, b, message):
    with pytest.raises(ValueError, match=message):
        stats.welch(a, b)
    assert stats.welch([1.0, 1.0], [2.0, 2.5]).p < 1       # one arm without spread is no obstacle
