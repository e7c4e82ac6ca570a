"""Which of two changes is better: interleaved runs of several arms, each a fresh process with its own seed.

    python -m records ab --a "train_gpt.py --optimizer muon" --b "train_gpt.py --optimizer turbo-muon" --runs 8
    python -m records ab --a "train_gpt.py" --b-rev my-branch --runs 8 -- --preset wiki --steps 300
    python -m records ab --grid optimizer=muon,turbo-muon lr=0.03,0.05 --runs 4 -- --preset local
    python -m records ab --resume records/wiki-3.324/2026-11-22_190535_muon-vs-turbo-muon

A script that makes many runs in a process (--runs, as train_gpt.py and train_cifar.py) starts once for every block of
them, and arms take turns block by block; every run still has a seed and a record of its own:
    python -m records ab --a "train_cifar.py --optimizer muon" --b "train_cifar.py" --runs 50 --block 10
    python -m records ab --a "train_gpt.py" --b "train_gpt.py --lr 0.06" --runs 8 --block 4 -- --preset wiki --steps 300

What follows -- are options of every arm. Without any options: muon against turbo-muon on the local text, three short
runs each, a few minutes on two CPU cores. The folder of the experiment holds the ledger (records.schedule), the
record of every run and, in the end, report.md, report.json and loss.png/.svg.

A script fits that takes settings as --key value, among them --seed, --records and --name, lists them with --help, and
leaves a record (records.log). Exit status: 0 the experiment is complete, 1 a run failed, 2 wrong usage, 3 the time
limit came first, 128 + number after a signal.
"""
import fcntl
import json
import os
import shlex
import shutil
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

from records import arms as arms_module
from records import processes, worktrees
from records.arms import Arm
from records.environment import Scrubber
from records.files import RecordError, write_whole, writing
from records.live import Display
from records.log import NAME
from records.report import write_report
from records.runner import FAILURE, SIGNAL, SOURCE, TIME, Runner
from records.runs import read_json
from records.schedule import SCHEMA, Ledger, schedule
from records.tracks import get_track

REPOSITORY = Path(__file__).resolve().parent.parent
RUNS, DEFAULT_RUNS, MOST = 8, 3, 40     # runs of an arm: usual, without any arms given, and --until-sure
LOCAL = "local.json"                    # in running/: what only this machine can use
LONGEST_NAME = 80


def add_arguments(parser):
    arms_module.add_arguments(parser)
    add = parser.add_argument
    add("--same", action="store_true", help="allow arms that are the same (an A/A experiment)")
    add("--runs", type=int, metavar="N", help=f"of each arm, declared before the first one starts ({RUNS})")
    add("--block", type=int, metavar="N", help="runs that one process makes, one after the other, of a script with "
        "--runs (1); what a process chooses once, such as cuDNN's algorithms, its runs share")
    add("--until-sure", action="store_true", help="stop as soon as an anytime-valid sequential test is sure that the "
        "final metric differs; --alpha holds however often it looks")
    add("--most", type=int, metavar="N", help=f"runs of each arm at which --until-sure gives up ({MOST})")
    add("--alpha", type=float, default=0.05, metavar="P", help="chance of calling equal arms different (0.05)")
    add("--gpus", metavar="0,1", help="one run at a time on each of these (default: the first one, if there is one)")
    add("--all-gpus", action="store_true", help="one run at a time on all GPUs together, through torchrun")
    add("--first-seed", type=int, default=0, metavar="N", help="seeds are N, N + 1, ..., each once in every arm (0)")
    add("--records", type=Path, default=REPOSITORY / "records", metavar="FOLDER", help="where the experiment goes")
    add("--name", help="of the experiment")
    add("--resume", type=Path, metavar="FOLDER", help="go on with an experiment that did not end; only --gpus and the "
        "options below can be given anew")
    add("--time-limit", type=float, metavar="SECONDS", help="start no run that would probably end later than this")
    add("--keep-going", action="store_true", help="a failed run is recorded and does not stop the experiment")
    add("--retry-failed", action="store_true", help="with --resume: run failed ones again (the failures stay listed)")


def main(options):
    """Run or resume an experiment.

    options: what the parser gave, `common`: options of every arm and `words`: the whole command line (lists of str).
    Returns the exit status; raises RecordError for what the user can mend.
    """
    repository = REPOSITORY
    with processes.Stop() as stop:
        if options.resume is not None:
            return _resume(options, repository, stop)
        arms = arms_module.read_arms(options, repository)
        runs, slots = _count(options), _slots(options)
        with arms_module.opened(arms, repository):
            described = arms_module.describe(arms, stop)
            if described is None:
                return 128 + stop.number
            ledger = _declare(options, repository, arms, described, runs, slots, _block(options, arms, described))
            with _locked(ledger.folder):
                return _carry_out(ledger, arms, options, repository, stop)


