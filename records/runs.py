"""Runs and experiments read back from their folders, for whatever compares, ranks or draws them.

A run is a folder with record.json (records.log writes it). An experiment is a folder with experiment.json, of which
this module reads

    {"schema": 1, "track": NAME, "arms": [{"label": NAME, ...}, ...],
     "runs": [{"arm": NAME, "index": 3, "folder": "runs/A-3" or null, "status": ..., ...}, ...], ...}

`runs` has an entry for every run that was started, retries included; a run that was killed before it wrote a record
has no folder or no record.json there, and stays in Experiment.unrecorded.
"""
import glob
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from records.files import RecordError
from records.tracks import DIRECTIONS, get_track

STATUSES = ("complete", "failed", "interrupted")
LARGEST_NUMBER = 1e15       # in a record; sums of squares of such numbers stay finite
LARGEST = 256 * 2**20       # bytes of a record.json or experiment.json that are read


@dataclass(frozen=True)
class Point:
    """One validation. step: steps done. tokens: tokens seen, None where the log did not say (imported ones).
    train_time_s: seconds trained. value: the track's metric, None where it was not finite."""
    step: int
    tokens: int | None
    train_time_s: float
    value: float | None


@dataclass(frozen=True)
class Run:
    """One record.

    folder: Path.  track, name: str.  seed: int or None.  status: "complete", "failed" or "interrupted".
    message: why it did not complete (str), or None.  steps: steps done.  tokens: at the last validation, or None.
    train_time_s: seconds trained.  metric: "val_loss" or "accuracy".  direction: "down" or "up", towards better.
    target: float or None.  curve: tuple of Point in order of steps.  config: dict of the run's settings.
    record: the whole record.json (dict).
    """
    folder: Path
    track: str
    name: str
    seed: int | None
    status: str
    message: str | None
    steps: int
    tokens: int | None
    train_time_s: float
    metric: str
    direction: str
    target: float | None
    curve: tuple[Point, ...]
    config: dict = field(repr=False)
    record: dict = field(repr=False)

    @property
    def complete(self):
        return self.status == "complete"

    @property
    def final(self):
        """The metric at the last validation of a complete run (float); None for any other run."""
        return self.curve[-1].value if self.complete and self.curve else None

    @property
    def step_ms(self):
        """Milliseconds a step, over the whole run (float); None before the first step."""
        return 1000 * self.train_time_s / self.steps if self.steps else None

    def at_or_beyond(self, value, target):
        """Whether `value` (float) is as good as `target` (float) or better."""
        return value <= target if self.direction == "down" else value >= target

    def steps_to(self, target=None, interpolate=False):
        """Steps to the target (the run's own unless given): int, a float with interpolate=True, None if not reached."""
        return self._crossing("step", target, interpolate)

    def seconds_to(self, target=None, interpolate=False):
        """Seconds of training to the target (the run's own unless given): float, or None where it is not reached."""
        return self._crossing("train_time_s", target, interpolate)

    def _crossing(self, axis, target, interpolate):
        """`axis` of the first validation at or beyond the target. With interpolate=True of the point where the
        straight line from the validation before it meets the target; the curve bends below that line (loss), so the
        true crossing is a little earlier."""
        target = self.target if target is None else target
        if target is None:
            return None
        before = None
        for point in self.curve:
            if point.value is not None and self.at_or_beyond(point.value, target):
                x = getattr(point, axis)
                if not interpolate or before is None or before.value is None:
                    return x
                left = getattr(before, axis)
                return left + (x - left) * (target - before.value) / (point.value - before.value)
            before = point
        return None


@dataclass(frozen=True)
class Experiment:
    """folder: Path.  arms: dict of label -> list of Run, in the order of the ledger; the first arm is the one the
    others are compared with.  unrecorded: dict of label -> list of the ledger's entries (dict) that left no record.
    ledger: experiment.json (dict)."""
    folder: Path
    arms: dict[str, list[Run]]
    unrecorded: dict[str, list[dict]]
    ledger: dict = field(repr=False)


def read_run(folder):
    """The run in `folder` (str or Path).  Raises RecordError naming the file and what is wrong with it."""
    folder = Path(folder)
    file = folder / "record.json"
    record = read_json(file, "expected a run's folder, records/<track>/<time>_<name>")

    def get(key, kinds, source=record, place=""):
        value = source.get(key)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise RecordError(f"{file}: {place}{key} is {_short(value)}, expected {_names(kinds)}; "
                              f"python -m records verify {folder} says what else is wrong")
        if isinstance(value, (int, float)) and (value < 0 and key in ("step", "steps", "tokens", "train_time_s")
                                                or not abs(value) <= LARGEST_NUMBER):
            raise RecordError(f"{file}: {place}{key} is {_short(value)}, expected a number"
                              f"{' of at least 0' if value < 0 else f' of at most {LARGEST_NUMBER:g}'}")
        return value

    number, none = (int, float), type(None)
    track, status, points = get("track", str), get("status", str), get("validation", list)
    if status not in STATUSES:
        raise RecordError(f"{file}: status is {status!r}, expected one of {', '.join(STATUSES)}")
    metric, direction = _metric(track, points)
    curve = []
    for index, point in enumerate(points):
        place = f"validation[{index}]: "
        if not isinstance(point, dict) or metric not in point:
            raise RecordError(f"{file}: {place}{_short(point)} has no {metric!r}, the metric of the track {track}")
        value = get(metric, (*number, none), point, place)
        curve.append(Point(get("step", int, point, place), get("tokens", (int, none), point, place),
                           float(get("train_time_s", number, point, place)), None if value is None else float(value)))
        if index and (curve[-1].step <= curve[-2].step or curve[-1].train_time_s < curve[-2].train_time_s):
            raise RecordError(f"{file}: {place}step {curve[-1].step} at {curve[-1].train_time_s} s follows step "
                              f"{curve[-2].step} at {curve[-2].train_time_s} s; expected both to grow")
    target = get("target", (*number, none))
    return Run(folder=folder, track=track, name=get("name", str), seed=get("seed", (int, none)), status=status,
               message=get("message", (str, none)), steps=get("steps", int), tokens=get("tokens", (int, none)),
               train_time_s=float(get("train_time_s", number)), metric=metric, direction=direction,
               target=None if target is None else float(target), curve=tuple(curve),
               config=get("config", (dict, none)) or {}, record=record)


