"""Carries out the schedule of a ledger: a process at a time on every slot, until all have run or something stops it."""
import os
import sys
import time
from pathlib import Path

from records import arms as arms_module
from records import processes
from records.live import Display, seeds
from records.source import sha256
from records.stats import sequential

POLL_SECONDS = 0.1
TAIL = 12       # lines of output shown of a run that failed
NOT_INHERITED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
# why an experiment stopped before its end
TIME, FAILURE, SOURCE, SIGNAL = "time limit", "failed run", "changed source", "signal"


class Runner:
    """ledger: Ledger.  arms: list of Arm with folders.  repository: Path.  stop: processes.Stop.  time_limit: seconds
    after which no run should be under way, or None.  keep_going: whether to go on after a failed run.
    retry_failed: whether to run those again that failed before.  display: records.live.Display, made if None."""

    def __init__(self, ledger, arms, repository, stop, *, time_limit=None, keep_going=False, retry_failed=False,
                 display=None):
        self.ledger, self.repository, self.stop = ledger, repository, stop
        self.arms = {arm.label: arm for arm in arms}
        self.time_limit, self.keep_going = time_limit, keep_going
        self.display = display or Display(ledger)
        self._began = time.monotonic()
        settled = ledger.settled(retry_failed)
        self._todo = [run for run in ledger.schedule if run["index"] not in settled]
        self._active = {}       # slot -> (process, entries of its runs, when it started)
        self._reason = None

    def run(self):
        """Returns None when the experiment is complete, else why it stopped: TIME, FAILURE, SOURCE or SIGNAL."""
        try:
            self._check_sure()
            while True:
                for slot, (process, _, _) in list(self._active.items()):
                    if process.poll() is not None:
                        self._finished(slot)
                if self.stop.number is not None:
                    self._reason = SIGNAL
                    return self._reason
                for slot in range(len(self.ledger.content["slots"])):
                    if slot not in self._active and self._reason is None:
                        self._start_next(slot)
                if not self._active:
                    if not self._todo and self._reason is None and not self._is_complete():
                        self._reason = FAILURE
                    return self._reason
                self.display.update([(entries, time.monotonic() - started)
                                     for _, entries, started in self._active.values()])
                time.sleep(POLL_SECONDS)
        finally:
            self.display.close()
            active, self._active = list(self._active.values()), {}
            if active:
                processes.end([process for process, _, _ in active])
                for _, entries, started in active:
                    self._end(entries, time.monotonic() - started, "interrupted",
                              self.stop.name or "the experiment ended early")

    def _is_complete(self):
        rule = self.ledger.content["question"]["sequential"]
        return rule is not None and rule["sure_after"] is not None \
            or self.ledger.settled() >= {run["index"] for run in self.ledger.schedule}

    def _start_next(self, slot):
        planned = self._next_runs(slot)
        if not planned:
            return
        if self.time_limit is not None:
            usual, gone = (self.ledger.median_wall_s() or 0.0) * len(planned), time.monotonic() - self._began
            if gone + usual > self.time_limit:
                self._reason = TIME
                what = "one takes" if len(planned) == 1 else f"the next {len(planned)} take"
                self.display.line(f"no further run: {what} some {usual:.0f} s, and {gone:.0f} s of "
                                  f"--time-limit {self.time_limit:g} are gone")
                return
        arm = self.arms[planned[0]["arm"]]
        changed = self.ledger.changed_source(arm.label, lambda path: _hash(arm.folder / path))
        if changed:
            self._reason = SOURCE
            self.display.line(f"no further run: files of arm {arm.label} are not what earlier runs had: "
                              f"{', '.join(changed)}; put them back, or begin a new experiment")
            return
        before = len(self.ledger.schedule) - len(self._todo) + 1
        self._todo = [run for run in self._todo if run not in planned]
        arms_module.refresh_links(arm, self.repository)
        entries, place = [], None
        for run in planned:
            entry, own = self.ledger.begin(run)
            entries.append(entry)
            place = place or own        # the process leaves all its runs in the first one's
        process = processes.start(self._command(arm, entries, place), cwd=arm.folder, output=place / "output.txt",
                                  environment=self._environment(slot))
        self._active[slot] = (process, entries, time.monotonic())
        where, last = self.ledger.content["slots"][slot]["gpu"], before + len(entries) - 1
        self.display.line(("run " if last == before else f"runs {before} to ") + f"{last} of "
                          f"{len(self.ledger.schedule)}: {arm.label} {seeds(entries)}"
                          + (f" on GPU {where}" if where is not None else ""))

    def _next_runs(self, slot):
        """What the next process on `slot` makes: the runs of a block that are still to do and have seeds that follow
        each other. List of dict of the schedule, empty where none is left."""
        def block(run):
            return run["arm"], (run["seed"] - self.ledger.content["first_seed"]) // self.ledger.block
        first = next((run for run in self._todo if run["slot"] == slot), None)
        together = [run for run in self._todo if first is not None and block(run) == block(first)]
        return [run for number, run in enumerate(together) if run["seed"] == first["seed"] + number]

    def _command(self, arm, entries, place):
        entry = entries[0]
        many = ["--runs", str(len(entries))] if self.ledger.block > 1 else []
        count = self.ledger.content["slots"][entry["slot"]]["processes"]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"] if count > 1 else []
        return [sys.executable, *launcher, *arm.command, "--records", str(place.absolute()),
                "--name", Path(entry["folder"]).name, "--seed", str(entry["seed"]), *many]

    def _environment(self, slot):
        """Its GPU, and a compile cache of its own: warm from run to run, and shared by no two at a time."""
        gpu = self.ledger.content["slots"][slot]["gpu"]
        environment = {key: value for key, value in os.environ.items() if key not in NOT_INHERITED}
        if gpu not in (None, "all"):
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        cache = Path(os.environ.get("TURBORUN_CACHE", Path.home() / ".cache" / "turborun")) / "compile"
        cache /= "cpu" if gpu is None else f"gpu-{gpu}"
        return environment | {"TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
                              "TRITON_CACHE_DIR": str(cache / "triton")}

    def _end(self, entries, wall, status, message):
        """Enter what a process left of its runs. One that it did not come to, after another went wrong, counts as
        interrupted: it will be run."""
        self.ledger.hand_out(self.ledger.place(entries[0]), entries, self.repository)
        whole = True
        for entry in entries:
            self.ledger.end(entry, repository=self.repository, wall_s=wall / len(entries),
                            status=status if whole else "interrupted", message=message)
            whole = whole and entry["status"] == "complete"

    def _finished(self, slot):
        process, entries, started = self._active.pop(slot)
        wall = time.monotonic() - started
        output = _tail(self.ledger.place(entries[0]) / "output.txt",
                       Path(self.arms[entries[0]["arm"]].command[0]).name)
        self._end(entries, wall, "interrupted" if self.stop.number is not None else None,
                  self.stop.name or f"exit status {process.returncode}")
        for number, entry in enumerate(entries):
            if entry["status"] != "complete":
                self._broke_off(entry, entries[number + 1 :], output)
                return
            run = self.display.run(entry)
            value = "" if run.final is None else f"{run.metric} {run.final:.5f}, "
            speed = "" if run.step_ms is None else f", {run.step_ms:.2f} ms a step"
            self.display.line(f"  {entry['arm']} {seeds([entry])}: {value}trained {run.train_time_s:.3f} s{speed} "
                              f"({wall / len(entries):.0f} s in all{self._left()})")
        self._check_sure()

    def _broke_off(self, entry, rest, output):
        """`entry` did not complete, so its process did not come to the runs in `rest`."""
        self.display.line(f"  {entry['arm']} {seeds([entry])} {entry['status']}: {entry['message']}; see "
                          f"{self.ledger.folder / entry['folder']}")
        if entry["status"] == "failed" or self.stop.number is None:     # or ended by somebody else
            for line in output:
                self.display.line(f"    {line}")
            if not self.keep_going:
                self._reason = self._reason or FAILURE
        if self.keep_going:
            again = {one["index"] for one in rest if one["status"] == "interrupted"}
            self._todo = [run for run in self.ledger.schedule if run in self._todo or run["index"] in again]

    def _left(self):
        usual = self.ledger.median_wall_s()
        if not self._todo or usual is None:
            return ""
        return f"; about {usual * len(self._todo) / len(self.ledger.content['slots']):.0f} s for the rest"

    def _check_sure(self):
        """With --until-sure: nothing more to do once the test is sure of every arm against the first."""
        rule = self.ledger.content["question"]["sequential"]
        if rule is None:
            return
        if rule["sure_after"] is None:
            rule["sure_after"] = sure_after(self.ledger, self.display.run)
            if rule["sure_after"] is not None:
                self.ledger.save()
                self.display.line(f"sure after {rule['sure_after']} runs an arm: no further ones")
        if rule["sure_after"] is not None:
            self._todo = []


