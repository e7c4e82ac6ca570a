"""Coefficients of a polar iteration: searched for on measured spectra, or composed minimax-optimal for an interval.

    python -m optim.fit --steps 4                 four steps behind AOL and the bound; --frobenius: behind X / ‖X‖_F
    python -m optim.fit --steps 3 --free          without keeping to the reference's error on the test distributions
    python -m optim.fit --steps 4 --minimax       for singular values in [l, 1], l of least error on the spectra
    python -m optim.fit --steps 4 --minimax 3e-3  for this l

All end in the same tables: errors on the spectra and on test matrices, beside those of other sets.

All that coefficients can change about a matrix X (n×m, n ≤ m) is two vectors of n numbers. Normalisation leaves
DX = U' S' V'ᵀ, the iteration makes it U' p(S') V'ᵀ, and its relative squared error against X's polar factor P is

    (Σ p(σ'_i)² − 2 Σ p(σ'_i) w_i + n) / n,   w_i = u'_iᵀ P v'_i,

where w = 1 if D is a number and less where rows are scaled (AOL, arXiv 2512.04632). A study holds these vectors for
the momentum of a run and for test distributions; `fit` minimises the error on the one, limited by that on the other.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .geometry import scaled_gram
from .polynomials import MUON, MUON_PLUS, TURBO, TURBO_MINIMAX, Coefficients, evaluate, minimax, minimax_quintic

STUDY = Path("records/studies/momentum-spectra/spectra.json")
REFERENCE = {"aol": TURBO, "frobenius": MUON}  # published sets, applied without the bound: a fit is limited by theirs
EDGES = np.logspace(-5, 0, 401)  # bins of a histogram; what is below counts as 1e-5, which few steps leave near 0
MIDDLES = np.sqrt(EDGES[1:] * EDGES[:-1])
SLACK = 1.01  # rounding may enlarge a singular value by this much before every step, and p must not diverge there


@dataclass(frozen=True)
class Spectrum:
    """Singular values that an iteration starts from: float64 arrays (points,), a point for each or for a bin of them.

    sigma   values before division by the bound       weight  w of a point, summed over its bin
    count   how many values a point stands for        bound   min(1, ‖R²‖_F^¼), R = DXXᵀDᵀ, see optim.polar.Polar
    """

    sigma: np.ndarray
    weight: np.ndarray
    count: np.ndarray
    bound: float = 1.0

    def bounded(self) -> "Spectrum":
        return Spectrum(self.sigma / self.bound, self.weight, self.count)


def spectrum(x: Tensor, normalize: str = "aol") -> Spectrum:
    """The Spectrum of one matrix (n, m) of any real dtype, computed in float64 on its device."""
    if normalize not in REFERENCE:
        raise ValueError(f"spectrum normalize={normalize!r}: expected one of {', '.join(REFERENCE)}")
    if x.ndim != 2 or not x.isfinite().all() or not x.any():
        raise ValueError(f"spectrum needs one finite matrix (n, m) that is not 0, got shape {tuple(x.shape)}")
    gram = scaled_gram(x, normalize)
    values, vectors = torch.linalg.eigh(gram)
    sigma = values.clamp(min=1e-30).sqrt()
    weight = torch.ones_like(sigma)
    if normalize == "aol":
        plain = scaled_gram(x, "frobenius")
        values, basis = torch.linalg.eigh(plain)
        root = (basis * values.clamp(min=0).sqrt()) @ basis.mT  # (XXᵀ)^½ = P Xᵀ
        norms = plain.diagonal().where(plain.diagonal() > 0, 1)
        scale = (gram.diagonal() / norms).sqrt()  # D, as far as rows are not 0
        weight = (((vectors.mT @ root) * (vectors.mT * scale)).sum(1) / sigma).clamp(-1, 1)  # u'ᵀ P (DX)ᵀ u' / σ'
    bound = min(1.0, (gram @ gram).norm().item() ** 0.25)
    return Spectrum(sigma.cpu().numpy(), weight.cpu().numpy(), np.ones(len(sigma)), bound)


def histogram(spectra: Sequence[Spectrum]) -> Spectrum:
    """Several spectra as one, over the bins EDGES; a point is the geometric middle of its bin."""
    sigma, weight, count = (np.concatenate([getattr(s, f) for s in spectra]) for f in ("sigma", "weight", "count"))
    bins = np.clip(np.digitize(sigma, EDGES) - 1, 0, len(EDGES) - 2)
    summed = (np.bincount(bins, values, minlength=len(EDGES) - 1) for values in (weight, count))
    return Spectrum(MIDDLES, *summed)


def error(coefficients: Coefficients, spectrum: Spectrum) -> float:
    """‖O − P‖_F / ‖P‖_F of the exact iteration's result O, the root mean square over the matrices of a histogram."""
    p, total = evaluate(coefficients, spectrum.sigma), spectrum.count.sum()
    return float(np.sqrt(np.maximum((p * (p * spectrum.count - 2 * spectrum.weight)).sum() / total + 1, 0)))


