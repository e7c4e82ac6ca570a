"""data.tokenize_text: what becomes a document, how shards are packed, what can go wrong, with any number of workers."""
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data import tokenize_text
from data.shards import DataError, TrainLoader, open_shard, shard_paths, sha256
from data.tokenize_text import convert, encoder, main

ROOT = Path(__file__).resolve().parents[1]


def read(folder, split):
    return np.concatenate([open_shard(path, 257) for path in shard_paths(folder, split)])


def texts_of(stream):
    """The documents of a stream of byte tokens, as text."""
    starts = np.flatnonzero(stream == 256)
    assert starts[0] == 0
    return [bytes(part[1:].astype(np.uint8)).decode() for part in np.split(stream, starts[1:])]


def convert_bytes(source, folder, **options):
    return convert(source, folder, **dict(dict(encoding="bytes", val_tokens=5), **options))


@pytest.fixture
def source(tmp_path):
    """Files of every kind, in path order: a.jsonl, b/c.txt, b/d.txt.gz, e.ndjson.gz, f.md; and what is left out."""
    root = tmp_path / "source"
    (root / "b").mkdir(parents=True)
    (root / "a.jsonl").write_text('{"text": "first"}\n\n{"text": "s\\u00e9cond"}\n{"text": " "}\n')
    (root / "b" / "c.txt").write_text("\ufeffthird\r\nline", newline="")
    (root / "b" / "d.txt.gz").write_bytes(gzip.compress(b"fourth"))
    (root / "e.ndjson.gz").write_bytes(gzip.compress(b'{"text": "fifth"}\n{"text": "sixth"}'))
    (root / "f.md").write_text("seventh")
    (root / "g.png").write_bytes(b"\x89PNG\xff")
    (root / "b" / "empty.txt").write_text("")
    (root / ".git").mkdir()
    (root / ".git" / "config").write_text("hidden")
    return root


def test_documents_of_a_folder(source, tmp_path):
    summary = convert_bytes(source, tmp_path / "out")
    assert texts_of(read(tmp_path / "out", "val")) == ["first"]
    assert texts_of(read(tmp_path / "out", "train")) == ["sécond", "third\r\nline", "fourth", "fifth", "sixth",
                                                         "seventh"]
    assert (summary.documents, summary.empty_documents, summary.train_shards) == (7, 2, 1)
    assert summary.skipped == [str(source / "g.png")]
    assert (summary.val_tokens, summary.train_tokens) == tuple(read(tmp_path / "out", s).size for s in ("val", "train"))
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.name != ".lock") == [
        "train_000001.bin", "val_000000.bin"]


def test_one_file_and_another_field(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "one \\ud800"}\n{"body": "two", "text": 3}\n')
    convert_bytes(tmp_path / "a.jsonl", tmp_path / "out", text_field="body")
    assert texts_of(read(tmp_path / "out", "val")) == ["one \ufffd"]
    assert texts_of(read(tmp_path / "out", "train")) == ["two"]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """200 documents of 0 to 2 kB in JSON lines, and the texts."""
    rng = np.random.default_rng(0)
    texts = [f"{i}:" + "é" * int(rng.integers(1000)) for i in range(200)]
    path = tmp_path_factory.mktemp("many") / "many.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path, texts


def test_documents_stay_whole_within_shards(many, tmp_path):
    path, texts = many
    summary = convert_bytes(path, tmp_path, val_tokens=10_000, shard_tokens=5_000)
    val = texts_of(read(tmp_path, "val"))
    assert val == texts[:len(val)]
    assert summary.val_tokens > 10_000 >= summary.val_tokens - 1 - len(val[-1].encode())  # no document too many
    rest = []
    for shard in shard_paths(tmp_path, "train"):
        tokens = open_shard(shard, 257)
        assert tokens.size <= 5_000
        rest += texts_of(tokens)
    assert rest == texts[len(val):]
    assert summary.train_shards == len(shard_paths(tmp_path, "train")) > 20
    TrainLoader(tmp_path, seed=0, sequence_length=64, max_document=64, vocab_size=257).require(100)


def test_document_longer_than_a_shard_is_cut_into_documents(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("v" * 9, "x", "y" * 250, "z")))
    convert_bytes(tmp_path / "a.jsonl", tmp_path / "out", shard_tokens=100)
    shards = [texts_of(open_shard(path, 257)) for path in shard_paths(tmp_path / "out", "train")]
    assert shards == [["x"], ["y" * 99], ["y" * 99], ["y" * 52, "z"]]


