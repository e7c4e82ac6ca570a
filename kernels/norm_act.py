"""Max-pool, batch norm and activation of a convolution's result, forward and backward, in three launches each.

    p = max over 2×2 of x (or x itself);  μ, σ² over all but the channels;  h = (p − μ) / √(σ² + ε)
    y = act(h + bias + residual)                                           act: exact GELU or SiLU, derivative act'
    backward: δ = dy · act'(…);  dbias = Σ δ;  dp = (δ − mean δ − h · mean(δ h)) / √(σ² + ε);  dx: dp where p came from

Channels last, so x is (rows, channels). Forward reads x, writes p and which of the four it was (a byte), with the sums
of each program; adds those up; reads p and writes y. Backward reads p and dy for the sums, adds them up, reads both
again and writes dx. Separate torch kernels write 8 bytes for the place of each maximum, and write and read what the
norm gives; in the six layers of the CIFAR network that is about 2 GB more at a batch of 2000, by count. Sums are over
differences from a pivot, the program's first row, so that large means cost no precision, and in an order that depends
on shapes alone: the same input gives the same bits.

Eager twin: norm_act_eager.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .augment import ACTIVATIONS, activated, activated_slope, activation

PROGRAMS = 1024  # at most, over all channels, in the launches that sum
_ELEMENTS = 2048  # of a tile


def norm_act_eager(x: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, *, training: bool, pool: bool,
                   act: str, momentum: float, eps: float, residual: Tensor | None = None) -> Tensor:
    """x (batch, channels, h, w); bias and running statistics (channels,) float32, the latter updated in training as
    torch.nn.BatchNorm2d does: running ← (1 − momentum) · running + momentum · batch's."""
    x = F.max_pool2d(x, 2) if pool else x
    x = F.batch_norm(x, running_mean, running_var, torch.ones_like(bias), bias, training, momentum, eps)
    return activation(act)(x if residual is None else x + residual)


