"""Max-pool, batch norm and activation of a convolution's result: two launches forward, two backward.

    p = max over 2×2 of x (or x itself);  μ, σ² over all but the channels;  h = (p − μ) / √(σ² + ε)
    y = act(h + bias + residual)                                           act: exact GELU or SiLU, derivative act'
    backward: δ = dy · act'(…);  dbias = Σ δ;  dp = (δ − mean δ − h · mean(δ h)) / √(σ² + ε);  dx: dp where p came from

Channels last, so x is (rows, channels). Forward reads x, writes p and which of the four it was (a byte), and takes the
statistics; reads p and writes y. Backward reads p and dy for the sums, reads both again and writes dx. Separate torch
kernels write 8 bytes for the place of each maximum, and write and read what the norm gives; in the six layers of the
CIFAR network that is about 2 GB more at a batch of 2000, by count. Evaluation is one launch, from x to y.

Sums are finished by whichever programs come last, without a launch of their own, in an order that depends on shapes and
CUTS alone: the same input gives the same bits. They are of differences from a pivot, the first row, so that large means
cost no precision. The first of two passes over the same tensors goes from their end to their beginning, where the
second starts: what the first has read last is still in the L2 cache.

Eager twin: norm_act_eager. Times and bytes of each kernel: python -m kernels.bench_norm_act
"""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .augment import ACTIVATIONS, activated, activated_slope, activation
from .graph import capturing


@dataclass(frozen=True)
class Cut:
    """How a kernel cuts (rows, channels): every program takes each so manieth tile of its channels in turn."""

    elements: int = 1024  # of a tile
    warps: int = 4
    programs: int = 3960  # at most, over all channels
    stages: int = 1  # n > 2: the loads of n − 2 further tiles are under way; 2 only goes through shared memory
    channels: int = 64  # of a tile, at most


GROUP = 32  # programs whose sums one of them adds up; as many groups at most
# The quickest of those that `python -m kernels.bench_norm_act --tune --act silu` tried on an H200.
CUTS = {"pool": Cut(elements=512, warps=2, programs=1024, stages=3), "activate": Cut(programs=1056, stages=4),
        "slope_sums": Cut(programs=528, stages=4), "slopes": Cut(stages=3)}


def norm_act_eager(x: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, *, training: bool, pool: bool,
                   act: str, momentum: float, eps: float, residual: Tensor | None = None) -> Tensor:
    """x (batch, channels, h, w); bias and running statistics (channels,) float32, the latter updated in training as
    torch.nn.BatchNorm2d does: running ← (1 − momentum) · running + momentum · batch's."""
    x = F.max_pool2d(x, 2) if pool else x
    x = F.batch_norm(x, running_mean, running_var, torch.ones_like(bias), bias, training, momentum, eps)
    return activation(act)(x if residual is None else x + residual)


@triton.jit
def _strip(C, BLOCK_C: tl.constexpr):
    """(number of this program among those of its channels, its channels). Neighbours share rows, not channels."""
    strips = tl.cdiv(C, BLOCK_C)
    return tl.program_id(0) // strips, tl.program_id(0) % strips * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def _tile(tile, channels, R, C, BLOCK_R: tl.constexpr):
    """(rows, element offsets, mask) of a tile of the (R, C) matrix."""
    rows = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = (rows < R)[:, None] & (channels < C)[None, :]
    return rows, rows.to(tl.int64)[:, None] * C + channels[None, :], inside


