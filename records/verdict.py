"""A comparison in words: the verdict in plain sentences, and the whole of it as Markdown."""
import math

METRICS = {"val_loss": ("loss", "higher", "lower"), "accuracy": ("accuracy", "higher", "lower")}
SPEED = ("seconds_to_target", "seconds_to_common", "step_ms")      # the first that can be tested speaks for speed


def verdict(comparison):
    """Plain sentences: list of str, one for each further arm, then who reached the target where not all did, what was
    left out, and what a second is worth."""
    base = comparison.arms[0]
    lines = [_against(comparison, base, arm) for arm in comparison.arms[1:]]
    if comparison.target is not None and any(arm.samples["seconds_to_target"].mean is None for arm in comparison.arms):
        counts = [f"{arm.samples['seconds_to_target'].reached} of {arm.n} runs of {arm.label}"
                  for arm in comparison.arms]
        lines.append(f"{comparison.target:g} was reached by {', '.join(counts)}.")
    for arm in comparison.arms:
        if arm.excluded:
            states = [one["status"] for one in arm.excluded]
            counts = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
            lines.append(f"Left out: {len(states)} of {arm.n + len(states)} runs of {arm.label} ({counts}). If they "
                         "ended because of what the arm does, the numbers flatter it.")
    word = METRICS[comparison.metric][0]
    if base.rate and base.rate["per_second"] > 0:
        rate = base.rate["per_second"]
        lines.append(f"In the last {base.rate['seconds']:.3g} s of {base.label}'s runs a second is worth {rate:.2g} in "
                     f"{word}: 0.001 in {word} is worth {0.001 / rate:.2g} s.")
    return lines


def _against(comparison, base, arm):
    results = comparison.results[arm.label]
    there = [key for key in SPEED if results[key].relative is not None]
    key = next((key for key in there if results[key].p is not None), there[0] if there else "step_ms")
    parts = [_speed(comparison, base, arm, key, results[key])]
    if key != "step_ms" and results["step_ms"].distinguishable and results["step_ms"].low is not None:
        slower = results["step_ms"].difference > 0
        parts.append(f"its step takes {_size(results['step_ms'], percent=True)} {'longer' if slower else 'less time'}")
    parts.append(_metric(comparison, base, arm, results["final"]))
    many = f"n = {arm.n} an arm" if arm.n == base.n else f"n = {arm.n} against {base.n}"
    if comparison.sequential:
        many = f"{results['final'].pairs or 0} pairs; the intervals hold whenever one stops"
    return f"{'; '.join(parts)} ({many})."


def _speed(comparison, base, arm, key, result):
    name = f"on different hardware, {arm.label}" if comparison.hardware_differs[arm.label] else arm.label
    if result.relative is None:
        return f"{name}'s speed cannot be compared ({result.reason})"
    word = METRICS[comparison.metric][0]
    where = {"seconds_to_target": f"to the target {comparison.target}", "step_ms": "a step",
             "seconds_to_common": f"to {comparison.common or 0:.4f}, the {word} that every run reached"}[key]
    way = "slower" if result.difference > 0 else "faster"
    if result.low is None:
        return (f"{name} was {way} by {100 * abs(result.relative):.2g} % ({where}), which shows nothing "
                f"({result.reason})")
    if result.distinguishable:
        unit, step = "ms" if key == "step_ms" else "s", _least(result)
        return (f"{name} is {way} by {_size(result, percent=True)} ({where}: {_number(arm.samples[key].mean, step)} "
                f"against {_number(base.samples[key].mean, step)} {unit})")
    return (f"{name} is not distinguishable from {base.label} in speed ({where}: {_signed_size(result, percent=True)})"
            f"{_needed(result, base, arm, '1 %')}")


def _metric(comparison, base, arm, result):
    word, up, down = METRICS[comparison.metric]
    steps = [sorted({run["steps"] for run in each.runs}) for each in (arm, base)]
    name = f"its {word}"
    if steps[0] != steps[1]:
        name += f" (after {_list(steps[0])} steps against {_list(steps[1])})"
    way = up if result.difference > 0 else down
    if result.low is None:
        return f"{name} was {way} by {_number(abs(result.difference), 1e-4)}, which shows nothing ({result.reason})"
    if result.distinguishable:
        better, step = (result.difference > 0) == (comparison.direction == "up"), _least(result)
        return (f"{name} is {way} ({'better' if better else 'worse'}) by {_size(result)}, "
                f"{_number(arm.samples['final'].mean, step)} against {_number(base.samples['final'].mean, step)}")
    return (f"{name} is not distinguishable from {base.label}'s ({_signed_size(result)})"
            f"{_needed(result, base, arm, f'{result.effect:g}' if result.effect else '')}")


