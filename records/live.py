"""What an experiment shows while it goes: a table that rewrites itself on a terminal, plain lines anywhere else."""
import os
import re
import shutil
import statistics
import sys
import time
from contextlib import suppress

from records.runs import read_run

REDRAW_SECONDS = 0.5
STEP = re.compile(rb"^step:\d+/\d+ [^\n]*$", re.MULTILINE)


class Display:
    """ledger: records.schedule.Ledger.  stream: where to write; a terminal gets the table."""

    def __init__(self, ledger, stream=None):
        self._ledger, self._stream = ledger, stream or sys.stdout
        self._terminal, self._height, self._drawn = self._stream.isatty(), 0, 0.0
        self._read = {}

    def line(self, text):
        """Print a line that stays."""
        self._clear()
        print(text, file=self._stream, flush=True)
        self._drawn = 0.0

    def update(self, running):
        """Redraw the table where there is a terminal; call it as often as you like.

        running: list of (entries of the ledger that a process makes, seconds since it started).
        """
        if not self._terminal or time.monotonic() - self._drawn < REDRAW_SECONDS:
            return
        width = shutil.get_terminal_size().columns - 1
        lines = [line[:width] for line in [*self.table(), *(self._progress(*each) for each in running)]]
        self._clear()
        self._stream.write("\n".join(lines) + "\n")
        self._stream.flush()
        self._height, self._drawn = len(lines), time.monotonic()

    def close(self):
        """Take the table away."""
        self._clear()
        self._stream.flush()

    def table(self):
        """The state of every arm as lines of text: list of str."""
        ledger = self._ledger
        metric, planned = ledger.content["question"]["metric"], ledger.content["question"]["runs"]
        rows = [("arm", "runs", metric, "a step", "train time", "")]
        for label in ledger.labels:
            entries = [run for run in ledger.runs if run["arm"] == label]
            runs = [self.run(entry) for entry in entries if entry["status"] == "complete"]
            others = [f"{count} {status}" for status in ("failed", "interrupted")
                      if (count := sum(entry["status"] == status and entry["record_sha256"] is not None
                                       for entry in entries))]
            rows.append((label, f"{len(runs)} of {planned}", mean_sd([run.final for run in runs], ".5f"),
                         mean_sd([run.step_ms for run in runs], ".2f", " ms"),
                         mean_sd([run.train_time_s for run in runs], ".2f", " s"), ", ".join(others)))
        widths = [max(map(len, column)) for column in zip(*rows)]
        return ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows]

    def run(self, entry):
        """The Run of a complete entry of the ledger."""
        if entry["folder"] not in self._read:
            self._read[entry["folder"]] = read_run(self._ledger.folder / entry["folder"])
        return self._read[entry["folder"]]

    def _progress(self, entries, seconds):
        place, step = self._ledger.place(entries[0]), None
        done = len(list(place.glob("*/*/runs/*/record.json")))      # of a process that makes several
        for log in place.glob("*/*/running/*/*/*/log.txt" if len(entries) > 1 else "*/*/log.txt"):
            with suppress(FileNotFoundError), open(log, "rb") as file:      # its run may have just ended
                file.seek(max(0, file.seek(0, os.SEEK_END) - 1000))
                found = STEP.findall(file.read())
                step = found[-1].decode(errors="replace") if found else step
        known = [f"{done} of {len(entries)} runs"] * (done > 0) + [step] * (step is not None)
        return f"> {entries[0]['arm']} {seeds(entries)}, {seconds:.0f} s: {', '.join(known) or 'starting'}"

    def _clear(self):
        if self._height:
            self._stream.write(f"\033[{self._height}F\033[J")
            self._height = 0


def seeds(entries):
    """"seed 3", or "seeds 0 to 9" of several runs of an arm that follow each other."""
    first, last = entries[0]["seed"], entries[-1]["seed"]
    return f"seed {first}" if first == last else f"seeds {first} to {last}"


def mean_sd(values, form, unit=""):
    """"3.43100 ± 0.00120 s" of a list of float or None; without a ± for one value, empty for none."""
    values = [value for value in values if value is not None]
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{deviation}{unit}"
