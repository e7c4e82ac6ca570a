"""Adds to rows of a table where they lie: the backward of an embedding look-up, in one launch.

    table[rows[i]] += x[i],   i = 0 … n − 1;   table (N, width) float32

torch's index_add_ wants x in float32: one pass reads x and writes it so, and index_add_ reads that: 10 bytes for each
number of bfloat16 instead of 2 (65,536 rows of 768: 503 MB instead of 101). Here x is read once, as it is. Rows of the
table that are met are read and written on either route.

The L2 cache adds, in float32, four numbers an instruction where width is a multiple of four and not tiny: Triton turns
tl.atomic_add into atom.global.add.v4.f32, and ptxas that into REDG.E.ADD.F32x4, as nobody reads its result. A thread
loads four numbers of x at a time, of bfloat16 too (max_contiguous): with eight they would have to pass through shared
memory to the threads that add them. Blocks of columns are the outer dimension of the grid and x is to leave the L2
cache first, so that frequent rows stay in it.

The sums of a row come in no fixed order, as index_add_'s on a GPU: the same input gives results that differ in their
last bits.

Eager twin: add_rows_eager. Times: python -m kernels.bench_add_rows
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Cut:
    """What a program adds: rows of x by columns."""

    rows: int = 2
    columns: int = 512  # at most
    warps: int = 2
    evict: str = "evict_first"  # which place in the L2 cache x has; "" is as everything else


CUT = Cut()  # the quickest of nine on an H200, 65,536 rows of 512 (records/studies/gpt-search/add_rows.txt)


def add_rows_eager(table: Tensor, rows: Tensor, x: Tensor) -> None:
    """As add_rows, in plain torch, of any dtypes."""
    table.index_add_(0, rows, x.to(table.dtype))


@triton.jit
def _add_rows_kernel(table, rows, x, n, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                     EVICT: tl.constexpr):
    """Programs (n / ROWS, WIDTH / COLUMNS)."""
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.max_contiguous(tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS), 4)[None, :]
    row = tl.load(rows + i, mask=i < n, other=0)
    inside = (i < n)[:, None] & (column < WIDTH)
    value = tl.load(x + i[:, None] * WIDTH + column, mask=inside, other=0.0, eviction_policy=EVICT)
    tl.atomic_add(table + row[:, None] * WIDTH + column, value.to(tl.float32), mask=inside, sem="relaxed")


def add_rows(table: Tensor, rows: Tensor, x: Tensor) -> None:
    """table[rows[i]] += x[i], in place. All tensors are contiguous.

    table   (N, width) float32        rows   (n,) int64, each of 0 … N − 1, which is not checked; they may repeat
    x       (n, width) bfloat16 or float32; read only
    """
    if table.ndim != 2 or table.dtype != torch.float32 or not table.is_contiguous():
        raise ValueError(f"add_rows needs a contiguous table (N, width) of torch.float32; got {_said(table)}")
    if rows.ndim != 1 or rows.dtype != torch.int64 or not rows.is_contiguous():
        raise ValueError(f"add_rows needs contiguous rows (n,) of torch.int64; got {_said(rows)}")
    shape = len(rows), table.size(1)
    if x.shape != shape or x.dtype not in DTYPES or not x.is_contiguous():
        raise ValueError(f"add_rows needs a contiguous x {shape} of torch.bfloat16 or torch.float32; got {_said(x)}")
    if x.numel():
        grid, constants = _grid(*shape)
        _add_rows_kernel[grid](table, rows, x, len(rows), **constants)


def _said(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}, strides {tensor.stride()}, {tensor.dtype}"


def _grid(n: int, width: int) -> tuple[tuple[int, int], dict]:
    """(grid, constants and options) of a launch, by CUT."""
    columns = min(CUT.columns, triton.next_power_of_2(width))
    return (triton.cdiv(n, CUT.rows), triton.cdiv(width, columns)), dict(
        WIDTH=width, ROWS=CUT.rows, COLUMNS=columns, EVICT=CUT.evict, num_warps=CUT.warps)