def _needed(result, base, arm, what):
    if result.effect is None:
        return ""
    if result.runs_needed is None:
        return f": no number of runs up to a million would show a {what} difference"
    if min(base.n, arm.n) >= result.runs_needed:
        return f": a {what} difference would probably have been seen (n = {result.runs_needed} has 80 % power)"
    return f": to see a {what} difference, run n = {result.runs_needed:,}"


def _ends(result, percent):
    """(difference, low, high, unit), as they are or in % of the first arm's mean."""
    scale = 100 * result.relative / result.difference if percent and result.difference else 1
    return scale * result.difference, scale * result.low, scale * result.high, " %" if percent else ""


def _size(result, percent=False):
    """'3.1 % ± 0.4 %': the size of a distinguishable difference; both ends where the interval is not symmetric."""
    middle, low, high, unit = _ends(result, percent)
    half = (high - low) / 2
    if _symmetric(middle, low, high):
        return f"{_number(abs(middle), half)}{unit} ± {_number(half, half)}{unit}"
    if low < 0 < high:      # an intersection of intervals that was empty and stayed what it was
        return _signed_size(result, percent)
    low, high = sorted((abs(low), abs(high)))
    return f"{_number(abs(middle), half)}{unit} (interval {_number(low, half)} to {_number(high, half)}{unit})"


def _signed_size(result, percent=False):
    """'+0.3 % ± 1.2 %': a difference that may be none."""
    middle, low, high, unit = _ends(result, percent)
    half = (high - low) / 2
    if _symmetric(middle, low, high):
        return f"{_signed(middle, half)}{unit} ± {_number(half, half)}{unit}"
    return f"{_signed(middle, half)}{unit}, interval {_signed(low, half)} to {_signed(high, half)}{unit}"


def _symmetric(middle, low, high):
    return abs((high + low) / 2 - middle) <= 0.01 * (high - low)


def _least(result, *samples):
    """The size that decides how many digits are shown: half the interval, else the spread, else a part in 10,000."""
    if result.low is not None and result.high > result.low:
        return (result.high - result.low) / 2
    spreads = [sample.sd for sample in samples if sample.sd]
    means = [abs(sample.mean) for sample in samples if sample.mean]
    return min(spreads) if spreads else 1e-4 * min(means, default=1.0)


def _number(value, step):
    """`value` with two digits of `step`, which says how exactly it is known."""
    decimals = 1 - math.floor(math.log10(step)) if step > 0 else 4
    return f"{value:.{min(max(decimals, 0), 8)}f}"


def _signed(value, step):
    text = _number(abs(value), step)
    return ("+" if value >= 0 else "−") + text


def _list(values):
    return ", ".join(f"{value:,}" for value in values)


# -- Markdown --------------------------------------------------------------------------------------------------------

def as_markdown(comparison):
    """The whole comparison: verdict, what makes it less certain, arms, differences, how they were computed (str)."""
    base, level = comparison.arms[0], f"{100 * (1 - comparison.alpha):g} %"
    lines = [f"# {' against '.join(arm.label for arm in reversed(comparison.arms))} on {comparison.track}", ""]
    lines += [f"- {line}" for line in verdict(comparison)]
    if comparison.notes:
        lines += ["", "To know before believing it:", ""] + [f"- {note}" for note in comparison.notes]
    lines += ["", "## Arms (mean ± standard deviation of a run)", ""] + _arms(comparison)
    for arm in comparison.arms[1:]:
        lines += ["", f"## {arm.label} − {base.label}", ""] + _differences(comparison, base, arm, level)
    if comparison.settings:
        names = [arm.label for arm in comparison.arms]
        lines += ["", "## Settings that differ between the arms", ""]
        lines += _table(["setting", *names], [[key, *values] for key, values in comparison.settings.items()])
    left = [[arm.label, one["folder"] or "no folder", one["status"], one["message"] or ""]
            for arm in comparison.arms for one in arm.excluded]
    if left:
        lines += ["", "## Runs left out of every number", ""] + _table(["arm", "run", "status", "message"], left)
    lines += ["", "## How", "", _how(comparison, level)]
    return "\n".join(lines) + "\n"


def _names(comparison):
    """Rows of the tables: dict of quantity -> (name, unit)."""
    word = METRICS[comparison.metric][0]
    rows = {"final": (f"final {word}", "")}
    if comparison.target is not None:
        rows |= {"steps_to_target": (f"steps to {comparison.target:g}", ""),
                 "seconds_to_target": (f"seconds to {comparison.target:g}", " s")}
    if comparison.common is not None:
        rows["seconds_to_common"] = (f"seconds to {comparison.common:.5g}, which every run reached", " s")
    return rows | {"step_ms": ("step time", " ms")}


