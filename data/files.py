"""Two habits every writer in this package keeps: a file has its final name only when it is whole, and of many
processes that want the same folder built, one builds and the others wait."""
from __future__ import annotations

import contextlib
import os
import shutil
import threading
from pathlib import Path

import filelock


@contextlib.contextmanager
def atomic_write(path):
    """Yields a binary file open for writing; on leaving, its bytes are on disk and named `path`, all of them.

    The bytes go to a hidden temporary name in the same folder, then fsync, then os.replace (atomic on one file system).
    An exception inside the block removes the temporary and leaves whatever `path` was before untouched. The folder is
    made if missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def one_builder(folder):
    """Holds the lock file `<folder>/.lock` between processes and threads; the folder is made if missing.

    Look again at what is missing once inside: another process may just have built it. The lock is the operating
    system's: it goes with a process that is killed. The empty lock file may stay behind; it means nothing by itself.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / ".lock"):  # a new object each time, so threads exclude each other as processes do
        yield


@contextlib.contextmanager
def staging(folder):
    """Yields the empty folder `<folder>/.partial`, for files that are renamed together at the end; removed on leaving.

    Hold one_builder(folder) around it. What a killed builder left there is removed by the next.
    """
    partial = Path(folder) / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