@triton.jit
def _corner(rows, channels, H, W, C):
    """Element offset in x (…, H, W, C) of the upper left of the four that each pooled row is the maximum of."""
    PH, PW = H // 2, W // 2
    image, place = rows // (PH * PW), rows % (PH * PW)
    return ((image.to(tl.int64) * H + 2 * (place // PW)) * W + 2 * (place % PW))[:, None] * C + channels[None, :]


@triton.jit
def larger(value, best, other, tap: tl.constexpr):
    """The larger of value and other, and which of a window it is: best, or tap."""
    other_is = (other > value) | (other != other)  # NaN spreads, as in torch
    return tl.where(other_is, other, value), tl.where(other_is, tap, best).to(best.dtype)


@triton.jit
def _largest(x, corner, inside, W, C):
    """(maximum of four, which of them: 0 … 3) of a tile."""
    value = tl.load(x + corner, mask=inside, other=0.0)
    best = tl.zeros(value.shape, dtype=tl.int8)
    for tap in tl.static_range(1, 4):
        other = tl.load(x + corner + ((tap // 2) * W + tap % 2) * C, mask=inside, other=0.0)
        value, best = larger(value, best, other, tap)
    return value, best


@triton.jit
def _came_last(counter, programs):
    """Whether the other programs have come here before. What they stored can then be read, past the first cache."""
    tl.debug_barrier()  # all threads have stored
    last = tl.atomic_add(counter, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(counter, 0)  # for the next launch
    return last


@triton.jit
def _stored(a, b, sums, row, C, channels):
    at = sums + row * 2 * C + channels
    tl.store(at, a, mask=channels < C)
    tl.store(at + C, b, mask=channels < C)


@triton.jit
def _summed(sums, row, count, C, channels, GROUP: tl.constexpr):
    """What _stored has left in `count` rows, at most GROUP, added up."""
    lane = tl.arange(0, GROUP)
    at = sums + (row + lane)[:, None] * 2 * C + channels[None, :]
    inside = (lane < count)[:, None] & (channels < C)[None, :]
    return (tl.sum(tl.load(at, mask=inside, other=0.0, cache_modifier=".cg"), 0),
            tl.sum(tl.load(at + C, mask=inside, other=0.0, cache_modifier=".cg"), 0))


@triton.jit
def _totals(a, b, sums, counters, part, parts, C, channels, GROUP: tl.constexpr):
    """(whether this program is the last, sums over all of them of two vectors each, if so), in a fixed order: the last
    of every GROUP programs adds up its group's, the last of those all groups'. sums (parts + groups, 2, C)."""
    counters += tl.program_id(0) % tl.cdiv(C, channels.shape[0]) * (GROUP + 1)
    group, groups = part // GROUP, tl.cdiv(parts, GROUP)
    count = tl.minimum(parts - group * GROUP, GROUP)
    _stored(a, b, sums, part, C, channels)
    last = _came_last(counters + group, count)
    if last:
        a, b = _summed(sums, group * GROUP, count, C, channels, GROUP)
        _stored(a, b, sums, parts + group, C, channels)
        last = _came_last(counters + GROUP, groups)
        if last:
            a, b = _summed(sums, parts, groups, C, channels, GROUP)
    return last, a, b


@triton.jit
def _pool_kernel(x, pooled, which, sums, counters, running_mean, running_var, mean, scale, R, H, W, C, tiles, parts,
                 momentum, eps, POOL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
                 STAGES: tl.constexpr, GROUP: tl.constexpr):
    """Pools and takes statistics: mean and scale = 1 / √(σ² + ε); the running ones move."""
    part, channels = _strip(C, BLOCK_C)
    real = channels < C
    pivot = tl.load(x + channels, mask=real, other=0.0).to(tl.float32)
    linear = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    square = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for tile in tl.range(part, tiles, parts, num_stages=STAGES):
        rows, at, inside = _tile(tiles - 1 - tile, channels, R, C, BLOCK_R)
        if POOL:
            value, best = _largest(x, _corner(rows, channels, H, W, C), inside, W, C)
            tl.store(pooled + at, value, mask=inside)
            tl.store(which + at, best, mask=inside)
        else:
            value = tl.load(x + at, mask=inside, other=0.0)
        off = tl.where(inside, value.to(tl.float32) - pivot[None, :], 0.0)
        linear += off
        square += off * off
    shift, squares = tl.sum(linear, 0), tl.sum(square, 0)
    last, shift, squares = _totals(shift, squares, sums, counters, part, parts, C, channels, GROUP)
    if last:
        shift *= 1.0 / R
        squares = tl.maximum(squares - R * shift * shift, 0.0)
        mu = pivot + shift
        tl.store(mean + channels, mu, mask=real)
        tl.store(scale + channels, 1 / tl.sqrt(squares * (1.0 / R) + eps), mask=real)
        before = tl.load(running_mean + channels, mask=real, other=0.0)
        tl.store(running_mean + channels, before + momentum * (mu - before), mask=real)
        before = tl.load(running_var + channels, mask=real, other=0.0)
        tl.store(running_var + channels, before + momentum * (squares * (1.0 / (R - 1)) - before), mask=real)


@triton.jit
def _activate_kernel(p, bias, mean, scale, residual, y, R, H, W, C, tiles, parts, eps, TRAINING: tl.constexpr,
                     POOL: tl.constexpr, SILU: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_R: tl.constexpr,
                     BLOCK_C: tl.constexpr, STAGES: tl.constexpr):
    """y from p. Else than in training `scale` holds variances, and p can be what is to be pooled yet."""
    part, channels = _strip(C, BLOCK_C)
    real = channels < C
    mu = tl.load(mean + channels, mask=real, other=0.0)[None, :]
    gain = tl.load(scale + channels, mask=real, other=1.0)[None, :]
    if not TRAINING:
        gain = 1 / tl.sqrt(gain + eps)
    offset = tl.load(bias + channels, mask=real, other=0.0)[None, :]
    for tile in tl.range(part, tiles, parts, num_stages=STAGES):
        rows, at, inside = _tile(tile, channels, R, C, BLOCK_R)
        if POOL:
            value, _ = _largest(p, _corner(rows, channels, H, W, C), inside, W, C)
        else:
            value = tl.load(p + at, mask=inside, other=0.0)
        z = (value.to(tl.float32) - mu) * gain + offset
        if RESIDUAL:
            z += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + at, activated(z, SILU).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _affine(bias, mean, scale, channels, real):
    """(μ, scale, bias) of a tile's channels, each (1, channels)."""
    return (tl.load(mean + channels, mask=real, other=0.0)[None, :],
            tl.load(scale + channels, mask=real, other=0.0)[None, :],
            tl.load(bias + channels, mask=real, other=0.0)[None, :])


@triton.jit
def _slope(p, dy, residual, at, inside, mu, gain, offset, SILU: tl.constexpr, RESIDUAL: tl.constexpr):
    """(p − μ, δ) of a tile, float32."""
    off = tl.load(p + at, mask=inside, other=0.0).to(tl.float32) - mu
    slope = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    z = off * gain + offset
    if RESIDUAL:
        z += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    return off, slope * activated_slope(z, SILU)


@triton.jit
def _slope_sums_kernel(p, dy, bias, mean, scale, residual, sums, counters, totals, R, C, tiles, parts,
                       SILU: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
                       STAGES: tl.constexpr, GROUP: tl.constexpr):
    """totals (2, C): Σ δ and Σ δ h."""
    part, channels = _strip(C, BLOCK_C)
    real = channels < C
    mu, gain, offset = _affine(bias, mean, scale, channels, real)
    plain = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    along = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for tile in tl.range(part, tiles, parts, num_stages=STAGES):
        _, at, inside = _tile(tiles - 1 - tile, channels, R, C, BLOCK_R)
        off, delta = _slope(p, dy, residual, at, inside, mu, gain, offset, SILU, RESIDUAL)
        plain += delta
        along += delta * off
    last, plain, along = _totals(tl.sum(plain, 0), tl.sum(along, 0), sums, counters, part, parts, C, channels, GROUP)
    if last:
        tl.store(totals + channels, plain, mask=real)
        tl.store(totals + C + channels, along * tl.load(scale + channels, mask=real, other=0.0), mask=real)


@triton.jit
def _slopes_kernel(p, dy, which, bias, mean, scale, residual, totals, dx, dresidual, R, H, W, C, tiles, parts,
                   SILU: tl.constexpr, RESIDUAL: tl.constexpr, POOL: tl.constexpr, BLOCK_R: tl.constexpr,
                   BLOCK_C: tl.constexpr, STAGES: tl.constexpr):
    """Each of p's rows writes its four of dx; the last of a line or column also the zeros of an odd one beyond it."""
    part, channels = _strip(C, BLOCK_C)
    real = channels < C
    mu, gain, offset = _affine(bias, mean, scale, channels, real)
    plain = tl.load(totals + channels, mask=real, other=0.0)[None, :] * (1.0 / R) * gain
    along = tl.load(totals + C + channels, mask=real, other=0.0)[None, :] * (1.0 / R) * gain * gain
    for tile in tl.range(part, tiles, parts, num_stages=STAGES):
        rows, at, inside = _tile(tile, channels, R, C, BLOCK_R)
        off, delta = _slope(p, dy, residual, at, inside, mu, gain, offset, SILU, RESIDUAL)
        if RESIDUAL:
            tl.store(dresidual + at, delta.to(dresidual.dtype.element_ty), mask=inside)
        delta = (delta * gain - (off * along + plain)).to(dx.dtype.element_ty)
        if POOL:
            corner = _corner(rows, channels, H, W, C)
            best = tl.load(which + at, mask=inside, other=0)
            zeros = tl.zeros_like(delta)
            for tap in tl.static_range(4):
                place = dx + corner + ((tap // 2) * W + tap % 2) * C
                tl.store(place, tl.where(best == tap, delta, zeros), mask=inside)
            PH, PW = H // 2, W // 2
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


@cache
def _counters(device: torch.device) -> Tensor:
    """Zeros on which the programs of a launch count themselves, and which they leave as zeros: one stream at a time."""
    if capturing():
        raise RuntimeError("norm_act must have run before a CUDA graph of it is captured: call it once, then capture")
    return torch.zeros(1 << 16, dtype=torch.int32, device=device)


def _grid(name: str, rows: int, channels: int) -> tuple[tuple[int], int, int, dict]:
    """(grid, tiles of rows, programs of the same channels, constants and options) of a launch, by CUTS."""
    cut = CUTS[name]
    block_c = min(cut.channels, max(16, triton.next_power_of_2(channels)))
    constants = dict(BLOCK_R=cut.elements // block_c, BLOCK_C=block_c, STAGES=cut.stages, num_warps=cut.warps)
    strips, tiles = triton.cdiv(channels, block_c), triton.cdiv(rows, cut.elements // block_c)
    parts = max(1, min(tiles, cut.programs // strips))
    if name in ("pool", "slope_sums"):
        parts, constants["GROUP"] = min(parts, GROUP * GROUP), GROUP
    return (strips * parts,), tiles, parts, constants


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, residual, running_mean, running_var, training, pool, act, momentum, eps):
        batch, channels, height, width = x.shape
        places = (height // 2, width // 2) if pool else (height, width)
        size = batch * places[0] * places[1], channels
        sizes = size[0], height, width, channels
        like = dict(size=(batch, channels, *places), device=x.device, memory_format=torch.channels_last)
        p, which, mean, scale = x, x, running_mean, running_var
        if training:
            if pool:
                p, which = torch.empty(dtype=x.dtype, **like), torch.empty(dtype=torch.int8, **like)
            mean, scale = x.new_empty((2, channels), dtype=torch.float32).unbind()
            grid, tiles, parts, cut = _grid("pool", *size)
            sums = x.new_empty((parts + GROUP, 2, channels), dtype=torch.float32)
            _pool_kernel[grid](x, p, which, sums, _counters(x.device), running_mean, running_var, mean, scale, *sizes,
                               tiles, parts, momentum, eps, POOL=pool, **cut)
        y = torch.empty(dtype=x.dtype, **like)
        flags = dict(SILU=act == "silu", RESIDUAL=residual is not None)
        extra = x if residual is None else residual  # a pointer that is not read
        grid, tiles, parts, cut = _grid("activate", *size)
        _activate_kernel[grid](p, bias, mean, scale, extra, y, *sizes, tiles, parts, eps, TRAINING=training,
                               POOL=pool and not training, **flags, **cut)
        ctx.plan = sizes, flags, pool, training
        ctx.save_for_backward(p, which, bias, mean, scale, extra)
        return y

    @staticmethod
    def backward(ctx, dy):
        p, which, *given = ctx.saved_tensors
        sizes, flags, pool, training = ctx.plan
        if not training:
            raise RuntimeError("norm_act has gradients in training only: call it with training=True")
        rows, height, width, channels = sizes
        dy = dy.contiguous(memory_format=torch.channels_last)
        grid, tiles, parts, cut = _grid("slope_sums", rows, channels)
        sums = p.new_empty((parts + GROUP, 2, channels), dtype=torch.float32)
        totals = p.new_empty((2, channels), dtype=torch.float32)
        _slope_sums_kernel[grid](p, dy, *given, sums, _counters(p.device), totals, rows, channels, tiles, parts,
                                 **flags, **cut)
        dx = torch.empty((p.size(0), channels, height, width), dtype=p.dtype, device=p.device,
                         memory_format=torch.channels_last)
        dresidual = torch.empty_like(p, memory_format=torch.channels_last) if flags["RESIDUAL"] else dx
        grid, tiles, parts, cut = _grid("slopes", rows, channels)
        _slopes_kernel[grid](p, dy, which, *given, totals, dx, dresidual, *sizes, tiles, parts, POOL=pool, **flags,
                             **cut)
        return dx, totals[0], dresidual if flags["RESIDUAL"] else None, *(None,) * 7
