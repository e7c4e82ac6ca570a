"""How fast kernels/conv_pool.py is in the first layer of the CIFAR network, beside cuDNN, and with which cuts.

    python -m kernels.bench_conv_pool                         the cuts of the file, cuDNN, and the errors of both
    python -m kernels.bench_conv_pool --tune                  candidates first; the best, as CUTS wants them
    python -m kernels.bench_conv_pool --tune --batch 1000 --out-channels 128

Times are the GPU's own: of our kernels by the profiler, the median of --samples, x and the slope just written as in
training; of torch's by triton.testing.do_bench, the median. FLOPs are those of the convolution, zeros in our filters
not counted; bytes are those that must be read and written. Errors are the largest against float64, of --checked images.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.testing import do_bench

from . import conv_pool
from .conv_pool import Cut
from .launches import kernel_us, need_gpu

CHANNELS, SIDE = 24, 31
# None spills for sm_90 (triton 3.6), where C = 24 and 64 or 128 channels come out.
FORWARD = (Cut(warps=8, stages=3), Cut(stages=3), Cut(warps=8, stages=3, depth=32), Cut(stages=3, depth=32),
           Cut(warps=8), Cut(programs=264, resident=False), Cut(programs=1 << 20, resident=False),
           Cut(128, 8, resident=False), Cut(128, 8, stages=3, resident=False), Cut(128, 8, 1 << 20, resident=False))
WEIGHT_SUMS = (Cut(64, 8, 264, 3), Cut(64, 8, 264), Cut(64, 4, 264, 3), Cut(64, 8, stages=4), Cut(128, 8, stages=3),
               Cut(64, 8, stages=3, width=64), Cut(32, 8, 264, 3, width=64), Cut(32, 8, stages=4, width=128),
               Cut(32, 4, 396, 3), Cut(32, 4, 396, 3, channels=32, width=64))


def flops(batch: int, out: int) -> int:
    """Of the convolution where its result is pooled, forward or for the weight's gradient."""
    return 2 * 9 * CHANNELS * out * batch * (SIDE // 2 * 2) ** 2


class Layer:
    """x (batch, 24, 31, 31) and weight (O, 24, 3, 3), float16, channels last; the loss's slope by the result."""

    def __init__(self, batch: int, out: int):
        generator = torch.Generator("cuda").manual_seed(0)

        def normal(*shape):
            made = torch.randn(*shape, generator=generator, device="cuda", dtype=torch.float16)
            return made.contiguous(memory_format=torch.channels_last)

        self.sources = normal(batch, CHANNELS, SIDE, SIDE), normal(batch, out, SIDE // 2, SIDE // 2)
        self.x, self.slope = self.sources[0].clone(), self.sources[1].clone()
        self.weight = (normal(out, CHANNELS, 3, 3) * (9 * CHANNELS) ** -0.5).requires_grad_()
        self.flops = flops(batch, out)
        self.bytes = self.x.nbytes + self.slope.nbytes * 3 // 2  # of each of the two large kernels

    def forward(self) -> Tensor:
        self.x.copy_(self.sources[0])
        return conv_pool.conv_pool(self.x, self.weight)

    def both(self) -> None:
        y = self.forward()
        self.slope.copy_(self.sources[1])
        torch.autograd.grad(y, self.weight, self.slope)


def row(label: str, us: float, flops: int = 0, size: int = 0) -> str:
    rates = f"{flops / us / 1e6:9.0f} TFLOP/s" * bool(flops) + f"{size / us / 1e3:9.0f} GB/s" * bool(size)
    return f"  {label:36}{us:9.1f} µs{rates}"


def torchs(layer: Layer) -> dict[str, float]:
    """Microseconds of the convolution and the pool, forward and backward, as torch runs them."""
    x, weight = layer.x, layer.weight.detach()

    def pool(y):
        return torch.ops.aten.max_pool2d_with_indices(y, [2, 2])

    y = F.conv2d(x, weight, padding=1)
    _, places = pool(y)

    def spread():
        return torch.ops.aten.max_pool2d_with_indices_backward(layer.slope, y, [2, 2], [2, 2], [0, 0], [1, 1], False,
                                                               places)

    dy = spread()

    def sums():
        return torch.ops.aten.convolution_backward(dy, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1,
                                                   [False, True, False])

    works = {"cuDNN convolution": lambda: F.conv2d(x, weight, padding=1), "  and its pool": lambda: pool(y),
             "the pool's gradient": spread, "  cuDNN weight gradient": sums}
    return {label: 1e3 * do_bench(work, warmup=20, rep=60, return_mode="median") for label, work in works.items()}


def show(layer: Layer, samples: int) -> None:
    for label, us in torchs(layer).items():
        print(row(label, us, layer.flops * ("cuDNN" in label)))
    for kernel, (us,) in kernel_us(layer.both, ("conv_pool", "weight_sums", "weight"), samples).items():
        large = kernel != "weight"
        print(row(f"ours, {kernel}", us, layer.flops * large, layer.bytes * large))


def tune(layer: Layer, samples: int) -> None:
    """Tries the candidates and leaves the best in CUTS."""
    for name, kernels, work, candidates in (("forward", ("conv_pool",), layer.forward, FORWARD),
                                            ("weight_sums", ("weight_sums", "weight"), layer.both, WEIGHT_SUMS)):
        times = []
        for cut in candidates:
            conv_pool.CUTS[name] = cut
            try:
                us = sum(us for us, in kernel_us(work, kernels, samples).values())
            except Exception as error:  # the others can still be measured
                print(f"  {name} {cut}: {type(error).__name__}: {str(error).splitlines()[0][:150]}", flush=True)
                continue
            times.append((us, cut))
            print(row(name, us, layer.flops), cut, flush=True)
        if not times:
            raise SystemExit(f"kernels.bench_conv_pool: no cut of {name} runs; the first error above says why")
        conv_pool.CUTS[name] = min(times, key=lambda pair: pair[0])[1]
    print(f"CUTS = {conv_pool.CUTS}")


def results(function, layer: Layer, dtype: torch.dtype, images: int) -> list[Tensor]:
    """(result, gradient of the weight) of the first images."""
    x, slope = (t[:images].to(dtype) for t in layer.sources)
    weight = layer.weight.detach().to(dtype).requires_grad_()
    y = function(x, weight)
    return [y.detach(), *torch.autograd.grad(y, weight, slope)]


def show_errors(layer: Layer, images: int) -> None:
    truth = results(conv_pool.conv_pool_eager, layer, torch.float64, images)
    for name, function in (("torch", conv_pool.conv_pool_eager), ("ours", conv_pool.conv_pool)):
        found = results(function, layer, torch.float16, images)
        errors = [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(found, truth)]
        print(f"  errors of {name:12} forward {errors[0]:.2e}   weight's gradient {errors[1]:.2e}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench_conv_pool", description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=2000, help="images (default 2000)")
    parser.add_argument("--out-channels", type=int, default=64, help="a multiple of 32 (default 64)")
    parser.add_argument("--samples", type=int, default=20, help="of every time; their median counts (default 20)")
    parser.add_argument("--checked", type=int, default=64, help="images to take errors of (default 64)")
    parser.add_argument("--tune", action="store_true", help="try other cuts first, and take the best")
    options = parser.parse_args(arguments)
    need_gpu(parser)
    torch.backends.cudnn.benchmark = True
    layer = Layer(options.batch, options.out_channels)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: "
          f"x ({options.batch}, {CHANNELS}, {SIDE}, {SIDE}), {options.out_channels} channels out, float16")
    if options.tune:
        tune(layer, options.samples)
    show(layer, options.samples)
    show_errors(layer, options.checked)


if __name__ == "__main__":
    main()
