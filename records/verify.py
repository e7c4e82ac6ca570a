"""Whether records are true:  python -m records verify PATH...

A PATH is the folder of a run, of an experiment, or one that holds such folders at any depth. Each run is recomputed
from its log.txt and source.txt (records.check); of an experiment also the ledger: every declared run is there, none
beside it, each with the hashes that the ledger noted when it ended, each arm with one source, one set of settings and
the command it declares, and the target reached under the track's rule where it claims that.

It believes nothing and executes nothing of a record. It cannot see a forgery that changes record.json, log.txt and
ledger alike: against that there is the history of the repository, and running it again (`python -m records replay`).
"""
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from records import safe
from records.check import LARGEST, check_record
from records.check_experiment import check_experiment
from records.files import RecordError
from records.replay import read_record, source_of
from records.tracks import get_track

KNOWN = {"record.json", "log.txt", "log.txt.gz", "source.txt", "loss.png", "loss.svg", "profile.png",
         "README.md"}


@dataclass
class Report:
    """What was found in a run or experiment. path: Path.  problems: list of str, each naming file and line, empty where
    all of it is true.  notes: list of str, what could not be decided and what readers should know."""
    path: Path
    problems: list = field(default_factory=list)
    notes: list = field(default_factory=list)


def verify(path):
    """path: str or Path.  Returns the problems of all runs and experiments at or below it, each message beginning with
    the file's place below `path`: list of str, empty where every claim holds.  RecordError where there is no record."""
    return [problem for report in inspect(path) for problem in report.problems]


def inspect(path):
    """path: str or Path.  Returns list of Report, one for each run or experiment at or below it, sorted by name.

    Raises RecordError where there is none.
    """
    path, reports = Path(path), []
    for folder, children, files in os.walk(path):
        children.sort()
        if "experiment.json" in files or "record.json" in files:
            children.clear()
            check = check_experiment if "experiment.json" in files else _check_run
            place = Path(folder).relative_to(path).as_posix()
            report = Report(Path(folder))
            check(Path(folder), "" if place == "." else f"{place}/", report.problems, report.notes)
            reports.append(report)
    if not reports:
        raise RecordError(f"no record in {path}: expected a folder with record.json or experiment.json, or one that "
                          "holds such folders")
    return sorted(reports, key=lambda report: report.path)


def _check_run(folder, prefix, problems, notes):
    try:
        record = safe.read(folder, "record.json", LARGEST)
        log = safe.read_log(folder, "log.txt", LARGEST)
        source = safe.read(folder, "source.txt", LARGEST)
        safe.read_picture(folder, "profile.png", LARGEST)
        if source is None and folder.absolute().parent.name == "runs":      # a run of an experiment, on its own
            source = source_of(folder, read_record(folder))
    except (safe.Unsafe, RecordError) as error:
        problems.append(f"{prefix}{error}")
        return
    if log is None:
        problems.append(f"{prefix}log.txt: missing: nothing shows what the run printed")
        return
    names = [f"{prefix}{name}" for name in ("record.json", "log.txt", "source.txt")]
    problems += check_record(record, log, source, notes, names)
    if more := sorted(set(os.listdir(folder)) - KNOWN):
        notes.append(f"{prefix}{ascii(more[0])}: no file of a record, not looked at"
                     + f" (nor {len(more) - 1} more)" * (len(more) > 1))
    track = folder.absolute().parent.name
    if get_track(track) and not problems and f'"track": "{track}"'.encode() not in record:
        problems.append(f"{prefix}record.json, line 1: it lies in the folder of the track {track}, not in its own")


def add_arguments(parser):
    """Give the argparse parser of `python -m records verify` its arguments."""
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a run, an experiment, or a folder of them")
    parser.add_argument("-q", "--quiet", action="store_true", help="say only what is wrong")


def main(options):
    """Run the command. options: Namespace of add_arguments.  Returns 0, 1 where a claim does not hold, 2 where there is
    nothing to verify."""
    count, wrong = 0, 0
    try:
        for path in options.paths:
            for report in inspect(path):
                count, wrong = count + 1, wrong + bool(report.problems)
                if not options.quiet or report.problems:
                    print(f"{'NOT TRUE' if report.problems else 'verified'}  {_plain(report.path)}")
                for problem in report.problems:
                    print(f"    {_plain(problem)}")
                for note in () if options.quiet else report.notes:
                    print(f"    note: {_plain(note)}")
    except RecordError as error:
        print(f"records verify: {error}", file=sys.stderr)
        return 2
    print(f"{count} record{'s' * (count != 1)}, {wrong or 'none'} with claims that do not hold")
    return 1 if wrong else 0


def _plain(text):
    """Text that is safe to print: names of files may hold anything."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(text))
