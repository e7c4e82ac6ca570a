"""How a transformer's block begins: a weighted sum of streams and its RMS norm; forward and backward in a launch each.

    f_k = w_k for each stream x_k (T, width), that of the last times the token's gate, if there is one
    y = Σ_k f_k x_k        r = 1 / √(mean y² + ε)        n = r y
    dY = dy + r (dn − n mean(dn n))        dx_k = f_k dY        dw_k = Σ dY x_k (gate)        dgate = w_K Σ_c dY x_K

Forward reads the K streams and writes y and n, backward reads the streams, dy and dn and writes K gradients: K + 2 and
2 K + 2 passes over (T, width), 6 and 10 with four streams. Inductor takes 6 and 18: its kernels for gradients of the
weights read everything again. Here sums for those stay in registers: programs walk rows, and each leaves K numbers.

All is computed in float32 from streams as they are: weights are not rounded to bfloat16, n is of the unrounded y, and
so is backward, which makes y again of the streams, as it needs them anyway; y need not be kept for it. Results are
rounded once. Sums have a fixed order: the same input gives the same bits on the same kind of GPU.

ε is float32's epsilon, 2⁻²³: of bfloat16 too, F.rms_norm takes that of the dtype it computes in, compiled or not.

Eager twin: mix_norm_eager. Times: python -m kernels.bench_mix
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import multiprocessors

DTYPES = (torch.bfloat16, torch.float32)
MOST_STREAMS, MOST_WIDTH = 4, 4096
EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Cut:
    """What a program has at a time, and how many programs there are."""

    elements: int = 1024  # of each stream: whole rows, the next power of two wide; a wider one gets more warps
    warps: int = 4
    programs: int = 8  # a multiprocessor
    stages: int = 1  # more: loads that far ahead, through shared memory


CUTS = {"forward": Cut(programs=16), "backward": Cut(programs=4)}  # python -m kernels.bench_mix --tune


def mix_norm_eager(streams: Sequence[Tensor], weights: Tensor, gate: Tensor | None = None,
                   eps: float = EPS) -> tuple[Tensor, Tensor]:
    """As mix_norm, in plain torch, of any dtype; weights and sums are rounded to it."""
    factors = list(weights.to(streams[0].dtype).unbind())
    if gate is not None:
        factors[-1] = factors[-1] * gate.view(-1, 1)
    y = factors[0] * streams[0]
    for factor, x in zip(factors[1:], streams[1:]):
        y = y + factor * x
    return y, F.rms_norm(y, (y.size(-1),), eps=eps)


@triton.jit
def _load(x, at, inside, THERE: tl.constexpr = True):
    if THERE:
        return tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    return tl.zeros(at.shape, tl.float32)


@triton.jit
def _weights(weights, K: tl.constexpr):
    """Those of x0, x1, x2 and of the last stream; of one that is not there any, as it counts as zeros."""
    w0, w1, w2 = tl.load(weights), tl.load(weights + min(1, K - 1)), tl.load(weights + min(2, K - 1))
    return w0, w1, w2, tl.load(weights + K - 1)


@triton.jit
def _mixed(tile, x0, x1, x2, last, w0, w1, w2, w, gate, T, K: tl.constexpr, GATED: tl.constexpr, WIDTH: tl.constexpr,
           ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(rows of a tile, places, which of them there are, gates, the streams there, y), all but the first in float32."""
    row, column = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)[None, :]
    at, inside = row.to(tl.int64)[:, None] * WIDTH + column, (row < T)[:, None] & (column < WIDTH)
    a, b, c = _load(x0, at, inside, K > 1), _load(x1, at, inside, K > 2), _load(x2, at, inside, K > 3)
    z = _load(last, at, inside)
    if GATED:
        g = _load(gate, row, row < T)
    else:
        g = tl.full((ROWS,), 1.0, tl.float32)
    return row, at, inside, g, a, b, c, z, w0 * a + w1 * b + w2 * c + (w * g)[:, None] * z


@triton.jit
def _mix_forward_kernel(x0, x1, x2, last, weights, gate, y, n, scale, T, eps, K: tl.constexpr, GATED: tl.constexpr,
                        WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr):
    """y, n and r. `last` is the last stream, x0 … are those before it: K − 1, and pointers that are not read."""
    w0, w1, w2, w = _weights(weights, K)
    for tile in tl.range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0), num_stages=STAGES):
        row, at, inside, _, _, _, _, _, total = _mixed(tile, x0, x1, x2, last, w0, w1, w2, w, gate, T, K, GATED,
                                                       WIDTH, ROWS, COLUMNS)
        r = 1 / tl.sqrt(tl.sum(total * total, 1) * (1.0 / WIDTH) + eps)
        tl.store(scale + row, r, mask=row < T)
        tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)
        tl.store(n + at, (total * r[:, None]).to(n.dtype.element_ty), mask=inside)


