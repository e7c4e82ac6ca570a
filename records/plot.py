"""Curves as PNG and SVG.

    python -m records plot records/wiki-3.324/2026-11-22_210342_turbo-muon-seed2     a run: its loss.png, profile.png
    python -m records plot records/wiki-3.324/2026-11-23_101500_muon-vs-turbo-muon    an experiment: loss.png, loss.svg
    python -m records plot --out muons muon='records/wiki-3.324/*_muon-seed?' turbo='records/wiki-3.324/*_turbo-muon-*'

Where several runs are drawn, each arm has a colour, a dash and a marker of its own, its mean, and a band of one
standard deviation of a run to either side. The colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/),
which people with any of the common kinds of colour blindness can tell apart.
"""
import os
import statistics
import sys
from pathlib import Path

from records.files import RecordError, writing
from records.runs import find_runs, read_experiment, read_json
from records.tracks import metric_of

BLUE, RED, GREY = "#1f5fbf", "#c8372d", "#6b6b6b"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.2, 1.2, 1.2)))
MARKERS = "osD^vPX"
WORDS = {"val_loss": "validation loss", "accuracy": "accuracy"}
AXES = (("train_time_s", "train time, seconds"), ("step", "steps"), ("tokens", "training tokens"))
SVG = {"svg.hashsalt": "turborun", "svg.fonttype": "none"}     # the same file for the same curves, text as text


def loss_curve(folder):
    """Draw the metric of one run (validation loss; on some tracks accuracy) against train time and against tokens.

    folder: a record's folder (str or Path) with record.json.  Returns the Path of the loss.png written there.
    Raises RecordError where the record cannot be read or loss.png not written, ImportError without matplotlib.
    """
    folder = Path(folder)
    record = read_json(folder / "record.json", "expected a record's folder, records/<track>/<time>_<name>")
    metric = metric_of(record["track"])
    points = [point for point in record["validation"] if point.get(metric) is not None]
    figure = _figure(10, f"{record['track']}: {record['name']}")
    scale, unit = _tokens([point["tokens"] for point in points])
    time_axes, token_axes = figure.subplots(1, 2, sharey=True)
    values = [point[metric] for point in points]
    _panel(time_axes, [point["train_time_s"] for point in points], values, record["target"], metric)
    _panel(token_axes, [(point["tokens"] or 0) / scale for point in points], values, record["target"], metric)
    time_axes.set(xlabel="train time, seconds", ylabel=WORDS[metric])
    token_axes.set(xlabel=f"training tokens{unit}")
    return _save(figure, folder / "loss.png")


def step_bars(folder):
    """Draw where the time of a step goes in each stage of a run that was profiled (records.profile): a bar a stage.

    folder: a record's folder (str or Path).  Returns the Path of the profile.png written there, None where record.json
    holds no profile of stages.  Raises as loss_curve does.
    """
    folder = Path(folder)
    record = read_json(folder / "record.json", "expected a record's folder, records/<track>/<time>_<name>")
    stages = record.get("extra", {}).get("profile", {}).get("stages")
    if not stages:
        return None
    figure = _figure(10, f"{record['track']}: {record['name']}: one step of each stage")
    axes, places, low = figure.subplots(), range(len(stages)), [0.0] * len(stages)
    for number, group in enumerate(stages[0]["groups_ms"]):
        values = [stage["groups_ms"][group] for stage in stages]
        axes.bar(places, values, bottom=low, width=0.75, label=group, zorder=3,
                 color="#d9d9d9" if group == "idle" else COLOURS[number % len(COLOURS)])
        low = [below + value for below, value in zip(low, values)]
    for place, top, stage in zip(places, low, stages):
        text = f"{stage['tflops']:.3g}\nTFLOP/s" if stage["mfu"] is None else f"{stage['mfu']:.1%}\nMFU"
        axes.annotate(text, (place, top), xytext=(0, 3), textcoords="offset points", ha="center", color=GREY,
                      fontsize=8)
    axes.set_xticks(places, [f"{stage['first_step']}–{stage['first_step'] + stage['steps'] - 1}" for stage in stages],
                    fontsize=8)
    axes.set(xlabel="steps of the stage", ylabel="time of a step, ms")
    axes.margins(y=0.15)
    _tidy(axes)
    axes.grid(visible=False, axis="x")
    figure.legend(*(part[::-1] for part in axes.get_legend_handles_labels()), loc="outside right center", frameon=False)
    return _save(figure, folder / "profile.png")