def _arms(comparison):
    rows = _names(comparison)
    head = ["arm", "runs", *(name for name, _ in rows.values()), "steps", "seconds"]
    body = []
    for arm in comparison.arms:
        cells = [arm.label, f"{arm.n}" + (f" of {arm.n + len(arm.excluded)}" if arm.excluded else "")]
        for key, (_, unit) in rows.items():
            sample = arm.samples[key]
            cells.append(f"{sample.reached} of {arm.n} runs" if sample.mean is None else
                         _number(sample.mean, 1e-4 * abs(sample.mean)) + unit if not sample.sd else
                         f"{_number(sample.mean, sample.sd)} ± {_number(sample.sd, sample.sd)}{unit}")
        seconds = [run["train_time_s"] for run in arm.runs]
        cells += [_list(sorted({run["steps"] for run in arm.runs})),
                  f"{min(seconds):.1f}" + (f" to {max(seconds):.1f}" if arm.n > 1 else "")]
        body.append(cells)
    return _table(head, body)


def _differences(comparison, base, arm, level):
    several, sequential = len(comparison.arms) > 2, comparison.sequential
    head = ["", "difference", f"{level} interval", "in %", "p, anytime-valid" if sequential else "p, Welch"]
    head += [] if sequential else ["p, permutation"]
    head += (["p, Holm"] if several else []) + ["runs an arm for 80 % power (range)"]
    body, reasons = [], {}
    for key, (name, unit) in _names(comparison).items():
        result = comparison.results[arm.label][key]
        if result.reason:
            reasons.setdefault(result.reason, []).append(name)
        if result.difference is None:
            continue
        step = _least(result, arm.samples[key], base.samples[key])
        cells = [name, _signed(result.difference, step) + unit,
                 "" if result.low is None else f"{_signed(result.low, step)} to {_signed(result.high, step)}{unit}",
                 "" if result.relative is None or key == "final" else f"{100 * result.relative:+.2f}".replace("-", "−")]
        cells += [_p(result.p)] + ([] if sequential else [_p(result.p_permutation)])
        cells += [_p(result.p_holm)] if several else []
        cells.append(_runs(result, f"{result.effect:g}" if key == "final" else "1 %") if result.effect else "")
        body.append(cells)
    remarks = [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]
    floor = 2 / math.comb(base.n + arm.n, base.n)
    if not sequential and floor > comparison.alpha and min(base.n, arm.n) > 1:
        remarks.append(f"with {base.n} and {arm.n} runs the permutation test cannot go below p = {min(1, floor):.2g}")
    return _table(head, body) + ([""] + [f"- {remark}" for remark in remarks] if remarks else [])


def _runs(result, what):
    """How many runs see a difference, with the range that the interval of the spread leaves."""
    runs, few, many = (f"{count:,}" if count else "> 1,000,000" for count in (result.runs_needed, *result.runs_range))
    return f"{runs} ({few} to {many}) to see {what}"


def _how(comparison, level):
    if comparison.sequential:
        test = ("Runs were made in pairs until the difference was sure: p and intervals come from an e-process for the "
                "paired differences with unknown variance (Wang and Ramdas, arXiv 2310.03722), so they hold whenever "
                "one stops.")
    else:
        test = (f"p and intervals are Welch's (unequal spreads), each interval {level} on its own; the permutation "
                "test needs no normal distribution. Both hold for a number of runs that was chosen beforehand.")
    if len(comparison.arms) > 2:
        test += " p is corrected over the arms by Holm's method, each row for itself."
    return (f"{test} 'Not distinguishable' means that p is above {comparison.alpha:g}. The numbers of runs rest on the "
            "spread of the runs at hand; their range is that of its 95 % interval. Steps and seconds to a value lie on "
            f"the straight line between two validations. Percentages are of {comparison.arms[0].label}'s mean. What a "
            "second is worth is the slope of the straight line through the validations in the last fifth of a run, or "
            "the last two: it is true for a second more or less of the same run. A longer run with a schedule of its "
            "own usually wins less by it.")


def _p(value):
    if value is None:
        return ""
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1g}"


def _table(head, body):
    rows = ["| " + " | ".join(" ".join(str(cell).replace("|", "\\|").split()) for cell in row) + " |"
            for row in (head, *body)]
    return [rows[0], "|" + "-|" * len(head), *rows[1:]]