@triton.jit
def _given(dx, at, inside, gradient, WANTED: tl.constexpr):
    if WANTED:
        tl.store(dx + at, gradient.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _mix_backward_kernel(dy, dn, x0, x1, x2, last, weights, gate, scale, dx0, dx1, dx2, dlast, dgate, sums, T,
                         K: tl.constexpr, GATED: tl.constexpr, DY: tl.constexpr, DN: tl.constexpr,
                         WANTED: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                         STAGES: tl.constexpr):
    """Gradients; sums (programs, K) of the weights'. WANTED: bits 0 … 3 of the streams, 4 of weights, 5 of gate."""
    w0, w1, w2, w = _weights(weights, K)
    s0, s1 = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
    s2, s = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
    gated = tl.zeros((ROWS,), tl.float32)  # the last weight's sum, which a gate has by rows
    for tile in tl.range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0), num_stages=STAGES):
        row, at, inside, g, a, b, c, z, total = _mixed(tile, x0, x1, x2, last, w0, w1, w2, w, gate, T, K, GATED,
                                                       WIDTH, ROWS, COLUMNS)
        slope = _load(dy, at, inside, DY)
        if DN:
            r = tl.load(scale + row, mask=row < T, other=0.0)
            slope_n = _load(dn, at, inside)
            along = tl.sum(slope_n * total, 1) * r * r * (1.0 / WIDTH)
            slope += (slope_n - total * along[:, None]) * r[:, None]
        _given(dx0, at, inside, w0 * slope, WANTED & 1)
        _given(dx1, at, inside, w1 * slope, WANTED & 2)
        _given(dx2, at, inside, w2 * slope, WANTED & 4)
        _given(dlast, at, inside, (w * g)[:, None] * slope, WANTED & 8)
        if WANTED & 16:
            s0 += slope * a
            s1 += slope * b
            s2 += slope * c
        if GATED:
            of_gate = tl.sum(slope * z, 1)
            gated += g * of_gate
            _given(dgate, row, row < T, w * of_gate, WANTED & 32)
        elif WANTED & 16:
            s += slope * z
    if WANTED & 16:
        sums += tl.program_id(0) * K
        if K > 1:
            tl.store(sums, tl.sum(s0))
        if K > 2:
            tl.store(sums + 1, tl.sum(s1))
        if K > 3:
            tl.store(sums + 2, tl.sum(s2))
        tl.store(sums + K - 1, tl.sum(gated) if GATED else tl.sum(s))


def mix_norm(streams: Sequence[Tensor], weights: Tensor, gate: Tensor | None = None,
             eps: float = EPS) -> tuple[Tensor, Tensor]:
    """(y, n), both (T, width) of the streams' dtype; differentiable by all tensors, once.

    streams   1 … 4 contiguous tensors (T, width) of one dtype, bfloat16 or float32; width at most 4096
    weights   (K,) float32, one for each stream
    gate      (T,) or (T, 1) of the streams' dtype: a factor of the last stream, for each token
    """
    shape, dtype = streams[0].shape if streams else (), streams[0].dtype if streams else None
    if len(shape) != 2 or len(streams) > MOST_STREAMS or not 1 <= shape[1] <= MOST_WIDTH or any(
            x.shape != shape for x in streams):
        raise ValueError(f"mix_norm needs 1 to {MOST_STREAMS} streams (T, width) of one shape, of a width of 1 to "
                         f"{MOST_WIDTH}; got {_said(streams)}")
    if dtype not in DTYPES or any(x.dtype != dtype or not x.is_contiguous() for x in streams):
        raise ValueError(f"mix_norm needs contiguous streams, all of torch.bfloat16 or all of torch.float32; got "
                         f"{_said(streams)}")
    if weights.shape != (len(streams),) or weights.dtype != torch.float32:
        raise ValueError(f"mix_norm needs weights ({len(streams)},) of torch.float32; got {_said([weights])}")
    if gate is not None and (gate.shape not in (shape[:1], (shape[0], 1)) or gate.dtype != dtype):
        raise ValueError(f"mix_norm needs a gate ({shape[0]},) or ({shape[0]}, 1) of {dtype}; got {_said([gate])}")
    y, n, _ = _forward(list(streams), weights, None if gate is None else gate.reshape(-1), eps)
    return y, n


