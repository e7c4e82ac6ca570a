"""Turns any text into token shards: `python -m data.tokenize_text SOURCE FOLDER`.

SOURCE is a file or a folder (searched recursively, hidden names skipped, in order of their paths). A .jsonl or .ndjson
file holds one document a line, in the field --field; every other file is one document if it decodes as UTF-8, and is
skipped and counted if not. .jsonl, .ndjson and .txt may be gzipped (.gz).

The first documents, until they hold more than --val-tokens tokens, become val_000000.bin; the others train_000001.bin
and so on. A document lies whole within a shard unless it is longer than one. The output does not depend on --workers.
Shards get their names together at the end, the validation shard last: a killed conversion leaves no usable set.
Memory: one shard, and the look-ahead of about 4 MB of text a worker (or one document, if that is longer).
"""
from __future__ import annotations

import argparse
import functools
import gzip
import hashlib
import json
import multiprocessing
import os
import sys
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.files import one_builder, staging
from data.shards import DataError, document_token, write_shard

VOCAB_SIZES = {"gpt2": 50257, "bytes": 257}
RANKS_URL = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"  # what tiktoken downloads
CHUNK = 1 << 20  # source bytes given to a worker at a time


@dataclass
class Summary:
    """What a conversion did; `skipped` names the files that are not UTF-8 text."""

    documents: int = 0
    empty_documents: int = 0  # left out
    val_tokens: int = 0
    train_tokens: int = 0
    train_shards: int = 0
    skipped: list[str] = field(default_factory=list)


# ---------------------------------------------------------------------------------------------------------------------
# Text → tokens


@functools.cache
def encoder(encoding: str) -> Callable[[str], np.ndarray]:
    """A function from a text to its tokens, (count,) uint16, without the document token; loaded once a process.

    "gpt2" is tiktoken's r50k_base (`encode_ordinary`: special tokens in the text are plain text), "bytes" is UTF-8.
    DataError if tiktoken or its rank file is missing.
    """
    if encoding == "bytes":  # lone surrogates, which JSON can carry, become U+FFFD, as in tiktoken
        return lambda text: np.frombuffer(
            text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode(), np.uint8).astype(np.uint16)
    try:
        import tiktoken
        ranks = tiktoken.get_encoding("r50k_base")
    except ImportError as error:
        raise DataError("the gpt2 encoding needs tiktoken; run: pip install tiktoken") from error
    except Exception as error:  # requests' exceptions, or a damaged file
        raise DataError(
            f"tiktoken could not load the gpt2 encoding ({type(error).__name__}: {error}). Without network: fetch "
            f"{RANKS_URL} elsewhere, put it into a folder under the name "
            f"{hashlib.sha1(RANKS_URL.encode()).hexdigest()}, and set TIKTOKEN_CACHE_DIR to that folder; "
            f"or use --encoding bytes") from error
    return lambda text: np.array(ranks.encode_ordinary(text), np.uint16)


def encode_documents(encoding: str, texts: list[str]) -> list[np.ndarray]:
    """The tokens of each text, the document token in front: (1 + count,) uint16 each. This runs in the workers."""
    start = np.array([document_token(VOCAB_SIZES[encoding])], np.uint16)
    return [np.concatenate([start, encoder(encoding)(text)]) for text in texts]