# --- studies: what spectra.json holds --------------------------------------------------------------------------------

Modes = dict[str, Spectrum]  # "aol", "aol+bound", "frobenius", "frobenius+bound"


def momentum_entry(step: int, operator: str, aol: Sequence[Spectrum], frobenius: Sequence[Spectrum]) -> dict:
    """What a study keeps of matrices of one rank: histograms and medians (of aol_cos, the mean of w: the mean)."""
    relative = np.median([np.sort(s.sigma)[::-1] / s.sigma.max() for s in frobenius], 0)
    places = {str(q): relative[round(q * (len(relative) - 1))] for q in (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)}
    modes = {"aol": aol, "aol+bound": [s.bounded() for s in aol],
             "frobenius": frobenius, "frobenius+bound": [s.bounded() for s in frobenius]}
    kept = {mode: histogram(spectra) for mode, spectra in modes.items()}
    return {"step": step, "operator": operator, "matrices": len(aol), "rank": len(relative),
            "sigma_over_largest_at": {q: float(f"{value:.3g}") for q, value in places.items()},
            "stable_rank": round(float(np.median([(s.sigma**2).sum() / s.sigma.max()**2 for s in frobenius])), 2),
            "aol_cos": round(float(np.mean([s.weight.mean() for s in aol])), 5),
            "spectra": {mode: {"count": h.count.astype(int).tolist()} |
                        ({"weight": h.weight.round(3).tolist()} if mode[0] == "a" else {}) for mode, h in kept.items()}}


def test_entry(distribution: str, x: Tensor) -> dict:
    """What a study keeps of one test matrix (n, m): every singular value, to five digits."""
    kept = {}
    for mode in REFERENCE:
        s = spectrum(x, mode)
        sigma, weight = ([float(f"{v:.5g}") for v in values] for values in (s.sigma, s.weight))
        kept[mode] = {"bound": s.bound, "sigma": sigma} | ({"weight": weight} if mode == "aol" else {})
    return {"name": f"{distribution} {x.size(0)}x{x.size(1)}", "spectra": kept}


def write_study(path: Path | str, about: dict, momentum: Sequence[dict], tests: Sequence[dict]) -> None:
    """`momentum_entry`s and `test_entry`s as JSON, a line each."""
    lines = ["[\n" + ",\n".join(json.dumps(e, separators=(",", ":")) for e in part) + "]" for part in (momentum, tests)]
    Path(path).write_text(f'{{"about": {json.dumps(about)},\n"momentum": {lines[0]},\n"tests": {lines[1]}}}\n')


