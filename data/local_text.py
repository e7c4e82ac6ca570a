"""The embedded default data: the text of this Python's own standard library, byte by byte, so that a run needs neither
download nor tokenizer. `python -m data.local_text` builds it in a few seconds.

The documents are the library's sources (no tests, no third-party packages, no generated tables), pydoc's reference
topics and the licence: around 10 MB. Token = byte; 256 starts a document. A file is cut into documents of at most
DOCUMENT_BYTES at blank lines or line ends, because training sequences start at documents. About 8 % of the files,
chosen by a hash of the name, are for validation. The text depends on the Python version and on nothing else, so losses
compare between machines of the same version; `source.json` says which.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sys
import sysconfig
from pathlib import Path

import numpy as np

from data.files import atomic_write, one_builder, staging
from data.shards import DataError, document_token, open_shard, sha256, write_shard

FOLDER = "data/local"
VOCAB_SIZE = 257
DOCUMENT_BYTES = 2048
VALIDATION_PERCENT = 8
SHARDS = {"val": "val_000000.bin", "train": "train_000001.bin"}
HINT = "python -m data.local_text"
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__",
                   "encodings", "pydoc_data"}  # the last two: generated tables; topics are taken as text below
SKIPPED_FILES = ("_sysconfigdata", "html/entities.py")  # build settings of this machine; a table


def python_version() -> str:
    """What the text depends on, such as "CPython 3.12.4"."""
    return f"{platform.python_implementation()} {platform.python_version()}"


def library_texts() -> dict[str, bytes]:
    """The texts by name (path in the library, or pydoc_data/topics/NAME), sorted by name, each content once.

    DataError if this Python comes without the sources of its library.
    """
    root = Path(sysconfig.get_path("stdlib"))
    texts = {}
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        if SKIPPED_FOLDERS.isdisjoint(name.parts[:-1]) and not name.as_posix().startswith(SKIPPED_FILES):
            texts[name.as_posix()] = path.read_bytes()
    if not texts:
        raise DataError(f"{root}: no sources (*.py) of the standard library here; use a Python that has them, "
                        f"or your own text: python -m data.tokenize_text SOURCE FOLDER --encoding bytes")
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it apart; source.json counts what was found
        topics = {}
    texts |= {f"pydoc_data/topics/{topic}": text.encode() for topic, text in topics.items()}
    if (root / "LICENSE.txt").is_file():
        texts["LICENSE.txt"] = (root / "LICENSE.txt").read_bytes()
    once = {}
    for name in sorted(texts):
        if texts[name].strip():
            once.setdefault(hashlib.sha256(texts[name]).digest(), name)
    return {name: texts[name] for name in once.values()}


def cut(text: bytes, most: int) -> list[bytes]:
    """`text` in pieces of at most `most` bytes, each cut after the last blank line of its second half, else after its
    last line end, else anywhere. The pieces join to `text`."""
    pieces = []
    while len(text) > most:
        end = text.rfind(b"\n\n", most // 2, most) + 2
        if end < 2:
            end = text.rfind(b"\n", 0, most) + 1 or most
        pieces.append(text[:end])
        text = text[end:]
    return pieces + [text] if text else pieces


def tokens_of(texts: list[bytes]) -> np.ndarray:
    """The texts as one stream, (count,) uint16, the document token before each piece."""
    start = np.array([document_token(VOCAB_SIZE)], np.uint16)
    stream = []
    for text in texts:
        for piece in cut(text, DOCUMENT_BYTES - 1):
            stream += start, np.frombuffer(piece, np.uint8)
    return np.concatenate(stream, dtype=np.uint16, casting="safe")


def _number(salt: str, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{salt} {name}".encode()).digest()[:8])


def split_texts(texts: dict[str, bytes]) -> dict[str, list[str]]:
    """Names for "train" and "val": drawn by a hash of the name, in an order given by another."""
    names = {"train": [], "val": []}
    for name in sorted(texts, key=lambda name: _number("order", name)):
        names["val" if _number("split", name) % 100 < VALIDATION_PERCENT else "train"].append(name)
    return names


def ensure(folder=FOLDER) -> dict:
    """Builds the shards unless they are there, whole, and of this Python version; returns source.json's content.

    Of many ranks one builds, the others wait. DataError if the folder holds shards that this module did not make.
    """
    folder = Path(folder)
    source = _intact(folder)
    if source is None:
        with one_builder(folder):
            source = _intact(folder)  # another rank may have built it meanwhile
            if source is None:
                source = _build(folder)
    return source


def _intact(folder: Path) -> dict | None:
    """source.json, if it is of this Python and describes the shards that are there."""
    try:
        source = json.loads((folder / "source.json").read_bytes())
        if source["python"] == python_version() and source["document_bytes"] == DOCUMENT_BYTES and all(
                sha256(folder / SHARDS[split]) == source[split]["sha256"] for split in SHARDS):
            return source
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # ValueError: not JSON
        pass
    return None


def _build(folder: Path) -> dict:
    shards = sorted(path.name for path in folder.glob("*.bin"))
    if shards and (not (folder / "source.json").is_file() or set(shards) - set(SHARDS.values())):
        raise DataError(f"{folder}: holds shards that are not made from local text ({', '.join(shards)}); "
                        f"keep them apart: python -m data.local_text ANOTHER_FOLDER")
    print(f"{folder}: building shards from the library of {python_version()}", file=sys.stderr, flush=True)
    texts = library_texts()
    source = {"python": python_version(), "document_bytes": DOCUMENT_BYTES}
    with staging(folder) as partial:
        for split, names in split_texts(texts).items():
            tokens = tokens_of([texts[name] for name in names])
            write_shard(partial / SHARDS[split], tokens)
            source[split] = {"files": len(names), "documents": int((tokens == document_token(VOCAB_SIZE)).sum()),
                             "tokens": tokens.size, "sha256": sha256(partial / SHARDS[split])}
        # source.json first: a build killed between these lines does not match it and is built again
        with atomic_write(folder / "source.json") as file:
            file.write(json.dumps(source, indent=2).encode() + b"\n")
        for name in SHARDS.values():
            os.replace(partial / name, folder / name)
    return source


def bigram_loss(train: np.ndarray, val: np.ndarray, vocab_size: int, *, smoothing: float = 0.01) -> float:
    """Cross entropy, nats per token, of a bigram model: counts from the pairs of `train` (count,), the mean over the
    pairs val[i] → val[i + 1] of -log((pair count + smoothing) / (count of the first + smoothing * vocab_size)).

    A trained model must beat it. Smoothing is additive (Lidstone). With millions of bytes it only has to keep pairs
    that never occurred finite, and its size hardly matters: on the local text (CPython 3.11.7) 0.001 gives 2.4509,
    0.01 gives 2.4497 and 1 gives 2.4494. Document tokens count as tokens.
    ValueError for vocabularies above 4096 (the table is dense) and for streams without a pair.
    """
    if vocab_size > 4096:
        raise ValueError(f"bigram_loss keeps a dense table: vocab_size at most 4096, got {vocab_size}")
    if train.size < 2 or val.size < 2:
        raise ValueError(f"bigram_loss needs two tokens of each, got {train.size} train and {val.size} val")

    def pair_counts(tokens):
        codes = tokens[:-1].astype(np.int64) * vocab_size + tokens[1:]
        return np.bincount(codes, minlength=vocab_size**2).reshape(vocab_size, vocab_size)

    counts = pair_counts(train) + smoothing
    negative_log = np.log(counts.sum(1, keepdims=True)) - np.log(counts)
    return float((pair_counts(val) * negative_log).sum() / (val.size - 1))


def main(arguments=None) -> None:
    """The command line; exits with the message of a DataError."""
    parser = argparse.ArgumentParser(prog="python -m data.local_text", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", metavar="FOLDER", nargs="?", default=FOLDER, help="default: %(default)s")
    folder = Path(parser.parse_args(arguments).folder)
    try:
        source = ensure(folder)
        train, val = (open_shard(folder / SHARDS[split], VOCAB_SIZE, hint=HINT) for split in ("train", "val"))
    except DataError as error:
        sys.exit(f"error: {error}")
    for split in SHARDS:
        print(f"{folder / SHARDS[split]}: {source[split]['tokens']:,} tokens in {source[split]['documents']:,} "
              f"documents from {source[split]['files']:,} files of {source['python']}")
    print(f"a bigram model reaches a validation loss of {bigram_loss(train, val, VOCAB_SIZE):.4f} nats per byte")


if __name__ == "__main__":
    main()
