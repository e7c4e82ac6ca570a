"""Output head and loss: cross entropy of softcapped logits against one or more targets a token, without float32 logits.

    l = x Wᵀ                     (tokens, vocabulary), kept in the dtype of x
    z = A · sigmoid((l + B) / C) = A/2 · (1 + τ),   τ = tanh((l + B) / 2C)
    loss = 1/T · Σ_t Σ_k w_k (log Σ_j exp z_tj − z_t,y(t,k)),              T tokens; over the targets y(t, k) ≥ 0
    ∂loss/∂l_j = 1/T · A/4C · (1 − τ_j²) · (s p_j − Σ_k w_k [y_k = j]),    p = softmax z,  s = Σ_k w_k

A softcap of a · tanh(l / a) is A = 2a, B = 0, C = a/2 less the constant a, which cancels. (A, B, C) = (23, 5, 7.5) and
several targets a token, each further ahead than the one before, are modded-nanogpt's. As z lies in [0, A], exp(z − A)
needs no pass for the maximum. Gradients are computed together with the loss, as in Liger Kernel, for `ROWS` tokens at a
time: logits live for that long, and what is kept for backward is dx and dW, which backward multiplies by the incoming
slope. A row's gradient overwrites its logits in the launch that sums its exponentials: the second read of the row, 100
KB in a vocabulary of 50304, is meant to come from the L2 cache.

With N = T · vocabulary, products take 6 N · width FLOPs on every route, and bytes by count are
                     products   other kernels                              others at T = 65536, vocabulary 50304
    torch.compile    6 N        6 N: read; read, write                     20 GB: 4.7 ms at 4.2 TB/s
    bfloat16         6 N        4 N: read, write                           13 GB: 3.1 ms
    fp8              4 N        6 N: read; read, write twice in 8 bits     20 GB: 4.7 ms; faster products
An element takes two special functions each time it is looked at (tanh, exp2; three with an exact tanh), of which a
multiprocessor does 16 a clock: 3.2 ms for both looks of the bfloat16 route on an H200 at 1.98 GHz, 4.7 if exact.
Measured there, width 768, forward and backward (records/studies/cross-entropy): torch.compile 33.2 ms, bfloat16 27.3,
fp8 18.9.

fp8 takes x and W in e4m3, each with one scale, and ∂loss/∂l in e5m2, whose scale is known beforehand: its largest
possible value is Σ|w_k| · A/4C / T, which becomes GRADIENT_MOST; the smallest normal e5m2 is then a p of 2e-9. The two
products of it sum over different dimensions, so it is written both ways; row sums and gradients are two launches then,
as transposed stores need tiles.

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


def softcapped_cross_entropy_eager(x: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, cap: Cap) -> Tensor:
    """As softcapped_cross_entropy, in plain torch: several copies of float32 logits (float64 of float64 input)."""
    scale, shift, width = cap
    logits = F.linear(x, weight.to(x.dtype))
    z = scale * torch.sigmoid((logits.to(torch.promote_types(x.dtype, torch.float32)) + shift) / width) - scale
    each = z.exp().sum(-1, keepdim=True).log() - z.gather(1, targets.clamp(min=0))
    return (each * (targets >= 0) * weights).sum() / x.size(0)


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
def _rows_kernel(logits, targets, weights, losses, lses, V, slope, offset, bits, half, gain, K: tl.constexpr,
                 LANES: tl.constexpr, IN_PLACE: tl.constexpr, FAST: tl.constexpr, BLOCK: tl.constexpr):
    """Loss and log₂ Σ exp(z − A) of a row; IN_PLACE: gain · its slopes over its logits. Programs (rows), LANES ≥ K.

    τ = tanh(slope · l + offset), z − A = half · (τ − 1), and that over log 2 = bits · (τ − 1).
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    lanes = tl.arange(0, LANES)
    target = tl.load(targets + row * K + lanes, mask=lanes < K, other=-1)
    valid = target >= 0
    weight = tl.where(valid, tl.load(weights + lanes, mask=lanes < K, other=0.0), 0.0)
    known = valid & (target < V)
    hit = tl.load(logits + tl.where(known, target, 0), mask=known, other=0.0).to(tl.float32)
    hit = _tanh(hit * slope + offset, FAST)

    columns = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    ahead = tl.load(logits + columns, mask=columns < V, other=0.0)  # a block ahead, to keep memory busy
    for start in range(0, V, BLOCK):
        tau = _tanh(ahead.to(tl.float32) * slope + offset, FAST)
        after = start + BLOCK + columns
        ahead = tl.load(logits + after, mask=after < V, other=0.0)
        sums += tl.where(start + columns < V, tl.exp2(tau * bits - bits), 0.0)
    total = tl.sum(sums)
    total = tl.where(tl.max((target >= V).to(tl.int32)) > 0, float("nan"), total)  # a target outside: NaN, not silence
    lse = tl.log2(total)
    all_weights = tl.sum(weight)
    loss = all_weights * lse * 0.6931471805599453 - tl.sum(weight * (hit - 1) * half)
    tl.store(losses + row, loss)
    tl.store(lses + row, lse)

    if IN_PLACE:
        factor = all_weights * gain
        ahead = tl.load(logits + columns, mask=columns < V, other=0.0)
        for start in range(0, V, BLOCK):
            tau = _tanh(ahead.to(tl.float32) * slope + offset, FAST)
            after = start + BLOCK + columns
            ahead = tl.load(logits + after, mask=after < V, other=0.0)
            gradient = tl.exp2(tau * bits - (bits + lse)) * factor * (1 - tau * tau)
            at = start + columns
            tl.store(logits + at, gradient.to(logits.dtype.element_ty), mask=at < V)
        same = (target[:, None] == target[None, :]) & valid[None, :]
        owed = tl.sum(tl.where(same, weight[None, :], 0.0), 1)  # of all targets that are this token
        gradient = (tl.exp2(hit * bits - (bits + lse)) * all_weights - owed) * gain * (1 - hit * hit)
        tl.debug_barrier()  # other threads wrote there just now
        tl.store(logits + tl.where(known, target, 0), gradient.to(logits.dtype.element_ty), mask=known)


