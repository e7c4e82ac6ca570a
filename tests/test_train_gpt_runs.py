"""train_gpt.py --runs: the runs of one process are those of a process each, and share what no seed has a say in."""

import gc
import json
import re
import threading
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from test_train_gpt import arguments, data, losses, read, train, words  # noqa: F401
from torch._dynamo.utils import counters

import train_gpt
from data import shards
from records import check_source, plot
from records.verify import verify

pytestmark = pytest.mark.usefixtures("one_thread")
# What moves in a run and must be as at first in the next: windows, sizes of batches, the optimizers' state and what AMO
# has seen and committed.
MOVING = dict(steps=63, val_every=21, batch_tokens=256, window_start=16, batch_schedule="1,2", optimizer="turbo-amo",
              row_normalize=True, bigram=500, key_shift=True, momentum_cooldown=20, target=3.0)


def series(folder, records, monkeypatch, **changes):
    """Runs in this process; what `read_series` reads."""
    monkeypatch.setattr(train_gpt, "end_on_signal", lambda message: None)  # pytest keeps its own handlers
    monkeypatch.setattr("sys.argv", ["train_gpt.py", *arguments(folder, records, **changes)])
    train_gpt.main()
    return read_series(records)


def read_series(records):
    """(folder, ledger, records of its runs in the order of their starts) of the one experiment below `records`."""
    [file] = records.glob("*/*/experiment.json")
    ledger = json.loads(file.read_text())
    return file.parent, ledger, [read(file.parent / entry["folder"]) for entry in ledger["runs"]]


def test_runs_in_one_process_are_those_of_many(data, tmp_path, monkeypatch, capsys):  # noqa: F811
    called, optimizers, alive = [], [], []
    for name, module in (("open_shard", shards), ("sha256", shards), ("warm_up", train_gpt), ("one_run", train_gpt)):
        def spy(*args, was=getattr(module, name), name=name, **options):
            alive.append((name, sum(one() is not None for one in optimizers)))
            called.append(name)
            return was(*args, **options)
        monkeypatch.setattr(module, name, spy)
    make = train_gpt.make_optimizer
    monkeypatch.setattr(train_gpt, "make_optimizer", lambda *args: (
        optimizer := make(*args), optimizers.extend(map(weakref.ref, optimizer.optimizers)))[0])
    monkeypatch.setattr(plot, "loss_curve", None)  # the experiment has one of all runs
    gc.collect()
    gc.disable()
    try:
        folder, ledger, (first, second) = series(data, tmp_path / "two", monkeypatch, runs=2, name="both", **MOVING)
    finally:
        gc.enable()
    assert ledger["status"] == "complete" and verify(folder) == [] and not (folder / "running").exists()
    assert [run["seed"] for run in (first, second)] == [0, 1] == [entry["seed"] for entry in ledger["runs"]]
    assert len(list((folder / "sources").iterdir())) == 1
    # once: training and validation shard read and hashed, warm-up; and no optimizer outlives its run
    assert called.count("open_shard") == called.count("sha256") == 2 and called.count("warm_up") == 1
    assert [count for name, count in alive if name == "one_run"] == [0, 0] and len(optimizers) == 6
    assert not [thread for thread in threading.enumerate() if thread.name == "data prefetch"]
    logs = [(folder / entry["folder"] / "log.txt").read_text() for entry in ledger["runs"]]
    assert ["compiled and warmed up in" in log for log in logs] == [True, False]
    assert ["seed 0, 1 process on cpu" in logs[0], "seed 1, 1 process on cpu" in logs[1]] == [True, True]
    monkeypatch.undo()
    for seed, run in enumerate((first, second)):
        alone = train(data, tmp_path / f"alone{seed}", seed=seed, name="both", **MOVING)
        assert losses(run) == losses(alone) and len(losses(run)) == 4
        assert run["extra"] == alone["extra"] and run["extra"]["amo"] and run["data"] == alone["data"]
    assert losses(first)[1:] != losses(second)[1:]
    stdout, found = capsys.readouterr().out, ledger["statistics"]
    values = [run["val_loss"] for run in (first, second)]
    assert found["runs"] == 2 and found["val_loss"] == {
        "mean": pytest.approx(sum(values) / 2), "sd": pytest.approx(abs(values[0] - values[1]) / 2**0.5),
        "min": min(values), "max": max(values)}
    assert found["seconds"]["max"] == pytest.approx(max(run["train_time_s"] for run in (first, second)), abs=0.001)
    assert re.search(rf"^run 2/2 seed 1: {values[1]:.5f} in \S+ s; mean {sum(values) / 2:.5f} in ", stdout, re.M)
    shown = re.findall(r"^record +(\S+)", stdout, re.MULTILINE)  # where they lie now, not where they were written
    assert shown == [str(folder / entry["folder"]) for entry in ledger["runs"]]


