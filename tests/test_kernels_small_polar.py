"""The one-launch polar kernel against float64 and the eager route: compiled on a GPU, else in Triton's interpreter."""

import pytest
import torch
from matrices import DISTRIBUTIONS, make, polar_factor, relative_error

from kernels import small_polar as module
from kernels.small_polar import small_polar
from optim import Polar, polynomials

GPU = torch.cuda.is_available()
COEFFICIENTS = {"published": polynomials.TURBO, "minimax": polynomials.TURBO_MINIMAX, "fitted": polynomials.FITTED[4]}
FIVE = (polynomials.MUON, polynomials.POLAR_EXPRESS, polynomials.FITTED[5])
SHAPES = [(7, 50), (27, 64), (64, 216), (100, 130), (128, 128)]
ROUNDING = 8e-3  # of float16, on matrices without tiny singular values, which amplify it by the slope of all steps


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu) if GPU else "cpu"])
def device(request):
    return request.param


@pytest.fixture
def launches(monkeypatch):
    """The grids launched so far."""
    grids, kernel = [], module._small_polar_kernel

    class Counted(type(kernel)):
        def __init__(self):
            pass

        def __getitem__(self, grid):
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(module, "_small_polar_kernel", Counted())
    return grids


def eager(x, coefficients=polynomials.TURBO, bound=False):
    """The same in float32, on the whole matrix in every step."""
    return Polar(coefficients, normalize="aol", bound=bound, dtype=torch.float32)(x)


def reference(x, coefficients, bound):
    """What the kernel computes, in float64 and in the words of the papers, for (n, m) with n ≤ m."""
    x = x.double()
    x = torch.diag((x @ x.T).abs().sum(1).rsqrt()) @ x
    if bound:
        gram = x @ x.T
        x = x / min(1, (gram @ gram).norm() ** 0.25)
    for a, b, c in coefficients:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_equals_the_formula_in_float64(name, bound, device):
    wide = [make("gaussian", *shape) for shape in [(1, 9), *SHAPES[:-1]]]
    expected = [reference(x, COEFFICIENTS[name], bound) for x in wide]
    xs = [x.to(device) for x in wide + [x.T.contiguous() for x in wide]]
    results = small_polar(xs, COEFFICIENTS[name], bound=bound)
    for o, exact in zip(results, expected + [e.T for e in expected], strict=True):
        assert o.dtype == torch.float16 and o.is_contiguous()
        assert relative_error(o.cpu(), exact) < ROUNDING


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_polar_error_is_that_of_float32(distribution, name, bound, device):
    xs = [make(distribution, n, m, seed) for n, m in SHAPES if n >= 16 for seed in range(2)]
    results = small_polar([x.to(device) for x in xs], COEFFICIENTS[name], bound=bound)
    for x, o in zip(xs, results, strict=True):
        exact = polar_factor(x)
        single = relative_error(eager(x, COEFFICIENTS[name], bound), exact)
        assert relative_error(o.cpu(), exact) <= 1.02 * single, tuple(x.shape)


def test_the_steepest_step_has_an_exact_square(device):
    x = make("row-scaled", 64, 216)
    exact = polar_factor(x)
    (o,) = small_polar([x.to(device)], polynomials.TURBO_MINIMAX)
    assert relative_error(o.cpu(), exact) < 1.005 * relative_error(eager(x, polynomials.TURBO_MINIMAX), exact)


