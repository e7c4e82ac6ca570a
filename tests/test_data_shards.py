"""data.shards and data.files: the format and its errors, the training stream, prefetching, validation."""
import itertools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data import files, shards
from data.shards import Batch, DataError, TrainLoader, open_shard, sequence_starts, shard_paths, validation_batches
from data.shards import write_shard

VOCAB, DOCUMENT, LENGTH = 1000, 999, 32
ROOT = Path(__file__).resolve().parents[1]


def random_tokens(seed, count, mean_document=12):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, DOCUMENT, count, dtype=np.uint16)
    tokens[rng.random(count) < 1 / mean_document] = DOCUMENT
    return tokens


@pytest.fixture
def folder(tmp_path):
    for i in range(1, 4):
        write_shard(tmp_path / f"fineweb_train_{i:06d}.bin", random_tokens(i, 5000))
    for i, count in enumerate((700, 1, 500)):
        write_shard(tmp_path / f"val_{i:06d}.bin", random_tokens(10 + i, count))
    return tmp_path


def loader(folder, **changes):
    return TrainLoader(folder, **dict(dict(seed=7, sequence_length=LENGTH, max_document=8, vocab_size=VOCAB,
                                           hint="MEND"), **changes))


def equal(a: Batch, b: Batch):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("tokens", "targets", "cu_seqlens"))


# Files ---------------------------------------------------------------------------------------------------------------


def test_round_trip_and_exact_bytes(tmp_path):
    tokens = random_tokens(0, 100)
    write_shard(tmp_path / "new" / "train_000001.bin", tokens)
    read = open_shard(tmp_path / "new" / "train_000001.bin", VOCAB)
    assert isinstance(read, np.memmap) and read.dtype == np.uint16 and np.array_equal(read, tokens)
    with pytest.raises(ValueError):
        read[0] = 1
    raw = (tmp_path / "new" / "train_000001.bin").read_bytes()
    assert raw[:12] == b"\x88\xd8\x34\x01" + b"\x01\0\0\0" + b"\x64\0\0\0" and not any(raw[12:1024])
    assert raw[1024:] == tokens.astype("<u2").tobytes()
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["train_000001.bin"]


@pytest.mark.parametrize("tokens, error", [
    ([1, 2], TypeError), (np.zeros(3, np.int64), TypeError), (np.zeros((3, 1), np.uint16), TypeError),
    (np.zeros(0, np.uint16), ValueError)])
def test_write_refuses(tmp_path, tokens, error):
    with pytest.raises(error, match="bad.bin"):
        write_shard(tmp_path / "bad.bin", tokens)
    assert not list(tmp_path.iterdir())


def edited(position, value):
    def edit(raw):
        raw[position:position + len(value)] = value
        return raw
    return edit


@pytest.mark.parametrize("edit, said", [
    (edited(0, b"\0"), "not a token shard.*expected 20240520"),
    (edited(4, b"\2"), "version 2.*version 1"),
    (edited(8, b"\0\0\0\0"), "0 tokens"),
    (edited(11, b"\xff"), "-.* tokens"),
    (lambda raw: raw[:-1], "truncated: 1223 bytes, but 100 tokens take 1224"),
    (lambda raw: raw[:1000], "1000 bytes.*header.*1024.*truncated"),
    (lambda raw: raw[:0], "0 bytes.*truncated"),
    (lambda raw: raw + b"\0\0", "bytes left over: 1226"),
    (edited(1024 + 2 * 41, b"\xe8\x03"), "token id 1000 at position 41 .*vocabulary of 1000"),
])
def test_open_shard_errors_name_file_and_mend(tmp_path, edit, said):
    path = tmp_path / "train_000001.bin"
    write_shard(path, random_tokens(0, 100))
    path.write_bytes(edit(bytearray(path.read_bytes())))
    with pytest.raises(DataError, match=f"(?s){said}") as caught:
        open_shard(path, VOCAB, hint="python -m mend")
    assert str(path) in str(caught.value) and "python -m mend" in str(caught.value)