def test_output_does_not_depend_on_workers(many, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize_text, "CHUNK", 5_000)  # some forty chunks: more than the look-ahead of two workers
    for workers in (1, 2):
        convert_bytes(many[0], tmp_path / str(workers), val_tokens=10_000, shard_tokens=50_000, workers=workers)
    one, two = ([(p.name, sha256(p)) for p in sorted((tmp_path / w).glob("*.bin"))] for w in "12")
    assert one == two and len(one) > 2


def test_look_ahead_is_bounded(many, monkeypatch):
    class Now:
        def __init__(self, value):
            self.value = value

        def result(self):
            return self.value

    class Pool:
        def __init__(self, *_, **__):
            pass

        def submit(self, function, *arguments):
            return Now(function(*arguments))

        def shutdown(self, cancel_futures):
            pass
    monkeypatch.setattr(tokenize_text, "ProcessPoolExecutor", Pool)
    taken = []

    def chunks():
        for i in range(100):
            taken.append(i)
            yield [str(i)], 1
    for done, (tokens, _) in enumerate(tokenize_text.encode_in_order(chunks(), "bytes", 3)):
        assert texts_of(tokens[0]) == [str(done)]
        assert len(taken) <= done + 12
    assert done == 99


@pytest.mark.parametrize("content, said", [
    (b'{"text": "ok"}\n\n{"text": \n', "a.jsonl:3: not a line of JSON.*mend or delete the line"),
    (b'{"text": "ok"}\n{"text": "\xff"}\n', "a.jsonl:2: not a line of JSON"),
    (b'{"body": "x", "id": 1}\n', "a.jsonl:1: .*field 'text', this one has the fields body, id; name .* with --field"),
    (b'{"text": null}\n', "a.jsonl:1: .*field 'text', this one has the fields text"),
    (b'["text"]\n', "a.jsonl:1: .*is not an object"),
])
@pytest.mark.parametrize("zipped", [False, True])
def test_bad_json_names_file_and_line_and_leaves_nothing(tmp_path, content, said, zipped):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / ("a.jsonl" + ".gz" * zipped)).write_bytes(gzip.compress(content) if zipped else content)
    with pytest.raises(DataError, match=said.replace("a.jsonl:", "a.jsonl.gz:") if zipped else said):
        convert_bytes(tmp_path / "in", tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir() if p.name != ".lock"] == []


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz"])
@pytest.mark.parametrize("damage", [lambda raw: raw[:-12], lambda raw: b"no gzip", lambda raw: raw[:20] + b"\0" * 9])
def test_damaged_gzip(tmp_path, name, damage):
    raw = gzip.compress(b"".join(b'{"text": "%d"}\n' % i for i in range(1000)))
    (tmp_path / name).write_bytes(damage(raw))
    with pytest.raises(DataError, match=f"{name}: damaged gzip"):
        convert_bytes(tmp_path / name, tmp_path / "out")


def test_existing_shards_are_kept_unless_told(source, many, tmp_path):
    out = tmp_path / "out"
    convert_bytes(many[0], out, shard_tokens=5_000)
    before = {path.name: sha256(path) for path in out.glob("*.bin")}
    with pytest.raises(DataError) as caught:
        convert_bytes(source, out)
    assert f"python -m data.tokenize_text {source} {out} --overwrite" in str(caught.value)
    with pytest.raises(DataError, match="nothing is left"):  # fails late: still as before
        convert_bytes(source, out, val_tokens=10**6, overwrite=True)
    assert before == {path.name: sha256(path) for path in out.glob("*.bin")}
    convert_bytes(source, out, overwrite=True)
    assert sorted(path.name for path in out.glob("*.bin")) == ["train_000001.bin", "val_000000.bin"]
    assert texts_of(read(out, "val")) == ["first"]


def test_too_little_text_and_wrong_options(source, tmp_path):
    with pytest.raises(DataError, match="7 documents with .* nothing is left.*--val-tokens; 1 files skipped.*g.png"):
        convert_bytes(source, tmp_path / "out", val_tokens=10**6)
    (tmp_path / "void").mkdir()
    for bad, said in ((tmp_path / "nowhere", "nowhere: no such file or folder"), (tmp_path / "void", "void: no files")):
        with pytest.raises(DataError, match=said):
            convert_bytes(bad, tmp_path / "out")
    for options in (dict(shard_tokens=1), dict(val_tokens=0), dict(workers=0)):
        with pytest.raises(DataError, match="--shard-tokens is at least 2"):
            convert_bytes(source, tmp_path / "out", **options)
    with pytest.raises(ValueError, match="gpt2, bytes, got 'gpt5'"):
        convert_bytes(source, tmp_path / "out", encoding="gpt5")


