"""Images of 32×32 pixels as a first layer wants them, straight from the bytes of the data set: one launch a batch.

    augment   out[y, x] = normalised image[r(y + down), r(x' + right)], x' = x or 31 − x (flip), 0 in the cut-out square
    whiten    GELU or SiLU of the convolution of that with frozen 2×2 filters, plus a bias that may be trained

r reflects at the border, as if the image had been padded. What to do with which image is a table of integers, a row for
each image of a batch (`COLUMNS`), so a batch takes no boolean masks, no padded copy and no copy of the whole data set.

`whiten` reads 3 KB an image and writes its 31×31×24 activations once, 46 MB a thousand images in float16. Separately
that is a gather, a normalised batch, a convolution of three channels, which no tensor-core kernel likes, and an
activation that reads and writes those 46 MB again. Backward only the bias has a gradient: the convolution is computed
anew from the bytes, and its sums over the batch are taken.

Eager twins: augment_eager, whiten_eager.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .instructions import exp2, inverse

COLUMNS = ("image", "flip", "down", "right", "cut row", "cut column")  # of the table; the last two: upper left corner
SIZE = 32
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of the training images, as fractions of 255
TAPS = 12  # of a filter: 2×2 pixels of three colours
ACTIVATIONS = ("gelu", "silu")
WHITEN = dict(BLOCK=128, PARTS=4, maxnreg=72)  # places at a time, programs to an image; as tuned on an H200
WHITEN_BIAS = dict(BLOCK=128, PARTS=1, maxnreg=128)
# Minimax polynomials on [0, 6], highest power first (linear programs in float64): log₂ Φ(−t), relative to
# max(t Φ(−t), 0.002), and (t − M(t)) / √2π, relative to exp(t² / 2).
TAIL = tl.constexpr((2.88678428e-05, -0.00070814406, 0.00778218851, -0.0527692649, -0.459410851, -1.15093023,
                     -1.000029))
MILLS = tl.constexpr((-3.790306e-05, 0.0006153826, -0.004399788, 0.01882494, -0.0561491, 0.1299721, -0.2492791,
                      0.7978181, -0.499999))


def augment_eager(images: Tensor, table: Tensor, cut: int, dtype: torch.dtype) -> Tensor:
    """images (…, 32, 32, 3) uint8, table (batch, 6) int32 -> (batch, 3, 32, 32) in `dtype`, channels last.
    cut: side of the square that is set to 0, or 0 for none."""
    image, flip, down, right, row, column = table.long()[:, :, None, None].unbind(1)  # each (batch, 1, 1)
    place = torch.arange(SIZE, device=images.device)
    y, x = place[None, :, None], place[None, None, :]
    source_y, source_x = (_reflected(p) for p in (y + down, torch.where(flip > 0, SIZE - 1 - x, x) + right))
    mean, std = _statistics(images.device)
    pixels = (images[image, source_y, source_x].float() - mean) * (1 / std)
    if cut:
        inside = (y >= row) & (y < row + cut) & (x >= column) & (x < column + cut)
        pixels = pixels * ~inside[..., None]
    return pixels.to(dtype).permute(0, 3, 1, 2)


@lru_cache
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """MEAN and STD in bytes, copied to `device` once: a CUDA graph cannot hold that copy."""
    return tuple(torch.tensor(v, device=device) * 255 for v in (MEAN, STD))


def _reflected(place: Tensor) -> Tensor:
    place = place.abs()
    return torch.minimum(place, 2 * (SIZE - 1) - place)


def activation(name: str):
    """The function that a name in ACTIVATIONS stands for."""
    return {"gelu": F.gelu, "silu": F.silu}[name]


def whiten_eager(images: Tensor, table: Tensor, cut: int, weight: Tensor, bias: Tensor, act: str) -> Tensor:
    """As augment_eager, then act(convolution with weight (channels, 3, 2, 2) + bias): (batch, channels, 31, 31)."""
    return activation(act)(F.conv2d(augment_eager(images, table, cut, weight.dtype), weight, bias))


# By tl.erf and tl.exp, GELU and its derivative are 32 and 40 instructions; an H200 issues 32 for each value while four
# bytes of it, in and out, pass through its memory. These are 10 and 15.
@triton.jit
def _polynomial(t, coefficients: tl.constexpr, DEGREE: tl.constexpr):
    """Coefficients of falling powers, by Horner's rule."""
    value = t * coefficients[0] + coefficients[1]
    for i in tl.static_range(2, DEGREE + 1):
        value = value * t + coefficients[i]
    return value


