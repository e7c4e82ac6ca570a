"""The runs that a process makes: one, or many where starting takes longer than a run: an experiment of one arm.

Its folder is like one of `python -m records ab`: experiment.json, the ledger, declares every run before the first one
starts, and runs/ has a record of each. What is killed or fails stays in the ledger.
"""
import statistics
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from time import monotonic

from records.arms import Arm
from records.environment import Scrubber, command
from records.files import RecordError
from records.log import NAME, new_folder
from records.schedule import SCHEMA, Ledger, schedule
from records.tracks import DIRECTIONS, metric_of


class Series:
    """schedule: every run to make, in order (list of dict with index and seed).  ledger: records.schedule.Ledger, None
    for a single run, whose record lies in `root`, and with enabled=False (ranks other than 0)."""

    def __init__(self, root, *, track, name, target, runs, first_seed, script, repository, gpu=None, processes=1,
                 enabled=True):
        """Write the ledger and say where.

        root: folder of all records.  track, name: as of a Record; name is the arm's label too.  target: float or None.
        runs: how many.  first_seed: of the first run, further ones count on.  script, repository: Path.
        gpu: what the runs are on, such as "0" or "all", or None.  processes: that make a run together.
        Raises RecordError where `track` or `name` cannot name a folder, or the folder cannot be written.
        """
        self.repository, self.ledger, self._single = repository, None, (root, name)
        self.schedule = schedule([name], runs, 1, first_seed)
        if runs == 1 or not enabled:
            return
        for key, value in (("track", track), ("name", name)):
            if not NAME.fullmatch(value):
                raise RecordError(f"the {key} {value!r} cannot name a folder: expected letters, digits, '.', '_' "
                                  f"and '-', a letter or digit first; choose another with --{key}")
        words, started = command(script, repository), datetime.now(timezone.utc)
        metric = metric_of(track)
        content = {
            "schema": SCHEMA, "kind": "experiment", "track": track, "name": name,
            "started": started.isoformat(timespec="seconds"), "status": "running", "message": None,
            "command": [Scrubber(repository)(word) for word in words],
            "question": {"metric": metric, "direction": DIRECTIONS[metric], "target": target, "alpha": 0.05,
                         "runs": runs, "sequential": None},
            "arms": [Arm(name, words).as_json(Scrubber(repository))], "one_process": True,
            "slots": [{"gpu": gpu, "processes": processes}], "first_seed": first_seed,
            "schedule": self.schedule, "runs": [],
        }
        folder = new_folder(Path(root) / track, f"{started:%Y-%m-%d_%H%M%S}_{name}")
        self.ledger = Ledger(folder, content)
        self.ledger.save()
        print(f"{runs} runs, each with a record in {folder}", flush=True)

    @contextmanager
    def run(self, planned):
        """Around a run of the schedule: yields (folder to make its Record in, its name)."""
        if self.ledger is None:
            yield self._single
            return
        entry, place = self.ledger.begin(planned)
        began, message = monotonic(), None
        try:
            yield place, place.name
        except BaseException as error:
            message = f"{type(error).__name__}: {error}"
            raise
        finally:
            self.ledger.end(entry, repository=self.repository, wall_s=monotonic() - began, message=message)
            if message is not None:
                self._save(status="stopped", message=entry["message"])

    def finish(self, found):
        """All runs are made. found: dict, what they came to, for readers of the ledger."""
        if self.ledger is not None:
            self._save(status="complete", message=None, statistics=found)

    def _save(self, **changes):
        self.ledger.content |= changes
        self.ledger.save()
        running = self.ledger.folder / "running"
        if running.is_dir() and not any(running.iterdir()):
            running.rmdir()


@contextmanager
def failures_in(record, explain):
    """Around a run: the Record says what ends it.  explain: function of an exception that gives what a user can do
    about it (str), None for a mistake of ours, whose type and text are kept."""
    try:
        yield
    except Exception as error:
        with suppress(RecordError):     # a full disk may be what ended the run
            record.fail("failed", explain(error) or f"{type(error).__name__}: {error}")
        raise


def spread(values):
    """Mean, standard deviation (None of a single one) and range of a list of float: dict."""
    sd = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": sd, "min": min(values), "max": max(values)}
