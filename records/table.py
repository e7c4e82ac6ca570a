"""Leaderboards as Markdown, computed from the records and from nothing else.

    python -m records table wiki-3.324                 one track (without names: all of them), every record on disk
    python -m records table --write README.md          fill in the tables between `<!-- table: TRACK -->` and
                                                       `<!-- end -->`, from the records that git has
    python -m records table --check README.md          exit status 1 where a table is not what the records say

A row is an arm of an experiment, or single runs that differ in nothing but their seed: same settings, same code, same
kind of hardware. Rows that reach the track's target in the mean come first, by the time they take; then by the metric.
"""
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

from records.files import RecordError, write_whole
from records.live import mean_sd
from records.runs import read_experiment, read_run
from records.tracks import TRACKS, get_track

ROOT = Path(__file__).resolve().parent      # records/, which holds a folder for each track
BEGIN = re.compile(r"^<!-- table: ([A-Za-z0-9][A-Za-z0-9._-]*) -->$", re.MULTILINE)
END = "<!-- end -->"
OWN = ("seed", "name", "records", "wandb")      # settings in which the runs of a row may differ


def rows(root, track, tracked=False):
    """The rows of a leaderboard, the best first: list of dict with

    label (str), runs (list of Run that are complete, by seed), other (list of Run that are not), experiment (Path of
    the experiment, or None).  root: Path of the folder of all records.  track: str.  tracked: only what git has.
    """
    folders = [folder for folder in sorted((root / track).glob("*")) if folder.is_dir()]
    if tracked:
        known = _tracked(root / track)
        folders = [folder for folder in folders if known is None or folder.name in known]
    found, single = [], {}
    for folder in folders:
        if (folder / "experiment.json").is_file():
            for label, runs in read_experiment(folder).arms.items():
                found.append(_row(label, runs, folder))
        elif (folder / "record.json").is_file():
            run = read_run(folder)
            single.setdefault(_recipe(run), []).append(run)
    found += [_row(_common_name(runs), runs, None) for runs in single.values()]
    found = [row for row in found if row["runs"] or row["other"]]
    return sorted(found, key=lambda row: (_rank(row), row["label"]))


def as_markdown(root, track, tracked=False, base=None):
    """The leaderboard of a track: str, lines of a Markdown table, or one line where there are no records.

    base: Path of the folder that links start from, `root`'s parent where None.
    """
    found, base = rows(root, track, tracked), root.parent if base is None else base
    if not found:
        return "no records yet"
    first = (found[0]["runs"] or found[0]["other"])[0]
    target, metric = _target(found), "validation loss" if first.metric == "val_loss" else first.metric
    head = ["recipe", "n", metric, *([f"to {target:g}"] if target is not None else []), "train time", "a step",
            "steps", "hardware", "records"]
    lines = [f"| {' | '.join(head)} |", "|" + "-|" * len(head)]
    for row in found:
        runs, other = row["runs"], row["other"]
        everything = runs or other
        cells = [_label(row), str(len(runs)) + "".join(f" + {count} {status}" for status in ("failed", "interrupted")
                                                       if (count := sum(run.status == status for run in other))),
                 mean_sd([run.final for run in runs], ".4f") or "–"]
        if target is not None:
            seconds = [run.seconds_to(target) for run in runs]
            reached = [value for value in seconds if value is not None]
            cells.append("–" if not reached else _time(reached, " s") if len(reached) == len(seconds) else
                         f"{len(reached)} of {len(seconds)} runs")
        steps = sorted({run.steps for run in everything})
        cells += [_time([run.train_time_s for run in runs], " s") or "–",
                  _time([run.step_ms for run in everything], " ms") or "–",
                  f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}",
                  ", ".join(sorted({_machine(run) for run in everything})), _links(row, base)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _time(values, unit):
    """mean_sd of times: to a tenth, below ten to a thousandth."""
    known = [value for value in values if value is not None]
    return mean_sd(values, ".3f" if known and sum(known) < 10 * len(known) else ".1f", unit)


def filled(text, root, base):
    """`text` (str, Markdown) with every table between markers computed anew, from the records that git has.

    root: Path of the folder of all records.  base: Path of the folder that the text's links start from.
    Raises RecordError where a marker has no end.
    """
    parts, position = [], 0
    for match in BEGIN.finditer(text):
        end = text.find(f"\n{END}", match.end())
        following = BEGIN.search(text, match.end())
        if end < 0 or following and following.start() < end:
            raise RecordError(f"{match[0]!r} has no line {END!r} after it")
        if match[1] not in TRACKS and not (root / match[1]).is_dir():
            raise RecordError(f"{match[0]!r}: no such track; expected one of {', '.join(TRACKS)}")
        parts += [text[position:match.end()], "\n", as_markdown(root, match[1], tracked=True, base=base)]
        position = end
    return "".join(parts) + text[position:]


