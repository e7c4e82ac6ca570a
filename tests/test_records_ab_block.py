"""records ab --block: several runs in one process, and a ledger that is as true as with one."""
import json
from collections import Counter

import pytest
from test_records_ab import SETTINGS, git, repository, statuses  # noqa: F401
from test_records_ab import run as ab_run

from records.__main__ import main
from records.live import Display
from records.log import Record
from records.runner import Runner
from records.runs import read_experiment
from records.schedule import SCHEMA, Ledger, schedule
from records.series import Series
from records.verify import verify

# Makes runs in no time. Of the seed `bad` a run fails; in that of the seed `killed` the process dies, the first time.
MANY = '''
import os, random, signal, sys
''' + SETTINGS + '''
    runs: int = option(1, "runs")
    shift: float = option(0.0, "added to the loss")
    bad: int = option(-1, "fails with this seed")
    killed: int = option(-1, "dies with this seed")

from records.series import Series
s = parse(Settings, sys.argv[1:], presets={"record": {}}, program="many.py", description="", default_preset="record")
Record._draw = lambda record: None
here = Path(__file__).resolve().parent

def one(seed, root, name):
    record = Record(root, track=s.track, name=name, target=s.target, steps=4, seed=seed, config=asdict(s),
                    script=Path(__file__), repository=here)
    record.validation(4, 3 + s.shift + random.Random(f"{seed} {s.shift}").gauss(0, 0.01), 2.0, 400)
    if seed == s.killed and not Path("dead").exists():
        Path("dead").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if seed == s.bad:
        record.fail("failed", "this seed is a bad one")
        raise RuntimeError("many.py: a bad one")
    record.finish(extra={"process": os.getpid()})

if s.runs == 1:
    one(s.seed, s.records, s.name)
else:
    series = Series(s.records, track=s.track, name=s.name, target=s.target, runs=s.runs, first_seed=s.seed,
                    script=Path(__file__), repository=here)
    for planned in series.schedule:
        with series.run(planned) as (place, name):
            one(planned["seed"], place, name)
    series.finish({})
'''
TWO = ("--a", "many.py", "--b", "many.py --shift 0.5")


@pytest.fixture
def many(repository):  # noqa: F811
    (repository / "many.py").write_text(MANY)
    (repository / ".gitignore").write_text("/data/\n__pycache__/\ndead\n")
    git(repository, "add", ".")
    git(repository, "commit", "-qm", "many")
    return repository


def test_blocks_take_turns():
    planned = schedule(["a", "b"], 5, 1, 10, block=2)
    assert [run["index"] for run in planned] == list(range(10))
    assert [(run["arm"], run["seed"]) for run in planned] == [
        ("a", 10), ("a", 11), ("b", 10), ("b", 11), ("b", 12), ("b", 13), ("a", 12), ("a", 13), ("a", 14), ("b", 14)]
    assert [run["slot"] for run in schedule(["a", "b"], 6, 2, 0, block=2)] == [0] * 4 + [1] * 4 + [0] * 4
    assert schedule(["a", "b", "c"], 4, 2, 0, block=1) == schedule(["a", "b", "c"], 4, 2, 0)


def test_every_run_of_a_block_has_its_record_and_counts(many, tmp_path, capsys):
    status, ledger = ab_run(tmp_path, *TWO, "--runs", "5", "--block", "2")
    assert status == 0 and ledger.content["status"] == "complete" and verify(ledger.folder) == []
    assert sorted(statuses(ledger)) == sorted((arm, seed, "complete") for arm in ("a", "b") for seed in range(5))
    experiment = read_experiment(ledger.folder)
    for runs in experiment.arms.values():
        assert {run.seed for run in runs} == set(range(5)) and not (runs[0].folder / "source.txt").exists()
        made = {run.seed: run.record["extra"]["process"] for run in runs}
        assert sorted(Counter(made.values()).values()) == [1, 2, 2] and made[0] == made[1] and made[2] == made[3]
    assert len(list((ledger.folder / "sources").iterdir())) == 1 and not (ledger.folder / "running").exists()
    text = (ledger.folder / "report.md").read_text()
    assert "5 runs of each arm" in text and "2 of an arm at a time in one process" in text
    assert "intervals of times are too narrow" in text and "--runs" not in text  # the last process made one
    shown = capsys.readouterr().out
    assert "5 runs of each of 2 arms, 2 in a process: " in shown and "runs 1 to 2 of 10: a seeds 0 to 1\n" in shown
    assert "run 9 of 10: a seed 4\n" in shown


def test_what_a_failed_run_kept_from_its_turn_is_made_by_another_process(many, tmp_path):
    status, ledger = ab_run(tmp_path, "--a", "many.py", "--b", "many.py --bad 1", "--runs", "4", "--block", "4",
                            "--keep-going")
    assert status == 0
    assert statuses(ledger)[4:] == [("b", 0, "complete"), ("b", 1, "failed"), ("b", 2, "interrupted"),
                                    ("b", 3, "interrupted"), ("b", 2, "complete"), ("b", 3, "complete")]
    assert "this seed is a bad one" in ledger.runs[5]["message"]
    assert verify(ledger.folder) == []


