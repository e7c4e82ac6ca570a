"""Arms of runs against each other: what differs, by how much, how sure.

    python -m records compare muon='records/wiki-3.324/*_muon-seed?' turbo='records/wiki-3.324/*_turbo-muon-seed?'
    python -m records compare records/wiki-3.324/2026-11-22_190535_muon-vs-turbo

The first arm is the one the others are compared with. Runs are independent of each other: an arm's runs are not paired
with another's, but for the sequential test of an experiment that was run "until sure" (records.stats.sequential).
"""
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import fisher_exact

from records import stats
from records.alike import alike
from records.files import RecordError
from records.runs import LARGEST_NUMBER, find_runs, read_experiment
from records.tracks import get_track
from records.verdict import as_markdown, verdict

QUANTITIES = ("final", "steps_to_target", "seconds_to_target", "step_ms", "seconds_to_common")
TO_TARGET = ("steps_to_target", "seconds_to_target")
POWER = 0.8             # of the numbers of runs that a comparison recommends
EFFECT = 0.001          # difference in the metric that a researcher would like to see, unless told another
SMALL = 0.01            # and in a time or a number of steps, as a part of the first arm's
TINY = 1e-9             # seconds, steps or metric that count as none where one divides by them
WINDOW = 0.2            # the exchange rate is the slope over this last part of the training time


@dataclass(frozen=True)
class Sample:
    """One quantity in one arm. values: one for each run used, None for a run that did not get there. reached: how many
    did. mean, sd: None unless all did (sd: and there are two)."""
    values: list
    reached: int
    mean: float | None
    sd: float | None


@dataclass(frozen=True)
class Arm:
    """label: str.  n: runs used.  runs: list of {folder, name, seed, steps, tokens, train_time_s, metric}, those used.
    excluded: list of {folder, seed, status, message}, those that are not.  samples: dict of quantity -> Sample.
    rate: what a second of training is worth near the end, {per_second, low, high, seconds, n}, or None."""
    label: str
    n: int
    runs: list
    excluded: list
    samples: dict
    rate: dict | None


@dataclass(frozen=True)
class Result:
    """One quantity, an arm against the first. difference: arm − first. relative: the same as a part of the first
    arm's mean. low, high: interval of the difference. p: two-sided, of Welch's test or of the sequential one (method).
    p_permutation: None for the sequential one. p_holm: p corrected for the number of arms compared.
    distinguishable: p_holm <= alpha. sd: of one run, pooled. effect, runs_needed: how many runs an arm see a difference
    of `effect` with 80 % power, from that sd; runs_range: from the ends of its 95 % interval; None stands for more than
    a million. pairs: of the sequential test. reason: why an entry is None, or None.
    """
    difference: float | None = None
    relative: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_permutation: float | None = None
    p_holm: float | None = None
    distinguishable: bool = False
    method: str | None = None
    sd: float | None = None
    effect: float | None = None
    runs_needed: int | None = None
    runs_range: list | None = None
    pairs: int | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Comparison:
    """track, metric, direction: str.  target: float or None.  common: the value of the metric that every run reached,
    or None.  alpha: float.  sequential: whether the intervals and p hold at any time of stopping.  arms: list of Arm,
    the first the one compared with.  results: dict of label of a further arm -> dict of quantity -> Result.
    settings: dict of setting -> list of its values, one for each arm, where arms differ.  notes: what makes the arms
    less comparable (list of str).  hardware_differs: dict of label -> bool, from the first arm's."""
    track: str
    metric: str
    direction: str
    target: float | None
    common: float | None
    alpha: float
    sequential: bool
    arms: list
    results: dict
    settings: dict
    notes: list
    hardware_differs: dict

    def as_json(self):
        """Strict JSON as dict, the verdict with it."""
        return dataclasses.asdict(self) | {"verdict": verdict(self)}


