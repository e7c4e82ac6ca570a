"""The record a run writes while it trains: `<root>/<track>/<YYYY-MM-DD_HHMMSS>_<name>/`, time in UTC, with

    record.json   what the run was and what it reached; replaced as a whole at every validation
    log.txt       a block of `key: JSON` lines that describe the run, a line of =, then every line as printed
    source.txt    the code that ran, byte for byte (see records.source)
    loss.png      the loss curve, drawn at the end; profile.png where steps were profiled. A run of an experiment has no
                  loss.png: the experiment has one of all runs

The status on disk is "interrupted" until finish() or fail() replaces it, so that a killed run leaves a true record.
record.json then also has the SHA-256 of log.txt; `python -m records verify` holds the three files against each other.
"""
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
import weakref
from datetime import datetime, timezone
from pathlib import Path

from records import environment, plot, wandb_log
from records.files import RecordError, write_whole, writing
from records.signals import end_on_signal
from records.source import local_source, pack_source, sha256, unpack_source
from records.summary import summary
from records.tracks import DIRECTIONS, metric_of

__all__ = ["Record", "RecordError", "end_on_signal", "parse_log", "unpack_source"]

SCHEMA = 2      # 1: no log_sha256, no values in the result line, always val_loss
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
SEPARATOR = "=" * 100           # ends the block at the top of log.txt
LATER = ("data", "source", "result")    # `key: JSON` lines that may follow it
LINE_SECONDS = 2.0              # least time between two plain progress lines
REDRAW_SECONDS = 0.1            # and between two redrawings of the one on a terminal
RESULT = ("status", "message", "steps", "train_time_s", "peak_memory_bytes", "extra")      # in the line at the end
COUNT = "[0-9]{1,15}"
VALIDATION = re.compile(rf"step:({COUNT})/({COUNT}) (val_loss|accuracy):(\S+) train_time:({COUNT})ms step_avg:(\S+)ms "
                        rf"tokens:({COUNT})")
CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")  # would act on whoever reads the log
RESERVED = re.compile(r"^(?=step:|(?:data|source|result): \{)", re.MULTILINE)    # how the record's own lines begin


