"""train_cifar.py: whatever is wrong ends in a status that is not 0 and one line that says what and the way out."""

import json
import os
import subprocess
import sys

import pytest
import torch
from test_train_cifar import ROOT, arguments, only_record, train

from records.verify import verify
from train_cifar import Net, Trainer


def only_line(stderr: str) -> str:
    """The message, which must be the one line on stderr."""
    [line] = stderr.strip().splitlines()
    assert line.startswith("train_cifar.py: ")
    return line


@pytest.fixture
def fails(tmp_path, capsys):
    """Runs train_cifar.main, which must end with exit status 1 or 2; returns its message."""

    def run(status=1, records=tmp_path / "records", **changes) -> str:
        with pytest.raises(SystemExit) as ended:
            train(records, **changes)
        assert ended.value.code == status
        return only_line(capsys.readouterr().err)

    return run


@pytest.mark.parametrize("changes, said", [
    (dict(epoch=3), "unknown option --epoch (nearest: --epochs"), (dict(preset="95"), "unknown preset '95'"),
    pytest.param(dict(polar="turbo-3", optimizer="adamw"), "--polar turbo-3 needs an --optimizer", id="polar"),
    (dict(optimizer="turbo-moun"), "--optimizer expects one of adamw, muon"),
    (dict(depth=4), "--depth expects one of 2, 3"),
    (dict(views=3), "--views expects one of 1, 2, 6"), (dict(epochs=0), "--epochs 0.0 must be at least"),
    (dict(batch_size=301), "--batch-size 301 is more than --train-images 300"), (dict(batch_size=1), "--batch-size 1"),
    (dict(runs=0), "--runs 0"), (dict(seed=-1), "--seed -1"), (dict(translate=32), "--translate 32"),
    (dict(cutout=40), "--cutout 40"), (dict(target=94), "--target 94.0 must be at most 1"),
    (dict(width2=0), "--width2 0"), (dict(train_images=60000), "--train-images 60000"), (dict(lr=-1), "--lr -1"),
    (dict(lr="nan"), "--lr expects float"),
    (dict(momentum=1), "--momentum 1"), (dict(label_smoothing=2), "--label-smoothing 2"),
    (dict(activation="relu"), "--activation expects one of gelu, silu"),
    (dict(track="cifar10-94"), "--track cifar10-94 is for CIFAR-10 itself: --source synthetic needs another"),
], ids=lambda value: "-".join(map(str, *value.items())) if isinstance(value, dict) else None)
def test_an_option_that_cannot_work_is_named_before_anything_is_written(fails, tmp_path, changes, said):
    message = fails(status=2, **changes)
    assert said in message and message.endswith("; see train_cifar.py --help")
    assert not (tmp_path / "records").exists()


@pytest.mark.parametrize("changes, said", [
    (dict(name="a/b"), "'a/b' cannot name a folder"), (dict(name="a/b", runs=2), "'a/b' cannot name a folder"),
    (dict(dtype="float16"), "--dtype float16 is for GPUs: on a CPU use --dtype float32"),
    (dict(graph="step"), "--graph step is for GPUs"), (dict(graph="gradients"), "--graph gradients is for GPUs")],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None)
def test_an_option_that_does_not_suit_the_machine_or_the_record_is_named(fails, tmp_path, changes, said):
    assert said in fails(**changes)
    assert not list(tmp_path.rglob("record.json"))


def test_kernels_that_cannot_run_say_why_and_the_way_out(fails, monkeypatch):
    monkeypatch.setattr("kernels.why_not", lambda device: "they need compute capability 9.0 (H100) or newer, not 8.0")
    assert "--engine fused: they need compute capability 9.0 (H100) or newer, not 8.0; use --engine auto" in \
        fails(engine="fused")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said_with_the_option_that_does_without(fails):
    assert "torch finds no GPU: look at nvidia-smi, or use --device cpu" in fails(device="cuda")


def test_damaged_data_is_named_with_the_command_that_fetches_it(fails, tmp_path):
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        (tmp_path / f"{name}.bin").write_bytes(bytes(3073))
    message = fails(source="official", data=tmp_path)
    assert f"{tmp_path}/data_batch_1.bin: 3073 bytes, expected 30730000" in message
    assert f"run: python -m data.cifar10 --folder {tmp_path}" in message
    assert not (tmp_path / "records").exists()  # no record of a run that never began


