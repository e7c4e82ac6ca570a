"""verify: true records pass, every change of a claim is named with its line, and nothing hostile hurts."""
import gzip
import json
import os
import random
import re
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from functools import lru_cache
from pathlib import Path

import pytest

from records import check, safe, verify
from records.check import check_record
from records.configuration import Undecided, read_script
from records.files import RecordError
from records.log import parse_log
from records.source import pack_source, sha256, unpack_source
from records.verify import inspect
from true_records import PICTURE, SCRIPT, repository, write_run

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("record.json", "log.txt", "source.txt")
LOSSES = [10.8, 4.25, 3.5, 3.4071234567]
FUZZED = int(os.environ.get("FUZZED_LOGS", "10000"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs that ended in each way: dict of name -> folder."""
    folder = tmp_path_factory.mktemp("runs")
    code = repository(folder / "repository")
    return {
        "complete": write_run(folder / "records", LOSSES, code, name="complete", seed=3),
        "reached": write_run(folder / "records", [10.8, 3.324, 3.33, 3.31], code, name="reached"),
        "failed": write_run(folder / "records", LOSSES, code, name="failed", end="fail"),
        "nan": write_run(folder / "records", [10.8, 4.0, float("nan")], code, name="nan", end="fail"),
        "inf": write_run(folder / "records", [10.8, float("inf")], code, name="inf"),
        "killed": write_run(folder / "records", LOSSES, code, name="killed", end=None),
        "killed by inf": write_run(folder / "records", [10.8, float("inf")], code, name="killed-by-inf", end=None),
        "empty": write_run(folder / "records", [], code, name="empty", end=None),
        "no target": write_run(folder / "records", LOSSES, code, name="no-target", arguments=()),
    }


@lru_cache(maxsize=None)
def contents(folder):
    return tuple((folder / name).read_bytes() for name in NAMES)


def changed(folder, **changes):
    """The three files, with keys of record.json changed."""
    record, log, source = contents(folder)
    return json.dumps(json.loads(record) | changes, indent=1).encode() + b"\n", log, source


def with_log(folder, log):
    """The three files with another log, whose hash an attacker has put into record.json."""
    record, _, source = contents(folder)
    content = json.loads(record)
    if content["log_sha256"] is not None:
        content["log_sha256"] = sha256(log)
    return json.dumps(content, indent=1).encode() + b"\n", log, source


# -- what is true ----------------------------------------------------------------------------------------------------

def test_every_way_a_run_ends_verifies(runs):
    for name, folder in runs.items():
        notes = []
        assert check_record(*contents(folder), notes) == [], name
        assert notes == ["record.json: no literal in the source says what these settings are: softcap"], name


@pytest.mark.parametrize("file", sorted((ROOT / "records").glob("*/*/record.json")), ids=lambda file: file.parent.name)
def test_the_records_of_this_repository_verify(file):
    [report] = inspect(file.parent)
    assert report.problems == [] and report.notes == []


def test_an_imported_or_unknown_setting_is_a_note_and_not_silence(runs):
    record, log, source = contents(runs["complete"])
    files = unpack_source(source) | {"train_gpt.py": b"print('no settings here')\n"}
    content = json.loads(record)
    before = json.dumps(content["source"])
    content["source"] = {path: sha256(file) for path, file in files.items()}
    log = log.replace(before.encode(), json.dumps(content["source"]).encode())
    content["log_sha256"] = sha256(log)
    notes = []
    assert check_record(json.dumps(content, indent=1).encode(), log, pack_source(files), notes) == []
    assert len(notes) == 1 and "was not decided" in notes[0]


def test_a_run_killed_between_log_and_record(runs):
    record, log, source = contents(runs["killed"])
    content = json.loads(record)
    for point in content["validation"][-1:]:
        content["validation"].remove(point)
    last = content["validation"][-1]
    content |= {"val_loss": last["val_loss"], "tokens": last["tokens"], "steps": last["step"],
                "train_time_s": last["train_time_s"]}
    notes = []
    assert check_record(json.dumps(content, indent=1).encode(), log, source, notes) == []
    assert any("killed between the two" in note for note in notes)


# -- what is not -----------------------------------------------------------------------------------------------------

def line_of(content, text):
    return content[:content.index(text)].count(b"\n") + 1


@pytest.mark.parametrize("key, value", [
    ("schema", 3), ("schema", True), ("track", "text-local"), ("name", "other"), ("name", "../../x"),
    ("target", 3.5), ("target", None), ("steps_planned", 99), ("seed", 4), ("seed", 3.0),
    ("started", "2020-01-01T00:00:00+00:00"), ("started", "yesterday"), ("command", ["train_gpt.py"]),
    ("hardware", {}), ("versions", {"torch": "9"}), ("git", {"commit": None, "dirty": None, "diff": "x"}),
    ("status", "failed"), ("status", "interrupted"), ("status", "great"), ("message", "all good"), ("reached", True),
    ("reached", None), ("time_to_target_s", 1.0), ("train_time_s", 24.0), ("train_time_s", -1.0), ("steps", 99),
    ("tokens", 1), ("val_loss", 3.3), ("val_loss", 3.4071234568), ("val_loss", None), ("validation", []), ("data", {}),
    ("peak_memory_bytes", 1), ("extra", {}), ("log_sha256", "0" * 64), ("log_sha256", None), ("more", 1),
    ("data", {"val_000000.bin": "00" * 32}), ("source", {}), ("source", {"train_gpt.py": "ab" * 32}),
])
def test_a_changed_claim_is_named_with_its_line(runs, key, value):
    record, log, source = changed(runs["complete"], **{key: value})
    problems = check_record(record, log, source)
    assert problems
    line = line_of(record, f'\n "{key}":'.encode()) + 1
    assert any(re.match(rf"record\.json, line {line}\b", problem) or key in ("source", "data", "validation")
               and problem.startswith("record.json, line ") for problem in problems), problems


@pytest.mark.parametrize("index, key, value", [(1, "step", 34), (2, "tokens", 1), (1, "train_time_s", 8.0),
                                               (3, "val_loss", 3.4), (2, "val_loss", None),
                                               (3, "val_loss", 3.4071234566)])
def test_a_changed_validation_is_named_with_its_line(runs, index, key, value):
    points = json.loads(contents(runs["complete"])[0])["validation"]
    points[index][key] = value
    record, log, source = changed(runs["complete"], validation=points)
    begin = [match.start() for match in re.finditer(rb'"step":', record)][index]
    line = record[:record.index(f'"{key}"'.encode(), begin)].count(b"\n") + 1
    problems = check_record(record, log, source)
    assert any(problem.startswith(f"record.json, line {line}:") for problem in problems), (line, problems)


@pytest.mark.parametrize("setting, value", [("lr", 0.06), ("seed", 4), ("compile", True), ("width", 64), ("steps", 7),
                                            ("vocab_size", 10), ("unheard_of", 1)])
def test_settings_that_the_source_and_the_command_do_not_give(runs, setting, value):
    """Consistently in record.json and log.txt: only the source contradicts."""
    record, log, source = contents(runs["complete"])
    content = json.loads(record)
    before = json.dumps(content["config"])
    content["config"][setting] = value
    log = log.replace(f"config: {before}".encode(), f"config: {json.dumps(content['config'])}".encode())
    content["log_sha256"] = sha256(log)
    record = json.dumps(content, indent=1).encode()
    problems = check_record(record, log, source)
    line = line_of(record, f'"{setting}": {json.dumps(value)}'.encode())
    if setting == "seed":
        line = line_of(record, b'"config"') + list(content["config"]).index("seed") + 1
    assert any(problem.startswith(f"record.json, line {line}:") and setting in problem
               for problem in problems), problems


@pytest.mark.parametrize("old, new, said", [
    (b"step_avg:250.00ms tokens", b"step_avg:249.00ms tokens", "step_avg"),
    (b"step:33/100 val_loss:4.250000", b"step:33/101 val_loss:4.250000", "101 steps planned"),
    (b"val_loss:4.250000", b"val_loss:4.25", "six decimals"),
    (b"val_loss:4.250000", b"val_loss:nan", "nan"),
    (b"train_time:8250ms step_avg:250.00ms", b"train_time:99000ms step_avg:3000.00ms", "only go forward"),
    (b"step:33/100 val", b"step:033/100 val", "zero"),
    (b"\nseed: 3\n", b"\nseed: 3\nseed: 3\n", "second one of its kind"),
    (b"\nseed: 3\n", b"\nseed: NaN\n", "NaN is not JSON"),
    (b"\nseed: 3\n", b"\n", "no 'seed'"),
    (b"embedding 4", b"embedding\x1b[2J 4", "control character"),
    (b"embedding 4", b"embedding \xe2\x80\xae 4", "control character"),
    (b"embedding 4", b"embedding \xff 4", "not UTF-8"),
    (b"=" * 100, b"=" * 99, "100 '='"),
    (b'"status": "complete"', b'"status": "complete", "status": "failed"', "twice"),
    (b"validation loss  3.40712", b"validation loss  3.30712", "summary"),
    (b"train time       25.000 s", b"train time       24.000 s", "summary"),
    (b"\nresult: ", b"\nresults: ", "no result line"),
])
def test_a_changed_log_is_named_with_its_line(runs, old, new, said):
    """Also with log_sha256 made to fit, as in records that have none."""
    log = contents(runs["complete"])[1]
    assert old in log
    files = with_log(runs["complete"], log.replace(old, new, 1))
    problems = check_record(*files)
    assert any(said in problem and re.match(r"(log\.txt|record\.json), line \d+: ", problem) for problem in problems), \
        problems
    assert any("log_sha256" in problem for problem in check_record(contents(runs["complete"])[0], *files[1:]))


@pytest.mark.parametrize("text", [b"", b"\n", b"x", b"\0" * 1000, b"[" * 10**6 + b"\n", b"=" * 100 + b"\n",
                                  b"step:" + b"9" * 10**6 + b"\n", b"\n" * 10**6, os.urandom(10**5), b"{}\n" * 10**5])
def test_hostile_files_are_only_problems(runs, text):
    record, log, source = contents(runs["complete"])
    head = log[:log.index(b"step:")]
    for files in ((text, log, source), (record, text, source), (record, log, text), (record, head + text, source)):
        problems = check_record(*files)
        assert problems and len(problems) <= check.MOST + 1
        assert all(re.match(r"(record\.json|log\.txt|source\.txt)[,:]", problem) for problem in problems)
        assert all(problem.isascii() and problem.isprintable() and len(problem) < 1000 for problem in problems)


def test_files_beyond_the_limit(runs, monkeypatch):
    monkeypatch.setattr(check, "LARGEST", 1000)
    assert "more than the 1000" in check_record(*contents(runs["complete"]))[0]


@pytest.mark.parametrize("value", ["1e999", "NaN", "9" * 5000, "-Infinity", "[" * 5000, '"\\ud800"', "1.5e300"])
def test_hostile_values(runs, value):
    record, log, source = contents(runs["complete"])
    for key in ("seed", "target", "train_time_s", "extra", "name"):
        [problem, *_] = check_record(re.sub(rb'(\n "%s": )[^\n]*?(,?\n)' % key.encode(),
                                            lambda match: match[1] + value.encode() + match[2], record), log, source)
        assert problem.startswith("record.json, line ")


@pytest.mark.parametrize("path", ["../evil.py", "/etc/evil", "a/../../b", "a//b", "", "a\nb", "a\\b", "x" * 500, 7,
                                  "./a", "train_gpt.py/x"])
def test_path_tricks_in_the_source(runs, path):
    record, log, source = contents(runs["complete"])
    header = json.dumps({"path": path, "bytes": 1, "sha256": sha256(b"x")}).encode()
    [problem, *_] = check_record(record, log, source + b"==== " + header + b"\nx\n")
    assert "source.txt is damaged" in problem


@pytest.mark.parametrize("size", [-1, 10**30, 1.5, "9", True, None])
def test_sizes_in_the_source(runs, size):
    record, log, _ = contents(runs["complete"])
    header = json.dumps({"path": "a", "bytes": size, "sha256": sha256(b"x")}).encode()
    assert "source.txt is damaged" in check_record(record, log, b"==== " + header + b"\nx\n")[0]


def test_a_tampered_source_line_is_named_with_its_part(runs):
    record, log, source = contents(runs["complete"])
    problems = check_record(record, log, source.replace(b"0.05", b"0.04"))
    line = line_of(source, b'"""A script')
    assert any(f"'train_gpt.py' from line {line} on" in problem for problem in problems), problems
    files = {path: file.replace(b"0.05", b"0.04") for path, file in unpack_source(source).items()}
    assert any("'train_gpt.py' has the SHA-256" in problem for problem in check_record(record, log, pack_source(files)))


@pytest.mark.parametrize("script", [b"(" * 10**5, b"-" * 10**5 + b"1", b"a" + b".a" * 10**5, b"\0", b"\xff",
                                    b"# coding: rot13\n", b"1" + b"+1" * 10**5, b"lambda:" * 10**4 + b"1",
                                    SCRIPT.replace('default_preset="quick"', "default_preset={}").encode()
                                    .replace(b'preset: str = "quick"\n', b""),
                                    SCRIPT.replace("presets=PRESETS", "presets=open('/tmp/x')").encode()])
def test_a_hostile_script_is_only_undecided(script):
    try:
        found = read_script(script)
    except Undecided:
        return
    assert not isinstance(found.default_preset, str)


def test_nothing_of_a_record_is_executed(runs, tmp_path):
    """A script that would leave a trace, in a process that would show what it imports."""
    trace = tmp_path / "trace"
    code = repository(tmp_path / "repository", f"open({str(trace)!r}, 'w')\n" + SCRIPT)
    folder = tmp_path / "records" / "x"
    shutil.copytree(runs["complete"], folder)
    (folder / "source.txt").write_bytes(pack_source({"train_gpt.py": (code / "train_gpt.py").read_bytes()}))
    (folder / "records.py").write_text("raise SystemExit(3)")
    done = subprocess.run([sys.executable, "-c", "import sys; from records import verify; import argparse; "
                           "p = argparse.ArgumentParser(); verify.add_arguments(p); "
                           "print(verify.main(p.parse_args(sys.argv[1:]))); print('train_gpt' in sys.modules)",
                           str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-2:] == ["1", "False"] and "source" in done.stdout, done.stderr
    assert not trace.exists()


# -- ten thousand mutated logs ---------------------------------------------------------------------------------------

LINES = (b"step:100/100 val_loss:3.000000 train_time:1ms step_avg:0.01ms tokens:100000", b"data: {}", b"=" * 100,
         b'result: {"status": "complete"}', b"step:", b'source: {"a": 1}', b"[" * 3000, b"seed: 3", b"",
         b"\xe2\x80\xae", b"x" * 5000)


def mutated(log, rng):
    """A log (bytes) with one thing changed, inserted, moved, repeated or cut."""
    lines, kind = log.split(b"\n"), rng.randrange(10)
    at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    place, end = sorted((rng.randrange(len(log)), rng.randrange(len(log))))
    if kind == 0:
        return log[:place] + bytes([rng.randrange(256)]) + log[place + 1:]
    if kind == 1:       # a digit
        place = rng.choice([index for index, byte in enumerate(log) if byte in b"0123456789"])
        return log[:place] + rng.choice(b"0123456789").to_bytes() + log[place + 1:]
    if kind == 2:
        return log[:place] + rng.randbytes(rng.randrange(1, 40)) + log[place:]
    if kind == 3:
        return rng.choice((log[:place], log[place:], log[:place] + log[end:], log + log))
    if kind == 4:
        del lines[at]
    elif kind == 5:
        lines.insert(other, lines[at])
    elif kind == 6:
        lines[at], lines[other] = lines[other], lines[at]
    elif kind == 7:
        lines.insert(at, rng.choice(LINES))
    elif kind == 8:
        lines[at] += rng.choice((b" ", b"\r", b"\0", b"1", b"e5", b"\x1b[2K", b"}", b"\xff"))
    else:               # a claim
        at = rng.choice([index for index, line in enumerate(lines) if b":" in line])
        line = bytearray(lines[at])
        line[rng.randrange(len(line))] = rng.choice(b'0123456789.:-"x ')
        lines[at] = bytes(line)
    return b"\n".join(lines)


def claims(log):
    """All that a log claims: the description, the data, the validations, the result, the summary."""
    facts, curve = parse_log(log.decode())
    body = log.decode().partition("=" * 100)[2]
    return [facts, curve, re.findall(r"^step:.*tokens.*", body, re.MULTILINE)] + [
        body.partition("\nresult: ")[2].partition("record ")[0]]


def test_mutated_logs_neither_crash_verify_nor_change_a_claim(runs):
    """A third with log_sha256 as it was: no change at all passes. The rest with a hash that fits, or without one: only
    what claims nothing may change."""
    rng = random.Random(20261123)
    kinds = ("complete", "reached", "failed", "killed", "nan")
    before = {kind: claims(contents(runs[kind])[1]) for kind in kinds}
    accepted = 0
    for number in range(FUZZED):
        kind = kinds[number % len(kinds)]
        record, log, source = contents(runs[kind])
        other = mutated(log, rng)
        if number % 3 and other != log:
            record = with_log(runs[kind], other)[0]
        if not check_record(record, other, source) and other != log:
            accepted += 1
            assert number % 3 or kind == "killed", (number, kind, other)
            *now, summary = claims(other)
            assert now == before[kind][:3] and summary.startswith(before[kind][3]), (number, kind, other)
    assert 0 < accepted < FUZZED / 10       # free text did change, so the comparison of claims was put to the test


def test_mutated_records_neither_crash_verify_nor_pass(runs):
    rng = random.Random(1)
    for number in range(FUZZED // 4):
        record, log, source = contents(runs[("complete", "killed", "nan")[number % 3]])
        other = mutated(record, rng)
        if not check_record(other, log, source):
            assert json.loads(other) == json.loads(record), other


# -- folders ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def folder(runs, tmp_path):
    return Path(shutil.copytree(runs["complete"], tmp_path / "records" / runs["complete"].name))


def test_verify_names_files_below_the_path(folder, runs, tmp_path):
    other = folder.parent / "other"
    shutil.copytree(runs["failed"], other)
    (other / "log.txt").write_bytes((other / "log.txt").read_bytes().replace(b"4.250000", b"4.150000"))
    problems = verify.verify(tmp_path)
    assert problems and all(problem.startswith("records/other/") for problem in problems)
    assert verify.verify(folder) == [] and len(inspect(tmp_path)) == 2
    with pytest.raises(RecordError, match="no record in"):
        verify.verify(tmp_path / "none")


@pytest.mark.parametrize("name", NAMES)
def test_missing_files(folder, name):
    (folder / name).unlink()
    if name == "record.json":
        with pytest.raises(RecordError, match="no record in"):
            verify.verify(folder)
    else:
        assert any(name in problem and "missing" in problem for problem in verify.verify(folder))


@pytest.mark.parametrize("name", NAMES)
def test_links_and_pipes_are_not_read(folder, name, tmp_path):
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    assert any("a link" in problem and name in problem for problem in verify.verify(folder))
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert any("not a plain file" in problem and name in problem for problem in verify.verify(folder))


def test_the_picture_of_a_profile_is_a_plain_png(folder, tmp_path, monkeypatch):
    picture = folder / "profile.png"
    picture.write_bytes(PICTURE)
    [report] = inspect(folder)
    assert report.problems == [] and not any("profile.png" in note for note in report.notes)
    for content in (b"", b"<svg onload=alert(1)>", PICTURE[1:], PICTURE + b"#!/bin/sh"):
        picture.write_bytes(content)
        assert verify.verify(folder) == ["profile.png: no PNG"]
    picture.write_bytes(PICTURE)
    picture.rename(tmp_path / "elsewhere.png")
    picture.symlink_to(tmp_path / "elsewhere.png")
    assert verify.verify(folder) == ["profile.png: a link, which no record has"]
    picture.unlink()
    os.mkfifo(picture)
    assert verify.verify(folder) == ["profile.png: not a plain file"]
    picture.unlink()
    picture.write_bytes(PICTURE[:20] + bytes(10**6) + PICTURE[20:])
    monkeypatch.setattr(verify, "LARGEST", 10**6)
    assert "profile.png, line 1: more than the 1000000 bytes" in verify.verify(folder)[0]


def test_compressed_logs(folder, monkeypatch):
    log = (folder / "log.txt").read_bytes()
    (folder / "log.txt.gz").write_bytes(gzip.compress(log))
    assert "which of the two" in verify.verify(folder)[0]
    (folder / "log.txt").unlink()
    assert verify.verify(folder) == []
    for content, said in ((gzip.compress(log)[:-9], "cut off"), (b"no gzip", "cannot be unpacked"),
                          (gzip.compress(log) + b"x", "followed by"), (gzip.compress(bytes(10**8)), "unpacks to more")):
        (folder / "log.txt.gz").write_bytes(content)
        assert said in verify.verify(folder)[0]


def test_the_folder_of_another_track(runs, tmp_path):
    shutil.copytree(runs["complete"], tmp_path / "cifar10-94" / "x")
    assert "the folder of the track cifar10-94" in verify.verify(tmp_path)[0]
    shutil.copytree(runs["complete"], tmp_path / "wiki-3.324" / "x")
    assert verify.verify(tmp_path / "wiki-3.324") == []


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../b", "", "a/./b", "a\0b"])
def test_names_that_lead_out_of_a_folder(tmp_path, name):
    with pytest.raises(safe.Unsafe):
        safe.read(tmp_path, name, 10)


def test_the_command(folder, capsys):
    parser = ArgumentParser()
    verify.add_arguments(parser)
    assert verify.main(parser.parse_args([str(folder)])) == 0
    assert f"verified  {folder}" in capsys.readouterr().out
    (folder / "source.txt").write_bytes(b"")
    assert verify.main(parser.parse_args([str(folder)])) == 1
    assert "NOT TRUE" in capsys.readouterr().out
    assert verify.main(parser.parse_args([str(folder / "none")])) == 2
    assert capsys.readouterr().err.startswith("records verify: no record in")


# -- tracks ----------------------------------------------------------------------------------------------------------

def test_a_target_that_is_not_the_tracks(tmp_path):
    code = repository(tmp_path / "repository")
    easy = write_run(tmp_path, [5.0, 3.9], code, target=4.0, name="easy")
    assert any("its target is 4.0, the track's 3.324" in problem for problem in verify.verify(easy))
    fewer = write_run(tmp_path, [5.0, 3.3], code, val_tokens=1024, name="fewer")
    assert any("its val_tokens is 1024" in problem for problem in verify.verify(fewer))
    above = write_run(tmp_path, [5.0, 3.4], code, val_tokens=1024, name="above")
    [report] = inspect(above)
    assert not report.problems and any("val_tokens" in note for note in report.notes)     # it claims nothing


def test_data_that_is_not_the_tracks(runs):
    record, log, source = contents(runs["complete"])
    old = json.loads(record)["data"]["val_000000.bin"].encode()
    new = b"0" * 64
    files = (record.replace(old, new), log.replace(old, new), source)
    files = (files[0].replace(sha256(log).encode(), sha256(files[1]).encode()), *files[1:])
    [problem] = check_record(*files)
    assert problem.startswith(f"record.json, line {line_of(files[0], new)}:") and "not the file of the track" in problem
