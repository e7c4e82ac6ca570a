"""A record for others to read, of runs that were made:  python -m records submit PATH... --name NAME --what "..."

PATH is the folder of an experiment (`python -m records ab`), or runs that were made one by one: LABEL=PATH puts what is
at PATH into the arm LABEL, a PATH alone into the arm named after the record. Everything is verified first, the runs are
gathered into records/<track>/<time>_<name>/, and README.md there says what changed, what came out, on what hardware and
how to do it again.

A record either claims the target of its track, with --claim target: then one arm has to have reached it under the
track's rule, over all of its declared runs. Or it is an experiment: evidence about a difference, wherever its losses
end. README.md says which of the two in its first line.
"""
import gzip
import json
import os
import shutil
import sys
from pathlib import Path

from records import safe
from records.check import LARGEST
from records.check_experiment import rule_problems
from records.files import RecordError, write_whole, writing
from records.log import NAME
from records.readme import readme
from records.replay import source_of
from records.runs import find_runs, read_experiment, read_json
from records.source import sha256
from records.tracks import get_track
from records.verify import inspect

COMPRESSED_FROM = 10**6     # bytes of a log from which on it is kept as log.txt.gz
OF_A_RUN = ("--seed", "--name", "--records", "--runs", "--wandb")


def submit(paths, *, name, what, claim="experiment", arm=None, root="records"):
    """Gather, verify and describe runs.

    paths: list of str as in the command line.  name: of the record (str), None to keep an experiment's.  what: what
    changed (str).  claim: "target" or "experiment".  arm: label of the arm that claims the target, None for the only
    one.  root: folder of all records.
    Returns the Path of the record.  Raises RecordError naming what is wrong or missing; then nothing was written,
    except into the folder of an experiment that already lies where records lie.
    """
    root, what = Path(root), " ".join(what.split())
    if not what:
        raise RecordError('--what "…": say in a sentence what changed')
    if name is not None and not NAME.fullmatch(name):
        raise RecordError(f"the name {name!r} cannot name a folder: expected letters, digits, '.', '_' and '-'; choose "
                          "another with --name")
    experiment = Path(paths[0]) if len(paths) == 1 and (Path(paths[0]) / "experiment.json").is_file() else None
    if experiment is None and name is None:
        raise RecordError("--name NAME: these runs have no name in common")
    arms = None if experiment else _read_arms(paths, name)
    _verified([experiment] if experiment else [run.folder for runs in arms.values() for run in runs])
    ledger = read_json(experiment / "experiment.json", "") if experiment else _gathered(arms, name)
    if ledger["status"] != "complete":
        raise RecordError(f"{experiment} is not finished (status {ledger['status']}): all declared runs count. Go on "
                          f"with python -m records ab --resume {experiment}")
    ledger["name"] = name or ledger["name"]
    ledger["claim"] = _claim(ledger, claim, arm, experiment, arms)
    final = root / ledger["track"] / _folder_name(ledger)
    if experiment and experiment.resolve().parent == final.resolve().parent:
        _write(experiment, ledger, what)
        return experiment
    if final.exists():
        raise RecordError(f"{final} is there already; choose another --name")
    staging = final.parent / f".{final.name}"
    shutil.rmtree(staging, ignore_errors=True)
    with writing(staging):
        staging.mkdir(parents=True)
    try:
        if experiment:
            _copy_experiment(experiment, staging)
        else:
            _copy_runs([run for runs in arms.values() for run in runs], ledger, staging)
        _write(staging, ledger, what)
        with writing(final):
            os.replace(staging, final)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return final


def _read_arms(paths, name):
    texts = {}
    for path in paths:
        label, equals, rest = path.partition("=")
        if not equals or not NAME.fullmatch(label):
            label, rest = name, path
        texts.setdefault(label, []).extend(part for part in rest.split(",") if part)
    arms = {label: sorted(find_runs(found), key=lambda run: (str(run.record.get("started")), str(run.folder)))
            for label, found in texts.items()}
    tracks = sorted({run.track for runs in arms.values() for run in runs})
    if len(tracks) > 1:
        raise RecordError(f"the runs belong to several tracks: {', '.join(tracks)}; submit each on its own")
    for run in (run for runs in arms.values() for run in runs):
        if run.status == "interrupted":
            raise RecordError(f"{run.folder} was interrupted and shows nothing: leave it out, or run it again")
    return arms