def test_data_that_cannot_be_fetched_says_the_ways_out(tmp_path, monkeypatch, capsys):
    def no_network(*_, **__):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(SystemExit):
        train(tmp_path / "records", source="official", data=tmp_path / "cifar10")
    before, message = capsys.readouterr().err.splitlines()
    assert "cifar10: downloading https://www.cs.toronto.edu" in before
    assert "did not deliver (OSError: Network is unreachable)" in message
    assert "copy the six .bin files" in message and "./run.sh train_cifar.py --preset local" in message


def test_a_file_in_the_place_of_the_record_folder_is_named(fails, tmp_path):
    (tmp_path / "taken").write_text("mine")
    for runs in (1, 2):
        message = fails(records=tmp_path / "taken", runs=runs)
        assert f"cannot write {tmp_path / 'taken'}" in message and "--records FOLDER" in message
    assert (tmp_path / "taken").read_text() == "mine"


def failed(tmp_path, message: str) -> dict:
    """The record, which must say why the run failed, and verify."""
    record = only_record(tmp_path / "records")
    assert record["status"] == "failed" and record["message"] == message.removeprefix("train_cifar.py: ")
    assert record["validation"] == [] and verify(record["folder"]) == []
    return record


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_the_step(fails, tmp_path, monkeypatch, bad):
    gradients = Trainer.gradients

    def poisoned(self, train_bias):
        gradients(self, train_bias)
        if self.step == 4:
            self.losses[self.step] = bad

    monkeypatch.setattr(Trainer, "gradients", poisoned)
    message = fails()
    assert f"the loss of step 5 is {bad}; lower --lr, --head-lr or --bias-lr" in message
    failed(tmp_path, message)


def test_a_gradient_that_is_not_finite_names_the_filter_and_the_step(fails, tmp_path, monkeypatch):
    update = Trainer.update

    def poisoned(self):
        if self.step == 6:
            self.net.groups[1].convs[0].weight.grad[0] = float("nan")
        update(self)

    monkeypatch.setattr(Trainer, "update", poisoned)
    message = fails()
    assert "step 7: the gradient of groups.1.convs.0.weight is NaN or infinite" in message
    failed(tmp_path, message)


def test_an_absurd_learning_rate_ends_a_real_process_with_one_line(tmp_path):
    command = [sys.executable, "train_cifar.py", *arguments(tmp_path / "records", head_lr=1e36)]
    ended = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
                           timeout=120)
    assert ended.returncode == 1
    message = only_line(ended.stderr)
    assert "is NaN or infinite" in message or "lower --lr" in message
    failed(tmp_path, message)


def test_out_of_gpu_memory_names_the_option_that_takes_less(fails, tmp_path, monkeypatch):
    forward, calls = Net.forward, []

    def full(net, x):
        calls.append(1)
        if len(calls) > 10:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return forward(net, x)

    monkeypatch.setattr(Net, "forward", full)
    message = fails()
    assert "out of GPU memory: lower --batch-size (now 50)" in message
    failed(tmp_path, message)


def test_a_mistake_of_ours_is_in_the_record_and_its_traceback_on_the_screen(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "run", lambda *_: {}["no such thing"])
    with pytest.raises(KeyError, match="no such thing"):
        train(tmp_path / "records")
    failed(tmp_path, "KeyError: 'no such thing'")


def test_a_signal_ends_a_series_at_once_and_the_ledger_says_so(tmp_path):
    command = [sys.executable, "train_cifar.py", *arguments(tmp_path / "records", runs=500)]
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as process:
        assert any(line.startswith("run 2/500") for line in process.stdout)
        process.terminate()
        assert process.wait(20) == 128 + 15
        assert process.stderr.read().strip() == \
            f"interrupted; what was measured so far is in {tmp_path / 'records'}/cifar10-local"
    [file] = tmp_path.glob("records/*/*/experiment.json")
    ledger = json.loads(file.read_text())
    statuses = [entry["status"] for entry in ledger["runs"]]
    assert statuses[:2] == ["complete", "complete"] and set(statuses[2:]) <= {"complete", "interrupted"}
    assert ledger["status"] == "running" and len(ledger["schedule"]) == 500
