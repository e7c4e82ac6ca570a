"""The record a run writes while it trains: `<root>/<track>/<YYYY-MM-DD_HHMMSS>_<name>/`, time in UTC, with

    record.json   what the run was and what it reached; replaced as a whole at every validation
    log.txt       a block of `key: JSON` lines that describe the run, a line of =, then every line as printed
    source.txt    the code that ran, byte for byte (see records.source)
    loss.png      the loss curve, drawn at the end

The status on disk is "interrupted" until finish() or fail() replaces it, so that a killed run leaves a true record.
"""
import json
import math
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from datetime import datetime, timezone
from pathlib import Path

from records import environment
from records.files import RecordError, write_whole, writing
from records.source import local_source, pack_source, sha256, unpack_source

__all__ = ["Record", "RecordError", "end_on_signal", "parse_log", "unpack_source"]

SCHEMA = 1
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
SEPARATOR = "=" * 100           # ends the block at the top of log.txt
LATER = ("data", "source", "result")    # `key: JSON` lines that may follow it
LINE_SECONDS = 2.0              # least time between two plain progress lines
REDRAW_SECONDS = 0.1            # and between two redrawings of the one on a terminal
VALIDATION = re.compile(r"step:(\d+)/\d+ val_loss:(\S+) train_time:(\d+)ms step_avg:\S+ms tokens:(\d+)")