def test_a_process_that_dies_loses_one_run_and_resume_makes_the_rest(many, tmp_path):
    status, ledger = ab_run(tmp_path, *TWO, "--runs", "3", "--block", "3", "--", "--killed", "1")
    assert status == 1
    assert statuses(ledger) == [("a", 0, "complete"), ("a", 1, "interrupted"), ("a", 2, "interrupted")]
    kept = json.loads((ledger.folder / ledger.runs[1]["folder"] / "record.json").read_text())
    assert kept["status"] == "interrupted" and kept["seed"] == 1  # what it had done until then
    status, ledger = ab_run(tmp_path, "--resume", str(ledger.folder))
    assert status == 0 and statuses(ledger)[3:] == [(arm, seed, "complete") for arm, seed in (
        ("a", 1), ("a", 2), ("b", 0), ("b", 1), ("b", 2))]
    assert verify(ledger.folder) == []


def test_runs_of_a_block_under_way_when_everything_was_killed(tmp_path, monkeypatch):
    """On disk: a process had made two runs of four and was in the third, and nobody saw its end."""
    monkeypatch.setattr(Record, "_draw", lambda record: None)
    content = {"schema": SCHEMA, "kind": "experiment", "track": "race", "question": {"target": None}, "block": 4,
               "arms": [{"label": "a", "rev": None, "commit": None, "patch_sha256": None, "source_sha256": None}],
               "slots": [{"gpu": None, "processes": 1}], "first_seed": 7, "schedule": schedule(["a"], 4, 1, 7, 4),
               "runs": []}
    script = tmp_path / "script.py"
    script.write_text("")
    (tmp_path / "experiment").mkdir()
    ledger = Ledger(tmp_path / "experiment", content)
    place = [ledger.begin(planned)[1] for planned in ledger.schedule][0]
    series = Series(place, track="race", name="a-0", target=None, runs=4, first_seed=7, script=script,
                    repository=tmp_path)
    for planned in series.schedule[:3]:
        own = series.ledger.begin(planned)
        record = Record(own[1], track="race", name="x", target=None, steps=1, seed=planned["seed"], config={},
                        script=script, repository=tmp_path)
        if planned["seed"] < 9:
            record.validation(1, 3.0, 1.0, 10)
            record.finish()
            series.ledger.end(own[0], repository=tmp_path)
        else:
            record.progress(0, 0.0)
    ledger = Ledger.read(ledger.folder)
    assert Display(ledger)._progress(ledger.runs, 5.0) == ("> a seeds 7 to 10, 5 s: 2 of 4 runs, "
                                                           "step:0/1 train_time:0ms step_avg:0.00ms")
    assert ledger.adopt(tmp_path) == 4
    assert [(run["seed"], run["status"], bool(run["record_sha256"]), bool(run["source_sha256"]))
            for run in ledger.runs] == [(7, "complete", True, True), (8, "complete", True, True),
                                        (9, "interrupted", True, True), (10, "interrupted", False, False)]
    assert ledger.settled() == {0, 1} and ledger.adopt(tmp_path) == 0


@pytest.mark.parametrize("words, says", [
    (("--a", "race.py", "--b", "race.py --shift 1", "--block", "2"), "race.py --help has no --runs"),
    ((*TWO, "--block", "0"), "--block 0: expected at least 1"),
    ((*TWO, "--", "--runs", "4"), "ab has --runs for each arm, and --block for those of one process"),
])
def test_mistakes_are_said_before_anything_is_written(many, tmp_path, words, says, capsys):
    assert main(["ab", "--records", str(tmp_path / "records"), *words]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "records").exists()


def test_two_series_can_be_compared_as_they_are(tmp_path, monkeypatch, capsys):
    """Each a process of its own: what `ab` is not needed for."""
    monkeypatch.setattr(Record, "_draw", lambda record: None)
    script = tmp_path / "script.py"
    script.write_text("")
    for name, best in (("a", 3.0), ("b", 2.5)):
        series = Series(tmp_path / "records", track="race", name=name, target=None, runs=3, first_seed=0, script=script,
                        repository=tmp_path)
        for planned in series.schedule:
            with series.run(planned) as (place, label):
                record = Record(place, track="race", name=label, target=None, steps=1, seed=planned["seed"], config={},
                                script=script, repository=tmp_path)
                record.validation(1, best + planned["seed"] / 100, 1.0, 10)
                record.finish()
        series.finish({})
    capsys.readouterr()
    assert main(["compare", "--json", f"a={tmp_path}/records/race/*_a", f"b={tmp_path}/records/race/*_b"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [arm["n"] for arm in found["arms"]] == [3, 3] and found["settings"] == {}
    assert found["results"]["b"]["final"]["difference"] == pytest.approx(-0.5)


def test_a_process_gets_runs_of_one_block_whose_seeds_follow_each_other():
    """It counts on from its first seed."""
    content = {"block": 4, "first_seed": 10, "arms": [{"label": "a"}], "slots": [{"gpu": None, "processes": 1}],
               "schedule": schedule(["a"], 6, 1, 10, 4),
               "runs": [{"index": index, "status": status} for index, status in enumerate(
                   ["failed", "complete", "failed", "failed"])]}
    runner = Runner(Ledger(None, content), [], None, None, retry_failed=True, display=True)
    found = []
    while planned := runner._next_runs(0):
        found.append([run["seed"] for run in planned])
        runner._todo = [run for run in runner._todo if run not in planned]
    assert found == [[10], [12, 13], [14, 15]] and runner._next_runs(1) == []
