"""Reading files of a folder that may be hostile: no links followed inside it, nothing that is not a plain file, no more
bytes than asked for, whatever a file claims to be."""
import os
import stat
import zlib
from pathlib import Path

from records.source import path_problem


class Unsafe(ValueError):
    """A file is not read; the message names it and says why."""


def read(folder, name, largest):
    """The bytes of `name` (str, "/" between its parts) in `folder` (Path), or None where there is no such file.

    Raises Unsafe where the name leads out of the folder, or any part of it is a link or no plain file or folder, or the
    file has more than `largest` bytes.
    """
    if problem := path_problem(name):
        raise Unsafe(problem)
    path = Path(folder)
    for part in name.split("/"):
        path = path / part
        if path.is_symlink():
            raise Unsafe(f"{name}: a link, which no record has")
    try:
        # NONBLOCK: opening a pipe must not wait for its other end
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise Unsafe(f"{name}: cannot be read ({error.strerror})") from None
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise Unsafe(f"{name}: not a plain file")
        content = file.read(largest + 1)
    if len(content) > largest:
        raise Unsafe(f"{name}, line 1: more than the {largest} bytes that any record needs")
    return content


def read_picture(folder, name, largest):
    """The bytes of a PNG, or None where there is no such file.  Arguments as in `read`.

    Raises Unsafe as `read` does, and where the file does not begin and end as a PNG does.
    """
    content = read(folder, name, largest)
    if content is not None and not (content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82")):
        raise Unsafe(f"{name}: no PNG")
    return content


def read_log(folder, name, largest):
    """log.txt, or what log.txt.gz unpacks to.  name: of the log without .gz, as in `read`.

    Returns bytes, or None where there is neither.  Raises Unsafe as `read` does, and where both are there.
    """
    plain, packed = read(folder, name, largest), read(folder, f"{name}.gz", largest)
    if packed is None:
        return plain
    if plain is not None:
        raise Unsafe(f"{name}: there is also {name}.gz; which of the two is the log?")
    unpacker = zlib.decompressobj(wbits=31)
    try:
        content = unpacker.decompress(packed, largest + 1)
    except zlib.error as error:
        raise Unsafe(f"{name}.gz: cannot be unpacked ({error})") from None
    if len(content) > largest:
        raise Unsafe(f"{name}.gz: unpacks to more than the {largest} bytes that any record needs")
    if not unpacker.eof or unpacker.unused_data:
        raise Unsafe(f"{name}.gz: cut off, or followed by something else")
    return content


def folders(folder, most=100_000):
    """Names of what lies in `folder` (Path), sorted; [] where it is none.  Raises Unsafe beyond `most` or at a link."""
    if folder.is_symlink():
        raise Unsafe(f"{folder.name}: a link, which no record has")
    names = []
    if folder.is_dir():
        with os.scandir(folder) as entries:
            for entry in entries:
                names.append(entry.name)
                if len(names) > most:
                    raise Unsafe(f"{folder.name}: more than {most} entries")
    return sorted(names)
