"""AOL + Newton-Schulz for a whole set of matrices: the launches, planned once.

    U, r  unit rows of X                                                   one pass over X      unit_rows.py
    Γ = U Uᵀ, t_i = (r_i / Σ_j |Γ_ij| r_j)^½, R = diag(t) Γ diag(t)        AOL (arXiv 2512.04632)
    S = R²;  with the bound: R ← R / β, S ← S / β², β = min(1, ‖S‖_F^½)
    for every step (a, b, c):  W = aI + bR + cR²;  then in one of two forms
        gram            Q ← Q W,  R ← W R W;  at the end O = (Q diag(t) β^-½) U      (Dao-AILab 2026)
        newton-schulz   X ← W X,  R ← X Xᵀ,  from X = diag(t) β^-½ U

X is n×m, n ≤ m. The Gram form takes 3n²m + 13n³ FLOPs for four steps, symmetric halves counted, the other one
12n²m + 4n³: the same where m = n, but eight n³ of it are plain products, which cuBLAS does faster than anyone does
symmetric halves; so it is for matrices that are nearly square (`_form`). Three launches a step: W; then Q W and R W as
one batch; then W(R W); or W, W X, X Xᵀ. Matrices of one n and form share these launches whatever their m. Nothing else
touches X: scaling, casts and transposition ride on the first pass, t and β on a product over n×n. Matrices with
n ≤ 128 go to small_polar.py, which does all of this in one launch.

A plan keeps its workspace (per matrix some six n×n and one or two n×m in half precision) and, outside of a caller's own
CUDA graph, replays its inner part as one graph, so that a call costs Python three launches for each shape. Plans belong
to a stream; a call inside of a CUDA graph under capture makes its own.
Eager twin: optim.polar.Polar with normalize="aol".
"""

from collections.abc import Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from . import compiling
from .small_polar import SMALL, small_polar
from .symmetric import Arena
from .tiles import Tiles, choose
from .unit_rows import unit_rows

Coefficients = tuple[tuple[float, float, float], ...]
_R, _V = 0, 1  # slots of the arena; the other three take turns as W, Q and the next Q
_SLOTS = 5
SQUARE = 1.5  # up to this ratio m / n a matrix is nearly square (H200: equal at 1.5 for 1024 and 2048 rows)


