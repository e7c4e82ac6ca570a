"""source.txt: the code of a run in one file, from which every part can be rebuilt byte for byte.

Each part is a header line `==== {"path": ..., "bytes": ..., "sha256": ...}`, then exactly that many bytes, then a
newline. The byte count rules, so a part may hold text that looks like a header.
"""
import hashlib
import json
import sys
from pathlib import Path

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
    files += [Path(name) for name in (getattr(module, "__dict__", {}).get("__file__") for module in
                                      list(sys.modules.values())) if isinstance(name, str)]
    found = {}
    for file in files:
        relative = relative_to(file, repository)
        if relative is not None and file.is_file() and not _in_environment(relative, repository):
            found[relative.as_posix()] = file.read_bytes()
    return dict(sorted(found.items()))


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

    Raises ValueError naming the position or the path where the content is not as its headers say.
    """
    files, position = {}, 0
    while position < len(packed):
        end = packed.find(b"\n", position)
        try:
            if end < 0 or not packed.startswith(MARK, position):
                raise ValueError("no header line")
            header = json.loads(packed[position + len(MARK):end])
            path, size, expected = header["path"], header["bytes"], header["sha256"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"source.txt is damaged: at byte {position} expected a header line "
                             f"'==== {{\"path\": ..., \"bytes\": ..., \"sha256\": ...}}' ({error})") from None
        content = packed[end + 1:end + 1 + size]
        position = end + 1 + size + 1
        if packed[position - 1:position] != b"\n" or sha256(content) != expected:
            raise ValueError(f"source.txt is damaged: the {size} bytes of {path!r} do not have the SHA-256 {expected}")
        files[path] = content
    return files
