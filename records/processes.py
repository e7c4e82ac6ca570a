"""Child processes that end with the process that started them, and take their own children along (Linux)."""
import ctypes
import os
import signal
import subprocess
import time
from pathlib import Path

GRACE = 10.0        # seconds between asking a process to end and killing it
PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class Stop:
    """While entered, SIGINT, SIGTERM and SIGHUP do nothing but set `number` (int, None before); poll it.

    A signal that was ignored before stays ignored (nohup). Enter it in the main thread.
    """

    def __init__(self):
        self.number = None

    def __enter__(self):
        numbers = [number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
                   if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *error):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        self.number = self.number or number

    @property
    def name(self):
        """Of the signal, such as "SIGINT"; None where there was none."""
        return None if self.number is None else signal.Signals(self.number).name


def start(command, *, cwd, environment, output):
    """Start `command` (list of str) in a session of its own, its output in the file `output` (Path).

    It gets SIGTERM when the thread that calls this ends, however that happens. Returns subprocess.Popen.
    """
    parent = os.getpid()

    def end_with_parent():      # runs in the child; the caller has one thread, so that this is safe
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    with open(output, "wb") as file:
        return subprocess.Popen(command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=file,
                                stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=end_with_parent)


def end(processes, grace=GRACE):
    """End them (list of Popen) and everything they started: SIGTERM, and SIGKILL after `grace` seconds."""
    trees = {process.pid: descendants(process.pid) for process in processes}
    for process in processes:
        if process.poll() is None:
            _signal_group(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + grace
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(0.05)
    for process in processes:
        if process.poll() is None:
            trees[process.pid] |= descendants(process.pid)
            _signal_group(process.pid, signal.SIGKILL)
        process.wait()
    for pid, started in [item for tree in trees.values() for item in tree.items()]:
        if _started(pid) == started:    # still the same process: it outlived its parent
            _signal(pid, signal.SIGKILL)


def end_those_with(text, grace=GRACE):
    """End every process that has `text` (str, long enough to be unique) in its command line, this one excepted:
    SIGTERM, and SIGKILL after `grace` seconds. Returns their number."""
    found = _with(text)
    for pid in found:
        _signal(pid, signal.SIGTERM)
    deadline = time.monotonic() + grace
    while _with(text) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in _with(text):
        _signal(pid, signal.SIGKILL)
    return len(found)


def descendants(pid):
    """Processes below `pid`: dict of process id -> when it started (str, clock ticks since boot)."""
    children = {}
    for path in Path("/proc").glob("[0-9]*"):
        fields = _stat(path.name)
        if fields:
            children.setdefault(int(fields[1]), []).append((int(path.name), fields[19]))
    found, todo = {}, [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found |= dict(below)
        todo += [child for child, _ in below]
    return found


def _with(text):
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command_line = path.read_bytes()
        except OSError:     # it has just ended
            continue
        if text.encode() in command_line and int(path.parent.name) != os.getpid():
            found.append(int(path.parent.name))
    return found


def _stat(pid):
    """Fields of /proc/PID/stat from the third on: [0] state, [1] parent, [19] start time; None where it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None


def _started(pid):
    fields = _stat(pid)
    return fields[19] if fields and fields[0] != "Z" else None


def _signal_group(pid, number):
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        pass


def _signal(pid, number):
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        pass