class Plan:
    """The launches for batches of matrices that share n and the form: shapes (batch, n, m), n ≤ m.

    A large batch goes through them in chunks, some at a time on streams of their own: while programs of one chunk wait
    for memory or for the next launch, those of another compute, and a chunk's matrices stay in the L2.
    """

    def __init__(self, shapes: tuple[tuple[int, int, int], ...], coefficients: Coefficients, bound: bool,
                 restart: int | None, dtype: torch.dtype, device: torch.device, tiles: Tiles | None = None):
        """restart: steps between two Gram matrices of X; 1 is the Newton-Schulz form, None never after the first."""
        restart = restart or len(coefficients)
        self.segments = [coefficients[i : i + restart] for i in range(0, len(coefficients), restart)]
        # V = WR is symmetric but for rounding. Taken in full, R ← V Wᵀ = W R Wᵀ is a congruence with the W that goes into
        # Q, so that R stays the Gram matrix of Q X: five steep steps need it. Four milder ones save the n³ a step.
        self.full = int(1 < len(self.segments) < len(coefficients))
        self.bound, self.n, batch = bound, shapes[0][1], sum(shape[0] for shape in shapes)
        self.tiles = tiles or choose(self.n, batch, device)
        self.arena = Arena(_SLOTS, batch, self.n, dtype, device, self.tiles)
        depth = self.tiles.depth
        padded = [(b, self.arena.n, -(-m // depth) * depth) for b, _, m in shapes]
        self.unit = [torch.empty(shape, dtype=dtype, device=device) for shape in padded]
        # where a restart puts Q U, and the next one Q of that, and so on in turn
        self.other = [torch.zeros_like(unit) for unit in self.unit] if len(self.segments) > 1 else []
        places = list(self._places(self.unit))
        self.norms = [self.arena.weights[first : first + len(unit)] for first, unit in places]
        self.shapes, self.factors = shapes, None
        chunks = -(-batch // (self.tiles.chunk or batch))
        ends = [batch * i // chunks for i in range(chunks + 1)]
        self.chunks = list(zip(ends, ends[1:]))
        lanes = min(self.tiles.lanes, chunks) if device.type == "cuda" else 1
        self.streams = [torch.cuda.Stream(device) for _ in range(lanes - 1)]
        self.graph, self.calls, self.compiled = None, 0, False

    def __call__(self, xs: Sequence[Tensor], capturing: bool = False) -> list[Tensor]:
        """O of every x, in the dtype of the plan; x (batch, n, m) as planned, any strides, read only.

        capturing: a CUDA graph of the caller's is under capture
        """
        if not self.compiled:
            with compiling():
                self._unit_rows(xs)
                self._launch()
            self.compiled = True
        self._unit_rows(xs)
        self._iterate(capturing)
        self.factors = self.factors or self._factors()
        # a tall matrix is seen from its side, and so is its result
        return [torch.bmm(last.mT, q.mT).mT if x.stride(1) < x.stride(2) else torch.bmm(q, last)
                for x, (q, last) in zip(xs, self.factors)]

    def _unit_rows(self, xs: Sequence[Tensor]) -> None:
        for x, unit, norms in zip(xs, self.unit, self.norms):
            unit_rows(x, unit, norms, self.tiles.chained)

    def _factors(self) -> list[tuple[Tensor, Tensor]]:
        """Where the launches leave the two factors of O: Q (b, n, n) and U or X (b, n, m) for every shape."""
        last = (self.unit, self.other)[(len(self.segments) - 1) % 2]
        return [(self.arena.matrices[self.result, first : first + b, :n, :n], unit[:, :n, :m])
                for (b, n, m), (first, unit) in zip(self.shapes, self._places(last))]

    def _iterate(self, capturing: bool) -> None:
        if capturing or not self.arena.matrices.is_cuda:
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
        """From `self.unit` to Q in slot `self.result`, chunk by chunk."""
        if not self.streams:
            for begin, end in self.chunks:
                self._chunk(begin, end)
            return
        current = torch.cuda.current_stream(self.arena.matrices.device)
        lanes = [current, *self.streams]
        for stream in self.streams:
            stream.wait_stream(current)
        for number, (begin, end) in enumerate(self.chunks):
            with torch.cuda.stream(lanes[number % len(lanes)]):
                self._chunk(begin, end)
        for stream in self.streams:
            current.wait_stream(stream)

    def _chunk(self, begin: int, end: int) -> None:
        """Matrices begin … end of the batch."""
        arena = self.arena.part(begin, end - begin)
        last, spare = self.unit, self.other
        for number, segment in enumerate(self.segments):
            if number:
                for (first, unit), (_, target) in zip(self._places(last, begin, end), self._places(spare, begin, end)):
                    q = arena.slot(self.result)[first : first + len(unit), : self.n, : self.n]
                    torch.bmm(q, unit[:, : self.n], out=target[:, : self.n])  # rows beyond n stay zeros
                last, spare = spare, last
            for first, unit in self._places(last, begin, end):
                arena.gram(unit, first, sums=number == 0)
            if number == 0:
                arena.scale()
            self._steps(arena, segment, first=number == 0)

    @staticmethod
    def _places(units: list[Tensor], begin: int = 0, end: int | None = None):
        """(number of its first matrix, counted from `begin`; unit) for every shape that has matrices in begin … end."""
        first = 0
        for unit in units:
            low, high = max(begin - first, 0), len(unit) if end is None else min(end - first, len(unit))
            if low < high:
                yield first + low - begin, unit[low:high]
            first += len(unit)

    def _steps(self, arena: Arena, segment: Coefficients, first: bool) -> None:
        """Q of the steps in `segment`, of R in its slot, into slot `self.result`; the first segment's Q brings t."""
        w, q, spare = 2, 3, 4
        last = len(segment) - 1
        # Slot w holds W − aI: with its identity, most of W, float16's rounding would be ten times as large. Slot
        # q holds Q − alpha·I: alpha is a after the first step, where it is W, and 0 from then on.
        alpha = 0.0
        for step, (a, b, c) in enumerate(segment):
            e = a if last == 0 else 0.0
            if self.bound and first and step == 0:
                arena.product((_R,), (_R,), (spare,), mode="square")
                arena.bounded_polynomial(_R, spare, w, e, b, c, scaled=last == 0)
            else:
                mode = "scaled" if first and last == 0 else "plain"
                arena.product((_R,), (_R,), (w,), p=c, x=(b, (_R,)), e=e, mode=mode)
            if step == 0:
                if last > 0:
                    mode = "divided" if self.bound and first else "plain"
                    arena.product((w,), (_R,), (_V,), x=(a, (_R,)), mode=mode, full=self.full)
                    arena.product((_V,), (w,), (_R,), x=(a, (_V,)))
                w, q, alpha = q, w, a
                continue
            from_first = dict(y=(alpha, w), e=alpha * a) if alpha else {}
            if step < last:
                arena.product((q, w), (w, _R), (spare, _V), x=(a, (q, _R)), **from_first, full=self.full)
                arena.product((_V,), (w,), (_R,), x=(a, (_V,)))
            else:
                arena.product((q,), (w,), (spare,), x=(a, (q,)), **from_first, mode="scaled" if first else "plain")
            w, q, spare, alpha = q, spare, w, 0.0
        self.result = q


@lru_cache(maxsize=16)  # each holds its workspace
def _plan(shapes, coefficients, bound, restart, dtype, device, tiles, stream) -> Plan:
    return Plan(shapes, coefficients, bound, restart, dtype, device, tiles)  # for this stream alone


def _form(n: int, m: int) -> str:
    """The faster form for n×m, n ≤ m (measured: records/studies/tiles)."""
    return "newton-schulz" if m <= SQUARE * n else "gram"


@torch.library.custom_op("turborun::orthogonalise", mutates_args=())
def _operator(matrices: Sequence[Tensor], coefficients: Sequence[float], bound: bool, restart: int | None, form: str,
              dtype: torch.dtype) -> list[Tensor]:
    steps = tuple(tuple(coefficients[i : i + 3]) for i in range(0, len(coefficients), 3))
    results = orthogonalise(matrices, steps, bound=bound, restart=restart, form=form, dtype=dtype)
    # an operator's results may not share memory, as those of small matrices do, and lie as the next function says
    alone = (o if o.untyped_storage().nbytes() == o.nbytes else o.clone() for o in results)
    return [o.contiguous() for o in alone]


@_operator.register_fake
def _(matrices, coefficients, bound, restart, form, dtype):
    return [x.new_empty(x.shape, dtype=dtype) for x in matrices]


def orthogonalise(matrices: Sequence[Tensor], coefficients: Coefficients, *, bound: bool = False,
                  restart: int | None = None, form: str = "auto", dtype: torch.dtype = torch.float16,
                  tiles: Tiles | None = None) -> list[Tensor]:
    """Polar factors of `matrices` by AOL and len(coefficients) ≥ 2 Newton-Schulz steps.

    matrices  tensors (…, n, m), tall or wide, any strides, float32, float16 or bfloat16, on one device; read only
    bound     divide by min(1, ‖S‖_F^¼) as well, S = (XXᵀ)² after AOL
    tiles     how to cut products; given, small matrices are not treated apart. None: kernels.tiles.choose
    restart   Gram form: after every so many steps (2 or more; None: never) multiply Q into X and compute the Gram matrix
              anew, which takes the rounding out of R: five fitted steps need it
    form      "gram", "newton-schulz", or "auto": for each matrix the faster one
    dtype     of storage and of the result: torch.float16 or torch.bfloat16; products accumulate in float32
    Returns new tensors of the same shapes. A NaN or an infinity makes its whole matrix NaN; zeros give zeros.
    """
    if len(coefficients) < 2 or restart == 1 or dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"orthogonalise needs two steps or more, also before a restart, and float16 or bfloat16; got "
                         f"{len(coefficients)} steps, restart={restart}, {dtype}")
    if form not in ("auto", "gram", "newton-schulz"):
        raise ValueError(f"orthogonalise form={form!r}: expected auto, gram or newton-schulz")
    if torch.compiler.is_compiling():
        return _operator(list(matrices), [float(c) for step in coefficients for c in step], bound, restart, form, dtype)
    groups: dict[tuple[int, str], list[int]] = {}
    wide, small = [], []
    for i, x in enumerate(matrices):
        if x.ndim < 2 or not x.dtype.is_floating_point or x.dtype == torch.float64:
            raise ValueError(f"orthogonalise needs float32, float16 or bfloat16 matrices (…, n, m), got "
                             f"{x.dtype} of shape {tuple(x.shape)}")
        x = x.reshape(-1, *x.shape[-2:])
        wide.append(x if x.size(1) <= x.size(2) else x.mT)
        if x.numel() and tiles is None and wide[-1].size(1) <= SMALL:
            small.append(i)
        elif x.numel():
            n, m = wide[-1].shape[1:]
            groups.setdefault((n, _form(n, m) if form == "auto" else form), []).append(i)
    results: list[Tensor | None] = [None] * len(wide)

    def small_ones():
        together = small_polar([matrices[i] for i in small], coefficients, bound=bound, dtype=dtype)  # no restarts
        for i, o in zip(small, together):
            results[i] = o

    def alike(form, members):
        xs = [wide[i] for i in members]
        device = xs[0].device
        every = 1 if form == "newton-schulz" else restart
        planned = (tuple(tuple(x.shape) for x in xs), coefficients, bound, every, dtype, device, tiles)
        if capturing:
            plan = Plan(*planned)  # its workspace belongs to that graph, which may replay beside other calls
        else:
            plan = _plan(*planned, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)
        for i, o in zip(members, plan(xs, capturing)):
            tall = matrices[i].size(-2) > matrices[i].size(-1)
            results[i] = (o.mT if tall else o).reshape(matrices[i].shape)

    parts = [partial(alike, form, members) for (_, form), members in groups.items()] + [small_ones] * bool(small)
    capturing = bool(parts) and wide[0].is_cuda and torch.cuda.is_current_stream_capturing()
    if capturing and len(parts) > 1:
        _side_by_side(parts, wide[0].device)
        for o in results:
            if o is not None:
                o.record_stream(torch.cuda.current_stream(o.device))
    else:  # launching a part takes longer than its work: streams would only add to that
        for part in parts:
            part()
    return [torch.empty_like(x, dtype=dtype) if o is None else o for x, o in zip(matrices, results)]


def _side_by_side(parts: list, device: torch.device) -> None:
    """Call each of `parts` as a branch of the CUDA graph under capture, so that they overlap when it is replayed."""
    current = torch.cuda.current_stream(device)
    streams = [torch.cuda.Stream(device) for _ in parts[1:]]
    for part, stream in zip(parts[1:], streams):
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            part()
    parts[0]()
    for stream in streams:
        current.wait_stream(stream)
