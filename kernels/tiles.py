"""How products of n×n matrices are cut into tiles: a measured table, and on request a measurement of one's own.

`choose` answers from the cache that `python -m kernels.tune` writes (for this very GPU, n and batch), else from rules
that hold an H200's sweep (records/studies/tiles). Nothing is ever tuned unasked: a new shape costs no search.
"""

import json
import os
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from . import multiprocessors


@dataclass(frozen=True)
class Tiles:
    """How a product is cut: rows × columns of a tile, depth of a stage, warps, stages, tile columns in a super-row."""

    rows: int
    columns: int  # rows, or twice as many
    depth: int = 64
    warps: int = 4
    stages: int = 4
    group: int = 8
    persistent: bool = False  # a program a multiprocessor, which takes tiles one after the other
    registers: int | None = None  # at most so many a thread, so that two programs fit on a multiprocessor
    chained: bool = False  # programmatic dependent launch: pays where launches take the time
    chunk: int | None = None  # matrices that go through the launches together; None: all
    lanes: int = 1  # chunks under way at a time, each on a stream of its own

    def __post_init__(self):
        if self.columns not in (self.rows, 2 * self.rows):
            raise ValueError(f"Tiles columns={self.columns}: expected rows={self.rows} or twice as many")

    def count(self, n: int) -> int:
        """Tiles of the upper triangle of an n×n matrix, n a multiple of `columns`."""
        blocks = n // self.columns
        return self.columns // self.rows * blocks * (blocks + 1) // 2


LARGE = Tiles(128, 256, warps=8, stages=3, group=8, persistent=True)
MIDDLE = Tiles(128, 128, stages=3, group=4)  # two programs share a multiprocessor
NARROW = Tiles(64, 128, stages=3)  # three
SMALL = Tiles(64, 64, depth=128, stages=3, chained=True)
CANDIDATES = (  # what `python -m kernels.tune` tries
    SMALL, NARROW, MIDDLE, LARGE,
    replace(MIDDLE, chunk=6, lanes=4),
    Tiles(64, 64, depth=128, stages=2),
    Tiles(64, 64, stages=4),
    Tiles(64, 128, stages=4),
    Tiles(128, 128, warps=8, stages=3, group=4, registers=128),
    Tiles(128, 128, warps=8, stages=4, group=4, persistent=True),
)


def default(n: int, batch: int, programs: int) -> Tiles:
    """The cut for `batch` matrices n×n on a GPU with `programs` multiprocessors, by rules from the H200's sweep."""
    if programs < 16:  # the interpreter: small, so that tests cross tiles
        return Tiles(16, 32, depth=16, group=2) if n > 64 else Tiles(16, 16, depth=16, group=2)
    if n > 6000:
        return LARGE
    tiles = MIDDLE.count(-(-n // MIDDLE.columns) * MIDDLE.columns)  # of a matrix
    narrow = batch * NARROW.count(-(-n // NARROW.columns) * NARROW.columns)
    if narrow < programs:
        return SMALL  # larger ones would be too few to go round
    if n <= 384 or narrow < 2.5 * programs:
        return NARROW
    if batch * tiles > 4 * programs and tiles < programs:  # more than the L2 holds: 44 matrices of 768 gain 9 %
        return replace(MIDDLE, chunk=programs // tiles, lanes=4)
    return MIDDLE


def cache_path() -> Path:
    """The file of tuned tiles: $TURBORUN_CACHE/tiles.json, by default in ~/.cache/turborun."""
    return Path(os.environ.get("TURBORUN_CACHE", Path.home() / ".cache" / "turborun")) / "tiles.json"


def key(n: int, batch: int, device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, {batch} × {n}"


@lru_cache(maxsize=1)
def tuned() -> dict[str, Tiles]:
    """What the cache file holds, by `key`; ValueError names a file that cannot be understood and how to mend it."""
    path = cache_path()
    try:
        return {name: Tiles(**fields) for name, fields in json.loads(path.read_text()).items()}
    except FileNotFoundError:
        return {}
    except (OSError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"cannot use the tuned tiles in {path} ({error}): delete the file, or write it anew with "
                         "python -m kernels.tune") from error


def remember(new: dict[str, Tiles]) -> Path:
    """Adds to the cache file, whole or not at all; returns its path."""
    path = cache_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {name: asdict(tiles) for name, tiles in (tuned() | new).items()}
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    temporary.replace(path)
    tuned.cache_clear()
    return path


def choose(n: int, batch: int, device: torch.device) -> Tiles:
    """The cut for `batch` matrices n×n on `device`."""
    return tuned().get(key(n, batch, device)) or default(n, batch, multiprocessors(device))
