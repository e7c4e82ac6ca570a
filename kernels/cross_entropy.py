"""Output head and loss: cross entropy of softcapped logits, without float32 logits.

    l = x Wᵀ                     (tokens, vocabulary), kept in the dtype of x
    z = A · sigmoid((l + B) / C) = A/2 · (1 + τ),   τ = tanh((l + B) / 2C)
    loss = 1/T · Σ_t (log Σ_j exp z_tj − z_t,y(t)),                T tokens; over the targets y(t) ≥ 0
    ∂loss/∂l_j = 1/T · A/4C · (1 − τ_j²) · (p_j − [y = j]),        p = softmax z;  0 where y < 0

A softcap of a · tanh(l / a) is A = 2a, B = 0, C = a/2 less the constant a, which cancels. (A, B, C) = (23, 5, 7.5) is
modded-nanogpt's. As z lies in [0, A], exp(z − A) needs no pass for the maximum. Gradients are computed together with
the loss, as in Liger Kernel, for `ROWS` tokens at a time: logits live for that long, and what is kept for backward is
dx and dW, which backward multiplies by the incoming slope. A row's gradient overwrites its logits in the launch that
sums its exponentials: the second read of the row, 100 KB in a vocabulary of 50304, is meant to come from the L2 cache.

With N = T · vocabulary, products take 6 N · width FLOPs on every route, and bytes by count are
                     products   other kernels                              others at T = 65536, vocabulary 50304
    torch.compile    6 N        6 N: read; read, write                     20 GB: 4.7 ms at 4.2 TB/s
    bfloat16         6 N        4 N: read, write                           13 GB: 3.1 ms
    fp8              4 N        6 N: read; read, write twice in 8 bits     20 GB: 4.7 ms; faster products
An element takes two special functions each time it is looked at (tanh, exp2; three with an exact tanh), of which a
multiprocessor does 16 a clock: 3.2 ms for both looks of the bfloat16 route on an H200 at 1.98 GHz, 4.7 if exact.
Measured there, width 768, forward and backward (records/studies/cross-entropy): torch.compile 33.5 ms, bfloat16 27.5,
fp8 19.0.

fp8 takes x and W in e4m3, each with one scale, and ∂loss/∂l in e5m2, whose scale is known beforehand: its largest
possible value is A/4C / T, which becomes GRADIENT_MOST; the smallest normal e5m2 is then a p of 2e-9. The two products
of it sum over different dimensions, so it is written both ways; row sums and gradients are two launches then, as
transposed stores need tiles.

Eager twin: softcapped_cross_entropy_eager.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import why_not
from .fp8 import E5M2, MULTIPLE, eight_bits, quantised, store_both
from .instructions import INTERPRETED

PRECISIONS = ("bfloat16", "fp8")
ROWS = 32768  # tokens whose logits exist at a time: 3.3 GB at a vocabulary of 50304. cuBLAS is as fast with 65536
FAST_TANH = True  # where gradients are wanted: the GPU's tanh, one instruction and 11 bits; else exp2 and a division
MOST_SCALE = 80.0  # of A: the smallest exp(z − A) is above float32's underflow
GRADIENT_MOST = 2.0**15  # of e5m2, which ends at 57344
_BLOCK, _WARPS = 4096, 16  # of a row at a time; two programs to a multiprocessor hold 26 MB of rows, half of the L2
_TILE_ROWS, _TILE_COLUMNS, _TILE_WARPS = 32, 256, 8  # of fp8 slopes: records/studies/cross-entropy/slopes.txt
Cap = tuple[float, float, float]


def softcapped_cross_entropy_eager(x: Tensor, weight: Tensor, targets: Tensor, cap: Cap) -> Tensor:
    """As softcapped_cross_entropy, in plain torch: several copies of float32 logits (float64 of float64 input)."""
    scale, shift, width = cap
    logits = F.linear(x, weight.to(x.dtype))
    z = scale * torch.sigmoid((logits.to(torch.promote_types(x.dtype, torch.float32)) + shift) / width) - scale
    each = z.exp().sum(-1).log() - z.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return (each * (targets >= 0)).sum() / x.size(0)


@triton.jit
def _tanh(u, FAST: tl.constexpr):
    if FAST and not INTERPRETED:  # an error of 2⁻¹¹ at most, by PTX's manual
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1)
    return 2 / (1 + tl.exp2(u * -2.8853900817779268)) - 1


@triton.jit
def _float32(x):
    """bfloat16 in float32. Not by a cast: triton 3.6 would move the change of layout that a transposed store takes from
    the 8-bit result to before a cast, and compute all that follows it twice."""
    if INTERPRETED:
        return x.to(tl.float32)
    return tl.inline_asm_elementwise("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=&r,=r,r", [x],
                                     dtype=tl.float32, is_pure=True, pack=2)


@triton.jit
def _rows_kernel(logits, targets, losses, lses, V, slope, offset, bits, half, gain, IN_PLACE: tl.constexpr,
                 FAST: tl.constexpr, BLOCK: tl.constexpr):
    """Loss and log₂ Σ exp(z − A) of a row; IN_PLACE: gain · its slopes over its logits. Programs (rows).

    τ = tanh(slope · l + offset), z − A = half · (τ − 1), and that over log 2 = bits · (τ − 1).
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    target = tl.load(targets + row)
    counts = (target >= 0).to(tl.float32)
    known = (target >= 0) & (target < V)
    hit = tl.load(logits + target, mask=known, other=0.0).to(tl.float32)
    hit = _tanh(hit * slope + offset, FAST)

    columns = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    ahead = tl.load(logits + columns, mask=columns < V, other=0.0)  # a block ahead, to keep memory busy
    for start in range(0, V, BLOCK):
        tau = _tanh(ahead.to(tl.float32) * slope + offset, FAST)
        after = start + BLOCK + columns
        ahead = tl.load(logits + after, mask=after < V, other=0.0)
        sums += tl.where(start + columns < V, tl.exp2(tau * bits - bits), 0.0)
    total = tl.where(target >= V, float("nan"), tl.sum(sums))  # a target outside: NaN, not silence
    lse = tl.log2(total)
    tl.store(losses + row, counts * (lse * 0.6931471805599453 - (hit - 1) * half))
    tl.store(lses + row, lse)

    if IN_PLACE:
        factor = counts * gain
        ahead = tl.load(logits + columns, mask=columns < V, other=0.0)
        for start in range(0, V, BLOCK):
            tau = _tanh(ahead.to(tl.float32) * slope + offset, FAST)
            after = start + BLOCK + columns
            ahead = tl.load(logits + after, mask=after < V, other=0.0)
            gradient = tl.exp2(tau * bits - (bits + lse)) * factor * (1 - tau * tau)
            at = start + columns
            tl.store(logits + at, gradient.to(logits.dtype.element_ty), mask=at < V)
        gradient = (tl.exp2(hit * bits - (bits + lse)) - 1) * gain * (1 - hit * hit)
        tl.debug_barrier()  # other threads wrote there just now
        tl.store(logits + target, gradient.to(logits.dtype.element_ty), mask=known)


