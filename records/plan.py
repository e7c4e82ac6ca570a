"""How many runs a question takes, before the first one starts.

    python -m records plan --effect 0.001                                  with the spread of 124M speedruns
    python -m records plan --effect 0.002 --like 'records/wiki-3.324/*'    with the spread of these runs
"""
import dataclasses
import json
import math
from dataclasses import dataclass

import numpy as np

from records import stats
from records.files import RecordError
from records.runs import find_runs

SIGMA = 0.0013      # standard deviation of the final loss of 124M speedruns (modded-nanogpt's and Turbo-Muon's logs)
CLAIM = 0.01        # p at which a track's rule takes a target as reached
TABLE = (2, 3, 4, 6, 8, 12, 16, 24, 32, 64)


@dataclass(frozen=True)
class Plan:
    """effect, sigma, alpha, power, arms: what was asked. runs: of each arm for Welch's test, None beyond a million.
    runs_power: the power these have. pairs_half, pairs_power: pairs after which half, and the part `power`, of all
    experiments with the anytime-valid test are decided; None where too many. target_runs: to show at p < 0.01 that a
    mean which is truly `effect` beyond a target is beyond it. detectable: dict of runs of an arm -> smallest
    difference that they show with `power`."""
    effect: float
    sigma: float
    alpha: float
    power: float
    arms: int
    runs: int | None
    runs_power: float | None
    pairs_half: int | None
    pairs_power: int | None
    target_runs: int | None
    detectable: dict


def plan(effect, sigma=SIGMA, alpha=0.05, power=0.8, arms=2):
    """Numbers of runs for a difference of `effect` between runs with standard deviation `sigma` (both in the unit of
    the metric, positive).  alpha: two-sided, shared by arms − 1 comparisons (Bonferroni).  power: chance to see it.
    Returns Plan.  Raises RecordError where a value cannot be."""
    for name, value, most in (("effect", effect, math.inf), ("sigma", sigma, math.inf), ("alpha", alpha, 1),
                              ("power", power, 1)):
        if not 0 < value < most:
            raise RecordError(f"--{name} {value}: expected a positive number{'' if most > 1 else ' below 1'}")
    if arms < 2:
        raise RecordError(f"--arms {arms}: expected two or more")
    corrected = alpha / (arms - 1)
    runs = stats.runs_needed(lambda n: stats.power(n, effect, sigma, corrected), power)
    half = most = None
    if runs is not None and runs <= 500:
        chances = stats.sequential_chances(effect, sigma, corrected, most=max(50, 4 * runs))
        half, most = (int(np.argmax(chances >= part)) + 1 if chances[-1] >= part else None for part in (0.5, power))
    return Plan(effect, sigma, alpha, power, arms, runs,
                None if runs is None else stats.power(runs, effect, sigma, corrected), half, most,
                stats.runs_needed(lambda n: stats.target_power(n, effect, sigma, CLAIM), power),
                {n: stats.detectable(n, sigma, corrected, power) for n in TABLE})


def as_text(plan):
    """plan: Plan.  Returns the answer as lines of text (str)."""
    percent = f"{100 * plan.power:g} %"
    shared = f", alpha {plan.alpha:g}" + (f" shared by {plan.arms - 1} comparisons" if plan.arms > 2 else "")
    lines = [f"A difference of {plan.effect:g} between runs with a standard deviation of {plan.sigma:.3g}{shared}:", ""]
    if plan.runs is None:
        lines.append("  two arms, fixed n      more than a million runs an arm")
    else:
        lines.append(f"  fixed n                n = {plan.runs} an arm: {100 * plan.runs_power:.0f} % of experiments "
                     "see it")
    if plan.pairs_half is not None:
        rest = f", {percent} by {plan.pairs_power}" if plan.pairs_power else ""
        lines.append(f"  until sure             half of all experiments are sure by {plan.pairs_half} pairs of "
                     f"runs{rest}")
    lines.append(f"  against a target       n = {plan.target_runs or 'more than a million'} for a mean {plan.effect:g} "
                 f"beyond it to pass the one-sided test at p < {CLAIM:g} ({percent})")
    lines += ["", f"Smallest difference that {percent} of experiments see:", "",
              "  n an arm    " + "".join(f"{n:>9}" for n in plan.detectable),
              "  difference  " + "".join(f"{value:>9.2g}" for value in plan.detectable.values())]
    return "\n".join(lines)


def add_arguments(parser):
    """Options of `python -m records plan`.  parser: argparse.ArgumentParser."""
    parser.add_argument("--effect", type=float, required=True, help="difference to be seen, in the unit of the metric")
    spread = parser.add_mutually_exclusive_group()
    spread.add_argument("--sigma", type=float, help="standard deviation of the metric between runs that differ in "
                        f"their seed only (default: {SIGMA:g}, the final loss of 124M speedruns)")
    spread.add_argument("--like", nargs="+", metavar="PATH", help="records of one recipe whose spread to take instead")
    parser.add_argument("--alpha", type=float, default=0.05, help="chance of calling equal arms different (0.05)")
    parser.add_argument("--power", type=float, default=0.8, help="chance of seeing the difference (0.8)")
    parser.add_argument("--arms", type=int, default=2, help="number of arms; the first is compared with each other (2)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(options):
    """Print the plan.  Returns 0.  Raises RecordError."""
    sigma, source = SIGMA if options.sigma is None else options.sigma, None
    if options.like:
        runs = [run for run in find_runs(options.like) if run.final is not None]
        if len({run.track for run in runs}) > 1:
            raise RecordError("--like: the runs are of several tracks: " +
                              ", ".join(sorted({run.track for run in runs})))
        try:
            sigma, low, high = stats.spread([run.final for run in runs])
        except ValueError as error:
            raise RecordError(f"--like: {len(runs)} complete runs, {error}; expected at least two of one recipe, or "
                              "--sigma") from error
        source = f"Standard deviation of {len(runs)} runs: {sigma:.3g} (95 % interval {low:.3g} to {high:.3g})."
    result = plan(options.effect, sigma, options.alpha, options.power, options.arms)
    if options.json:
        print(json.dumps(dataclasses.asdict(result), indent=1, allow_nan=False))
    else:
        print(as_text(result) if source is None else f"{source}\n{as_text(result)}")
    return 0
