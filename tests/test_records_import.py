"""import: logs in the community's format become records that say no more than the log does."""
import json
import random
import re
import time
from argparse import ArgumentParser

import pytest

from records import import_log, verify
from records.check import check_record
from records.files import RecordError
from records.runs import read_run
from records.source import sha256, unpack_source
from test_records_verify import mutated
from true_records import repository, write_run

SOURCE = '''import os
with open(__file__) as f:
    code = f.read()
def report(step, loss):
    print(f"step:{step}/{steps} val_loss:{loss:.4f} train_time:{time:.0f}ms")  # step:1/2 val_loss:3.0 train_time:7ms
print("=" * 100)
'''
MACHINE = '''Running Python 3.12.7 (main, Oct 16 2024) [GCC 13.2.0]
Running PyTorch 2.9.0.dev20250713+cu126 compiled for CUDA 12.6
+---------------------------------------------------------------------------------------+
|=========================================+======================+======================|
|   0  NVIDIA H100 80GB HBM3          On  | 00000000:00:0C.0 Off |                  Off |
|   1  NVIDIA H100 80GB HBM3          On  | 00000000:00:0D.0 Off |                  Off |
'''
STEPS = '''step:0/250 val_loss:10.8258 train_time:0ms step_avg:0.03ms
step:1/250 train_time:524ms step_avg:524.12ms
step:125/250 val_loss:3.2790 train_time:12248ms step_avg:97.99ms
step:250/250 val_loss:3.2807 train_time:24284ms step_avg:97.14ms
peak memory allocated: 30908 MiB reserved: 31000 MiB
'''
RULE = "=" * 100 + "\n"
FULL = SOURCE + RULE + MACHINE + RULE + STEPS


def imported(log, tmp_path, **options):
    options = {"track": "fineweb-3.28", "name": "theirs"} | options
    return import_log.import_log(log.encode() if isinstance(log, str) else log, tmp_path, **options)


def test_a_log_with_its_source(tmp_path):
    folder = imported(FULL, tmp_path, started="2025-08-27T12:00:00+02:00", tokens_per_step=1000)
    assert folder == tmp_path / "fineweb-3.28" / "2025-08-27_100000_theirs"
    record = json.loads((folder / "record.json").read_text())
    assert record["validation"] == [
        {"step": 0, "tokens": 0, "train_time_s": 0.0, "val_loss": 10.8258},
        {"step": 125, "tokens": 125000, "train_time_s": 12.248, "val_loss": 3.279},
        {"step": 250, "tokens": 250000, "train_time_s": 24.284, "val_loss": 3.2807}]
    expected = {"status": "complete", "steps": 250, "steps_planned": 250, "train_time_s": 24.284, "val_loss": 3.2807,
                "target": 3.28, "reached": True, "time_to_target_s": 12.248, "seed": None, "config": {}, "data": {},
                "hardware": {"accelerator": "NVIDIA H100 80GB HBM3", "accelerator_count": 2},
                "versions": {"python": "3.12.7", "torch": "2.9.0.dev20250713+cu126", "cuda": "12.6"}}
    assert {key: record[key] for key in expected} == expected
    assert record["imported"]["original_sha256"] == sha256(FULL.encode())
    assert unpack_source((folder / "source.txt").read_bytes()) == {"train_gpt.py": SOURCE.encode()}
    assert (folder / "log.txt").read_text() == FULL
    [report] = verify.inspect(folder)
    assert report.problems == [] and any("nothing but the log vouches for it" in note for note in report.notes)
    run = read_run(folder)
    assert run.final == 3.2807 and run.seconds_to() == 12.248 and run.seed is None


def test_a_log_without_its_source(tmp_path):
    for log in (STEPS, MACHINE + RULE + STEPS, STEPS.replace("\n", "\r\n"), STEPS[:-1]):
        folder = imported(log, tmp_path)
        record = json.loads((folder / "record.json").read_text())
        assert record["source"] == {} and not (folder / "source.txt").exists()
        assert len(record["validation"]) == 3 and record["tokens"] is None and verify.verify(folder) == []


