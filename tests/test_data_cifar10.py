"""data/cifar10.py: the reader against records written by hand, the download against archives made here."""

import hashlib
import io
import tarfile

import numpy as np
import pytest

from data import cifar10
from data.shards import DataError
from records.tracks import CIFAR10, TRACKS

COUNT = 7  # records in a file of the data set made here


def record(label: int, pixels: np.ndarray) -> bytes:
    """pixels: (32, 32, 3). Label, then all of red, all of green, all of blue, line by line."""
    return bytes([label, *(int(pixels[y, x, c]) for c in range(3) for y in range(32) for x in range(32))])


@pytest.fixture(scope="module")
def made():
    """(pixels, labels, file name -> content) of six small files."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6 * COUNT, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(0, 10, 6 * COUNT)
    files = {name: b"".join(record(labels[k], pixels[k]) for k in range(i * COUNT, (i + 1) * COUNT))
             for i, name in enumerate(cifar10.SHA256)}
    return pixels, labels, files


@pytest.fixture(autouse=True)
def small(made, monkeypatch):
    """data.cifar10 with files of COUNT records and their hashes."""
    monkeypatch.setattr(cifar10, "RECORDS", COUNT)
    monkeypatch.setattr(cifar10, "SHA256", {name: hashlib.sha256(file).hexdigest() for name, file in made[2].items()})


@pytest.fixture
def folder(made, tmp_path):
    for name, content in made[2].items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def archive(path, files) -> str:
    """An archive like the official one; its URL."""
    with tarfile.open(path, "w:gz") as opened:
        for name, content in {"batches.meta.txt": b"airplane\n", **files}.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            opened.addfile(member, io.BytesIO(content))
    return path.as_uri()


def test_the_hashes_are_those_of_the_tracks(monkeypatch):
    monkeypatch.undo()
    assert cifar10.SHA256 == CIFAR10 == TRACKS["cifar10-94"].data == TRACKS["cifar10-96"].data
    assert cifar10.RECORDS * cifar10.RECORD == 30_730_000  # bytes of an official file


def test_pixels_and_labels_are_where_they_were_written(made, folder):
    pixels, labels, files = made
    train, test = cifar10.load(folder)
    assert np.array_equal(train.pixels, pixels[:-COUNT]) and np.array_equal(test.pixels, pixels[-COUNT:])
    assert np.array_equal(train.labels, labels[:-COUNT]) and np.array_equal(test.labels, labels[-COUNT:])
    assert train.labels.dtype == np.int64 and train.pixels.flags.c_contiguous
    assert train.sha256 | test.sha256 == {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    assert set(test.sha256) == {"test_batch.bin"}


def test_a_missing_file_is_named_with_the_command_that_fetches_it(folder):
    (folder / "data_batch_3.bin").unlink()
    with pytest.raises(DataError, match="data_batch_3.bin: missing; .* python -m data.cifar10 --folder"):
        cifar10.load(folder)


def test_a_truncated_file_is_named_with_both_sizes(folder):
    path = folder / "test_batch.bin"
    path.write_bytes(path.read_bytes()[:-1])
    size = COUNT * 3073
    with pytest.raises(DataError, match=f"test_batch.bin: {size - 1} bytes, expected {size}; delete it and run"):
        cifar10.load(folder)


def test_a_changed_byte_is_found(folder):
    path = folder / "data_batch_5.bin"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="data_batch_5.bin: not the official file: its SHA-256 is [0-9a-f]{64}"):
        cifar10.load(folder)


def test_a_folder_in_the_place_of_a_file_is_named(folder):
    (folder / "test_batch.bin").unlink()
    (folder / "test_batch.bin").mkdir()
    with pytest.raises(DataError, match="test_batch.bin: cannot be read"):
        cifar10.load(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Download


def test_the_archive_is_fetched_once_and_read(made, tmp_path, capsys):
    url = archive(tmp_path / "cifar.tar.gz", made[2])
    cifar10.ensure(tmp_path / "new" / "cifar10", url)
    assert url in capsys.readouterr().err
    assert np.array_equal(cifar10.load(tmp_path / "new" / "cifar10")[0].pixels, made[0][:-COUNT])
    found = {path.name for path in (tmp_path / "new" / "cifar10").iterdir()}
    assert found - {".lock"} == set(cifar10.SHA256)  # nothing else is unpacked
    cifar10.ensure(tmp_path / "new" / "cifar10", "file:///nowhere")  # all there: not asked for
    assert capsys.readouterr().err == ""


def test_only_what_is_missing_is_written(made, folder, tmp_path):
    url = archive(tmp_path / "cifar.tar.gz", made[2])
    (folder / "data_batch_1.bin").unlink()
    before = (folder / "data_batch_2.bin").stat().st_mtime_ns
    cifar10.ensure(folder, url)
    assert cifar10.load(folder) and (folder / "data_batch_2.bin").stat().st_mtime_ns == before


def without_a_file(made, path):
    return archive(path, {name: content for name, content in made[2].items() if name != "test_batch.bin"})


def with_another_file(made, path):
    return archive(path, made[2] | {"data_batch_2.bin": made[2]["data_batch_1.bin"]})


def with_a_longer_file(made, path):
    return archive(path, made[2] | {"data_batch_2.bin": made[2]["data_batch_2.bin"] + b"more"})


def cut_short(made, path):
    archive(path, made[2])
    path.write_bytes(path.read_bytes()[:-20_000])
    return path.as_uri()


def no_archive(made, path):
    path.write_bytes(b"<html>503 Service Unavailable</html>")
    return path.as_uri()


def nowhere(made, path):
    return "http://127.0.0.1:9/cifar-10-binary.tar.gz"


def no_url(made, path):
    return "cifar-10-binary.tar.gz"


@pytest.mark.parametrize("source, said", [
    (without_a_file, "not the archive, or only a part of it .*test_batch.bin"),
    (with_another_file, "data_batch_2.bin from .* has SHA-256 [0-9a-f]{64}, expected"),
    (with_a_longer_file, "data_batch_2.bin from .* has SHA-256"),
    (cut_short, "not the archive, or only a part of it"), (no_archive, "not the archive"),
    (nowhere, "did not deliver .*refused"), (no_url, "did not deliver .*unknown url type")],
    ids=lambda value: getattr(value, "__name__", None))
def test_what_did_not_come_is_said_with_the_ways_out_and_leaves_nothing(made, tmp_path, source, said):
    with pytest.raises(DataError, match=said) as caught:
        cifar10.ensure(tmp_path / "cifar10", source(made, tmp_path / "cifar.tar.gz"))
    assert "Try again: python -m data.cifar10" in str(caught.value) and "--preset local" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {path.name for path in (tmp_path / "cifar10").iterdir()} <= {".lock"}


def test_a_file_in_the_place_of_the_folder_is_named(made, tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(DataError, match="taken: cannot be written"):
        cifar10.ensure(tmp_path / "taken", archive(tmp_path / "cifar.tar.gz", made[2]))


def test_the_command_line_fetches_and_checks(made, tmp_path, capsys):
    url = archive(tmp_path / "cifar.tar.gz", made[2])
    cifar10.main(["--folder", str(tmp_path / "cifar10"), "--url", url])
    assert "six files of CIFAR-10 are in place" in capsys.readouterr().out
    (tmp_path / "cifar10" / "data_batch_1.bin").write_bytes(b"")
    with pytest.raises(SystemExit, match="error: .*data_batch_1.bin: 0 bytes"):
        cifar10.main(["--folder", str(tmp_path / "cifar10"), "--url", url])


# ---------------------------------------------------------------------------------------------------------------------
# Images out of nothing


def test_synthetic_images_are_the_same_for_the_same_seed_and_named_as_what_they_are():
    train, test = cifar10.synthetic(60, 40)
    again, _ = cifar10.synthetic(60, 40)
    other, _ = cifar10.synthetic(60, 40, seed=1)
    assert np.array_equal(train.pixels, again.pixels) and train.sha256 == again.sha256
    assert not np.array_equal(train.pixels, other.pixels) and train.sha256 != other.sha256
    assert train.pixels.shape == (60, 32, 32, 3) and train.pixels.dtype == np.uint8
    assert np.bincount(train.labels).tolist() == [6] * 10 and np.bincount(test.labels).tolist() == [4] * 10
    assert list(train.sha256) == ["synthetic_train_60"] and list(test.sha256) == ["synthetic_test_40"]


def test_the_kinds_can_be_told_apart_and_survive_a_flip():
    """The wave number of largest power, in images with contrast: it grows with the five sizes of either pattern."""
    images, _ = cifar10.synthetic(4000, 10)
    grey = images.pixels.astype(float).mean(-1)
    for pixels in (grey, grey[:, :, ::-1]):
        power = np.abs(np.fft.fft(pixels - pixels.mean((1, 2), keepdims=True), axis=2))[:, :, :12].sum(1) ** 2
        centre = (power * np.arange(12)).sum(1) / power.sum(1)
        for kinds in (range(5), range(5, 10)):
            mean = [centre[(images.labels == kind) & (grey.std((1, 2)) > 20)].mean() for kind in kinds]
            assert all(finer > coarser + 0.2 for coarser, finer in zip(mean, mean[1:])), mean