def test_vocabulary_is_checked_beyond_the_first_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SCAN", 16)
    tokens = random_tokens(0, 100)
    tokens[[70, 90]] = 2000
    write_shard(tmp_path / "a.bin", tokens)
    with pytest.raises(DataError, match="2000 at position 70 "):
        open_shard(tmp_path / "a.bin", VOCAB)


def test_missing_files_say_the_command(tmp_path, folder):
    with pytest.raises(DataError, match="nowhere.*python -m data.fineweb 5"):
        shard_paths(tmp_path / "nowhere", "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no val shard.*MEND"):
        shard_paths(tmp_path / "empty", "val", hint="MEND")
    with pytest.raises(DataError, match="none.bin: no such shard; run: MEND"):
        open_shard(tmp_path / "none.bin", VOCAB, hint="MEND")
    with pytest.raises(ValueError, match="'test'"):
        shard_paths(folder, "test")


def test_shard_paths_sorts_and_matches_both_namings(folder):
    write_shard(folder / "train_000002.bin", random_tokens(0, 10))
    (folder / ".train_000009.bin.1-1.partial").write_bytes(b"")
    assert [p.name for p in shard_paths(folder, "train")] == [
        "fineweb_train_000001.bin", "fineweb_train_000002.bin", "fineweb_train_000003.bin", "train_000002.bin"]
    assert len(shard_paths(folder, "val")) == 3