def arms_curves(arms, base, title):
    """Draw the metric of several arms against train time, steps and tokens.

    arms: dict of label -> list of Run of one track; those that are not complete are left out.  base: Path of the
    files without its suffix.  title: str.  Returns [Path of the PNG, Path of the SVG].  Raises RecordError where no run
    is complete or the files cannot be written, ImportError without matplotlib.
    """
    import matplotlib

    complete = {label: [run for run in runs if run.complete and run.curve] for label, runs in arms.items()}
    everything = [run for runs in complete.values() for run in runs]
    if not everything:
        raise RecordError(f"nothing to draw for {base}: none of the runs is complete")
    metric, target = everything[0].metric, everything[0].target
    every_point = [point for run in everything for point in run.curve]
    shown = [key for key, _ in AXES if all(getattr(point, key) is not None for point in every_point)]
    scale, unit = _tokens([point.tokens or 0 for point in every_point])
    figure = _figure(1 + 4.5 * len(shown), title)
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for panel, (key, words) in zip(panels, [axis for axis in AXES if axis[0] in shown]):
        low, high = [], []
        for number, (label, runs) in enumerate(complete.items()):
            if not runs:
                continue
            x, mean, sd = mean_curve(runs, key)
            x = [value / (scale if key == "tokens" else 1) for value in x]
            colour = COLOURS[number % len(COLOURS)]
            # another dash for each arm, so that the print in grey can be read too
            panel.plot(x, mean, color=colour, linestyle=DASHES[number % len(DASHES)], linewidth=1.7, zorder=3,
                       marker=MARKERS[number % len(MARKERS)], markersize=3.5, label=f"{label} (n = {len(runs)})")
            if len(runs) > 1:
                below, above = [m - s for m, s in zip(mean, sd)], [m + s for m, s in zip(mean, sd)]
                panel.fill_between(x, below, above, color=colour, alpha=0.2, linewidth=0)
            later = slice(len(mean) // 4, None)
            low += [m - s for m, s in zip(mean, sd)][later]
            high += [m + s for m, s in zip(mean, sd)][later]
        _target(panel, target)
        if low:
            _limit(panel, low + high, target, metric)
        panel.set(xlabel=words + (unit if key == "tokens" else ""))
        _tidy(panel)
    panels[0].set(ylabel=WORDS[metric])
    panels[0].legend(frameon=False, fontsize=9)
    with matplotlib.rc_context(SVG):
        return [_save(figure, Path(f"{base}{suffix}")) for suffix in (".png", ".svg")]


def mean_curve(runs, axis):
    """The mean over runs at every step at which all of them were validated with a finite value.

    runs: list of Run.  axis: "step", "tokens" or "train_time_s", whose mean over the runs is the place of a point.
    Returns (x, mean, sd), lists of float; sd is 0 for one run.
    """
    curves = [{point.step: point for point in run.curve if point.value is not None} for run in runs]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    x, mean, sd = [], [], []
    for step in steps:
        points = [curve[step] for curve in curves]
        values = [point.value for point in points]
        x.append(statistics.fmean(getattr(point, axis) for point in points))
        mean.append(statistics.fmean(values))
        sd.append(statistics.stdev(values) if len(values) > 1 else 0.0)
    return x, mean, sd


def _figure(width, title):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12, fontweight="bold")
    return figure


def _save(figure, final):
    temporary = final.with_name(final.name + ".tmp")
    kind = final.suffix[1:]
    with writing(final):
        with open(temporary, "wb") as file:
            figure.savefig(file, format=kind, metadata={"Date": None} if kind == "svg" else None)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, final)
    return final


def _tokens(amounts):
    """(divisor, unit) for an axis of tokens."""
    return (1e6, ", millions") if max((amount or 0 for amount in amounts), default=0) >= 1e6 else (1, "")


def _panel(axes, x, values, target, metric):
    axes.plot(x, values, color=BLUE, linewidth=1.8, marker="o", markersize=3, zorder=3)
    _target(axes, target)
    if values:
        axes.annotate(f"{values[-1]:.4f}", (x[-1], values[-1]), xytext=(7, 0), textcoords="offset points",
                      va="center", color=BLUE, fontsize=9)
        best = max(values) if metric == "accuracy" else min(values)
        _limit(axes, [*values[len(values) // 8:], best], target, metric)
    else:
        axes.text(0.5, 0.5, f"no finite {WORDS[metric]}", transform=axes.transAxes, ha="center", color=GREY)
    _tidy(axes)


def _target(axes, target):
    if target is not None:
        axes.axhline(target, color=RED, linewidth=1.2, linestyle="--")
        axes.annotate(f"target {target:g}", (0, target), xycoords=("axes fraction", "data"), xytext=(5, 4),
                      textcoords="offset points", color=RED, fontsize=9)


def _limit(axes, values, target, metric):
    """Show the part of the curves that decides: the first values of a run, which `values` leaves out, are far off."""
    shown = values + ([target] if target is not None else [])
    margin = 0.06 * (max(shown) - min(shown)) or (0.01 if metric == "accuracy" else 0.1)
    axes.set_ylim(min(shown) - margin, max(shown) + margin)


def _tidy(axes):
    axes.grid(color="#e3e3e3", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=GREY, labelleft=True)


def add_arguments(parser):
    parser.add_argument("what", nargs="+", metavar="FOLDER | LABEL=PATH", help="folders of runs or experiments; or "
                        "arms: a name, and the runs it has (a folder of several, or a pattern in quotes)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="for arms: FILE.png and FILE.svg (default: loss)")
    parser.add_argument("--title", help="of the drawing of arms")


def main(options):
    """Draw what is asked for and print the names of the files. Returns 0; raises RecordError."""
    try:
        for path in _draw(options):
            print(path)
    except ImportError as error:
        raise RecordError(f"{error}; install it with python -m pip install matplotlib") from error
    return 0


def _draw(options):
    arms = dict(text.split("=", 1) for text in options.what if "=" in text and not Path(text).exists())
    if arms and len(arms) < len(options.what):
        raise RecordError(f"{' '.join(options.what)}: expected folders, or arms that are all called LABEL=PATH")
    if arms:
        runs = {label: find_runs([path]) for label, path in arms.items()}
        tracks = {run.track for each in runs.values() for run in each}
        if len(tracks) > 1:
            raise RecordError(f"the runs are of several tracks ({', '.join(sorted(tracks))}): draw one at a time")
        yield from arms_curves(runs, options.out or Path("loss"), options.title or f"{tracks.pop()}: {', '.join(runs)}")
        return
    for folder in map(Path, options.what):
        if (folder / "experiment.json").exists():
            experiment = read_experiment(folder)
            title = options.title or f"{experiment.ledger['track']}: {', '.join(experiment.arms)}"
            yield from arms_curves(experiment.arms, options.out or folder / "loss", title)
        else:
            yield from filter(None, (loss_curve(folder), step_bars(folder)))


if __name__ == "__main__":
    from records.__main__ import main as records_main
    sys.exit(records_main(["plot", *sys.argv[1:]]))
