"""Products of symmetric matrices that commute, so that the result is symmetric: half the tiles, each written twice.

    gram      Γ = U Uᵀ, and the sums Σ_j |Γ_ij| r_j that AOL scaling needs            (arXiv 2512.04632)
    product   pAB + xX + yY + eI: every product of a Gram Newton-Schulz step (see newton_schulz.py)

Only tiles that touch the upper triangle are computed, n³ FLOPs a product instead of 2n³, and each is stored as it is
and transposed. Sums, norms, addends and the scaling of columns happen while a tile is still in registers, so none of
them costs a pass over memory. As B is symmetric, its rows serve as its columns: both operands are read along rows, by
the copy engine (tensor descriptors), from one persistent grid.

All n×n matrices live in one tensor, the arena (slots · batch, N, N), N a multiple of the tile. A launch names slots.
Every sum is taken in a fixed order (no atomics): the same input gives the same bits. Eager twin: optim/polar.py.
"""

from copy import copy

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from . import chained, launch, multiprocessors
from .tiles import Tiles


@triton.jit
def _triangle(i):
    return i * (i + 1) // 2


@triton.jit
def _triangle_root(t):
    """The largest i with i(i+1)/2 ≤ t."""
    i = ((tl.sqrt((8 * t + 1).to(tl.float32)) - 1) * 0.5).to(tl.int32)
    i = tl.where(_triangle(i) > t, i - 1, i)
    return tl.where(_triangle(i + 1) <= t, i + 1, i)


