"""An MLP with ReLU² (arXiv 2109.08668), whose activation and slope are taken while a product is still in registers.

    y = relu(x Uᵀ)²,  out = y Vᵀ          x (tokens, width), U (hidden, width), V (width, hidden)
    h = 2 √y ⊙ (g V)                      backward: the slope by x Uᵀ, g that by out; dx = h U, dU = hᵀ x, dV = gᵀ y

In torch a kernel of its own reads x Uᵀ and writes y, and another reads that and g V and writes h: 4 and 6 bytes for
each of tokens · hidden numbers in bfloat16, and x Uᵀ is kept beside y. Here both products end in them: 0 and 2 bytes.
√y is relu(x Uᵀ) but for the rounding of y: less than the rounding of x Uᵀ would be. The two products above are the
kernel's, a persistent grid that the copy engine feeds; the others, which end as they are, are cuBLAS's.

The idea of fusing them is modded-nanogpt's, which keeps x Uᵀ as well. Eager twin: relu_squared_mlp_eager.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import multiprocessors
from .instructions import dot

DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Cut:
    """How a product is cut into tiles: rows × columns, depth of a stage, programs on a multiprocessor."""

    rows: int = 128
    columns: int = 256  # 128 or 256
    depth: int = 64
    warps: int = 8
    stages: int = 3
    programs: int = 1
    flatten: bool = True  # loads of the next tile begin while this one ends


# The best of 18 for 65,536 × 512 × 2,048 on an H200 (records/studies/relu-squared); four stages of the backward with
# its tile of y exceed the shared memory.
CUTS = {"forward": Cut(), "backward": Cut()}


@triton.jit
def _store(acc, y, out, row, column, BACKWARD: tl.constexpr):
    """One piece of a tile: y, or the slope."""
    if BACKWARD:
        acc *= 2 * tl.sqrt(y.load([row, column]).to(tl.float32))
    else:
        acc = tl.maximum(acc, 0.0)
        acc *= acc
    out.store([row, column], acc.to(out.dtype))


@triton.jit
def _relu_squared_kernel(a, b, y, out, M, N, K, BACKWARD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                         PIECE: tl.constexpr, DEPTH: tl.constexpr, FLATTEN: tl.constexpr):
    """out (M, N) = relu(a bᵀ)², b (N, K), or BACKWARD 2 √y ⊙ (a b), b (K, N). Tiles of the same rows follow each other,
    so that a is read once; b fits into the L2."""
    columns = tl.cdiv(N, COLUMNS)
    for tile in tl.range(tl.program_id(0), columns * tl.cdiv(M, ROWS), tl.num_programs(0), flatten=FLATTEN):
        row, column = tile // columns * ROWS, tile % columns * COLUMNS
        acc = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for k in range(0, K, DEPTH):
            if BACKWARD:
                acc = dot(a.load([row, k]), b.load([k, column]), acc)
            else:
                acc = dot(a.load([row, k]), b.load([column, k]).T, acc)
        if PIECE == COLUMNS:
            _store(acc, y, out, row, column, BACKWARD)
        else:  # less shared memory on the way out
            one, two = tl.split(tl.permute(tl.reshape(acc, (ROWS, 2, PIECE)), (0, 2, 1)))
            _store(one, y, out, row, column, BACKWARD)
            _store(two, y, out, row, column + PIECE, BACKWARD)


def _launch(name: str, a: Tensor, b: Tensor, y: Tensor | None, shape: tuple[int, int]) -> Tensor:
    cut, (rows, columns), backward = CUTS[name], shape, name == "backward"
    out = a.new_empty(shape)
    piece = min(cut.columns, 128)
    of_out, of_y = (TensorDescriptor.from_tensor(t, [cut.rows, piece]) for t in (out, out if y is None else y))
    of_a = TensorDescriptor.from_tensor(a, [cut.rows, cut.depth])
    of_b = TensorDescriptor.from_tensor(b, [cut.depth, cut.columns] if backward else [cut.columns, cut.depth])
    tiles = triton.cdiv(rows, cut.rows) * triton.cdiv(columns, cut.columns)
    _relu_squared_kernel[(min(tiles, cut.programs * multiprocessors(a.device)),)](
        of_a, of_b, of_y, of_out, rows, columns, a.size(1), BACKWARD=backward, ROWS=cut.rows, COLUMNS=cut.columns,
        PIECE=piece, DEPTH=cut.depth, FLATTEN=cut.flatten, num_warps=cut.warps, num_stages=cut.stages)
    return out


def _aligned(*tensors: Tensor) -> list[Tensor]:
    """Contiguous, and where the copy engine can begin."""
    return [t if t.is_contiguous() and t.data_ptr() % 16 == 0 else t.clone(memory_format=torch.contiguous_format)
            for t in tensors]


def relu_squared_mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """relu(x upᵀ)² downᵀ, in x's dtype; differentiable. ValueError where shapes or dtypes do not fit.

    x          (tokens, width) bfloat16 or float16, the width a multiple of 8
    up, down   (hidden, width) and (width, hidden) of any dtype, rounded to x's; hidden a multiple of 8
    """
    width = x.size(-1)
    if x.ndim != 2 or x.dtype not in DTYPES or up.ndim != 2 or up.size(1) != width or down.shape != up.T.shape:
        raise ValueError("relu_squared_mlp needs x (tokens, width) of bfloat16 or float16, up (hidden, width) and down "
                         f"(width, hidden); got {tuple(x.shape)} of {x.dtype}, {tuple(up.shape)}, {tuple(down.shape)}")
    if width % 8 or up.size(0) % 8:
        raise ValueError("relu_squared_mlp needs a width and a hidden width that are multiples of 8, because the copy "
                         f"engine wants rows of 16 bytes; got {width} and {up.size(0)}")
    return _forward(x, up.to(x.dtype), down.to(x.dtype))[0]


def relu_squared_mlp_eager(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The same in torch, for any dtype."""
    return F.linear(F.relu(F.linear(x, up.to(x.dtype))).square(), down.to(x.dtype))


# Operators of their own: torch.compile neither looks into them nor breaks its graph there.
@torch.library.custom_op("turborun::relu_squared_mlp", mutates_args=())
def _forward(x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """(out, y)"""
    x, up = _aligned(x, up)
    y = _launch("forward", x, up, None, (x.size(0), up.size(0)))
    return torch.mm(y, down.T), y


@_forward.register_fake
def _(x, up, down):
    return x.new_empty(x.shape), x.new_empty((x.size(0), up.size(0)))


@torch.library.custom_op("turborun::relu_squared_mlp_backward", mutates_args=())
def _backward(g: Tensor, x: Tensor, up: Tensor, down: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dU, dV)"""
    g, down = _aligned(g, down)
    h = _launch("backward", g, down, y, tuple(y.shape))
    return torch.mm(h, up), torch.mm(h.T, x), torch.mm(g.T, y)


@_backward.register_fake
def _(g, x, up, down, y):
    return x.new_empty(x.shape), up.new_empty(up.shape), down.new_empty(down.shape)


def _keep(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, output[1])


def _slopes(ctx, g, _):
    return _backward(g, *ctx.saved_tensors)


_forward.register_autograd(_slopes, setup_context=_keep)
