"""Runs and experiments as they are read back: what they hold, and what is said of folders that hold none."""
import json
from pathlib import Path

import pytest

from made_runs import falling, make_run
from records.files import RecordError
from records.runs import find_runs, read_experiment, read_run

ROOT = Path(__file__).resolve().parent.parent


def test_a_run_of_this_repository():
    run = read_run(ROOT / "records/wiki-3.324/2026-11-22_210035_muon-seed1")
    assert (run.track, run.name, run.seed, run.status, run.steps, run.tokens, run.train_time_s) == \
        ("wiki-3.324", "muon-seed1", 1, "complete", 600, 78643200, 158.301)
    assert (run.metric, run.direction, run.target, run.final) == ("val_loss", "down", 3.324, 3.4222506880760193)
    assert run.step_ms == pytest.approx(263.835) and len(run.curve) == 4 and run.config["optimizer"] == "muon"
    assert run.curve[1].tokens == 26214400 and run.steps_to() is None and run.seconds_to(3.5) == 158.301
    between = (3.6843611523509026 - 3.5) / (3.6843611523509026 - 3.4222506880760193)
    assert run.steps_to(3.5, interpolate=True) == pytest.approx(400 + 200 * between)
    assert run.seconds_to(3.5, interpolate=True) == pytest.approx(104.047 + (158.301 - 104.047) * between)


@pytest.mark.parametrize("curve, direction, target, steps, between", [
    ([(0, 4.0), (10, 3.0), (20, 2.0)], "down", 2.5, 20, 15.0),
    ([(0, 4.0), (10, 3.0), (20, 2.0)], "down", 3.0, 10, 10.0),          # exactly on a validation
    ([(0, 4.0), (10, 3.0), (20, 2.0)], "down", 4.5, 0, 0),              # there from the first one on
    ([(0, 4.0), (10, 3.0), (20, 2.0)], "down", 1.9, None, None),
    ([(0, 4.0), (10, 2.4), (20, 3.0), (30, 2.0)], "down", 2.5, 10, 9.375),   # the first time counts
    ([(0, 4.0), (10, None), (20, 2.0)], "down", 2.5, 20, 20),           # nothing to draw a line from
    ([(0, 0.1), (4, 0.9), (8, 0.95)], "up", 0.94, 8, 7.2),
    ([(0, 0.1), (4, 0.9), (8, 0.95)], "up", 0.96, None, None),
    ([], "down", 2.5, None, None)])
def test_steps_and_seconds_to_a_target(tmp_path, curve, direction, target, steps, between):
    metric = {"down": "val_loss", "up": "accuracy"}[direction]
    run = read_run(make_run(tmp_path / "a", curve, metric=metric, target=target))
    assert (run.metric, run.direction) == (metric, direction)
    assert run.steps_to() == steps and run.steps_to(target) == steps
    assert run.steps_to(interpolate=True) == (between if between is None else pytest.approx(between))
    assert run.seconds_to() == (None if steps is None else 0.25 * steps)
    assert run.seconds_to(interpolate=True) == (None if between is None else pytest.approx(0.25 * between))


def test_only_a_complete_run_has_a_final_value(tmp_path):
    assert read_run(make_run(tmp_path / "a", falling(3.2))).final == 3.2
    for name, status in (("b", "interrupted"), ("c", "failed")):
        run = read_run(make_run(tmp_path / name, falling(3.2), status=status, message="out of memory"))
        assert run.final is None and run.curve[-1].value == 3.2 and not run.complete
    assert read_run(make_run(tmp_path / "d", [])).final is None
    assert read_run(make_run(tmp_path / "e", [(0, 4.0), (5, None)])).final is None
    run = read_run(make_run(tmp_path / "f", falling(3.2), target=None, seed=None, tokens=None))
    assert run.steps_to() is None and run.steps_to(3.9) == 20 and run.step_ms == 250.0
    assert read_run(make_run(tmp_path / "g", [(0, 4.0)])).step_ms is None


def test_the_track_says_which_metric_counts(tmp_path):
    run = read_run(make_run(tmp_path / "a", [(8, 0.94)], metric="accuracy", track="cifar10-94", target=0.94))
    assert (run.metric, run.direction, run.steps_to()) == ("accuracy", "up", 8)
    with pytest.raises(RecordError, match=r"b/record.json: validation\[0\]: .* has no 'accuracy', the metric of the"):
        read_run(make_run(tmp_path / "b", [(8, 0.94)], track="cifar10-94"))


@pytest.mark.parametrize("changes, message", [
    ({"steps": "600"}, "steps is '600', expected an integer"),
    ({"steps": True}, "steps is True"),
    ({"steps": -1}, "steps is -1, expected a number of at least 0"),
    ({"target": 10**400}, r"target is 1000.*\.\.\., expected a number of at most 1e\+15"),
    ({"target": -1e16}, r"target is -1e\+16"),
    ({"train_time_s": None}, "train_time_s is missing, expected a number"),
    ({"status": "fine"}, "status is 'fine', expected one of complete, failed, interrupted"),
    ({"track": 3}, "track is 3, expected text"),
    ({"validation": {}}, r"validation is \{\}, expected a list"),
    ({"validation": [3]}, r"validation\[0\]: 3 has no 'val_loss'"),
    ({"validation": [{"step": 1, "tokens": 1, "train_time_s": 1, "val_loss": "3"}]}, r"\[0\]: val_loss is '3'"),
    ({"validation": [{"step": 1, "tokens": 1, "train_time_s": 1e400, "val_loss": 3}]}, "cannot read .*Infinity"),
    ({"validation": [{"step": step, "tokens": 1, "train_time_s": 1, "val_loss": 3} for step in (5, 5)]},
     r"validation\[1\]: step 5 at 1.0 s follows step 5 at 1.0 s; expected both to grow"),
    ({"validation": [{"step": step, "tokens": 1, "train_time_s": -step, "val_loss": 3} for step in (-5, -4)]},
     r"validation\[0\]: step is -5"),
    ({"target": [3]}, r"target is \[3\], expected a number or null"),
    ({"config": "x" * 500}, r"config is 'x+\.\.\., expected an object or null")])
