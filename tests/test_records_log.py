"""The record of a run: what is in it, that it is true whenever the run ends, and that it names no machine."""
import builtins
import gc
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest

from records.environment import DIFF_LIMIT, Scrubber, git
from records.log import Record, RecordError, parse_log, unpack_source

ROOT = Path(__file__).resolve().parent.parent


def new_record(root, **changes):
    arguments = dict(track="text-local", name="turbo-muon", target=3.0, steps=100, seed=7, config={"lr": 0.02},
                     script=ROOT / "records" / "log.py", repository=ROOT, device="cpu")
    return Record(root, **(arguments | changes))


def strict(record):
    """record.json, read as strict JSON (no NaN, no Infinity)."""
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")
    return json.loads((record.folder / "record.json").read_text(), parse_constant=refuse)


def log_of(record):
    return (record.folder / "log.txt").read_text()


def test_a_complete_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = new_record("records")
    assert strict(record)["status"] == "interrupted"        # from the first moment
    assert record.folder.parent == Path("records/text-local")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d{6}_turbo-muon", record.folder.name)
    record.data({"val_000.bin": "ab" * 32})
    record.data({"train_000.bin": "cd" * 32})
    record.line("only in the log", console=False)
    losses = [4.123456789, 2.9999999, 3.0000004]
    for number, loss in enumerate(losses, 1):
        record.validation(40 * number, loss, 1.2345678 * number, 1000 * number)
        assert strict(record)["status"] == "interrupted" and len(strict(record)["validation"]) == number
    summary = record.finish(peak_memory_bytes=3 * 2**30, extra={"bigram loss": 2.5})

    content = strict(record)
    assert content["validation"] == [
        {"step": 40, "tokens": 1000, "train_time_s": 1.235, "val_loss": 4.123456789},
        {"step": 80, "tokens": 2000, "train_time_s": 2.469, "val_loss": 2.9999999},
        {"step": 120, "tokens": 3000, "train_time_s": 3.704, "val_loss": 3.0000004}]
    expected = {"schema": 2, "track": "text-local", "name": "turbo-muon", "status": "complete", "target": 3.0,
                "reached": True, "time_to_target_s": 2.469, "train_time_s": 3.704, "steps": 120, "steps_planned": 100,
                "tokens": 3000, "val_loss": 3.0000004, "seed": 7, "config": {"lr": 0.02}, "message": None,
                "data": {"val_000.bin": "ab" * 32, "train_000.bin": "cd" * 32}, "peak_memory_bytes": 3 * 2**30,
                "extra": {"bigram loss": 2.5}, "log_sha256": hashlib.sha256(log_of(record).encode()).hexdigest()}
    assert {key: content[key] for key in expected} == expected
    assert content.keys() - expected.keys() == {"started", "command", "hardware", "versions", "git", "source",
                                                "validation"}
    assert content["hardware"].keys() == {"accelerator", "accelerator_count", "accelerator_memory_bytes", "driver",
                                          "cpu", "cpu_count", "memory_bytes"}
    assert content["versions"].keys() == {"python", "torch", "triton", "cuda", "numpy"}
    assert content["hardware"]["accelerator"] is None and content["hardware"]["accelerator_count"] == 0
    assert content["command"][0] == "records/log.py"
    assert (record.folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(os.listdir(record.folder)) == ["log.txt", "loss.png", "record.json", "source.txt"]

    console = capsys.readouterr().out
    assert "step:40/100 val_loss:4.123457 train_time:1235ms step_avg:30.88ms tokens:1000\n" in console
    assert "only in the log" not in console and "only in the log\n" in log_of(record)
    assert summary in console and len(summary.splitlines()) <= 24 and max(map(len, summary.splitlines())) <= 100
    for part in ("3.00000", "3, reached after 2.469 s", "3.704 s", "120 of 100, 30.87 ms each", "3,000, 810 per second",
                 "3.00 GiB", "bigram loss", "2.50000", str(record.folder)):
        assert part in summary


def test_the_log_says_everything_that_the_record_claims(tmp_path):
    record = new_record(tmp_path, config={"lr": 0.02, "betas": (0.8, 0.95), "clip": float("inf"), "name": "a: b\nc"})
    record.data({"val.bin": "00"})
    record.line('config: {"lr": 9}')        # a line of the script is no part of the description
    record.validation(50, 3.1234567, 1.5, 512)
    record.finish(extra={"evaluations": 2})
    content, (facts, curve) = strict(record), parse_log(log_of(record))
    for key in ("schema", "track", "name", "target", "steps_planned", "seed", "started", "command", "config",
                "hardware", "versions", "source", "data"):
        assert facts[key] == content[key], key
    assert content["config"] == {"lr": 0.02, "betas": [0.8, 0.95], "clip": "inf", "name": "a: b\nc"}
    for key in ("status", "message", "steps", "train_time_s", "peak_memory_bytes", "extra"):
        assert facts["result"][key] == content[key], key
    assert facts["result"]["values"] == [3.1234567]     # with all digits
    assert curve == [{"step": 50, "tokens": 512, "train_time_s": 1.5, "val_loss": 3.123457}]
    files = unpack_source((record.folder / "source.txt").read_bytes())
    assert files["records/log.py"] == (ROOT / "records/log.py").read_bytes()
    assert files.keys() == content["source"].keys()
    with pytest.raises(ValueError, match="no line of 100 '='"):
        parse_log("something else")


def test_lines_of_a_script_are_not_taken_for_the_records_own(tmp_path, capsys):
    record = new_record(tmp_path)
    text = 'a\nstep:9/9 val_loss:1.0\nresult: {}\ndata: {"a": 1}\nsource: {}\ndata: mine\x1b[2J\u202e\r'
    record.line(text)
    assert log_of(record).endswith('a\n step:9/9 val_loss:1.0\n result: {}\n data: {"a": 1}\n source: {}\ndata: mine'
                                   '\\x1b[2J\\u202e\\r\n')
    assert capsys.readouterr().out == text + "\n"      # the console gets what the script says
    assert parse_log(log_of(record))[0].keys() == strict(record).keys() & parse_log(log_of(record))[0].keys()
    assert "data" not in parse_log(log_of(record))[0]


def test_the_hash_of_the_log_comes_at_the_end_and_stays_true(tmp_path, monkeypatch):
    monkeypatch.setattr(Record, "_draw", lambda record: None)
    def fits():
        return strict(record)["log_sha256"] == hashlib.sha256((record.folder / "log.txt").read_bytes()).hexdigest()
    record = new_record(tmp_path)
    record.validation(1, 3.0, 1.0, 1)
    assert strict(record)["log_sha256"] is None
    record.finish()
    assert fits()
    record.line("afterwards")
    assert fits() and log_of(record).endswith("afterwards\n")
    record = new_record(tmp_path)
    record.fail("failed", "why")
    assert fits() and log_of(record).endswith("failed: why\n")


@pytest.mark.filterwarnings("error")
def test_a_record_that_nobody_needs_any_more_closes_its_log(tmp_path):
    record = new_record(tmp_path)
    record.itself, log = record, record._log    # as the traceback of a failed run keeps it
    del record
    gc.collect()
    assert log.closed


def test_a_track_of_accuracies(tmp_path, capsys):
    record = new_record(tmp_path, track="cifar10-94", target=0.94)
    record.validation(4, 0.93, 1.0, 100)
    record.validation(8, 0.94012, 2.0, 200)
    record.validation(9, 0.9399, 2.5, 300)
    summary = record.finish()
    content = strict(record)
    assert content["accuracy"] == 0.9399 and "val_loss" not in content
    assert content["validation"][1] == {"step": 8, "tokens": 200, "train_time_s": 2.0, "accuracy": 0.94012}
    assert content["reached"] is True and content["time_to_target_s"] == 2.0
    assert "step:8/100 accuracy:0.940120 train_time:2000ms step_avg:250.00ms tokens:200\n" in capsys.readouterr().out
    assert parse_log(log_of(record))[1] == content["validation"]
    assert re.search(r"^accuracy +0.93990$", summary, re.MULTILINE)
    record = new_record(tmp_path, track="cifar10-94", target=0.94)
    record.validation(1, float("nan"), 1.0, 1)
    assert strict(record)["message"] == "the accuracy is nan at step 1"


# -- Weights & Biases ------------------------------------------------------------------------------------------------

class FakeWandb(types.ModuleType):
    """Stands in for wandb: keeps what it is told, or raises an error in the call named `broken`."""

    def __init__(self, logged_in=False, broken=None):
        super().__init__("wandb")
        self.calls, self.logged_in, self.broken, self.summary = [], logged_in, broken, self
        self.Settings = lambda **words: words

    def _call(self, name, /, *values, **words):
        if name == self.broken:
            raise ConnectionError("no network\nat all")
        self.calls.append((name, *values, words))
        return self

    def login(self, **words):
        return self.logged_in

    def init(self, **words):
        return self._call("init", **words)

    def log(self, values, **words):
        self._call("log", values, **words)

    def update(self, values):
        self._call("summary", values)

    def finish(self, **words):
        self._call("finish", **words)


def run_with_wandb(tmp_path, monkeypatch, fake, end="finish"):
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(Record, "_draw", lambda record: None)       # half a second
    record = new_record(tmp_path, wandb="ab-7")
    record.validation(5, 3.5, 1.0, 100)
    record.validation(10, 2.5, 2.0, 200)
    record.finish(extra={"a": 1}) if end == "finish" else record.fail("failed", "why")
    return strict(record), log_of(record)


def test_wandb_is_told_the_validations_and_the_result(tmp_path, monkeypatch):
    fake = FakeWandb()
    content, log = run_with_wandb(tmp_path, monkeypatch, fake)
    [init, first, second, summary, finish] = fake.calls
    assert init[0] == "init" and init[1]["group"] == "ab-7" and init[1]["mode"] == "offline"
    assert init[1]["config"]["config"] == {"lr": 0.02} and init[1]["settings"]["console"] == "off"
    assert first == ("log", {"tokens": 100, "train_time_s": 1.0, "val_loss": 3.5}, {"step": 5})
    assert second == ("log", {"tokens": 200, "train_time_s": 2.0, "val_loss": 2.5}, {"step": 10})
    assert summary[1]["reached"] is True and summary[1]["status"] == "complete" and summary[1]["val_loss"] == 2.5
    assert finish == ("finish", {"exit_code": 0})
    assert content["status"] == "complete" and "Weights & Biases: offline, group 'ab-7'" in log


def test_wandb_is_online_where_there_is_a_login_and_hears_of_failures(tmp_path, monkeypatch):
    fake = FakeWandb(logged_in=True)
    run_with_wandb(tmp_path, monkeypatch, fake, end="fail")
    assert fake.calls[0][1]["mode"] == "online" and fake.calls[-1] == ("finish", {"exit_code": 1})
    assert fake.calls[-2][1]["message"] == "why"


@pytest.mark.parametrize("broken", ["init", "log", "summary", "finish", "import"])
def test_a_failure_of_wandb_is_one_line_and_the_run_goes_on(tmp_path, monkeypatch, broken):
    fake = None if broken == "import" else FakeWandb(broken=broken)     # None in sys.modules: cannot be imported
    content, log = run_with_wandb(tmp_path, monkeypatch, fake)
    assert content["status"] == "complete" and len(content["validation"]) == 2
    [line] = [line for line in log.splitlines() if "Weights & Biases is not used" in line]
    assert ("pip install wandb" if broken == "import" else "no network at all") in line
    assert content["log_sha256"] == hashlib.sha256(log.encode()).hexdigest()


IN_A_PROCESS = """
import sys
from pathlib import Path
root = Path(sys.argv[1])
sys.path.insert(0, str(root))
from records.log import Record
Record._draw = lambda record: None
record = Record(sys.argv[2], track="t", name="n", target=3.0, steps=100, seed=0, config={}, script=root / "train.py",
                repository=root, device="cpu", wandb=sys.argv[3] if len(sys.argv) > 3 else None)
record.validation(100, 2.5, 1.0, 100)
record.finish()
print("wandb" in sys.modules)
"""


@pytest.mark.parametrize("group", [(), ("ab-7",)])
def test_wandb_itself(tmp_path, group):
    """Offline, in a process of its own; and without the flag it is not imported."""
    if group:
        pytest.importorskip("wandb")
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    done = subprocess.run([sys.executable, "-c", IN_A_PROCESS, str(ROOT), str(tmp_path / "records"), *group],
                          env=clean | {"WANDB_DIR": str(tmp_path), "WANDB_MODE": "offline", "HOME": str(tmp_path)},
                          cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == str(bool(group)), done.stderr
    assert "is not used" not in done.stdout
    kept = [file.read_bytes() for file in tmp_path.glob("wandb/offline-run-*/*.wandb")]
    assert len(kept) == len(group) and all(b"ab-7" in content and b"val_loss" in content for content in kept)


def test_a_second_record_of_the_same_second_gets_its_own_folder(tmp_path):
    names = [new_record(tmp_path).folder.name for _ in range(3)]
    assert len(set(names)) == 3
    stem = names[1].removesuffix("_2")
    assert names[1] == stem + "_2" or stem != names[0]      # the clock may have moved on in between


@pytest.mark.parametrize("field", ["name", "track"])
@pytest.mark.parametrize("value", ["", "a b", "../x", "a/b", ".hidden", "ü", "a\n"])
def test_names_are_checked(tmp_path, field, value):
    with pytest.raises(RecordError, match=f"(?s)the {field} .* cannot name a folder.*--{field}"):
        new_record(tmp_path, **{field: value})
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "records").write_text("")
    with pytest.raises(RecordError, match=r"cannot write .*records.*; choose another folder with --records FOLDER"):
        new_record(tmp_path / "records")


def test_no_permission(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(os, "makedirs", refuse)
    with pytest.raises(RecordError, match=r"Permission denied; choose another folder with --records FOLDER"):
        new_record(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(os, "mkdir", refuse)
    (tmp_path / "text-local").touch()
    with pytest.raises(RecordError, match="--records FOLDER"):
        new_record(tmp_path)


def test_a_record_that_is_not_enabled_does_nothing(tmp_path, capsys):
    record = new_record(tmp_path / "none", enabled=False)
    record.data({"a": "b"})
    record.line("text")
    record.progress(1, 1.0)
    record.validation(1, 3.0, 1.0, 1)
    record.fail("failed", "out of memory")
    assert record.finish() == "" and record.folder is None
    assert capsys.readouterr() == ("", "") and not (tmp_path / "none").exists()


def test_failure(tmp_path, capsys):
    record = new_record(tmp_path)
    record.validation(10, 4.0, 1.0, 100)
    record.progress(15, 1.5)
    record.fail("failed", f"out of memory in {ROOT}/optim/muon.py")
    content = strict(record)
    assert content["status"] == "failed" and content["message"] == "out of memory in optim/muon.py"
    assert (content["steps"], content["train_time_s"], content["reached"]) == (15, 1.5, False)
    assert parse_log(log_of(record))[0]["result"]["status"] == "failed"
    assert "failed: out of memory" in capsys.readouterr().out
    with pytest.raises(ValueError, match="expected 'failed' or 'interrupted'"):
        record.fail("complete", "")


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite(tmp_path, loss):
    record = new_record(tmp_path)
    record.validation(10, 4.0, 1.0, 100)
    record.validation(20, loss, 2.0, 200)
    content = strict(record)
    assert content["status"] == "failed" and content["message"] == f"the validation loss is {loss} at step 20"
    assert content["val_loss"] is None and content["validation"][1]["val_loss"] is None and not content["reached"]
    assert parse_log(log_of(record))[1][1]["val_loss"] is None
    summary = record.finish(extra={"other loss": loss})
    assert strict(record)["status"] == "failed" and "not finite" in summary and "status" in summary


def test_no_target(tmp_path):
    record = new_record(tmp_path, target=None)
    record.validation(10, 1.0, 1.0, 100)
    summary = record.finish()
    assert strict(record)["reached"] is None and strict(record)["time_to_target_s"] is None
    assert not any(line.startswith("target") for line in summary.splitlines())


def test_progress_without_a_terminal_is_plain_and_rare(tmp_path, capsys):
    record = new_record(tmp_path)
    for step in range(1, 51):
        record.progress(step, 0.1 * step)
    line = "step:1/100 train_time:100ms step_avg:100.00ms\n"
    assert capsys.readouterr().out == line
    assert log_of(record).endswith("=\n" + line)
    record._last_line -= 3.0        # three seconds later
    record.progress(51, 5.1)
    assert capsys.readouterr().out == "step:51/100 train_time:5100ms step_avg:100.00ms\n"


def test_progress_on_a_terminal_rewrites_one_line(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    record = new_record(tmp_path)
    record.progress(25, 65.0)
    assert screen.getvalue() == "\r\033[Kstep:25/100 train_time:65000ms step_avg:2600.00ms ETA 3:15"
    record.line("next")
    record.line("again")
    assert screen.getvalue().endswith("ETA 3:15\r\033[Knext\nagain\n")
    assert log_of(record).endswith("=\nstep:25/100 train_time:65000ms step_avg:2600.00ms\nnext\nagain\n")
    assert "\r" not in log_of(record) and "\033" not in log_of(record)


def test_a_reader_never_sees_half_a_record(tmp_path):
    record = new_record(tmp_path, config={f"setting {number}": number for number in range(3000)})
    stop, seen, wrong = threading.Event(), set(), []

    def poll():
        while not stop.is_set():
            try:
                seen.add(len(strict(record)["validation"]))
            except (ValueError, OSError) as error:
                wrong.append(error)
    reader = threading.Thread(target=poll)
    reader.start()
    for step in range(80):
        record.validation(step, 4.0, step, step)
    stop.set()
    reader.join()
    assert not wrong and len(seen) > 5


def test_no_path_of_this_machine(tmp_path, monkeypatch):
    home = tmp_path / "home" / "someone"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(sys, "argv", ["x", f"--data={ROOT}/data/text", "--out", f"{home}/out",
                                      "--other=/mnt/disk/shards"])
    record = new_record(tmp_path / "records", config={"data": f"{ROOT}/data", "root": ROOT, "out": home / "out"})
    record.data({f"{home}/val.bin": "00"})
    record.line(f'File "{ROOT}/train_gpt.py", line 3; cache in {home}.')
    record.validation(1, 3.0, 1.0, 1)
    record.fail("failed", f"no space in {home}/out or {ROOT}")
    content = strict(record)
    assert content["command"] == ["records/log.py", "--data=data/text", "--out", "~/out", "--other=.../shards"]
    assert content["config"] == {"data": "data", "root": ".", "out": "~/out"}
    assert 'File "train_gpt.py", line 3; cache in ~.' in log_of(record)
    for file in record.folder.iterdir():
        for path in (ROOT, home, tmp_path):
            assert str(path).encode() not in file.read_bytes(), (file.name, path)


def test_scrubbing_leaves_other_text_alone(tmp_path):
    scrub = Scrubber(tmp_path / "repository")
    for text in ("1/2 of 3/4", "tokens/s and ms / step", "https://example.org/a/b", "data/x/y.bin", "../a/b", "/",
                 f"{tmp_path.name}/repository"):
        assert scrub(text) == text
    assert scrub("in '/opt/lib/python3/x.py'") == "in '.../x.py'"
    assert scrub(f"{tmp_path}/repository-2/a.py") == ".../a.py"     # a neighbour is not the repository


def test_modules_imported_after_the_start_are_in_the_source(tmp_path, monkeypatch):
    repository = tmp_path / "repository"
    repository.mkdir()
    (repository / "train.py").write_text("early = 1")
    (repository / "late_module.py").write_text("late = 1")
    record = new_record(tmp_path / "records", repository=repository, script=repository / "train.py")
    (repository / "train.py").write_text("edited while it ran")
    monkeypatch.syspath_prepend(str(repository))
    import late_module  # noqa: F401
    record.finish()
    del sys.modules["late_module"]
    files = unpack_source((record.folder / "source.txt").read_bytes())
    assert files == {"train.py": b"early = 1", "late_module.py": b"late = 1"}
    assert strict(record)["source"].keys() == files.keys() == parse_log(log_of(record))[0]["source"].keys()


def test_git_state(tmp_path):
    unknown = {"commit": None, "dirty": None, "diff": None}
    assert git(tmp_path) == unknown                         # no repository
    def run(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()
    run("init", "-q")
    assert git(tmp_path) == unknown                         # no commit
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "inner").mkdir()
    run("add", "a.txt")
    run("commit", "-q", "--no-verify", "-m", "first")
    assert git(tmp_path) == {"commit": run("rev-parse", "HEAD"), "dirty": False, "diff": ""}
    assert git(tmp_path / "inner") == unknown               # a copy inside another checkout
    (tmp_path / "a.txt").write_text("two\n")
    state = git(tmp_path)
    assert state["dirty"] and "-one\n+two\n" in state["diff"]
    (tmp_path / "a.txt").write_text("x" * (DIFF_LIMIT + 5000))
    state = git(tmp_path)
    assert state["dirty"] and len(state["diff"]) < DIFF_LIMIT + 200 and "[cut: " in state["diff"]


def test_git_missing(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert git(ROOT) == {"commit": None, "dirty": None, "diff": None}


def test_without_matplotlib(tmp_path, monkeypatch, capsys):
    original = builtins.__import__

    def without(name, *arguments, **options):
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return original(name, *arguments, **options)
    record = new_record(tmp_path)
    record.validation(1, 3.5, 1.0, 1)
    monkeypatch.setattr(builtins, "__import__", without)
    record.finish()
    monkeypatch.undo()
    last = capsys.readouterr().out.splitlines()[-1]
    assert "loss.png was not drawn" in last and f"python -m records.plot {record.folder}" in last
    assert strict(record)["status"] == "complete" and not (record.folder / "loss.png").exists()


# -- runs that are killed: a process validates ten times, then is stuck inside a C function --------------------------

STUCK = """
import ctypes, sys
from pathlib import Path
root = Path(sys.argv[1])
sys.path.insert(0, str(root))
from records.log import Record, end_on_signal
record = Record(sys.argv[2], track="t", name="n", target=3.0, steps=100, seed=0, config={}, script=root / "train.py",
                repository=root, device="cpu")
MESSAGE
for step in range(1, 11):
    record.validation(step, 5.0 - step / 10, 0.1 * step, 100 * step)
libc = ctypes.CDLL(None)
mutex = ctypes.create_string_buffer(64)     # zeros are an unlocked mutex
libc.pthread_mutex_lock(mutex)
libc.pthread_mutex_lock(mutex)              # never returns, not even for a signal handler of Python
"""


def stuck_process(folder, message=""):
    """Start it and wait for the tenth validation; returns the process and the validation lines it printed."""
    process = subprocess.Popen([sys.executable, "-c", STUCK.replace("MESSAGE", message), str(ROOT), str(folder)],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines = [process.stdout.readline() for _ in range(10)]
    if not lines[-1].startswith("step:10/100"):
        process.kill()      # or reading the rest would wait for ever
        pytest.fail(f"expected ten validation lines, got {lines} and {process.communicate()[1]}")
    return process, lines


def check_interrupted(folder, lines):
    [record] = (folder / "t").iterdir()
    content = json.loads((record / "record.json").read_text())
    log = (record / "log.txt").read_text()
    assert content["status"] == "interrupted" and content["val_loss"] == 4.0 and content["reached"] is False
    assert [point["step"] for point in content["validation"]] == list(range(1, 11))
    assert log.endswith("".join(lines)) and len(parse_log(log)[1]) == 10
    assert "records/log.py" in unpack_source((record / "source.txt").read_bytes())


def test_killed(tmp_path):
    process, lines = stuck_process(tmp_path)
    process.kill()
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGKILL
    check_interrupted(tmp_path, lines)


@pytest.mark.skipif(sys.platform != "linux", reason="gets stuck in a way known for Linux only")
@pytest.mark.parametrize("number, setup, said", [
    (signal.SIGINT, "end_on_signal(lambda: f'stopped, see {record.folder.name}')", "stopped, see 20"),
    (signal.SIGTERM, "end_on_signal('stopped')", "stopped\n"),
    (signal.SIGINT, "end_on_signal()", ""),
])
def test_a_signal_ends_a_process_that_is_stuck(tmp_path, number, setup, said):
    process, lines = stuck_process(tmp_path, setup)
    time.sleep(0.3)         # to be inside the C function
    begin = time.monotonic()
    process.send_signal(number)
    try:
        error = process.communicate(timeout=10)[1]
    finally:
        process.kill()
    assert process.returncode == 128 + number and time.monotonic() - begin < 2
    assert error.startswith(said) and error.count("\n") == (1 if said else 0)
    check_interrupted(tmp_path, lines)