def test_logs_that_end_early_or_badly(tmp_path):
    early = STEPS.replace("step:250/250 val_loss:3.2807 train_time:24284ms step_avg:97.14ms\n", "")
    record = json.loads((imported(early, tmp_path) / "record.json").read_text())
    assert (record["status"], record["message"]) == ("interrupted", "the log ends at step 125 of 250")
    folder = imported(STEPS.replace("3.2807", "nan"), tmp_path)
    record = json.loads((folder / "record.json").read_text())
    assert (record["status"], record["val_loss"]) == ("failed", None) and verify.verify(folder) == []
    assert record["message"] == "the validation loss is nan at step 250"


def test_seconds_tokens_and_accuracy(tmp_path):
    record = json.loads((imported("step:8/8 val_loss:3.5 train_time:1.25s tokens:77\n", tmp_path)
                         / "record.json").read_text())
    assert record["validation"] == [{"step": 8, "tokens": 77, "train_time_s": 1.25, "val_loss": 3.5}]
    folder = imported("step:8/8 accuracy:0.9401 train_time:2590ms\n", tmp_path, track="cifar10-94")
    record = json.loads((folder / "record.json").read_text())
    assert record["accuracy"] == 0.9401 and record["reached"] is True and verify.verify(folder) == []


@pytest.mark.parametrize("log, said", [
    ("", "no validation line"),
    ("nothing\n", "line 1: no validation line from here on; expected lines such as step:125/1750"),
    (SOURCE + RULE + "nothing\n", f"line {SOURCE.count(chr(10)) + 2}: no validation line"),
    (STEPS + STEPS, "line 6: step 0 at 0.0 s follows step 250 at 24.284 s"),
    (STEPS.replace("24284ms", "9ms"), "line 4: .*whose clock only goes forward"),
    (STEPS.replace("step:250/250 val", "step:250/260 val"), "line 4: 260 steps planned, 250 in the lines before"),
    (STEPS.replace("val_loss:3.2807 ", "val_loss:three "), "line 4: val_loss:'three' is no number"),
    (STEPS.replace("train_time:24284ms", "train_time:soon"), "line 4: .* cannot be read"),
    (STEPS.replace("val_loss", "accuracy"), "line 1: it measures accuracy, the track fineweb-3.28 val_loss"),
    ("schema: 2\n" + STEPS, "the log of a record of this repository"),
])
def test_what_is_refused(tmp_path, log, said):
    with pytest.raises(RecordError, match=f"(?s)log.txt, .*{said}" if said[:3] != "the" else said):
        imported(log, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options, said", [
    ({"name": "../x"}, "--name"), ({"track": "a b"}, "--track"), ({"script": "../x.py"}, "--script"),
    ({"started": "yesterday"}, "--started"),
])
def test_options_are_checked(tmp_path, options, said):
    with pytest.raises(RecordError, match=said):
        imported(STEPS, tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_control_characters_and_other_bytes_are_escaped(tmp_path):
    folder = imported(b"a\x1b[2J\xff\r0 %\r100 %\n" + STEPS.encode(), tmp_path)
    assert (folder / "log.txt").read_text().startswith("a\\x1b[2J\\xff\\r0 %\\r100 %\n") and verify.verify(folder) == []


def test_a_changed_import_is_noticed(tmp_path):
    folder = imported(FULL, tmp_path)
    log, record, source = ((folder / name).read_bytes() for name in ("log.txt", "record.json", "source.txt"))
    for old, new in ((b"val_loss:3.2807", b"val_loss:3.2707"), (b"24284ms", b"24184ms"), (b"H100", b"H200"),
                     (b"import os", b"import re"), (b"step:250/250 val", b"stop:250/250 val")):
        (folder / "log.txt").write_bytes(log.replace(old, new))
        assert verify.verify(folder), (old, new)
    (folder / "log.txt").write_bytes(log)
    content = json.loads(record)
    for key, value in (("val_loss", 3.27), ("seed", 1), ("steps", 249), ("reached", False), ("more", 1),
                       ("config", {"a": 1}),
                       ("imported", {}), ("imported", True), ("started", "2020-01-01T00:00:00+00:00"),
                       ("imported", content["imported"] | {"tokens_per_step": True})):
        (folder / "record.json").write_text(json.dumps(content | {key: value}, indent=1))
        assert any(key in problem or "expected exactly" in problem for problem in verify.verify(folder)), key
    (folder / "record.json").write_bytes(record)
    (folder / "source.txt").write_bytes(source.replace(b"import os", b"import re"))
    assert "not the header" in verify.verify(folder)[0]
    (folder / "source.txt").unlink()
    assert "not the header" in verify.verify(folder)[0]


def test_an_imported_log_cannot_pass_for_a_run_of_ours(tmp_path):
    """A record of ours, marked as imported so that its log is read by the laxer rules."""
    folder = write_run(tmp_path / "records", [10.8, 3.3], repository(tmp_path / "code"))
    record = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(json.dumps(record | {"imported": {
        "track": "wiki-3.324", "name": "gpt", "started": record["started"], "script": "train_gpt.py",
        "tokens_per_step": None, "original_sha256": "0" * 64}}))
    assert "the log of a record of this repository" in verify.verify(folder)[0]


def test_mutated_imports_neither_crash_verify_nor_change_a_claim(tmp_path):
    folder = imported(FULL, tmp_path)
    record, log, source = ((folder / name).read_bytes() for name in ("record.json", "log.txt", "source.txt"))
    rng = random.Random(3)
    for number in range(1000):
        other = mutated(log, rng)
        assert other == log or check_record(record, other, source), other
        fitting = record.replace(sha256(log).encode(), sha256(other).encode())
        if not check_record(fitting, other, source):        # with its hash made to fit: only free text
            lines = [re.findall(rb"^step:[0-9]+/[0-9]+ +val_loss:\S+ +train_time:[^ s]+s", content, re.MULTILINE) for content in (other, log)]
            assert lines[0] == lines[1], other
        changed = mutated(record, rng)
        if not check_record(changed, log, source):
            found, expected = json.loads(changed), json.loads(record)
            found["imported"].pop("original_sha256")        # of a file that is not here
            expected["imported"].pop("original_sha256")
            assert found == expected


def test_long_logs(tmp_path):
    lines = [f"step:{step}/100000 train_time:{step}ms step_avg:1.00ms" for step in range(1, 100001)]
    lines[::100] = [f"step:{step}/100000 val_loss:{4 - step / 1e5:.5f} train_time:{step}ms"
                    for step in range(1, 100001, 100)]
    begin = time.process_time()
    folder = imported("\n".join(lines), tmp_path)
    assert verify.verify(folder) == [] and len(read_run(folder).curve) == 1000
    assert time.process_time() - begin < 10
    with pytest.raises(RecordError, match="more than"):
        imported(b"\n" * (import_log.LARGEST + 1), tmp_path)


def test_the_command(tmp_path, capsys):
    parser = ArgumentParser()
    import_log.add_arguments(parser)
    for name in ("one two.log", "_.txt"):
        (tmp_path / name).write_text(FULL)
    words = [str(tmp_path / "one two.log"), str(tmp_path / "_.txt"), "--track", "fineweb-3.28", "--records",
             str(tmp_path / "out")]
    assert import_log.main(parser.parse_args(words)) == 0
    names = sorted(folder.name.split("_", 2)[2] for folder in (tmp_path / "out/fineweb-3.28").iterdir())
    assert names == ["imported", "one-two"] and len(capsys.readouterr().out.splitlines()) == 2
    assert import_log.main(parser.parse_args([str(tmp_path / "none"), "--track", "x"])) == 2
    assert capsys.readouterr().err.startswith("records import: cannot read")
    (tmp_path / "bad.log").write_text("x\n")
    assert import_log.main(parser.parse_args([str(tmp_path / "bad.log"), "--track", "x"])) == 2
    assert "bad.log: line 1: no validation line" in capsys.readouterr().err