@triton.jit
def _slopes_kernel(logits, targets, weights, factor, lses, straight, transposed, R, V, slope, offset, bits,
                   K: tl.constexpr, LANES: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr,
                   COLUMNS: tl.constexpr):
    """factor · (1 − τ²)(s p − Σ_k w_k [y_k = j]) into (R, V) and (V, R). Programs (tiles of columns, of rows).

    First as if no column were a target, then those that are once more, instead of asking so of every element.
    """
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(0) * COLUMNS
    columns = first + tl.arange(0, COLUMNS)
    at = rows.to(tl.int64)[:, None] * V + columns[None, :]
    inside = (rows < R)[:, None] & (columns < V)[None, :]
    tau = _tanh(_float32(tl.load(logits + at, mask=inside, other=0.0)) * slope + offset, FAST)
    lse = tl.load(lses + rows, mask=rows < R, other=0.0)
    scale = tl.load(factor)
    lanes = tl.arange(0, LANES)[None, :]
    asked = (rows < R)[:, None] & (lanes < K)
    target = tl.load(targets + rows.to(tl.int64)[:, None] * K + lanes, mask=asked, other=-1)
    weight = tl.load(weights + lanes, mask=lanes < K, other=0.0) * scale
    sums = tl.sum(tl.where(target >= 0, weight, 0.0), 1)
    gradient = tl.exp2(tau * bits - (bits + lse)[:, None]) * sums[:, None]
    store_both(gradient * (1 - tau * tau), straight, transposed, rows, columns, R, V)

    here = (target >= first) & (target < tl.minimum(first + COLUMNS, V))
    owed = tl.zeros((ROWS, LANES), dtype=tl.float32)  # of all targets that are this token
    for k in tl.static_range(K):
        other = tl.load(targets + rows.to(tl.int64) * K + k, mask=rows < R, other=-1)
        owed += tl.where(other[:, None] == target, tl.load(weights + k) * scale, 0.0)
    hit = tl.load(logits + rows.to(tl.int64)[:, None] * V + target, mask=here, other=0.0).to(tl.float32)
    tau = _tanh(hit * slope + offset, FAST)
    gradient = (tl.exp2(tau * bits - (bits + lse)[:, None]) * sums[:, None] - owed) * (1 - tau * tau)
    values = eight_bits(gradient, straight.dtype.element_ty)
    tl.debug_barrier()  # other threads wrote there just now
    tl.store(straight + rows.to(tl.int64)[:, None] * V + target, values, mask=here)
    tl.store(transposed + target * R + rows[:, None], values, mask=here)