def test_a_second_run_compiles_nothing(data, tmp_path, monkeypatch):  # noqa: F811
    graphs, models, one_run = [], [], train_gpt.one_run
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # what guards is the same

    def spy(*args):
        graphs.append(counters["stats"]["unique_graphs"])
        models.append(args[2])
        return one_run(*args)

    monkeypatch.setattr(train_gpt, "one_run", spy)
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", torch._dynamo.config.recompile_limit)
    series(data, tmp_path, monkeypatch, runs=3, compile=True, **MOVING | dict(steps=8, val_every=8))
    assert all(model is models[0] for model in models) and models[0].compiled
    assert graphs[0] > 0 and graphs == graphs[:1] * 3 and counters["stats"]["unique_graphs"] == graphs[0]


@pytest.mark.parametrize("bad", [1, 2])
def test_a_run_that_fails_is_in_the_ledger_and_ends_the_series(data, tmp_path, monkeypatch, capsys, bad):  # noqa: F811
    validate, seen = train_gpt.validate, []

    def spoilt(*args):
        seen.append(1)
        return float("nan") if len(seen) == 2 + 3 * bad else validate(*args)  # two are of warm-up, three of each run

    monkeypatch.setattr(train_gpt, "validate", spoilt)
    with pytest.raises(SystemExit) as ended:
        series(data, tmp_path, monkeypatch, runs=3, steps=4)
    assert ended.value.code == 1 and "step 4: the validation loss is nan; lower" in capsys.readouterr().err
    folder, ledger, records = read_series(tmp_path)
    assert [entry["status"] for entry in ledger["runs"]] == ["complete"] * (bad - 1) + ["failed"]
    assert ledger["status"] == "stopped" and "the validation loss is nan" in ledger["message"]
    assert records[-1]["status"] == "failed" and "step 4: the validation loss is nan; lower" in records[-1]["message"]
    assert verify(folder) == []  # of the others the ledger says that they are still to come


def test_the_last_run_can_be_profiled(data, tmp_path, monkeypatch):  # noqa: F811
    changes = dict(steps=2, val_every=2, seed=5)
    folder, ledger, records = series(data, tmp_path / "two", monkeypatch, runs=2, profile=True, **changes)
    assert [(folder / entry["folder"] / "profile.png").is_file() for entry in ledger["runs"]] == [False, True]
    assert verify(folder) == []
    assert losses(records[1]) == losses(train(data, tmp_path / "alone", **changes | dict(seed=6)))


@pytest.mark.parametrize("name, seed, runs, wrong", [
    ("gpt", 3, 1, []), ("gpt-0", 3, 2, []), ("gpt-1", 4, 2, []),
    ("gpt", 4, 1, ["seed"]), ("x", 3, 1, ["name"]), ("gpt-2", 5, 2, ["seed"]), ("gpt-0", 2, 2, ["seed"])])
def test_name_and_seed_of_a_record_are_those_of_a_run_that_was_asked_for(monkeypatch, name, seed, runs, wrong):
    config = dict(name="gpt", seed=3, runs=runs)
    monkeypatch.setattr(check_source, "expected", lambda *_: (config, {}, []))
    found = []
    problems = SimpleNamespace(name="record.json", add=lambda path, text: found.append(path[0]))
    check_source.check_configuration(problems, dict(config=config, command=[], name=name, seed=seed), {}, [])
    assert found == wrong
