"""Token shards: the file format, the training stream and the validation set.

A shard is 256 little-endian int32 (20240520, 1, token count, then zeros) followed by that many little-endian uint16
tokens, as in llm.c and modded-nanogpt. **The last id of the vocabulary starts every document** (GPT-2: 50256 of 50257;
bytes: 256 of 257).

The training stream is one list of sequences, numbered 0, 1, 2, …, that depends on the seed and on the files alone. A
batch is a range of numbers, so what a step sees does not depend on how many ranks share it, on gradient accumulation,
or on whether the run was resumed. Every sequence starts at a document (the idea of modded-nanogpt's aligned batches).
"""
from __future__ import annotations

import hashlib
import queue
import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.files import atomic_write

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
HEADER_BYTES = 4 * HEADER_INTS
TOKEN = np.dtype("<u2")
SCAN = 1 << 22  # tokens looked at in one go when a shard is checked or indexed: 8 MB stays in cache
HINT = "python -m data.fineweb 5"


class DataError(ValueError):
    """Something about the data that the user can mend; the message says which file or value, and how."""


def document_token(vocab_size: int) -> int:
    """The id that stands before every document: the last one of the vocabulary."""
    return vocab_size - 1


# ---------------------------------------------------------------------------------------------------------------------
# Files


def write_shard(path, tokens: np.ndarray) -> None:
    """Writes `tokens`, (count,) uint16, as the shard `path`, atomically (see data.files.atomic_write).

    TypeError if the array is not one-dimensional uint16, ValueError if it is empty or longer than int32 can count.
    """
    if not isinstance(tokens, np.ndarray) or tokens.dtype != np.uint16 or tokens.ndim != 1:
        found = f"{tokens.dtype} {tokens.shape}" if isinstance(tokens, np.ndarray) else type(tokens).__name__
        raise TypeError(f"{path}: a shard is a uint16 array of shape (count,), got {found}")
    if not 0 < tokens.size < 2**31:
        raise ValueError(f"{path}: a shard holds 1 to 2147483647 tokens, got {tokens.size}")
    header = np.zeros(HEADER_INTS, "<i4")
    header[:3] = MAGIC, VERSION, tokens.size
    with atomic_write(path) as file:
        file.write(header.tobytes())
        np.ascontiguousarray(tokens, TOKEN).tofile(file)


def open_shard(path, vocab_size: int, *, hint: str = HINT) -> np.ndarray:
    """Opens a shard read-only: a np.memmap, (count,) uint16, after checking header, size and every token id.

    The check reads the file once (0.1 s for 100M tokens in the page cache). DataError names the file, what is wrong
    with it, and `hint`, the command that makes it anew.
    """
    path = Path(path)
    again = f"delete it and run: {hint}"
    if not path.is_file():
        raise DataError(f"{path}: no such shard; run: {hint}")
    size = path.stat().st_size
    if size < HEADER_BYTES:
        raise DataError(f"{path}: {size} bytes, but the header alone has {HEADER_BYTES}: truncated; {again}")
    magic, version, count = (int(x) for x in np.fromfile(path, "<i4", 3))
    if magic != MAGIC:
        raise DataError(f"{path}: not a token shard: its first int32 is {magic}, expected {MAGIC}; {again}")
    if version != VERSION:
        raise DataError(f"{path}: shard version {version}, this code reads version {VERSION}; {again}")
    if count < 1:
        raise DataError(f"{path}: the header says {count} tokens, expected at least 1; {again}")
    expected = HEADER_BYTES + TOKEN.itemsize * count
    if size != expected:
        what = "truncated" if size < expected else "bytes left over"
        raise DataError(f"{path}: {what}: {size} bytes, but {count} tokens take {expected}; {again}")
    tokens = np.memmap(path, TOKEN, "r", HEADER_BYTES, (count,))
    for at in range(0, count, SCAN):
        part = tokens[at:at + SCAN]
        if part.max() >= vocab_size:
            position = at + int(np.argmax(part >= vocab_size))
            raise DataError(f"{path}: token id {tokens[position]} at position {position} is not in a vocabulary of "
                            f"{vocab_size}; made with another tokenizer? If not, {again}")
    return tokens


def shard_paths(folder, split: str, *, hint: str = HINT) -> list[Path]:
    """The shards of `split` ("train" or "val") in name order: files *train_*.bin or *val_*.bin. DataError if none."""
    if split not in ("train", "val"):
        raise ValueError(f"split is 'train' or 'val', got {split!r}")
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of token shards; run: {hint}")
    paths = sorted(folder.glob(f"*{split}_*.bin"))
    if not paths:
        raise DataError(f"{folder}: no {split} shard (*{split}_*.bin) in it; run: {hint}")
    return paths


