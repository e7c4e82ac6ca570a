"""How fast each kernel of kernels/norm_act.py and augment.py is in the layers of the CIFAR network, and with which cuts.

    python -m kernels.bench_norm_act                              the cuts that the files hold: every kernel and layer
    python -m kernels.bench_norm_act --tune --act gelu            candidates: the sum over the layers, the best in full
    python -m kernels.bench_norm_act --widths 128 384 512 --batch 1000

The layers run as in training, each on a tensor that has just been written, as by a convolution; times are the GPU's own
by the profiler, the median of --samples. Bytes are those that must be read and written; a fraction is of 4.2 TB/s, what
a copy reaches on an H200. A cut that is best here goes into CUTS, WHITEN or WHITEN_BIAS.
"""

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor

from . import augment, norm_act
from .launches import kernel_us, need_gpu
from .norm_act import Cut

COPY_TB_PER_S = 4.2
KERNELS = ("pool", "activate", "slope_sums", "slopes")
# Tried together, a column at a time: what suits one kernel says nothing about the others.
SUMMING = (Cut(programs=924, stages=3), Cut(programs=924), Cut(programs=924, stages=4), Cut(programs=528, stages=4),
           Cut(2048, 4, 528), Cut(2048, 4, 660, 3), Cut(2048, 8, 462, 3), Cut(2048, 8, 396, 4), Cut(4096, 8, 264, 3),
           Cut(programs=924, channels=256), Cut(512, 2, 1024, 3))
PASSING = (Cut(), Cut(programs=1 << 20), Cut(stages=3), Cut(programs=1320, stages=3), Cut(2048, 4), Cut(2048, 8),
           Cut(2048, 4, 1 << 20), Cut(programs=1056, stages=4), Cut(2048, 8, 660, 3), Cut(channels=256),
           Cut(512, 2, 7920))
WHITEN = (*(dict(BLOCK=128, PARTS=parts) for parts in (8, 4, 2, 1)), dict(BLOCK=256, PARTS=2, num_warps=8),
          dict(BLOCK=128, PARTS=4, maxnreg=72))
WHITEN_BIAS = (*(dict(BLOCK=128, PARTS=parts, maxnreg=128) for parts in (1, 2, 4)), dict(BLOCK=128, PARTS=2),
               dict(BLOCK=64, PARTS=2), dict(BLOCK=256, PARTS=2, num_warps=8, maxnreg=128))


@dataclass
class Layer:
    """A convolution's result and what follows it. x, dy: what a convolution leaves there; sources: what it computes."""

    x: Tensor
    dy: Tensor
    pool: bool

    def __post_init__(self):
        self.sources = self.x.clone(), self.dy.clone()
        self.x.requires_grad_()
        channels = self.x.size(1)
        self.bias = torch.zeros(channels, device="cuda", requires_grad=True)
        self.running = torch.zeros(channels, device="cuda"), torch.ones(channels, device="cuda")

    def bytes(self, kernel: str) -> int:
        """That `kernel` cannot but read and write."""
        x, p = self.x.numel(), self.dy.numel()
        size = self.x.element_size()
        return {"pool": x * size + self.pool * p * (size + 1), "activate": 2 * p * size, "slope_sums": 2 * p * size,
                "slopes": 2 * p * size + self.pool * p + x * size}[kernel]

    def forward(self, act: str) -> Tensor:
        with torch.no_grad():
            self.x.copy_(self.sources[0])
        return norm_act.norm_act(self.x, self.bias, *self.running, training=True, pool=self.pool, act=act, momentum=0.4,
                                 eps=1e-12)

    def backward(self, y: Tensor) -> None:
        self.dy.copy_(self.sources[1])
        torch.autograd.grad(y, (self.x, self.bias), self.dy)


