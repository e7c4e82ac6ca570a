"""Orthogonalise matrices whose short side is at most 128: a list of any shapes in one launch, a program a matrix.

    X = diag(p) U       n×m, n ≤ m; p: powers of two, rows of U have a largest entry in [1, 2), in float16
    R = D U Uᵀ D        D = diag(d): AOL's scaling (arXiv 2512.04632, Turbo-Muon); optionally R ← R / min(1, ‖R²‖_F^½)
    every step          W = aI + bR + cR²,  Q ← WQ,  R ← WRWᵀ         (Gram Newton-Schulz, Dao-AILab 2026)
    O = Q D U

X is read twice, once from memory and once from the cache, O is written once; R, Q and W never leave the chip. In
separate products that takes 12 or more launches and moves 20 n×n matrices; at this size launches take the time.

Precision. W and Q are float16. R, whose rounding errors grow with the square of the slope, is a sum of two float16
matrices, and it is updated with the very W that goes into Q: rounding of W does no harm then, R stays the Gram matrix
of Q D U. Where the product of all slopes is above 200, Q is a sum of two as well. So no restart is needed: 21 products
of n×n for four steps (24 if steep) where R in plain float16 takes 13, but has a polar error of up to 1.12 times
(Turbo-Muon's four) or 3.6 times (minimax four) that of float32. Here it is at most 1.02 times for up to five steps,
1.04 for six: measured on a CPU, on the distributions of tests/matrices.py, short sides of 16 to 128.

The eager twin is optim.polar.Polar with normalize="aol"; this file imports nothing of ours but its package.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from . import why_not

SMALL = 128  # longest short side
_STEEP = 200  # product of the slopes at 0 above which Q is two float16 matrices too
_FIELDS = 8  # int64 numbers a matrix has in the table
_PLANS = 32  # lists of matrices whose table is remembered
_STAGING = 1 << 17  # int64 numbers of pinned memory for tables made while a CUDA graph is captured


@triton.jit
def _power_of_two(exponent):
    """2^(exponent − 127) for int32 exponents 1 … 254, the bits of a float32; 0 for exponent 0."""
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _split(x):
    """float32 -> float16 high and low parts whose sum is x to 2⁻²⁵ (absolute, for entries below 1)."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def _load(x, first, n, m, row_stride, column_stride, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
          DOWN: tl.constexpr):
    """Columns first … first + BLOCK_M of X: float32 (BLOCK_N, BLOCK_M), zeros outside; DOWN: columns are contiguous."""
    rows, columns = tl.arange(0, BLOCK_N), first + tl.arange(0, BLOCK_M)
    if DOWN:  # neighbouring threads must read neighbouring addresses: the last axis of the load is the contiguous one
        inside = (columns < m)[:, None] & (rows < n)[None, :]
        where = x + columns[:, None] * column_stride + rows[None, :] * row_stride
        return tl.trans(tl.load(where, mask=inside, other=0.0)).to(tl.float32)
    inside = (rows < n)[:, None] & (columns < m)[None, :]
    where = x + rows[:, None] * row_stride + columns[None, :] * column_stride
    return tl.load(where, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _coefficient(table, index):
    """The table begins with (a, b, c) of every step: a float32 in the low half of each int64."""
    return tl.load(table + index).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _orthogonalise(x, out, table, n, m, row_stride, column_stride, STEPS: tl.constexpr, BOUND: tl.constexpr,
                   STEEP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, DOWN: tl.constexpr,
                   STAGES: tl.constexpr):
    """One matrix X (n, m), n ≤ BLOCK_N and n ≤ m; O (n, m) is written densely, in the order in which X lies."""
    rows = tl.arange(0, BLOCK_N)
    diagonal = rows[:, None] == rows[None, :]

    # Rows are scaled by 2^(127 − exponent). How large a row gets is known at its end only, so what is summed up so far
    # is rescaled on the way, by powers of two: exact. Exponents of inf and NaN are the largest, and stay visible in u.
    gram = tl.zeros((BLOCK_N, BLOCK_N), dtype=tl.float32)
    exponent = tl.zeros((BLOCK_N,), dtype=tl.int32)
    for first in tl.range(0, m, BLOCK_M, num_stages=STAGES):
        chunk = _load(x, first, n, m, row_stride, column_stride, BLOCK_N, BLOCK_M, DOWN)
        largest = tl.max((chunk.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >> 23, 1)
        larger = tl.minimum(tl.maximum(exponent, largest), 253)
        shrink = _power_of_two(tl.maximum(127 + exponent - larger, 0))
        u = (chunk * _power_of_two(254 - larger)[:, None]).to(tl.float16)
        gram = tl.dot(u, tl.trans(u), gram * (shrink[:, None] * shrink[None, :]))
        exponent = larger

    # AOL scales row i of X by s_i = (Σ_j |XXᵀ|_ij)^-½, so row i of U by d_i = p_i s_i = (p_i / Σ_j |UUᵀ|_ij p_j)^½, in
    # which p may be relative to the largest: no norm is taken, nothing over- or underflows.
    p = _power_of_two(tl.maximum(127 + exponent - tl.max(exponent, 0), 1))
    sums = tl.sum(tl.abs(gram) * p[None, :], 1)
    # d ≤ 1, as the diagonal has entries ≥ 1, but in rows of zeros or of numbers below float32's normal ones. NaN stays.
    d = tl.sqrt(p / tl.where(sums < p, p, sums))
    r = gram * d[:, None] * d[None, :]

    # The first step's slopes are the steepest and cancel the most, so its R² is exact; later ones need not be.
    high, low = _split(r)
    square = tl.dot(low, high, tl.dot(high, low, tl.dot(high, high)))
    if BOUND:
        bound = tl.sqrt(tl.sqrt(tl.sum(square * square)))  # ≥ λ_max(R); at least 1/n unless X = 0
        bound = tl.where((bound > 1) | (bound < 1e-6), 1.0, bound)
        r, square, d = r / bound, square / (bound * bound), d / tl.sqrt(bound)
    a, b, c = _coefficient(table, 0), _coefficient(table, 1), _coefficient(table, 2)
    w = (tl.where(diagonal, a, 0.0) + b * r + c * square).to(tl.float16)
    q, q_low = w, tl.zeros((BLOCK_N, BLOCK_N), dtype=tl.float16)  # Q, or its high and low parts
    for step in tl.range(1, STEPS, num_stages=1):
        high, low = _split(r)
        high, low = _split(tl.dot(w, low, tl.dot(w, high)))
        r = tl.dot(low, tl.trans(w), tl.dot(high, tl.trans(w)))
        high = r.to(tl.float16)
        square = tl.dot(high, high)
        a, b, c = _coefficient(table, 3 * step), _coefficient(table, 3 * step + 1), _coefficient(table, 3 * step + 2)
        w = (tl.where(diagonal, a, 0.0) + b * r + c * square).to(tl.float16)
        if STEEP:
            q, q_low = _split(tl.dot(w, q_low, tl.dot(w, q)))
        else:
            q = tl.dot(w, q).to(tl.float16)

    q, q_low = _split((q.to(tl.float32) + q_low.to(tl.float32)) * d[None, :])
    scale = _power_of_two(254 - exponent)
    for first in tl.range(0, m, BLOCK_M, num_stages=STAGES):
        chunk = _load(x, first, n, m, row_stride, column_stride, BLOCK_N, BLOCK_M, DOWN)
        u = (chunk * scale[:, None]).to(tl.float16)
        o = tl.dot(q, u)
        if STEEP:
            o = tl.dot(q_low, u, o)
        o = o.to(out.dtype.element_ty)
        columns = first + tl.arange(0, BLOCK_M)
        if DOWN:
            inside = (columns < m)[:, None] & (rows < n)[None, :]
            tl.store(out + columns.to(tl.int64)[:, None] * n + rows[None, :], tl.trans(o), mask=inside)
        else:
            inside = (rows < n)[:, None] & (columns < m)[None, :]
            tl.store(out + rows.to(tl.int64)[:, None] * m + columns[None, :], o, mask=inside)


@triton.jit
def _small_polar_kernel(x, out, table, STEPS: tl.constexpr, BOUND: tl.constexpr, STEEP: tl.constexpr,
                        PATHS: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr):
    """Program i takes row i of the table. PATHS: a bit for every code path of the table's rows (see _rows)."""
    row = table + 3 * STEPS + tl.program_id(0).to(tl.int64) * 8
    path = tl.load(row + 6)
    for index in tl.static_range(16):
        if (PATHS >> index) & 1:
            if path == index:
                BLOCK_N: tl.constexpr = 16 << (index & 3)
                BLOCK_M: tl.constexpr = 64 if BLOCK_N == 128 else 128
                DOWN: tl.constexpr = (index & 4) != 0
                # loaded in here, because multiple_of marks the load: a promise must not reach the other paths
                offset, out_offset = tl.load(row), tl.load(row + 1)
                n, m = tl.load(row + 2).to(tl.int32), tl.load(row + 3).to(tl.int32)
                row_stride, column_stride = tl.load(row + 4), tl.load(row + 5)
                if index & 8:
                    offset, out_offset = tl.multiple_of(offset, VECTOR), tl.multiple_of(out_offset, VECTOR)
                    if DOWN:
                        n, column_stride = tl.multiple_of(n, VECTOR), tl.multiple_of(column_stride, VECTOR)
                        row_stride = 1
                    else:
                        m, row_stride = tl.multiple_of(m, VECTOR), tl.multiple_of(row_stride, VECTOR)
                        column_stride = 1
                _orthogonalise(x + offset, out + out_offset, table, n, m, row_stride, column_stride, STEPS, BOUND,
                               STEEP, BLOCK_N, BLOCK_M, DOWN, STAGES)


@dataclass(frozen=True)
class _Plan:
    """All a launch needs but the matrices. It depends on their shapes, strides and distances, not their contents."""

    table: Tensor  # int64, on the device: coefficients, then _FIELDS numbers for every matrix
    programs: int
    constants: dict
    elements: int  # of the output buffer
    places: list[tuple[int, bool]]  # each result: first element, and whether it lies transposed
    stream: int = 0
    ready: torch.cuda.Event | None = None


_plans: OrderedDict[tuple, _Plan] = OrderedDict()
_kept: list = []  # tables that captured CUDA graphs read: they must stay where they are
_staging: list[Tensor] = []  # pinned memory not yet given away; capturing forbids allocating it


def _rows(x: Tensor, base: int, first: int) -> tuple[np.ndarray, bool]:
    """The table's rows for the matrices in x (…, n, m), whose results start at element `first`; does x lie transposed?

    A row: offset from the address `base`, offset of the result, n, m, stride of rows, stride of columns, path, 0; all
    in elements, n ≤ m. Path: log2(padded n / 16) + 4 if columns are contiguous rather than rows + 8 if 16-byte loads
    are possible: contiguous by stride 1, and everything else divisible.
    """
    *batch, n, m = x.shape
    *batch_strides, row_stride, column_stride = x.stride()
    tall = n > m
    if tall:
        n, m, row_stride, column_stride = m, n, column_stride, row_stride
    down = 1 < n and row_stride < column_stride
    offsets = np.full(1, (x.data_ptr() - base) // x.element_size(), dtype=np.int64)
    for size, stride in zip(batch, batch_strides):
        offsets = (offsets[:, None] + np.arange(size, dtype=np.int64) * stride).ravel()
    fast, slow, length = (row_stride, column_stride, n) if down else (column_stride, row_stride, m)
    vector = 16 // x.element_size()
    aligned = (offsets % vector == 0) & (fast == 1) & (slow % vector == 0) & (length % vector == 0)
    size = max(4, (n - 1).bit_length()) - 4
    rows = np.zeros((len(offsets), _FIELDS), dtype=np.int64)
    rows[:, 0], rows[:, 1] = offsets, first + np.arange(len(offsets), dtype=np.int64) * (n * m)
    rows[:, 2:6] = n, m, row_stride, column_stride
    rows[:, 6] = size + 4 * down + 8 * aligned
    return rows, down != tall


def _upload(numbers: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, made without waiting for it; inside a captured CUDA graph, made anew by every replay."""
    if device.type != "cuda":
        return numbers
    if not torch.cuda.is_current_stream_capturing():
        if not _staging:
            _staging.append(torch.empty(_STAGING, dtype=torch.int64, pin_memory=True))
        return numbers.pin_memory().to(device, non_blocking=True)
    if not _staging or _staging[0].numel() < numbers.numel():
        raise RuntimeError("small_polar: these matrices are new and a CUDA graph is being captured: call it once with "
                           "matrices of the same shapes, strides and distances in memory before capturing")
    pinned, _staging[0] = _staging[0][: numbers.numel()], _staging[0][numbers.numel() :]
    pinned.copy_(numbers)
    _kept.append(pinned)
    return pinned.to(device, non_blocking=True)


def _make_plan(matrices: list[Tensor], coefficients) -> _Plan:
    rows, places, elements = [], [], 0
    for x in matrices:
        table, transposed = _rows(x, matrices[0].data_ptr(), elements)
        rows.append(table)
        places.append((elements, transposed))
        elements += -(-x.numel() // 64) * 64  # every result starts on a 128-byte line
    rows = np.concatenate(rows)
    header = np.asarray(coefficients, dtype=np.float32).view(np.int32).astype(np.int64).ravel()
    paths = np.unique(rows[:, 6])
    device = matrices[0].device
    table = _upload(torch.from_numpy(np.concatenate([header, rows.ravel()])), device)
    steep = math.prod(a for a, _, _ in coefficients) > _STEEP
    constants = dict(STEPS=len(coefficients), STEEP=steep, PATHS=int((1 << paths).sum()),
                     VECTOR=16 // matrices[0].element_size(), STAGES=3, num_warps=8 if (paths & 3).max() == 3 else 4)
    if device.type != "cuda":
        return _Plan(table, len(rows), constants, elements, places)
    stream = torch.cuda.current_stream()
    return _Plan(table, len(rows), constants, elements, places, stream.cuda_stream, stream.record_event())


def _plan(matrices: list[Tensor], coefficients) -> _Plan:
    """From the cache if a call with the same shapes, strides and distances has been made, as in a training loop."""
    first, device = matrices[0].data_ptr(), matrices[0].device
    key = (coefficients, matrices[0].dtype, device,
           tuple((x.data_ptr() - first, x.shape, x.stride()) for x in matrices))
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    plan = _plans.get(key)
    if plan is None:
        plan = _make_plan(matrices, coefficients)
        if not capturing:  # a table made in a graph is filled by its replays only
            _plans[key] = plan
            if len(_plans) > _PLANS:
                _plans.popitem(last=False)
    else:
        _plans.move_to_end(key)
    if capturing:
        _kept.append(plan.table)
    elif plan.ready is not None and plan.stream != torch.cuda.current_stream().cuda_stream:
        torch.cuda.current_stream().wait_event(plan.ready)
        plan.table.record_stream(torch.cuda.current_stream())
    return plan


def _check(matrices, coefficients, dtype: torch.dtype) -> None:
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"small_polar dtype={dtype}: expected torch.float16 or torch.bfloat16")
    if not coefficients or any(len(step) != 3 for step in coefficients):
        raise ValueError(f"small_polar coefficients={coefficients!r}: expected one (a, b, c) for each step")
    for i, x in enumerate(matrices):
        if x.ndim < 2 or min(x.shape[-2:]) > SMALL:
            raise ValueError(f"small_polar matrix {i} has shape {tuple(x.shape)}: expected (…, n, m) with a short side "
                             f"of at most {SMALL}")
        if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"small_polar matrix {i} is {x.dtype}: expected float32, float16 or bfloat16")
        if x.device != matrices[0].device:
            raise ValueError(f"small_polar matrix {i} is on {x.device}: expected {matrices[0].device}, like matrix 0")
    device = matrices[0].device
    reason = why_not(device)
    if reason is None and device.type != ("cuda" if isinstance(_small_polar_kernel, triton.JITFunction) else "cpu"):
        reason = "Triton's interpreter needs CPU tensors, and TRITON_INTERPRET=1 before this file is imported"
    if reason is not None:
        raise ValueError(f"small_polar cannot run on {device}: {reason}")


def small_polar(matrices: list[Tensor], coefficients, *, bound: bool = False, dtype: torch.dtype = torch.float16
                ) -> list[Tensor]:
    """Polar factors of the matrices, by AOL scaling and one (a, b, c) of `coefficients` a step, in one launch.

    matrices  tensors (…, n, m) on one device, min(n, m) ≤ 128, float32, float16 or bfloat16, any strides; only read
    bound     divide the Gram matrix by min(1, ‖R²‖_F^½) first, as in optim.polar.Polar
    dtype     of the results: torch.float16 or torch.bfloat16

    Returns new tensors of the same shapes. They lie densely, transposed where the input does, and share one buffer. A
    matrix with a NaN or an infinite entry gives a result full of NaN. A list of several input dtypes takes a launch
    for each. A table of shapes, strides and distances between the matrices in memory is remembered: a call with a new
    combination copies a new one to the device, without waiting for it.

    CUDA graphs: call it once before capturing, with any matrices that need the same code paths. Replays read the
    matrices where they were, so these must stay alive; tables are kept alive here, for as long as the process runs.
    """
    if not matrices:
        return []
    coefficients = tuple(tuple(map(float, step)) for step in coefficients)
    _check(matrices, coefficients, dtype)
    results = [torch.empty(x.shape, dtype=dtype, device=x.device) if x.numel() == 0 else None for x in matrices]
    for kind in dict.fromkeys(x.dtype for x in matrices):
        indices = [i for i, x in enumerate(matrices) if x.dtype == kind and x.numel()]
        if not indices:
            continue
        group = [matrices[i] for i in indices]
        with torch.cuda.device_of(group[0]):
            plan = _plan(group, coefficients)
            buffer = torch.empty(plan.elements, dtype=dtype, device=group[0].device)
            _small_polar_kernel[(plan.programs,)](group[0], buffer, plan.table, BOUND=bound, **plan.constants)
        for i, x, (place, transposed) in zip(indices, group, plan.places):
            flat = buffer[place : place + x.numel()]
            results[i] = flat.view(x.mT.shape).mT if transposed else flat.view(x.shape)
    return results
