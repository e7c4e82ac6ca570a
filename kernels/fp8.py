"""A matrix in 8-bit floats, with its transpose, for torch._scaled_mm: one pass, 1 byte written for each of the two.

    q = round(x / scale) in e4m3,  scale = max |x| / 448  (1 of zeros),  x ≈ scale · q

Hopper's 8-bit products want both operands to lie along the dimension that is summed over, so one that takes part in two
products along different dimensions is needed both ways. The scale is found on the device, in a pass of its own over x.
Eager twin: quantised_eager.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .instructions import INTERPRETED

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2  # 4 significant bits up to 448; 3 up to 57344
MULTIPLE = 16  # of which every side must be, for cuBLAS
_ROWS, _COLUMNS = 64, 128  # of a tile


def quantised_eager(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (n, m) -> (q (n, m) e4m3, its transpose (m, n), scale () float32), both contiguous."""
    scale = _scale(x)
    q = (x.float() * (1 / scale)).to(E4M3)
    return q, q.T.contiguous(), scale


def _scale(x: Tensor) -> Tensor:
    """() float32, a tensor of its own: cuBLAS wants scales at addresses that are multiples of 16."""
    largest = torch.linalg.vector_norm(x, ord=float("inf"), dtype=torch.float32)
    return torch.where(largest == 0, 1.0, largest / torch.finfo(E4M3).max)


@triton.jit
def eight_bits(values, KIND: tl.constexpr):
    """float32 rounded to the dtype KIND.

    Four at a time by assembly. Of triton's own casts, of which some bytes are stored one by one (to be transposed) and
    all in fours, the assembler of CUDA 12.8, which triton 3.6 has, reads the second of each four too early: an H200 had
    every fourth row of a transpose wrong. It does so where PTX shifts 16 bits (shr.u16), which this leaves none of.
    """
    if INTERPRETED:  # its own cast loses what a rounded mantissa carries into the exponent: leave it nothing to round
        dropped: tl.constexpr = 23 - KIND.fp_mantissa_width
        bits = values.to(tl.int32, bitcast=True)
        bits += (1 << (dropped - 1)) - 1 + ((bits >> dropped) & 1)
        return ((bits >> dropped) << dropped).to(tl.float32, bitcast=True).to(KIND)
    NAME: tl.constexpr = "e4m3x2" if KIND.fp_mantissa_width == 3 else "e5m2x2"
    CAST: tl.constexpr = "cvt.rn.satfinite." + NAME + ".f32 "
    ASM: tl.constexpr = ("{ .reg .b16 low, high; " + CAST + "low, $2, $1; " + CAST + "high, $4, $3; "
                         "mov.b32 $0, {low, high}; }")
    bytes = tl.inline_asm_elementwise(ASM, "=r,f,f,f,f", [values], dtype=tl.int8, is_pure=True, pack=4)
    return bytes.to(KIND, bitcast=True)


@triton.jit
def store_both(values, straight, transposed, rows, columns, R, C):
    """A float32 tile into (R, C) `straight` and (C, R) `transposed`, 8 bits each; what lies beyond is left out."""
    values = eight_bits(values, straight.dtype.element_ty)
    at = rows.to(tl.int64)[:, None] * C + columns[None, :]
    tl.store(straight + at, values, mask=(rows < R)[:, None] & (columns < C)[None, :])
    at = columns.to(tl.int64)[:, None] * R + rows[None, :]
    tl.store(transposed + at, tl.trans(values), mask=(columns < C)[:, None] & (rows < R)[None, :])


@triton.jit
def _cast_kernel(x, scale, straight, transposed, R, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Programs (tiles of columns, tiles of rows)."""
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    at = rows.to(tl.int64)[:, None] * C + columns[None, :]
    value = tl.load(x + at, mask=(rows < R)[:, None] & (columns < C)[None, :], other=0.0).to(tl.float32)
    store_both(value * tl.div_rn(1.0, tl.load(scale)), straight, transposed, rows, columns, R, C)


def quantised(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As quantised_eager. x: contiguous, float32 or bfloat16; a NaN or an infinity makes every product of it NaN."""
    if x.ndim != 2 or not x.is_contiguous():
        raise ValueError(f"quantised needs a contiguous matrix, got shape {tuple(x.shape)} and strides {x.stride()}")
    (n, m), scale = x.shape, _scale(x)
    q, transposed = (torch.empty(shape, dtype=E4M3, device=x.device) for shape in ((n, m), (m, n)))
    _cast_kernel[(triton.cdiv(m, _COLUMNS), triton.cdiv(n, _ROWS))](x, scale, q, transposed, n, m, ROWS=_ROWS,
                                                                   COLUMNS=_COLUMNS, num_warps=8)
    return q, transposed, scale