@triton.jit
def _slopes_kernel(logits, targets, lses, straight, transposed, R, V, slope, offset, bits, factor, FAST: tl.constexpr,
                   ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """factor · (1 − τ²)(p − [y = j]), 0 where y < 0, into (R, V) and (V, R). Programs (tiles of columns, of rows).

    First as if no column were a target, then those that are once more, instead of asking so of every element.
    """
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(0) * COLUMNS
    columns = first + tl.arange(0, COLUMNS)
    at = rows.to(tl.int64)[:, None] * V + columns[None, :]
    inside = (rows < R)[:, None] & (columns < V)[None, :]
    tau = _tanh(_float32(tl.load(logits + at, mask=inside, other=0.0)) * slope + offset, FAST)
    lse = tl.load(lses + rows, mask=rows < R, other=0.0)
    target = tl.load(targets + rows, mask=rows < R, other=-1)
    scale = tl.where(target >= 0, factor, 0.0)
    gradient = tl.exp2(tau * bits - (bits + lse)[:, None]) * scale[:, None]
    store_both(gradient * (1 - tau * tau), straight, transposed, rows, columns, R, V)

    here = (target >= first) & (target < tl.minimum(first + COLUMNS, V))
    at = rows.to(tl.int64) * V + target
    tau = _tanh(tl.load(logits + at, mask=here, other=0.0).to(tl.float32) * slope + offset, FAST)
    gradient = (tl.exp2(tau * bits - (bits + lse)) - 1) * factor * (1 - tau * tau)
    values = eight_bits(gradient, straight.dtype.element_ty)
    tl.debug_barrier()  # other threads wrote there just now
    tl.store(straight + at, values, mask=here)
    tl.store(transposed + target * R + rows, values, mask=here)


def softcapped_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, *, cap: Cap, precision: str = "bfloat16",
                             engine: str = "auto") -> Tensor:
    """Mean loss over the tokens, () float32, nats; differentiable by x and weight, once.

    x          (tokens, width), bfloat16 or float32 (float16 would lose small slopes: the twin takes it); any strides
    weight     (vocabulary, width), float32 or the dtype of x; its gradient is summed in float32
    targets    (tokens,) int64; negative: ignored, which leaves the number of tokens that the mean divides by. One of
               vocabulary or more makes loss and gradients NaN (an index error in the twin)
    cap        (A, B, C) of z = A · sigmoid((l + B) / C), 0 < A ≤ 80, C > 0
    precision  of the products: "bfloat16", the dtype of x; "fp8", for which tokens, vocabulary and width must be
               multiples of 16
    engine     "fused": the kernels; "eager": the twin; "auto": the kernels for CUDA tensors wherever they run.
               ValueError where they cannot do what is asked; fp8 is theirs alone
    """
    if x.ndim != 2 or weight.shape[1:] != x.shape[1:] or targets.shape != x.shape[:1] or 0 in x.shape:
        raise ValueError(f"softcapped_cross_entropy needs x (tokens, width), weight (vocabulary, width) and targets "
                         f"(tokens,), got {tuple(x.shape)}, {tuple(weight.shape)} and {tuple(targets.shape)}")
    if targets.dtype != torch.int64:
        raise ValueError(f"softcapped_cross_entropy needs int64 targets, got {targets.dtype}")
    if len(cap) != 3 or not 0 < cap[0] <= MOST_SCALE or cap[2] <= 0:
        raise ValueError(f"softcapped_cross_entropy cap={cap!r}: expected (A, B, C), 0 < A ≤ {MOST_SCALE:g}, C > 0")
    for name, value, known in (("precision", precision, PRECISIONS), ("engine", engine, ("auto", "fused", "eager"))):
        if value not in known:
            raise ValueError(f"softcapped_cross_entropy {name}={value!r}: expected one of {', '.join(known)}")
    obstacle = _obstacle(x.device)
    if x.dtype not in (torch.bfloat16, torch.float32) or weight.dtype not in (torch.float32, x.dtype):
        obstacle = (f"they need x of bfloat16 or float32 and weight of float32 or the same, not {x.dtype} and "
                    f"{weight.dtype}")
    fused = obstacle is None and (engine == "fused" or engine == "auto" and x.is_cuda)
    if engine == "fused" and not fused:
        raise ValueError(f'softcapped_cross_entropy engine="fused": {obstacle}; use engine="auto" or "eager"')
    if precision == "fp8":
        if not fused:
            raise ValueError(f'softcapped_cross_entropy precision="fp8" is for the kernels, '
                             f'{obstacle or "which run on a GPU or with engine=fused"}; use precision="bfloat16"')
        if any(size % MULTIPLE for size in (*x.shape, weight.size(0))):
            raise ValueError(f'softcapped_cross_entropy precision="fp8" needs tokens, width and vocabulary that are '
                             f'multiples of {MULTIPLE}, got {tuple(x.shape)} and {tuple(weight.shape)}; use '
                             f'precision="bfloat16"')
    if not fused:
        return softcapped_cross_entropy_eager(x, weight, targets, cap)
    gradients = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return _operator(x, weight, targets, list(map(float, cap)), precision, gradients)[0]


