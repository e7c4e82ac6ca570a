"""What benchmarks share: a GPU that must be there, and how long single kernels take within a piece of work."""

import argparse
import statistics

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from . import why_not


def need_gpu(parser: argparse.ArgumentParser) -> None:
    """Exits with status 2 and the reason where the kernels cannot run."""
    obstacle = why_not(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if obstacle or not torch.cuda.is_available():
        program = parser.prog.removeprefix("python -m ")
        parser.exit(2, f"{program}: the kernels cannot run: {obstacle or 'torch finds no GPU'}\n")


def kernel_us(work, kernels: tuple[str, ...], samples: int) -> dict[str, list[float]]:
    """Kernel -> the GPU's own microseconds of each of its launches in a call of `work`, in order; the median of
    `samples` calls, by the profiler. kernels: names without the underscore before and the _kernel behind. RuntimeError
    where the profiler has lost launches."""
    work()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(samples):
            work()
        torch.cuda.synchronize()
    events = sorted((event for event in profiler.events() if event.device_type == DeviceType.CUDA),
                    key=lambda event: event.time_range.start)
    found = {}
    for kernel in kernels:
        times = [event.time_range.elapsed_us() for event in events if event.name == f"_{kernel}_kernel"]
        count, rest = divmod(len(times), samples)
        if rest or not count:
            raise RuntimeError(f"the profiler saw {len(times)} launches of {kernel} in {samples} calls; change --samples")
        found[kernel] = [statistics.median(times[i::count]) for i in range(count)]
    return found