def _declare(options, repository, arms, described, runs, slots, block):
    """Write the ledger of a new experiment: everything that will be run, before the first run.  Returns Ledger."""
    track, target = (_agreed(arms, described, key) for key in ("track", "target"))
    if track is None:
        raise RecordError(f"{arms[0].command[0]} --help does not say its --track; give all arms one: -- --track NAME")
    name = options.name or "-vs-".join(arm.label for arm in arms)
    if options.name is None and len(name) > LONGEST_NAME:
        name = f"{len(arms)}-arms"
    for key, value in (("track", track), ("name", name)):
        if not NAME.fullmatch(value):
            raise RecordError(f"the {key} {value!r} cannot name a folder: expected letters, digits, '.', '_' and '-', "
                              f"a letter or digit first; choose another with --{key}")
    started = datetime.now(timezone.utc)
    known, scrub = get_track(track), Scrubber(repository)
    content = {
        "schema": SCHEMA, "kind": "experiment", "track": track, "name": name,
        "started": started.isoformat(timespec="seconds"), "status": "running", "message": None,
        "command": ["python", "-m", "records", *map(scrub, options.words)],
        "question": {"metric": known.metric if known else "val_loss",
                     "direction": known.direction if known else "down",
                     "target": None if target in (None, "none") else float(target), "alpha": options.alpha,
                     "runs": runs,
                     "sequential": {"alpha": options.alpha, "sure_after": None} if options.until_sure else None},
        "arms": [arm.as_json(Scrubber(arm.folder)) for arm in arms],
        "slots": slots, "first_seed": options.first_seed, "block": block,
        "schedule": schedule([arm.label for arm in arms], runs, len(slots), options.first_seed, block), "runs": [],
    }
    folder = _new_folder(options.records / track, f"{started:%Y-%m-%d_%H%M%S}_{name}")
    for arm in arms:
        if arm.patch is not None:
            with writing(folder):
                (folder / "patches").mkdir(exist_ok=True)
            write_whole(folder / "patches" / f"{arm.label}.patch", arm.patch)
    ledger = Ledger(folder, content)
    ledger.save()
    print(f"{runs} run{'s' * (runs > 1)} of each of {len(arms)} arms"
          + (f", {block} in a process" if block > 1 else "")
          + (", fewer if the test is sure before" if options.until_sure else "") + f": {folder}")
    for arm in arms:
        print(f"  {arm.label}: {shlex.join(arm.command)}" + (f" at {arm.commit[:12]}" if arm.in_worktree else "")
              + (" with its patch" if arm.patch is not None else ""))
    return ledger


def _resume(options, repository, stop):
    """Go on where an experiment stopped or was killed."""
    given = arms_module.given(options) + [f"--{key.replace('_', '-')}" for key in (
        "runs", "block", "most", "until_sure", "name", "same", "all_gpus") if getattr(options, key)]
    if given or options.common:
        raise RecordError(f"--resume takes the arms and runs from the ledger: leave out {' '.join(given) or '-- ...'}")
    ledger = Ledger.read(options.resume)
    if ledger.content["status"] == "complete":
        print(f"{ledger.folder} is complete")
        return _report(ledger)
    if options.gpus is not None:
        slots = _slots(options)
        if len(slots) != len(ledger.content["slots"]):
            raise RecordError(f"--gpus {options.gpus}: the experiment was planned for {len(ledger.content['slots'])} "
                              "at a time; give as many")
        ledger.content["slots"] = slots
    with _locked(ledger.folder):
        local = _local(ledger, repository)
        for folder in local.get("worktrees", []):
            worktrees.remove(repository, Path(folder))
        count = ledger.adopt(repository)
        if count:
            print(f"{count} run{'s were' if count > 1 else ' was'} under way when the experiment was killed")
        arms = []
        for entry in ledger.content["arms"]:
            file = ledger.folder / "patches" / f"{entry['label']}.patch"
            arms.append(Arm(entry["label"], local["commands"][entry["label"]], rev=entry["rev"],
                            commit=entry["commit"], dirty=entry["dirty"],
                            patch=file.read_bytes() if entry["patch_sha256"] else None))
        with arms_module.opened(arms, repository):
            return _carry_out(ledger, arms, options, repository, stop)