@pytest.mark.parametrize("distribution", ["condition-1e3", "low-rank"])
@pytest.mark.parametrize("coefficients", [polynomials.TURBO[:1], polynomials.FITTED[3], *FIVE])
def test_one_to_five_steps_hold_without_restart(coefficients, distribution, device):
    x = make(distribution, 64, 216)
    exact = polar_factor(x)
    (o,) = small_polar([x.to(device)], coefficients)
    assert relative_error(o.cpu(), exact) <= 1.02 * relative_error(eager(x, coefficients), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_any_layout_is_read_and_none_is_written(dtype, device):
    x = make("gaussian", 24, 80).to(device, dtype)
    everything = torch.full((3, 4000), float("nan"), device=device, dtype=dtype)
    sliced = torch.full((48, 161), float("nan"), device=device, dtype=dtype)[::2, 1::2]
    wide, offset = everything[0, 3 : 3 + 24 * 80].view(24, 80), everything[1].as_strided((24, 80), (85, 1), 4008)
    tall, columns = everything[2, : 24 * 80].view(80, 24), x.T.contiguous().T
    views = {"plain": x, "sliced": sliced, "misaligned": wide, "offset": offset, "tall": tall, "transposed": columns,
             "tall view of wide": x.clone().T, "tall sliced": torch.zeros(80, 30, device=device, dtype=dtype)[:, 2:26]}
    for view in views.values():
        view.copy_(x if view.shape == x.shape else x.T)
    before = everything.clone()
    expected = eager(x.float())
    for (name, view), o in zip(views.items(), small_polar(list(views.values()), polynomials.TURBO), strict=True):
        assert o.shape == view.shape and o.stride().index(1) == view.stride().index(min(view.stride())), name
        assert o.is_contiguous() or o.mT.is_contiguous(), name
        assert relative_error(o if view.shape == x.shape else o.T, expected) < ROUNDING, name
        assert torch.equal(view, x if view.shape == x.shape else x.T), f"{name}: the input must not be overwritten"
    assert torch.equal(everything.nan_to_num(), before.nan_to_num())


def test_batches(device):
    x = torch.stack([make("gaussian", 20, 36, seed) for seed in range(6)]).to(device)
    expected = eager(x)
    spread = torch.zeros(3, 2, 20, 50, device=device)[..., 5:41].transpose(0, 1)
    spread.copy_(x.view(2, 3, 20, 36))
    for batch in (x, x.view(2, 3, 20, 36), spread, x.mT.contiguous(), x.mT, x[:1].expand(4, 20, 36)):
        (o,) = small_polar([batch], polynomials.TURBO)
        assert o.shape == batch.shape
        o = (o if batch.size(-1) == 36 else o.mT).reshape(-1, 20, 36)
        assert relative_error(o, expected if len(o) == 6 else expected[:1].expand_as(o)) < ROUNDING


def test_a_list_of_shapes_is_one_launch_and_leaves_no_gap_unwritten(device, launches):
    shapes = [(64, 27), (3, 5, 9, 14), (128, 300), (24, 27), (2, 64, 64), (33, 1)]
    xs = [torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(device) for i, shape in enumerate(shapes)]
    results = small_polar(xs, polynomials.TURBO, bound=True)
    assert launches == [(1 + 15 + 1 + 1 + 2 + 1,)]
    for x, o in zip(xs, results, strict=True):
        assert relative_error(o, eager(x, bound=True)) < ROUNDING, tuple(x.shape)
    small_polar(xs + [xs[0].half()], polynomials.TURBO)
    assert len(launches) == 3, "a launch for each dtype"


def test_nothing_to_do(device, launches):
    assert small_polar([], polynomials.TURBO) == [] and launches == []
    x = make("gaussian", 8, 16).to(device)
    empty, o, flat = small_polar([x.new_empty(0, 8, 16), x, x.new_empty(8, 0)], polynomials.TURBO)
    assert empty.shape == (0, 8, 16) and flat.shape == (8, 0) and launches == [(1,)]
    assert relative_error(o, eager(x)) < ROUNDING


def test_tables_are_remembered_by_shapes_strides_and_distances(device, monkeypatch):
    made, make_plan = [], module._make_plan
    monkeypatch.setattr(module, "_make_plan", lambda *arguments: made.append(1) or make_plan(*arguments))
    monkeypatch.setattr(module, "_plans", type(module._plans)())
    bank = torch.zeros(3, 40, 60, device=device)
    for seed in range(3):
        bank.copy_(torch.stack([make("gaussian", 40, 60, 3 * seed + i) for i in range(3)]))
        for o, x in zip(small_polar([bank[0], bank[2]], polynomials.TURBO), (bank[0], bank[2])):
            assert relative_error(o, eager(x)) < ROUNDING
    assert len(made) == 1
    for first, second, coefficients in ((0, 1, polynomials.TURBO), (0, 2, polynomials.TURBO_MINIMAX)):
        xs = [bank[first], bank[second].T[:50]]
        for o, x in zip(small_polar(xs, coefficients), xs):
            assert relative_error(o, eager(x, coefficients)) < ROUNDING
    assert len(made) == 3
    for rows in range(1, module._PLANS + 3):
        small_polar([bank[0, :1, :rows]], polynomials.TURBO[:1])
    assert len(module._plans) == module._PLANS


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bound", [False, True])
def test_special_matrices(bound, dtype, device):
    one = torch.tensor([[-3.0]])
    row = make("gaussian", 1, 300)
    missing = make("gaussian", 40, 70)
    missing[7] = 0
    xs = [x.to(device) for x in (torch.zeros(40, 70), torch.zeros(1, 1), one, row, row.T, missing)]
    results = small_polar(xs, polynomials.TURBO_MINIMAX, bound=bound, dtype=dtype)
    for x, o in zip(xs, results, strict=True):
        assert o.dtype == dtype and o.isfinite().all()
        expected = eager(x, polynomials.TURBO_MINIMAX, bound)
        assert (o - expected).norm() <= 1.5 * ROUNDING * expected.norm(), tuple(x.shape)
    assert not results[0].any() and not results[1].any() and not results[5][7].any()


def test_rank_one(device):
    x = (make("gaussian", 40, 1) @ make("gaussian", 1, 70)).to(device)
    (o,) = small_polar([x], polynomials.TURBO_MINIMAX)
    expected = eager(x, polynomials.TURBO_MINIMAX)
    along = (o * expected).sum() / expected.norm() ** 2 * expected
    assert relative_error(along, expected) < 1.5 * ROUNDING
    assert (o - along).norm() < 0.2  # where singular values are 0: rounding of X to float16, times a slope of 273


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_no_result_is_silently_finite(bad, bound, device):
    xs = []
    for shape in ((1, 1), (1, 200), (20, 150), (70, 30)):
        for at in (0, -1):
            x = make("gaussian", *shape) if shape[0] <= shape[1] else make("gaussian", *shape[::-1]).T
            x = x.clone()
            x[at, at] = bad
            xs += [x.to(device), x.to(device, torch.float16)]
    clean = make("gaussian", 20, 30).to(device)
    *results, o = small_polar(xs + [clean], polynomials.TURBO, bound=bound)
    for x, result in zip(xs, results, strict=True):
        assert not result.isfinite().any(), tuple(x.shape)
    assert relative_error(o, eager(clean, bound=bound)) < ROUNDING, "neighbours in the list stay as they are"


def test_scale_of_the_input_does_not_matter(device):
    x = make("student-t2", 30, 200).to(device)
    x[:, :100] *= 1e-3  # so that rows grow on the way, beyond the first chunk of columns
    exact, *powers = small_polar([x, *(x * 2.0**k for k in (-100, -20, 20, 100))], polynomials.TURBO_MINIMAX)
    assert all(torch.equal(o, exact) for o in powers)
    for o in small_polar([x * 1e-30, x * 1e30], polynomials.TURBO_MINIMAX):
        assert relative_error(o, exact) < ROUNDING
    limits = torch.finfo(torch.float32)
    for o in small_polar([x / x.abs().max() * limits.max, x / x.abs().min() * limits.tiny], polynomials.TURBO):
        assert relative_error(o, eager(x)) < ROUNDING
    (o,) = small_polar([x / x.abs().max() * limits.tiny * 2.0**-20], polynomials.TURBO_MINIMAX)
    assert o.isfinite().all(), "three bits are left of such numbers: no factor to compare with"


def test_rows_of_very_different_scale(device):
    x = make("gaussian", 16, 100)
    x = (torch.logspace(15, -15, 16, dtype=torch.float64)[:, None] * x.double()).float()
    (o,) = small_polar([x.to(device)], polynomials.TURBO)
    assert o.isfinite().all() and relative_error(o[:1].cpu(), eager(x)[:1]) < ROUNDING


@pytest.mark.parametrize("arguments, changes, says", [
    ([torch.zeros(130, 129)], {}, r"matrix 0 has shape \(130, 129\).*at most 128"),
    ([torch.zeros(8, 8), torch.zeros(8)], {}, r"matrix 1 has shape \(8,\)"),
    ([torch.zeros(8, 8, dtype=torch.float64)], {}, "float64: expected float32, float16 or bfloat16"),
    ([torch.zeros(8, 8), torch.zeros(8, 8, device="meta")], {}, "matrix 1 is on meta: expected cpu"),
    ([torch.zeros(8, 8)], {"dtype": torch.float32}, "dtype=torch.float32: expected torch.float16 or torch.bfloat16"),
    ([torch.zeros(8, 8)], {"coefficients": ((1.0, 2.0),)}, r"expected one \(a, b, c\)"),
    ([torch.zeros(8, 8)], {"coefficients": ()}, r"expected one \(a, b, c\)"),
])
def test_mistakes_are_named(arguments, changes, says):
    with pytest.raises(ValueError, match=says):
        small_polar(arguments, **{"coefficients": polynomials.TURBO, **changes})


def test_cpu_tensors_need_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="cannot run on cpu: they need an NVIDIA GPU"):
        small_polar([torch.zeros(8, 8)], polynomials.TURBO)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="cannot run on meta: Triton's interpreter needs CPU tensors"):
        small_polar([torch.zeros(8, 8, device="meta")], polynomials.TURBO)


