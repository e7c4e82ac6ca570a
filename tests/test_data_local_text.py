"""data.local_text: what it takes, that it is deterministic and whole, built once; the bigram baseline."""
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data import local_text
from data.local_text import bigram_loss, cut, ensure, library_texts, split_texts, tokens_of
from data.shards import DataError, TrainLoader, open_shard, sha256, write_shard

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "local"
    return folder, ensure(folder)


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A small standard library instead of the real one."""
    root = tmp_path / "lib"
    for i in range(40):
        (root / "package").mkdir(parents=True, exist_ok=True)
        (root / "package" / f"m{i}.py").write_text(f"# module {i}\n" * 30)
    monkeypatch.setattr(local_text.sysconfig, "get_path", lambda name: str(root))
    return root


def test_shards_are_real_text_and_whole(built):
    folder, source = built
    train, val = (open_shard(folder / name, 257) for name in ("train_000001.bin", "val_000000.bin"))
    assert train.size > 3_000_000 and train[0] == val[0] == 256
    assert 0.04 < val.size / (train.size + val.size) < 0.16
    assert source["python"] == local_text.python_version()
    assert source["train"]["tokens"] == train.size and source["val"]["sha256"] == sha256(folder / "val_000000.bin")
    assert source == json.loads((folder / "source.json").read_text())
    documents = np.flatnonzero(train == 256)
    assert documents.size == source["train"]["documents"]
    assert np.diff(documents, append=train.size).max() <= local_text.DOCUMENT_BYTES
    assert b"import" in bytes(train[train < 256].astype(np.uint8))
    assert sorted(p.name for p in folder.iterdir() if p.name != ".lock") == [
        "source.json", "train_000001.bin", "val_000000.bin"]


def test_a_run_finds_sequences_in_it(built):
    loader = TrainLoader(built[0], seed=0, sequence_length=16384, max_document=2048, vocab_size=257)
    loader.require(int(0.9 * built[1]["train"]["tokens"] / 16384))


def test_what_is_taken(built):
    texts = library_texts()
    assert {"json/decoder.py", "this.py", "asyncio/events.py"} <= set(texts) and list(texts) == sorted(texts)
    assert len(set(texts.values())) == len(texts)
    for name in texts:
        parts = set(name.split("/")[:-1])
        assert parts.isdisjoint({"site-packages", "dist-packages", "test", "tests", "__pycache__", "encodings"}), name
    pytest.importorskip("pydoc_data.topics")
    assert "pydoc_data/topics/lambda" in texts and "pydoc_data/topics.py" not in texts


def test_no_file_is_in_both_splits():
    texts = library_texts()
    names = split_texts(texts)
    assert set(names["train"]).isdisjoint(names["val"])
    assert sorted(names["train"] + names["val"]) == list(texts)
    assert 0.04 < len(names["val"]) / len(texts) < 0.13
    fewer = {name: text for name, text in texts.items() if name != names["train"][0]}
    assert split_texts(fewer)["val"] == names["val"]  # a file's split depends on its name alone


def test_tests_duplicates_and_empty_files_are_left_out(library):
    for name in ("test/a.py", "x/tests/b.py", "site-packages/c.py", "encodings/d.py", "_sysconfigdata__linux.py"):
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text(f"# {name}")
    (library / "package" / "copy.py").write_text("# module 3\n" * 30)
    (library / "empty.py").write_text("\n")
    assert sorted(n for n in library_texts() if not n.startswith("pydoc_data/")) == sorted(
        [f"package/m{i}.py" for i in range(40) if i != 3] + ["package/copy.py"])


def test_cut():
    text = b"".join(b"line %d\n" % i + b"\n" * (i % 7 == 0) for i in range(300))
    pieces = cut(text, 100)
    assert b"".join(pieces) == text and max(map(len, pieces)) <= 100
    assert all(piece.endswith(b"\n") for piece in pieces) and sum(p.endswith(b"\n\n") for p in pieces) > 10
    assert cut(b"x" * 250, 100) == [b"x" * 100, b"x" * 100, b"x" * 50]
    assert cut(b"", 100) == [] and cut(b"x" * 100, 100) == [b"x" * 100]
    assert cut(b"a\n" + b"x" * 99, 100) == [b"a\n", b"x" * 99]


def test_tokens_of():
    assert tokens_of([b"a\xff", b"b"]).tolist() == [256, 97, 255, 256, 98]


def test_built_twice_is_the_same(built, tmp_path):
    assert ensure(tmp_path / "again") == built[1]


def test_ensure_keeps_what_is_intact(library, tmp_path):
    folder = tmp_path / "data"
    source = ensure(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert ensure(folder) == source
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.parametrize("change", ["version", "train_000001.bin", "val_000000.bin", "source.json"])
def test_ensure_builds_again_what_is_not(library, tmp_path, monkeypatch, change):
    folder = tmp_path / "data"
    source = ensure(folder)
    if change == "version":
        monkeypatch.setattr(local_text, "python_version", lambda: "CPython 9.9.9")
    elif change == "source.json":
        (folder / change).write_bytes(b'{"python": \xff')
    else:
        raw = (folder / change).read_bytes()
        (folder / change).write_bytes(raw[:-1] + b"\1")
    again = ensure(folder)
    assert again["val"] == source["val"] and again["train"] == source["train"]
    assert again["python"] == ("CPython 9.9.9" if change == "version" else source["python"])
    assert sha256(folder / "train_000001.bin") == source["train"]["sha256"]
    assert json.loads((folder / "source.json").read_text()) == again


@pytest.mark.parametrize("after", [0, 1, 2])
def test_broken_off_build_is_built_again(library, tmp_path, monkeypatch, after):
    folder, calls = tmp_path / "data", []
    source = ensure(folder)
    monkeypatch.setattr(local_text, "DOCUMENT_BYTES", 100)  # other shards than those that are there
    replace = local_text.os.replace

    def break_off(a, b):
        if Path(b).parent == folder:
            if len(calls) == after:
                raise KeyboardInterrupt
            calls.append(b)
        replace(a, b)
    with monkeypatch.context() as patch:
        patch.setattr(local_text.os, "replace", break_off)
        with pytest.raises(KeyboardInterrupt):
            ensure(folder)
    assert not (folder / ".partial").exists()
    again = ensure(folder)
    assert again["train"] != source["train"]
    assert all(sha256(folder / name) == again[split]["sha256"] for split, name in local_text.SHARDS.items())


def test_foreign_shards_are_not_overwritten(tmp_path):
    write_shard(tmp_path / "train_000001.bin", np.array([256, 1], np.uint16))
    before = sha256(tmp_path / "train_000001.bin")
    with pytest.raises(DataError, match="not made from local text .train_000001.bin.*data.local_text ANOTHER_FOLDER"):
        ensure(tmp_path)
    assert sha256(tmp_path / "train_000001.bin") == before


def test_python_without_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(local_text.sysconfig, "get_path", lambda name: str(tmp_path / "python312.zip"))
    with pytest.raises(DataError, match="python312.zip: no sources.*python -m data.tokenize_text"):
        ensure(tmp_path / "data")
    assert not list((tmp_path / "data").glob("*.bin"))


def test_two_ranks_build_once(tmp_path):
    command = [sys.executable, "-m", "data.local_text", str(tmp_path / "data")]
    ranks = [subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
             for _ in range(2)]
    outputs = [rank.communicate() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert sum("building shards" in stderr for _, stderr in outputs) == 1
    assert outputs[0][0] == outputs[1][0] and "bigram model reaches" in outputs[0][0]


def test_command_line_error(tmp_path):
    write_shard(tmp_path / "mine_train_000001.bin", np.array([256, 1], np.uint16))
    with pytest.raises(SystemExit) as caught:
        local_text.main([str(tmp_path)])
    assert "error: " in str(caught.value) and "mine_train_000001.bin" in str(caught.value)


# The baseline --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.01, 1.0])
def test_bigram_loss_against_dictionaries(smoothing):
    rng = np.random.default_rng(0)
    train, val = (np.minimum(rng.geometric(0.3, n), 11).astype(np.uint16) for n in (3000, 500))
    pairs = Counter(zip(train[:-1].tolist(), train[1:].tolist()))
    first = Counter(train[:-1].tolist())
    wanted = [-math.log((pairs[a, b] + smoothing) / (first[a] + 12 * smoothing))
              for a, b in zip(val[:-1].tolist(), val[1:].tolist())]
    assert bigram_loss(train, val, 12, smoothing=smoothing) == pytest.approx(sum(wanted) / len(wanted), rel=1e-12)


def test_bigram_loss_of_what_was_never_seen_is_uniform():
    assert bigram_loss(np.array([0, 0, 0]), np.array([5, 6, 7]), 8) == pytest.approx(math.log(8))
    with pytest.raises(ValueError, match="4096, got 50257"):
        bigram_loss(np.zeros(9, int), np.zeros(9, int), 50257)
    with pytest.raises(ValueError, match="1 train"):
        bigram_loss(np.zeros(1, int), np.zeros(9, int), 8)


def test_bigram_loss_of_the_real_text_and_its_smoothing(built):
    train, val = (open_shard(built[0] / name, 257) for name in ("train_000001.bin", "val_000000.bin"))
    loss = bigram_loss(train, val, 257)
    assert 1.8 < loss < 3.0
    assert loss == pytest.approx(bigram_loss(train, val, 257, smoothing=1.0), abs=0.01)  # as the docstring says