def _said(tensors: Sequence[Tensor]) -> str:
    return ", ".join(f"shape {tuple(t.shape)}, strides {t.stride()}, {t.dtype}" for t in tensors) or "none"


def _plan(name: str, x: Tensor) -> tuple[int, dict]:
    """(programs, constants and options) of a launch, by CUTS."""
    cut, (tokens, width) = CUTS[name], x.shape
    columns = triton.next_power_of_2(width)
    rows = max(1, cut.elements // columns)
    warps = min(16, cut.warps * max(1, columns // cut.elements))
    programs = max(1, min(triton.cdiv(tokens, rows), cut.programs * multiprocessors(x.device)))
    return programs, dict(WIDTH=width, ROWS=rows, COLUMNS=columns, STAGES=cut.stages, num_warps=warps)


def _slots(tensors: list[Tensor]) -> list[Tensor]:
    """Arguments x0, x1, x2, last of a kernel."""
    return [*tensors[:-1], *[tensors[-1]] * (MOST_STREAMS + 1 - len(tensors))]


# Operators of their own: torch.compile neither looks into them nor breaks its graph there.
@torch.library.custom_op("turborun::mix_norm", mutates_args=())
def _forward(streams: Sequence[Tensor], weights: Tensor, gate: Tensor | None,
             eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y, n, r (T,) float32)"""
    x = streams[-1]
    y, n, scale = torch.empty_like(x), torch.empty_like(x), x.new_empty(x.size(0), dtype=torch.float32)
    programs, constants = _plan("forward", x)
    _mix_forward_kernel[(programs,)](*_slots(streams), weights.contiguous(), x if gate is None else gate.contiguous(),
                                     y, n, scale, len(x), eps, K=len(streams), GATED=gate is not None, **constants)
    return y, n, scale


@_forward.register_fake
def _(streams, weights, gate, eps):
    x = streams[-1]
    return torch.empty_like(x), torch.empty_like(x), x.new_empty(x.size(0), dtype=torch.float32)


@torch.library.custom_op("turborun::mix_norm_backward", mutates_args=())
def _backward(dy: Tensor | None, dn: Tensor | None, streams: Sequence[Tensor], weights: Tensor, gate: Tensor | None,
              scale: Tensor, wanted: Sequence[bool]) -> list[Tensor]:
    """Gradients of streams, of weights and of gate, those that are wanted."""
    x, count = streams[-1], len(streams)
    programs, constants = _plan("backward", x)
    dx = [torch.empty_like(x) if want else x for want in wanted[:-2]]
    sums = x.new_empty((programs, count), dtype=torch.float32)
    dgate = torch.empty_like(gate, memory_format=torch.contiguous_format) if wanted[-1] else x
    bits = sum(want << slot for slot, want in zip((*range(count - 1), 3, 4, 5), wanted))
    slopes = (x if slope is None else slope.contiguous() for slope in (dy, dn))
    _mix_backward_kernel[(programs,)](
        *slopes, *_slots(streams), weights.contiguous(), x if gate is None else gate.contiguous(), scale, *_slots(dx),
        dgate, sums, len(x), K=count, GATED=gate is not None, DY=dy is not None, DN=dn is not None, WANTED=bits,
        **constants)
    given = *dx, sums.sum(0) if wanted[-2] else sums, dgate
    return [one for one, want in zip(given, wanted) if want]


@_backward.register_fake
def _(dy, dn, streams, weights, gate, scale, wanted):
    given = *streams, weights, streams[0] if gate is None else gate
    return [torch.empty_like(one, memory_format=torch.contiguous_format) for one, want in zip(given, wanted) if want]


def _keep(ctx, inputs, output):
    streams, weights, gate, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(weights, gate, output[2], *streams)


def _slopes(ctx, dy, dn, _):
    weights, gate, scale, *streams = ctx.saved_tensors
    of_streams, of_weights, of_gate, _ = ctx.needs_input_grad
    wanted = [*of_streams, of_weights, of_gate]
    if dy is None and dn is None:
        wanted = [False] * len(wanted)
    found = iter(_backward(dy, dn, streams, weights, gate, scale, wanted) if any(wanted) else ())
    *dx, dweights, dgate = (next(found) if want else None for want in wanted)
    return dx, dweights, dgate, None


_forward.register_autograd(_slopes, setup_context=_keep)
