"""Unit rows and the planned iteration, against float64 and against the eager route."""

from dataclasses import replace

import pytest
import torch
from matrices import DISTRIBUTIONS, make, polar_factor, relative_error

from kernels import newton_schulz
from kernels.small_polar import small_polar
from kernels.tiles import Tiles, choose
from kernels.unit_rows import unit_rows
from optim import POLARS, Polar, polynomials

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
pytestmark = [pytest.mark.gpu] if GPU else []
FOUR = Polar(polynomials.TURBO, normalize="aol", form="gram", dtype=torch.float16, engine="eager")
N, M = (300, 700) if GPU else (24, 40)


def on_device(x):
    return x.to(DEVICE)


def orthogonalise(xs, coefficients, **options):
    """With tiles given, which keeps small matrices, quick to test, out of small_polar's hands."""
    options.setdefault("tiles", choose(min(xs[0].shape[-2:]), 1, DEVICE))
    return newton_schulz.orthogonalise(xs, coefficients, **options)


SHAPES = [(2, 50, 70), (1, 40, 600), (1, 3, 9000), (1, 1, 5), (1, 20, 20)]
CASES = [(shape, tall, scale) for shape in SHAPES for tall in (False, True) for scale in (1.0, 1e30, 1e-30)]
if not GPU:  # whose interpreter takes 5 s for 9000 rows of a tall one: 16 parts are met with 4200, and two with 600
    CASES = [case for case in CASES if case[:2] != ((1, 3, 9000), True)] + [((1, 3, 4200), True, 1e-30)]


