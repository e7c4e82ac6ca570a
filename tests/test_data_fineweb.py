"""data.fineweb against a fake Hub that serves from a folder: whole, broken off, truncated, wrong, many at once."""
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from data import fineweb
from data.shards import DataError, sha256, write_shard


class FakeHub:
    """Stands in for the three functions of huggingface_hub that data.fineweb calls."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.calls, self.damage, self.etags = folder, [], {}, {}
        for i, name in enumerate(fineweb.file_names(3)):
            write_shard(folder / name, np.random.default_rng(i).integers(0, 50257, 1000, dtype=np.uint16))
        monkeypatch.setattr(fineweb, "hf_hub_download", self.download)
        monkeypatch.setattr(fineweb, "get_hf_file_metadata", self.metadata)
        monkeypatch.setattr(fineweb, "VAL_SHA256", sha256(folder / "fineweb_val_000000.bin"))

    def metadata(self, url):
        name = url.rsplit("/", 1)[1]
        assert fineweb.REPO["revision"] in url and "datasets/kjj0/fineweb10B-gpt2" in url
        return SimpleNamespace(etag=self.etags.get(name, sha256(self.folder / name)))

    def download(self, *, repo_id, repo_type, revision, filename, local_dir):
        assert len(revision) == 40 and repo_type == "dataset" and repo_id == "kjj0/fineweb10B-gpt2"
        self.calls.append(filename)
        local_dir.mkdir(parents=True, exist_ok=True)
        raw = (self.folder / filename).read_bytes()
        damage = self.damage.pop(filename, None)  # strikes once
        if damage == "network":
            (local_dir / f"{filename}.incomplete").write_bytes(raw[:500])
            raise ConnectionError("the wire was cut")
        if damage == "slow":
            time.sleep(0.1)
        raw = {"truncated": raw[:-100], "wrong": raw[:-1] + bytes([raw[-1] ^ 1])}.get(damage, raw)
        (local_dir / filename).write_bytes(raw)
        return str(local_dir / filename)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    (tmp_path / "hub").mkdir()
    return FakeHub(tmp_path / "hub", monkeypatch)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "fineweb10B"


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def test_downloads_what_is_missing(hub, folder):
    paths = fineweb.download(folder, 2)
    assert [path.name for path in paths] == ["fineweb_val_000000.bin", "fineweb_train_000001.bin",
                                             "fineweb_train_000002.bin"]
    assert names(folder) == sorted(path.name for path in paths)  # and no staging folder
    assert all(sha256(path) == sha256(hub.folder / path.name) for path in paths)
    fineweb.download(folder, 3)
    assert hub.calls == fineweb.file_names(3)  # each once


def test_pinned_dataset():
    assert fineweb.REPO["revision"] == "889765ea1f903759787add96995d81171b632d0c"
    assert fineweb.VAL_SHA256 == "5b95c8e0966f0861685b307b23dc5ae42b228ef74b28cb499784ae021f201640"
    assert fineweb.file_names(103)[-1] == "fineweb_train_000103.bin"


def test_ensure_touches_nothing_when_all_is_there(hub, folder, monkeypatch):
    folder.mkdir()
    for name in fineweb.file_names(2):
        (folder / name).write_bytes((hub.folder / name).read_bytes())
    monkeypatch.setattr(fineweb, "one_builder", None)  # would fail if it were called
    assert fineweb.ensure(folder, 2) == [folder / name for name in fineweb.file_names(2)]
    assert hub.calls == [] and not (folder / ".lock").exists()


@pytest.mark.parametrize("damage, said", [
    ("network", "did not deliver.*ConnectionError: the wire was cut.*Try again, it resumes.*by hand.*"
                "run.sh train_gpt.py --preset local"),
    ("truncated", r"SHA-256 .*expected .*\(2924 bytes\); it was removed"), ("wrong", "SHA-256 .*expected ")])
@pytest.mark.parametrize("name", ["fineweb_val_000000.bin", "fineweb_train_000002.bin"])
def test_damage_leaves_no_shard_and_the_next_try_succeeds(hub, folder, damage, said, name):
    hub.damage[name] = damage
    with pytest.raises(DataError, match=said) as caught:
        fineweb.ensure(folder, 2)
    assert str(folder / name) in str(caught.value)
    assert f"python -m data.fineweb 2 --folder {folder}" in str(caught.value)
    assert not (folder / name).exists() and not (folder / ".download" / name).exists()
    if damage == "network":
        assert (folder / ".download" / f"{name}.incomplete").exists()  # what resuming needs
    fineweb.ensure(folder, 2)
    assert names(folder) == sorted(fineweb.file_names(2))


def test_right_hash_but_not_gpt2_tokens(hub, folder):
    write_shard(hub.folder / "fineweb_train_000001.bin", np.full(10, 50257, np.uint16))
    with pytest.raises(DataError, match="50257 at position 0 is not in a vocabulary of 50257"):
        fineweb.download(folder, 1)
    assert names(folder) == [".download", "fineweb_val_000000.bin"]


@pytest.mark.parametrize("etag", ["0123456789abcdef", None])
def test_no_sha256_from_the_hub(hub, folder, etag):
    hub.etags["fineweb_train_000001.bin"] = etag
    with pytest.raises(DataError, match="fineweb_train_000001.bin: the Hub gave no SHA-256"):
        fineweb.download(folder, 1)
    assert not (folder / "fineweb_train_000001.bin").exists()


def test_metadata_failing_is_named_too(hub, folder, monkeypatch):
    def offline(url):
        raise OSError("offline")
    monkeypatch.setattr(fineweb, "get_hf_file_metadata", offline)
    with pytest.raises(DataError, match="fineweb_train_000001.bin: the Hugging Face Hub did not deliver.*offline"):
        fineweb.download(folder, 1)


def test_damaged_shard_already_there(hub, folder):
    fineweb.download(folder, 1)
    path = folder / "fineweb_train_000001.bin"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match="fineweb_train_000001.bin: truncated.*python -m data.fineweb 2"):
        fineweb.download(folder, 2)


def test_other_data_in_the_folder_is_not_mixed(hub, folder):
    write_shard(folder / "train_000001.bin", np.zeros(10, np.uint16))
    with pytest.raises(DataError, match="another data set .train_000001.bin.*python -m data.fineweb 2 --folder"):
        fineweb.ensure(folder, 2)
    assert hub.calls == []


@pytest.mark.parametrize("count", [0, -1, 104])
def test_shard_numbers(hub, folder, count):
    for call in (fineweb.ensure, fineweb.download):
        with pytest.raises(DataError, match=f"1 to 103, asked for {count}.*python -m data.fineweb 5"):
            call(folder, count)


def test_many_ranks_download_once(hub, folder):
    hub.damage = {name: "slow" for name in fineweb.file_names(2)}
    results = []
    ranks = [threading.Thread(target=lambda: results.append(fineweb.ensure(folder, 2))) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert len(results) == 4 and results[0] == results[3]
    assert hub.calls == fineweb.file_names(2)


def test_command_line(hub, folder, capsys):
    fineweb.main(["1", "--folder", str(folder)])
    assert "1 train shards and the validation shard are in place" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        fineweb.main(["104"])
    assert "error: FineWeb-10B has train shards 1 to 103" in str(caught.value)
    assert fineweb.command("data/fineweb10B", 11) == "python -m data.fineweb 11"  # short for the default folder