def _verified(folders):
    """Raise RecordError unless all of them (list of Path) verify."""
    for folder in folders:
        for report in inspect(folder):
            if report.problems:
                more = f" (and {len(report.problems) - 1} more: python -m records verify {report.path})" \
                    if len(report.problems) > 1 else ""
                raise RecordError(f"{report.path} does not verify: {report.problems[0]}{more}")


def _gathered(arms, name):
    """The ledger of runs that were made one by one.  arms: dict of label -> list of Run.  Returns dict."""
    track = get_track(next(iter(arms.values()))[0].track)
    runs = [(label, run) for label, found in arms.items() for run in found]
    sources = {label: {sha256(packed) for run in found if (packed := source_of(run.folder, run.record)) is not None}
               for label, found in arms.items()}
    targets = {run.target for _, run in runs}
    if len(targets) > 1:
        raise RecordError(f"the runs have different targets: {', '.join(map(str, targets))}")
    counts = {len(found) for found in arms.values()}
    schedule = [{"index": index, "arm": label, "seed": run.seed if run.seed is not None else index, "slot": 0}
                for index, (label, run) in enumerate(runs)]
    return {
        "schema": 1, "kind": "experiment", "track": runs[0][1].track, "name": name,
        "started": min(run.record["started"] for _, run in runs), "status": "complete",
        "question": {"metric": runs[0][1].metric, "direction": runs[0][1].direction, "target": targets.pop(),
                     "alpha": 0.05, "runs": counts.pop() if len(counts) == 1 else None, "sequential": None,
                     "gathered": True, "rule": None if track is None or track.rule is None else str(track.rule)},
        "arms": [{"label": label, "command": _common_command([run.record["command"] for run in found]), "settings": {},
                  "commit": found[0].record["git"]["commit"], "patch_sha256": None,
                  "source_sha256": next(iter(sources[label])) if len(sources[label]) == 1 else None}
                 for label, found in arms.items()],
        "schedule": schedule,
        "runs": [{**planned, "folder": f"runs/{label}-{planned['index']}", "status": run.status,
                  "record_sha256": sha256((run.folder / "record.json").read_bytes()),
                  "log_sha256": sha256(safe.read_log(run.folder, "log.txt", LARGEST)), "message": run.message}
                 for planned, (label, run) in zip(schedule, runs)],
    }


def _common_command(commands):
    """What all commands (lists of str) begin with, up to the first option that is each run's own: list of str."""
    first = commands[0]
    own = next((index for index, word in enumerate(first) if word.partition("=")[0] in OF_A_RUN), len(first))
    count = next((index for index, words in enumerate(zip(*commands)) if len(set(words)) > 1),
                 min(map(len, commands)))
    words = first[:min(own, count)]
    while len(words) > 1 and words[-1].startswith("--") and "=" not in words[-1]:
        words.pop()     # its value differs
    return words


def _claim(ledger, claim, arm, experiment, arms):
    """What the record claims (dict), after the track's rule.  Raises RecordError with all that is missing."""
    if claim == "experiment":
        return {"kind": "experiment"}
    labels = [one["label"] for one in ledger["arms"]]
    if arm is None and len(labels) > 1:
        raise RecordError(f"--claim target: which arm reached it? --arm with one of {', '.join(labels)}")
    records = {}
    found = read_experiment(experiment).arms if experiment else arms
    for number, entry in enumerate(ledger["runs"]):
        for run in found[entry["arm"]]:
            if experiment is None and run is arms[entry["arm"]][_place(ledger, number)] \
                    or experiment is not None and entry["folder"] and run.folder == experiment / entry["folder"]:
                records[number] = run.record
    problems = rule_problems(ledger, records, arm or labels[0])
    if problems:
        raise RecordError(f"this does not reach the target of {ledger['track']}: {'; '.join(problems)}. As evidence of "
                          "a difference it can still be submitted: --claim experiment")
    return {"kind": "target", "arm": arm or labels[0]}