class Record:
    """One run's record. With enabled=False (ranks other than 0) every method does nothing.

    folder: Path of the record, None when not enabled.
    """

    def __init__(self, root, *, track, name, target, steps, seed, config, script, repository, device=None,
                 enabled=True, wandb=None):
        """Create the folder and write what is known before training.

        root: folder of all records (str or Path).  track, name: letters, digits, dots, underscores, dashes.
        The track decides whether the run is measured by "val_loss" (lower is better) or "accuracy" (higher is).
        target: value of that metric to reach (float), or None.  steps: optimizer steps planned.  seed: int.
        config: dict of the run's settings.  script: Path of the script.  repository: Path of the repository.
        device: what the run computes on, such as "cuda:0" or "cpu"; None means CUDA where torch finds it.
        wandb: name of the group in Weights & Biases, or None to leave Weights & Biases alone.
        Raises RecordError where `track` or `name` cannot name a folder, or the folder cannot be written.
        """
        self.enabled, self.folder = enabled, None
        if not enabled:
            return
        for key, value in (("track", track), ("name", name)):
            if not NAME.fullmatch(value):
                raise RecordError(f"the {key} {value!r} cannot name a folder: expected letters, digits, '.', '_' "
                                  f"and '-', a letter or digit first; choose another with --{key}")
        self._repository, self._script = Path(repository), Path(script)
        self._metric, self._experiment = metric_of(track), experiment_of(Path(root))
        self._scrub = environment.Scrubber(self._repository)
        self._sources = local_source(self._repository, self._script)
        self._terminal, self._redrawing = sys.stdout.isatty(), False
        self._last_line = self._last_redraw = -math.inf
        started = datetime.now(timezone.utc)
        # What is known now comes first, what the run finds out after it; _begin_log writes the first part to log.txt.
        description = {
            "schema": SCHEMA, "track": track, "name": name, "target": target, "steps_planned": steps, "seed": seed,
            "started": started.isoformat(timespec="seconds"),
            "command": self._plain(environment.command(self._script, self._repository)),
            "config": self._plain(config), "hardware": environment.hardware(device),
            "versions": environment.versions(), "git": environment.git(self._repository), "source": self._hashes(),
        }
        self._content = description | {
            "status": "interrupted", "message": None, "reached": None if target is None else False,
            "time_to_target_s": None, "train_time_s": 0.0, "steps": 0, "tokens": 0, self._metric: None,
            "validation": [], "data": {}, "peak_memory_bytes": None, "extra": {}, "log_sha256": None,
        }
        self.folder = new_folder(Path(root) / track, f"{started:%Y-%m-%d_%H%M%S}_{name}")
        self._save()
        write_whole(self.folder / "source.txt", pack_source(self._sources))
        block = _description_block(description)
        self._log_hash, self._ended = hashlib.sha256(block), False
        write_whole(self.folder / "log.txt", block)
        with writing(self.folder / "log.txt"):
            self._log = open(self.folder / "log.txt", "ab", buffering=0)
        weakref.finalize(self, self._log.close)     # lines may still come after the end
        self._wandb = None if wandb is None else wandb_log.start(wandb, self.folder.name, self._content, self.line)

    def data(self, files):
        """Add the data files of the run.  files: dict of file name -> SHA-256 of its content in hexadecimal."""
        if not self.enabled:
            return
        self._content["data"] |= self._plain(files)
        self._append(_fact("data", self._content["data"]), sync=True)
        self._save()

    def line(self, text="", *, console=True):
        """Write one line of text (str) to log.txt and, with console=True, to standard output.

        In log.txt a line that looks like one of the record's own begins with a space.
        """
        if not self.enabled:
            return
        self._append(RESERVED.sub(" ", text))
        if console:
            self._print(text)

    def progress(self, step, train_seconds):
        """Show how far training is; call it as often as every step.

        On a terminal one line rewrites itself and shows the time left; log.txt, and any other output, get a plain line
        at most every two seconds.  step: steps done (int).  train_seconds: time trained, validation excluded (float).
        """
        if not self.enabled:
            return
        self._content["steps"], self._content["train_time_s"] = step, _to_milliseconds(train_seconds) / 1000
        now = time.monotonic()
        if self._terminal and now - self._last_redraw >= REDRAW_SECONDS:
            left = (self._content["steps_planned"] - step) * train_seconds / max(step, 1)
            text = f"{self._step_text()} {self._time_text()} ETA {_clock(left)}"
            sys.stdout.write("\r\033[K" + text[:shutil.get_terminal_size().columns - 1])
            sys.stdout.flush()
            self._redrawing, self._last_redraw = True, now
        if now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            text = f"{self._step_text()} {self._time_text()}"
            self._append(text)
            if not self._terminal:
                self._print(text)

    def validation(self, step, value, train_seconds, tokens):
        """Add a point to the curve; it is on disk, in log.txt and record.json, before it is printed.

        step: steps done (int).  value: of the track's metric (float); one that is not finite makes the run "failed".
        train_seconds: time trained, validation excluded (float).  tokens: training tokens seen (int).
        """
        if not self.enabled:
            return
        content, value = self._content, float(value)
        content["steps"], content["train_time_s"] = step, _to_milliseconds(train_seconds) / 1000
        content["tokens"], content[self._metric] = tokens, value if math.isfinite(value) else None
        content["validation"].append({"step": step, "tokens": tokens, "train_time_s": content["train_time_s"],
                                      self._metric: content[self._metric]})
        if not math.isfinite(value):
            content["status"], content["message"] = "failed", not_finite(self._metric, value, step)
        elif content["target"] is not None and not content["reached"] and reaches(self._metric, value,
                                                                                  content["target"]):
            content["reached"], content["time_to_target_s"] = True, content["train_time_s"]
        text = f"{self._step_text()} {self._metric}:{value:.6f} {self._time_text()} tokens:{tokens}"
        self._append(text, sync=True)
        self._save()
        self._print(text)
        if self._wandb:
            self._wandb.point(content["validation"][-1])

    def finish(self, *, peak_memory_bytes=None, extra={}):
        """End the record: status "complete" (or "failed" after a validation loss that is not finite), the summary
        printed, loss.png (but of a run of an experiment) and, of a profile in `extra`, profile.png drawn.

        peak_memory_bytes: int or None.  extra: dict of further results, shown in the summary.
        Returns the summary (str), empty when not enabled.
        """
        if not self.enabled:
            return ""
        if self._content["status"] == "interrupted":
            self._content["status"] = "complete"
        self._content["peak_memory_bytes"], self._content["extra"] = peak_memory_bytes, self._plain(extra)
        text = summary(self._content, self._place())
        self._close(text)
        self._draw()
        if self._wandb:
            self._wandb.finish(self._content)
        return text

    def fail(self, status, message):
        """End the record of a run that did not finish.  status: "failed" or "interrupted".  message: why (str)."""
        if status not in ("failed", "interrupted"):
            raise ValueError(f"status {status!r}: expected 'failed' or 'interrupted'")
        if not self.enabled:
            return
        self._content["status"], self._content["message"] = status, self._scrub(message)
        self._close(f"{status}: {message}")
        if self._wandb:
            self._wandb.finish(self._content)

    # -- what is written -----------------------------------------------------------------------------------------

    def _close(self, last):
        """Write the result, the source of modules that were imported since the run began, and the text `last`."""
        late = local_source(self._repository, self._script)
        if not late.keys() <= self._sources.keys():
            self._sources = late | self._sources        # what was read at the start stays
            write_whole(self.folder / "source.txt", pack_source(self._sources))
            self._content["source"] = self._hashes()
            self._append(_fact("source", self._content["source"]))
        result = {key: self._content[key] for key in RESULT}
        values = [point[self._metric] for point in self._content["validation"]]     # with all their digits
        self._append(_fact("result", result | {"values": values}))
        self._ended = True      # from here on every line renews log_sha256
        self.line(last)

    def _save(self):
        write_whole(self.folder / "record.json", record_bytes(self._content))

    def _append(self, text, sync=False):
        with writing(self.folder / "log.txt"):
            line = CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), self._scrub(text))
            line = line.encode(errors="backslashreplace") + b"\n"
            self._log.write(line)
            self._log_hash.update(line)
            if sync or self._ended:
                os.fsync(self._log.fileno())
        if self._ended:
            self._content["log_sha256"] = self._log_hash.hexdigest()
            self._save()

    def _print(self, text):
        if self._redrawing:
            sys.stdout.write("\r\033[K")
            self._redrawing = False
        print(text, flush=True)

    def _draw(self):
        try:
            if self._experiment is None:
                plot.loss_curve(self.folder)
            plot.step_bars(self.folder)
        except ImportError as error:
            self.line(f"loss.png was not drawn ({error}); once matplotlib is installed: "
                      f"python -m records.plot {self._place()}")

    def _hashes(self):
        return {path: sha256(content) for path, content in self._sources.items()}

    def _plain(self, value):
        """`value` as strict JSON can hold it, without absolute paths: NaN becomes null, infinity a string."""
        if isinstance(value, dict):
            return {self._plain(str(key)): self._plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._plain(item) for item in value]
        if hasattr(value, "item"):      # a number of numpy or torch
            value = value.item()
        if isinstance(value, float) and not math.isfinite(value):
            return None if math.isnan(value) else str(value)
        if value is None or isinstance(value, (bool, int, float)):
            return value
        return self._scrub(str(value))

    # -- what is printed -----------------------------------------------------------------------------------------

    def _step_text(self):
        return f"step:{self._content['steps']}/{self._content['steps_planned']}"

    def _time_text(self):
        milliseconds = _to_milliseconds(self._content["train_time_s"])
        return f"train_time:{milliseconds}ms step_avg:{milliseconds / max(self._content['steps'], 1):.2f}ms"

    def _place(self):
        """The folder as the user would type it here; of a run of an experiment the one it will have there."""
        folder = (self._experiment or self.folder).absolute()
        return str(folder.relative_to(Path.cwd())) if folder.is_relative_to(Path.cwd()) else str(folder)


