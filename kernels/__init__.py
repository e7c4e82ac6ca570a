"""Triton kernels. Each file: the formula, what fusing it saves, the kernels, a launcher; its eager twin is named there.

They need an NVIDIA GPU of compute capability 9.0 (H100, H200) or newer, or Triton's interpreter (TRITON_INTERPRET=1),
which runs them slowly on a CPU. Nothing of ours is imported here but by the tools bench*.py and tune.py.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_only_compile = ContextVar("only compile", default=False)


def why_not(device: torch.device) -> str | None:
    """Why the kernels cannot run on `device`, or None if they can."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda" or torch.version.hip:
        return f"they need an NVIDIA GPU, not {'an AMD one' if torch.version.hip else device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (9, 0):
        return f"they need compute capability 9.0 (H100) or newer, not {'.'.join(map(str, capability))}"
    return None


def multiprocessors(device: torch.device) -> int:
    """Programs that run at once: the size of a persistent grid. The interpreter gets 3, so that tests cross it."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def chained(wanted: bool) -> dict:
    """Launch options of kernels that follow each other closely (programmatic dependent launch): the next one's programs
    start while this one's are at work, and wait inside (gdc_wait) until all it wrote can be read. That saves the gap
    between launches. Each such kernel waits before it touches memory, so whatever was launched before it is safe."""
    if not wanted or os.environ.get("TRITON_INTERPRET") == "1":
        return dict(CHAINED=False)
    return dict(CHAINED=True, launch_pdl=True)


@contextmanager
def compiling():
    """What `launch` meets in here is compiled, all of it at a time, and not launched. Kinds of a kernel take half a second
    each; the compiler works outside of Python's lock."""
    import triton

    token = _only_compile.set(True)
    try:
        with ThreadPoolExecutor() as threads, triton.AsyncCompileMode(threads):
            yield
    finally:
        _only_compile.reset(token)


def launch(kernel, grid: tuple[int, ...], *arguments, **options) -> None:
    """kernel[grid](*arguments, **options); inside of `compiling` no more than its compilation."""
    kernel.run(*arguments, grid=grid, warmup=_only_compile.get(), **options)