def _place(ledger, number):
    """Which run of its arm the entry `number` of ledger["runs"] is."""
    return sum(entry["arm"] == ledger["runs"][number]["arm"] for entry in ledger["runs"][:number])


def _folder_name(ledger):
    started = ledger["started"]
    return f"{started[:10]}_{started[11:19].replace(':', '')}_{ledger['name']}"


def _copy_runs(runs, ledger, folder):
    """Copy runs (list of Run, in the order of the ledger) and each distinct source once."""
    for run, entry in zip(runs, ledger["runs"]):
        place = folder / entry["folder"]
        with writing(place):
            place.mkdir(parents=True)
            (folder / "sources").mkdir(exist_ok=True)
        write_whole(place / "record.json", (run.folder / "record.json").read_bytes())
        write_whole(place / "log.txt", safe.read_log(run.folder, "log.txt", LARGEST))
        picture = safe.read_picture(run.folder, "profile.png", LARGEST)
        if picture is not None:
            write_whole(place / "profile.png", picture)
        packed = source_of(run.folder, run.record)
        if packed is not None:
            write_whole(folder / "sources" / f"{sha256(packed)[:16]}.txt", packed)


def _copy_experiment(experiment, folder):
    """Copy what belongs to an experiment and nothing else. It has been verified: no links, no strange names."""
    names = ["report.md", "report.json", "loss.png", "loss.svg"]
    names += [f"{kind}/{name}" for kind in ("sources", "patches") for name in safe.folders(experiment / kind)]
    names += [f"runs/{run}/{name}" for run in safe.folders(experiment / "runs")
              for name in ("record.json", "log.txt", "log.txt.gz", "source.txt", "output.txt", "profile.png")]
    for name in names:
        content = safe.read(experiment, name, LARGEST)
        if content is not None:
            with writing(folder / name):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_whole(folder / name, content)


def _write(folder, ledger, what):
    """Complete the record in `folder`: ledger with its claim, large logs packed, README.md; then verify all of it."""
    for log in sorted((folder / "runs").glob("*/log.txt")):
        content = log.read_bytes()
        if len(content) > COMPRESSED_FROM:
            write_whole(log.with_name("log.txt.gz"), gzip.compress(content, mtime=0))
            log.unlink()
    ledger["what"] = what
    write_whole(folder / "experiment.json", json.dumps(ledger, indent=1, allow_nan=False).encode() + b"\n")
    if problems := [problem for report in inspect(folder) for problem in report.problems]:
        raise RecordError(f"these runs do not make one record: {'; '.join(problems[:3])}"
                          + f" (and {len(problems) - 3} more)" * (len(problems) > 3))
    write_whole(folder / "README.md", readme(folder, ledger).encode())


def add_arguments(parser):
    """Give the argparse parser of `python -m records submit` its arguments."""
    parser.add_argument("paths", nargs="+", metavar="PATH", help="an experiment, or runs: PATH or LABEL=PATH[,PATH...]")
    parser.add_argument("--name", help="of the record (default: the experiment's)")
    parser.add_argument("--what", required=True, help="what changed, in a sentence")
    parser.add_argument("--claim", choices=("target", "experiment"), default="experiment",
                        help="whether it claims to have reached the track's target (default: %(default)s)")
    parser.add_argument("--arm", metavar="LABEL", help="which arm claims the target, where there are several")
    parser.add_argument("--records", default="records", help="folder of all records (default: %(default)s)")


def main(options):
    """Run the command. options: Namespace of add_arguments.  Returns 0, or 2 with one line on stderr."""
    try:
        folder = submit(options.paths, name=options.name, what=options.what, claim=options.claim, arm=options.arm,
                        root=options.records)
    except RecordError as error:
        print(f"records submit: {error}", file=sys.stderr)
        return 2
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder} ({size / 1e6:.1f} MB), verified; README.md says what it claims")
    return 0
