"""How fast and how exact kernels/relu_squared.py is beside compiled torch.

    python -m kernels.bench_relu_squared                 65536 tokens, width 512, four times as wide inside
    python -m kernels.bench_relu_squared --width 768 --tune

First the two products alone: cuBLAS's and then torch's activation or slope, both in one process, and ours, with the
share of the chip's dense bfloat16 peak. Then a whole MLP, forward and backward, with all casts of weights, by CUDA
events. Errors are relative norms against float64, on the first --check tokens. Times are medians.
"""

import argparse
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.testing import do_bench

from records.profile import peak_tflops

from . import relu_squared as module
from .bench import event_us
from .launches import need_gpu
from .relu_squared import Cut, relu_squared_mlp, relu_squared_mlp_eager

CUTS = [Cut(rows, columns, depth, warps, stages, programs, flatten)
        for (rows, columns, depth, warps, stages, programs), flatten in itertools.product(
            ((128, 256, 64, 8, 3, 1), (128, 256, 64, 8, 4, 1), (256, 128, 64, 8, 3, 1), (128, 128, 64, 8, 4, 1),
             (128, 128, 64, 4, 3, 2), (128, 128, 128, 8, 3, 1), (64, 256, 64, 4, 3, 2)), (True, False))]


def us(call) -> float:
    return 1e3 * do_bench(call, warmup=20, rep=100, return_mode="median")


def products(x: Tensor, up: Tensor, down: Tensor, g: Tensor) -> dict:
    """Name of the direction -> (torch's product, what torch does after it, ours), calls without arguments."""
    shape, activate = (x.size(0), up.size(0)), torch.compile(lambda h: h.relu().square(), dynamic=False)
    slope = torch.compile(lambda slopes, h: slopes * 2 * h.relu(), dynamic=False)
    h, slopes, y = F.linear(x, up), g @ down, F.linear(x, up).relu().square()
    return {"forward": (lambda: F.linear(x, up), lambda: activate(h),
                        lambda: module._launch("forward", x, up, None, shape)),
            "backward": (lambda: g @ down, lambda: slope(slopes, h),
                         lambda: module._launch("backward", g, down, y, shape))}


def tune(ours: dict) -> None:
    """Leaves in the module's CUTS what took the shortest time."""
    for name, call in ours.items():
        times = []
        for cut in CUTS:
            module.CUTS[name] = cut
            try:
                times.append((us(call), cut))
                print(f"  {name} {times[-1][0]:8.1f} µs  {cut}", flush=True)
            except Exception as error:  # too large for the shared memory: the others can still be measured
                print(f"  {name} {type(error).__name__:>11}  {cut}", flush=True)
        module.CUTS[name] = min(times, key=lambda pair: pair[0])[1]
        print(f"CUTS[{name!r}] = {module.CUTS[name]}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench_relu_squared", description=__doc__.split("\n")[0])
    for name, value, text in (("tokens", 65536, "a pass"), ("width", 512, "of x"), ("hidden", None, "4 × width"),
                              ("check", 4096, "tokens for errors"), ("samples", 20, "of a whole MLP")):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{text} (default {value or text})")
    parser.add_argument("--tune", action="store_true", help="try other cuts first, and take the best")
    options = parser.parse_args(arguments)
    need_gpu(parser)
    tokens, width, hidden = options.tokens, options.width, options.hidden or 4 * options.width
    generator = torch.Generator("cuda").manual_seed(0)
    x, up, down, g = (torch.randn(*shape, generator=generator, device="cuda") / scale for shape, scale in
                      (((tokens, width), 1), ((hidden, width), width**0.5), ((width, hidden), hidden**0.5),
                       ((tokens, width), 1)))
    x, g, name = x.bfloat16(), g.bfloat16(), torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}: {tokens} tokens, {width} × {hidden}")
    pairs = products(x, up.bfloat16(), down.bfloat16(), g)
    if options.tune:
        tune({direction: calls[2] for direction, calls in pairs.items()})
    flops, peak = 2 * tokens * width * hidden, peak_tflops(name)
    for direction, calls in pairs.items():
        product, after, ours = map(us, calls)
        share = f"{flops / ours / 1e6 / peak:.0%} of {peak} TFLOP/s" if peak else "peak not known"
        print(f"{direction:10} torch {product:7.1f} + {after:6.1f} = {product + after:7.1f} µs   ours {ours:7.1f} µs, "
              f"{share}")

    def gradients(function, *given):
        given = [t.detach().requires_grad_() for t in given[:3]] + [given[3]]
        out = function(*given[:3])
        return [out.detach(), *torch.autograd.grad(out, given[:3], given[3])]

    few = [x[: options.check], up, down, g[: options.check]]
    exact = [few[0], up.bfloat16(), down.bfloat16(), few[3]]
    truth = gradients(relu_squared_mlp_eager, *(t.double() for t in exact))
    print(f"{'whole MLP':22}{'µs':>8}{'out':>10}{'dx':>10}{'dU':>10}{'dV':>10}")
    for name, function in (("compiled", torch.compile(relu_squared_mlp_eager, dynamic=False)),
                           ("ours", torch.compile(relu_squared_mlp, dynamic=False))):
        wrong = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(gradients(function, *few), truth)]
        both = event_us(lambda: gradients(function, x, up, down, g), options.samples)
        print(f"{name:22}{both:8.0f}" + "".join(f"{error:10.1e}" for error in wrong))


if __name__ == "__main__":
    main()