@pytest.mark.parametrize("shape, tall, scale", CASES)
def test_unit_rows(shape, tall, scale):
    batch, n, m = shape
    x = torch.randn(batch, m, n, generator=torch.Generator().manual_seed(0)).mT if tall else torch.randn(shape)
    x = on_device(x * scale)
    unit = torch.full((batch, -(-n // 32) * 32, -(-m // 16) * 16), 7.0, dtype=torch.float16, device=DEVICE)
    norms = torch.full(unit.shape[:2], 7.0, device=DEVICE)
    unit_rows(x, unit, norms)
    exact = x.double().norm(dim=-1)
    assert torch.allclose(norms[:, :n].double(), exact, rtol=1e-5)
    assert (unit[:, :n, :m].double() - x.double() / exact[..., None]).abs().max() < 5e-4
    assert not norms[:, n:].any() and not unit[:, n:].any() and not unit[:, :, m:].any()


WAYS = [(bound, form) for bound in (False, True) for form in ("gram", "newton-schulz")]
HARD = ("condition-1e3", "low-rank")  # the interpreter is slow: all ways for these, two ways for the others


@pytest.mark.parametrize("distribution, bound, form", [(distribution, *way) for distribution in DISTRIBUTIONS
                                                       for way in (WAYS if GPU or distribution in HARD else WAYS[2:])])
def test_no_worse_than_the_eager_route(distribution, bound, form):
    x = make(distribution, N, M)
    exact = polar_factor(x)
    ours = orthogonalise([on_device(x)], FOUR.coefficients, bound=bound, form=form)[0]
    eager = replace(FOUR, bound=bound, form=form)(on_device(x))
    assert ours.dtype == torch.float16
    assert relative_error(ours.cpu(), exact) <= 1.1 * relative_error(eager.cpu(), exact) + 1e-3  # n is small here


@pytest.mark.parametrize("distribution", ["condition-1e3", "low-rank"])
@pytest.mark.parametrize("restart", [2, 3])
def test_restarts(distribution, restart):
    x = torch.stack([make(distribution, N, M), make(distribution, N, M, 1)]).mT
    five = Polar(polynomials.FITTED[5], normalize="aol", bound=True, restart=restart, form="gram", dtype=torch.float16)
    ours = orthogonalise([on_device(x)], five.coefficients, bound=True, restart=restart, form="gram")[0]
    eager = replace(five, engine="eager")(on_device(x))
    for i in (0, 1):
        exact = polar_factor(x[i].T).T
        assert relative_error(ours[i].cpu(), exact) <= 1.1 * relative_error(eager[i].cpu(), exact) + 1e-3


@pytest.mark.parametrize("form", ["gram", "newton-schulz"])
def test_tiles_that_are_left_over_are_cut_into_parts(form):
    n = 2048 if GPU else 64  # 136 tiles of 128 for 132 multiprocessors; 10 of 16 for the interpreter's 3 programs
    cut = Tiles(128, 128, stages=3) if GPU else Tiles(16, 16, depth=16)
    x = on_device(make("student-t2", n, n + 24))
    ours = orthogonalise([x], FOUR.coefficients, form=form, tiles=cut)[0]
    assert relative_error(ours, replace(FOUR, form="newton-schulz", dtype=torch.float32)(x)) < 0.06


def test_a_list_of_shapes_is_one_plan_for_each_short_side_and_form(monkeypatch):
    plans = []
    plan = newton_schulz.Plan
    monkeypatch.setattr(newton_schulz, "Plan", lambda *args: plans.append(args) or plan(*args))
    newton_schulz._plan.cache_clear()
    g = torch.Generator().manual_seed(0)
    shapes = [(20, 48), (2, 33, 20), (2, 1, 20, 20), (24, 30)]
    xs = [on_device(torch.randn(*shape, generator=g)) for shape in shapes]
    copies = [x.clone() for x in xs]
    for call in range(3 if GPU else 2):  # on a GPU: launched, captured, replayed
        results = orthogonalise(xs, FOUR.coefficients)  # 20×20 in Newton-Schulz form
        for x, copy, result in zip(xs, copies, results):
            assert torch.equal(x, copy) and result.shape == x.shape
            assert relative_error(result.cpu(), FOUR(copy).cpu()) < 0.06  # half precision, condition about 100
        xs = [x.roll(call + 1, -1) for x in xs]
        copies = [x.clone() for x in xs]
    assert len(plans) == 3
    newton_schulz._plan.cache_clear()


@pytest.mark.parametrize("lanes, restart, form", [(1, 2, "gram"), (3, None, "newton-schulz"), (3, None, "gram")]
                         if GPU else [(1, 2, "gram")])
def test_chunks_and_lanes_change_nothing(lanes, restart, form):
    n, m, counts = (N, M, (3, 2)) if GPU else (20, 33, (2, 1))
    xs = [on_device(make("gaussian", n, m, seed)[None].repeat(count, 1, 1)) for seed, count in enumerate(counts)]
    cut = choose(n, sum(counts), DEVICE)
    options = dict(bound=True, restart=restart, form=form)
    whole = orthogonalise(xs, FOUR.coefficients, **options, tiles=replace(cut, chunk=None))
    for call in range(3 if GPU else 1):  # on a GPU: launched, captured, replayed
        parts = orthogonalise(xs, FOUR.coefficients, **options, tiles=replace(cut, chunk=2, lanes=lanes))
        for a, b in zip(whole, parts):  # cuBLAS takes other sums for other batches, where it is between the launches
            assert torch.equal(a, b) or (form, restart) != ("gram", None) and relative_error(a, b) < 2e-3


@pytest.mark.parametrize("view", ["strided", "offset", "transposed", "bfloat16", "float16"])
def test_views_and_dtypes(view):
    x = on_device(make("gaussian", 24, 40))
    wide = torch.zeros(50, 90, device=DEVICE)
    if view == "strided":
        given = wide[1:49:2, ::2][:, :40].copy_(x)
    elif view == "offset":
        given = wide.flatten()[7 : 7 + 24 * 40].view(24, 40).copy_(x)
    elif view == "transposed":
        given = x.T.contiguous().T
    else:
        given = x.to(getattr(torch, view))
    expected = FOUR(given.float().contiguous())
    assert relative_error(orthogonalise([given], FOUR.coefficients)[0], expected) < 0.03


def test_scale_does_not_matter():
    x = on_device(make("student-t2", 24, 40))
    results = [orthogonalise([x * scale], FOUR.coefficients)[0] for scale in (2.0**-100, 1.0, 2.0**100)]
    assert torch.equal(results[0], results[1]) and torch.equal(results[2], results[1])
    for scale in (1e-30, 1e30):
        assert relative_error(orthogonalise([x * scale], FOUR.coefficients)[0], results[1]) < 1e-2


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1)])
def test_one_row(shape):
    x = on_device(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    assert relative_error(orthogonalise([x], FOUR.coefficients)[0], FOUR(x)) < 1e-2


def test_zero_and_rank_one_and_empty():
    zero = torch.zeros(2, 24, 40, device=DEVICE)
    one = on_device(torch.outer(torch.arange(1.0, 25), torch.arange(1.0, 41)))
    results = orthogonalise([zero, one, zero[:0]], FOUR.coefficients, bound=True)
    assert not results[0].any() and results[2].shape == (0, 24, 40)
    right = one[0].double() / one[0].double().norm()  # rounding of 23 vanishing singular values moves the left vector
    assert 0.5 < results[1].double().norm() < 1.5
    assert (results[1].double() - torch.outer(results[1].double() @ right, right)).norm() < 1e-2


@pytest.mark.parametrize("bound, values", [(True, ("nan", "inf")), (False, ("-inf", "nan"))])
def test_non_finite_in_is_nan_out_for_that_matrix_alone(bound, values):
    x = on_device(torch.stack([make("gaussian", 24, 40, seed) for seed in range(3)]))
    clean = orthogonalise([x], FOUR.coefficients, bound=bound)[0]
    x[0, 3, 5], x[2, 20, 38] = map(float, values)
    result = orthogonalise([x], FOUR.coefficients, bound=bound)[0]
    assert result[[0, 2]].isnan().all() and torch.equal(result[1], clean[1])


def test_clear_errors():
    x = torch.zeros(4, 4, device=DEVICE)
    with pytest.raises(ValueError, match="two steps or more.* got 1 steps"):
        orthogonalise([x], FOUR.coefficients[:1])
    with pytest.raises(ValueError, match="restart=1"):
        orthogonalise([x], FOUR.coefficients, restart=1)
    with pytest.raises(ValueError, match="form='other'.*newton-schulz"):
        orthogonalise([x], FOUR.coefficients, form="other")
    with pytest.raises(ValueError, match="torch.float64 of shape"):
        orthogonalise([x.double()], FOUR.coefficients)
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        orthogonalise([x[0]], FOUR.coefficients)


def test_polar_takes_the_kernels_where_they_fit(monkeypatch):
    monkeypatch.setattr(newton_schulz, "SMALL", 24)  # for the interpreter's sake
    x, large = on_device(make("gaussian", 24, 40)), on_device(make("gaussian", 25, 50))
    fused = replace(FOUR, engine="fused")
    results = fused.many([x.T, large, x])
    assert torch.equal(results[0], results[2].T) and torch.equal(results[2], small_polar([x], FOUR.coefficients)[0])
    assert torch.equal(results[1], orthogonalise([large], FOUR.coefficients, tiles=None, form="gram")[0])
    for change in (dict(normalize="frobenius"), dict(dtype=torch.float32), dict(restart=1)):
        with pytest.raises(ValueError, match='engine="fused"'):
            replace(fused, **change)(x)
    for name in ("turbo", "turbo-5", "turbo-published"):
        assert POLARS[name].why_not_fused(DEVICE) is None


@pytest.mark.gpu
def test_captured_in_a_cuda_graph():
    x = make("gaussian", 200, 300).cuda()
    orthogonalise([x], FOUR.coefficients)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = orthogonalise([x], FOUR.coefficients)[0]
    for seed in (1, 2):
        x.copy_(make("student-t2", 200, 300, seed))
        graph.replay()
        assert relative_error(result, FOUR(x)) < 1e-2


@pytest.mark.gpu
def test_compiled():
    x = make("gaussian", 200, 300).cuda()
    fused = replace(FOUR, engine="fused")
    compiled = torch.compile(lambda x: fused(2 * x) + 1, fullgraph=True)
    assert relative_error(compiled(x) - 1, fused(2 * x)) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("tall", [False, True])
def test_a_batch_of_more_than_two_to_the_31_elements(tall):
    x = torch.randn(70_000, 16, 2048, device="cuda")
    x = x.mT.contiguous() if tall else x
    result = orthogonalise([x], FOUR.coefficients)[0]
    for i in (0, 65_535, 65_536, 69_999):
        assert relative_error(result[i], FOUR(x[i])) < 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize("tiles", [Tiles(64, 64), Tiles(128, 128, warps=8), Tiles(128, 256, warps=8, persistent=True)])
@pytest.mark.parametrize("shape", [(768, 768), (700, 3000), (2048, 2048)])
def test_every_tile(shape, tiles):
    x = make("student-t2", *shape).cuda()
    exact = polar_factor(x)  # on the GPU: minutes on a CPU
    ours, eager = orthogonalise([x], FOUR.coefficients, tiles=tiles)[0], FOUR(x)
    assert relative_error(ours, exact) <= 1.02 * relative_error(eager, exact) + 1e-3
