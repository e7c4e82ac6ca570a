"""Unit rows in half precision: U = diag(1/r) X and r, for X of any strides, dtype and scale, in one pass where rows
are contiguous and two where columns are (a transposed tall matrix: U is written wide).

A cast that every product needs anyway thus also normalises, transposes and pads: X is read in its own dtype, no copy of
it is made. r is found by way of the row's largest entry, so that squares neither overflow nor vanish (1e30, 1e-30).
A NaN or an infinity makes its row of U NaN. Eager twin: the first lines of `_aol` in optim/polar.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import chained, launch


@triton.jit
def _norm(largest, squares):
    """‖x‖ from the largest |x| and Σ (x / largest)², and the factor that makes x / largest a unit vector (0 of 0)."""
    return largest * tl.sqrt(squares), tl.where(squares == 0, 0.0, 1 / tl.sqrt(tl.where(squares == 0, 1.0, squares)))


@triton.jit
def _rows_kernel(x, unit, norms, n, m, x_batch, x_row, x_column, N, M, CHUNK: tl.constexpr,
                 CHAINED: tl.constexpr):
    """One row of one matrix: programs (batch, N). Rows n … N are zeros, columns m … M too."""
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    z, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    source = x + z * x_batch + row * x_row
    target = unit + (z * N + row) * M
    columns = tl.arange(0, CHUNK)
    inside = row < n
    if M <= CHUNK:
        value = tl.load(source + columns.to(tl.int64) * x_column, mask=(columns < m) & inside, other=0.0).to(tl.float32)
        largest = tl.max(tl.abs(value))
        scaled = value / tl.where(largest == 0, 1.0, largest)
        norm, factor = _norm(largest, tl.sum(scaled * scaled))
        tl.store(target + columns, (scaled * factor).to(unit.dtype.element_ty), mask=columns < M)
    else:
        most = tl.zeros((CHUNK,), dtype=tl.float32)
        for start in range(0, m, CHUNK):
            at = start + columns
            value = tl.load(source + at.to(tl.int64) * x_column, mask=(at < m) & inside, other=0.0).to(tl.float32)
            most = tl.maximum(most, tl.abs(value))
        largest = tl.max(most)
        divisor = tl.where(largest == 0, 1.0, largest)
        squares = tl.zeros((CHUNK,), dtype=tl.float32)
        for start in range(0, m, CHUNK):
            at = start + columns
            value = tl.load(source + at.to(tl.int64) * x_column, mask=(at < m) & inside, other=0.0).to(tl.float32)
            squares += (value / divisor) * (value / divisor)
        norm, factor = _norm(largest, tl.sum(squares))
        for start in range(0, M, CHUNK):
            at = start + columns
            value = tl.load(source + at.to(tl.int64) * x_column, mask=(at < m) & inside, other=0.0).to(tl.float32)
            tl.store(target + at, (value / divisor * factor).to(unit.dtype.element_ty), mask=at < M)
    tl.store(norms + z * N + row, norm)


@triton.jit
def _column_statistics_kernel(x, largest, squares, n, m, x_batch, x_row, x_column, N, part, BLOCK: tl.constexpr,
                              CHAINED: tl.constexpr):
    """Rows of the logical n×m matrix lie along memory here: programs (batch, N / BLOCK, parts of `part` columns)."""
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    z = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    most = tl.zeros((BLOCK,), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    begin = tl.program_id(2) * part
    for start in range(begin, tl.minimum(begin + part, m), BLOCK):
        columns = start + tl.arange(0, BLOCK)
        where = x + z * x_batch + columns.to(tl.int64)[:, None] * x_column + rows.to(tl.int64)[None, :] * x_row
        value = tl.load(where, mask=(columns < m)[:, None] & (rows < n)[None, :], other=0.0).to(tl.float32)
        now = tl.maximum(most, tl.max(tl.abs(value), 0))
        divisor = tl.where(now == 0, 1.0, now)
        scaled = value / divisor[None, :]
        total = total * (most / divisor) * (most / divisor) + tl.sum(scaled * scaled, 0)
        most = now
    where = (z * tl.num_programs(2) + tl.program_id(2)) * N + rows
    tl.store(largest + where, most)
    tl.store(squares + where, total)


@triton.jit
def _transpose_kernel(x, unit, norms, largest, squares, n, m, x_batch, x_row, x_column, N, M, parts,
                      MOST_PARTS: tl.constexpr, BLOCK: tl.constexpr, CHAINED: tl.constexpr):
    """Unit rows of one BLOCK × BLOCK piece: programs (batch, N / BLOCK, M / BLOCK)."""
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    z = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    part = tl.arange(0, MOST_PARTS)
    where = (z * parts + part[:, None]) * N + rows[None, :]
    most = tl.load(largest + where, mask=part[:, None] < parts, other=0.0)
    top = tl.max(most, 0)
    divisor = tl.where(top == 0, 1.0, top)
    ratio = most / divisor[None, :]
    total = tl.sum(tl.load(squares + where, mask=part[:, None] < parts, other=0.0) * ratio * ratio, 0)
    norm, factor = _norm(top, total)
    source = x + z * x_batch + columns.to(tl.int64)[:, None] * x_column + rows.to(tl.int64)[None, :] * x_row
    value = tl.load(source, mask=(columns < m)[:, None] & (rows < n)[None, :], other=0.0).to(tl.float32)
    scaled = value / divisor[None, :] * factor[None, :]
    target = unit + (z * N + rows[:, None]) * M + columns[None, :]
    tl.store(target, tl.trans(scaled).to(unit.dtype.element_ty), mask=(columns < M)[None, :])
    if tl.program_id(2) == 0:
        tl.store(norms + z * N + rows, norm)


def unit_rows(x: Tensor, unit: Tensor, norms: Tensor, chain: bool = False) -> None:
    """U and r of x.

    x      (batch, n, m), any strides, float32, float16 or bfloat16; read only
    unit   (batch, N ≥ n, M ≥ m), contiguous, float16 or bfloat16: written, zero beyond n and m
    norms  (batch, N) float32, contiguous: written, zero beyond n
    chain  what is launched next waits for these kernels by itself (see kernels.chained)
    """
    batch, n, m = x.shape
    N, M = unit.shape[1:]
    if x.stride(2) <= x.stride(1) or n == 1:
        chunk = min(triton.next_power_of_2(M), 8192)
        warps = max(1, min(8, chunk // 512))
        launch(_rows_kernel, (batch, N), x, unit, norms, n, m, *x.stride(), N, M, CHUNK=chunk, num_warps=warps,
               **chained(chain))
        return
    block = min(64, triton.next_power_of_2(N & -N))  # N is a multiple of the tile, a power of two
    parts = max(1, min(16, m // 256))
    part = -(-m // (parts * block)) * block
    parts = -(-m // part)
    largest, squares = torch.empty(2, batch, parts, N, dtype=torch.float32, device=x.device)
    launch(_column_statistics_kernel, (batch, N // block, parts), x, largest, squares, n, m, *x.stride(), N, part,
           BLOCK=block, num_warps=4, **chained(chain))
    launch(_transpose_kernel, (batch, N // block, -(-M // block)), x, unit, norms, largest, squares, n, m, *x.stride(),
           N, M, parts, MOST_PARTS=16, BLOCK=block, num_warps=4, **chained(chain))