def _obstacle(device: torch.device) -> str | None:
    """why_not, which torch.compile asks once."""
    return why_not(device)


# What torch.compiler.assume_constant_result does, which imports torch._dynamo first: seconds for who compiles nothing.
_obstacle._dynamo_marked_constant = True


# An operator of its own, gradients included: torch.compile neither looks into it nor breaks its graph there.
@torch.library.custom_op("turborun::softcapped_cross_entropy", mutates_args=())
def _operator(x: Tensor, weight: Tensor, targets: Tensor, cap: Sequence[float], precision: str, gradients: bool
              ) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dx, dW); without `gradients` the last two are empty."""
    x, targets = x.contiguous(), targets.contiguous()
    (tokens, _), vocabulary = x.shape, weight.size(0)
    fp8 = precision == "fp8"
    head = quantised(weight.contiguous()) if fp8 else weight.to(x.dtype)
    if fp8 and gradients:
        unit = x.new_full((), _gain(cap, tokens) / GRADIENT_MOST, dtype=torch.float32)
    losses, lses = x.new_empty((2, tokens), dtype=torch.float32)
    dx, dw = torch.empty_like(x) if gradients else x.new_empty(0), None
    buffer = x.new_empty((min(tokens, ROWS), vocabulary), dtype=torch.bfloat16 if fp8 else x.dtype)
    for begin in range(0, tokens, ROWS):
        part = slice(begin, min(begin + ROWS, tokens))
        logits = buffer[: part.stop - begin]
        if fp8:
            rows = quantised(x[part])
            torch._scaled_mm(rows[0], head[0].T, rows[2], head[2], out_dtype=logits.dtype, use_fast_accum=True,
                             out=logits)
        else:
            torch.mm(x[part], head.T, out=logits)
        _sum_rows(logits, targets[part], losses[part], lses[part], cap, tokens, gradients, in_place=not fp8)
        if not gradients:
            continue
        if fp8:  # sums over thousands of products: not with use_fast_accum, which keeps 14 bits of them
            slopes = _slopes(logits, targets[part], lses[part], cap)
            torch._scaled_mm(slopes[0], head[1].T, unit, head[2], out_dtype=dx.dtype, out=dx[part])
            more = torch._scaled_mm(slopes[1], rows[1].T, unit, rows[2], out_dtype=torch.float32)
        else:
            torch.mm(logits, head, out=dx[part])
            more = _float32_product(logits.T, x[part])
        dw = more if dw is None else dw.add_(more)
    return losses.sum() / tokens, dx, x.new_empty(0) if dw is None else dw.to(weight.dtype)


@_operator.register_fake
def _(x, weight, targets, cap, precision, gradients):
    made = (x.new_empty(x.shape), weight.new_empty(weight.shape)) if gradients else (x.new_empty(0), x.new_empty(0))
    return x.new_empty((), dtype=torch.float32), *made


def _keep(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # else zeros as large as dx and dW come with the slope of the loss
    ctx.save_for_backward(*output[1:])


def _backward(ctx, slope, *_):
    dx, dw = ctx.saved_tensors
    return slope * dx, slope * dw, *(None,) * 4


_operator.register_autograd(_backward, setup_context=_keep)


def _constants(cap: Sequence[float]) -> dict[str, float]:
    """What the kernels make of A, B and C; see _rows_kernel."""
    scale, shift, width = cap
    return dict(slope=0.5 / width, offset=0.5 * shift / width, bits=0.5 * scale / math.log(2))


def _gain(cap: Sequence[float], tokens: int) -> float:
    """A/4C / T, the largest slope of the mean by a logit."""
    return cap[0] / (4 * cap[2]) / tokens


def _sum_rows(logits: Tensor, targets: Tensor, losses: Tensor, lses: Tensor, cap: Sequence[float], tokens: int,
              gradients: bool, in_place: bool) -> None:
    """Writes losses and lses (rows,), and with `gradients` and `in_place` the slopes of the mean over the logits."""
    _rows_kernel[(logits.size(0),)](
        logits, targets, losses, lses, logits.size(1), **_constants(cap), half=0.5 * cap[0], gain=_gain(cap, tokens),
        IN_PLACE=gradients and in_place, FAST=FAST_TANH and gradients, BLOCK=_BLOCK, num_warps=_WARPS)


def _slopes(logits: Tensor, targets: Tensor, lses: Tensor, cap: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The slopes of the loss by the logits, the largest possible GRADIENT_MOST: (rows, V) and (V, rows), e5m2."""
    rows, vocabulary = logits.shape
    straight, transposed = (torch.empty(shape, dtype=E5M2, device=logits.device)
                            for shape in ((rows, vocabulary), (vocabulary, rows)))
    grid = triton.cdiv(vocabulary, _TILE_COLUMNS), triton.cdiv(rows, _TILE_ROWS)
    _slopes_kernel[grid](logits, targets, lses, straight, transposed, rows, vocabulary, **_constants(cap),
                         factor=GRADIENT_MOST, FAST=FAST_TANH, ROWS=_TILE_ROWS, COLUMNS=_TILE_COLUMNS,
                         num_warps=_TILE_WARPS)
    return straight, transposed


def _float32_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32, of half-precision factors too: torch has that for CUDA alone."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
