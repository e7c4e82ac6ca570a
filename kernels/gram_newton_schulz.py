"""AOL + Gram Newton-Schulz for a whole set of matrices: the launches, planned once.

    U, r  unit rows of X                                                   one pass over X      unit_rows.py
    Γ = U Uᵀ, t_i = (r_i / Σ_j |Γ_ij| r_j)^½, R = diag(t) Γ diag(t)        AOL (arXiv 2512.04632)
    S = R²;  with the bound: R ← R / β, S ← S / β², β = min(1, ‖S‖_F^½)
    for every step (a, b, c):  W = aI + bR + cR²;  Q ← Q W;  R ← W R W     Gram Newton-Schulz (Dao-AILab 2026)
    O = (Q diag(t) β^-½) U                                                 cuBLAS

X is n×m, n ≤ m, so 3n²m + 13n³ FLOPs for four steps, symmetric halves counted, and three launches a step: W; then Q W
and R W as one batch; then W(R W). Matrices of one n share these launches whatever their m. Nothing else touches X:
scaling, casts and transposition ride on the first pass, t and β on the last product over n×n.

A plan keeps its workspace (per matrix some six n×n and one n×m in half precision) and, outside of a caller's own CUDA
graph, replays its n×n part as one graph, so that a call costs Python three launches for each shape. Plans belong to a
stream; a call inside of a CUDA graph under capture makes its own. Eager twin: optim.polar.Polar with normalize="aol", form="gram".
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from . import multiprocessors
from .symmetric import Arena, Tiles
from .unit_rows import unit_rows

Coefficients = tuple[tuple[float, float, float], ...]
_R, _V = 0, 1  # slots of the arena; the other three take turns as W, Q and the next Q
_SLOTS = 5


def choose_tiles(n: int, batch: int, programs: int) -> Tiles:
    """The cut for `batch` matrices n×n: the largest tile that still gives every multiprocessor work.

    Not yet measured.
    """
    if programs < 16:  # the interpreter: small, so that tests cross tiles
        return Tiles(16, 32, depth=16, group=2) if n > 64 else Tiles(16, 16, depth=16, group=2)
    for tiles in (Tiles(128, 256, warps=8, stages=3), Tiles(128, 128, warps=8)):
        padded = -(-n // tiles.columns) * tiles.columns
        if batch * tiles.count(padded) >= 2 * programs and padded <= 1.15 * n:
            return tiles
    return Tiles(64, 64)


class Plan:
    """The launches for batches of matrices that share their short side n: shapes (batch, n, m), n ≤ m."""

    def __init__(self, shapes: tuple[tuple[int, int, int], ...], coefficients: Coefficients, bound: bool,
                 dtype: torch.dtype, device: torch.device, tiles: Tiles | None = None):
        self.shapes, self.coefficients, self.bound = shapes, coefficients, bound
        self.n, batch = shapes[0][1], sum(shape[0] for shape in shapes)
        self.tiles = tiles or choose_tiles(self.n, batch, multiprocessors(device))
        self.arena = Arena(_SLOTS, batch, self.n, dtype, device, self.tiles)
        depth = self.tiles.depth
        self.unit = [torch.empty(b, self.arena.n, -(-m // depth) * depth, dtype=dtype, device=device)
                     for b, _, m in shapes]
        self.graph, self.calls = None, 0

    def __call__(self, xs: Sequence[Tensor]) -> list[Tensor]:
        """O of every x, in the dtype of the plan; x (batch, n, m) as planned, any strides, read only."""
        first = 0
        for x, unit in zip(xs, self.unit):
            unit_rows(x, unit, self.arena.weights[first : first + len(x)])
            first += len(x)
        self._iterate()
        outputs, first = [], 0
        for x, unit in zip(xs, self.unit):
            b, n, m = x.shape
            q = self.arena.matrices[self.result, first : first + b, :n, :n]
            transposed = x.stride(1) < x.stride(2)  # a tall matrix, seen from its side: so is the result
            unit = unit[:, :n, :m]
            outputs.append(torch.bmm(unit.mT, q.mT).mT if transposed else torch.bmm(q, unit))
            first += b
        return outputs

    def _iterate(self) -> None:
        device = self.arena.matrices.device
        if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return self._launch()
        if self.graph is not None:
            return self.graph.replay()
        self._launch()
        self.calls += 1
        if self.calls == 2:  # a shape that comes twice will come again
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._launch()
            self.graph = graph

    def _launch(self) -> None:
        """Γ of every shape, then the steps for all of them; leaves Q diag(t) in slot `self.result`."""
        arena, first = self.arena, 0
        for unit in self.unit:
            arena.gram(unit, first)
            first += len(unit)
        arena.scale()
        w, q, spare = 2, 3, 4
        last = len(self.coefficients) - 1
        for step, abc in enumerate(self.coefficients):
            bounded = self.bound and step == 0
            if bounded:
                arena.product("square", (_R,), _R, (spare,))
                arena.bounded_polynomial(_R, spare, w, abc)
            else:
                arena.product("polynomial", (_R,), _R, (w,), r=_R, coefficients=abc)
            if step == 0:
                arena.product("divided" if bounded else "plain", (_R,), w, (_V,))
                w, q = q, w  # W of the first step is Q
                arena.product("plain", (q,), _V, (_R,))
            elif step < last:
                arena.product("plain", (q, _R), w, (spare, _V))
                arena.product("plain", (w,), _V, (_R,))
                w, q, spare = q, spare, w
            else:
                arena.product("scaled", (q,), w, (spare,))
                self.result = spare


@lru_cache(maxsize=64)
def _plan(shapes, coefficients, bound, dtype, device, tiles, stream) -> Plan:
    return Plan(shapes, coefficients, bound, dtype, device, tiles)  # one for each stream: they share no workspace


@torch.library.custom_op("turborun::gram_newton_schulz", mutates_args=())
def _operator(matrices: Sequence[Tensor], coefficients: Sequence[float], bound: bool,
              dtype: torch.dtype) -> list[Tensor]:
    steps = tuple(tuple(coefficients[i : i + 3]) for i in range(0, len(coefficients), 3))
    return orthogonalise(matrices, steps, bound=bound, dtype=dtype)


@_operator.register_fake
def _(matrices, coefficients, bound, dtype):
    return [x.new_empty(x.shape, dtype=dtype) for x in matrices]


def orthogonalise(matrices: Sequence[Tensor], coefficients: Coefficients, *, bound: bool = False,
                  dtype: torch.dtype = torch.float16, tiles: Tiles | None = None) -> list[Tensor]:
    """Polar factors of `matrices` by AOL and len(coefficients) ≥ 2 Newton-Schulz steps in Gram form.

    matrices  tensors (…, n, m), tall or wide, any strides, float32, float16 or bfloat16, on one device; read only
    dtype     of storage and of the result: torch.float16 or torch.bfloat16; products accumulate in float32
    Returns new tensors of the same shapes. A NaN or an infinity makes its whole matrix NaN; a matrix of zeros gives zeros.
    """
    if len(coefficients) < 2 or dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"orthogonalise needs at least two steps and float16 or bfloat16, got {len(coefficients)} "
                         f"steps and {dtype}")
    if torch.compiler.is_compiling():
        return _operator(list(matrices), [float(c) for step in coefficients for c in step], bound, dtype)
    groups: dict[int, list[int]] = {}
    wide = []
    for i, x in enumerate(matrices):
        if x.ndim < 2 or not x.dtype.is_floating_point or x.dtype == torch.float64:
            raise ValueError(f"orthogonalise needs float32, float16 or bfloat16 matrices (…, n, m), got "
                             f"{x.dtype} of shape {tuple(x.shape)}")
        x = x.reshape(-1, *x.shape[-2:])
        wide.append(x if x.size(1) <= x.size(2) else x.mT)
        if x.numel():
            groups.setdefault(wide[-1].size(1), []).append(i)
    results: list[Tensor | None] = [None] * len(wide)
    for members in groups.values():
        xs = [wide[i] for i in members]
        device = xs[0].device
        planned = (tuple(tuple(x.shape) for x in xs), coefficients, bound, dtype, device, tiles)
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            plan = Plan(*planned)  # its workspace belongs to that graph, which may replay beside other calls
        else:
            plan = _plan(*planned, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)
        for i, o in zip(members, plan(xs)):
            tall = matrices[i].size(-2) > matrices[i].size(-1)
            results[i] = (o.mT if tall else o).reshape(matrices[i].shape)
    return [torch.empty_like(x, dtype=dtype) if o is None else o for x, o in zip(matrices, results)]