@triton.jit
def activated(z, SILU: tl.constexpr):
    """GELU (exact) or SiLU of float32.

    GELU is max(z, 0) − |z| Φ(−|z|), Φ the normal distribution. log₂ Φ(−t) is nearly a parabola: the minimax polynomial
    of degree 6 on [0, 6] errs by less than 6e-7, and of results above 1e-7 by less than a part in 4500.
    """
    if SILU:
        return z * inverse(1 + exp2(z * -1.4426950408889634))
    t = tl.minimum(tl.abs(z), 6.0)
    tail = exp2(_polynomial(t, TAIL, 6))
    return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL) - t * tail


@triton.jit
def activated_slope(z, SILU: tl.constexpr):
    """The derivative of `activated`, GELU's to 1.2e-6.

    GELU's is ½ ± (½ − φ(t) (M(t) − t)) with t = |z|, the sign of z, φ the normal density and M = Φ(−t) / φ(t), Mills'
    ratio, so smooth that M(t) − t may be a polynomial.
    """
    if SILU:
        s = inverse(1 + exp2(z * -1.4426950408889634))
        return s * (1 + (z - z * s))
    t = tl.minimum(tl.abs(z), 6.0)
    half = 0.5 + exp2(t * (t * -0.7213475204444817)) * _polynomial(t, MILLS, 8)
    sign = z.to(tl.int32, bitcast=True) & -2147483648
    return 0.5 + (half.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)  # half is above 0


@triton.jit
def _reflect(place):
    place = tl.abs(place)
    return tl.minimum(place, 62 - place)


@triton.jit
def _pixels(images, row, y, x, c, inside, CUT: tl.constexpr):
    """Normalised float32 at (y, x) of colour c of the augmented image that the table's row at `row` asks for."""
    image, flip = tl.load(row).to(tl.int64), tl.load(row + 1)
    source_y = _reflect(y + tl.load(row + 2))
    source_x = _reflect(tl.where(flip > 0, 31 - x, x) + tl.load(row + 3))
    value = tl.load(images + image * 3072 + (source_y * 32 + source_x) * 3 + c, mask=inside, other=0)
    mean = tl.where(c == 0, 125.307, tl.where(c == 1, 122.961, 113.8575))  # 255 · MEAN
    scale = tl.where(c == 0, 1 / 62.985, tl.where(c == 1, 1 / 62.0925, 1 / 66.708))  # 1 / (255 · STD)
    value = (value.to(tl.float32) - mean) * scale
    if CUT > 0:
        top, left = tl.load(row + 4), tl.load(row + 5)
        inside = inside & ~((y >= top) & (y < top + CUT) & (x >= left) & (x < left + CUT))
    return tl.where(inside, value, 0.0)


