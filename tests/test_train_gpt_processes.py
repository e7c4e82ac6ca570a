"""train_gpt.py as processes: several of them compute what one does, and none outlives or loses what was measured."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import run_ranks
from test_train_gpt import ROOT, arguments, data, losses, only_record, read, train  # noqa: F401
from test_train_gpt_runs import read_series

import optim
import train_gpt
from records.log import Record, parse_log

LONG = dict(steps=1500, batch_tokens=128, device_batch_tokens=128, val_tokens=256, val_every=5)  # half a minute
ENVIRONMENT = {key: value for key, value in os.environ.items()
               if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
proc_only = pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")


def torchrun(count: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]


@contextlib.contextmanager
def started(command, seconds=60):
    """The process, its output as text in pipes; ended on leaving and after so many seconds, so that no test hangs."""
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, start_new_session=True)
    watchdog = threading.Timer(seconds, process.terminate)  # not kill: torchrun must end its ranks
    watchdog.start()
    try:
        yield process
    finally:
        watchdog.cancel()
        process.terminate()
        process.communicate()


# ---------------------------------------------------------------------------------------------------------------------
# Several processes

RUNS = {name: dict(optimizer=name) for name in ("turbo-muon", "muon", "adamw")}
RUNS["parts"] = dict(steps=8, batch_schedule="1,2", bigram=500, key_shift=True, attention_gates="all",
                     value_gates=True, cautious=True, row_normalize=True, weight_decay=0.1)


def several_runs(rank, size, command_lines, folder):
    """All of them in one process group; what this rank prints goes into a file of `folder`.

    Tables of 12288 elements are cut over ranks too, as the large ones of a real run are.
    """
    with pytest.MonkeyPatch.context() as patch, open(folder / f"stdout_{rank}", "w") as stdout, \
            contextlib.redirect_stdout(stdout):
        patch.setattr(optim.adam, "SMALLEST_SHARDED", 4096)
        patch.setattr(Record, "_draw", lambda record: None)
        for name in ("init_process_group", "destroy_process_group"):  # run_ranks does
            patch.setattr(dist, name, lambda *args, **options: None)
        for command_line in command_lines:
            train_gpt.main(command_line)


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """Name of the run -> losses of one process."""
    alone = RUNS | {"seed 1": RUNS["parts"] | dict(seed=1)}
    return {name: losses(train(data, tmp_path_factory.mktemp("alone"), **changes)) for name, changes in alone.items()}


@pytest.mark.parametrize("count, names", [(2, tuple(RUNS)), (4, ("turbo-muon", "parts"))])
def test_several_processes_have_the_losses_of_one(alone, data, tmp_path, count, names):
    command_lines = [arguments(data, tmp_path / name, **RUNS[name]) for name in names]
    command_lines.append(arguments(data, tmp_path / "series", runs=2, **RUNS["parts"]))
    run_ranks(several_runs, count, command_lines, tmp_path)
    stdout = "".join(file.read_text() for file in tmp_path.glob("stdout_*"))
    for name in names:
        record = read(only_record(tmp_path / name))  # one, although there were several processes
        assert record["status"] == "complete" and len(losses(record)) == (5 if name == "parts" else 11)
        # Adam's first updates are little more than signs, so a rounding error in a gradient near 0 counts.
        assert losses(record) == pytest.approx(alone[name], rel=1e-4 if name == "adamw" else 1e-5), name
    folder, ledger, (first, second) = read_series(tmp_path / "series")  # one ledger, too
    assert ledger["status"] == "complete" and ledger["slots"] == [{"gpu": None, "processes": count}]
    assert losses(first) == losses(read(only_record(tmp_path / "parts")))
    assert second["seed"] == 1 and losses(second) == pytest.approx(alone["seed 1"], rel=1e-5)
    assert stdout.count(f"seed 0, {count} processes on cpu") == len(names) + 1
    assert len(re.findall(r"^step:(\d+)/\1 val_loss", stdout, re.MULTILINE)) == len(names) + 2


def test_processes_that_do_not_divide_the_batch_end_with_one_message(data, tmp_path):
    command = [*torchrun(2), "train_gpt.py", *arguments(data, tmp_path / "records", batch_tokens=1152)]
    ended = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert ended.returncode != 0
    [ours] = [line for line in ended.stderr.splitlines() if line.startswith("train_gpt.py: ")]
    assert "--batch-tokens 1152 must be a multiple of 256: 2 processes" in ours and "--nproc_per_node" in ours
    assert 'train_gpt.py", line' not in ended.stderr  # torchrun shows a traceback of its own, we none
    assert not (tmp_path / "records").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Ended from outside


def validations(process, count: int) -> list[str]:
    """The next `count` validation lines that it prints."""
    lines = []
    for line in process.stdout:
        if " val_loss:" in line:
            lines.append(line.rstrip("\n"))
        if len(lines) == count:
            return lines
    raise AssertionError(f"ended after {lines}: {process.stderr.read()}")


def assert_holds(folder, lines: list[str]) -> None:
    """The record says "interrupted" and has every validation line that was printed, in record.json and in log.txt."""
    record, log = read(folder), (folder / "log.txt").read_text()
    assert record["status"] == "interrupted" and set(lines) <= set(log.splitlines())
    found = [f"step:{point['step']}/{record['steps_planned']} val_loss:{point['val_loss']:.6f} "
             f"train_time:{round(1000 * point['train_time_s'])}ms" for point in record["validation"]]
    printed = [line.split(" step_avg")[0] for line in lines]
    assert len(printed) >= 3 and found[:len(printed)] == printed
    _, curve = parse_log(log)
    assert [point["step"] for point in curve][:len(lines)] == [5 * number for number in range(len(lines))]


def test_sigkill_leaves_a_record_with_everything_printed_so_far(data, tmp_path):
    with started([sys.executable, "train_gpt.py", *arguments(data, tmp_path, **LONG)]) as process:
        lines = validations(process, 4)
        process.kill()
        rest, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL
    lines += [line for line in rest.splitlines() if " val_loss:" in line and line.endswith(tuple("0123456789"))]
    assert_holds(only_record(tmp_path), lines)


def test_sigint_ends_a_single_process_within_five_seconds_with_status_130(data, tmp_path):
    with started([sys.executable, "train_gpt.py", *arguments(data, tmp_path, **LONG)]) as process:
        lines = validations(process, 3)
        process.send_signal(signal.SIGINT)
        before = time.monotonic()
        _, stderr = process.communicate()
        assert time.monotonic() - before < 5
        assert process.returncode == 130
    folder = only_record(tmp_path)
    assert stderr == f"interrupted; what was measured so far: {folder}\n"
    assert_holds(folder, lines)


def processes_with(text: str) -> list[str]:
    """Command lines of all live processes that have `text` in them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command_line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has just ended
            continue
        if text in command_line:
            found.append(command_line)
    return found


@proc_only
def test_sigint_to_torchrun_ends_all_ranks_within_ten_seconds(data, tmp_path):
    options = arguments(data, tmp_path, **LONG | dict(batch_tokens=256))
    with started([*torchrun(2), "train_gpt.py", *options]) as process:
        lines = validations(process, 3)
        assert len(processes_with(str(tmp_path))) >= 3  # torchrun and two ranks
        process.send_signal(signal.SIGINT)
        before = time.monotonic()
        _, stderr = process.communicate()
        assert process.returncode != 0
        while processes_with(str(tmp_path)) and time.monotonic() - before < 10:
            time.sleep(0.05)
        assert processes_with(str(tmp_path)) == [] and time.monotonic() - before < 10
    folder = only_record(tmp_path)
    assert stderr.count(f"interrupted; what was measured so far: {folder}") == 1
    assert_holds(folder, lines)