def compare(arms, *, target=None, effect=None, alpha=0.05, sequential=False, unrecorded=None):
    """Compare arms of runs of one track.

    arms: dict of label -> list of Run, the first is what the others are compared with.  target: of the metric; None
    means the one of the runs, or of the track.  effect: difference in the metric worth seeing, for the recommended
    number of runs.  alpha: chance of a false positive; the intervals have the level 1 − alpha.  sequential: runs were
    made in pairs until the difference was sure, so the i-th complete runs of two arms are a pair.
    unrecorded: dict of label -> list of ledger entries (dict) of runs that left no record.
    Returns Comparison.  Raises RecordError where the arms cannot be compared at all.
    """
    if len(arms) < 2:
        raise RecordError(f"{len(arms)} arm cannot be compared: expected two or more, each LABEL=PATH")
    everything = [run for runs in arms.values() for run in runs]
    _check_same_track(arms)
    used = {label: [run for run in runs if run.final is not None] for label, runs in arms.items()}
    for label, runs in used.items():
        if not runs:
            states = ", ".join(sorted({run.status for run in arms[label]})) or "no records at all"
            raise RecordError(f"arm {label} has no complete run with a final validation ({states})")
    track, metric, direction = everything[0].track, everything[0].metric, everything[0].direction
    target, target_note = _target(used, track, target)
    common = _common(used, direction)
    shown = [_arm(label, runs, [run for run in arms[label] if run.final is None], (unrecorded or {}).get(label, []),
                  target, common) for label, runs in used.items()]
    settings, notes, hardware_differs = alike(used)
    rows = {quantity: [_result(quantity, shown[0], arm, target, effect, alpha / (len(shown) - 1), alpha, sequential)
                       for arm in shown[1:]] for quantity in QUANTITIES}
    for quantity, row in rows.items():
        adjusted = stats.holm([result.p for result in row])
        rows[quantity] = [dataclasses.replace(result, p_holm=p, distinguishable=p is not None and p <= alpha)
                          for result, p in zip(row, adjusted)]
    results = {arm.label: {quantity: rows[quantity][index] for quantity in QUANTITIES}
               for index, arm in enumerate(shown[1:])}
    return Comparison(track, metric, direction, target, common, alpha, sequential, shown, results, settings,
                      ([target_note] if target_note else []) + notes, hardware_differs)


def compare_experiment(experiment, *, target=None, effect=None, alpha=None):
    """compare(), with what the experiment's ledger says of its question.  experiment: records.runs.Experiment."""
    question = experiment.ledger.get("question")
    question = question if isinstance(question, dict) else {}
    rule = question.get("sequential")
    if alpha is None:
        alpha = (rule if isinstance(rule, dict) else question).get("alpha", 0.05)
        if not isinstance(alpha, float) or not 0 < alpha < 1:
            raise RecordError(f"{experiment.folder / 'experiment.json'}: alpha is {repr(alpha)[:60]}, expected a "
                              "number between 0 and 1")
    if target is None:
        target = question.get("target")
        if target is not None and (not isinstance(target, (int, float)) or not abs(target) <= LARGEST_NUMBER):
            raise RecordError(f"{experiment.folder / 'experiment.json'}: target is {repr(target)[:60]}, expected a "
                              "number")
    comparison = compare(experiment.arms, target=target, effect=effect, alpha=alpha, sequential=bool(rule),
                         unrecorded=experiment.unrecorded)
    block = experiment.ledger.get("block", 1)
    if isinstance(block, int) and block > 1:
        note = (f"{block} runs of an arm at a time shared a process and with it what that chose once (cuDNN's "
                "algorithms), so their times are not independent: intervals of times are too narrow")
        comparison = dataclasses.replace(comparison, notes=[*comparison.notes, note])
    declared = question.get("runs")
    if not rule and isinstance(declared, int) and min(arm.n for arm in comparison.arms) < declared:
        counts = ", ".join(f"{arm.label} {arm.n}" for arm in comparison.arms)
        note = (f"{declared} runs an arm were declared and these are fewer ({counts}): whoever looks now and goes on "
                "if it suits gets more false positives than alpha")
        comparison = dataclasses.replace(comparison, notes=[note, *comparison.notes])
    return comparison


def _check_same_track(arms):
    tracks = {run.track: run for runs in arms.values() for run in runs}
    if len(tracks) > 1:
        raise RecordError("the runs are of several tracks, so their metrics cannot be compared: " + ", ".join(
            f"{run.folder} is {track}" for track, run in sorted(tracks.items())))
    if len({run.metric for runs in arms.values() for run in runs}) > 1:
        raise RecordError(f"some runs of the track {next(iter(tracks))} have val_loss and some accuracy")
    owner = {}
    for label, runs in arms.items():
        for run in runs:
            other = owner.setdefault(run.folder.resolve(), label)
            if other != label:
                raise RecordError(f"{run.folder} is in two arms, {other} and {label}: a run can be in one only")


