"""How fast kernels/mix.py is, forward and backward, beside its twin under torch.compile, by which cuts.

    python -m kernels.bench_mix            the cuts of the file, the twin, and the errors of both
    python -m kernels.bench_mix --tune     candidates first; the best, as CUTS wants them

Streams are bfloat16; of four the last has a gate. Times are the GPU's own, by the profiler: of all kernels of a call,
each the median of the samples; gaps between kernels do not count. Backward is what a call of both takes beyond forward.
Bytes are those that must move: K streams in, y and n out; the streams, dy and dn in, K gradients out. Errors are the
largest against float64, of y, n, the gradients of the streams together, of weights and of gate.
"""

import argparse
import statistics
from itertools import product

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from . import mix as module
from .launches import kernel_us, need_gpu
from .mix import Cut, mix_norm, mix_norm_eager

SIZES = tuple(product((512, 768), (3, 4)))  # (width, streams)
# Without spills in backward for sm_90 (triton 3.6, 3.7): at most 16 numbers a thread.
CUTS = [Cut(elements, warps, programs, stages)
        for elements, warps in ((512, 1), (512, 2), (1024, 2), (1024, 4), (2048, 4), (2048, 8), (4096, 8))
        for programs in (2, 4, 8, 16, 32) for stages in (1, 2, 3) if programs * warps <= 64]


def given(tokens: int, width: int, count: int) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """(streams, weights, gate if there are four), slopes"""
    generator = torch.Generator("cuda").manual_seed(0)
    *streams, dy, dn = torch.randn(count + 2, tokens, width, generator=generator, device="cuda").bfloat16()
    gate = 2 * torch.rand(tokens, 1, generator=generator, device="cuda").bfloat16()
    inputs = [*streams, torch.randn(count, generator=generator, device="cuda")] + [gate] * (count == 4)
    return [x.requires_grad_() for x in inputs], (dy, dn)


def moved(tokens: int, width: int, count: int) -> dict[str, int]:
    """Streams alone: what else there is, is less than a hundredth."""
    return dict(forward=(count + 2) * 2 * tokens * width, backward=(2 * count + 2) * 2 * tokens * width)


def call(function, inputs: list[Tensor], slopes=None) -> list[Tensor]:
    """[y, n], and with slopes the gradients."""
    count = min(len(inputs) - 1, 4)
    results = function(inputs[:count], *inputs[count:])
    return [*results, *(torch.autograd.grad(results, inputs, slopes) if slopes else ())]


def gpu_us(work, samples: int) -> float:
    """Of all kernels of a call together."""
    work()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(samples):
            work()
        torch.cuda.synchronize()
    events = sorted((event for event in profiler.events() if event.device_type == DeviceType.CUDA),
                    key=lambda event: event.time_range.start)
    count, rest = divmod(len(events), samples)
    if rest or not count:
        raise RuntimeError(f"the profiler saw {len(events)} launches in {samples} calls; change --samples")
    times = [event.time_range.elapsed_us() for event in events]
    return sum(statistics.median(times[i::count]) for i in range(count))


def show(tokens: int, width: int, count: int, samples: int) -> None:
    inputs, slopes = given(tokens, width, count)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth = [x.detach() for x in call(mix_norm_eager, exact, [slope.double() for slope in slopes])]
    del exact
    print(f"width {width}, {count} streams{', a gate' if count == 4 else ''}")
    for name, function in (("torch.compile", torch.compile(mix_norm_eager, dynamic=False)), ("ours", mix_norm)):
        each = [((a.detach() - b).abs().max() / b.abs().max()).item()
                for a, b in zip(call(function, inputs, slopes), truth)]
        parts = [*each[:2], max(each[2 : 2 + count]), *each[2 + count :]]
        forward = gpu_us(lambda: call(function, inputs), samples)
        us = dict(forward=forward, backward=gpu_us(lambda: call(function, inputs, slopes), samples) - forward)
        for part, size in moved(tokens, width, count).items():
            print(f"  {name:14}{part:9}{us[part]:8.1f} µs{size / us[part] / 1e3:7.0f} GB/s", flush=True)
        print(f"  {'':14}errors   {' '.join(f'{error:.1e}' for error in parts)}")


def tune(tokens: int, samples: int) -> None:
    """Tries the candidates and leaves in CUTS those that take the shortest time over all sizes."""
    times = {name: [] for name in module.CUTS}
    for cut in CUTS:
        module.CUTS = dict(forward=cut, backward=cut)
        us = {name: [] for name in times}
        for size in SIZES:
            inputs, slopes = given(tokens, *size)
            found = kernel_us(lambda: call(mix_norm, inputs, slopes), tuple(f"mix_{name}" for name in us), samples)
            for name in us:
                us[name].append(found[f"mix_{name}"][0])
        for name in us:
            times[name].append((sum(us[name]), cut))
            print(f"  {name:9}{' '.join(f'{one:7.1f}' for one in us[name])} µs  {cut}", flush=True)
    module.CUTS = {name: min(found, key=lambda pair: pair[0])[1] for name, found in times.items()}
    print(f"CUTS = {module.CUTS}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench_mix", description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=65536, help="rows of the streams (default 65536)")
    parser.add_argument("--samples", type=int, default=30, help="of every time; their median counts (default 30)")
    parser.add_argument("--tune", action="store_true", help="try other cuts first, and take the best")
    options = parser.parse_args(arguments)
    need_gpu(parser)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {options.tokens} tokens, bfloat16")
    if options.tune:
        tune(options.tokens, options.samples)
    for width, count in SIZES:
        show(options.tokens, width, count, options.samples)


if __name__ == "__main__":
    main()
