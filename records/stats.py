"""Statistics of a handful of runs, from plain lists of floats: differences between two arms, claims against a target,
how many runs it takes, and a test that may be looked at after every pair of runs.

Everything supposes that runs are independent and about normal. Arms may have different spreads. Functions raise
ValueError where the numbers allow no answer (one run in an arm, no spread at all); the message says why.
"""
import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

EXACT = 200_000         # largest number of arrangements that the permutation test goes through one by one
RESAMPLES = 99_999      # arrangements drawn where there are more
PRIOR = 0.5             # c² of `sequential`: the effect is expected within about sqrt(1 / c²) standard deviations
MOST_RUNS = 1_000_000   # `runs_needed` looks no further


@dataclass(frozen=True)
class Difference:
    """difference: mean(b) − mean(a).  low, high: its confidence interval.  p: two-sided.  df: degrees of freedom."""
    difference: float
    low: float
    high: float
    p: float
    df: float


@dataclass(frozen=True)
class Sequential:
    """pairs: how many were looked at.  difference: mean(b) − mean(a) over them.  low, high: confidence interval that
    holds at every look at once; None while there are too few pairs to bound the difference.  e: the largest e-value
    so far, p = min(1, 1/e).  decided_at: number of pairs at the first look with p <= alpha, None if there was none."""
    pairs: int
    difference: float
    low: float | None
    high: float | None
    e: float
    p: float
    decided_at: int | None


def welch(a, b, level=0.95):
    """Welch's t-test of mean(b) − mean(a), no supposition of equal spreads, and the interval that belongs to it.

    a, b: lists of at least two floats.  level: of the interval.  Returns Difference.
    """
    _check_arms(a, b)
    difference = float(np.mean(b) - np.mean(a))
    squares = [float(np.var(arm, ddof=1)) / len(arm) for arm in (a, b)]
    error = math.sqrt(sum(squares))
    if error == 0:
        raise ValueError("the runs within each arm differ by less than can be squared")
    df = 1 / sum((square / sum(squares))**2 / (len(arm) - 1) for square, arm in zip(squares, (a, b)))
    half = float(stats.t.ppf((1 + level) / 2, df)) * error
    p = 2 * float(stats.t.sf(abs(difference) / error, df))
    return Difference(difference, difference - half, difference + half, p, df)


def permutation_p(a, b, seed=0):
    """p of the two-sided permutation test of the difference in means: twice the smaller tail, at most 1.

    Exact where there are at most 200,000 arrangements (up to ten runs an arm), else from 99,999 drawn with `seed`.
    With n runs in each arm it cannot be smaller than 2 / binomial(2n, n): 0.33, 0.10, 0.029 for n = 2, 3, 4.
    """
    if not len(a) or not len(b):
        raise ValueError("an arm has no runs")
    pooled, count = np.array([*a, *b], dtype=float), len(a)
    pooled -= pooled.mean()     # so that the sum of an arm says where its mean lies, without cancellation
    observed, ties = pooled[:count].sum(), 1e-12 * np.abs(pooled).sum()
    if math.comb(len(pooled), count) <= EXACT:
        sums = pooled[_arrangements(len(pooled), count)].sum(axis=1)
        extra = 0
    else:
        rows = np.broadcast_to(pooled, (RESAMPLES, len(pooled)))
        sums = np.random.default_rng(seed).permuted(rows, axis=1)[:, :count].sum(axis=1)
        extra = 1       # the arrangement that was observed belongs to them
    lower, upper = (sums <= observed + ties).sum() + extra, (sums >= observed - ties).sum() + extra
    return float(min(1.0, 2 * min(lower, upper) / (len(sums) + extra)))


@functools.lru_cache(maxsize=4)
def _arrangements(total, count):
    """Every choice of `count` out of `total` indices: int array of shape (binomial(total, count), count)."""
    flat = itertools.chain.from_iterable(itertools.combinations(range(total), count))
    return np.fromiter(flat, dtype=np.int16, count=count * math.comb(total, count)).reshape(-1, count)


def target_p(values, target, direction="down"):
    """p of the one-sided one-sample t-test of the claim that the mean is at or beyond `target`: a track's rule.

    values: list of at least two floats.  direction: "down" where lower is better, "up" where higher is.
    """
    _check_spread(values)
    return float(stats.ttest_1samp(values, target, alternative="less" if direction == "down" else "greater").pvalue)