def _target(used, track, given):
    """(target, note): what was asked for, else what the runs had, else what the track has."""
    if given is not None:
        return float(given), None
    targets = {run.target for runs in used.values() for run in runs}
    if len(targets) > 1:
        return None, ("the runs had different targets (" + ", ".join(str(value) for value in sorted(targets, key=str))
                      + "): --target chooses one for all")
    known = get_track(track)
    (target,) = targets
    return (target if target is not None else known.target if known else None), None


def _common(used, direction):
    """The best value that every run reached: the worst of the final ones; None where that is no better than where some
    run began, or where validations are too few."""
    finals = [run.final for runs in used.values() for run in runs]
    level = max(finals) if direction == "down" else min(finals)
    for run in (run for runs in used.values() for run in runs):
        first = run.curve[0].value
        if len(run.curve) < 2 or first is None or run.at_or_beyond(first, level):
            return None
    return level


def _arm(label, runs, others, unrecorded, target, common):
    values = {
        "final": [run.final for run in runs],
        "steps_to_target": [run.steps_to(target, interpolate=True) if target is not None else None for run in runs],
        "seconds_to_target": [run.seconds_to(target, interpolate=True) if target is not None else None
                              for run in runs],
        "step_ms": [run.step_ms for run in runs],
        "seconds_to_common": [run.seconds_to(common, interpolate=True) if common is not None else None
                              for run in runs],
    }
    excluded = [{"folder": str(run.folder), "seed": run.seed, "message": run.message,
                 "status": run.status if not run.complete else "complete, but without a final validation"}
                for run in others]
    excluded += [{"folder": entry.get("folder"), "seed": entry.get("seed"), "message": entry.get("message"),
                  "status": f"{entry.get('status', 'started')}, left no record"} for entry in unrecorded]
    shown = [{"folder": str(run.folder), "name": run.name, "seed": run.seed, "steps": run.steps, "tokens": run.tokens,
              "train_time_s": run.train_time_s, "metric": run.final} for run in runs]
    return Arm(label, len(runs), shown, excluded, {key: _sample(row) for key, row in values.items()}, _rate(runs))


def _sample(values):
    there = [float(value) for value in values if value is not None]
    whole = len(there) == len(values)
    return Sample(values, len(there), float(np.mean(there)) if whole else None,
                  float(np.std(there, ddof=1)) if whole and len(there) > 1 else None)


def _rate(runs):
    """What a second of training is worth near the end of a run: the slope of the straight line through the
    validations in the last fifth of its time, at least the last two; mean over the runs with its 95 % interval."""
    slopes, spans = [], []
    for run in runs:
        points = [point for point in run.curve if point.value is not None]
        late = [point for point in points if point.train_time_s >= (1 - WINDOW) * points[-1].train_time_s]
        late = late if len(late) > 1 else points[-2:]
        seconds = np.array([point.train_time_s for point in late])
        if len(late) < 2 or seconds[-1] - seconds[0] < TINY:
            return None
        slope = np.polyfit(seconds - seconds[0], [point.value for point in late], 1)[0]
        slopes.append(float(slope if run.direction == "up" else -slope))
        spans.append(float(seconds[-1] - seconds[0]))
    low, high = stats.mean_interval(slopes) if len(slopes) > 1 else (None, None)
    return {"per_second": float(np.mean(slopes)), "low": low, "high": high, "seconds": float(np.mean(spans)),
            "n": len(slopes)}


