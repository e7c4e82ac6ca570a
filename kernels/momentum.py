"""Momentum, Nesterov and second moment of a bank of matrices in one pass over memory, or in two.

    B ← B + (1 − μ)(G − B),  M = G + μ(B − G), or B without Nesterov
    plain      U = M                                             16 bytes an element instead of 24
    full       V ← β₂V + (1 − β₂)G²,      U = M / (√V + ε)       24 instead of 72 (Muon², arXiv 2604.09967)
    factored   r, c ← means of V,         U = M / (√(r_i c_j / mean r) + ε)     20 instead of 64 (Muon²-F)

Bytes are those of float32 gradients: what must be read and written (G, B and V in; B, V and U out) against the eager
twin's calls. The factored form reads G twice, since a matrix's last row has a say in its first entry: the first pass
leaves row sums and column sums of G² by tiles, a small launch adds them up, updates r and c and sums r for its mean,
the second pass is the plain one with a division. Without atomics: the same input gives the same bits.

Momentum is kept in the dtype of the gradients and rounded to it before Nesterov reads it, as in the twin.
Eager twin: optim/second_moment.py.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

FLAT = 2048  # elements of a program that need not know rows from columns
ROWS, COLUMNS = 64, 128  # a tile of the factored form: its sums are 1/64 + 1/128 of what it reads
SUMMED = 256  # rows or columns that one program adds up


@triton.jit
def _lerp(start, end, weight):
    """start + weight · (end − start), from the nearer end, as torch.lerp."""
    return tl.where(weight < 0.5, start + weight * (end - start), end - (end - start) * (1 - weight))


@triton.jit
def _momentum(grads, momentum, at, inside, mu, rest, NESTEROV: tl.constexpr):
    """Updates the momentum at `at`; returns the gradient and M there, both float32."""
    g = tl.load(grads + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(momentum + at, mask=inside, other=0.0).to(tl.float32)
    b = _lerp(b, g, rest).to(momentum.dtype.element_ty)
    tl.store(momentum + at, b, mask=inside)
    b = b.to(tl.float32)
    if NESTEROV:
        b = _lerp(g, b, mu)
    return g, b


@triton.jit
def _flat_kernel(grads, momentum, moment, update, count, mu, rest, keep, gain, eps, NESTEROV: tl.constexpr,
                 FULL: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK elements, whatever they belong to: programs (count / BLOCK)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g, u = _momentum(grads, momentum, at, inside, mu, rest, NESTEROV)
    if FULL:
        v = keep * tl.load(moment + at, mask=inside, other=0.0) + gain * (g * g)
        tl.store(moment + at, v, mask=inside)
        u = u / (tl.sqrt(v) + eps)
    tl.store(update + at, u.to(update.dtype.element_ty), mask=inside)


@triton.jit
def _tile(n, m, row_blocks, column_blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Matrix, row block, column block, rows and columns of this program; neighbours in a row are neighbours in time."""
    index = tl.program_id(0)
    z = (index // (row_blocks * column_blocks)).to(tl.int64)
    row, column = index // column_blocks % row_blocks, index % column_blocks
    return z, row, column, row * ROWS + tl.arange(0, ROWS), column * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def _squares_kernel(grads, row_sums, column_sums, n, m, row_blocks, column_blocks, ROWS: tl.constexpr,
                    COLUMNS: tl.constexpr):
    """Sums of G² over the rows and the columns of one tile: programs (batch · row blocks · column blocks)."""
    z, row, column, rows, columns = _tile(n, m, row_blocks, column_blocks, ROWS, COLUMNS)
    inside = (rows < n)[:, None] & (columns < m)[None, :]
    g = tl.load(grads + (z * n + rows[:, None]) * m + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    squares = g * g
    tl.store(row_sums + (z * column_blocks + column) * n + rows, tl.sum(squares, 1), mask=rows < n)
    tl.store(column_sums + (z * row_blocks + row) * m + columns, tl.sum(squares, 0), mask=columns < m)


@triton.jit
def _total(sums, at, inside, z, blocks, length, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for block in range(blocks):
        total += tl.load(sums + (z * blocks + block) * length + at, mask=inside, other=0.0)
    return total


@triton.jit
def _moments_kernel(row_sums, column_sums, row_moment, column_moment, totals, n, m, row_blocks, column_blocks, parts,
                    keep, gain, BLOCK: tl.constexpr):
    """r and c, and sums of r by BLOCK: programs (batch, parts = n / BLOCK for rows, then m / BLOCK for columns)."""
    z, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if part < parts:
        at = part * BLOCK + tl.arange(0, BLOCK)
        mean = _total(row_sums, at, at < n, z, column_blocks, n, BLOCK) / m
        moment = keep * tl.load(row_moment + z * n + at, mask=at < n, other=0.0) + gain * mean
        tl.store(row_moment + z * n + at, moment, mask=at < n)
        tl.store(totals + z * parts + part, tl.sum(moment))
    else:
        at = (part - parts) * BLOCK + tl.arange(0, BLOCK)
        mean = _total(column_sums, at, at < m, z, row_blocks, m, BLOCK) / n
        moment = keep * tl.load(column_moment + z * m + at, mask=at < m, other=0.0) + gain * mean
        tl.store(column_moment + z * m + at, moment, mask=at < m)


@triton.jit
def _factored_kernel(grads, momentum, row_moment, column_moment, totals, update, n, m, row_blocks, column_blocks,
                     parts, mu, rest, eps, NESTEROV: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
                     COLUMNS: tl.constexpr):
    """Momentum and U of one tile, PARTS ≥ parts: programs as in _squares_kernel."""
    z, row, column, rows, columns = _tile(n, m, row_blocks, column_blocks, ROWS, COLUMNS)
    part = tl.arange(0, PARTS)
    mean = tl.sum(tl.load(totals + z * parts + part, mask=part < parts, other=0.0)) / n
    r = tl.load(row_moment + z * n + rows, mask=rows < n, other=0.0)
    c = tl.load(column_moment + z * m + columns, mask=columns < m, other=0.0)
    root = tl.sqrt(r / tl.where(mean > 0, mean, 1.0))[:, None] * tl.sqrt(c)[None, :]
    at = (z * n + rows[:, None]) * m + columns[None, :]
    inside = (rows < n)[:, None] & (columns < m)[None, :]
    g, u = _momentum(grads, momentum, at, inside, mu, rest, NESTEROV)
    tl.store(update + at, (u / (root + eps)).to(update.dtype.element_ty), mask=inside)


def momentum_update(
    grads: Tensor,
    momentum: Tensor,
    moments: Sequence[Tensor] = (),
    *,
    mu: float,
    nesterov: bool = True,
    beta2: float = 0.95,
    eps: float = 1e-10,
) -> Tensor:
    """U, of the shape and dtype of `grads`; updates momentum and moments in place. All tensors are contiguous.

    grads     (…, n, m), float32, bfloat16 or float16; read only        momentum  like it
    moments   (), or (V,) of shape (…, n, m), or (r, c) of shapes (…, n) and (…, m), float32
    """
    n, m = grads.shape[-2:]
    expected = {0: [], 1: [grads.shape], 2: [grads.shape[:-1], grads.shape[:-2] + (m,)]}.get(len(moments))
    if momentum.shape != grads.shape or [v.shape for v in moments] != expected:
        shapes = ", ".join(str(tuple(t.shape)) for t in (grads, momentum, *moments))
        raise ValueError(f"momentum_update: shapes {shapes} do not belong together")
    if momentum.dtype != grads.dtype or any(v.dtype != torch.float32 for v in moments):
        raise ValueError("momentum_update needs momentum in the gradients' dtype and float32 moments; got "
                         f"{', '.join(str(t.dtype) for t in (grads, momentum, *moments))}")
    if not all(t.is_contiguous() for t in (grads, momentum, *moments)):
        raise ValueError("momentum_update needs contiguous tensors")
    update = torch.empty_like(grads)
    if not grads.numel():
        return update
    mu, rest, keep, gain, eps = float(mu), float(1 - mu), float(beta2), float(1 - beta2), float(eps)
    if len(moments) < 2:
        moment = moments[0] if moments else grads  # not read where there is none
        _flat_kernel[(triton.cdiv(grads.numel(), FLAT),)](
            grads, momentum, moment, update, grads.numel(), mu, rest, keep, gain, eps, NESTEROV=nesterov,
            FULL=len(moments) == 1, BLOCK=FLAT, num_warps=8)
        return update
    rows, columns = moments
    batch, row_blocks, column_blocks = rows.numel() // n, triton.cdiv(n, ROWS), triton.cdiv(m, COLUMNS)
    parts = triton.cdiv(n, SUMMED)
    scratch = dict(dtype=torch.float32, device=grads.device)
    row_sums = torch.empty(batch, column_blocks, n, **scratch)
    column_sums = torch.empty(batch, row_blocks, m, **scratch)
    totals = torch.empty(batch, parts, **scratch)
    tiles = (batch * row_blocks * column_blocks,)
    _squares_kernel[tiles](grads, row_sums, column_sums, n, m, row_blocks, column_blocks, ROWS=ROWS, COLUMNS=COLUMNS,
                           num_warps=8)
    _moments_kernel[(batch, parts + triton.cdiv(m, SUMMED))](
        row_sums, column_sums, rows, columns, totals, n, m, row_blocks, column_blocks, parts, keep, gain, BLOCK=SUMMED,
        num_warps=4)
    _factored_kernel[tiles](
        grads, momentum, rows, columns, totals, update, n, m, row_blocks, column_blocks, parts, mu, rest, eps,
        NESTEROV=nesterov, PARTS=triton.next_power_of_2(parts), ROWS=ROWS, COLUMNS=COLUMNS, num_warps=8)
    return update