@triton.jit
def _augment_kernel(images, table, out, CUT: tl.constexpr, BLOCK: tl.constexpr):
    """Programs (batch, parts of an image): BLOCK bytes of one image."""
    z = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pixel = place // 3
    value = _pixels(images, table + z * 6, pixel // 32, pixel % 32, place % 3, place < 3072, CUT)
    tl.store(out + z * 3072 + place, value.to(out.dtype.element_ty), mask=place < 3072)


@triton.jit
def _filters(weight, bias, CHANNELS: tl.constexpr, OUT: tl.constexpr):
    """(filters (16, OUT), bias (1, OUT) float32), with zeros for the taps and channels beyond the real ones."""
    tap, channel = tl.arange(0, 16), tl.arange(0, OUT)
    filters = tl.load(weight + channel[None, :] * 12 + tap[:, None],
                      mask=(tap < 12)[:, None] & (channel < CHANNELS)[None, :], other=0.0)
    return filters, tl.load(bias + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _convolved(images, row, filters, offset, place, CUT: tl.constexpr):
    """float32 (BLOCK, OUT): filters at the places 0 … 960 of one image, plus the bias."""
    tap = tl.arange(0, 16)
    y = (place // 31)[:, None] + (tap // 6)[None, :]
    x = (place % 31)[:, None] + (tap // 3 % 2)[None, :]
    real = (place < 961)[:, None] & (tap < 12)[None, :]
    patch = _pixels(images, row, y, x, (tap % 3)[None, :], real, CUT).to(filters.dtype)
    return tl.dot(patch, filters, input_precision="ieee") + offset


@triton.jit
def _whiten_kernel(images, table, weight, bias, out, CHANNELS: tl.constexpr, CUT: tl.constexpr, SILU: tl.constexpr,
                   PARTS: tl.constexpr, BLOCK: tl.constexpr, OUT: tl.constexpr):
    """Programs (batch, PARTS): a part of one image, BLOCK places at a time, all channels."""
    z = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, OUT)
    filters, offset = _filters(weight, bias, CHANNELS, OUT)
    for first in range(tl.program_id(1) * BLOCK, 961, PARTS * BLOCK):
        place = first + tl.arange(0, BLOCK)
        y = activated(_convolved(images, table + z * 6, filters, offset, place, CUT), SILU)
        y = tl.where((channel < CHANNELS)[None, :], y, 0.0)  # so that no thread computes the others
        tl.store(out + z * (961 * CHANNELS) + place[:, None] * CHANNELS + channel[None, :], y.to(out.dtype.element_ty),
                 mask=(place < 961)[:, None] & (channel < CHANNELS)[None, :])


@triton.jit
def _whiten_bias_kernel(images, table, weight, bias, slope, sums, CHANNELS: tl.constexpr, CUT: tl.constexpr,
                        SILU: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, OUT: tl.constexpr):
    """The gradient of the bias over such a part: slope is that of the loss by the result; sums (batch, PARTS, OUT)
    float32."""
    z = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, OUT)
    filters, offset = _filters(weight, bias, CHANNELS, OUT)
    total = tl.zeros((BLOCK // 2, OUT), dtype=tl.float32)
    for first in range(tl.program_id(1) * BLOCK, 961, PARTS * BLOCK):
        place = first + tl.arange(0, BLOCK)
        at = slope + z * (961 * CHANNELS) + place[:, None] * CHANNELS + channel[None, :]
        inside = (place < 961)[:, None] & (channel < CHANNELS)[None, :]
        dy = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        owed = dy * activated_slope(_convolved(images, table + z * 6, filters, offset, place, CUT), SILU)
        total += tl.sum(tl.reshape(owed, (2, BLOCK // 2, OUT)), 0)  # of what one thread has
    tl.store(sums + (z * PARTS + tl.program_id(1)) * OUT + channel, tl.sum(total, 0))


def augment(images: Tensor, table: Tensor, cut: int, dtype: torch.dtype) -> Tensor:
    """As augment_eager, in one launch."""
    _check(images, table)
    out = torch.empty(len(table), SIZE, SIZE, 3, dtype=dtype, device=images.device)
    if len(table):
        _augment_kernel[(len(table), 3)](images, table, out, CUT=cut, BLOCK=1024)
    return out.permute(0, 3, 1, 2)


def whiten(images: Tensor, table: Tensor, cut: int, weight: Tensor, bias: Tensor, act: str) -> Tensor:
    """As whiten_eager, in one launch; the bias alone can have a gradient."""
    _check(images, table)
    if weight.shape[1:] != (3, 2, 2) or weight.requires_grad or bias.shape != weight.shape[:1]:
        raise ValueError("whiten needs frozen filters (channels, 3, 2, 2) and as many biases, got "
                         f"{tuple(weight.shape)}{' with gradient' * weight.requires_grad} and {tuple(bias.shape)}")
    if act not in ACTIVATIONS:
        raise ValueError(f"whiten act={act!r}: expected one of {', '.join(ACTIVATIONS)}")
    return _Whiten.apply(images, table, cut, weight.permute(0, 2, 3, 1).contiguous(), bias, act)


def _check(images: Tensor, table: Tensor) -> None:
    if images.dtype != torch.uint8 or images.shape[1:] != (SIZE, SIZE, 3) or not images.is_contiguous():
        raise ValueError(f"expected contiguous images (…, 32, 32, 3) of uint8, got {tuple(images.shape)} of "
                         f"{images.dtype}")
    if table.dtype != torch.int32 or table.shape[1:] != (len(COLUMNS),) or not table.is_contiguous():
        raise ValueError(f"expected a contiguous table (batch, {len(COLUMNS)}) of int32, got {tuple(table.shape)} "
                         f"{table.dtype}")


class _Whiten(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, table, cut, weight, bias, act):
        channels, side = len(weight), SIZE - 1
        out = torch.empty(len(table), side, side, channels, dtype=weight.dtype, device=images.device)
        ctx.options = dict(CHANNELS=channels, CUT=cut, SILU=act == "silu",
                           OUT=max(16, triton.next_power_of_2(channels)))
        ctx.save_for_backward(images, table, weight, bias)
        _whiten_kernel[(len(table), WHITEN["PARTS"])](images, table, weight, bias, out, **ctx.options, **WHITEN)
        return out.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx, slope):
        images, table, weight, bias = ctx.saved_tensors
        slope = slope.permute(0, 2, 3, 1).contiguous()
        parts = WHITEN_BIAS["PARTS"]
        sums = torch.empty(len(table) * parts, ctx.options["OUT"], dtype=torch.float32, device=images.device)
        _whiten_bias_kernel[(len(table), parts)](images, table, weight, bias, slope, sums, **ctx.options, **WHITEN_BIAS)
        return None, None, None, None, sums.sum(0)[: len(bias)].to(bias.dtype), None