@triton.jit
def _upper_tile(t, column_blocks, RATIO: tl.constexpr, GROUP: tl.constexpr):
    """Tile t of the upper triangle -> (row block, column block), column block = RATIO row blocks wide.

    GROUP columns go together, row by row, so that programs at work at one time share rows and columns in the L2.
    """
    first = _triangle_root(t // RATIO) // GROUP * GROUP
    width = tl.minimum(GROUP, column_blocks - first)
    local = t - RATIO * _triangle(first)
    rectangle = RATIO * first * width  # above the group's own triangle
    rest = tl.maximum(local - rectangle, 0)
    column = _triangle_root(rest // RATIO)
    inside = local < rectangle
    row = tl.where(inside, local // width, RATIO * first + rest - RATIO * _triangle(column))
    return row, first + tl.where(inside, local % width, column)


@triton.jit
def _epilogue(acc, out, vectors, place, slots, factors, N, MODE: tl.constexpr, ADDENDS: tl.constexpr,
              SIZE: tl.constexpr):
    """One SIZE × SIZE piece of P = acc, as `place` says. Pieces below the diagonal come from those above, but for a
    product in `full`.

    Next to no branches, so that the compiler can overlap it with other tiles' loads: a store that is not wanted goes to
    row `end`, beyond the arena, where the copy engine drops it.
    """
    sums, weights, norms, bounds, scales = vectors
    full, z, pieces, piece, row, column, end = place
    base, base_x, base_y = slots
    p, x, y, e = factors
    rows, columns = row + tl.arange(0, SIZE), column + tl.arange(0, SIZE)
    vector = z.to(tl.int64) * N
    if MODE == "gram":
        size = tl.abs(acc)
        slot = sums + vector * (N // SIZE)
        along_rows = tl.sum(size * tl.load(weights + vector + columns)[None, :], 1)
        tl.store(slot + (column // SIZE) * N + rows, along_rows, mask=(row <= column) & (rows >= 0))
        along_columns = tl.sum(size * tl.load(weights + vector + rows)[:, None], 0)
        tl.store(slot + (row // SIZE) * N + columns, along_columns, mask=(row < column) & (columns >= 0))
    if MODE == "square":
        times = tl.where(row < column, 2.0, tl.where(row == column, 1.0, 0.0))
        tl.store(norms + z.to(tl.int64) * pieces + piece, tl.sum(acc * acc) * times)
    if ADDENDS > 0:
        acc = p * acc + x * out.load([base_x + row, column]).to(tl.float32)
    if ADDENDS > 1:
        acc += y * out.load([base_y + row, column]).to(tl.float32)
        acc += tl.where(rows[:, None] == columns[None, :], e, 0.0)
    if MODE == "divided":
        acc = acc / tl.load(bounds + z)
    mirror = acc
    if MODE == "scaled":  # columns, so the result is not symmetric any more
        mirror = acc * tl.load(scales + vector + rows)[:, None]
        acc = acc * tl.load(scales + vector + columns)[None, :]
    tile, transposed = acc.to(out.dtype), tl.trans(mirror.to(out.dtype))
    if (row == column) & (full == 0):  # rounding differs by the order of factors, and asymmetry grows in later steps
        tile = tl.where(rows[:, None] <= columns[None, :], tile, transposed)
    out.store([tl.where((row <= column) | (full != 0), base + row, end), column], tile)
    out.store([tl.where((row < column) & (full == 0), base + column, end), row], transposed)


@triton.jit
def _tile(index, part, left, right, out, vectors, counts, slots, factors, N, K, MODE: tl.constexpr,
          ADDENDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
          CUT: tl.constexpr, CHAINED: tl.constexpr):
    """Tile `index` of a launch, from its operands to its stores; CUT: one square part of it, of four or two."""
    batch, halves, pieces, end = counts
    left_0, left_1, right_0, right_1, out_0, out_1, x_0, x_1, y_0 = slots
    p, x, y, e = factors
    RATIO: tl.constexpr = COLUMNS // ROWS
    column_blocks = N // COLUMNS
    tiles = RATIO * _triangle(column_blocks)
    square = RATIO * column_blocks * column_blocks
    beyond = index - halves * tiles
    full = (beyond >= 0).to(tl.int32)
    number = tl.where(full != 0, halves + beyond // square, index // tiles)
    t = tl.where(full != 0, beyond % square, index % tiles)
    half_row, half_column = _upper_tile(index % tiles, column_blocks, RATIO, GROUP)
    row = tl.where(full != 0, t % (RATIO * column_blocks), half_row) * ROWS
    column = tl.where(full != 0, t // (RATIO * column_blocks), half_column) * COLUMNS
    SIDE: tl.constexpr = ROWS // 2 if RATIO == 1 else ROWS
    HEIGHT: tl.constexpr = SIDE if CUT else ROWS
    WIDTH: tl.constexpr = SIDE if CUT else COLUMNS
    if CUT:
        row += part // 2 * SIDE
        column += part % 2 * SIDE
    z = number % batch
    first = number < batch
    left_row = (tl.where(first, left_0, left_1) + z) * N + row
    right_row = (tl.where(first, right_0, right_1) + z) * N + column
    acc = tl.zeros((HEIGHT, WIDTH), dtype=tl.float32)
    for k in tl.range(0, K, DEPTH):
        acc = tl.dot(left.load([left_row, k]), right.load([right_row, k]).T, acc)
    if CHAINED:
        gdc_launch_dependents()  # sooner, and they would take up the room of programs that are still to come
    bases = (tl.where(first, out_0, out_1) + z) * N, (tl.where(first, x_0, x_1) + z) * N, (y_0 + z) * N
    now = p, x, tl.where(first, y, 0.0), tl.where(first, e, 0.0)
    place = full, z, pieces, t * RATIO, row, column, end
    if HEIGHT == WIDTH:
        _epilogue(acc, out, vectors, place, bases, now, N, MODE, ADDENDS, HEIGHT)
    else:
        one, two = tl.split(tl.permute(tl.reshape(acc, (ROWS, 2, ROWS)), (0, 2, 1)))
        _epilogue(one, out, vectors, place, bases, now, N, MODE, ADDENDS, ROWS)
        place = full, z, pieces, t * RATIO + 1, row, column + ROWS, end
        _epilogue(two, out, vectors, place, bases, now, N, MODE, ADDENDS, ROWS)


_NUMBERS = ["whole", "rest", "batch", "halves", "left_0", "left_1", "right_0", "right_1", "out_0",
            "out_1", "x_0", "x_1", "y_0", "pieces", "end"]


@triton.jit(do_not_specialize=_NUMBERS)  # else each new count or slot could mean another compilation
def _product_kernel(left, right, small, out, small_out, sums, weights, norms, bounds, scales, whole, batch, halves, N,
                    K, left_0, left_1, right_0, right_1, out_0, out_1, x_0, x_1, y_0, end, pieces, p, x, y, e,
                    MODE: tl.constexpr, ADDENDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                    DEPTH: tl.constexpr, GROUP: tl.constexpr, PERSISTENT: tl.constexpr, CUT: tl.constexpr,
                    CHAINED: tl.constexpr):
    """`whole` tiles of `halves` symmetric products, and after these of whole products; CUT: programs beyond
    `whole` take a part of a tile each.

    Operands 0 serve the first `batch` products, operands 1 the rest, which have no Y and no identity. PERSISTENT: a
    program takes tiles one after the other; else one, and room is left for two or three on a multiprocessor.
    """
    if CHAINED:
        gdc_wait()
    vectors = sums, weights, norms, bounds, scales
    counts = batch, halves, pieces, end
    slots = left_0, left_1, right_0, right_1, out_0, out_1, x_0, x_1, y_0
    factors = p, x, y, e
    index = tl.program_id(0)
    if PERSISTENT:
        for number in tl.range(index, whole, tl.num_programs(0), flatten=False):
            _tile(number, 0, left, right, out, vectors, counts, slots, factors, N, K, MODE, ADDENDS, ROWS, COLUMNS,
                  DEPTH, GROUP, False, CHAINED)
    elif CUT:
        if index < whole:
            _tile(index, 0, left, right, out, vectors, counts, slots, factors, N, K, MODE, ADDENDS, ROWS, COLUMNS,
                  DEPTH, GROUP, False, CHAINED)
        else:
            PARTS: tl.constexpr = 4 * ROWS // COLUMNS
            part = index - whole
            _tile(whole + part // PARTS, part % PARTS, small, small, small_out, vectors, counts, slots, factors, N, K,
                  MODE, ADDENDS, ROWS, COLUMNS, DEPTH, GROUP, True, CHAINED)
    else:
        _tile(index, 0, left, right, out, vectors, counts, slots, factors, N, K, MODE, ADDENDS, ROWS, COLUMNS, DEPTH,
              GROUP, False, CHAINED)


@triton.jit
def _total(sums, at, slots, N, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for slot in range(slots):
        total += tl.load(sums + slot * N + at)
    return total


@triton.jit
def _scale_kernel(arena, sums, weights, scales, N, BLOCK: tl.constexpr, ROWS: tl.constexpr, CHAINED: tl.constexpr):
    """R = diag(t) Γ diag(t) in place, t_i = (r_i / Σ_j |Γ_ij| r_j)^½; writes t. Programs (batch, blocks, blocks)."""
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    z = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    slots = N // ROWS
    sums += z * N * slots
    row_sum, column_sum = _total(sums, rows, slots, N, BLOCK), _total(sums, columns, slots, N, BLOCK)
    row_norm, column_norm = tl.load(weights + z * N + rows), tl.load(weights + z * N + columns)
    row_scale = tl.sqrt(row_norm / tl.where(row_sum == 0, 1.0, row_sum))
    column_scale = tl.sqrt(column_norm / tl.where(column_sum == 0, 1.0, column_sum))
    where = arena + (z * N + rows[:, None]) * N + columns[None, :]
    scaled = tl.load(where).to(tl.float32) * (row_scale[:, None] * column_scale[None, :])  # in this order: symmetric
    tl.store(where, scaled.to(arena.dtype.element_ty))
    if tl.program_id(2) == 0:
        tl.store(scales + z * N + rows, row_scale)


@triton.jit(do_not_specialize=["pieces", "r", "s", "w", "a"])
def _bounded_kernel(matrices, norms, bounds, scales, N, pieces, r, s, w, a, b, c, BLOCK: tl.constexpr,
                    SCALED: tl.constexpr, CHAINED: tl.constexpr):
    """W = aI + bR/β + cS/β² with the bound β = min(1, ‖S‖_F^½) on R's eigenvalues. SCALED: W diag(t) β^-½; else β is
    written, and t divided by its root, for later launches."""
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    z = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((256,), dtype=tl.float32)
    for start in range(0, pieces, 256):
        i = start + tl.arange(0, 256)
        total += tl.load(norms + z * pieces + i, mask=i < pieces, other=0.0)
    bound = tl.sqrt(tl.sqrt(tl.sum(total)))
    bound = tl.where((bound < 1e-6) | (bound > 1), 1.0, bound)  # after AOL only zeros are so small; NaN stays NaN
    where = (z * N + rows[:, None]) * N + columns[None, :]
    area = N.to(tl.int64) * N
    value_r = tl.load(matrices + r * area + where).to(tl.float32)
    value_s = tl.load(matrices + s * area + where).to(tl.float32)
    value = (b / bound) * value_r + (c / bound / bound) * value_s + tl.where(rows[:, None] == columns[None, :], a, 0.0)
    if SCALED:
        value *= (tl.load(scales + z * N + columns) / tl.sqrt(bound))[None, :]
    tl.store(matrices + w * area + where, value.to(matrices.dtype.element_ty))
    if (not SCALED) and tl.program_id(2) == 0:
        at = scales + z * N + rows
        tl.store(at, tl.load(at) / tl.sqrt(bound))
        if tl.program_id(1) == 0:
            tl.store(bounds + z, bound)


class Arena:
    """Slots of (batch, N, N) matrices and the vectors that go with them, and the launches that work on them.

    slots   matrices kept for each matrix of the batch
    batch   matrices; n their size; dtype torch.float16 or torch.bfloat16
    tiles   how products are cut; N = n rounded up to its columns. Rows and columns beyond n stay out of every result.
    """

    def __init__(self, slots: int, batch: int, n: int, dtype: torch.dtype, device: torch.device, tiles: Tiles):
        self.batch, self.n, self.tiles = batch, -(-n // tiles.columns) * tiles.columns, tiles
        self.matrices = torch.empty(slots, batch, self.n, self.n, dtype=dtype, device=device)
        vectors = dict(dtype=torch.float32, device=device)
        self.weights = torch.zeros(batch, self.n, **vectors)  # r: norms of the rows
        self.scales = torch.empty(batch, self.n, **vectors)  # t
        self.sums = torch.empty(batch, self.n // tiles.rows, self.n, **vectors)  # Σ_j |Γ_ij| r_j by blocks of j
        self.pieces = tiles.count(self.n) * (tiles.columns // tiles.rows)
        self.norms = torch.empty(batch, self.pieces, **vectors)  # ‖S‖_F² by pieces of tiles
        self.bounds = torch.empty(batch, **vectors)  # β
        self.programs = multiprocessors(device)
        self.first, self.stride = 0, batch  # matrix z of slot s is number s · stride + first + z in memory
        flat = self.matrices.view(-1, self.n)
        self.end = len(flat)
        t = tiles
        self.side = t.rows // 2 if t.rows == t.columns else t.rows  # of a part of a tile
        *self.operands, self.out, self.small_out = (
            TensorDescriptor.from_tensor(flat, list(box)) for box in
            ((t.rows, t.depth), (t.columns, t.depth), (self.side, t.depth), (t.rows, t.rows), (self.side, self.side)))

    def part(self, first: int, count: int) -> "Arena":
        """The same arena, of which launches see the matrices first … first + count alone."""
        part = copy(self)
        part.first, part.batch = self.first + first, count
        for name in ("weights", "scales", "sums", "norms", "bounds"):
            setattr(part, name, getattr(self, name)[first : first + count])
        return part

    def slot(self, number: int) -> Tensor:
        """The matrices of a slot, (batch, N, N)."""
        return self.matrices[number, self.first : self.first + self.batch]

    def gram(self, unit: Tensor, first: int = 0, sums: bool = True) -> None:
        """Slot 0, matrices first … first + b: Γ of unit (b, N, M), in the arena's dtype, M a multiple of the depth; and
        with `sums`, of unit rows, those that AOL needs, weighted with `self.weights`: the norms of the rows."""
        part = self.part(first, unit.size(0))
        flat = unit.view(-1, unit.size(-1))
        operands = [TensorDescriptor.from_tensor(flat, [rows, self.tiles.depth])
                    for rows in (self.tiles.rows, self.tiles.columns, self.side)]
        slots = (0, 0, 0, 0, part.first, 0, 0, 0, 0)
        part._launch("gram" if sums else "plain", operands, unit.size(0), 0, unit.size(-1), slots)

    def scale(self) -> None:
        """Slot 0: Γ -> R = diag(t) Γ diag(t)."""
        block = min(64, self.tiles.rows)
        grid = (self.batch, self.n // block, self.n // block)
        launch(_scale_kernel, grid, self.slot(0), self.sums, self.weights, self.scales, self.n, BLOCK=block,
               ROWS=self.tiles.rows, **chained(self.tiles.chained))

    def bounded_polynomial(self, r: int, s: int, w: int, a: float, b: float, c: float, scaled: bool) -> None:
        """Slot w ← aI + bR/β + cS/β² with R in slot r and S, a "square", in slot s. With `scaled`, times diag(t) β^-½;
        else β goes into `self.bounds`, which mode "divided" reads, and its inverse root into `self.scales`."""
        block = min(64, self.tiles.rows)
        grid = (self.batch, self.n // block, self.n // block)
        launch(_bounded_kernel, grid, self.matrices, self.norms, self.bounds, self.scales, self.n, self.pieces,
               *map(self._place, (r, s, w)), a, b, c, BLOCK=block, SCALED=scaled, **chained(self.tiles.chained))

    def product(self, left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...], *, p: float = 1.0,
                x: tuple[float, tuple[int, ...]] | None = None, y: tuple[float, int] | None = None, e: float = 0.0,
                mode: str = "plain", full: int = 0) -> None:
        """out[i] ← p · left[i] · right[i]ᵀ + xX[i] + yY + eI, slots by number, for one i or two in one launch.

        x, y  (factor, slots of X) and (factor, slot of Y); the second of two products has no Y and no identity.
              p and e need X
        mode  "plain"; "square": also ‖out‖_F² into `self.norms`; "divided": by β; "scaled": columns times t
        full  how many of the products, from the last one on, are not symmetric and need all of their tiles
        """
        b = self.batch
        addends = 0 if x is None else 1 if y is None and e == 0 else 2
        x = x or (0.0, out)
        y = y or (0.0, x[1][0])  # what it points to is read even so, and must be finite
        slots = (left[0], left[-1], right[0], right[-1], out[0], out[-1], x[1][0], x[1][-1], y[1])
        self._launch(mode, self.operands, b * (len(left) - full), b * full, self.n,
                     tuple(map(self._place, slots)), (p, x[0], y[0], e), addends)

    def _place(self, slot: int) -> int:
        return slot * self.stride + self.first

    def _launch(self, mode, operands, halves, fulls, depth, slots, factors=(1.0, 0.0, 0.0, 0.0), addends=0):
        """operands: descriptors of the left, of the right, and of both for parts of tiles."""
        t = self.tiles
        tiles = halves * t.count(self.n) + fulls * (self.n // t.rows) * (self.n // t.columns)
        rest = 0 if t.persistent or mode in ("gram", "square") else self._rest(tiles)
        programs = min(self.programs, tiles) if t.persistent else tiles + (4 * t.rows // t.columns - 1) * rest
        options = {} if t.registers is None else {"maxnreg": t.registers}
        launch(_product_kernel, (programs,), *operands, self.out, self.small_out, self.sums, self.weights, self.norms,
               self.bounds, self.scales, tiles - rest, self.batch, halves, self.n, depth, *slots, self.end, self.pieces,
               *factors, MODE=mode, ADDENDS=addends, ROWS=t.rows, COLUMNS=t.columns, DEPTH=t.depth, GROUP=t.group,
               PERSISTENT=t.persistent, CUT=rest > 0, num_warps=t.warps, num_stages=t.stages, **chained(t.chained),
               **options)

    def _rest(self, tiles: int) -> int:
        """Tiles to be cut into parts, so that a last round of few does not take as long as a full one."""
        rest = tiles % self.programs
        return rest if tiles > self.programs and 2 * rest <= self.programs else 0