def sha256(path) -> str:
    """The file's SHA-256 in hexadecimal, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Batches


@dataclass(frozen=True, eq=False)
class Batch:
    """Some sequences with their next tokens and the document boundaries that attention must not cross."""

    tokens: Tensor      # (sequences, length) int64
    targets: Tensor     # (sequences, length) int64: the token after each
    cu_seqlens: Tensor  # (documents + 1,) int32: boundaries in the flattened stream, 0 … sequences·length, increasing

    def to(self, device) -> Batch:
        """The batch on `device`; from pinned memory the copies overlap with computation."""
        return Batch(*(x.to(device, non_blocking=True) for x in (self.tokens, self.targets, self.cu_seqlens)))

    def pin(self) -> Batch:
        """The batch in page-locked host memory (needs an accelerator)."""
        return Batch(*(x.pin_memory() for x in (self.tokens, self.targets, self.cu_seqlens)))


def document_boundaries(tokens: np.ndarray, document: int, max_document: int) -> np.ndarray:
    """cu_seqlens (pieces + 1,) int32 of `tokens` (sequences, length): 0, …, tokens.size, strictly increasing.

    A piece starts at every sequence, at every `document` token, and every `max_document` tokens within a document.
    """
    starts = tokens == document
    starts[:, 0] = True
    starts = np.flatnonzero(starts)
    lengths = np.diff(starts, append=tokens.size)
    pieces = -(-lengths // max_document)
    before = np.cumsum(pieces) - pieces  # number of pieces in earlier documents
    inside = np.arange(pieces.sum()) - np.repeat(before, pieces)  # 0, 1, … within each document
    return np.append(np.repeat(starts, pieces) + max_document * inside, tokens.size).astype(np.int32)


def make_batch(rows: np.ndarray, document: int, max_document: int) -> Batch:
    """Batch from rows (sequences, length + 1) uint16, each sequence followed by the token after it."""
    tokens = rows[:, :-1]
    boundaries = document_boundaries(tokens, document, max_document)
    return Batch(torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(rows[:, 1:].astype(np.int64)),
                 torch.from_numpy(boundaries))


def check_settings(sequence_length: int, max_document: int, vocab_size: int, rank: int, world_size: int) -> None:
    """ValueError for what can't be: non-positive lengths, a vocabulary that uint16 can't hold, a rank out of range."""
    if sequence_length < 1 or max_document < 1:
        raise ValueError(f"sequence_length and max_document are at least 1, got {sequence_length} and {max_document}")
    if not 2 <= vocab_size <= 2**16:
        raise ValueError(f"vocab_size must be 2 to 65536 (tokens are uint16), got {vocab_size}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be 0 to world_size - 1, got rank {rank} of {world_size}")


# ---------------------------------------------------------------------------------------------------------------------
# Training


def sequence_starts(tokens: np.ndarray, document: int, length: int) -> np.ndarray:
    """Where the sequences of one shard start, in file order: (sequences,) int64.

    The first starts at the first document; each next one at the first document at or after the end of the inputs of the
    one before. A sequence needs length + 1 tokens (the last target); what would overrun the shard is dropped. A
    document's tail behind the end of a sequence is skipped, so `length` should be many documents long: with documents
    of 950 tokens on average (encyclopedic text), length 2048 uses 50 % of the tokens, 16384 88 % and 65536 96 %.
    (0,) if the shard has no document token.
    """
    documents = np.concatenate([at + np.flatnonzero(tokens[at:at + SCAN] == document)
                                for at in range(0, tokens.size, SCAN)])
    after = np.searchsorted(documents, documents + length).tolist()  # index of the document that may follow each
    chosen, here = [], 0
    while here < len(documents):
        chosen.append(here)
        here = after[here]
    starts = documents[chosen]
    return starts[starts + length + 1 <= tokens.size]


def random_keys(seed: int, name: str, count: int) -> np.ndarray:
    """(count,) uint64 that depend on the seed and a file's name. Sorting by them permutes.

    Raw PCG64 output, because NumPy promises that stream for all versions (NEP 19), which it does not for permutation().
    """
    return np.random.PCG64([seed, int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])]).random_raw(count)


class TrainLoader:
    """The seed's list of training sequences, read from a folder of train shards.

    Shards are visited in an order drawn from (seed, file name): two shards keep their relative order when others are
    added. Within a shard, sequences (see `sequence_starts`) are permuted by (seed, file name). A shard is opened,
    checked and indexed when the run first reaches it; `require` does so for the whole run beforehand. No sequence ever
    comes twice: past the last one there is a DataError.

    vocab_size: of the tokenizer, not of a padded embedding. hint: the command that fetches or builds more shards.
    """

    def __init__(self, folder, *, seed: int, sequence_length: int, max_document: int, vocab_size: int, rank: int = 0,
                 world_size: int = 1, hint: str = HINT):
        check_settings(sequence_length, max_document, vocab_size, rank, world_size)
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.folder, self.seed, self.hint = Path(folder), seed, hint
        self.sequence_length, self.max_document, self.vocab_size = sequence_length, max_document, vocab_size
        self.rank, self.world_size = rank, world_size
        paths = shard_paths(folder, "train", hint=hint)
        self._paths = sorted(paths, key=lambda path: int(random_keys(seed, path.name, 1)[0]))
        self._shards: list[tuple[np.ndarray, np.ndarray]] = []  # tokens, permuted starts; in visiting order
        self._ends: list[int] = []  # number of sequences up to and including each opened shard
        self._read: dict[Path, tuple[np.ndarray, np.ndarray]] = {}  # tokens, starts in file order; for every seed
        self._lock = threading.Lock()  # batch() may run in the prefetching thread and in the caller's

    @property
    def files_used(self) -> list[Path]:
        """The shards opened so far, in visiting order."""
        return self._paths[:len(self._shards)]

    def with_seed(self, seed: int) -> TrainLoader:
        """The list of another seed. Shards that have been opened and checked are not read again."""
        other = TrainLoader(self.folder, seed=seed, sequence_length=self.sequence_length, rank=self.rank,
                            max_document=self.max_document, vocab_size=self.vocab_size, world_size=self.world_size,
                            hint=self.hint)
        other._read = self._read
        return other

    def batch(self, first: int, count: int, part: int = 0, parts: int = 1) -> Batch:
        """This rank's slice of the global sequences first … first + count - 1.

        Rank r owns the r-th of world_size equal contiguous shares; `part` selects one of `parts` equal contiguous
        slices of that share (gradient accumulation). Slices of all parts and ranks, in order, make up the same global
        batch whatever their number. DataError if the numbers do not divide, or if the shards end before the batch does.
        """
        if first < 0 or count < 1 or parts < 1 or not 0 <= part < parts:
            raise ValueError(f"batch needs first >= 0, count >= 1, 0 <= part < parts; "
                             f"got first {first}, count {count}, part {part}, parts {parts}")
        slices = self.world_size * parts
        if count % slices:
            raise DataError(f"a batch of {count} sequences of {self.sequence_length} tokens does not divide into "
                            f"{self.world_size} ranks × {parts} accumulation steps: make the batch a multiple of "
                            f"{slices * self.sequence_length} tokens, or use fewer ranks or accumulation steps")
        if not self._index(first + count):  # checked for all ranks alike, so that all stop at the same step
            raise self._shortage(first + count)
        size = count // slices
        begin = first + (self.rank * parts + part) * size
        rows = np.empty((size, self.sequence_length + 1), TOKEN)
        for row, number in zip(rows, range(begin, begin + size)):
            shard = bisect_right(self._ends, number)
            tokens, starts = self._shards[shard]
            start = starts[number - (self._ends[shard - 1] if shard else 0)]
            row[:] = tokens[start:start + self.sequence_length + 1]
        return make_batch(rows, document_token(self.vocab_size), self.max_document)

    def require(self, sequences: int) -> None:
        """DataError unless the folder holds that many sequences; says how many there are and both ways out."""
        if not self._index(sequences):
            raise self._shortage(sequences)

    def prefetch(self, requests: Iterable[tuple[int, int, int, int]], *, depth: int = 2,
                 pin: bool = False) -> Iterator[Batch]:
        """Yields batch(first, count, part, parts) for every request, prepared up to `depth` ahead by a thread.

        The thread starts at the first next(); it alone iterates `requests`. With `pin` the batches are page-locked. An
        exception in the thread, also one of `requests`, is raised here, behind the batches before it. Closing or
        dropping the iterator stops the thread after at most the batch it is preparing.
        """
        if depth < 1:
            raise ValueError(f"prefetch depth must be at least 1, got {depth}")
        return self._prefetch(requests, depth, pin)

    def _prefetch(self, requests, depth, pin):
        ready = queue.SimpleQueue()  # (batch, None), or (None, exception or None) at the end
        room = threading.Semaphore(depth)
        stop = threading.Event()

        def work():
            try:
                for request in requests:
                    room.acquire()
                    if stop.is_set():
                        return
                    batch = self.batch(*request)
                    ready.put((batch.pin() if pin else batch, None))
                ready.put((None, None))
            except BaseException as error:
                ready.put((None, error))

        threading.Thread(target=work, name="data prefetch", daemon=True).start()
        try:
            while True:
                batch, error = ready.get()
                room.release()
                if error is not None:
                    raise error
                if batch is None:
                    return
                yield batch
        finally:
            stop.set()
            room.release()  # the thread may be waiting for room

    def _index(self, sequences: int) -> bool:
        """Opens shards until that many sequences are indexed; False if there are not so many."""
        with self._lock:
            while not self._ends or self._ends[-1] < sequences:
                if len(self._shards) == len(self._paths):
                    return False
                path = self._paths[len(self._shards)]
                if path not in self._read:
                    self._read[path] = self._open(path)
                tokens, starts = self._read[path]
                order = np.argsort(random_keys(self.seed, path.name, starts.size), kind="stable")
                self._shards.append((tokens, starts[order]))
                self._ends.append((self._ends[-1] if self._ends else 0) + starts.size)
            return True

    def _open(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        tokens, document = open_shard(path, self.vocab_size, hint=self.hint), document_token(self.vocab_size)
        starts = sequence_starts(tokens, document, self.sequence_length)
        if not starts.size and not (tokens == document).any():
            raise DataError(f"{path}: no document start: the document token {document} of a vocabulary of "
                            f"{self.vocab_size} does not occur; made with another tokenizer? "
                            f"If not, delete it and run: {self.hint}")
        return tokens, starts

    def _shortage(self, needed: int) -> DataError:
        shards, tokens = len(self._shards), sum(tokens.size for tokens, _ in self._shards)
        return DataError(f"{self.folder}: {shards} train shard{'s' * (shards != 1)} with {tokens:,} tokens hold "
                         f"{self._ends[-1]:,} sequences of {self.sequence_length:,}, the run needs {needed:,} "
                         f"({needed * self.sequence_length:,} tokens), and no token is used twice: "
                         f"take fewer --steps, or get more shards: {self.hint}")


# ---------------------------------------------------------------------------------------------------------------------
# Validation


def validation_batches(folder, *, tokens: int, sequence_length: int, max_document: int, vocab_size: int, rank: int = 0,
                       world_size: int = 1, sequences_per_pass: int = 1, hint: str = HINT) -> list[Batch]:
    """This rank's share of the first `tokens` tokens of the val shards, as batches in file order.

    The inputs are the first `tokens` tokens cut into sequences one after the other, wherever documents start, so each
    position is predicted exactly once, whatever the number of ranks; `tokens` + 1 are read, across shards if need be.
    Ranks own equal contiguous shares; a batch holds sequences_per_pass sequences (the whole share if that is less).
    DataError if the numbers do not divide or the val shards are too short.
    """
    check_settings(sequence_length, max_document, vocab_size, rank, world_size)
    unit = sequence_length * world_size
    if tokens < 1 or tokens % unit:
        raise DataError(f"{tokens} validation tokens do not divide into {world_size} ranks × sequences of "
                        f"{sequence_length}: choose a multiple of {unit}, such as {max(1, tokens // unit) * unit}")
    share = tokens // unit  # sequences of one rank
    size = min(sequences_per_pass, share)
    if size < 1 or share % size:
        raise DataError(f"{share} validation sequences a rank do not divide into passes of {sequences_per_pass}: "
                        f"choose sequences_per_pass from the divisors of {share}, or another number of tokens")
    first = rank * share * sequence_length
    stream, seen = np.empty(share * sequence_length + 1, TOKEN), 0  # seen: tokens of the shards so far
    paths = shard_paths(folder, "val", hint=hint)
    for path in paths:
        shard = open_shard(path, vocab_size, hint=hint)
        piece = shard[max(first - seen, 0):max(first + stream.size - seen, 0)]
        at = max(seen - first, 0)
        stream[at:at + piece.size] = piece
        seen += shard.size
        if seen > tokens:
            break
    else:
        raise DataError(f"{folder}: {len(paths)} val shard{'s' * (len(paths) != 1)} with {seen:,} tokens, but "
                        f"validation on {tokens:,} tokens reads {tokens + 1:,} (the last target): validate on fewer "
                        f"tokens, or get more: {hint}")
    rows = np.lib.stride_tricks.sliding_window_view(stream, sequence_length + 1)[::sequence_length]
    document = document_token(vocab_size)
    return [make_batch(rows[at:at + size], document, max_document) for at in range(0, share, size)]