def softcapped_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None = None, *, cap: Cap,
                             precision: str = "bfloat16", engine: str = "auto") -> Tensor:
    """Mean loss over the tokens, () float32, nats; differentiable by x and weight, once.

    x          (tokens, width), bfloat16 or float32 (float16 would lose small slopes: the twin takes it); any strides
    weight     (vocabulary, width), float32 or the dtype of x; its gradient is summed in float32
    targets    (tokens, K) or (tokens,) int64; negative: ignored, which leaves the number of tokens that the mean
               divides by. One of vocabulary or more makes loss and gradients NaN (an index error in the twin)
    weights    (K,) float32, of each target, on the device, without gradient; None: ones. With K = 1 and None the result
               is the cross entropy itself
    cap        (A, B, C) of z = A · sigmoid((l + B) / C), 0 < A ≤ 80, C > 0
    precision  of the products: "bfloat16", the dtype of x; "fp8", for which tokens, vocabulary and width must be
               multiples of 16
    engine     "fused": the kernels; "eager": the twin; "auto": the kernels for CUDA tensors wherever they run.
               ValueError where they cannot do what is asked; fp8 is theirs alone
    """
    targets = targets[:, None] if targets.ndim == 1 else targets
    if x.ndim != 2 or weight.shape[1:] != x.shape[1:] or targets.shape[:1] != x.shape[:1] or 0 in x.shape:
        raise ValueError(f"softcapped_cross_entropy needs x (tokens, width), weight (vocabulary, width) and targets "
                         f"(tokens, K), got {tuple(x.shape)}, {tuple(weight.shape)} and {tuple(targets.shape)}")
    weights = torch.ones(targets.size(1), device=x.device) if weights is None else weights.detach()
    if weights.shape != targets.shape[1:] or weights.dtype != torch.float32 or targets.dtype != torch.int64:
        raise ValueError(f"softcapped_cross_entropy needs int64 targets and float32 weights ({targets.size(1)},), one "
                         f"for each target of a token, got {targets.dtype} and {weights.dtype} {tuple(weights.shape)}")
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
        return softcapped_cross_entropy_eager(x, weight, targets, weights, cap)
    gradients = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return _operator(x, weight, targets, weights, list(map(float, cap)), precision, gradients)[0]


def _obstacle(device: torch.device) -> str | None:
    """why_not, which torch.compile asks once."""
    return why_not(device)


# What torch.compiler.assume_constant_result does, which imports torch._dynamo first: seconds for who compiles nothing.
_obstacle._dynamo_marked_constant = True


