"""Products of commuting symmetric matrices and what is fused with them, against float64."""

import itertools

import pytest
import torch

from kernels.symmetric import Arena, _triangle_root, _upper_tile
from kernels.tiles import LARGE, SMALL, Tiles

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
pytestmark = [pytest.mark.gpu] if GPU else []
TILES = ([Tiles(64, 64), Tiles(128, 128, warps=8), LARGE, Tiles(64, 128), SMALL]
         if GPU else [Tiles(16, 16, depth=16, group=2), Tiles(16, 32, depth=16, group=1),
                      Tiles(16, 16, depth=16, persistent=True)])
N_MATRIX, BATCH = (700, 5) if GPU else (40, 2)  # ragged: not a multiple of any tile


@pytest.fixture(params=TILES, ids=lambda t: f"{t.rows}x{t.columns}" + "-persistent" * t.persistent)
def arena(request):
    """An arena whose slots 0, 1, 2 hold commuting symmetric matrices of norm about 1, in the dtype of storage."""
    arena = Arena(5, BATCH, N_MATRIX, torch.float16, DEVICE, request.param)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, arena.n, arena.n, generator=generator, dtype=torch.float64)
    vectors = torch.linalg.qr(x)[0]
    values = torch.rand(3, BATCH, 1, arena.n, generator=generator, dtype=torch.float64)
    matrices = (vectors * values) @ vectors.mT
    arena.matrices[:3] = ((matrices + matrices.mT) / 2).to(DEVICE)
    arena.matrices[3:] = torch.nan  # every entry must be written
    return arena


def slots(arena):
    return arena.matrices.double()


def close(result, expected):
    """Within float16's rounding of the largest entry, and exactly symmetric."""
    assert torch.equal(result, result.mT)
    return (result - expected).abs().max() <= 2e-3 * expected.abs().max()


def test_tiles_cover_the_upper_triangle_once():
    for ratio in (1, 2):
        for group, blocks in (*itertools.product((1, 2, 3, 8), (1, 2, 5)), (3, 7)):
            total = ratio * blocks * (blocks + 1) // 2
            table = torch.zeros(total, 2, dtype=torch.int32, device=DEVICE)
            table_kernel[(total,)](table, blocks, RATIO=ratio, GROUP=group)
            expected = {(row, column) for column in range(blocks) for row in range(ratio * (column + 1))}
            assert set(map(tuple, table.tolist())) == expected