class Record:
    """One run's record. With enabled=False (ranks other than 0) every method does nothing.

    folder: Path of the record, None when not enabled.
    """

    def __init__(self, root, *, track, name, target, steps, seed, config, script, repository, device=None,
                 enabled=True):
        """Create the folder and write what is known before training.

        root: folder of all records (str or Path).  track, name: letters, digits, dots, underscores, dashes.
        target: validation loss to reach (float), or None.  steps: optimizer steps planned.  seed: int.
        config: dict of the run's settings.  script: Path of the script.  repository: Path of the repository.
        device: what the run computes on, such as "cuda:0" or "cpu"; None means CUDA where torch finds it.
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
            "time_to_target_s": None, "train_time_s": 0.0, "steps": 0, "tokens": 0, "val_loss": None, "validation": [],
            "data": {}, "peak_memory_bytes": None, "extra": {},
        }
        self.folder = _new_folder(Path(root) / track, f"{started:%Y-%m-%d_%H%M%S}_{name}")
        self._save()
        write_whole(self.folder / "source.txt", pack_source(self._sources))
        write_whole(self.folder / "log.txt", _description_block(description))
        with writing(self.folder / "log.txt"):
            self._log = open(self.folder / "log.txt", "ab", buffering=0)

    def data(self, files):
        """Add the data files of the run.  files: dict of file name -> SHA-256 of its content in hexadecimal."""
        if not self.enabled:
            return
        self._content["data"] |= self._plain(files)
        self._append(_fact("data", self._content["data"]), sync=True)
        self._save()

    def line(self, text="", *, console=True):
        """Write one line of text (str) to log.txt and, with console=True, to standard output."""
        if not self.enabled:
            return
        self._append(text)
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
            self.line(f"{self._step_text()} {self._time_text()}", console=not self._terminal)

    def validation(self, step, loss, train_seconds, tokens):
        """Add a point to the loss curve; it is on disk, in log.txt and record.json, before it is printed.

        step: steps done (int).  loss: validation loss (float); one that is not finite makes the run "failed".
        train_seconds: time trained, validation excluded (float).  tokens: training tokens seen (int).
        """
        if not self.enabled:
            return
        content, loss = self._content, float(loss)
        content["steps"], content["train_time_s"] = step, _to_milliseconds(train_seconds) / 1000
        content["tokens"], content["val_loss"] = tokens, loss if math.isfinite(loss) else None
        content["validation"].append({"step": step, "tokens": tokens, "train_time_s": content["train_time_s"],
                                      "val_loss": content["val_loss"]})
        if not math.isfinite(loss):
            content["status"], content["message"] = "failed", f"the validation loss is {loss} at step {step}"
        elif content["target"] is not None and not content["reached"] and loss <= content["target"]:
            content["reached"], content["time_to_target_s"] = True, content["train_time_s"]
        text = f"{self._step_text()} val_loss:{loss:.6f} {self._time_text()} tokens:{tokens}"
        self._append(text, sync=True)
        self._save()
        self._print(text)

    def finish(self, *, peak_memory_bytes=None, extra={}):
        """End the record: status "complete" (or "failed" after a validation loss that is not finite), the summary
        printed, loss.png drawn.

        peak_memory_bytes: int or None.  extra: dict of further results, shown in the summary.
        Returns the summary (str), empty when not enabled.
        """
        if not self.enabled:
            return ""
        if self._content["status"] == "interrupted":
            self._content["status"] = "complete"
        self._content["peak_memory_bytes"], self._content["extra"] = peak_memory_bytes, self._plain(extra)
        self._close()
        summary = self._summary()
        self.line(summary)
        self._draw()
        return summary

    def fail(self, status, message):
        """End the record of a run that did not finish.  status: "failed" or "interrupted".  message: why (str)."""
        if status not in ("failed", "interrupted"):
            raise ValueError(f"status {status!r}: expected 'failed' or 'interrupted'")
        if not self.enabled:
            return
        self._content["status"], self._content["message"] = status, self._scrub(message)
        self._close()
        self.line(f"{status}: {message}")

    # -- what is written -----------------------------------------------------------------------------------------

    def _close(self):
        """Write the result, and the source of modules that were imported since the run began."""
        late = local_source(self._repository, self._script)
        if not late.keys() <= self._sources.keys():
            self._sources = late | self._sources        # what was read at the start stays
            write_whole(self.folder / "source.txt", pack_source(self._sources))
            self._content["source"] = self._hashes()
            self._append(_fact("source", self._content["source"]))
        keys = ("status", "message", "steps", "train_time_s", "peak_memory_bytes", "extra")
        self._append(_fact("result", {key: self._content[key] for key in keys}), sync=True)
        self._save()

    def _save(self):
        text = json.dumps(self._content, indent=1, allow_nan=False)
        write_whole(self.folder / "record.json", text.encode() + b"\n")

    def _append(self, text, sync=False):
        with writing(self.folder / "log.txt"):
            self._log.write(self._scrub(text).encode(errors="backslashreplace") + b"\n")
            if sync:
                os.fsync(self._log.fileno())

    def _print(self, text):
        if self._redrawing:
            sys.stdout.write("\r\033[K")
            self._redrawing = False
        print(text, flush=True)

    def _draw(self):
        try:
            from records.plot import loss_curve
            loss_curve(self.folder)
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

    def _summary(self):
        content = self._content
        seconds, steps, points = content["train_time_s"], content["steps"], content["validation"]
        loss = "none measured" if not points else "not finite" if content["val_loss"] is None else \
            f"{content['val_loss']:.5f}"
        rows = {"run": f"{content['track']} {content['name']}", "validation loss": loss}
        if content["target"] is not None:
            rows["target"] = f"{content['target']:g}, " + (
                f"reached after {content['time_to_target_s']:.3f} s" if content["reached"] else "not reached")
        rows["train time"] = f"{seconds:.3f} s"
        rows["steps"] = f"{steps} of {content['steps_planned']}, {1000 * seconds / max(steps, 1):.2f} ms each"
        if points and points[-1]["train_time_s"] > 0:
            rows["tokens"] = f"{content['tokens']:,}, {content['tokens'] / points[-1]['train_time_s']:,.0f} per second"
        if content["peak_memory_bytes"] is not None:
            rows["peak memory"] = f"{content['peak_memory_bytes'] / 2**30:.2f} GiB"
        rows |= {key: f"{value:.5f}" if isinstance(value, float) else str(value)
                 for key, value in content["extra"].items()}
        if content["status"] != "complete":
            rows["status"] = f"{content['status']}: {content['message']}"
        rows["record"] = self._place()
        width = max(map(len, rows))
        rule = "-" * 80
        return "\n".join([rule, *(f"{key:{width}}  {value}" for key, value in rows.items()), rule])

    def _place(self):
        """The folder as the user would type it here."""
        folder = self.folder.absolute()
        return str(folder.relative_to(Path.cwd())) if folder.is_relative_to(Path.cwd()) else str(folder)


def parse_log(text):
    """Read back what a log.txt says.  text: str.

    Returns (facts, curve). facts: dict of the description at the top, plus `data` and `result` where the log has them.
    curve: list of {step, tokens, train_time_s, val_loss}, the loss with six decimals and None where it is not finite.
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
            loss = float(match[2])
            curve.append({"step": int(match[1]), "tokens": int(match[4]), "train_time_s": int(match[3]) / 1000,
                          "val_loss": loss if math.isfinite(loss) else None})
    return facts, curve


def end_on_signal(message=None):
    """Make SIGINT and SIGTERM end the process within a moment, with status 128 + signal number.

    Python's own handlers wait for the main thread to return to the interpreter, which it does not while it is inside a
    collective of NCCL or gloo. The C part of the handler writes to a socket all the same, and a thread reads that.

    message: printed to stderr; str, a function that returns it (and does not block), or None for nothing.
    Call it in the main thread (ValueError elsewhere). Nothing else of the process runs after the signal.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    ending = (signal.SIGINT, signal.SIGTERM)
    for number in ending:
        signal.signal(number, lambda number, frame: None)       # without a handler the socket is not written to
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

    def watch(writer=writer):       # holds the writing end, which would close when collected
        number = reader.recv(1)[0]
        while number not in ending:
            number = reader.recv(1)[0]
        try:
            text = message() if callable(message) else message
            if text:        # straight to the descriptor: the main thread may hold the lock of sys.stderr
                os.write(2, f"\n{text}\n".encode() if os.isatty(2) else f"{text}\n".encode())
        finally:
            os._exit(128 + number)

    threading.Thread(target=watch, name="end_on_signal", daemon=True).start()


def _new_folder(parent, name):
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
