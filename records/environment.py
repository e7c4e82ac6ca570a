"""What a run ran on: hardware, versions, git state, command. Never the host, the user, or an absolute path."""
import os
import platform
import re
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

from records.source import relative_to

DIFF_LIMIT = 200_000    # characters of `git diff` kept in a record
PATH = re.compile(r"""(?<![\w.~/-])/(?!/)(?:[^\s/:;,'"()<>|=]+/)+[^\s/:;,'"()<>|=]*""")


class Scrubber:
    """Takes absolute paths out of text: those under the repository become relative to it, the home folder becomes ~,
    and any other path of two or more parts keeps its last part only (.../name)."""

    def __init__(self, repository):
        self.rules = [(_prefix(path, tail="/"), "") for path in _spellings(repository)]
        self.rules += [(_prefix(path), ".") for path in _spellings(repository)]
        home = Path(os.path.expanduser("~"))    # stays ~ for a user without a home, where Path.home() raises
        self.rules += [(_prefix(path), "~") for path in _spellings(home)]

    def __call__(self, text):
        """text: str.  Returns it without absolute paths."""
        for pattern, replacement in self.rules:
            text = pattern.sub(replacement, text)
        return PATH.sub(lambda match: ".../" + match[0].rstrip("/").rpartition("/")[2], text)


def _spellings(path):
    """Both spellings of a folder, links followed or not; the longer first. None of the root folder."""
    names = {str(path.absolute()), str(path.resolve())}
    return sorted((name for name in names if len(Path(name).parts) > 1), key=len, reverse=True)


def _prefix(path, tail=""):
    return re.compile(r"(?<![\w.~/-])" + re.escape(path) + (re.escape(tail) if tail else r"(?![\w-]|\.\w)"))


def hardware(device=None):
    """Describe the machine.

    device: what the run computes on, such as "cuda:0" or "cpu"; None means CUDA where torch finds it.
    Returns dict of accelerator (name or None), accelerator_count (one for each process of the run),
    accelerator_memory_bytes, driver, cpu, cpu_count (those this process may use), memory_bytes.
    """
    import torch
    uses_cuda = torch.cuda.is_available() if device is None else str(device).startswith("cuda")
    properties = torch.cuda.get_device_properties(torch.cuda.current_device()) if uses_cuda else None
    return {
        "accelerator": properties.name if properties else None,
        "accelerator_count": int(os.environ.get("WORLD_SIZE", "1")) if properties else 0,
        "accelerator_memory_bytes": properties.total_memory if properties else None,
        "driver": _driver() if properties else None,
        "cpu": _cpu_model(),
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


@cache      # of a process: one that makes many runs asks once
def _driver():
    lines = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return lines.split()[0] if lines and lines.split() else None


def _cpu_model():
    information = Path("/proc/cpuinfo")
    text = information.read_text(errors="replace") if information.exists() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return model[1].strip() if model else platform.processor() or platform.machine()


def versions():
    """Versions of what computes: dict of python, torch, triton, cuda, numpy -> str, or None where absent."""
    import torch
    return {"python": platform.python_version(), "torch": torch.__version__, "triton": _version("triton"),
            "cuda": torch.version.cuda, "numpy": _version("numpy")}


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git(repository):
    """State of the repository (Path): dict of commit (str), dirty (bool), diff (`git diff HEAD`, at most DIFF_LIMIT
    characters), all three None where `repository` is not the top of a git checkout with a commit, or git is missing."""
    unknown = {"commit": None, "dirty": None, "diff": None}
    top = _output("git", "-C", str(repository), "rev-parse", "--show-toplevel")
    # An unpacked copy inside some other checkout has no commit of its own.
    if not top or Path(top.rstrip("\n")).resolve() != repository.resolve():
        return unknown
    commit = _output("git", "-C", str(repository), "rev-parse", "--verify", "--quiet", "HEAD")
    diff = _output("git", "-C", str(repository), "diff", "--no-ext-diff", "--no-textconv", "--no-color", "HEAD")
    if not commit or diff is None:
        return unknown
    dirty = bool(diff)
    if len(diff) > DIFF_LIMIT:
        diff = (f"{diff[:DIFF_LIMIT]}\n[cut: {len(diff) - DIFF_LIMIT} more characters; "
                "source.txt has the code that ran]\n")
    return {"commit": commit.strip(), "dirty": dirty, "diff": diff}


def _output(*command):
    """What `command` prints, or None where it is missing, fails or takes more than 20 s."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}    # set inside git hooks
    try:
        done = subprocess.run(command, env=clean | {"GIT_OPTIONAL_LOCKS": "0"}, capture_output=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None


def command(script, repository):
    """The command line of this process, the script's name first and relative to the repository: list of str."""
    relative = relative_to(script, repository)
    return [relative.as_posix() if relative else script.name, *sys.argv[1:]]
