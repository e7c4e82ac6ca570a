"""How fast kernels/attention.py is beside torch's varlen FlashAttention, on documents as long as the web's.

    python -m kernels.bench_attention                             windows of 112, 448 and 1792, heads of 128
    python -m kernels.bench_attention --tune --windows 448 1792   candidates: the sum over the windows, then the best
    python -m kernels.bench_attention --heads 4 --head-dim 64 --tokens 32768

Times are medians by CUDA events, milliseconds; those of single kernels come from the profiler. A visible pair, of a
token and one that it sees, takes 4 · head_dim FLOPs a head forward, 10 backward: TFLOP/s are of those alone, for both,
whatever is computed beside them. `tiles` says how many pairs lie in the tiles that are computed, by one that is
visible. q, k and v are contiguous, as train_gpt.py's are. What is best goes into CUTS.
"""

import argparse
import math

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from . import attention as module
from .attention import Cut, attention, attention_eager, bounds
from .launches import kernel_us, need_gpu

SCALE, LONGEST = 0.12, 2048
KERNELS = ("forward", "dq", "dkdv")
# None spills for sm_90 with heads of 128 (triton 3.6). With at most 128 registers of 256 threads, or 255 of 128, and at
# most 113 KB of shared memory two programs fit on a multiprocessor.
CANDIDATES = {
    "forward": (Cut(stages=3), Cut(stages=3, branch=False), Cut(), Cut(keys=32, stages=3),
                Cut(queries=128, warps=8, registers=128), Cut(queries=128, warps=8, registers=128, branch=False)),
    "dq": (Cut(), Cut(branch=False), Cut(keys=32, registers=168), Cut(keys=32, stages=3), Cut(queries=128, warps=8),
           Cut(queries=128, keys=128, warps=8)),
    "dkdv": (Cut(branch=False), Cut(), Cut(stages=3, branch=False), Cut(queries=32, stages=3),
             Cut(keys=128, warps=8, stages=3, branch=False), Cut(keys=128, warps=8)),
}


def documents_of(tokens: int, seed: int = 0) -> Tensor:
    """cu_seqlens (documents + 1,) int32. Lengths are log-normal; the longer ones are cut into pieces of 2048, as the
    loader does. 65,536 tokens with seed 0 are 84 documents, mean 780, median 283."""
    generator, edges = torch.Generator().manual_seed(seed), [0]
    while edges[-1] < tokens:
        length = round(200 * math.exp(1.8 * torch.randn((), generator=generator).item()))
        while length > 0 and edges[-1] < tokens:
            part = min(length, LONGEST, tokens - edges[-1])
            edges.append(edges[-1] + part)
            length -= part
    return torch.tensor(edges, dtype=torch.int32)


def pairs(limits: Tensor, window: int) -> int:
    """Visible pairs of a token and one that it sees."""
    token = torch.arange(limits.size(1), device=limits.device)
    return int((token + 1 - torch.maximum(limits[0], token - window + 1)).sum())