def encode_in_order(chunks, encoding: str, workers: int) -> Iterator[tuple[list[np.ndarray], int]]:
    """Maps encode_documents over (texts, source bytes), keeping order, at most 4 chunks a worker ahead."""
    if workers == 1:
        for texts, size in chunks:
            yield encode_documents(encoding, texts), size
        return
    # forkserver: the imports are paid once, and no thread of this process is copied into the workers
    forkserver = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forkserver else "spawn")
    if forkserver:
        context.set_forkserver_preload(["data.shards"])
    pool = ProcessPoolExecutor(workers, context, initializer=_end_with_parent)
    ahead = deque()
    try:
        for texts, size in chunks:
            ahead.append((pool.submit(encode_documents, encoding, texts), size))
            if len(ahead) == 4 * workers:
                future, size = ahead.popleft()
                yield future.result(), size
        for future, size in ahead:
            yield future.result(), size
    except BrokenProcessPool as error:
        raise DataError(f"a tokenizing process was killed, by lack of memory perhaps: use --workers "
                        f"{max(1, workers // 2)} (documents are encoded whole, so huge files need memory)") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Workers of a killed conversion would wait for ever: each watches its parent."""
    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# ---------------------------------------------------------------------------------------------------------------------
# Files → documents


def source_files(source) -> list[Path]:
    """The files of SOURCE in path order; DataError if there is none."""
    source = Path(source)
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise DataError(f"{source}: no such file or folder; run: python -m data.tokenize_text SOURCE FOLDER with the "
                        f"text to convert as SOURCE")
    files = [path for path in source.rglob("*")
             if path.is_file() and not any(part.startswith(".") for part in path.relative_to(source).parts)]
    if not files:
        raise DataError(f"{source}: no files in this folder; give the text to convert as SOURCE")
    return sorted(files)


def documents(path: Path, text_field: str, skipped: list[str]) -> Iterator[tuple[str, int]]:
    """(text, bytes of the file on disk read since the last one) of every document in `path`.

    Appends to `skipped` if the file is not UTF-8. DataError names file and line of what is not JSON as expected.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    zipped = suffixes[-1:] == [".gz"] and suffixes[0] in (".jsonl", ".ndjson", ".txt")
    kind = suffixes[0] if zipped else "".join(suffixes[-1:])
    with open(path, "rb") as raw:
        lines = gzip.GzipFile(fileobj=raw) if zipped else raw
        before = 0
        try:
            if kind in (".jsonl", ".ndjson"):
                for number, line in enumerate(lines, 1):
                    now = raw.tell()
                    if line.strip():
                        yield _json_text(line, text_field, f"{path}:{number}"), now - before
                        before = now
            else:
                text = lines.read().decode("utf-8-sig")
                yield text, raw.tell()
        except UnicodeDecodeError:
            skipped.append(str(path))
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{path}: damaged gzip file ({error}); fetch it again, or move it out of SOURCE") from error


def _json_text(line: bytes, text_field: str, where: str) -> str:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:  # also of the UTF-8
        raise DataError(f"{where}: not a line of JSON ({error}); mend or delete the line, or rename the file to .txt "
                        f"if it is plain text") from error
    if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
        found = f"has the fields {', '.join(sorted(record))}" if isinstance(record, dict) else "is not an object"
        raise DataError(f"{where}: expected a JSON object with a text in the field {text_field!r}, this one {found}; "
                        f"name the field with --field, or mend or delete the line")
    return record[text_field]


def chunks_of(files: list[Path], text_field: str, summary: Summary) -> Iterator[tuple[list[str], int]]:
    """Groups of documents worth about CHUNK bytes, with the bytes of source behind them; counts in `summary`."""
    texts, size, characters = [], 0, 0
    for path in files:
        for text, read in documents(path, text_field, summary.skipped):
            size += read
            if not text.strip():
                summary.empty_documents += 1
                continue
            summary.documents += 1
            texts.append(text)
            characters += len(text)
            if characters >= CHUNK:
                yield texts, size
                texts, size, characters = [], 0, 0
    if texts:
        yield texts, size


# ---------------------------------------------------------------------------------------------------------------------
# Tokens → shards


class ShardWriter:
    """Packs documents into val_000000.bin and then train_000001.bin, …, in `folder`."""

    def __init__(self, folder: Path, val_tokens: int, shard_tokens: int, document: int, summary: Summary):
        self.folder, self.val_tokens, self.document, self.summary = folder, val_tokens, document, summary
        self.val: list[np.ndarray] | None = []  # None once written
        self.shard, self.filled = np.empty(shard_tokens, np.uint16), 0

    def add(self, tokens: np.ndarray) -> None:
        """Takes one document, its document token first. One longer than a shard is cut into documents."""
        if self.val is not None:
            self.val.append(tokens)
            self.summary.val_tokens += tokens.size
            if self.summary.val_tokens > self.val_tokens:  # one more than asked for: the target of the last
                write_shard(self.folder / "val_000000.bin", np.concatenate(self.val))
                self.val = None
            return
        if tokens.size > self.shard.size - self.filled:
            self.flush()
        while tokens.size > self.shard.size:
            self.shard[:] = tokens[:self.shard.size]
            self.filled = self.shard.size
            tokens = np.concatenate([np.array([self.document], np.uint16), tokens[self.shard.size:]])
            self.flush()
        self.shard[self.filled:self.filled + tokens.size] = tokens
        self.filled += tokens.size

    def flush(self) -> None:
        """Writes the train shard begun, if any."""
        if self.filled:
            self.summary.train_shards += 1
            self.summary.train_tokens += self.filled
            write_shard(self.folder / f"train_{self.summary.train_shards:06d}.bin", self.shard[:self.filled])
            self.filled = 0