def _carry_out(ledger, arms, options, repository, stop):
    running = ledger.folder / "running"
    with writing(running):
        running.mkdir(exist_ok=True)
    write_whole(running / LOCAL, json.dumps({
        "commands": {arm.label: arm.command for arm in arms},
        "worktrees": [str(arm.folder) for arm in arms if arm.in_worktree]}).encode())
    ledger.content |= {"status": "running", "message": None}
    ledger.save()
    display = Display(ledger)
    why = Runner(ledger, arms, repository, stop, time_limit=options.time_limit, keep_going=options.keep_going,
                 retry_failed=options.retry_failed, display=display).run()
    ledger.content |= {"status": "complete" if why is None else "stopped", "message": why}
    ledger.save()
    if why is None:
        shutil.rmtree(running, ignore_errors=True)
        return _report(ledger)
    print("\n".join(display.table()))
    retry = " --retry-failed (or --keep-going to leave them out)" if why == FAILURE else ""
    print(f"stopped ({why}); no test is made before all declared runs are there. To go on:\n"
          f"  python -m records ab --resume {shlex.quote(str(ledger.folder))}{retry}", flush=True)
    return {TIME: 3, FAILURE: 1, SOURCE: 1, SIGNAL: 128 + (stop.number or 0)}[why]


def _report(ledger):
    try:
        print(write_report(ledger.folder), flush=True)
    except RecordError as error:
        raise RecordError(f"{error} (the runs are in {ledger.folder})") from error
    return 0


def _local(ledger, repository):
    """What the ledger does not say because it is of this machine: dict of "commands" and "worktrees"."""
    file = ledger.folder / "running" / LOCAL
    if file.is_file():
        return read_json(file, "it belongs to the experiment")
    commands = {arm["label"]: arm["command"] for arm in ledger.content["arms"]}
    if any(".../" in word for command in commands.values() for word in command):
        raise RecordError(f"{file} is missing, and the commands in the ledger have lost their absolute paths: "
                          "begin a new experiment")
    return {"commands": commands}


def _agreed(arms, described, key):
    """The value of a setting that all arms must share (str), None where no arm has it."""
    values = {arm.label: settings.get(key) for arm, settings in zip(arms, described)}
    if len(set(values.values())) > 1:
        raise RecordError(f"the arms differ in --{key}, so that one question cannot be put to all: "
                          + ", ".join(f"{label} {value}" for label, value in values.items())
                          + f"; give all the same after --, such as -- --{key} {next(iter(values.values()))}")
    return next(iter(values.values()))


def _count(options):
    """Runs of each arm to declare."""
    if options.until_sure and options.runs is not None:
        raise RecordError("--until-sure and --runs: give one of them (--most N bounds --until-sure)")
    if options.most is not None and not options.until_sure:
        raise RecordError("--most belongs to --until-sure; without it give --runs N")
    usual = MOST if options.until_sure else RUNS if arms_module.given(options) else DEFAULT_RUNS
    count = next((number for number in (options.runs, options.most) if number is not None), usual)
    if count < 1 or options.first_seed < 0 or not 0 < options.alpha < 1:
        raise RecordError(f"--runs {count} --first-seed {options.first_seed} --alpha {options.alpha}: expected at "
                          "least 1 run, a seed of at least 0, and a chance between 0 and 1")
    return count


def _block(options, arms, described):
    """Runs that one process makes."""
    block = 1 if options.block is None else options.block
    if block < 1:
        raise RecordError(f"--block {block}: expected at least 1 run")
    for arm, settings in zip(arms, described):
        if block > 1 and "runs" not in settings:
            raise RecordError(f"--block {block}: {arm.command[0]} --help has no --runs, so it makes one run in a "
                              "process; leave --block out")
    return block


def gpu_count():
    """GPUs that torch sees here."""
    import torch
    return torch.cuda.device_count()


def _slots(options):
    """What runs at the same time: list of {"gpu": "0" | "all" | None, "processes": int}."""
    if options.gpus is not None and options.all_gpus:
        raise RecordError("--gpus and --all-gpus: give one of them")
    count = gpu_count()
    if not count:
        if options.gpus is not None or options.all_gpus:
            raise RecordError("no GPU here (torch.cuda.device_count() is 0): leave out --gpus and --all-gpus")
        return [{"gpu": None, "processes": 1}]
    if options.all_gpus:
        return [{"gpu": "all", "processes": 1 << (count.bit_length() - 1)}]     # batches divide by 1, 2, 4, 8
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    names = (options.gpus or visible[0] or "0").split(",")
    if not all(names) or len(set(names)) < len(names):
        raise RecordError(f"--gpus {options.gpus}: expected different GPUs such as 0,1")
    return [{"gpu": name.strip(), "processes": 1} for name in names]


@contextmanager
def _locked(folder):
    """While entered, no other process runs this experiment; a kill releases it."""
    with writing(folder):
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RecordError(f"{folder}: another process runs this experiment; wait for it, or end it") from error
        yield
    finally:
        os.close(descriptor)


def _new_folder(parent, name):
    """Create `parent`/`name`, with _2, _3 ... where that exists; returns its Path."""
    with writing(parent):
        parent.mkdir(parents=True, exist_ok=True)
        for count in range(1, 1000):
            folder = parent / (name if count == 1 else f"{name}_{count}")
            try:
                folder.mkdir()
                return folder
            except FileExistsError:
                continue
    raise RecordError(f"{parent / name} and 998 more exist; choose another name with --name")