def _result(quantity, base, arm, target, effect, corrected, alpha, sequential):
    """Result of `arm` against `base` before Holm's correction.  corrected: alpha for the recommended runs."""
    first, second = base.samples[quantity], arm.samples[quantity]
    if first.mean is None or second.mean is None:
        return Result(reason="there is no target" if quantity in TO_TARGET and target is None else
                      _censored(quantity, base, arm))
    a, b = ([float(value) for value in sample.values] for sample in (first, second))
    difference = second.mean - first.mean
    found = Result(difference=difference, relative=_relative(difference, first.mean))
    try:
        sd, *ends = stats.spread(a, b)
        wanted = (EFFECT if effect is None else effect) if quantity == "final" else SMALL * abs(first.mean)
        if wanted > TINY:
            runs, *between = (stats.runs_needed(lambda n: stats.power(n, wanted, value, corrected), POWER)
                              for value in (sd, *ends))
            found = dataclasses.replace(found, sd=sd, effect=wanted, runs_needed=runs, runs_range=between)
    except ValueError:
        pass        # no spread to go by; the reason is below
    try:
        if sequential:
            test = stats.sequential(a, b, alpha)
            return dataclasses.replace(found, difference=test.difference, low=test.low, high=test.high, p=test.p,
                                       relative=_relative(test.difference, first.mean),
                                       method="anytime-valid", pairs=test.pairs,
                                       reason=None if test.low is not None else
                                       f"{test.pairs} pairs are too few to bound the difference")
        if min(len(a), len(b)) > 1:
            found = dataclasses.replace(found, p_permutation=stats.permutation_p(a, b))
        test = stats.welch(a, b, 1 - alpha)
        return dataclasses.replace(found, low=test.low, high=test.high, p=test.p, method="Welch")
    except ValueError as error:
        return dataclasses.replace(found, reason=str(error))


def _relative(difference, mean):
    return difference / mean if abs(mean) > TINY else None


def _censored(quantity, base, arm):
    """Why there is no mean: some runs did not get there."""
    first, second = base.samples[quantity], arm.samples[quantity]
    if quantity == "seconds_to_common":
        return "there is no value that every run reached between two of its validations"
    if quantity == "step_ms":
        return "a run has no steps"
    if first.reached + second.reached == 0:
        return f"reached by none of the {arm.n} runs of {arm.label} and the {base.n} of {base.label}"
    p = fisher_exact([[first.reached, base.n - first.reached], [second.reached, arm.n - second.reached]]).pvalue
    return (f"reached by {second.reached} of {arm.n} runs of {arm.label} and {first.reached} of {base.n} of "
            f"{base.label} (Fisher's exact test, p = {p:.2g}); no mean over only some runs")


def add_arguments(parser):
    """Options of `python -m records compare`.  parser: argparse.ArgumentParser."""
    parser.add_argument("arms", nargs="+", metavar="ARM=PATH[,PATH...]",
                        help="an arm's label and its runs: folders of records, folders that hold some, or patterns in "
                        "quotes; the first arm is what the others are compared with. Or one folder of an experiment")
    parser.add_argument("--target", type=float, help="value of the metric to which steps and seconds are counted "
                        "(default: the target the runs had)")
    parser.add_argument("--effect", type=float, help="difference in the metric you would like to see; the report says "
                        f"how many runs show it (default: {EFFECT:g})")
    parser.add_argument("--alpha", type=float, help="chance of calling equal arms different; intervals have the level "
                        "1 − alpha (default: 0.05, or the experiment's)")
    parser.add_argument("--json", action="store_true", help="print JSON with every number, not Markdown")


def main(options):
    """Print the comparison.  Returns 0.  Raises RecordError."""
    for name, value in (("--target", options.target), ("--effect", options.effect), ("--alpha", options.alpha)):
        if value is not None and not (np.isfinite(value) and (name == "--target" or value > 0)
                                      and (name != "--alpha" or value < 1)):
            raise RecordError(f"{name} {value}: expected a positive number{' below 1' if name == '--alpha' else ''}")
    if len(options.arms) == 1 and (Path(options.arms[0]) / "experiment.json").is_file():
        comparison = compare_experiment(read_experiment(options.arms[0]), target=options.target,
                                        effect=options.effect, alpha=options.alpha)
    else:
        comparison = compare(_read_arms(options.arms), target=options.target, effect=options.effect,
                             alpha=0.05 if options.alpha is None else options.alpha)
    print(as_markdown(comparison) if not options.json else json.dumps(comparison.as_json(), indent=1, allow_nan=False))
    return 0


def _read_arms(texts):
    arms = {}
    for text in texts:
        label, equals, paths = text.partition("=")
        if not equals or not label or not paths:
            raise RecordError(f"{text!r}: expected ARM=PATH[,PATH...], such as muon='records/wiki-3.324/*_muon-*', or "
                              "one folder with experiment.json")
        if label in arms:
            raise RecordError(f"two arms are called {label!r}: give all paths of an arm behind one {label}=")
        arms[label] = find_runs(path for path in paths.split(",") if path)
    return arms