@pytest.mark.parametrize("at", range(3))
def test_broken_off_renaming_leaves_no_usable_set(many, tmp_path, monkeypatch, at):
    out, done = tmp_path / "out", []
    convert_bytes(many[0], out, shard_tokens=100_000)  # an old set, to be replaced
    replace = os.replace

    def break_off(a, b):
        if Path(b).parent == out:
            if len(done) == at:
                raise KeyboardInterrupt
            done.append(b)
        replace(a, b)
    monkeypatch.setattr(os, "replace", break_off)
    with pytest.raises(KeyboardInterrupt):
        convert_bytes(many[0], out, shard_tokens=60_000, overwrite=True)
    assert len(done) == at
    with pytest.raises(DataError, match="no val shard"):
        shard_paths(out, "val")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_killed_conversion_leaves_no_shards_and_no_processes(many, tmp_path):
    """SIGKILL in the middle: nothing under a final name, the workers end, the next conversion succeeds."""
    code = f"""if True:
        import time
        from data import tokenize_text
        tokenize_text.CHUNK = 2000
        chunks_of = tokenize_text.chunks_of
        def slowly(*arguments):
            for i, chunk in enumerate(chunks_of(*arguments)):
                time.sleep(0 if i < 50 else 100)
                yield chunk
        tokenize_text.chunks_of = slowly
        tokenize_text.convert({str(many[0])!r}, {str(tmp_path / 'out')!r}, encoding="bytes", val_tokens=5,
                              shard_tokens=2000, workers=2)"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    end = time.monotonic() + 30
    while not (tmp_path / "out" / ".partial" / "train_000003.bin").exists() and time.monotonic() < end:
        time.sleep(0.01)
    workers = descendants(process.pid)
    process.kill()
    process.wait()
    assert (tmp_path / "out" / ".partial" / "train_000003.bin").exists() and len(workers) >= 2
    assert not list((tmp_path / "out").glob("*.bin"))
    while any(alive(pid) for pid in workers) and time.monotonic() < end:
        time.sleep(0.01)
    left = [pid for pid in workers if alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
    convert_bytes(many[0], tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.bin"))) == 2 and not (tmp_path / "out" / ".partial").exists()


def _stat(pid):
    """State and parent of a process, from Linux's /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[:2]
    except FileNotFoundError:
        return "gone", "0"


def alive(pid):
    return _stat(pid)[0] not in ("gone", "Z")


def descendants(pid):
    parents = {int(p.name): int(_stat(p.name)[1]) for p in Path("/proc").iterdir() if p.name.isdigit()}
    found = [pid]
    for parent in found:
        found += [child for child, its_parent in parents.items() if its_parent == parent]
    return found[1:]


def test_killed_worker_is_explained(many, tmp_path, monkeypatch):
    class Pool:
        def __init__(self, *_, **__):
            pass

        def submit(self, *_):
            raise tokenize_text.BrokenProcessPool("terminated abruptly")

        def shutdown(self, cancel_futures):
            pass
    monkeypatch.setattr(tokenize_text, "ProcessPoolExecutor", Pool)
    with pytest.raises(DataError, match="killed.*--workers 4"):
        convert_bytes(many[0], tmp_path, workers=8)


def test_missing_rank_file_says_where_to_put_it(source, tmp_path, monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")

    def fail(name):
        raise ConnectionError("no route")
    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    encoder.cache_clear()
    with pytest.raises(DataError) as caught:
        convert(source, tmp_path / "out")
    for said in ("no route", "TIKTOKEN_CACHE_DIR", "0ea1e91bbb3a60f729a8dc8f777fd2fc07cd8df4", "r50k_base.tiktoken"):
        assert said in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_gpt2_encoding(tmp_path):
    encoder.cache_clear()
    try:
        encoder("gpt2")
    except DataError as error:
        pytest.skip(str(error))
    (tmp_path / "a.jsonl").write_text('{"text": "Hello world"}\n{"text": "<|endoftext|> naïve"}\n')
    convert(tmp_path / "a.jsonl", tmp_path / "out", val_tokens=1)
    assert open_shard(tmp_path / "out" / "val_000000.bin", 50257).tolist() == [50256, 15496, 995]
    train = open_shard(tmp_path / "out" / "train_000001.bin", 50257)
    assert train[0] == 50256 and (train[1:] < 50256).all()  # the text's own "<|endoftext|>" is plain text


def test_command_line(source, tmp_path, capsys):
    main([str(source), str(tmp_path / "out"), "--encoding", "bytes", "--val-tokens", "5", "--workers", "1"])
    out = capsys.readouterr().out
    assert "7 documents; 6 validation tokens" in out and "2 empty documents" in out and "1 files skipped" in out
    with pytest.raises(SystemExit) as caught:
        main([str(source), str(tmp_path / "out"), "--encoding", "bytes"])
    assert "--overwrite" in str(caught.value)