def test_what_a_record_cannot_hold(tmp_path, changes, message):
    folder = make_run(tmp_path / "a", falling(3.2), **changes)
    with pytest.raises(RecordError, match=message) as caught:
        read_run(folder)
    assert str(folder / "record.json") in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b"\xff\xfe\0", b'{"steps": NaN}', b"[" * 100_000, b"{",
                                     b"1" * 5000])
def test_what_is_no_record(tmp_path, content):
    with pytest.raises(RecordError, match=r"cannot read .*record\.json \(No such file.*expected a run's folder"):
        read_run(tmp_path)
    (tmp_path / "record.json").write_bytes(content)
    with pytest.raises(RecordError, match=r"record\.json"):
        read_run(tmp_path)


def test_finding_runs(tmp_path):
    for name in ("t/1_muon-a", "t/2_muon-b", "t/3_adam", "t/4_ab/runs/x-0", "t/4_ab/runs/x-1"):
        make_run(tmp_path / name, falling(3.2), name=name)
    make_run(tmp_path / "t/3_adam/kept", falling(3.2), name="part of a run, none itself")
    (tmp_path / "elsewhere").mkdir()
    make_run(tmp_path / "elsewhere/5", falling(3.2))
    (tmp_path / "t/link").symlink_to(tmp_path / "elsewhere")
    names = [run.name for run in find_runs([tmp_path / "t"])]
    assert names == ["t/1_muon-a", "t/2_muon-b", "t/3_adam", "t/4_ab/runs/x-0", "t/4_ab/runs/x-1"]
    assert [run.name for run in find_runs([f"{tmp_path}/t/*_muon-?"])] == names[:2]
    assert [run.name for run in find_runs([tmp_path / "t/3_adam", f"{tmp_path}/t/[13]*"])] == [names[2], names[0]]
    for wrong in ("none", "t/*_sgd", "t/4_ab/empty"):
        with pytest.raises(RecordError, match="no run in .*: expected a folder with record.json"):
            find_runs([tmp_path / "t", tmp_path / wrong])


def write_experiment(folder, entries, **changes):
    folder.mkdir(exist_ok=True)
    ledger = {"schema": 1, "track": "somebody-3.3", "arms": [{"label": "A"}, {"label": "B"}], "runs": entries} | changes
    (folder / "experiment.json").write_text(json.dumps(ledger))
    return folder


def test_an_experiment(tmp_path):
    for name in ("A-0", "B-1", "B-2", "B-1-again"):
        make_run(tmp_path / "runs" / name, falling(3.2), name=name,
                 status="interrupted" if name == "B-1" else "complete")
    (tmp_path / "runs/A-3").mkdir()
    entries = [{"arm": arm, "folder": folder, "status": "complete"} for arm, folder in
               [("A", "runs/A-0"), ("B", "runs/B-1"), ("B", "runs/B-2"), ("A", "runs/A-3"), ("A", None),
                ("B", "runs/B-1-again")]]
    experiment = read_experiment(write_experiment(tmp_path, entries))
    assert {label: [run.name for run in runs] for label, runs in experiment.arms.items()} == {
        "A": ["A-0"], "B": ["B-1", "B-2", "B-1-again"]}
    assert experiment.unrecorded == {"A": [entries[3], entries[4]], "B": []}
    assert experiment.ledger["track"] == "somebody-3.3"


@pytest.mark.parametrize("entries, changes, message", [
    ([{"arm": "C", "folder": "runs/x"}], {}, r"runs\[0\] is .*expected an object whose arm is one of A, B"),
    ([{"arm": "A", "folder": "../x"}], {}, r"runs\[0\].folder is '../x', expected a folder inside"),
    ([{"arm": "A", "folder": "/etc"}], {}, "folder is '/etc'"),
    ([{"arm": "A", "folder": "out"}], {}, "folder is 'out'"),       # a link that leads out
    ([{"arm": "A", "folder": 3}], {}, "folder is 3"),
    ([{"arm": "A", "folder": "a\0b"}], {}, "folder is"),
    ([3], {}, r"runs\[0\] is 3"),
    (None, {}, "runs is missing, expected a list"),
    ([], {"arms": []}, r"arms is \[\], expected a list of objects with a label"),
    ([], {"arms": [{"label": "A"}, {"label": "A"}]}, "two arms have the same label: A, A")])
def test_ledgers_that_cannot_be(tmp_path, entries, changes, message):
    (tmp_path / "e").mkdir()
    (tmp_path / "e/out").symlink_to(tmp_path)
    with pytest.raises(RecordError, match=message) as caught:
        read_experiment(write_experiment(tmp_path / "e", entries, **changes))
    assert "e/experiment.json" in str(caught.value)


def test_a_folder_without_a_ledger(tmp_path):
    with pytest.raises(RecordError, match="expected an experiment's folder, as `python -m records ab` leaves it"):
        read_experiment(tmp_path)
