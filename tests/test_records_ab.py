"""records ab: the order of runs, the ledger through failures, limits and kills, revisions and patches, the report."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_train_gpt import ROOT, TINY, data  # noqa: F401

from records import ab, arms, live, processes, report, runner
from records.plot import arms_curves
from records.__main__ import main
from records.files import RecordError
from records.runs import read_experiment
from records.schedule import Ledger, schedule
from records.verify import verify

# How the scripts below begin; each adds fields to Settings.
SETTINGS = '''
from dataclasses import asdict, dataclass
from pathlib import Path
from records import environment
environment.hardware = lambda device=None: {"accelerator": None, "accelerator_count": 0, "cpu": "none", "cpu_count": 1}
environment.versions = lambda: {"python": "3", "torch": "2", "triton": None, "cuda": None, "numpy": "2"}
from records.log import Record
from records.settings import option, parse

@dataclass
class Settings:
    track: str = option("race", "track")
    name: str = option("run", "name")
    target: float | None = option(None, "target")
    records: str = option("records", "folder")
    seed: int = option(0, "seed")
'''

# A script that "trains" in no time. It ends with status 9 unless the ledger was written before it started, and notes
# what it could see. FACTOR is what the tests of revisions change.
RACE = '''
import json, math, os, random, sys, time
FACTOR = 1.0
''' + SETTINGS + '''
    steps: int = option(4, "steps")
    shift: float = option(0.0, "added to the loss")
    nap: float = option(0.0, "seconds a step")
    bad_seed: int = option(-1, "fails with this seed")
    early: bool = option(False, "fails before there is a record")
    data: str = option("none", "file that must exist")

s = parse(Settings, sys.argv[1:], presets={"record": {}}, program="race.py", description="", default_preset="record")
place = Path(s.records)
ledger = json.loads((place.parent.parent / "experiment.json").read_text())
mine = [run for run in ledger["runs"] if run["folder"] == "runs/" + place.name]
if len(mine) != 1 or mine[0]["status"] != "interrupted" or mine[0]["seed"] != s.seed:
    sys.exit(9)
busy = [run["gpu"] for run in ledger["runs"] if run["status"] == "interrupted" and not run["record_sha256"]]
if s.early and s.seed == s.bad_seed or s.data != "none" and not Path(s.data).is_file():
    print("race.py: nothing works in", Path.cwd())
    sys.exit(4)
Record._draw = lambda record: None
record = Record(s.records, track=s.track, name=s.name, target=s.target, steps=s.steps, seed=s.seed, config=asdict(s),
                script=Path(__file__), repository=Path(__file__).resolve().parent)
noise = random.Random(f"{s.seed} {s.shift}").gauss(0, 0.01)
for step in range(s.steps + 1):
    time.sleep(s.nap if step else 0)
    loss = FACTOR * (3 + 2 / (1 + step)) + s.shift + noise
    if s.seed == s.bad_seed and step == 2:
        record.fail("failed", "this seed is a bad one")
        sys.exit(1)
    record.validation(step, loss, 0.5 * step, 100 * step)
record.finish(extra={"gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "cache": os.environ["TORCHINDUCTOR_CACHE_DIR"][-5:],
                     "folder": Path.cwd().name, "under way": len(busy), "on my gpu": busy.count(mine[0]["gpu"])})
'''


def git(repository, *words):
    return subprocess.run(["git", "-C", repository, "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True,
                          capture_output=True, text=True).stdout


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A git repository with race.py, in which `records ab` looks for scripts."""
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "race.py").write_text(RACE)
    (folder / ".gitignore").write_text("/data/\n__pycache__/\n")
    git(folder, "init", "-q", "-b", "main")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    monkeypatch.setattr(ab, "REPOSITORY", folder)
    monkeypatch.setattr(ab, "gpu_count", lambda: 0)
    monkeypatch.setattr(report, "arms_curves", lambda *drawing: None)      # a second each
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("CUDA_VISIBLE_DEVICES", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return folder


TWO = ("--a", "race.py", "--b", "race.py --shift 0.5")


def run(tmp_path, *words):
    """`records ab`: (exit status, Ledger of the one experiment in tmp_path)."""
    place = [] if "--resume" in words else ["--records", str(tmp_path / "records")]
    status = main(["ab", *place, *words])
    [file] = (tmp_path / "records").glob("*/*/experiment.json")
    return status, Ledger.read(file.parent)


def statuses(ledger):
    return [(run["arm"], run["seed"], run["status"]) for run in ledger.runs]


def assert_each_once(ledger):
    """Every planned run is there complete exactly once, and each arm has each seed once."""
    complete = [run for run in ledger.runs if run["status"] == "complete"]
    assert sorted(run["index"] for run in complete) == list(range(len(ledger.schedule)))
    assert {count for count in Counter((run["arm"], run["seed"]) for run in complete).values()} == {1}
    for run in complete:
        assert (ledger.folder / run["folder"] / "record.json").is_file()


# ---------------------------------------------------------------------------------------------------------------------
# Order


def test_two_arms_interleave_a_b_b_a():
    assert [run["arm"] for run in schedule(["a", "b"], 4, 1, 0)] == list("abbaabba")
    assert [run["seed"] for run in schedule(["a", "b"], 4, 1, 7)] == [7, 7, 8, 8, 9, 9, 10, 10]


@pytest.mark.parametrize("labels, runs, slots", [("ab", 8, 2), ("abc", 6, 2), ("abcd", 5, 3), ("ab", 1, 4)])
def test_a_schedule_is_fair(labels, runs, slots):
    planned = schedule(list(labels), runs, slots, 3)
    assert [run["index"] for run in planned] == list(range(len(labels) * runs))
    assert Counter((run["arm"], run["seed"]) for run in planned) == \
        {(label, 3 + number): 1 for label in labels for number in range(runs)}
    for label in labels:      # no arm has more runs on a slot than another
        assert Counter(run["slot"] for run in planned if run["arm"] == label) == \
            Counter(run["slot"] for run in planned if run["arm"] == labels[0])
    if runs % (2 * slots) == 0:       # nor is it earlier on the average, on any slot
        for slot in range(slots):
            order = [run["arm"] for run in planned if run["slot"] == slot]
            middles = {label: sum(i for i, arm in enumerate(order) if arm == label) for label in labels}
            assert len(set(middles.values())) == 1
    first = {slot: next(run["arm"] for run in planned if run["slot"] == slot) for slot in {r["slot"] for r in planned}}
    assert len(first) == 1 or len(set(first.values())) == 2       # slots begin with different arms


# ---------------------------------------------------------------------------------------------------------------------
# Arms


def options(*words, common=()):
    import argparse
    parser = argparse.ArgumentParser(allow_abbrev=False)
    ab.add_arguments(parser)
    return Namespace(**vars(parser.parse_args(words)), common=list(common), words=[])


@pytest.mark.parametrize("words, labels", [
    ((), ["muon", "turbo-muon"]),
    (TWO, ["a", "b"]),
    (("--a", "race.py --shift 1", "--b", "race.py --shift 2"), ["1", "2"]),
    (("--a", "race.py --shift 1 --nap 0", "--b", "race.py --shift 2 --nap 3", "--c", "race.py --shift 2 --nap 0"),
     ["1_0", "2_3", "2_0"]),
    (("--a", "race.py", "--b-rev", "HEAD", "--same"), ["a", "b"]),
    (("--arm", "old=race.py", "--arm", "new=race.py --shift 1"), ["old", "new"]),
    (("--a", "race.py", "--grid", "shift=0,1", "bad-seed=7,8,9"), ["0_7", "0_8", "0_9", "1_7", "1_8", "1_9"]),
])
def test_arms_have_names(repository, words, labels):
    assert [arm.label for arm in arms.read_arms(options(*words), repository)] == labels


def test_an_arms_own_options_override_the_common_ones(repository):
    found = arms.read_arms(options("--a", "race.py --steps 3", "--b", "race.py", common=["--steps", "9", "--nap=1"]),
                           repository)
    assert found[0].command == ["race.py", "--steps", "9", "--nap=1", "--steps", "3"]
    assert [arm.overrides for arm in found] == [{"steps": "3", "nap": "1"}, {"steps": "9", "nap": "1"}]
    grid = arms.read_arms(options("--a", "race.py --shift 5", "--grid", "shift=1,2"), repository)
    assert [arm.overrides for arm in grid] == [{"shift": "1"}, {"shift": "2"}]


@pytest.mark.parametrize("words, message", [
    (("--a", "race.py"), "one arm cannot be compared"),
    (("--a", "race.py", "--b", "race.py"), "arms a and b are the same.*--same"),
    (("--a", "race.py --seed 3", "--b", "race.py"), "its own --seed.*--first-seed"),
    (("--a", "python race.py", "--b", "race.py"), "expected a script first"),
    (("--a", "race.py 'x", "--b", "race.py"), "No closing quotation"),
    (("--a", "race.py", "--b-rev", "nowhere"), "no revision 'nowhere'"),
    (("--a", "race.py", "--b-patch", "missing.patch"), "--b-patch missing.patch: No such file"),
    (("--arm", "race.py"), "expected LABEL="),
    (("--arm", "a/b=race.py", "--arm", "c=race.py --shift 1"), "cannot name a folder"),
    (("--arm", "a=race.py", "--arm", "a=race.py --shift 1"), "two arms have the same label"),
    (("--grid", "shift"), "expected SETTING=VALUE,VALUE"),
    (("--grid", "shift=1,1"), "values that differ"),
    (("--grid", "seed=1,2"), "its own --seed"),
    (("--b", "race.py", "--grid", "shift=1,2"), "the one command --a"),
])
def test_arms_that_cannot_be(repository, words, message):
    with pytest.raises(RecordError, match=message):
        arms.read_arms(options(*words), repository)


@pytest.mark.parametrize("words, message", [
    ((*TWO, "--runs", "0"), "at least 1 run"),
    ((*TWO, "--alpha", "1.5"), "a chance between 0 and 1"),
    ((*TWO, "--most", "9"), "--most belongs to --until-sure"),
    ((*TWO, "--until-sure", "--runs", "9"), "give one of them"),
    ((*TWO, "--gpus", "0"), "no GPU here"),
    (("--a", "race.py --shfit 1", "--b", "race.py"), "unknown option --shfit"),
    (("--a", "race.py --track x", "--b", "race.py"), "the arms differ in --track.*a x, b race"),
    (("--a", "gone.py", "--b", "race.py"), "no script gone.py in the working tree"),
    ((*TWO, "--name", "a/b"), "the name 'a/b' cannot name a folder"),
    (("--resume", "nowhere"), "cannot read nowhere/experiment.json"),
    (("--resume", "nowhere", "--runs", "4"), "leave out --runs"),
])
def test_wrong_usage_ends_with_one_line_before_anything_is_written(repository, tmp_path, capsys, words, message):
    assert main(["ab", "--records", str(tmp_path / "records"), *words]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and re.search(message, error)
    assert not (tmp_path / "records").exists()


# ---------------------------------------------------------------------------------------------------------------------
# An experiment


def test_an_experiment_from_ledger_to_report(repository, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "arms_curves", arms_curves)
    status, ledger = run(tmp_path, *TWO, "--runs", "3", "--first-seed", "5", "--", "--steps", "6", "--target", "3.4")
    output = capsys.readouterr().out
    assert status == 0 and ledger.content["status"] == "complete"
    assert_each_once(ledger)
    assert [(run["arm"], run["seed"]) for run in ledger.runs] == \
        [("a", 5), ("b", 5), ("b", 6), ("a", 6), ("a", 7), ("b", 7)]
    assert ledger.content["track"] == "race" and ledger.folder.name.endswith("_a-vs-b")
    assert ledger.content["question"]["runs"] == 3 and ledger.content["question"]["target"] == 3.4
    assert [arm["overrides"] for arm in ledger.content["arms"]] == \
        [{"steps": "6", "target": "3.4"}, {"steps": "6", "target": "3.4", "shift": "0.5"}]
    # what is there, and nothing else
    assert {path.name for path in ledger.folder.iterdir()} == \
        {"experiment.json", "runs", "sources", "report.md", "report.json", "loss.png", "loss.svg"}
    assert {path.name for path in (ledger.folder / "runs").iterdir()} == {"a-0", "b-1", "b-2", "a-3", "a-4", "b-5"}
    for folder in (ledger.folder / "runs").iterdir():
        assert {path.name for path in folder.iterdir()} == {"record.json", "log.txt"}
    assert len(list((ledger.folder / "sources").iterdir())) == 1      # the arms run the same source
    # the report
    experiment = read_experiment(ledger.folder)
    means = [sum(run.final for run in runs) / 3 for runs in experiment.arms.values()]
    content = json.loads((ledger.folder / "report.json").read_text())
    assert content["results"]["b"]["final"]["difference"] == pytest.approx(means[1] - means[0], rel=1e-9)
    assert content["results"]["b"]["final"]["distinguishable"]
    text = (ledger.folder / "report.md").read_text()
    assert text in output and text.startswith("# b against a on race\n\nExperiment of")
    assert "3 runs of each arm, declared before the first one" in text and "loss.svg" in text
    for file in ledger.folder.rglob("*"):
        assert not file.is_file() or str(tmp_path).encode() not in file.read_bytes(), file      # no paths of here
    assert verify(ledger.folder) == []


def test_a_grid_compares_every_arm_with_the_first_and_corrects_for_it(repository, tmp_path):
    status, ledger = run(tmp_path, "--a", "race.py", "--grid", "shift=0,0.001,0.5", "--runs", "3")
    assert status == 0
    assert_each_once(ledger)
    assert [run["arm"] for run in ledger.runs] == ["0", "0.001", "0.5", "0.5", "0.001", "0", "0", "0.001", "0.5"]
    content = json.loads((ledger.folder / "report.json").read_text())
    near, far = (content["results"][label]["final"] for label in ("0.001", "0.5"))
    assert far["distinguishable"] and not near["distinguishable"]
    assert far["p_holm"] == pytest.approx(2 * far["p"])     # the smallest of two


def test_a_failed_run_stops_the_experiment_and_stays_in_the_ledger(repository, tmp_path, capsys):
    words = ("--a", "race.py", "--b", "race.py --shift 0.5 --bad-seed 0", "--runs", "2")
    status, ledger = run(tmp_path, *words)
    output = capsys.readouterr().out
    assert status == 1 and statuses(ledger) == [("a", 0, "complete"), ("b", 0, "failed")]
    assert ledger.content["status"] == "stopped"
    assert ledger.runs[1]["message"] == "this seed is a bad one; exit status 1"
    assert "b seed 0 failed: this seed is a bad one" in output and f"--resume {ledger.folder} --retry-failed" in output
    assert not (ledger.folder / "report.md").exists()
    # going on without it repeats nothing
    status, ledger = run(tmp_path, "--resume", str(ledger.folder))
    assert status == 0 and statuses(ledger)[2:] == [("b", 1, "complete"), ("a", 1, "complete")]
    assert "1 failed" in (ledger.folder / "report.md").read_text()


def test_keep_going_and_retry(repository, tmp_path):
    words = ("--a", "race.py", "--b", "race.py --shift 0.5 --early true --bad-seed 1", "--runs", "2", "--keep-going")
    # seed 1 of b leaves no record: its output is what remains
    status, ledger = run(tmp_path, *words)
    assert status == 0
    assert statuses(ledger) == [("a", 0, "complete"), ("b", 0, "complete"), ("b", 1, "failed"), ("a", 1, "complete")]
    failed = ledger.folder / ledger.runs[2]["folder"]
    assert [path.name for path in failed.iterdir()] == ["output.txt"]
    assert (failed / "output.txt").read_text() == "race.py: nothing works in .\n"      # no path of this machine
    assert ledger.runs[2]["message"] == "it left no record; exit status 4"
    ledger.content["status"] = "stopped"
    ledger.save()
    status, ledger = run(tmp_path, "--resume", str(ledger.folder), "--retry-failed", "--keep-going")
    assert statuses(ledger)[4:] == [("b", 1, "failed")] and ledger.runs[4]["folder"] == "runs/b-2-2"


def test_the_time_limit_starts_no_run_that_would_not_end(repository, tmp_path, capsys):
    status, ledger = run(tmp_path, *TWO, "--runs", "2", "--time-limit", "0.5", "--", "--nap", "0.1")
    assert status == 3 and statuses(ledger) == [("a", 0, "complete")]      # the first one has no median to go by
    assert "no further run: one takes some" in capsys.readouterr().out
    assert ledger.content["message"] == "time limit"
    first = (ledger.folder / "runs/a-0/record.json").stat().st_mtime_ns
    status, ledger = run(tmp_path, "--resume", str(ledger.folder), "--time-limit", "60")
    assert status == 0 and (ledger.folder / "runs/a-0/record.json").stat().st_mtime_ns == first
    assert_each_once(ledger)
    # complete: nothing left to do but show the report
    assert main(["ab", "--resume", str(ledger.folder)]) == 0
    assert len(Ledger.read(ledger.folder).runs) == 4


def test_a_source_that_changes_stops_the_experiment(repository, tmp_path, capsys):
    status, ledger = run(tmp_path, *TWO, "--runs", "2", "--time-limit", "0.01")
    (repository / "race.py").write_text(RACE + "\n# changed\n")
    capsys.readouterr()
    status, ledger = run(tmp_path, "--resume", str(ledger.folder))
    # arm b has no run yet, but would not have the source that arm a had
    assert status == 1 and ledger.content["message"] == "changed source"
    assert "files of arm b are not what earlier runs had: race.py" in capsys.readouterr().out
    assert statuses(ledger) == [("a", 0, "complete")]
    (repository / "race.py").write_text(RACE)
    assert run(tmp_path, "--resume", str(ledger.folder))[0] == 0


def test_a_source_that_changes_under_a_run_fails_it(repository, tmp_path):
    touches = "Path(__file__).write_text(Path(__file__).read_text() + '#')\n"
    (repository / "race.py").write_text(RACE.replace("record.finish(", f"{touches}record.finish("))
    status, ledger = run(tmp_path, *TWO, "--runs", "1")
    assert status == 1 and statuses(ledger) == [("a", 0, "complete")]
    assert ledger.content["message"] == "changed source"
    record = {"status": "complete", "seed": 0, "track": "race", "target": None, "source": {"race.py": "0" * 64}}
    status, message = ledger._judge({"arm": "b", "seed": 0}, record)
    assert status == "failed" and message == "its source is not that of earlier runs: race.py"


def test_until_sure_stops_when_it_is(repository, tmp_path, capsys):
    status, ledger = run(tmp_path, *TWO, "--until-sure", "--most", "12")
    pairs = ledger.content["question"]["sequential"]["sure_after"]
    assert status == 0 and 4 <= pairs < 12
    assert len(ledger.runs) == 2 * pairs and len(ledger.schedule) == 24
    output = capsys.readouterr().out
    assert f"sure after {pairs} runs an arm" in output and "anytime-valid" in output


def test_until_sure_of_arms_that_do_not_differ_goes_on_to_the_most(repository, tmp_path):
    status, ledger = run(tmp_path, "--a", "race.py", "--b", "race.py --shift 0.000001", "--until-sure", "--most", "5")
    assert status == 0 and ledger.content["question"]["sequential"]["sure_after"] is None
    assert_each_once(ledger)


def test_sure_after_looks_at_no_run_behind_one_that_is_under_way():
    def entry(arm, index, status="complete"):
        return {"arm": arm, "index": index, "status": status}
    values = {"a": [1.0, 1.1, 0.9, 1.05, 0.95, 1.02], "b": [5.0, 5.1, 4.9, 5.05, 4.95, 5.01]}
    runs = [entry(arm, 2 * number + (arm == "b")) for number in range(6) for arm in "ab"]

    def read(run):
        return Namespace(final=values[run["arm"]][run["index"] // 2])

    def ledger(runs):
        return Ledger(None, {"question": {"alpha": 0.05}, "runs": runs, "arms": [{"label": "a"}, {"label": "b"}]})
    assert 4 <= runner.sure_after(ledger(runs), read) <= 6
    assert runner.sure_after(ledger(runs[:4]), read) is None
    runs[1]["status"] = "interrupted"
    assert runner.sure_after(ledger(runs), read) is None


def test_the_table_rewrites_itself_on_a_terminal(repository, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True
    status, ledger = run(tmp_path, *TWO, "--runs", "2", "--time-limit", "0.01")
    stream = Terminal()
    monkeypatch.setattr(live, "REDRAW_SECONDS", 0)
    display = live.Display(ledger, stream)
    assert display.table()[1].split() == \
        ["a", "1", "of", "2", f"{finals(ledger)['a'][0]:.5f}", "500.00", "ms", "2.00", "s"]
    assert display.table()[2].split() == ["b", "0", "of", "2"]
    entry = {"arm": "b", "index": 1, "seed": 0, "folder": "runs/b-1", "status": "interrupted", "record_sha256": None}
    ledger.runs.append(entry)
    place = ledger.place(entry) / "race" / "2026_b-1"
    place.mkdir(parents=True)
    (place / "log.txt").write_text("facts\nstep:0/4 val_loss:5.0 train_time:0ms\nstep:3/4 train_time:1500ms\nstep:4/")
    display.update([([entry], 12.3)])
    assert "> b seed 0, 12 s: step:3/4 train_time:1500ms\n" in stream.getvalue()
    lines = stream.getvalue().count("\n")
    display.line("something happened")
    assert stream.getvalue().endswith(f"\033[{lines}F\033[Jsomething happened\n")
    display.update([])
    display.close()
    assert stream.getvalue().endswith("\033[3F\033[J")
    plain = io.StringIO()
    live.Display(ledger, plain).update([([entry], 1.0)])
    assert plain.getvalue() == ""       # not a terminal: lines only


# ---------------------------------------------------------------------------------------------------------------------
# GPUs


def test_one_run_at_a_time_on_each_gpu(repository, tmp_path, monkeypatch):
    monkeypatch.setattr(ab, "gpu_count", lambda: 2)
    status, ledger = run(tmp_path, *TWO, "--runs", "4", "--gpus", "3,5", "--", "--nap", "0.05")
    assert status == 0
    assert_each_once(ledger)
    assert {run["gpu"] for run in ledger.runs} == {"3", "5"}
    busy = []
    for entry in ledger.runs:
        record = json.loads((ledger.folder / entry["folder"] / "record.json").read_text())
        assert record["extra"]["gpu"] == entry["gpu"]
        assert record["extra"]["on my gpu"] == 1
        busy.append(record["extra"]["under way"])
    assert max(busy) == 2       # both work at the same time


@pytest.mark.parametrize("count, processes_", [(1, 1), (3, 2), (8, 8)])
def test_all_gpus_go_through_torchrun(repository, tmp_path, monkeypatch, count, processes_):
    commands, start = [], processes.start

    def started(command, **options):
        commands.append(command)
        return start([sys.executable, *command[command.index("race.py"):]], **options)
    monkeypatch.setattr(processes, "start", started)
    monkeypatch.setattr(ab, "gpu_count", lambda: count)
    status, ledger = run(tmp_path, *TWO, "--runs", "1", "--all-gpus")
    assert status == 0 and len(commands) == 2
    launcher = commands[0][1:commands[0].index("race.py")]
    assert launcher == ([] if processes_ == 1 else
                        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes_}"])
    record = json.loads((ledger.folder / "runs/a-0/record.json").read_text())
    assert record["extra"]["gpu"] is None       # sees all


# ---------------------------------------------------------------------------------------------------------------------
# Revisions and patches


def worktree_count(repository):
    return git(repository, "worktree", "list").count("\n")


@pytest.fixture
def changed(repository):
    """race.py of the last commit has twice the loss of the first one; the data are ignored by git."""
    (repository / "race.py").write_text(RACE.replace("FACTOR = 1.0", "FACTOR = 2.0"))
    git(repository, "commit", "-qam", "second")
    (repository / "data" / "small").mkdir(parents=True)
    (repository / "data" / "small" / "train.bin").write_text("tokens")
    return repository


def finals(ledger):
    return {label: [run.final for run in runs] for label, runs in read_experiment(ledger.folder).arms.items()}


def test_a_revision_runs_in_a_worktree_that_sees_the_data(changed, tmp_path):
    status, ledger = run(tmp_path, "--a", "race.py", "--b-rev", "HEAD~1", "--runs", "1", "--",
                         "--data", "data/small/train.bin")
    assert status == 0
    values = finals(ledger)
    assert values["a"][0] > 6 > 4 > values["b"][0]
    assert worktree_count(changed) == 1 and not list(tmp_path.glob("turborun-ab-*"))
    assert (changed / "data" / "small" / "train.bin").read_text() == "tokens"      # removed with no worktree
    records = {run["arm"]: json.loads((ledger.folder / run["folder"] / "record.json").read_text())
               for run in ledger.runs}
    assert records["a"]["extra"]["folder"] == "repository" and records["b"]["extra"]["folder"] == "b"
    first, last = git(changed, "rev-parse", "HEAD~1", "HEAD").split()
    assert [arm["commit"] for arm in ledger.content["arms"]] == [last, first]
    assert records["b"]["git"]["commit"] == first and records["a"]["git"]["commit"] == last
    assert len(list((ledger.folder / "sources").iterdir())) == 2
    assert ledger.content["arms"][0]["source_sha256"] != ledger.content["arms"][1]["source_sha256"]


def test_a_patch_is_applied_and_kept(changed, tmp_path):
    (changed / "race.py").write_text(RACE.replace("FACTOR = 1.0", "FACTOR = 3.0"))
    patch = tmp_path / "three.patch"
    patch.write_text(git(changed, "diff"))
    with pytest.raises(RecordError, match="the working tree differs from the last commit"):
        arms.read_arms(options("--a", "race.py", "--b-patch", str(patch)), changed)
    git(changed, "checkout", "-q", ".")
    status, ledger = run(tmp_path, "--a", "race.py", "--b-patch", str(patch), "--runs", "2", "--time-limit", "0.01")
    assert status == 3
    patch.unlink()      # the experiment has its own
    status, ledger = run(tmp_path, "--resume", str(ledger.folder))
    assert status == 0
    values = finals(ledger)
    assert values["a"][0] == pytest.approx(values["b"][0] * 2 / 3, rel=0.02)
    assert (ledger.folder / "patches" / "b.patch").read_bytes().count(b"FACTOR = 3.0") == 1
    assert worktree_count(changed) == 1 and git(changed, "status", "--porcelain") == ""


def test_a_patch_that_does_not_apply_leaves_nothing(changed, tmp_path, capsys):
    patch = tmp_path / "bad.patch"
    patch.write_text("--- a/race.py\n+++ b/race.py\n@@ -1,1 +1,1 @@\n-not there\n+at all\n")
    assert main(["ab", "--records", str(tmp_path / "records"), "--a", "race.py", "--b-patch", str(patch)]) == 2
    assert "the patch of arm b does not apply to" in capsys.readouterr().err
    assert worktree_count(changed) == 1 and not list(tmp_path.glob("turborun-ab-*"))
    assert not (tmp_path / "records").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Ended from outside

DRIVER = """
import signal, sys
from pathlib import Path
from records import ab, __main__
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts tests in the background has it ignored
ab.REPOSITORY, ab.gpu_count = Path(sys.argv[1]), lambda: 0
sys.exit(__main__.main(sys.argv[2:]))
"""


@contextmanager
def started(command, **changes):
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
                               env=os.environ | changes, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=30)


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)
    return found


def training(tmp_path, count):
    """The ledger once `count` runs have started and the last one trains."""
    for file in (tmp_path / "records").glob("*/*/experiment.json"):
        ledger = Ledger.read(file.parent)
        if len(ledger.runs) == count and \
                any(b" val_loss:" in log.read_bytes() for log in ledger.place(ledger.runs[-1]).glob("*/*/log.txt")):
            return ledger
    return None


def alive(text):
    return [path for path in Path("/proc").glob("[0-9]*/cmdline") if text in _command_line(path)]


def _command_line(path):
    try:
        return path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_the_runs_and_nothing_is_lost_or_repeated(changed, tmp_path, number):
    words = ["ab", "--records", str(tmp_path / "records"), "--a", "race.py", "--b-rev", "HEAD~1", "--runs", "2", "--",
             "--nap", "0.3"]
    with started([sys.executable, "-c", DRIVER, changed, *words]) as process:
        ledger = wait_for(lambda: training(tmp_path, 2))
        process.send_signal(number)
        output, _ = process.communicate(timeout=10)
        assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    wait_for(lambda: not alive(str(ledger.folder)), seconds=5)
    ledger = Ledger.read(ledger.folder)
    assert statuses(ledger) == [("a", 0, "complete"), ("b", 0, "interrupted")]
    if number != signal.SIGKILL:
        assert ledger.runs[1]["record_sha256"] and ledger.runs[1]["message"] == number.name
        assert ledger.content["status"] == "stopped" and "--resume" in output
        assert worktree_count(changed) == 1
    status, ledger = run(tmp_path, "--resume", str(ledger.folder))
    assert status == 0
    assert_each_once(ledger)
    assert len(ledger.runs) == 5 and statuses(ledger)[:2] == [("a", 0, "complete"), ("b", 0, "interrupted")]
    assert ledger.runs[1]["folder"] == "runs/b-1" and ledger.runs[2]["folder"] == "runs/b-1-2"
    kept = json.loads((ledger.folder / "runs/b-1/record.json").read_text())
    assert kept["status"] == "interrupted" and kept["validation"]
    assert worktree_count(changed) == 1 and not list(tmp_path.glob("turborun-ab-*"))
    assert not (ledger.folder / "running").exists()


def test_a_run_that_had_ended_when_ab_was_killed_counts(repository, tmp_path):
    status, ledger = run(tmp_path, *TWO, "--runs", "1")
    entry = ledger.runs[1]      # as if ab had been killed between the end of this run and the next save
    (ledger.folder / "running" / "b-1" / "race").mkdir(parents=True)
    os.rename(ledger.folder / entry["folder"], ledger.folder / "running/b-1/race/2026_b-1")
    entry |= {"status": "interrupted", "record_sha256": None, "log_sha256": None}
    ledger.content["status"] = "running"
    ledger.save()
    status, ledger = run(tmp_path, "--resume", str(ledger.folder))
    assert status == 0 and len(ledger.runs) == 2 and ledger.runs[1]["status"] == "complete"


def test_two_cannot_run_the_same_experiment(repository, tmp_path, capsys):
    status, ledger = run(tmp_path, *TWO, "--runs", "1", "--time-limit", "0.01")
    with ab._locked(ledger.folder):
        assert main(["ab", "--resume", str(ledger.folder)]) == 2
    assert "another process runs this experiment" in capsys.readouterr().err


def test_what_ignores_sigterm_is_killed_with_its_children(tmp_path):
    stubborn = ("import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
                "child = subprocess.Popen([sys.executable, '-c', sys.argv[1], '{}'], start_new_session=True); "
                "print(child.pid, flush=True); time.sleep(60)").replace("{}", str(tmp_path))
    sleeper = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    process = processes.start([sys.executable, "-c", stubborn, sleeper], cwd=tmp_path, environment=dict(os.environ),
                              output=tmp_path / "output.txt")
    wait_for(lambda: (tmp_path / "output.txt").read_text().endswith("\n"))
    child = int((tmp_path / "output.txt").read_text())
    assert child in processes.descendants(process.pid)
    before = time.monotonic()
    processes.end([process], grace=0.5)
    assert time.monotonic() - before < 5 and process.poll() == -signal.SIGKILL
    wait_for(lambda: processes._started(child) is None, seconds=5)


# ---------------------------------------------------------------------------------------------------------------------
# The real script, as a user runs it


def test_train_gpt_is_killed_in_the_middle_and_resumed(data, tmp_path):  # noqa: F811
    tiny = TINY | dict(layers=1, heads=1, value_embeddings=0, steps=120, val_every=10, data=data)
    common = [word for key, value in tiny.items() for word in ("--" + key.replace("_", "-"), str(value))]
    words = ["--records", str(tmp_path / "records"), "--runs", "1", "--a", "train_gpt.py --optimizer muon",
             "--b", "train_gpt.py --optimizer turbo-muon", "--", *common]
    slow = {"OMP_NUM_THREADS": "1"}
    with started([sys.executable, "-m", "records", "ab", *words], **slow) as process:
        ledger = wait_for(lambda: training(tmp_path, 2), seconds=90)
        process.kill()
        process.communicate(timeout=10)
    wait_for(lambda: not alive(str(ledger.folder)), seconds=10)
    before = {path: path.read_bytes() for path in (ledger.folder / "runs" / "muon-0").iterdir()}
    with started([sys.executable, "-m", "records", "ab", "--resume", str(ledger.folder)], **slow) as process:
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    ledger = Ledger.read(ledger.folder)
    assert_each_once(ledger)
    assert {path: path.read_bytes() for path in (ledger.folder / "runs" / "muon-0").iterdir()} == before
    assert [run["status"] for run in ledger.runs][:2] == ["complete", "interrupted"] and len(ledger.runs) == 3
    assert "turbo-muon against muon" in output and (ledger.folder / "loss.svg").is_file()
    assert verify(ledger.folder) == []


def test_run_sh_passes_ab_on():
    script = (ROOT / "run.sh").read_text()
    [case] = [part for part in script.split(";;") if "\n    ab)" in part]
    launched = case[case.index("ab)"):].partition("\n")[2].strip()
    shown = subprocess.run(["bash", "-c", launched, "run.sh", "ab", "--help"], cwd=ROOT, capture_output=True, text=True,
                           env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})
    assert shown.returncode == 0 and "--until-sure" in shown.stdout