@triton.jit
def _tile(C, first_row, R, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """(rows, channels, element offsets, mask) of a tile of the (R, C) matrix."""
    rows = first_row + tl.arange(0, BLOCK_R)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (rows < R)[:, None] & (channels < C)[None, :]
    return rows, channels, rows.to(tl.int64)[:, None] * C + channels[None, :], inside


@triton.jit
def _corner(rows, channels, H, W, C):
    """Element offset in x (…, H, W, C) of the upper left of the four that each pooled row is the maximum of."""
    PH, PW = H // 2, W // 2
    image, place = rows // (PH * PW), rows % (PH * PW)
    return ((image.to(tl.int64) * H + 2 * (place // PW)) * W + 2 * (place % PW))[:, None] * C + channels[None, :]


@triton.jit
def _pool_kernel(x, pooled, which, sums, R, H, W, C, chunks, POOL: tl.constexpr, TRAINING: tl.constexpr,
                 BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Programs (parts of the rows, parts of the channels). sums (2, parts, C): mean and Σ (p − mean)² of each."""
    begin = tl.program_id(0) * chunks * BLOCK_R
    linear = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    square = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    pivot = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for chunk in range(chunks):
        rows, channels, at, inside = _tile(C, begin + chunk * BLOCK_R, R, BLOCK_R, BLOCK_C)
        if POOL:
            corner = _corner(rows, channels, H, W, C)
            value = tl.load(x + corner, mask=inside, other=0.0)
            best = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.int8)
            for tap in tl.static_range(1, 4):
                other = tl.load(x + corner + ((tap // 2) * W + tap % 2) * C, mask=inside, other=0.0)
                larger = (other > value) | (other != other)  # NaN spreads, as in torch
                value, best = tl.where(larger, other, value), tl.where(larger, tap, best).to(tl.int8)
            tl.store(pooled + at, value, mask=inside)
            tl.store(which + at, best, mask=inside)
        else:
            value = tl.load(x + at, mask=inside, other=0.0)
        if TRAINING:
            value = value.to(tl.float32)
            if chunk == 0:
                pivot = tl.sum(tl.where((rows == begin)[:, None], value, 0.0), 0)
            value = tl.where(inside, value - pivot[None, :], 0.0)
            linear += value
            square += value * value
    if TRAINING:
        count = tl.minimum(R - begin, chunks * BLOCK_R).to(tl.float32)
        channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        shift = tl.sum(linear, 0) / count
        out = sums + tl.program_id(0) * C + channels
        tl.store(out, pivot + shift, mask=channels < C)
        tl.store(out + tl.num_programs(0) * C, tl.sum(square, 0) - count * shift * shift, mask=channels < C)


@triton.jit
def _statistics_kernel(sums, running_mean, running_var, mean, scale, R, C, parts, part_rows, momentum, eps,
                       BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """mean and scale = 1 / √(σ² + ε) of all parts together; the running statistics move."""
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for first in range(0, parts, BLOCK_R):
        part = first + tl.arange(0, BLOCK_R)
        inside = (part < parts)[:, None] & (channels < C)[None, :]
        count = tl.minimum(R - part * part_rows, part_rows).to(tl.float32)
        total += count[:, None] * tl.load(sums + part[:, None] * C + channels[None, :], mask=inside, other=0.0)
    mu = tl.sum(total, 0) / R
    total = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for first in range(0, parts, BLOCK_R):
        part = first + tl.arange(0, BLOCK_R)
        inside = (part < parts)[:, None] & (channels < C)[None, :]
        at = sums + part[:, None] * C + channels[None, :]
        count = tl.minimum(R - part * part_rows, part_rows).to(tl.float32)
        off = tl.load(at, mask=inside, other=0.0) - mu[None, :]
        within = tl.load(at + parts * C, mask=inside, other=0.0)
        total += tl.where(inside, within + count[:, None] * off * off, 0.0)
    squares = tl.maximum(tl.sum(total, 0), 0.0)
    real = channels < C
    tl.store(mean + channels, mu, mask=real)
    tl.store(scale + channels, 1 / tl.sqrt(squares / R + eps), mask=real)
    before = tl.load(running_mean + channels, mask=real, other=0.0)
    tl.store(running_mean + channels, before + momentum * (mu - before), mask=real)
    before = tl.load(running_var + channels, mask=real, other=0.0)
    tl.store(running_var + channels, before + momentum * (squares / (R - 1) - before), mask=real)


@triton.jit
def _normalised(p, bias, mean, scale, residual, channels, at, inside, C, RESIDUAL: tl.constexpr):
    """(h, what the activation takes) of a tile, float32."""
    real = channels < C
    h = tl.load(p + at, mask=inside, other=0.0).to(tl.float32) - tl.load(mean + channels, mask=real, other=0.0)[None, :]
    h = h * tl.load(scale + channels, mask=real, other=0.0)[None, :]
    z = h + tl.load(bias + channels, mask=real, other=0.0)[None, :]
    if RESIDUAL:
        z += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    return h, z


@triton.jit
def _activate_kernel(p, bias, mean, scale, residual, y, R, C, SILU: tl.constexpr, RESIDUAL: tl.constexpr,
                     BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Programs (tiles of rows, parts of the channels)."""
    rows, channels, at, inside = _tile(C, tl.program_id(0) * BLOCK_R, R, BLOCK_R, BLOCK_C)
    h, z = _normalised(p, bias, mean, scale, residual, channels, at, inside, C, RESIDUAL)
    tl.store(y + at, activated(z, SILU).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _slope_sums_kernel(p, dy, bias, mean, scale, residual, sums, R, C, chunks, SILU: tl.constexpr,
                       RESIDUAL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """sums (2, parts, C): each part's Σ δ and Σ δ h."""
    plain = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    along = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for chunk in range(chunks):
        first = (tl.program_id(0) * chunks + chunk) * BLOCK_R
        rows, channels, at, inside = _tile(C, first, R, BLOCK_R, BLOCK_C)
        h, z = _normalised(p, bias, mean, scale, residual, channels, at, inside, C, RESIDUAL)
        delta = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32) * activated_slope(z, SILU)
        plain += delta
        along += delta * h
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    out = sums + tl.program_id(0) * C + channels
    tl.store(out, tl.sum(plain, 0), mask=channels < C)
    tl.store(out + tl.num_programs(0) * C, tl.sum(along, 0), mask=channels < C)


@triton.jit
def _add_up_kernel(sums, totals, C, parts, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """totals (2, C): sums (2, parts, C) over the parts. Programs (parts of the channels, 2)."""
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    half = tl.program_id(1)
    total = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for first in range(0, parts, BLOCK_R):
        part = first + tl.arange(0, BLOCK_R)
        inside = (part < parts)[:, None] & (channels < C)[None, :]
        total += tl.load(sums + (half * parts + part)[:, None] * C + channels[None, :], mask=inside, other=0.0)
    tl.store(totals + half * C + channels, tl.sum(total, 0), mask=channels < C)


@triton.jit
def _slopes_kernel(p, dy, which, bias, mean, scale, residual, totals, dx, dresidual, R, H, W, C, SILU: tl.constexpr,
                   RESIDUAL: tl.constexpr, POOL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Programs (tiles of rows, parts of the channels). Each of p's rows writes its four of dx; the last of a line or
    column also the zeros of an odd one beyond it."""
    rows, channels, at, inside = _tile(C, tl.program_id(0) * BLOCK_R, R, BLOCK_R, BLOCK_C)
    real = channels < C
    h, z = _normalised(p, bias, mean, scale, residual, channels, at, inside, C, RESIDUAL)
    delta = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32) * activated_slope(z, SILU)
    if RESIDUAL:
        tl.store(dresidual + at, delta.to(dresidual.dtype.element_ty), mask=inside)
    plain = tl.load(totals + channels, mask=real, other=0.0) / R
    along = tl.load(totals + C + channels, mask=real, other=0.0) / R
    delta = (delta - plain[None, :] - h * along[None, :]) * tl.load(scale + channels, mask=real, other=0.0)[None, :]
    delta = delta.to(dx.dtype.element_ty)
    if POOL:
        corner = _corner(rows, channels, H, W, C)
        best = tl.load(which + at, mask=inside, other=0)
        for tap in tl.static_range(4):
            place = dx + corner + ((tap // 2) * W + tap % 2) * C
            tl.store(place, tl.where(best == tap, delta, tl.zeros_like(delta)), mask=inside)
        PH, PW = H // 2, W // 2
        zeros = tl.zeros_like(delta)
        edge_x = inside & ((rows % PW == PW - 1) & (W % 2 == 1))[:, None]
        edge_y = inside & ((rows // PW % PH == PH - 1) & (H % 2 == 1))[:, None]
        tl.store(dx + corner + 2 * C, zeros, mask=edge_x)
        tl.store(dx + corner + (W + 2) * C, zeros, mask=edge_x)
        tl.store(dx + corner + 2 * W * C, zeros, mask=edge_y)
        tl.store(dx + corner + (2 * W + 1) * C, zeros, mask=edge_y)
        tl.store(dx + corner + (2 * W + 2) * C, zeros, mask=edge_x & edge_y)
    else:
        tl.store(dx + at, delta, mask=inside)


def norm_act(x: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, *, training: bool, pool: bool,
             act: str, momentum: float, eps: float, residual: Tensor | None = None) -> Tensor:
    """As norm_act_eager. x and residual are channels last (what a convolution gives for such an input); gradients are
    for training only."""
    if not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"norm_act needs x (batch, channels, h, w) in channels_last, got strides {x.stride()} "
                         f"of shape {tuple(x.shape)}")
    if act not in ACTIVATIONS:
        raise ValueError(f"norm_act act={act!r}: expected one of {', '.join(ACTIVATIONS)}")
    batch, channels, height, width = x.shape
    if pool and min(height, width) < 2 or batch * height * width < 2:
        raise ValueError(f"norm_act needs two values a channel, and 2×2 to pool; got shape {tuple(x.shape)}")
    if any(t.shape != (channels,) or t.dtype != torch.float32 for t in (bias, running_mean, running_var)):
        raise ValueError(f"norm_act needs bias and running statistics ({channels},) of float32")
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
        shape = (batch, channels, height // 2, width // 2) if pool else x.shape
        if residual.shape != shape or residual.dtype != x.dtype:
            raise ValueError(f"norm_act needs a residual {tuple(shape)} of {x.dtype}, got {tuple(residual.shape)} of "
                             f"{residual.dtype}")
    return _NormAct.apply(x, bias, residual, running_mean, running_var, training, pool, act, momentum, eps)


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, residual, running_mean, running_var, training, pool, act, momentum, eps):
        batch, channels, height, width = x.shape
        places = (height // 2, width // 2) if pool else (height, width)
        rows, new = batch * places[0] * places[1], x.new_empty
        block_c = min(64, max(16, triton.next_power_of_2(channels)))
        block = dict(BLOCK_R=_ELEMENTS // block_c, BLOCK_C=block_c)
        parts_c, tiles = triton.cdiv(channels, block_c), triton.cdiv(rows, block["BLOCK_R"])
        chunks = triton.cdiv(tiles, max(1, PROGRAMS // parts_c))
        parts = triton.cdiv(tiles, chunks)
        like = dict(device=x.device, memory_format=torch.channels_last)
        p = torch.empty((batch, channels, *places), dtype=x.dtype, **like) if pool else x
        which = torch.empty(p.shape, dtype=torch.int8, **like) if pool else x
        sums = new((2, parts, channels), dtype=torch.float32)
        if pool or training:
            _pool_kernel[(parts, parts_c)](x, p, which, sums, rows, height, width, channels, chunks, POOL=pool,
                                           TRAINING=training, **block)
        if training:
            mean, scale = new((2, channels), dtype=torch.float32).unbind()
            _statistics_kernel[(triton.cdiv(channels, 16),)](
                sums, running_mean, running_var, mean, scale, rows, channels, parts, chunks * block["BLOCK_R"],
                momentum, eps, BLOCK_R=64, BLOCK_C=16)
        else:
            mean, scale = running_mean, (running_var + eps).rsqrt()
        y = torch.empty_like(p, memory_format=torch.channels_last)
        flags = dict(SILU=act == "silu", RESIDUAL=residual is not None)
        extra = x if residual is None else residual  # a pointer that is not read
        _activate_kernel[(tiles, parts_c)](p, bias, mean, scale, extra, y, rows, channels, **flags, **block)
        ctx.plan = rows, channels, (height, width), chunks, parts, tiles, parts_c, block, flags, pool, training
        ctx.save_for_backward(p, which, bias, mean, scale, extra)
        return y

    @staticmethod
    def backward(ctx, dy):
        p, which, bias, mean, scale, residual = ctx.saved_tensors
        rows, channels, (height, width), chunks, parts, tiles, parts_c, block, flags, pool, training = ctx.plan
        if not training:
            raise RuntimeError("norm_act has gradients in training only: call it with training=True")
        dy = dy.contiguous(memory_format=torch.channels_last)
        sums = p.new_empty((2, parts, channels), dtype=torch.float32)
        totals = p.new_empty((2, channels), dtype=torch.float32)
        _slope_sums_kernel[(parts, parts_c)](p, dy, bias, mean, scale, residual, sums, rows, channels, chunks,
                                             **flags, **block)
        _add_up_kernel[(triton.cdiv(channels, 16), 2)](sums, totals, channels, parts, BLOCK_R=64, BLOCK_C=16)
        dx = torch.empty((p.size(0), channels, height, width), dtype=p.dtype, device=p.device,
                         memory_format=torch.channels_last)
        dresidual = torch.empty_like(residual) if flags["RESIDUAL"] else dx
        _slopes_kernel[(tiles, parts_c)](p, dy, which, bias, mean, scale, residual, totals, dx, dresidual, rows, height,
                                         width, channels, POOL=pool, **flags, **block)
        return dx, totals[0], dresidual if flags["RESIDUAL"] else None, *(None,) * 7