def sure_after(ledger, read):
    """Pairs of runs after which the sequential test was sure that every arm differs from the first; None if it is not.

    read: function of a complete entry of the ledger that gives its Run. The i-th complete runs of two arms are a pair,
    in the order of their starts, up to the first run that is still under way. With several arms each is tested at
    alpha divided by their number (Bonferroni), which Holm's correction in the report is never stricter than.
    """
    settled, values = ledger.settled(), {label: [] for label in ledger.labels}
    for entry in ledger.runs:
        if entry["status"] == "complete" and (value := read(entry).final) is not None:
            values[entry["arm"]].append(value)
        elif entry["status"] == "interrupted" and entry["index"] not in settled:
            break
    first, *others = ledger.labels
    alpha = ledger.content["question"]["alpha"] / len(others)
    decided = []
    for label in others:
        try:
            decided.append(sequential(values[first], values[label], alpha).decided_at)
        except ValueError:      # no runs yet, or no spread
            return None
    return None if None in decided else max(decided)


def _hash(path):
    try:
        return sha256(path.read_bytes())
    except OSError:
        return None


def _tail(path, script):
    """The last lines of what a run printed: the script's own message where it has one, which torchrun buries."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return []
    return [line for line in lines if line.startswith(f"{script}: ")] or lines[-TAIL:]