def spread(*arms):
    """Standard deviation of one run, pooled over the arms (lists of floats; those with one run add nothing).

    Returns (sd, low, high) with the 95 % interval of the standard deviation.
    """
    squares = sum(float(np.var(arm) * len(arm)) for arm in arms if len(arm) > 1)
    df = sum(len(arm) - 1 for arm in arms if len(arm) > 1)
    if not df or squares == 0:
        raise ValueError("no arm has two runs that differ" if df else "no arm has two runs")
    low, high = (math.sqrt(squares / quantile) for quantile in stats.chi2.ppf((0.975, 0.025), df))
    return math.sqrt(squares / df), low, high


def mean_interval(values, level=0.95):
    """Student's interval of the mean of at least two floats: (low, high)."""
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = error * float(stats.t.ppf((1 + level) / 2, len(values) - 1))
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def holm(p_values):
    """Holm's correction: list of p, adjusted so that p <= alpha keeps the chance of any false positive at alpha.

    p_values: list of float or None (a comparison that could not be tested; it stays None and does not count).
    """
    tested = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted, largest = [None] * len(p_values), 0.0
    for rank, (p, index) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        adjusted[index] = largest
    return adjusted


def power(runs, effect, sigma, alpha=0.05):
    """Chance that Welch's test with `runs` runs in each of two arms finds a true difference: float.

    effect: the difference.  sigma: standard deviation of one run, the same in both arms.  alpha: two-sided.
    Exact: with equal arms Welch's t is the pooled t, of the noncentral distribution with 2n − 2 degrees of freedom;
    only its threshold varies with the share r ~ Beta((n − 1)/2, (n − 1)/2) that one arm has in the sum of the two
    variances, df = (n − 1) / (r² + (1 − r)²). The mean over r is taken at 50 equally likely values of it, right
    to 0.0001.
    """
    half = (runs - 1) / 2
    share = stats.beta.ppf((np.arange(50) + 0.5) / 50, half, half)
    threshold = stats.t.isf(alpha / 2, (runs - 1) / (share**2 + (1 - share)**2))
    shift = abs(effect) / sigma * math.sqrt(runs / 2)
    return float(np.mean(stats.nct.sf(threshold, 2 * runs - 2, shift) + stats.nct.sf(threshold, 2 * runs - 2, -shift)))


def target_power(runs, margin, sigma, alpha=0.01):
    """Chance that `runs` runs, whose true mean is `margin` beyond the target, pass the one-sided t-test."""
    shift = margin / sigma * math.sqrt(runs)
    return float(stats.nct.sf(stats.t.isf(alpha, runs - 1), runs - 1, shift))


def runs_needed(chance, wanted=0.8):
    """Smallest number of runs, at least two, with chance(runs) >= wanted: int, None beyond a million.

    chance: function of the number of runs that grows with it, such as lambda n: power(n, 0.001, 0.0013).
    """
    high = 2
    while chance(high) < wanted:
        high *= 2
        if high > MOST_RUNS:
            return None
    low = high // 2
    while high - low > 1 and high > 2:
        middle = (low + high) // 2
        low, high = (low, middle) if chance(middle) >= wanted else (middle, high)
    return high


def detectable(runs, sigma, alpha=0.05, wanted=0.8):
    """Smallest difference that Welch's test with `runs` runs in each of two arms finds with the chance `wanted`."""
    def surplus(shift):
        return power(runs, shift, 1.0, alpha) - wanted
    high = 1.0
    while surplus(high) < 0:
        high *= 2
    return sigma * float(optimize.brentq(surplus, 0.0, high, xtol=1e-6)) if surplus(0.0) < 0 else 0.0


def log_e_values(differences, prior=PRIOR):
    """Logarithm of the e-value after each of a series of paired differences; the test martingale of `sequential`.

    differences: array of shape (..., pairs), in the order in which the pairs were run.  Returns the same shape.
    """
    x = np.asarray(differences, dtype=float)
    n = np.arange(1, x.shape[-1] + 1)
    total, squares = x.cumsum(-1), (x * x).cumsum(-1)
    ratio = np.divide(total**2, squares, out=np.zeros_like(x), where=squares > 0)     # at most n
    return 0.5 * np.log(prior / (n + prior)) - 0.5 * n * np.log1p(-np.minimum(ratio, n) / (n + prior))