def convert(source, folder, *, shard_tokens: int = 100_000_000, val_tokens: int = 1_048_576, text_field: str = "text",
            encoding: str = "gpt2", workers: int = 1, overwrite: bool = False) -> Summary:
    """Converts SOURCE into the shards of `folder`, as the module's docstring says; shows progress in source bytes.

    DataError, with nothing changed in `folder`: if it holds shards already (unless `overwrite`), for unreadable JSON or
    gzip, if there is too little text for both splits, if the encoding can't be loaded.
    """
    if encoding not in VOCAB_SIZES:
        raise ValueError(f"encoding is one of {', '.join(VOCAB_SIZES)}, got {encoding!r}")
    if shard_tokens < 2 or val_tokens < 1 or workers < 1:
        raise DataError(f"--shard-tokens is at least 2, --val-tokens and --workers at least 1; "
                        f"got {shard_tokens}, {val_tokens} and {workers}")
    folder, summary = Path(folder), Summary()
    files = source_files(source)
    encoder(encoding)  # a missing rank file shows here, not in a worker
    with one_builder(folder):
        old = sorted(folder.glob("*.bin"))
        if old and not overwrite:
            raise DataError(f"{folder}: holds shards already ({old[0].name}); choose another folder, or replace them: "
                            f"python -m data.tokenize_text {source} {folder} --overwrite")
        with staging(folder) as partial:
            writer = ShardWriter(partial, val_tokens, shard_tokens, document_token(VOCAB_SIZES[encoding]), summary)
            with tqdm(total=sum(path.stat().st_size for path in files), unit="B", unit_scale=True,
                      desc=f"tokenizing {source}", disable=None) as progress:
                for tokens, size in encode_in_order(chunks_of(files, text_field, summary), encoding, workers):
                    for document in tokens:
                        writer.add(document)
                    progress.update(size)
            writer.flush()
            if not summary.train_tokens:
                raise DataError(f"{source}: {summary.documents} documents with {summary.val_tokens:,} tokens, and "
                                f"validation takes the first {val_tokens:,}: nothing is left to train on; give more "
                                f"text, or a smaller --val-tokens" + _skipped_note(summary))
            for path in sorted(old, key=lambda path: "val_" not in path.name):  # validation goes first, comes last
                path.unlink()
            for path in sorted(partial.glob("*.bin")):
                os.replace(path, folder / path.name)
    return summary


def _skipped_note(summary: Summary) -> str:
    if not summary.skipped:
        return ""
    some = ", ".join(summary.skipped[:5]) + (", …" if len(summary.skipped) > 5 else "")
    return f"; {len(summary.skipped)} files skipped, not UTF-8 text: {some}"


def main(arguments=None) -> None:
    """The command line; exits with the message of a DataError."""
    parser = argparse.ArgumentParser(prog="python -m data.tokenize_text", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, help="tokens a shard (default: %(default)s)")
    parser.add_argument("--val-tokens", type=int, default=1_048_576, help="for validation (default: %(default)s)")
    parser.add_argument("--field", default="text", help="of JSON lines (default: %(default)s)")
    parser.add_argument("--encoding", choices=VOCAB_SIZES, default="gpt2", help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: all cores)")
    parser.add_argument("--overwrite", action="store_true", help="replace the shards in FOLDER")
    options = vars(parser.parse_args(arguments))
    try:
        summary = convert(text_field=options.pop("field"), **options)
    except DataError as error:
        sys.exit(f"error: {error}")
    print(f"{options['folder']}: {summary.documents:,} documents; {summary.val_tokens:,} validation tokens, "
          f"{summary.train_tokens:,} training tokens in {summary.train_shards} shards"
          + (f"; {summary.empty_documents:,} empty documents left out" if summary.empty_documents else "")
          + _skipped_note(summary))


if __name__ == "__main__":
    main()