# An operator of its own, gradients included: torch.compile neither looks into it nor breaks its graph there.
@torch.library.custom_op("turborun::softcapped_cross_entropy", mutates_args=())
def _operator(x: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, cap: Sequence[float], precision: str,
              gradients: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dx, dW); without `gradients` the last two are empty."""
    x, targets, weights = x.contiguous(), targets.contiguous(), weights.contiguous()
    (tokens, _), vocabulary = x.shape, weight.size(0)
    fp8 = precision == "fp8"
    head = quantised(weight.contiguous()) if fp8 else weight.to(x.dtype)
    if fp8 and gradients:
        total = weights.abs().sum()
        total = torch.where(total == 0, 1.0, total)
        factor, unit = GRADIENT_MOST / total, total * (cap[0] / (4 * cap[2]) / tokens / GRADIENT_MOST)
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
        _sum_rows(logits, targets[part], weights, losses[part], lses[part], cap, tokens, gradients, in_place=not fp8)
        if not gradients:
            continue
        if fp8:  # sums over thousands of products: not with use_fast_accum, which keeps 14 bits of them
            slopes = _slopes(logits, targets[part], weights, factor, lses[part], cap)
            torch._scaled_mm(slopes[0], head[1].T, unit, head[2], out_dtype=dx.dtype, out=dx[part])
            more = torch._scaled_mm(slopes[1], rows[1].T, unit, rows[2], out_dtype=torch.float32)
        else:
            torch.mm(logits, head, out=dx[part])
            more = _float32_product(logits.T, x[part])
        dw = more if dw is None else dw.add_(more)
    return losses.sum() / tokens, dx, x.new_empty(0) if dw is None else dw.to(weight.dtype)


@_operator.register_fake
def _(x, weight, targets, weights, cap, precision, gradients):
    made = (x.new_empty(x.shape), weight.new_empty(weight.shape)) if gradients else (x.new_empty(0), x.new_empty(0))
    return x.new_empty((), dtype=torch.float32), *made


def _keep(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # else zeros as large as dx and dW come with the slope of the loss
    ctx.save_for_backward(*output[1:])


def _backward(ctx, slope, *_):
    dx, dw = ctx.saved_tensors
    return slope * dx, slope * dw, *(None,) * 5


_operator.register_autograd(_backward, setup_context=_keep)


def _constants(cap: Sequence[float]) -> dict[str, float]:
    """What the kernels make of A, B and C; see _rows_kernel."""
    scale, shift, width = cap
    return dict(slope=0.5 / width, offset=0.5 * shift / width, bits=0.5 * scale / math.log(2))


def _sum_rows(logits: Tensor, targets: Tensor, weights: Tensor, losses: Tensor, lses: Tensor, cap: Sequence[float],
              tokens: int, gradients: bool, in_place: bool) -> None:
    """Writes losses and lses (rows,), and with `gradients` and `in_place` the slopes of the mean over the logits."""
    choices = targets.size(1)
    _rows_kernel[(logits.size(0),)](
        logits, targets, weights, losses, lses, logits.size(1), **_constants(cap), half=0.5 * cap[0],
        gain=cap[0] / (4 * cap[2]) / tokens, K=choices, LANES=triton.next_power_of_2(choices),
        IN_PLACE=gradients and in_place, FAST=FAST_TANH and gradients, BLOCK=_BLOCK, num_warps=_WARPS)


def _slopes(logits: Tensor, targets: Tensor, weights: Tensor, factor: Tensor, lses: Tensor,
            cap: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The slopes of the loss by the logits, over A/4C / tokens and times `factor`: (rows, V) and (V, rows), e5m2."""
    rows, vocabulary = logits.shape
    straight, transposed = (torch.empty(shape, dtype=E5M2, device=logits.device)
                            for shape in ((rows, vocabulary), (vocabulary, rows)))
    grid = triton.cdiv(vocabulary, _TILE_COLUMNS), triton.cdiv(rows, _TILE_ROWS)
    _slopes_kernel[grid](logits, targets, weights, factor, lses, straight, transposed, rows, vocabulary,
                         **_constants(cap), K=targets.size(1), LANES=triton.next_power_of_2(targets.size(1)),
                         FAST=FAST_TANH, ROWS=_TILE_ROWS, COLUMNS=_TILE_COLUMNS, num_warps=_TILE_WARPS)
    return straight, transposed


def _float32_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32, of half-precision factors too: torch has that for CUDA alone."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