# --- what only a GPU has ----------------------------------------------------------------------------------------------


def captured(xs):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = small_polar(xs, polynomials.TURBO, bound=True)
    return graph, results


@pytest.mark.gpu
@pytest.mark.parametrize("known", [True, False])
def test_gpu_graph_replays_with_changed_contents(known):
    xs = [torch.zeros(shape, device="cuda") for shape in ((64, 216), (3, 128, 128), (64, 64))]
    small_polar(xs, polynomials.TURBO, bound=True)  # compiles
    if not known:  # the same code paths, but other distances in memory: the table is uploaded by the graph
        bank = torch.zeros(64 * 500, device="cuda")
        xs = [bank[: 64 * 216].view(64, 216), xs[1], bank[-64 * 64 :].view(64, 64)]
    graph, results = captured(xs)
    for _ in range(module._PLANS + 1):  # nor may forgetting tables matter
        small_polar([torch.zeros(1, 2 + _, device="cuda")], polynomials.TURBO[:1])
    for seed in range(3):
        for x in xs:
            x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        for x, o in zip(xs, results, strict=True):
            assert relative_error(o, eager(x, bound=True)) < ROUNDING
    for x, o in zip(xs, small_polar(xs, polynomials.TURBO, bound=True), strict=True):
        assert relative_error(o, eager(x, bound=True)) < ROUNDING


@pytest.mark.gpu
def test_gpu_tables_made_on_one_stream_serve_another():
    x = torch.randn(5000, 16, 24, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(20_000_000)  # holds up the copy of the table
        small_polar([x], polynomials.TURBO)
    (o,) = small_polar([x], polynomials.TURBO)
    assert relative_error(o, eager(x)) < ROUNDING


@pytest.mark.gpu
def test_gpu_seventy_thousand_matrices():
    x = torch.randn(70_000, 10, 18, device="cuda")
    (o,) = small_polar([x], polynomials.TURBO)
    assert relative_error(o, eager(x)) < ROUNDING


@pytest.mark.gpu
def test_gpu_offsets_beyond_32_bits():
    bank = torch.empty(64, 2**26, dtype=torch.float16, device="cuda")  # 8 GiB, of which only the ends are touched
    x = bank[:, -96:]
    x.copy_(make("gaussian", 64, 96))
    for view, expected in ((x, eager(x.float())), (x.T, eager(x.float()).T)):
        (o,) = small_polar([view], polynomials.TURBO)
        assert relative_error(o, expected) < ROUNDING