def test_sha256(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert shards.sha256(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, broken):
    path = tmp_path / "train_000001.bin"
    write_shard(path, random_tokens(1, 50))
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")
    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="disk full"):
        write_shard(path, random_tokens(2, 60))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_killed_writer_leaves_no_shard(tmp_path):
    code = f"""if True:
        import os, signal, numpy as np
        from data import shards
        os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)
        shards.write_shard({str(tmp_path / 'train_000001.bin')!r}, np.zeros(1000, np.uint16))"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == -9
    assert len(list(tmp_path.iterdir())) == 1  # the partial file is there, under another name
    with pytest.raises(DataError, match="no train shard"):
        shard_paths(tmp_path, "train")


def test_one_builder_excludes_threads(tmp_path):
    inside, most = [], []

    def work():
        with files.one_builder(tmp_path / "new"):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.02)
            inside.pop()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]


# The training stream -------------------------------------------------------------------------------------------------


def brute_force_starts(tokens, document, length):
    starts, at = [], 0
    while at < len(tokens):
        if tokens[at] == document:
            if at + length + 1 <= len(tokens):
                starts.append(at)
            at += length
        else:
            at += 1
    return starts


@pytest.mark.parametrize("mean_document", [3, 12, 100])
def test_sequence_starts_against_brute_force(monkeypatch, mean_document):
    monkeypatch.setattr(shards, "SCAN", 64)
    for seed in range(20):
        tokens = random_tokens(seed, 600, mean_document)
        assert sequence_starts(tokens, DOCUMENT, 32).tolist() == brute_force_starts(tokens, DOCUMENT, 32)
    assert sequence_starts(np.zeros(100, np.uint16), DOCUMENT, 32).size == 0


def test_the_last_target_must_fit():
    tokens = np.zeros(33, np.uint16)
    tokens[0] = DOCUMENT
    assert sequence_starts(tokens, DOCUMENT, 32).tolist() == [0]
    assert sequence_starts(tokens[:32], DOCUMENT, 32).tolist() == []


def total(folder):
    return sum(len(brute_force_starts(open_shard(p, VOCAB), DOCUMENT, LENGTH)) for p in shard_paths(folder, "train"))


def test_stream_is_every_sequence_of_the_folder_once(folder):
    count = total(folder)
    batch = loader(folder).batch(0, count)
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64 and batch.cu_seqlens.dtype == torch.int32
    assert batch.tokens.shape == batch.targets.shape == (count, LENGTH)
    assert (batch.tokens[:, 0] == DOCUMENT).all()
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    seen = sorted(map(tuple, torch.cat([batch.tokens, batch.targets[:, -1:]], 1).tolist()))
    wanted = []
    for path in shard_paths(folder, "train"):
        tokens = open_shard(path, VOCAB)
        wanted += [tuple(tokens[at:at + LENGTH + 1].tolist()) for at in brute_force_starts(tokens, DOCUMENT, LENGTH)]
    assert seen == sorted(wanted)


def test_order_depends_on_the_seed_and_on_nothing_else(folder):
    a, b, c = (loader(folder, seed=s).batch(0, 40).tokens for s in (7, 7, 8))
    assert torch.equal(a, b) and not torch.equal(a, c)
    one = loader(folder).batch(17, 1).tokens  # resumed late: same as in a run from the start
    assert torch.equal(one, a[17:18])
    orders = {tuple(p.name for p in loader(folder, seed=s)._paths) for s in range(30)}
    assert len(orders) == 6  # all orders of three shards occur


def test_the_list_of_another_seed_reads_no_shard_again(folder, monkeypatch):
    others = {seed: loader(folder, seed=seed, rank=1, world_size=2) for seed in (8, 9)}
    batches = {seed: other.batch(2, 40) for seed, other in others.items()}
    first = loader(folder, rank=1, world_size=2)
    first.require(340)
    assert len(first.files_used) == 3
    monkeypatch.setattr(shards, "open_shard", None)
    for seed, batch in batches.items():
        other = first.with_seed(seed)
        assert equal(other.batch(2, 40), batch) and other.files_used == others[seed].files_used
    assert not equal(batches[8], batches[9]) and equal(first.with_seed(7).batch(2, 40), first.batch(2, 40))


def test_the_order_of_a_seed_is_pinned(tmp_path):
    """Records name a seed: its order must not change with a version of NumPy or of this code."""
    write_shard(tmp_path / "train_000001.bin", np.array([9, 0, 9, 1, 9, 2, 9, 3, 9, 4, 9, 5, 9], np.uint16))
    run = TrainLoader(tmp_path, seed=3, sequence_length=2, max_document=2, vocab_size=10)
    assert run.batch(0, 6).tokens.tolist() == [[9, i] for i in (4, 3, 1, 5, 0, 2)]


def test_sequences_are_shuffled_within_a_shard(folder):
    run = loader(folder)
    run.require(1)
    starts = run._shards[0][1]
    assert sorted(starts.tolist()) != starts.tolist()


@pytest.mark.parametrize("world_size, parts", list(itertools.product((1, 2, 4), (1, 2))))
def test_global_batch_does_not_depend_on_ranks_and_parts(folder, world_size, parts):
    whole = loader(folder).batch(16, 24)
    pieces = [loader(folder, rank=rank, world_size=world_size).batch(16, 24, part, parts)
              for rank in range(world_size) for part in range(parts)]
    assert torch.equal(torch.cat([p.tokens for p in pieces]), whole.tokens)
    assert torch.equal(torch.cat([p.targets for p in pieces]), whole.targets)
    size = 24 // world_size // parts * LENGTH
    ends = torch.cat([p.cu_seqlens[:-1] + i * size for i, p in enumerate(pieces)] + [whole.cu_seqlens[-1:]])
    assert torch.equal(ends, whole.cu_seqlens)


def test_consecutive_batches_make_up_a_longer_one(folder):
    run = loader(folder)
    two = torch.cat([run.batch(0, 8).tokens, run.batch(8, 24).tokens])
    assert torch.equal(two, loader(folder).batch(0, 32).tokens)


@pytest.mark.parametrize("max_document", [1, 5, 8, 10_000])
def test_cu_seqlens(folder, max_document):
    batch = loader(folder, max_document=max_document).batch(0, 20)
    wanted, last = [], 0
    for at, token in enumerate(batch.tokens.reshape(-1).tolist()):
        if token == DOCUMENT or at % LENGTH == 0 or at - last == max_document:
            wanted.append(at)
            last = at
    assert batch.cu_seqlens.tolist() == wanted + [20 * LENGTH]
    assert batch.cu_seqlens.diff().min() >= 1 and batch.cu_seqlens.diff().max() <= max_document


def test_batch_that_does_not_divide(folder):
    with pytest.raises(DataError, match="10 sequences of 32.*4 ranks × 2 .*multiple of 256 tokens"):
        loader(folder, world_size=4).batch(0, 10, 0, 2)


@pytest.mark.parametrize("request_", [(-1, 4, 0, 1), (0, 0, 0, 1), (0, 4, 2, 2), (0, 4, -1, 2), (0, 4, 0, 0)])
def test_impossible_requests(folder, request_):
    with pytest.raises(ValueError, match="batch needs"):
        loader(folder).batch(*request_)


@pytest.mark.parametrize("changes", [dict(rank=2, world_size=2), dict(rank=-1), dict(sequence_length=0), dict(seed=-1),
                                     dict(max_document=0), dict(vocab_size=1), dict(vocab_size=70_000)])
def test_impossible_settings(folder, changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        loader(folder, **changes)


def test_require_and_the_end_of_the_data(folder):
    count = total(folder)
    run = loader(folder, world_size=2)
    run.require(count)
    for call in (lambda: run.require(count + 1), lambda: run.batch(count - 1, 2), lambda: run.batch(count + 10, 2)):
        with pytest.raises(DataError) as caught:
            call()
        for said in (str(folder), "3 train shards", "15,000 tokens", f"{count:,} sequences of 32", "--steps", "MEND"):
            assert said in str(caught.value)


def test_shards_are_opened_as_the_run_reaches_them(folder):
    run = loader(folder)
    assert run.files_used == []
    run.batch(0, 1)
    assert len(run.files_used) == 1
    run.require(total(folder))
    assert sorted(run.files_used) == shard_paths(folder, "train")


def test_a_damaged_shard_is_found_when_reached(folder):
    path = loader(folder)._paths[-1]
    path.write_bytes(path.read_bytes()[:-2])
    run = loader(folder)
    run.batch(0, 1)
    with pytest.raises(DataError, match=f"{path.name}: truncated.*MEND"):
        run.require(10**6)


def test_no_document_start(tmp_path):
    write_shard(tmp_path / "train_000001.bin", np.zeros(500, np.uint16))
    with pytest.raises(DataError, match="train_000001.bin: no document start.*999.*MEND"):
        loader(tmp_path).batch(0, 1)


# Prefetching ---------------------------------------------------------------------------------------------------------


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "data prefetch"]


def wait_for(condition, seconds=5):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


@pytest.mark.parametrize("depth", [1, 3])
def test_prefetch_yields_the_same_batches(folder, depth):
    requests = [(4 * i, 4, part, 2) for i in range(10) for part in range(2)]
    batches = list(loader(folder).prefetch(iter(requests), depth=depth))
    other = loader(folder)
    assert len(batches) == len(requests) and all(equal(b, other.batch(*r)) for b, r in zip(batches, requests))
    assert wait_for(lambda: not prefetch_threads())


def test_prefetch_runs_ahead_by_depth_and_no_further(folder, monkeypatch):
    run, prepared = loader(folder), []
    batch = run.batch
    monkeypatch.setattr(run, "batch", lambda *request: prepared.append(request) or batch(*request))
    iterator = run.prefetch(((i, 1, 0, 1) for i in itertools.count()), depth=3)
    next(iterator)
    assert wait_for(lambda: len(prepared) == 4)
    time.sleep(0.05)
    assert len(prepared) == 4  # one taken, three ahead
    iterator.close()
    assert wait_for(lambda: not prefetch_threads()) and len(prepared) == 4


def test_prefetch_raises_in_the_consumer_behind_the_good_batches(folder):
    count = total(folder)
    iterator = loader(folder).prefetch([(0, 1, 0, 1), (count, 1, 0, 1)])
    assert next(iterator).tokens.shape == (1, LENGTH)
    with pytest.raises(DataError, match="--steps"):
        next(iterator)

    def requests():
        yield 0, 1, 0, 1
        raise KeyError("schedule")
    iterator = loader(folder).prefetch(requests())
    next(iterator)
    with pytest.raises(KeyError, match="schedule"):
        next(iterator)
    assert wait_for(lambda: not prefetch_threads())


def test_dropped_prefetch_stops_its_thread(folder):
    for batch in loader(folder).prefetch((i, 1, 0, 1) for i in range(100)):
        break
    assert wait_for(lambda: not prefetch_threads())
    with pytest.raises(ValueError, match="depth"):
        loader(folder).prefetch([], depth=0)


def test_prefetch_pins_when_asked(folder, monkeypatch):
    pinned = []
    monkeypatch.setattr(Batch, "pin", lambda self: pinned.append(1) or self)
    list(loader(folder).prefetch([(0, 1, 0, 1)]))
    assert not pinned
    list(loader(folder).prefetch([(0, 1, 0, 1), (1, 1, 0, 1)], pin=True))
    assert len(pinned) == 2


def test_batch_to_device(folder):
    batch = loader(folder).batch(0, 2)
    assert equal(batch.to("cpu"), batch)
    meta = batch.to("meta")
    assert {x.device.type for x in (meta.tokens, meta.targets, meta.cu_seqlens)} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a GPU")
def test_pinned_batch(folder):
    batch = loader(folder).batch(0, 2)
    pinned = batch.pin()
    assert pinned.tokens.is_pinned() and pinned.cu_seqlens.is_pinned() and equal(pinned.to("cuda").to("cpu"), batch)


# Validation ----------------------------------------------------------------------------------------------------------


def validation(folder, **changes):
    return validation_batches(folder, **dict(dict(tokens=1024, sequence_length=32, max_document=8, vocab_size=VOCAB,
                                                  sequences_per_pass=4, hint="MEND"), **changes))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_validation_predicts_each_position_once(folder, world_size):
    stream = np.concatenate([open_shard(p, VOCAB) for p in shard_paths(folder, "val")])
    batches = [b for rank in range(world_size) for b in validation(folder, rank=rank, world_size=world_size)]
    assert all(b.tokens.shape == (4, 32) and b.tokens.dtype == b.targets.dtype == torch.int64 for b in batches)
    assert torch.cat([b.tokens.reshape(-1) for b in batches]).tolist() == stream[:1024].tolist()
    assert torch.cat([b.targets.reshape(-1) for b in batches]).tolist() == stream[1:1025].tolist()
    for b in batches:
        ends = set(b.cu_seqlens.tolist())
        assert ends >= {0, 32, 64, 96, 128} | set(np.flatnonzero(b.tokens.reshape(-1) == DOCUMENT).tolist())
        assert b.cu_seqlens.diff().min() >= 1 and b.cu_seqlens.diff().max() <= 8


def test_validation_takes_all_but_the_last_token(tmp_path):
    write_shard(tmp_path / "val_000000.bin", random_tokens(0, 129))
    assert len(validation(tmp_path, tokens=128)) == 1
    assert validation(tmp_path, tokens=128, sequences_per_pass=100)[0].tokens.shape == (4, 32)  # the whole share
    write_shard(tmp_path / "val_000000.bin", random_tokens(0, 128))
    for rank in (0, 1):  # all ranks stop, not only the one that lacks the token
        with pytest.raises(DataError, match="1 val shard with 128 tokens.*reads 129.*fewer.*MEND"):
            validation(tmp_path, tokens=128, rank=rank, world_size=2, sequences_per_pass=1)


@pytest.mark.parametrize("changes, said", [
    (dict(tokens=1000), "1000 validation tokens.*multiple of 32, such as 992"),
    (dict(tokens=1024, world_size=3), "multiple of 96, such as 960"),
    (dict(tokens=0), "0 validation tokens"),
    (dict(sequences_per_pass=5), "32 validation sequences a rank.*passes of 5"),
    (dict(sequences_per_pass=0), "passes of 0"),
])
def test_validation_that_does_not_divide(folder, changes, said):
    with pytest.raises(DataError, match=said):
        validation(folder, **changes)
