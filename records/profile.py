"""Where the time of a training step goes: by labelled part (optim.parts.part) and by kernel."""
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from optim.parts import milliseconds, part, stopwatch

MOST_KERNELS = 15   # lines of the table


def profile_step(step):
    """Time the parts of one call of step(), and the kernels of another; a call before these is not looked at.

    Parts are timed without the profiler, which slows CUDA graphs down: on the GPU's own clock, where there is one.

    step: function without arguments.  Returns (table, numbers): the table as str, and a dict with
        step_ms     the whole step
        parts_ms    part -> its time
        kernels_ms  kernel (operator where there is no GPU) -> sum of its launches, the largest MOST_KERNELS
        nccl_ms     sum of NCCL's kernels, which may run beside others
    """
    step()
    with stopwatch() as watch, part("whole step"):
        step()
    parts = milliseconds(watch)
    gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    with profile(activities=[ProfilerActivity.CPU, *gpu]) as profiler:
        step()
    wanted = DeviceType.CUDA if gpu else DeviceType.CPU
    kernels = [(event.name, (event.time_range.end - event.time_range.start) / 1000) for event in profiler.events()
               if event.device_type == wanted and not getattr(event, "is_user_annotation", False)]
    return summarise(parts.pop("whole step"), parts, kernels)


def summarise(step_ms, parts, kernels):
    """What profile_step returns.  step_ms: float.  parts: dict name -> ms.  kernels: list of (name, ms) a launch."""
    sums = {}
    for name, ms in kernels:
        sums[name] = sums.get(name, 0.0) + ms
    largest = dict(sorted(sums.items(), key=lambda item: -item[1])[:MOST_KERNELS])
    nccl = sum(ms for name, ms in sums.items() if name.startswith("nccl"))
    lines = [f"{'one step':60} {'ms':>9}  share"]
    lines += [f"{name[:60]:60} {ms:9.3f} {ms / step_ms:6.1%}"
              for name, ms in [("whole step", step_ms), *parts.items(), *largest.items()]]

    def rounded(times):
        return {name: round(ms, 3) for name, ms in times.items()}

    return "\n".join(lines), {"step_ms": round(step_ms, 3), "parts_ms": rounded(parts), "nccl_ms": round(nccl, 3),
                              "kernels_ms": rounded(largest)}