def _metric(track, points):
    """(metric, direction) of the track; where it is not known, of what the points of the curve hold."""
    known = get_track(track)
    if known is not None:
        return known.metric, known.direction
    keys = points[0] if points and isinstance(points[0], dict) else {}
    metric = next((name for name in DIRECTIONS if name in keys), "val_loss")
    return metric, DIRECTIONS[metric]


def read_experiment(folder):
    """The experiment in `folder` (str or Path).  Raises RecordError naming the file and what is wrong with it."""
    folder = Path(folder)
    file = folder / "experiment.json"
    ledger = read_json(file, "expected an experiment's folder, as `python -m records ab` leaves it")
    arms, entries = ledger.get("arms"), ledger.get("runs")
    if not isinstance(arms, list) or not arms or not all(isinstance(arm, dict) and isinstance(arm.get("label"), str)
                                                         for arm in arms):
        raise RecordError(f"{file}: arms is {_short(arms)}, expected a list of objects with a label")
    labels = [arm["label"] for arm in arms]
    if len(set(labels)) < len(labels):
        raise RecordError(f"{file}: two arms have the same label: {', '.join(labels)}")
    if not isinstance(entries, list):
        raise RecordError(f"{file}: runs is {_short(entries)}, expected a list")
    found, unrecorded = {label: [] for label in labels}, {label: [] for label in labels}
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict) or entry.get("arm") not in labels:
            raise RecordError(f"{file}: runs[{index}] is {_short(entry)}, expected an object whose arm is one of "
                              f"{', '.join(labels)}")
        run = _folder_of(folder, entry, file, index)
        if run is None or not (run / "record.json").is_file():
            unrecorded[entry["arm"]].append(entry)
        else:
            found[entry["arm"]].append(read_run(run))
    return Experiment(folder, found, unrecorded, ledger)


def _folder_of(folder, entry, file, index):
    """The folder of a run of the ledger (Path), None where it has none; it lies inside the experiment's."""
    name = entry.get("folder")
    if name is None:
        return None
    if not isinstance(name, str) or not name or Path(name).is_absolute() or ".." in Path(name).parts \
            or "\0" in name or not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise RecordError(f"{file}: runs[{index}].folder is {_short(name)}, expected a folder inside the experiment's")
    return folder / name


def find_runs(paths):
    """The runs of several paths.

    paths: list of str or Path, each the folder of a run, a folder with such folders at any depth (an experiment, a
    track), or a pattern with *, ? or [.  Returns list of Run, each folder once, in the order of the paths and by name
    within a path.  Raises RecordError where a path has no run.
    """
    folders = {}
    for path in map(str, paths):
        matches = [path] if os.path.exists(path) else sorted(glob.glob(path)) if glob.has_magic(path) else []
        inside = [folder for match in matches for folder in _run_folders(match)]
        if not inside:
            raise RecordError(f"no run in {path}: expected a folder with record.json, or one that holds such folders, "
                              "or a pattern in quotes such as 'records/wiki-3.324/*_muon-*'")
        folders |= {folder.resolve(): folder for folder in inside if folder.resolve() not in folders}
    return [read_run(folder) for folder in folders.values()]


def _run_folders(path):
    """Folders with a record.json at or below `path` (str), sorted; symbolic links below it are not followed."""
    found = []
    for folder, children, files in os.walk(path):
        if "record.json" in files:
            found.append(Path(folder))
            children.clear()
    return sorted(found)


def read_json(file, expected):
    """The object in `file` (Path): dict.  expected: str, how a message about a file that is missing ends.

    Strict JSON: NaN and Infinity are refused.  Raises RecordError naming the file.
    """
    def refuse(name):
        raise ValueError(f"{name} is not JSON")
    try:
        with open(file, "rb") as opened:
            content = opened.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ValueError(f"it is larger than {LARGEST} bytes")
        value = json.loads(content, parse_constant=refuse)
    except OSError as error:
        raise RecordError(f"cannot read {file} ({error.strerror or error}); {expected}") from error
    except (ValueError, RecursionError) as error:
        raise RecordError(f"cannot read {file}: {error or 'nested too deeply'}") from error
    if not isinstance(value, dict):
        raise RecordError(f"{file} is {_short(value)}, expected a JSON object")
    return value


def _short(value):
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _names(kinds):
    words = {int: "an integer", float: "a number", str: "text", list: "a list", dict: "an object",
             type(None): "null"}
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    return " or ".join(words[kind] for kind in kinds if not (kind is int and float in kinds))