def tiled(limits: Tensor, window: int, cut: Cut, by_keys: bool) -> int:
    """Pairs in the tiles that a kernel with this cut computes; by_keys: as dkdv does."""
    tokens = limits.size(1)
    step, width = (cut.keys, cut.queries) if by_keys else (cut.queries, cut.keys)
    first = torch.arange(0, tokens, step, device=limits.device)
    last = (first + step).clamp(max=tokens) - 1
    if by_keys:
        begin, end = first, torch.minimum(limits[1][last], last + window)
    else:
        begin, end = torch.maximum(limits[0][first], first - window + 1), last + 1
    return int((-(-end // width) - begin // width).sum()) * cut.queries * cut.keys


class Case:
    """A stream of documents, and q, k, v and dy for it."""

    def __init__(self, tokens: int, heads: int, head_dim: int, device: str = "cuda"):
        generator = torch.Generator(device).manual_seed(0)
        made = torch.randn(tokens, 4, heads, head_dim, generator=generator, device=device)
        made[:, :2] = F.rms_norm(made[:, :2], (head_dim,))
        made = made.bfloat16()
        self.q, self.k, self.v, self.dy = (x.contiguous() for x in made.unbind(1))
        for x in (self.q, self.k, self.v):
            x.requires_grad_()
        self.cu_seqlens = documents_of(tokens).to(device)
        self.limits = bounds(self.cu_seqlens, tokens)
        self.bound = 1.02 * SCALE * head_dim  # 2 %: q and k are rounded after their norm

    def ours(self, window: int) -> Tensor:
        return attention(self.q, self.k, self.v, self.limits, window, scale=SCALE, bound=self.bound)

    def theirs(self, window: int) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(self.q, self.k, self.v, self.cu_seqlens, self.cu_seqlens, LONGEST, LONGEST, scale=SCALE,
                           window_size=(window - 1, 0))

    def truth(self, window: int) -> list[Tensor]:
        given = [x.detach().double().requires_grad_() for x in (self.q, self.k, self.v)]
        y = attention_eager(*given, self.cu_seqlens, window, SCALE)
        return [y.detach(), *torch.autograd.grad(y, given, self.dy.double())]

    def results(self, function, window: int) -> list[Tensor]:
        y = function(window)
        return [y.detach(), *torch.autograd.grad(y, (self.q, self.k, self.v), self.dy)]


def kernel_ms(case: Case, windows: list[int], samples: int,
              wanted: tuple[str, ...] = KERNELS) -> dict[str, list[float]]:
    """Kernel -> the GPU's own milliseconds for each window, the median of `samples` calls."""

    def work():
        for window in windows:
            case.results(case.ours, window)

    found = kernel_us(work, tuple(f"attention_{kernel}" for kernel in wanted), samples)
    found = {kernel: found[f"attention_{kernel}"] for kernel in wanted}
    for kernel, times in found.items():
        if len(times) != len(windows):
            raise RuntimeError(f"the profiler saw {len(times)} launches of {kernel} for {len(windows)} windows; change "
                               "--samples")
    return {kernel: [us / 1e3 for us in times] for kernel, times in found.items()}


def show_errors(heads: int, head_dim: int, windows: list[int]) -> None:
    """Root mean square of the errors, by that of the truth, on a stream short enough for float64."""
    case = Case(8192, heads, head_dim)
    print("errors against float64, 8192 tokens:      y        dq        dk        dv")
    for window in windows:
        truth = case.truth(window)
        for name, function in (("varlen_attn", case.theirs), ("ours", case.ours)):
            found = [((a.double() - b).square().mean() / b.square().mean()).sqrt().item()
                     for a, b in zip(case.results(function, window), truth)]
            print(f"  window {window:5} {name:12}          " + "".join(f"{error:10.2e}" for error in found))


def show(case: Case, windows: list[int], samples: int) -> None:
    """Both, forward and with backward, and each of our kernels."""
    _, heads, head_dim = case.q.shape
    single = kernel_ms(case, windows, samples)
    for i, window in enumerate(windows):
        visible = pairs(case.limits, window)
        flops = visible * heads * head_dim
        print(f"window {window}: {visible / case.q.size(0):.0f} keys a token")
        for name, function in (("varlen_attn", case.theirs), ("ours", case.ours)):
            with torch.no_grad():
                forward = triton.testing.do_bench(lambda: function(window), return_mode="median")
            both = triton.testing.do_bench(lambda: case.results(function, window), return_mode="median")
            print(f"  {name:12} forward {forward:7.3f} ms {4e-9 * flops / forward:5.0f} TFLOP/s   and backward "
                  f"{both:7.3f} ms {14e-9 * flops / both:5.0f} TFLOP/s", flush=True)
        for kernel, products in zip(KERNELS, (2, 3, 4)):
            ms, cut = single[kernel][i], module.CUTS[kernel]
            share, rate = tiled(case.limits, window, cut, kernel == "dkdv") / visible, 2e-9 * products * flops / ms
            print(f"    {kernel:8}{ms:8.3f} ms, its {products} products {rate:5.0f} TFLOP/s, with all of its tiles "
                  f"{rate * share:5.0f}; tiles {share:.2f}")


def tune(case: Case, windows: list[int], samples: int) -> None:
    """The candidates of one kernel after the other, by the sum over the windows; CUTS becomes the best."""
    for kernel, candidates in CANDIDATES.items():
        before, times = module.CUTS[kernel], []
        for cut in candidates:
            module.CUTS[kernel] = cut
            try:
                found = kernel_ms(case, windows, samples, (kernel,))[kernel]
            except Exception as error:  # the others can still be measured
                print(f"  {kernel:8} {cut}: {type(error).__name__}: {str(error).splitlines()[0][:120]}", flush=True)
                continue
            times.append((sum(found), cut))
            print(f"  {kernel:8}{times[-1][0]:8.3f} ms ({', '.join(f'{ms:.3f}' for ms in found)})  {cut}", flush=True)
        module.CUTS[kernel] = min(times, key=lambda pair: pair[0])[1] if times else before
    print(f"best: CUTS = {module.CUTS}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench_attention", description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=65536, help="of the stream (default 65536)")
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--head-dim", type=int, default=128, choices=(64, 128))
    parser.add_argument("--windows", type=int, nargs="+", default=[112, 448, 1792], help="tokens looked back over")
    parser.add_argument("--samples", type=int, default=20, help="of every kernel; their median counts (default 20)")
    parser.add_argument("--tune", action="store_true", help="try other cuts first, and take the best")
    options = parser.parse_args(arguments)
    need_gpu(parser)
    case = Case(options.tokens, options.heads, options.head_dim)
    lengths = case.cu_seqlens.diff().float()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}: {options.tokens} "
          f"tokens in {len(lengths)} documents (mean {lengths.mean():.0f}, median {lengths.median():.0f}), "
          f"{options.heads} heads of {options.head_dim}")
    if options.tune:
        tune(case, options.windows, options.samples)
    show_errors(options.heads, options.head_dim, options.windows)
    show(case, options.windows, options.samples)


if __name__ == "__main__":
    main()
