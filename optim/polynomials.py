"""Coefficient sets for the odd quintic p(x) = a x + b x³ + c x⁵ that a polar iteration applies to every singular value.

A set is a tuple of (a, b, c), one per step. Published sets stand here with their source; `minimax` computes the
optimal set for any number of steps and any smallest singular value.
"""

from functools import lru_cache

import numpy as np

Coefficients = tuple[tuple[float, float, float], ...]

# Keller Jordan's Muon: slope at zero as large as possible, so singular values end in about [0.7, 1.2] instead of at 1.
# https://kellerjordan.github.io/posts/muon/
MUON: Coefficients = ((3.4445, -4.7750, 2.0315),) * 5

# YouJiacheng's five, used by Dion's Muon+ kernels (https://github.com/microsoft/dion): a polynomial for each step.
MUON_PLUS: Coefficients = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)

# Turbo-Muon (arXiv 2512.04632): almost-orthogonal (AOL) scaling does the first step's work, so the last four remain.
TURBO: Coefficients = MUON_PLUS[1:]

_LIMIT = (15 / 8, -10 / 8, 3 / 8)  # what the minimax quintic tends to as its interval closes around 1


def evaluate(coefficients: Coefficients, x):
    """The composition p_k(…p_1(x)) at x (float or array): where a singular value x ends after all steps."""
    for a, b, c in coefficients:
        x2 = x * x
        x = x * (a + x2 * (b + x2 * c))
    return x


def minimax_quintic(lower: float, upper: float) -> tuple[float, float, float]:
    """The odd quintic that minimises max |1 − p(x)| over [lower, upper], 0 < lower < upper, by Remez exchange.

    The optimum equioscillates at four points lower < q < r < upper; the error's inner extrema q and r are the roots of
    p'(x) = a + 3bx² + 5cx⁴ (Polar Express, arXiv 2505.16932, section 3).
    """
    if not 0 < lower < upper:
        raise ValueError(f"minimax_quintic needs 0 < lower < upper, got lower={lower}, upper={upper}")
    if lower / upper > 1 - 5e-6:  # the system below is singular in double precision; the limit is exact to 1e-16
        a, b, c = _LIMIT
        return a / upper, b / upper**3, c / upper**5
    q, r = lower + (upper - lower) / 4, lower + 3 * (upper - lower) / 4
    error = np.inf
    for _ in range(100):
        points = np.array([lower, q, r, upper])
        signs = np.array([1.0, -1.0, 1.0, -1.0])
        a, b, c, new_error = np.linalg.solve(np.stack([points, points**3, points**5, signs], 1), np.ones(4))
        if abs(new_error - error) <= 1e-15:
            break
        error = new_error
        spread = np.sqrt(9 * b * b - 20 * a * c)
        q, r = np.sqrt((-3 * b - spread) / (10 * c)), np.sqrt((-3 * b + spread) / (10 * c))
    return float(a), float(b), float(c)


@lru_cache(maxsize=None)
def minimax(steps: int, lower: float, cushion: float = 0.0, safety: float = 1.0) -> Coefficients:
    """The composition of `steps` odd quintics that is minimax-optimal for singular values in [lower, 1].

    Greedy composition is optimal (Polar Express, arXiv 2505.16932, theorem 3.1): each step is the best quintic for the
    interval that the steps before leave. `cushion` > 0 designs a step for no wider a ratio than [cushion·u, u], which
    tames the first slopes in half precision; the result is then centred on 1 again. `safety` ≥ 1 divides x by it in
    every step, (a/s, b/s³, c/s⁵), so that rounding above 1 cannot diverge.
    """
    if steps < 1 or not 0 < lower < 1 or safety < 1:
        raise ValueError(f"minimax needs steps >= 1, 0 < lower < 1, safety >= 1; got {steps}, {lower}, {safety}")
    result, upper = [], 1.0
    for _ in range(steps):
        a, b, c = minimax_quintic(max(lower, cushion * upper), upper)
        at_lower, at_upper = (evaluate(((a, b, c),), x) for x in (lower, upper))
        centre = 2 / (at_lower + at_upper)
        a, b, c = a * centre, b * centre, c * centre
        result.append((a / safety, b / safety**3, c / safety**5))
        lower = at_lower * centre
        upper = 2 - lower
    return tuple(result)


# Polar Express as published: five steps for singular values down to 1e-3.
POLAR_EXPRESS: Coefficients = minimax(5, 1e-3, cushion=0.02407327424182761, safety=1.05)

# Four steps for singular values down to 3e-3 of the bound: turbo-muon before FITTED, and the steep set that tests use.
TURBO_MINIMAX: Coefficients = minimax(4, 3e-3, safety=1.02)

# Fitted by optim/fit.py (its defaults; 3 with --free) to the momentum of one run, records/studies/momentum-spectra, for
# AOL and the bound of optim/polar.py. Root mean square error there: published four (TURBO, no bound) 0.476, minimax
# four 0.395, Muon's five 0.372; these 0.545, 0.432, 0.304, 0.243. Four, five and six were limited to the published
# four's error on every test matrix of the study. No three steps were found within that (1.4 times it at best), so those
# are free, with up to 16 times that error (Gaussian 768×3072). Values on their way reach 1 and have 1 % of room before
# any step.
FITTED: dict[int, Coefficients] = {
    3: (
        (4.2151, -12.27, 8.929),
        (4.1015, -11.3555, 8.1416),
        (4.2846, -9.1647, 6.0109),
    ),
    4: (
        (4.1455, -11.7039, 8.4387),
        (4.0805, -11.1925, 8.0036),
        (3.6945, -8.4716, 5.7755),
        (2.6994, -3.3714, 1.6957),
    ),
    5: (
        (4.1835, -12.0107, 8.7066),
        (4.1756, -11.944, 8.6303),
        (4.0771, -11.166, 7.982),
        (3.695, -8.4727, 5.7677),
        (2.707, -3.4055, 1.725),
    ),
    6: (
        (3.9023, -9.8692, 6.8969),
        (4.1115, -11.3926, 7.9216),
        (4.1911, -12.0766, 8.7846),
        (3.9837, -10.4163, 7.1097),
        (3.695, -8.4733, 5.7713),
        (2.6875, -3.3496, 1.6836),
    ),
}
