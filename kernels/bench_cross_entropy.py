"""How fast and how exact kernels/cross_entropy.py is beside the same formula under torch.compile.

    python -m kernels.bench_cross_entropy                          65536 tokens, vocabulary 50304, width 768
    python -m kernels.bench_cross_entropy --tokens 32768 --rows 16384

"compiled" is the eager twin under torch.compile: what train_gpt.py's GPT.loss computes. Times, by CUDA events, are of
forward and backward together, and of forward alone without gradients (validation), with all casts of weights; the
profiler tells products from other kernels. Errors are relative norms against float32 on the first --check tokens.
Memory is what a call allocates beyond its arguments, at its peak.
"""

import argparse

import torch
import torch.nn.functional as F
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from . import cross_entropy
from .bench import event_us
from .cross_entropy import softcapped_cross_entropy, softcapped_cross_entropy_eager
from .launches import need_gpu

CAP = 23.0, 5.0, 7.5
PRODUCTS = ("gemm", "nvjet", "cutlass", "xmma", "splitk")  # in the names of cuBLAS's kernels


def contenders() -> dict:
    """Name -> (function of x, weight, targets; FAST_TANH)."""
    compiled = torch.compile(softcapped_cross_entropy_eager, dynamic=False)

    def fused(precision):
        return lambda *given: softcapped_cross_entropy(*given, cap=CAP, precision=precision, engine="fused")

    return {"compiled": (lambda *given: compiled(*given, CAP), False),
            "bfloat16": (fused("bfloat16"), True), "bfloat16, exact tanh": (fused("bfloat16"), False),
            "fp8": (fused("fp8"), True), "fp8, exact tanh": (fused("fp8"), False)}


def tensors(tokens: int, vocabulary: int, width: int) -> list:
    """x of unit mean square, weight that gives logits a deviation of 3, and targets."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = F.rms_norm(torch.randn(tokens, width, generator=generator, device="cuda"), (width,)).bfloat16()
    weight = torch.randn(vocabulary, width, generator=generator, device="cuda") * 3 / width**0.5
    targets = torch.randint(vocabulary, (tokens,), generator=generator, device="cuda")
    return [x.requires_grad_(), weight.requires_grad_(), targets]


def gradients(function, x, weight, targets) -> list:
    """[loss, dx, dW]"""
    loss = function(x, weight, targets)
    return [loss.detach(), *torch.autograd.grad(loss, (x, weight))]


def split_ms(call) -> tuple[float, float]:
    """Milliseconds of one call on the GPU: in products, in other kernels."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    times = [(event.name.lower(), (event.time_range.end - event.time_range.start) / 1000)
             for event in profiler.events() if event.device_type == DeviceType.CUDA
             and not getattr(event, "is_user_annotation", False)]
    products = sum(ms for name, ms in times if any(part in name for part in PRODUCTS))
    return products, sum(ms for _, ms in times) - products


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench_cross_entropy", description=__doc__.split("\n")[0])
    for name, value, text in (("tokens", 65536, "a pass"), ("vocabulary", 50304, "tokens known"),
                              ("width", 768, "of x"), ("check", 2048, "tokens for errors"),
                              ("rows", cross_entropy.ROWS, "tokens whose logits exist at a time"),
                              ("samples", 10, "of every time; their median counts")):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{text} (default {value})")
    options = parser.parse_args(arguments)
    need_gpu(parser)
    cross_entropy.ROWS = options.rows
    given = tensors(options.tokens, options.vocabulary, options.width)
    few = [given[0].detach()[: options.check].clone().requires_grad_(), given[1], given[2][: options.check]]
    truth = gradients(lambda x, *rest: softcapped_cross_entropy_eager(x.float(), *rest, CAP), *few)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {options.tokens} tokens × {options.vocabulary}, "
          f"width {options.width}, {options.rows} rows at a time")
    print(f"{'':22}{'ms':>8}{'products':>10}{'others':>8}{'validation':>12}{'GB':>7}{'loss':>10}{'dx':>10}{'dW':>10}"
          f"{'cos dx':>9}{'cos dW':>9}")
    for name, (function, cross_entropy.FAST_TANH) in contenders().items():
        try:
            found = gradients(function, *few)
            wrong = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, truth)]
            cosines = [F.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()
                       for a, b in zip(found[1:], truth[1:])]
            del found

            def both():
                gradients(function, *given)

            def validation():
                with torch.no_grad():
                    function(*given)

            both()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            both()
            peak = (torch.cuda.max_memory_allocated() - before) / 1e9
            total, alone = event_us(both, options.samples) / 1e3, event_us(validation, options.samples) / 1e3
            print(f"{name:22}{total:8.2f}{'{:10.2f}{:8.2f}'.format(*split_ms(both))}{alone:12.2f}{peak:7.2f}"
                  + "".join(f"{error:10.1e}" for error in wrong) + "".join(f"{cosine:9.5f}" for cosine in cosines))
        except Exception as error:  # the others can still be measured
            print(f"{name:22}{type(error).__name__}: {str(error).splitlines()[0][:200]}")


if __name__ == "__main__":
    main()
