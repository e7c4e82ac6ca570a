"""A 3×3 convolution of few channels and the 2×2 max-pool behind it: one launch forward, two for the weight's gradient.

    y[o] = Σ over rows r and columns s of the filter of w[o, r, s] · x[row + r − 1, column + s − 1]
    p = max over 2×2 of y
    dw[o, r, s] = Σ over pooled places of dp[o] · x[row + r − 1, column + s − 1],   (row, column): where p came from

The convolution's result, 246 MB of the CIFAR network's first layer at a batch of 2000, is neither written nor read, nor
is its gradient, three quarters of which are zeros. Forward writes p and which of the four it was (a byte); the weight's
gradient takes x, dp and that byte.

Channels last, the four pixels of a line that a pooled place sees are 4·C numbers in a row: `_line` loads them without a
gap whatever C is. The left two and the right two convolutions of a window share them, as columns (output channel, side)
of one product whose filters are moved by a pixel for the right side. A quarter of the filters' entries is zero then,
the same work as with C = 24 padded to 32, but products are twice as wide and x is loaded half as often. The price:
infinite x gives NaN, by those zeros.

Partial sums of the gradient are added in an order that depends on shapes and CUTS alone: the same input gives the same
bits. Products are of the inputs' dtype, sums float32.

Eager twin: conv_pool_eager. Times of each kernel: python -m kernels.bench_conv_pool
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .instructions import dot
from .norm_act import larger

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
REDUCED = 128  # numbers of the weight's gradient that a program finishes


@dataclass(frozen=True)
class Cut:
    """How a kernel cuts (pooled places, output channels): a program takes every so manieth tile of places in turn."""

    places: int = 64  # pooled ones, of a tile
    warps: int = 4
    programs: int = 132  # at most, over all channels
    stages: int = 2  # n > 2: loads of n − 2 further tiles (or parts of one) are under way during its products
    channels: int = 64  # output channels of a program, at most
    width: int = 32  # weight_sums: so many of the 4·C numbers of a line are a program's
    resident: bool = True  # forward: filters stay in shared memory, and all of a tile of x is loaded at once
    depth: int = 64  # forward, resident: of a product, at most


# The quickest of those that `python -m kernels.bench_conv_pool --tune` tried on an H200: 230 µs forward, where cuDNN
# takes 282 and a pool comes behind it, and 223 for the weight's gradient, where cuDNN takes 332 and the pool's before it.
CUTS = {"forward": Cut(places=128, warps=8, stages=3, resident=False),
        "weight_sums": Cut(places=32, warps=8, stages=4, width=128)}
# For float32, which takes no tensor cores and is for checks: small, so that nothing is spilled.
EXACT = {"forward": Cut(places=32, stages=1, channels=16, resident=False),
         "weight_sums": Cut(places=16, stages=1, channels=16)}
MOST_RESIDENT = 24  # input channels; the filters and tiles of more are beyond the shared memory of an H200


def conv_pool_eager(x: Tensor, weight: Tensor) -> Tensor:
    """x (batch, C, h, w), weight (O, C, 3, 3) -> (batch, O, h // 2, w // 2)."""
    return F.max_pool2d(F.conv2d(x, weight, padding=1), 2)


@triton.jit
def _corner(tile, places, H, W, P: tl.constexpr):
    """(places of a tile, mask, image, row and column of the upper left pixel that each sees: one out of its window)."""
    place = tile * P + tl.arange(0, P)
    PH, PW = H // 2, W // 2
    line = place // PW
    return place, place < places, line // PH, 2 * (line % PH) - 1, 2 * (place % PW) - 1


@triton.jit
def _line(x, r, j, inside, image, row, column, H, W, C: tl.constexpr):
    """Numbers j of the 4·C that the places see of line r = 0 … 3: (places, j), zeros beyond the image's border."""
    at = column[:, None] * C + j[None, :]  # in a line of the image
    row += r
    inside = (inside & (row >= 0) & (row < H))[:, None] & (at >= 0) & (at < W * C) & (j < 4 * C)[None, :]
    start = (image.to(tl.int64) * H + row) * (W * C)
    return tl.load(x + (start[:, None] + at), mask=inside, other=0.0)


@triton.jit
def _filters(weight, r, j, first, C: tl.constexpr, BLOCK_O: tl.constexpr):
    """Row r of the filters that line r is multiplied with: (j, 2 · BLOCK_O), columns (output channel, side)."""
    n = tl.arange(0, 2 * BLOCK_O)
    at = j[:, None] - (n % 2 * C)[None, :]  # in that row
    inside = (at >= 0) & (at < 3 * C)
    return tl.load(weight + ((first + n // 2) * (9 * C) + r * (3 * C))[None, :] + at, mask=inside, other=0.0)


@triton.jit
def _pooled(upper, lower, pooled, which, place, inside, first, O, P: tl.constexpr, BLOCK_O: tl.constexpr):
    """Stores the largest of the four, and which it is, of what the convolution would have rounded to its dtype."""
    dtype = pooled.dtype.element_ty
    value, other = tl.split(tl.reshape(upper.to(dtype).to(tl.float32), (P, BLOCK_O, 2)))
    value, best = larger(value, tl.zeros((P, BLOCK_O), dtype=tl.int32), other, 1)
    left, right = tl.split(tl.reshape(lower.to(dtype).to(tl.float32), (P, BLOCK_O, 2)))
    value, best = larger(value, best, left, 2)
    value, best = larger(value, best, right, 3)
    at = place.to(tl.int64)[:, None] * O + (first + tl.arange(0, BLOCK_O))[None, :]
    tl.store(pooled + at, value.to(dtype), mask=inside[:, None])
    tl.store(which + at, best.to(tl.int8), mask=inside[:, None])


@triton.jit
def _conv_pool_kernel(x, weight, pooled, which, places, H, W, O, tiles, parts, C: tl.constexpr, P: tl.constexpr,
                      BLOCK_O: tl.constexpr, DEPTH: tl.constexpr, RESIDENT: tl.constexpr, STAGES: tl.constexpr):
    """Sums (places, (output channel, side)), one for the upper two of each window and one for the lower two."""
    strips = O // BLOCK_O
    part, first = tl.program_id(0) // strips, tl.program_id(0) % strips * BLOCK_O
    if RESIDENT:
        filters = ()
        for start in tl.static_range(0, 4 * C, DEPTH):
            j = start + tl.arange(0, DEPTH if 4 * C - start >= DEPTH else 32)
            for r in tl.static_range(3):
                filters = filters + (_filters(weight, r, j, first, C, BLOCK_O),)
        for tile in tl.range(part, tiles, parts, num_stages=STAGES):
            place, inside, image, row, column = _corner(tile, places, H, W, P)
            upper = tl.zeros((P, 2 * BLOCK_O), dtype=tl.float32)
            lower = tl.zeros((P, 2 * BLOCK_O), dtype=tl.float32)
            for start in tl.static_range(0, 4 * C, DEPTH):
                j = start + tl.arange(0, DEPTH if 4 * C - start >= DEPTH else 32)
                for r in tl.static_range(4):
                    seen = _line(x, r, j, inside, image, row, column, H, W, C)
                    if r < 3:
                        upper = dot(seen, filters[start // DEPTH * 3 + r], upper)
                    if r > 0:
                        lower = dot(seen, filters[start // DEPTH * 3 + r - 1], lower)
            _pooled(upper, lower, pooled, which, place, inside, first, O, P, BLOCK_O)
    else:
        for tile in tl.range(part, tiles, parts, flatten=True):
            place, inside, image, row, column = _corner(tile, places, H, W, P)
            upper = tl.zeros((P, 2 * BLOCK_O), dtype=tl.float32)
            lower = tl.zeros((P, 2 * BLOCK_O), dtype=tl.float32)
            for start in tl.range(0, 4 * C, 32, num_stages=STAGES):
                j = start + tl.arange(0, 32)
                a = _line(x, 0, j, inside, image, row, column, H, W, C)
                b = _line(x, 1, j, inside, image, row, column, H, W, C)
                c = _line(x, 2, j, inside, image, row, column, H, W, C)
                d = _line(x, 3, j, inside, image, row, column, H, W, C)
                filters = _filters(weight, 0, j, first, C, BLOCK_O)
                upper, lower = dot(a, filters, upper), dot(b, filters, lower)
                filters = _filters(weight, 1, j, first, C, BLOCK_O)
                upper, lower = dot(b, filters, upper), dot(c, filters, lower)
                filters = _filters(weight, 2, j, first, C, BLOCK_O)
                upper, lower = dot(c, filters, upper), dot(d, filters, lower)
            _pooled(upper, lower, pooled, which, place, inside, first, O, P, BLOCK_O)


@triton.jit
def _sent(slope, best, tap: tl.constexpr, P: tl.constexpr, BLOCK_O: tl.constexpr):
    """((output channel, side), places): the gradients that go to `tap` and the one right of it."""
    zero = tl.zeros_like(slope)
    both = tl.join(tl.where(best == tap, slope, zero), tl.where(best == tap + 1, slope, zero))
    return tl.trans(tl.reshape(both, (P, 2 * BLOCK_O)))


@triton.jit
def _weight_sums_kernel(x, dp, which, sums, places, H, W, O, tiles, parts, C: tl.constexpr, P: tl.constexpr,
                        BLOCK_O: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr):
    """sums (parts, 3, 2 · O, 4 · C) float32: for each row of the filter, and of rows (output channel, side)."""
    CHUNKS: tl.constexpr = (4 * C + WIDTH - 1) // WIDTH
    strips = O // BLOCK_O * CHUNKS  # neighbours share places
    part, strip = tl.program_id(0) // strips, tl.program_id(0) % strips
    first, j = strip // CHUNKS * BLOCK_O, strip % CHUNKS * WIDTH + tl.arange(0, WIDTH)
    over = tl.zeros((2 * BLOCK_O, WIDTH), dtype=tl.float32)
    middle = tl.zeros((2 * BLOCK_O, WIDTH), dtype=tl.float32)
    under = tl.zeros((2 * BLOCK_O, WIDTH), dtype=tl.float32)
    for tile in tl.range(part, tiles, parts, num_stages=STAGES):
        place, inside, image, row, column = _corner(tile, places, H, W, P)
        at = place.to(tl.int64)[:, None] * O + (first + tl.arange(0, BLOCK_O))[None, :]
        slope = tl.load(dp + at, mask=inside[:, None], other=0.0)
        best = tl.load(which + at, mask=inside[:, None], other=0)
        a = _line(x, 0, j, inside, image, row, column, H, W, C)
        b = _line(x, 1, j, inside, image, row, column, H, W, C)
        c = _line(x, 2, j, inside, image, row, column, H, W, C)
        d = _line(x, 3, j, inside, image, row, column, H, W, C)
        upper = _sent(slope, best, 0, P, BLOCK_O)
        over, middle, under = dot(upper, a, over), dot(upper, b, middle), dot(upper, c, under)
        lower = _sent(slope, best, 2, P, BLOCK_O)
        over, middle, under = dot(lower, b, over), dot(lower, c, middle), dot(lower, d, under)
    n = 2 * first + tl.arange(0, 2 * BLOCK_O)
    at = sums + ((part.to(tl.int64) * 3 * (2 * O) + n) * (4 * C))[:, None] + j[None, :]
    real = (j < 4 * C)[None, :] & (n < 2 * O)[:, None]
    tl.store(at, over, mask=real)
    tl.store(at + 2 * O * (4 * C), middle, mask=real)
    tl.store(at + 2 * 2 * O * (4 * C), under, mask=real)


@triton.jit
def _weight_kernel(sums, dw, O, parts, C: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """dw (O, 3, 3, C): both sides of what all parts have summed."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = i < O * 9 * C
    within = i % (3 * C)  # a row of the filter, whose number is i // (3 * C) % 3
    at = (i // (3 * C) % 3 * (2 * O) + i // (9 * C) * 2) * (4 * C) + within
    total = tl.zeros((GROUP, BLOCK), dtype=tl.float32)
    for part in range(0, parts, GROUP):
        here = part + tl.arange(0, GROUP)
        inside = (here < parts)[:, None] & real[None, :]
        source = sums + here.to(tl.int64)[:, None] * (3 * 2 * O * 4 * C) + at[None, :]
        total += tl.load(source, mask=inside, other=0.0) + tl.load(source + 5 * C, mask=inside, other=0.0)
    tl.store(dw + i, tl.sum(total, 0).to(dw.dtype.element_ty), mask=real)


@triton.jit
def _spread_kernel(dp, which, dy, H, W, O, numbers, BLOCK: tl.constexpr):
    """The gradient at all places of the convolution: dp where it came from, else 0."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    channel, place = i % O, i // O
    row, column, image = place // W % H, place % W, place // (H * W)
    inside = (i < numbers) & (row < H // 2 * 2) & (column < W // 2 * 2)
    at = ((image * (H // 2) + row // 2) * (W // 2) + column // 2) * O + channel
    here = tl.load(which + at, mask=inside, other=-1) == row % 2 * 2 + column % 2
    tl.store(dy + i, tl.load(dp + at, mask=inside & here, other=0.0), mask=i < numbers)


def fits(channels: int, out: int) -> bool:
    """Does conv_pool take a convolution of so many channels to so many?"""
    return channels in (8, 16, 24, 32) and out > 0 and out % 32 == 0


def conv_pool(x: Tensor, weight: Tensor) -> Tensor:
    """As conv_pool_eager. x is channels last, C a multiple of 8 up to 32, O one of 32, both of one of DTYPES; so is the
    result. The gradient of x is left to torch's convolution, for the few steps that need it."""
    if x.ndim != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"conv_pool needs x (batch, C, h, w) in channels_last, got strides {x.stride()} of shape "
                         f"{tuple(x.shape)}")
    if x.dtype not in DTYPES or weight.dtype != x.dtype:
        raise ValueError(f"conv_pool needs x and weight of one dtype, float16, bfloat16 or float32; got {x.dtype} and "
                         f"{weight.dtype}")
    if weight.shape[1:] != (x.size(1), 3, 3) or not fits(x.size(1), len(weight)):
        raise ValueError(f"conv_pool needs 8, 16, 24 or 32 channels C and a weight (O, C, 3, 3), O a multiple of 32; "
                         f"got {x.size(1)} channels and {tuple(weight.shape)}")
    if min(x.shape[2:]) < 2 or not x.size(0):
        raise ValueError(f"conv_pool needs images with 2×2 pixels to pool; got shape {tuple(x.shape)}")
    return _ConvPool.apply(x, weight)


def _grid(name: str, dtype: torch.dtype, places: int, channels: int, out: int) -> tuple[tuple[int], int, int, dict]:
    """(grid, tiles of places, programs of the same channels, constants and options) of a launch, by CUTS."""
    cut = (EXACT if dtype == torch.float32 else CUTS)[name]
    block_o = max(size for size in (16, 32, 64, 128) if out % size == 0 and size <= cut.channels)
    constants = dict(C=channels, P=cut.places, BLOCK_O=block_o, STAGES=cut.stages, num_warps=cut.warps)
    strips, tiles = out // block_o, triton.cdiv(places, cut.places)
    if name == "forward":
        constants |= dict(DEPTH=cut.depth, RESIDENT=cut.resident and channels <= MOST_RESIDENT)
    else:
        constants["WIDTH"] = cut.width
        strips *= triton.cdiv(4 * channels, cut.width)
    parts = max(1, min(tiles, cut.programs // strips))
    return (strips * parts,), tiles, parts, constants


class _ConvPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        batch, channels, height, width = x.shape
        filters = weight.contiguous(memory_format=torch.channels_last)
        shape = batch, len(weight), height // 2, width // 2
        like = dict(size=shape, device=x.device, memory_format=torch.channels_last)
        pooled, which = torch.empty(dtype=x.dtype, **like), torch.empty(dtype=torch.int8, **like)
        sizes = batch * shape[2] * shape[3], height, width, len(weight)
        grid, tiles, parts, cut = _grid("forward", x.dtype, sizes[0], channels, len(weight))
        _conv_pool_kernel[grid](x, filters, pooled, which, *sizes, tiles, parts, **cut)
        ctx.sizes = sizes
        ctx.save_for_backward(x, weight, which)
        return pooled

    @staticmethod
    def backward(ctx, dp):
        x, weight, which = ctx.saved_tensors
        dp = dp.contiguous(memory_format=torch.channels_last)
        dx = _input_gradient(x, weight, which, dp) if ctx.needs_input_grad[0] else None
        return dx, _weight_gradient(x, weight, which, dp, ctx.sizes) if ctx.needs_input_grad[1] else None


def _weight_gradient(x: Tensor, weight: Tensor, which: Tensor, dp: Tensor, sizes: tuple[int, ...]) -> Tensor:
    out, channels = weight.shape[:2]
    grid, tiles, parts, cut = _grid("weight_sums", x.dtype, sizes[0], channels, out)
    sums = torch.empty((parts, 3, 2 * out, 4 * channels), dtype=torch.float32, device=x.device)
    _weight_sums_kernel[grid](x, dp, which, sums, *sizes, tiles, parts, **cut)
    dw = torch.empty_like(weight, memory_format=torch.channels_last)
    _weight_kernel[(triton.cdiv(dw.numel(), REDUCED),)](sums, dw, out, parts, C=channels, BLOCK=REDUCED, GROUP=16)
    return dw


def _input_gradient(x: Tensor, weight: Tensor, which: Tensor, dp: Tensor) -> Tensor:
    """By the convolution's own backward, from the gradient at all its places."""
    batch, out = dp.shape[:2]
    dy = torch.empty((batch, out, *x.shape[2:]), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    _spread_kernel[(triton.cdiv(dy.numel(), 1024),)](dp, which, dy, *x.shape[2:], out, dy.numel(), BLOCK=1024)
    return torch.ops.aten.convolution_backward(dy, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1,
                                               [True, False, False])[0]