def parse_log(text):
    """Read back what a log.txt says.  text: str.

    Returns (facts, curve). facts: dict of the description at the top, plus `data` and `result` where the log has them.
    curve: list of {step, tokens, train_time_s, val_loss or accuracy}, the latter with six decimals and None where it
    is not finite.
    Raises ValueError where the description is missing.
    """
    head, separator, body = text.partition(f"\n{SEPARATOR}\n")
    if not separator:
        raise ValueError(f"the log has no line of {len(SEPARATOR)} '=' after the description of the run: "
                         "expected the log.txt of a record")
    facts = {key: json.loads(value) for key, _, value in (line.partition(": ") for line in head.split("\n"))}
    curve = []
    for line in body.split("\n"):
        key, _, value = line.partition(": ")
        if key in LATER and value.startswith("{"):
            facts[key] = json.loads(value)
        elif match := VALIDATION.fullmatch(line):
            value = float(match[4])
            curve.append({"step": int(match[1]), "tokens": int(match[7]), "train_time_s": int(match[5]) / 1000,
                          match[3]: value if math.isfinite(value) else None})
    return facts, curve


def reaches(metric, value, target):
    """Whether `value` of "val_loss" or "accuracy" is at or beyond `target` (float)."""
    return value <= target if DIRECTIONS[metric] == "down" else value >= target


def not_finite(metric, value, step):
    """The message of a record whose metric was NaN or infinite (float) at `step` (int)."""
    return f"the {'validation loss' if metric == 'val_loss' else metric} is {value} at step {step}"


def record_bytes(content):
    """content: dict.  Returns the bytes of its record.json."""
    return json.dumps(content, indent=1, allow_nan=False).encode() + b"\n"


def experiment_of(root):
    """root: the folder of all records (Path).  Returns the Path that a run which leaves its record there has in the end
    in the experiment that made the folder for it (records.schedule), None where none did."""
    running = root.parent
    known = running.name == "running" and (running.parent / "experiment.json").is_file()
    return running.parent / "runs" / root.name if known else None


def new_folder(parent, name):
    """Create `parent`/`name`, with _2, _3 … where that exists; returns its Path."""
    with writing(parent):
        os.makedirs(parent, exist_ok=True)
        count = 1
        while True:
            folder = parent / (name if count == 1 else f"{name}_{count}")
            try:
                os.mkdir(folder)
                return folder
            except FileExistsError:
                count += 1


def _description_block(description):
    lines = []
    for key, value in description.items():
        if key == "git":    # the difference itself may be long: it is in record.json, here is its hash
            diff = value["diff"]
            value = {"commit": value["commit"], "dirty": value["dirty"],
                     "diff_sha256": None if diff is None else sha256(diff.encode())}
        lines.append(_fact(key, value))
    return "\n".join([*lines, SEPARATOR, ""]).encode()


def _fact(key, value):
    return f"{key}: {json.dumps(value, allow_nan=False)}"


def _to_milliseconds(seconds):
    """Whole milliseconds: what a line shows is what record.json holds."""
    return round(1000 * seconds)


def _clock(seconds):
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