def test_triangle_root_is_exact_where_float32_rounds():
    for i in (1, 2, 100, 4095, 9000, 16000):
        out = torch.zeros(2, dtype=torch.int32, device=DEVICE)
        root_kernel[(2,)](out, i * (i + 1) // 2 - 1)
        assert out.tolist() == [i - 1, i]


def identity(arena):
    return torch.eye(arena.n, dtype=torch.float64, device=DEVICE)


def test_product_and_pair_of_products(arena):
    before = slots(arena)
    arena.product((0,), (1,), (3,))
    assert close(slots(arena)[3], before[0] @ before[1])
    arena.product((0, 1), (2, 2), (3, 4))
    assert close(slots(arena)[3], before[0] @ before[2]) and close(slots(arena)[4], before[1] @ before[2])
    assert torch.equal(slots(arena)[:3], before[:3])


def test_addends(arena):
    before = slots(arena)
    arena.product((0,), (0,), (3,), p=2.0, x=(-4.0, (1,)))
    assert close(slots(arena)[3], 2 * before[0] @ before[0] - 4 * before[1])
    arena.product((0, 1), (2, 0), (3, 4), x=(3.0, (1, 2)), y=(-2.0, 0), e=0.5)
    expected = before[0] @ before[2] + 3 * before[1] - 2 * before[0] + 0.5 * identity(arena)
    assert close(slots(arena)[3], expected)
    assert close(slots(arena)[4], before[1] @ before[0] + 3 * before[2])
    arena.product((0,), (1,), (3,), p=0.5, x=(3.0, (1,)), e=1.5)
    assert close(slots(arena)[3], before[0] @ before[1] / 2 + 3 * before[1] + 1.5 * identity(arena))


@pytest.mark.parametrize("fulls", [1, 2])
def test_products_in_full_keep_what_is_not_symmetric(arena, fulls):
    generator = torch.Generator().manual_seed(2)
    arena.matrices[0] = torch.randn(BATCH, arena.n, arena.n, generator=generator).half().to(DEVICE) / arena.n**0.5
    arena.matrices[3:] = torch.nan
    before = slots(arena)
    arena.product((1, 0), (2, 1), (3, 4), x=(2.0, (1, 0)), full=fulls)
    first, second = before[1] @ before[2].mT + 2 * before[1], before[0] @ before[1].mT + 2 * before[0]
    assert (slots(arena)[3] - first).abs().max() <= 2e-3 * first.abs().max()
    assert (slots(arena)[4] - second).abs().max() <= 2e-3 * second.abs().max()
    arena.product((0,), (1,), (3,), x=(2.0, (0,)), full=1)
    assert (slots(arena)[3] - second).abs().max() <= 2e-3 * second.abs().max()


@pytest.mark.parametrize("factor", [1.0, 0.01])
def test_square_bound_and_first_step(arena, factor):
    arena.matrices[0] *= factor  # 0.01: the bound is far below 1 and R is to be scaled up
    r = slots(arena)[0]
    arena.product((0,), (0,), (3,), mode="square")
    s = slots(arena)[3]
    assert close(s, r @ r)
    norm = (r @ r).flatten(1).norm(dim=1)
    assert torch.allclose(arena.norms.double().sum(1).sqrt(), norm, rtol=1e-3)
    arena.scales.uniform_(0.5, 2)
    scales = arena.scales.double()
    bound = norm.sqrt().clamp(max=1)[:, None, None]
    arena.bounded_polynomial(0, 3, 4, 6.0, -4.0, 2.0, scaled=True)
    expected = (6 * identity(arena) - 4 * r / bound + 2 * s / bound**2) * scales[:, None, :] / bound.sqrt()
    assert (slots(arena)[4] - expected).abs().max() <= 2e-3 * expected.abs().max()
    assert torch.equal(arena.scales.double(), scales)  # t is in W already
    arena.bounded_polynomial(0, 3, 1, 0.0, -4.0, 2.0, scaled=False)
    assert close(slots(arena)[1], -4 * r / bound + 2 * s / bound**2)
    scales /= bound[:, :, 0].sqrt()
    assert torch.allclose(arena.scales.double(), scales, rtol=1e-3)
    w = slots(arena)[1]
    arena.product((1,), (0,), (4,), x=(3.0, (0,)), mode="divided")
    assert close(slots(arena)[4], (w @ r + 3 * r) / bound)
    arena.product((0,), (1,), (2,), x=(3.0, (0,)), y=(2.0, 1), e=6.0, mode="scaled")
    expected = (r @ w + 3 * r + 2 * w + 6 * identity(arena)) * scales[:, None, :]
    assert (slots(arena)[2] - expected).abs().max() <= 2e-3 * expected.abs().max()


def test_gram_without_sums(arena):
    unit = torch.randn(BATCH, arena.n, 96, device=DEVICE).to(torch.float16) / 10
    before = arena.sums.fill_(7.0).clone()
    arena.gram(unit, sums=False)
    assert close(slots(arena)[0], unit.double() @ unit.double().mT) and torch.equal(arena.sums, before)


@pytest.mark.parametrize("m", [48, 1000 if GPU else 33])
def test_gram_row_sums_and_scaling(arena, m):
    generator = torch.Generator().manual_seed(1)
    padded = -(-m // arena.tiles.depth) * arena.tiles.depth
    unit = torch.zeros(BATCH, arena.n, padded, dtype=torch.float16)
    rows = torch.nn.functional.normalize(torch.randn(BATCH, N_MATRIX, m, generator=generator), dim=-1)
    unit[:, :N_MATRIX, :m] = rows
    unit = unit.to(DEVICE)
    norms = torch.rand(BATCH, N_MATRIX, generator=generator).to(DEVICE) + 0.1
    arena.weights[:, :N_MATRIX] = norms
    arena.gram(unit[:1], 0)  # two launches, as for two shapes
    arena.gram(unit[1:], 1)
    gram = unit.double() @ unit.double().mT
    assert close(slots(arena)[0], gram)
    sums = (gram.abs() @ arena.weights.double()[..., None])[..., 0]
    assert torch.allclose(arena.sums.double().sum(1), sums, rtol=1e-3)
    arena.scale()
    scales = (arena.weights.double() / sums.where(sums > 0, torch.ones_like(sums))).sqrt()
    assert torch.allclose(arena.scales.double(), scales, rtol=1e-3)
    assert close(slots(arena)[0], gram * scales[:, :, None] * scales[:, None, :])
    assert not slots(arena)[0][:, N_MATRIX:].any()


def test_the_same_bits_every_time(arena):
    arena.product((0,), (0,), (3,), mode="square")
    once, norms = arena.matrices[3].clone(), arena.norms.clone()
    arena.product((0,), (0,), (3,), mode="square")
    assert torch.equal(arena.matrices[3], once) and torch.equal(arena.norms, norms)


import triton  # noqa: E402
import triton.language as tl  # noqa: E402


@triton.jit
def table_kernel(table, blocks, RATIO: tl.constexpr, GROUP: tl.constexpr):
    row, column = _upper_tile(tl.program_id(0), blocks, RATIO, GROUP)
    tl.store(table + 2 * tl.program_id(0), row)
    tl.store(table + 2 * tl.program_id(0) + 1, column)


@triton.jit
def root_kernel(out, first):
    tl.store(out + tl.program_id(0), _triangle_root(first + tl.program_id(0)))