def sequential(a, b, alpha=0.05):
    """Two arms compared in pairs, with a test that stays valid however often one looks and whenever one stops.

    a, b: lists of floats, a[i] and b[i] the i-th pair that was run (A B B A …); the longer list is cut.
    alpha: the chance that the test ever calls equal arms different, or that the interval ever misses.

    The differences d = b − a are normal with one unknown variance, whatever the spread of either arm and whatever a
    pair shares. Under "mean zero" the d divided by |d[0]| have a distribution without unknowns. So the ratio of their
    density under an effect to that under none is a martingale of mean 1 for the one who sees the d only up to scale;
    the ratio stays one averaged over effects mean/sd ~ N(0, 1/c²), which gives, with S = Σd and V = Σd²,

        E_n = sqrt(c² / (n + c²)) · (1 − S² / ((n + c²) V))^(−n/2).

    By Ville's inequality it ever reaches 1/alpha with chance alpha at most. The interval has the differences δ that
    the same test of d − δ never rejected. Sources: the Gaussian mixture of the scale-invariant likelihood ratio in
    Wang and Ramdas, "Anytime-valid t-tests and confidence sequences for Gaussian means with unknown variance",
    arXiv 2310.03722; right-Haar prior on the scale: Grünwald, de Heide and Koolen, "Safe Testing", arXiv 1906.07801.
    c² = 1/2 can decide from four pairs on at alpha 0.05.
    """
    pairs = min(len(a), len(b))
    if not pairs:
        raise ValueError("an arm has no runs")
    d = np.array(b[:pairs], dtype=float) - np.array(a[:pairs], dtype=float)
    if pairs > 1 and _constant(a[:pairs]) and _constant(b[:pairs]):
        raise ValueError("the runs within each arm are identical to the last digit: is it one seed again and again?")
    log_e = log_e_values(d)
    over = np.flatnonzero(log_e >= -math.log(alpha))
    low, high = _running_interval(d, alpha)
    best = math.exp(min(float(log_e.max()), 700.0))
    decided_at = int(over[0]) + 1 if len(over) else None
    return Sequential(pairs, float(d.mean()), low, high, best, min(1.0, 1 / best), decided_at)


def _running_interval(d, alpha):
    """Intersection of the intervals after each pair: (low, high), (None, None) while none is bounded.

    They hold jointly with chance 1 − alpha, and then the intersection is not empty; should it become so, which says
    that this is one of the other cases, what it was before stays.
    """
    low, high = -math.inf, math.inf
    for n in range(2, len(d) + 1):
        # E < 1/alpha where S²/V < limit, and S²/V = n t² / (n − 1 + t²) with t = (mean − δ) / standard error.
        limit = (n + PRIOR) * -math.expm1(2 / n * (math.log(alpha) + 0.5 * math.log(PRIOR / (n + PRIOR))))
        if limit < n:
            mean, error = float(d[:n].mean()), float(d[:n].std(ddof=1)) / math.sqrt(n)
            width = error * math.sqrt(limit * (n - 1) / (n - limit))
            if max(low, mean - width) <= min(high, mean + width):
                low, high = max(low, mean - width), min(high, mean + width)
    return (low, high) if high < math.inf else (None, None)


def sequential_chances(effect, sigma, alpha=0.05, most=200, experiments=4000, seed=0):
    """Chance that `sequential` has decided after 1, 2, … `most` pairs: array, from simulated experiments.

    effect: true difference.  sigma: standard deviation of one run.  With 4,000 experiments it is right to 1.6 points.
    """
    noise = np.random.default_rng(seed).normal(effect, sigma * math.sqrt(2), (experiments, most))
    return np.maximum.accumulate(log_e_values(noise) >= -math.log(alpha), axis=1).mean(axis=0)


def _constant(values):
    return min(values) == max(values)


def _check_arms(a, b):
    if min(len(a), len(b)) < 2:
        raise ValueError("an interval needs two runs in each arm")
    if _constant(a) and _constant(b):
        raise ValueError("the runs within each arm are identical to the last digit: is it one seed again and again?")


def _check_spread(values):
    if len(values) < 2:
        raise ValueError(f"n = {len(values)}: a t-test needs at least two runs")
    if _constant(values):
        raise ValueError("the runs are identical to the last digit: is it one seed again and again?")
