"""The order of an experiment's runs, and experiment.json: the ledger of what was planned, what ran, and what came out.

The ledger is written whole before a run starts and after it ends, so that a kill at any moment leaves it true: a run
says "interrupted" from its start until it has ended otherwise, and is never taken out again; its retry is a new entry
with the same index.
"""
import json
import os
import shutil
import statistics
from datetime import datetime, timezone
from pathlib import Path

from records import processes
from records.environment import Scrubber
from records.files import RecordError, write_whole, writing
from records.runs import read_json
from records.source import sha256

SCHEMA = 1
LEDGER = "experiment.json"
OUTPUT_KEPT = 100_000       # bytes of the output of a run that left no record


def schedule(labels, runs, slots, first_seed, block=1):
    """Every run of an experiment, in the order of their starts.

    labels: of the arms (list of str).  runs: of each arm (int).  slots: how many run at a time (int).
    first_seed: int; seed first_seed + i is used once in each arm, on the same slot, one after the other. A slot goes
    through the arms forwards, then backwards (A B B A …), so that a drift in time hits all arms alike; odd slots begin
    backwards, so that arms share a moment.
    block: runs of an arm that follow each other there, instead of one, for a process to make them all; the last one of
    an arm may be smaller.
    Returns list of {"index", "arm", "seed", "slot"}.
    """
    planned = []
    for number in range(-(-runs // block)):
        slot = number % slots
        order = labels if (number // slots + slot) % 2 == 0 else labels[::-1]
        seeds = range(number * block, min(runs, (number + 1) * block))
        planned += [{"arm": label, "seed": first_seed + seed, "slot": slot} for label in order for seed in seeds]
    return [{"index": index, **run} for index, run in enumerate(planned)]


class Ledger:
    """experiment.json of `folder` (Path).  content: dict, as the file holds it."""

    def __init__(self, folder, content):
        self.folder, self.content = folder, content

    @classmethod
    def read(cls, folder):
        """The ledger in `folder`.  Raises RecordError where there is none or it is not one of this schema."""
        folder = Path(folder)
        content = read_json(folder / LEDGER, "expected the folder of an experiment, which `python -m records ab` makes")
        if content.get("schema") != SCHEMA or content.get("kind") != "experiment":
            raise RecordError(f"{folder / LEDGER}: schema {content.get('schema')!r}, expected {SCHEMA} "
                              "and kind 'experiment'")
        return cls(folder, content)

    def save(self):
        write_whole(self.folder / LEDGER, json.dumps(self.content, indent=1, allow_nan=False).encode() + b"\n")

    @property
    def labels(self):
        return [arm["label"] for arm in self.content["arms"]]

    @property
    def schedule(self):
        return self.content["schedule"]

    @property
    def runs(self):
        return self.content["runs"]

    @property
    def block(self):
        """Runs that one process makes, at most."""
        return self.content.get("block", 1)

    def arm(self, label):
        return next(arm for arm in self.content["arms"] if arm["label"] == label)

    def settled(self, retry_failed=False):
        """Schedule indices that need no further run: set of int."""
        done = ("complete",) if retry_failed else ("complete", "failed")
        return {run["index"] for run in self.runs if run["status"] in done}

    def median_wall_s(self):
        """Seconds that a complete run took from start to end, in the median; None before there is one."""
        seconds = [run["wall_s"] for run in self.runs if run["status"] == "complete" and run["wall_s"] is not None]
        return statistics.median(seconds) if seconds else None

    def begin(self, planned):
        """Enter a run that is about to start.  planned: of the schedule (dict).  Returns (entry, Path of the folder
        that it may write into)."""
        tries = sum(run["index"] == planned["index"] for run in self.runs)
        name = f"{planned['arm']}-{planned['index']}" + (f"-{tries + 1}" if tries else "")
        entry = {"index": planned["index"], "arm": planned["arm"], "seed": planned["seed"], "slot": planned["slot"],
                 "gpu": self.content["slots"][planned["slot"]]["gpu"], "folder": f"runs/{name}",
                 "status": "interrupted", "message": None,
                 "started": datetime.now(timezone.utc).isoformat(timespec="seconds"), "wall_s": None,
                 "record_sha256": None, "log_sha256": None, "source_sha256": None}
        self.runs.append(entry)
        self.save()
        place = self.place(entry)
        with writing(place):
            place.mkdir(parents=True)
        return entry, place

    def place(self, entry):
        """The folder that a run writes into while it runs."""
        return self.folder / "running" / Path(entry["folder"]).name

    def hand_out(self, place, entries, repository):
        """What a process that made several runs left in `place` (Path), a series (records.series), to the places of
        its runs: of those `entries` of the ledger that have their seeds."""
        for file in sorted(place.glob(f"*/*/{LEDGER}")):
            series = Ledger.read(file.parent)
            series.adopt(repository)
            for made in series.runs:
                entry = next((entry for entry in entries if entry["seed"] == made["seed"]), None)
                record, packed = series.folder / made["folder"], made["source_sha256"]
                if entry is None or not (record / "record.json").is_file():
                    continue
                target = self.place(entry) / "made" / record.name
                with writing(target):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(record, target)
                    if packed is not None:
                        shutil.copyfile(series.folder / "sources" / f"{packed[:16]}.txt", target / "source.txt")

    def end(self, entry, *, repository, wall_s=None, status=None, message=None):
        """Move what a run left from running/ to runs/, its source to sources/, and enter what came out.

        status: of a run that left no record, None for "failed".  message: why it ended, or None.  wall_s: seconds it
        took, None where nobody saw its end.  repository: Path, whose name is kept out of what is written.
        """
        place, final = self.place(entry), self.folder / entry["folder"]
        record = self._collect(place, final, Scrubber(repository))
        if record is None:
            found, why = status or "failed", "it left no record"
        else:
            found, why = self._judge(entry, record)
        entry["status"] = found     # of a run that was interrupted too: it may have just ended
        reasons = [] if entry["status"] == "complete" else [text for text in (why, message) if text]
        entry["message"] = "; ".join(reasons) or None
        entry["wall_s"] = None if wall_s is None else round(wall_s, 1)
        for key, name in (("record_sha256", "record.json"), ("log_sha256", "log.txt")):
            entry[key] = sha256((final / name).read_bytes()) if (final / name).is_file() else None
        if (final / "source.txt").is_file():
            entry["source_sha256"] = self._file_source(final / "source.txt")
        arm = self.arm(entry["arm"])
        if entry["status"] == "complete" and arm["source_sha256"] is None:
            arm["source_sha256"] = entry["source_sha256"]
        self.save()

    def _collect(self, place, final, scrub):
        """Move the record, or the output of a run that left none; returns record.json (dict) or None."""
        with writing(final):
            final.parent.mkdir(parents=True, exist_ok=True)
            found = sorted(path.parent for path in place.glob("*/*/record.json"))
            if not final.exists():
                if found:
                    os.replace(found[0], final)
                else:
                    final.mkdir()
            for drawing in ("loss.png", "loss.svg"):    # the experiment has one of all runs
                (final / drawing).unlink(missing_ok=True)
            if not (final / "record.json").is_file():
                output = place / "output.txt"
                kept = output.read_bytes()[-OUTPUT_KEPT:].decode(errors="replace") if output.is_file() else ""
                write_whole(final / "output.txt", scrub(kept).encode())
            shutil.rmtree(place, ignore_errors=True)
        file = final / "record.json"
        return read_json(file, "expected the record of a run") if file.is_file() else None

    def _judge(self, entry, record):
        """(status, message) of a run that left `record`."""
        if record.get("status") != "complete":
            return record.get("status") if record.get("status") in ("failed", "interrupted") else "failed", \
                record.get("message")
        for key, expected in (("seed", entry["seed"]), ("track", self.content["track"]),
                              ("target", self.content["question"]["target"])):
            if record.get(key) != expected:
                return "failed", f"its record has the {key} {record.get(key)!r}, expected {expected!r}"
        if changed := self.changed_source(entry["arm"], record.get("source") or {}):
            return "failed", f"its source is not that of earlier runs: {', '.join(changed)}"
        return "complete", None

    def changed_source(self, label, source):
        """Names of files whose content differs from what earlier runs of the same tree had (those of every arm that
        runs from the same working tree or commit): list of str.

        source: dict of path -> SHA-256 of the file, or a function of the path that gives it.
        """
        def tree(label):
            return [self.arm(label)[key] for key in ("rev", "commit", "patch_sha256")]
        had = {}
        for run in self.runs:
            if run["status"] == "complete" and tree(run["arm"]) == tree(label):
                file = self.folder / run["folder"] / "record.json"
                had |= read_json(file, "it belongs to the experiment").get("source") or {}
        now = source if callable(source) else lambda path: source.get(path, had[path])
        return sorted(path for path in had if now(path) != had[path])

    def _file_source(self, file):
        """Move a source.txt to sources/, where each content is once; returns its SHA-256."""
        digest = sha256(file.read_bytes())
        kept = self.folder / "sources" / f"{digest[:16]}.txt"
        with writing(kept):
            kept.parent.mkdir(exist_ok=True)
            if kept.exists():
                file.unlink()
            else:
                os.replace(file, kept)
        return digest

    def adopt(self, repository):
        """After a kill: end what still runs, and enter what the interrupted runs left.  Returns their number."""
        left = [run for run in self.runs if run["status"] == "interrupted" and run["record_sha256"] is None
                and (self.place(run).exists() or not (self.folder / run["folder"] / "output.txt").exists())]
        for entry in left:
            processes.end_those_with(str(self.place(entry)))
        for entry in left:
            self.hand_out(self.place(entry), [other for other in left if other["arm"] == entry["arm"]], repository)
        for entry in left:
            self.end(entry, repository=repository, status="interrupted", message="the experiment was killed")
        return len(left)
