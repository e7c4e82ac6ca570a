"""Writing files whole, and the error that says why a record could not be written or read."""
import os
from contextlib import contextmanager


class RecordError(OSError):
    """A record cannot be written or read; the message names the folder or value and what mends it."""


@contextmanager
def writing(path):
    """Turns an OSError of the block into a RecordError that names `path` and the option that chooses another."""
    try:
        yield
    except OSError as error:
        raise RecordError(f"cannot write {path}: {error.strerror or error}; "
                          "choose another folder with --records FOLDER") from error


def write_whole(path, content):
    """Write `content` (bytes) so that a reader of `path` sees all of it or what was there before.

    Raises RecordError where the file system refuses.
    """
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
