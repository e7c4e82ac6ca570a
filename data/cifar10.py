"""CIFAR-10 (Krizhevsky 2009) from the official binary archive: `python -m data.cifar10` fetches it, 170 MB.

Six files of 10,000 records; a record is a label byte and three planes of 32×32 bytes, red, green, blue. Every file is
held against the SHA-256 of the official one whenever it is read, so the folder needs no other cache: reading and
checking all six takes about a second. Nothing of the archive but these six files is unpacked, and nothing is a pickle.

`synthetic` makes labelled images out of nothing, for machines without network: ten kinds of pattern, no CIFAR-10.
"""
from __future__ import annotations

import argparse
import hashlib
import sys
import tarfile
import tempfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.files import atomic_write, one_builder
from data.shards import DataError
from records.tracks import CIFAR10 as SHA256  # of the files in that archive

FOLDER = "data/cifar10"
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
SIZE, CLASSES = 32, 10
RECORD, RECORDS = 1 + 3 * SIZE * SIZE, 10_000  # bytes of a record, records in a file
TIMEOUT = 30  # seconds without a byte


@dataclass(frozen=True)
class Images:
    """pixels: (count, 32, 32, 3) uint8, red, green, blue.  labels: (count,) int64.
    sha256: dict of file, or of what was made -> SHA-256 in hexadecimal."""
    pixels: np.ndarray
    labels: np.ndarray
    sha256: dict[str, str]


def command(folder) -> str:
    """The command line that fetches the files: what error messages tell the user to run."""
    return "python -m data.cifar10" + ("" if str(folder) == FOLDER else f" --folder {folder}")


def load(folder=FOLDER) -> tuple[Images, Images]:
    """The 50,000 training and the 10,000 test images in `folder`; DataError names a file that is missing or not the
    official one."""
    return tuple(_read(Path(folder), [name for name in SHA256 if name.startswith(kind)]) for kind in ("data", "test"))


def _read(folder: Path, names: list[str]) -> Images:
    pixels = np.empty((len(names) * RECORDS, SIZE, SIZE, 3), dtype=np.uint8)
    labels = np.empty(len(pixels), dtype=np.int64)
    for i, name in enumerate(names):
        records = np.frombuffer(_checked(folder, name), dtype=np.uint8).reshape(RECORDS, RECORD)
        part = slice(i * RECORDS, (i + 1) * RECORDS)
        labels[part] = records[:, 0]
        pixels[part] = records[:, 1:].reshape(RECORDS, 3, SIZE, SIZE).transpose(0, 2, 3, 1)
    return Images(pixels, labels, {name: SHA256[name] for name in names})


def _checked(folder: Path, name: str) -> bytes:
    path, again = folder / name, command(folder)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: missing; fetch CIFAR-10 with: {again}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); fetch CIFAR-10 with: {again}") from error
    if len(content) != RECORDS * RECORD:
        raise DataError(f"{path}: {len(content)} bytes, expected {RECORDS * RECORD}; delete it and run: {again}")
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256[name]:
        raise DataError(f"{path}: not the official file: its SHA-256 is {found}, expected {SHA256[name]}; "
                        f"delete it and run: {again}")
    return content


# ---------------------------------------------------------------------------------------------------------------------
# Download


def ensure(folder=FOLDER, url: str = URL) -> None:
    """Fetch the files that `folder` does not have. With all six there nothing is touched: no network, no lock."""
    folder = Path(folder)
    if all((folder / name).is_file() for name in SHA256):
        return
    try:
        with one_builder(folder):
            missing = [name for name in SHA256 if not (folder / name).is_file()]
            if missing:  # another process may just have fetched them
                _fetch(folder, missing, url)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror or error})") from error