def read_study(path: Path | str = STUDY) -> tuple[dict[tuple[int, str], Modes], dict[str, Modes]]:
    """Spectra of a study: momentum by (step, operator) and test matrices by name, each in all four modes."""
    if not Path(path).is_file():
        raise ValueError(f"no study at {path}: expected a file that write_study wrote, as {STUDY} of this repository")

    def modes(entry: dict) -> Modes:  # what is left out is the same for all: σ of a bin, counts of 1, w of 1
        result = {}
        for mode, kept in entry["spectra"].items():
            sigma = np.array(kept.get("sigma", MIDDLES))
            count = np.array(kept.get("count", np.ones(len(sigma))), float)
            result[mode] = Spectrum(sigma, np.array(kept.get("weight", count)), count, kept.get("bound", 1.0))
        return {f"{mode}+bound": s.bounded() for mode, s in result.items()} | result

    study = json.loads(Path(path).read_text())
    return ({(e["step"], e["operator"]): modes(e) for e in study["momentum"]},
            {e["name"]: modes(e) for e in study["tests"]})


# --- fitting ---------------------------------------------------------------------------------------------------------


def fit(steps: int, momentum: Spectrum, limits: Sequence[tuple[Spectrum, float]] = (), *, hops: int = 120,
        top: float = 1.2, seed: int = 0) -> Coefficients:
    """Coefficients of `steps` steps with the smallest error on `momentum` that was found, rounded to four decimals.

    limits  (spectrum, error that must not be exceeded on it); ValueError if no set is found that keeps to all
    hops    random changes of the best set, each followed by a descent: the error has many local minima
    top     nothing on [0, 1] may get above this or below 0 in any step, even if rounding enlarges what enters each step
            by SLACK: a penalty, so expect 1.24 where 1.2 is asked for, but nothing that diverges
    """
    if steps < 1 or hops < 0 or top < 1 or any(limit <= 0 for _, limit in limits):
        raise ValueError(f"fit needs steps >= 1, hops >= 0, top >= 1, limits > 0; got {steps}, {hops}, {top}, "
                         f"{[limit for _, limit in limits]}")
    thin = [(_thinned(s), limit) for s, limit in limits]  # the descent's; what it finds is judged on the whole spectra
    objectives = [_objective(momentum, thin, top, penalty) for penalty in ((10, 1e3, 1e5) if limits else (1,))]
    rng, found = np.random.default_rng(seed), []

    def descend(start) -> None:
        flat = np.array(start).ravel()
        for objective in objectives:
            flat, value = _bfgs(objective, flat)
        rounded = _rounded(flat.reshape(-1, 3))
        if not np.isfinite(rounded).all():
            return
        worst = max((error(rounded, s) / limit for s, limit in limits), default=0.0)
        found.append((worst > 1, worst if worst > 1.01 else value, worst, rounded))
        found.sort()

    for lower in (8, 4, 2, 1, 0.5):
        descend(minimax(steps, min(0.5, lower * 0.25**steps), safety=1.02))
    for published in (MUON_PLUS, MUON, TURBO):
        if steps <= len(published):
            descend(published[-steps:])
    if steps > 1:
        fewer = fit(steps - 1, momentum, hops=hops // 4, top=top, seed=seed)
        for lower in (0.1, 0.03):
            descend((minimax_quintic(lower, 1.0), *fewer))
    for _ in range(hops):
        best = np.array(found[0][-1])
        descend(best * np.exp(rng.uniform(0, 0.15) * rng.standard_normal(best.shape)))
    failed, _, worst, coefficients = found[0]
    if failed:
        raise ValueError(f"fit found no {steps} steps within all limits: the nearest has {worst:.3f} times what one "
                         "allows; expected at most 1 (more steps, more hops, or no limits)")
    return coefficients


def best_minimax(steps: int, momentum: Spectrum, safety: float = 1.02) -> tuple[float, Coefficients]:
    """The minimax composition for singular values in [l, 1] with the least error on `momentum`: l, and the set rounded
    to four decimals. l is one of 97, even in the logarithm, from 1e-6 to where hardly any error is left on [l, 1]."""
    sets = {lower: minimax(steps, lower, safety=safety) for lower in np.geomspace(1e-6, min(0.5, 8 * 0.25**steps), 97)}
    lower = min(sets, key=lambda lower: error(sets[lower], momentum))
    return float(lower), _four_decimals(sets[lower])


def _four_decimals(coefficients: Coefficients) -> Coefficients:
    return tuple(tuple(round(float(c), 4) for c in step) for step in coefficients)


def _thinned(spectrum: Spectrum, points: int = 256) -> Spectrum:
    """Neighbouring singular values as one point, their mean, so that no more than about `points` remain."""
    order = np.argsort(spectrum.sigma)
    first = np.arange(0, len(order), max(1, len(order) // points))
    sigma, weight, count = (np.add.reduceat(v[order], first) for v in
                            (spectrum.sigma * spectrum.count, spectrum.weight, spectrum.count))
    return Spectrum(sigma / count, weight, count)


def _objective(momentum: Spectrum, limits: Sequence[tuple[Spectrum, float]], top: float, penalty: float):
    """Error on `momentum` plus penalties, and its gradient, as a function of the 3·steps coefficients in a row.

    All singular values go through the steps at once: those of the spectra, and a grid on [0, 1] for the range.
    """
    spectra, allowed = [momentum, *(s for s, _ in limits)], np.array([limit for _, limit in limits])
    lengths, grid = [len(s.sigma) for s in spectra], np.linspace(0, 1, 400) ** 2
    first, data = np.cumsum([0, *lengths[:-1]]), sum(lengths)
    points, slack = np.concatenate([*(s.sigma for s in spectra), grid]), np.repeat([1, SLACK], [data, len(grid)])
    count, weight = (np.concatenate([v / s.count.sum() for v, s in zip(values, spectra)])
                     for values in ([s.count for s in spectra], [s.weight for s in spectra]))

    def objective(flat):
        steps, inputs, outputs = flat.reshape(-1, 3), [], [points]
        for step in steps:
            inputs.append(outputs[-1] * slack)
            outputs.append(evaluate((step,), inputs[-1]))
        p = outputs[-1][:data]
        errors = np.sqrt(np.maximum(np.add.reduceat(p * (p * count - 2 * weight), first) + 1, 1e-12))
        excess = np.maximum(errors[1:] / allowed - 0.999, 0)  # 0.001 is left for rounding
        value, gradient = errors[0] + penalty * (excess @ excess), np.empty_like(steps)
        back = np.zeros_like(points)  # d value / d output of the step
        back[:data] = (p * count - weight) * np.repeat(np.append(1, 2 * penalty * excess / allowed) / errors, lengths)
        for i in reversed(range(len(steps))):
            outside = (reached := outputs[i + 1][data:]) - np.clip(reached, 0, top)
            value += outside @ outside
            back[data:] += 2 * outside
            (a, b, c), x = steps[i], inputs[i]
            x2 = x * x
            gradient[i] = back @ x, back @ (x * x2), back @ (x * x2 * x2)
            back = back * slack * (a + x2 * (3 * b + x2 * 5 * c))
        return value, gradient.ravel()

    return objective


def _bfgs(objective, x: np.ndarray, iterations: int = 600) -> tuple[np.ndarray, float]:
    """Minimum near x of a function that returns (value, gradient), by BFGS with a weak-Wolfe line search."""
    with np.errstate(all="ignore"):  # a step too long overflows, and is then halved
        value, gradient = objective(x)
        inverse = np.eye(len(x)) / max(1.0, np.linalg.norm(gradient))
        for _ in range(iterations):
            direction = -inverse @ gradient
            low, high, length, fall = 0.0, np.inf, 1.0, direction @ gradient
            for _ in range(40):
                new_value, new_gradient = objective(x + length * direction)
                if not new_value <= value + 1e-4 * length * fall:
                    high = length
                elif new_gradient @ direction < 0.9 * fall:
                    low = length
                else:
                    break
                length = (low + high) / 2 if high < np.inf else 2 * low
            else:
                return x, value
            move, change = length * direction, new_gradient - gradient
            gained, x, value, gradient = value - new_value, x + move, new_value, new_gradient
            if gained < 1e-9:
                break
            turned, along = inverse @ change, move @ change
            inverse += (1 + change @ turned / along) / along * np.outer(move, move)
            inverse -= (np.outer(turned, move) + np.outer(move, turned)) / along
    return x, value


def _rounded(steps: np.ndarray) -> Coefficients:
    """To four decimals, after values on their way are scaled to reach 1: p(x) / s and then q(s x) composes the same."""
    result, x, carry = [], np.linspace(0, 1, 2001), 1.0
    with np.errstate(all="ignore"):  # a descent that went nowhere
        for i, (a, b, c) in enumerate(steps):
            x = evaluate(((a, b, c),), x)
            a, b, c = a * carry, b * carry**3, c * carry**5
            carry = x.max() if i + 1 < len(steps) else 1.0
            result.append((a / carry, b / carry, c / carry))
    return _four_decimals(result)


# --- the command line ------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--spectra", type=Path, default=STUDY)
    parser.add_argument("--free", action="store_true", help="do not limit the error on the test distributions")
    parser.add_argument("--minimax", nargs="?", const="best", metavar="L", help="compose for singular values in [L, 1] "
                        "instead of searching (without L: the one with the least error on the spectra)")
    parser.add_argument("--frobenius", action="store_true", help="X / ‖X‖_F and the bound; Muon's five as reference")
    parser.add_argument("--hops", type=int, default=120, help="random restarts of the search")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        _report(options)
    except ValueError as mistake:
        parser.error(str(mistake))


def _report(options: argparse.Namespace) -> None:
    momentum, tests = read_study(options.spectra)
    plain = "frobenius" if options.frobenius else "aol"
    mode, reference = plain + "+bound", REFERENCE[plain]
    on = histogram([modes[mode] for modes in momentum.values()])
    if options.minimax is None:
        limits = [] if options.free else [(modes[mode], error(reference, modes[plain])) for modes in tests.values()]
        found = fit(options.steps, on, limits, hops=options.hops, seed=options.seed)
    elif options.minimax == "best":
        lower, found = best_minimax(options.steps, on)
        print(f"minimax({options.steps}, {lower:.3g}, safety=1.02)")
    else:
        found = _four_decimals(minimax(options.steps, float(options.minimax), safety=1.02))
    print("\n".join(f"    ({a}, {b}, {c})," for a, b, c in found))
    sets = {"this": (found, mode), "published": (TURBO, "aol"), "minimax": (TURBO_MINIMAX, "aol+bound"),
            "muon": (MUON, "frobenius"), "muon-plus": (MUON_PLUS, "frobenius")}
    groups = {f"{step} {operator}": [modes] for (step, operator), modes in momentum.items()}
    print(f"\nerror on momentum   {''.join(f'{name:>11}' for name in sets)}")
    for group, members in (groups | {"all": list(momentum.values())}).items():
        errors = [error(c, histogram([modes[m] for modes in members])) for c, m in sets.values()]
        print(f"{group:<20}" + "".join(f"{e:11.4f}" for e in errors))
    print("\nerror on test matrices as a multiple of the reference's")
    for name, modes in tests.items():
        ratios = [error(c, modes[m]) / error(reference, modes[plain]) for c, m in sets.values()]
        print(f"{name:<20}" + "".join(f"{r:11.3f}" for r in ratios))
    print(f"\n{'slope product':<20}" + "".join(f"{np.prod([a for a, _, _ in c]):11.1f}" for c, _ in sets.values()))
    print(f"{'largest value':<20}" + "".join(f"{largest(c):11.3f}" for c, _ in sets.values()))


def largest(coefficients: Coefficients) -> float:
    """The largest value of any step on [0, 1] when rounding enlarges what enters each step by SLACK."""
    x, reached = np.linspace(0, 1, 10_001), []
    with np.errstate(all="ignore"):  # minimax sets leave no room
        for step in coefficients:
            x = evaluate((step,), SLACK * x)
            reached.append(x.max())
    return float(np.max(reached))


if __name__ == "__main__":
    main()
