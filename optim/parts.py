"""Named parts of a training step: labels in torch.profiler's traces, and a stopwatch on the GPU's own clock.

    with part("muon: momentum"):            marks what is launched inside
        ...
    with stopwatch() as times:              times[name]: one or more spans of a part, read by milliseconds(times)
        step()
"""

import time
from contextlib import contextmanager

import torch
from torch.profiler import record_function

_watches: list[dict] = []  # of the stopwatches that run now


@contextmanager
def part(name: str):
    """What is launched inside belongs to `name`. Parts must not contain each other."""
    with record_function(name):
        if not _watches:
            yield
            return
        begin = _now()
        yield
        end = _now()
    for watch in _watches:
        watch.setdefault(name, []).append((begin, end))


@contextmanager
def stopwatch():
    """Collects the spans of every part entered inside: yields a dict name -> list of (begin, end)."""
    watch: dict[str, list] = {}
    _watches.append(watch)
    try:
        yield watch
    finally:
        _watches.remove(watch)


def milliseconds(watch: dict[str, list]) -> dict[str, float]:
    """Time of every part, summed over its spans, in ms; waits for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return {name: sum(_between(begin, end) for begin, end in spans) for name, spans in watch.items()}


def _now():
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(begin, end) -> float:
    return 1000 * (end - begin) if isinstance(begin, float) else begin.elapsed_time(end)
