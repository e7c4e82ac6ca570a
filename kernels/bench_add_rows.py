"""How fast kernels/add_rows.py is as the backward of an embedding look-up, beside torch's index_add_, by which cut.

    python -m kernels.bench_add_rows            the cut of the file, torch, and the errors of both
    python -m kernels.bench_add_rows --tune     candidates first; the best, as CUT wants it

x is bfloat16. 50304 rows are drawn like words (the most frequent is 5 % of all), 251520 uniformly, like hashes. Times
are the GPU's own, medians: of both by triton.testing.do_bench, which empties the L2 cache; of ours by the profiler too,
with x just written, as in training. Bytes are those that must move: x and rows are read, rows of the table that are met
read and written, once each. Errors are the largest against float64.
"""

import argparse

import torch
from torch import Tensor
from triton.testing import do_bench

from . import add_rows as module
from .add_rows import Cut, add_rows, add_rows_eager
from .launches import kernel_us, need_gpu

SIZES = ((50304, 768), (50304, 512), (251520, 768), (251520, 512))  # (rows of the table, width)
# None spills for sm_90 (triton 3.6, 3.7), all add four numbers an instruction.
CUTS = (*(Cut(rows, columns, warps) for columns in (128, 256, 512) for rows, warps in ((4, 4), (8, 4), (16, 8))),
        Cut(2, 256, 1), Cut(8, 128, 2), Cut(1, 512, 4), Cut(4, 1024, 8), Cut(evict=""), Cut(16, warps=8, evict=""))


def drawn(n: int, count: int, device: str = "cuda") -> Tensor:
    """n of count rows: uniform of many, else the k-th of them in proportion to 1 / (k + 1), in a mixed order."""
    generator = torch.Generator(device).manual_seed(0)
    if count > 100000:
        return torch.randint(count, (n,), generator=generator, device=device)
    chances = 1 / torch.arange(2.0, count + 2, device=device)
    mixed = torch.randperm(count, generator=generator, device=device)
    return mixed[torch.multinomial(chances, n, replacement=True, generator=generator)]


def given(n: int, count: int, width: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """rows and x"""
    generator = torch.Generator("cuda").manual_seed(1)
    return drawn(n, count), torch.randn(n, width, generator=generator, device="cuda").to(dtype)


def moved(rows: Tensor, x: Tensor) -> int:
    return rows.nbytes + x.nbytes + 2 * 4 * x.size(1) * len(rows.unique())


def ours_us(table: Tensor, rows: Tensor, x: Tensor, samples: int) -> float:
    source = x.clone()

    def work():
        x.copy_(source)
        add_rows(table, rows, x)

    return kernel_us(work, ("add_rows",), samples)["add_rows"][0]


def show(n: int, count: int, width: int, samples: int) -> None:
    table, (rows, x) = torch.zeros(count, width, device="cuda"), given(n, count, width)
    size, truth = moved(rows, x), table.double()
    print(f"table ({count}, {width}), {len(rows.unique())} of its rows met, {size / 1e6:.0f} MB")
    add_rows_eager(truth, rows, x)
    for name, function in (("torch, with its cast", add_rows_eager), ("ours", add_rows)):
        function(table.zero_(), rows, x)
        error = ((table - truth).abs().max() / truth.abs().max()).item()
        us = 1e3 * do_bench(lambda: function(table, rows, x), warmup=20, rep=60, return_mode="median")
        print(f"  {name:24}{us:9.1f} µs{size / us / 1e3:9.0f} GB/s   error {error:.2e}")
    us = ours_us(table, rows, x, samples)
    print(f"  {'ours, x just written':24}{us:9.1f} µs{size / us / 1e3:9.0f} GB/s", flush=True)


def tune(n: int, samples: int) -> None:
    """Tries the candidates and leaves in CUT the one that takes the shortest time over all sizes."""
    cases = [(torch.zeros(count, width, device="cuda"), *given(n, count, width)) for count, width in SIZES]
    times = []
    for cut in CUTS:
        module.CUT = cut
        us = [ours_us(*case, samples) for case in cases]
        times.append((sum(us), cut))
        print(f"  {' '.join(f'{one:8.1f}' for one in us)} µs  {cut}", flush=True)
    module.CUT = min(times, key=lambda pair: pair[0])[1]
    print(f"CUT = {module.CUT}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench_add_rows", description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=65536, help="to add (default 65536)")
    parser.add_argument("--samples", type=int, default=30, help="of every time; their median counts (default 30)")
    parser.add_argument("--tune", action="store_true", help="try other cuts first, and take the best")
    options = parser.parse_args(arguments)
    need_gpu(parser)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {options.rows} rows, bfloat16")
    if options.tune:
        tune(options.rows, options.samples)
    for count, width in SIZES:
        show(options.rows, count, width, options.samples)


if __name__ == "__main__":
    main()
