"""source.txt: the code of a run in one file, from which every part can be rebuilt byte for byte.

Each part is a header line `==== {"path": ..., "bytes": ..., "sha256": ...}`, then exactly that many bytes, then a
newline. The byte count rules, so a part may hold text that looks like a header.
"""
import hashlib
import json
import os
import sys
from pathlib import Path, PurePosixPath

MARK = b"==== "
ALWAYS = ("requirements.txt", "run.sh")     # belong to the run though nothing imports them


def sha256(content):
    """Hexadecimal SHA-256 of `content` (bytes)."""
    return hashlib.sha256(content).hexdigest()


def local_source(repository, script):
    """The code this process runs that belongs to the repository, as it is on disk now.

    The script, every imported module under `repository` that is not in a virtual environment, and requirements.txt
    and run.sh where they exist. repository, script: Path.  Returns dict of path relative to the repository -> bytes.
    """
    files = [Path(script)] + [repository / name for name in ALWAYS]
    # From __dict__, because asking a lazy module for an attribute may import it.
    names = {getattr(module, "__dict__", {}).get("__file__") for module in list(sys.modules.values())}
    files += map(Path, _inside(repository, [name for name in names if isinstance(name, str)]))
    found = {}
    for file in files:
        relative = relative_to(file, repository)
        if relative is not None and file.is_file() and not _in_environment(relative, repository):
            found[relative.as_posix()] = file.read_bytes()
    return dict(sorted(found.items()))


def _inside(folder, names):
    """Those of the files `names` (list of str) that lie in `folder` (Path) before or after following links. A process
    has thousands of modules: links in their folders are followed once for each folder."""
    within = tuple(os.path.join(path, "") for path in (os.path.abspath(folder), os.path.realpath(folder)))
    real = {}       # folder of a file as it is named -> without links
    for name in names:
        place, file = os.path.split(os.path.abspath(name))
        if place not in real:
            real[place] = os.path.realpath(place)
        path = os.path.join(real[place], file)
        if os.path.join(place, file).startswith(within) or path.startswith(within) \
                or os.path.islink(path) and os.path.realpath(path).startswith(within):
            yield name


def relative_to(file, folder):
    """`file` relative to `folder` (both Path), before or after following symbolic links; None where it lies outside."""
    for path, base in ((file.absolute(), folder.absolute()), (file.resolve(), folder.resolve())):
        if path.is_relative_to(base):
            return path.relative_to(base)
    return None


def _in_environment(relative, repository):
    if {"site-packages", "dist-packages"} & set(relative.parts):
        return True
    return any((repository / parent / "pyvenv.cfg").is_file() for parent in relative.parents if parent.parts)


def pack_source(files):
    """files: dict of relative path -> bytes.  Returns the content of source.txt (bytes)."""
    parts = []
    for path, content in files.items():
        header = json.dumps({"path": path, "bytes": len(content), "sha256": sha256(content)})
        parts += [MARK, header.encode(), b"\n", content, b"\n"]
    return b"".join(parts)


def unpack_source(packed):
    """packed: the content of a source.txt (bytes).  Returns dict of relative path -> bytes, in the order of the file.

    Raises ValueError naming the line where the content is not as its headers say, or a path that does not lie inside
    the folder it would be unpacked to.
    """
    files, position, line = {}, 0, 1
    while position < len(packed):
        end = packed.find(b"\n", position)
        try:
            if end < 0 or not packed.startswith(MARK, position):
                raise ValueError("no header line")
            header = json.loads(packed[position + len(MARK):end])
            path, size, expected = header["path"], header["bytes"], header["sha256"]
            if type(size) is not int or size < 0:
                raise ValueError(f"bytes is {str(size)[:40]}")
            if (problem := path_problem(path)) or path in files:
                raise ValueError(problem or f"a second part named {path!r}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"source.txt is damaged: line {line}, at byte {position}: expected a header line "
                             f"'==== {{\"path\": ..., \"bytes\": ..., \"sha256\": ...}}' "
                             f"({type(error).__name__}: {str(error)[:200]})") from None
        content = packed[end + 1:end + 1 + size]
        position = end + 1 + size + 1
        if packed[position - 1:position] != b"\n" or sha256(content) != expected:
            raise ValueError(f"source.txt is damaged: the {size} bytes of {path!r} from line {line + 1} on do not have "
                             f"the SHA-256 {str(expected)[:64]!a}")
        files[path] = content
        line += 2 + content.count(b"\n")
    for path in files:
        for parent in PurePosixPath(path).parents:
            if str(parent) in files:
                raise ValueError(f"source.txt is damaged: {str(parent)!r} is both a file and a folder, of {path!r}")
    return files


def path_problem(path):
    """Why `path` cannot be a file or folder inside another folder (str), or None where it can."""
    if not isinstance(path, str) or not 0 < len(path) <= 400 or not path.isprintable() or "\\" in path:
        return f"not a file name: {str(path)[:80]!r}"
    if any(part in ("", ".", "..") for part in path.split("/")):
        return f"a path that leads elsewhere: {path[:80]!r}"
    return None