def layers(batch: int, widths: list[int]) -> list[Layer]:
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(channels, side):
        made = torch.randn(batch, channels, side, side, generator=generator, device="cuda", dtype=torch.float16)
        return made.contiguous(memory_format=torch.channels_last)

    made, side = [], 31
    for channels in widths:
        made.append(Layer(normal(channels, side), normal(channels, side // 2), True))
        side //= 2
        made.append(Layer(normal(channels, side), normal(channels, side), False))
    return made


def measure(network: list[Layer], act: str, samples: int) -> dict[str, list[float]]:
    """Median microseconds of every kernel in every layer, forward order."""

    def work():
        results = [layer.forward(act) for layer in network]
        for layer, y in reversed(list(zip(network, results))):
            layer.backward(y)

    found = kernel_us(work, KERNELS, samples)
    return found | {kernel: found[kernel][::-1] for kernel in ("slope_sums", "slopes")}


def measure_whitening(batch: int, act: str, samples: int) -> dict[str, float]:
    images = torch.randint(256, (50000, 32, 32, 3), dtype=torch.uint8, device="cuda")
    table = torch.randint(-2, 3, (batch, 6), dtype=torch.int32, device="cuda")
    table[:, 0], table[:, 1] = torch.randint(50000, (batch,)), table[:, 1] % 2
    weight = torch.randn(24, 3, 2, 2, device="cuda", dtype=torch.float16)
    bias = torch.zeros(24, device="cuda", dtype=torch.float16, requires_grad=True)
    slope = torch.randn(batch, 31, 31, 24, device="cuda", dtype=torch.float16).permute(0, 3, 1, 2)

    def work():
        torch.autograd.grad(augment.whiten(images, table, 0, weight, bias, act), bias, slope)

    return {kernel: us for kernel, (us,) in kernel_us(work, ("whiten", "whiten_bias"), samples).items()}


def row(label: str, us: float, size: int) -> str:
    rate = size / us / 1e6
    return f"  {label:34}{us:9.1f} µs {1e3 * rate:8.0f} GB/s {100 * rate / COPY_TB_PER_S:6.0f} %"


def show(network: list[Layer], act: str, samples: int) -> None:
    """Every kernel in every layer, with the cuts of the files."""
    found = measure(network, act, samples)
    for kernel in KERNELS:
        print(f"{kernel}, {act}: {norm_act.CUTS[kernel]}")
        for layer, us in zip(network, found[kernel]):
            shape = "×".join(map(str, layer.x.shape[1:])) + ", pooled" * layer.pool
            print(row(shape, us, layer.bytes(kernel)))
        print(row("all", sum(found[kernel]), sum(layer.bytes(kernel) for layer in network)))
    batch = network[0].x.size(0)
    for kernel, us in measure_whitening(batch, act, samples).items():
        print(row(f"{kernel}, {act}", us, batch * (3072 + 961 * 24 * 2)))


def tune(network: list[Layer], act: str, samples: int) -> None:
    """The candidates, and then everything with the best of them."""
    best = {}
    for several in zip(SUMMING, PASSING, strict=True):
        for kernel in KERNELS:
            norm_act.CUTS[kernel] = several[kernel in ("activate", "slopes")]
        try:
            found = measure(network, act, samples)
        except Exception as error:  # the others can still be measured
            print(f"  {several}: {type(error).__name__}: {str(error).splitlines()[0][:150]}")
            continue
        for kernel in KERNELS:
            us, cut = sum(found[kernel]), norm_act.CUTS[kernel]
            print(f"  {kernel:12}{us:9.1f} µs  {cut}", flush=True)
            best[kernel] = min(best.get(kernel, (us, cut)), (us, cut), key=lambda pair: pair[0])
    norm_act.CUTS.update((kernel, cut) for kernel, (_, cut) in best.items())
    for kernel, name, candidates in (("whiten", "WHITEN", WHITEN), ("whiten_bias", "WHITEN_BIAS", WHITEN_BIAS)):
        times = []
        for cut in candidates:
            setattr(augment, name, cut)
            try:
                times.append((measure_whitening(network[0].x.size(0), act, samples)[kernel], cut))
                print(f"  {kernel:12}{times[-1][0]:9.1f} µs  {cut}", flush=True)
            except Exception as error:
                print(f"  {kernel} {cut}: {type(error).__name__}: {str(error).splitlines()[0][:150]}")
        setattr(augment, name, min(times, key=lambda pair: pair[0])[1])
    print(f"best: {norm_act.CUTS}, WHITEN = {augment.WHITEN}, WHITEN_BIAS = {augment.WHITEN_BIAS}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench_norm_act", description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=2000, help="images (default 2000)")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 256, 256], help="of the groups, two layers each")
    parser.add_argument("--act", nargs="+", choices=augment.ACTIVATIONS, default=list(augment.ACTIVATIONS))
    parser.add_argument("--samples", type=int, default=20, help="of every time; their median counts (default 20)")
    parser.add_argument("--tune", action="store_true", help="try other cuts first, and take the best")
    options = parser.parse_args(arguments)
    need_gpu(parser)
    network = layers(options.batch, options.widths)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: batch {options.batch}, float16")
    for act in options.act:
        if options.tune:
            tune(network, act, options.samples)
        show(network, act, options.samples)


if __name__ == "__main__":
    main()