def _fetch(folder: Path, missing: list[str], url: str) -> None:
    print(f"{folder}: downloading {url} (170 MB)", file=sys.stderr, flush=True)
    ways_out = (f"Try again: {command(folder)}; or copy the six .bin files of cifar-10-binary.tar.gz into {folder} by "
                "hand; or train on synthetic images: ./run.sh train_cifar.py --preset local")
    with tempfile.TemporaryFile(dir=folder) as archive:
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
                while piece := response.read(1 << 20):
                    archive.write(piece)
        except (OSError, ValueError) as error:  # URLError and time-outs are OSErrors; a bad URL is a ValueError
            raise DataError(f"{folder}: {url} did not deliver ({type(error).__name__}: {error}). {ways_out}") from error
        archive.seek(0)
        try:
            with tarfile.open(fileobj=archive, mode="r:gz") as opened:
                found = {name: _member(opened, name) for name in missing}
        except (tarfile.TarError, EOFError, OSError, KeyError) as error:
            raise DataError(f"{folder}: what {url} delivered is not the archive, or only a part of it "
                            f"({type(error).__name__}: {error}). {ways_out}") from error
    for name, content in found.items():
        digest = hashlib.sha256(content).hexdigest()
        if digest != SHA256[name]:
            raise DataError(f"{folder}: {name} from {url} has SHA-256 {digest}, expected {SHA256[name]}. {ways_out}")
    for name, content in found.items():
        with atomic_write(folder / name) as file:
            file.write(content)


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(f"cifar-10-batches-bin/{name}")
    if file is None:
        raise KeyError(f"{name} is not a file in it")
    return file.read(RECORDS * RECORD + 1)  # a longer one fails its hash


# ---------------------------------------------------------------------------------------------------------------------
# Images out of nothing


def synthetic(train: int, test: int, seed: int = 0) -> tuple[Images, Images]:
    """`train` and `test` images of ten kinds: rings and plaids, each of five sizes, in random colours and noise.

    A kind survives flips, shifts and cut-outs. The same seed gives the same images, another one others of these kinds.
    """
    rng = np.random.default_rng(seed)
    return tuple(_patterns(rng, count, kind) for count, kind in ((train, "train"), (test, "test")))


def _patterns(rng: np.random.Generator, count: int, kind: str) -> Images:
    labels = rng.permutation(np.arange(count) % CLASSES)
    waves = np.array([1.5, 2.25, 3.25, 4.5, 6.0])[labels % 5]  # in 32 pixels
    place, phase = rng.uniform(4, 28, (count, 2)), rng.uniform(0, 2 * np.pi, count)
    axis = np.arange(SIZE, dtype=np.float64)
    down, right = (axis[None, :] - place[:, i, None] for i in (0, 1))
    angle = 2 * np.pi * waves[:, None] / SIZE
    rings = np.cos(angle[:, :, None] * np.hypot(down[:, :, None], right[:, None, :]) + phase[:, None, None])
    plaids = np.cos(angle * down)[:, :, None] * np.cos(angle * right)[:, None, :]
    pattern = np.where((labels < 5)[:, None, None], rings, plaids)[..., None]
    colours = rng.uniform(40, 215, (count, 2, 1, 1, 3))
    clean = colours[:, 0] + (colours[:, 1] - colours[:, 0]) * (0.5 + 0.5 * pattern)
    noisy = clean + 20 * rng.standard_normal((count, SIZE, SIZE, 3))
    pixels = np.clip(np.round(noisy), 0, 255).astype(np.uint8)
    digest = hashlib.sha256(pixels.tobytes() + labels.astype("<i8").tobytes()).hexdigest()
    return Images(pixels, labels.astype(np.int64), {f"synthetic_{kind}_{count}": digest})


def main(arguments=None) -> None:
    """The command line; exits with the message of a DataError."""
    parser = argparse.ArgumentParser(prog="python -m data.cifar10", description=__doc__.split("\n\n")[0])
    parser.add_argument("--folder", default=FOLDER, help="where to (default: %(default)s)")
    parser.add_argument("--url", default=URL, help="of the archive, or of a mirror (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        ensure(options.folder, options.url)
        load(options.folder)
    except DataError as error:
        sys.exit(f"error: {error}")
    print(f"{options.folder}: the six files of CIFAR-10 are in place")


if __name__ == "__main__":
    main()