def _tracked(folder):
    """Names in `folder` (Path) of which git has a file; None where it is no part of a checkout."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}     # set inside git hooks
    try:
        done = subprocess.run(["git", "-C", str(folder), "ls-files", "-z"], env=clean, capture_output=True)
    except OSError:
        return None
    return {name.split("/")[0] for name in done.stdout.decode().split("\0")} if done.returncode == 0 else None


def _recipe(run):
    """What the runs of a row share: str."""
    record = run.record
    config = {key: value for key, value in run.config.items() if key not in OWN}
    return json.dumps([config or [run.name], record.get("source"), run.target, _machine(run),
                       bool(record.get("imported"))], sort_keys=True)


def _common_name(runs):
    """What the names of runs begin with, without a seed at the end."""
    name = os.path.commonprefix([run.name for run in runs])
    return re.sub(r"[-_.]?(seed|run)?[-_.]?$", "", re.sub(r"[-_.]?seed[-_.]?\d*$", "", name)) or runs[0].name


def _row(label, runs, experiment):
    complete = [run for run in runs if run.final is not None]
    return {"label": label, "runs": sorted(complete, key=lambda run: (run.seed is None, run.seed, run.folder.name)),
            "other": [run for run in runs if run.final is None], "experiment": experiment}


def _target(found):
    known = get_track((found[0]["runs"] or found[0]["other"])[0].track)
    if known is not None:
        return known.target
    targets = {run.target for row in found for run in row["runs"]}
    return targets.pop() if len(targets) == 1 else None


def _rank(row):
    """Smaller is better: (not at the target in the mean, seconds to it or distance of the metric)."""
    if not row["runs"]:
        return (2, 0.0)
    runs, target = row["runs"], _target([row])
    mean = sum(run.final for run in runs) / len(runs)
    seconds = [run.seconds_to(target) for run in runs] if target is not None else []
    if target is not None and runs[0].at_or_beyond(mean, target) and None not in seconds:
        return (0, sum(seconds) / len(seconds))
    return (1, mean if runs[0].direction == "down" else -mean)


def _label(row):
    imported = any(run.record.get("imported") for run in row["runs"] + row["other"])
    return row["label"].replace("|", "\\|") + (" (imported)" if imported else "")


def _machine(run):
    """Such as "2 × NVIDIA H200", or the name of a CPU and how many of its cores were used."""
    hardware = run.record.get("hardware") or {}
    if hardware.get("accelerator"):
        count = hardware.get("accelerator_count") or 1
        name = hardware["accelerator"]
        return f"{count} × {name}" if count > 1 else name
    return f"{hardware['cpu']}, {hardware.get('cpu_count')} cores" if hardware.get("cpu") else "not said"


def _links(row, base):
    def link(text, folder):
        return f"[{text}]({quote(os.path.relpath(folder.resolve(), base.resolve()))})"
    if row["experiment"] is not None:
        return link(row["experiment"].name, row["experiment"])
    runs = row["runs"] + row["other"]
    if len(runs) == 1:
        return link(runs[0].folder.name, runs[0].folder)
    return "seed " + ", ".join(link(run.seed if run.seed is not None else run.folder.name, run.folder) for run in runs)


def add_arguments(parser):
    parser.add_argument("tracks", nargs="*", metavar="TRACK", help="default: every track that has records")
    parser.add_argument("--records", type=Path, default=ROOT, metavar="FOLDER", help="folder of all records")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--write", type=Path, metavar="FILE", help="fill in the tables of this file")
    group.add_argument("--check", type=Path, metavar="FILE", help="exit with 1 if a table of this file is stale")


def main(options):
    """Print, write or check leaderboards. Returns 0, or 1 where a table is stale; raises RecordError."""
    file = options.write or options.check
    if file is None:
        names = options.tracks or sorted(folder.name for folder in options.records.glob("*")
                                         if any(folder.glob("*/record.json")) or any(folder.glob("*/experiment.json")))
        for name in names:
            if not (options.records / name).is_dir() and name not in TRACKS:
                raise RecordError(f"no records of a track {name!r} in {options.records}; "
                                  f"known tracks are {', '.join(TRACKS)}")
            print(f"## {name}\n\n{as_markdown(options.records, name, base=Path.cwd())}\n")
        return 0
    if options.tracks:
        raise RecordError("--write and --check fill in the tracks that the file names itself: leave out "
                          + " ".join(options.tracks))
    try:
        text = file.read_text()
    except OSError as error:
        raise RecordError(f"cannot read {file}: {error.strerror}") from error
    if not BEGIN.search(text):
        raise RecordError(f"{file} has no table: expected a line such as <!-- table: wiki-3.324 --> and, below, {END}")
    new = filled(text, options.records, file.parent)
    if options.write:
        if new != text:
            write_whole(file, new.encode())
        return 0
    if new != text:
        stale = [line for line in text.splitlines() if line not in set(new.splitlines())]
        print(f"{file} is stale: python -m records table --write {file} mends it"
              + "".join(f"\n- {line}" for line in stale[:5]), file=sys.stderr)
        return 1
    return 0
