"""The momentum kernels against their eager twin, whose formulas tests/test_optim_second_moment.py checks in float64."""

import pytest
import torch
from hopper import printed_by

from kernels.momentum import COLUMNS, ROWS, SUMMED, momentum_update
from optim import Muon, Polar
from optim.polynomials import MUON
from optim.second_moment import moment_shapes
from optim.second_moment import momentum_update as twin

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
pytestmark = [pytest.mark.gpu] if GPU else []
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 1e-2 if GPU else 3e-2, torch.float16: 2e-3}  # interpreter: cuts bits
SHAPES = [(1, 1, 1), (3, 7, 5), (2, 1, 300), (2, 300, 1), (2, ROWS + 6, COLUMNS + 2), (1, 2 * SUMMED + 5, 3),
          (1, 64, 3 * COLUMNS)]


def state(kind, shape, dtype, seed=1):
    """grads, momentum, moments as they are in the middle of training."""
    generator = torch.Generator().manual_seed(seed)
    grads, momentum = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for _ in range(2))
    shapes = moment_shapes(kind, *shape).values()
    return grads, momentum, [(0.1 + torch.rand(s, generator=generator)).to(DEVICE) for s in shapes]


def close(one, other, dtype):
    """Entry by entry, in units of the largest: small differences of large numbers keep the rounding of those."""
    return (one.double() - other.double()).abs().max() <= ROUNDING[dtype] * other.double().abs().max()


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("kind", [None, "full", "factored"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_eager_twin_over_three_steps(shape, kind, dtype, nesterov):
    grads, momentum, moments = state(kind, shape, dtype)
    expected_momentum, expected_moments = momentum.clone(), [v.clone() for v in moments]
    for step, mu in enumerate((0.3, 0.85, 0.95)):  # both branches of lerp
        grads = state(kind, shape, dtype, seed=step + 2)[0]
        before = grads.clone()
        options = dict(mu=mu, nesterov=nesterov, beta2=0.9, eps=1e-3)
        update = momentum_update(grads, momentum, moments, **options)
        expected = twin(grads, expected_momentum, expected_moments, engine="eager", **options)
        assert torch.equal(grads, before) and update.dtype == dtype and update.shape == shape
        assert close(update, expected, dtype) and close(momentum, expected_momentum, dtype)
        for one, other in zip(moments, expected_moments):
            assert close(one, other, torch.float32)


@pytest.mark.parametrize("kind", ["full", "factored"])
def test_zero_gradients_of_a_fresh_state_give_zeros(kind):
    shape = (2, 5, 6)
    grads = torch.zeros(shape, device=DEVICE)
    moments = [torch.zeros(s, device=DEVICE) for s in moment_shapes(kind, *shape).values()]
    update = momentum_update(grads, torch.zeros_like(grads), moments, mu=0.95)
    assert torch.equal(update, torch.zeros_like(grads)) and all(torch.equal(v, torch.zeros_like(v)) for v in moments)


@pytest.mark.parametrize("kind", [None, "full", "factored"])
def test_the_same_input_gives_the_same_bits_and_muon_may_ask_for_it(kind):
    shape = (3, ROWS + 6, COLUMNS + 2)
    results = []
    for function, options in ((momentum_update, {}), (momentum_update, {}), (twin, {"engine": "fused"})):
        grads, momentum, moments = state(kind, shape, torch.float32)
        results.append([function(grads, momentum, moments, mu=0.95, **options), momentum, *moments])
    for first, *others in zip(*results):
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("kind", [None, "full", "factored"])
def test_muon_steps_alike_with_kernel_and_twin_also_past_a_sleeper(kind):
    polar = Polar(MUON[:2], dtype=torch.float32)
    start = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0))
    runs = []
    for engine in ("fused", "eager"):
        params = [torch.nn.Parameter(w.clone().to(DEVICE)) for w in start]
        optimizer = Muon(params, polar=polar, second_moment=kind)
        optimizer.engine = engine
        for step in range(3):
            for i, p in enumerate(params):
                p.grad = None if i == step == 1 else state(None, (1, 8, 20), torch.float32, seed=3 * step + i)[0][0]
            optimizer.step()
        runs.append([*params, *(value for p in params for value in optimizer.state[p].values())])
    for fused, eager in zip(*runs):
        assert close(fused, eager, torch.float32)
    assert not torch.equal(runs[0][0].detach().cpu(), start[0])


@pytest.mark.parametrize("kind", [None, "full", "factored"])
def test_nothing_is_written_beyond_the_tensors(kind):
    shape, guard = (1, ROWS + 1, COLUMNS + 1), 4096
    grads, *rest = state(kind, shape, torch.float32)
    rest = [rest[0], *rest[1]]
    padded = [torch.full((guard + t.numel() + guard,), 7.0, device=DEVICE) for t in rest]
    views = [p[guard:-guard].view(t.shape) for p, t in zip(padded, rest)]
    for view, t in zip(views, rest):
        view.copy_(t)
    momentum_update(grads, views[0], views[1:], mu=0.95)
    for p in padded:
        assert (p[:guard] == 7).all() and (p[-guard:] == 7).all()
    assert not torch.equal(views[0], rest[0])


def mistaken(**changes):
    grads = torch.zeros(2, 4, 6, device=DEVICE)
    arguments = dict(grads=grads, momentum=torch.zeros_like(grads), moments=[torch.zeros_like(grads)]) | changes
    return momentum_update(*arguments.values(), mu=0.95)


@pytest.mark.parametrize("changes, says", [
    (dict(momentum=torch.zeros(2, 6, 4)), "do not belong together"),
    (dict(moments=[torch.zeros(2, 4), torch.zeros(2, 4)]), "do not belong together"),
    (dict(moments=[torch.zeros(2, 4)] * 3), "do not belong together"),
    (dict(moments=[torch.zeros(2, 4, 6, dtype=torch.bfloat16)]), "float32 moments"),
    (dict(momentum=torch.zeros(2, 4, 6, dtype=torch.bfloat16)), "momentum in the gradients' dtype"),
    (dict(momentum=torch.zeros(2, 6, 4).mT), "contiguous"),
])
def test_mistakes_are_named(changes, says):
    with pytest.raises(ValueError, match=says):
        mistaken(**changes)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [None, "full", "factored"])
def test_more_elements_than_an_int32_can_count(kind):
    shape = (3, 32768, 32768)  # 3.2e9 elements of bfloat16; the last matrix is judged against the twin
    grads = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
    grads[-1].normal_()
    momentum = torch.zeros_like(grads)
    moments = [torch.zeros(s, device="cuda") for s in moment_shapes(kind, *shape).values()]
    update = momentum_update(grads, momentum, moments, mu=0.95, eps=1e-3)
    last = [torch.zeros(s, device="cuda") for s in moment_shapes(kind, 1, *shape[1:]).values()]
    expected = twin(grads[-1:], torch.zeros_like(grads[-1:]), last, mu=0.95, eps=1e-3, engine="eager")
    assert torch.allclose(update[-1:], expected, rtol=0.02, atol=1e-3) and not update[:-1].any()


PROGRAM = """
import json, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels import momentum as file

def build(kernel, grads, **constants):
    floats = ("mu", "rest", "keep", "gain", "eps")
    def kind(name):
        if name in constants:
            return "constexpr"
        if name in ("grads", "momentum", "update"):
            return f"*{grads}"
        if name in floats:
            return "fp32"
        return "i64" if name == "count" else "*fp32" if name.endswith(("sums", "moment", "totals")) else "i32"
    signature = {name: kind(name) for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names)
               if signature[name][0] == "*" or name in ("n", "m", "count")}
    compiled = triton.compile(ASTSource(kernel, signature, constants, aligned), target=GPUTarget("cuda", 90, 32),
                              options=dict(num_warps=8))
    ptx = compiled.asm["ptx"]
    return ptx.count("ld.global.v4"), ptx.count("st.local")

tile = dict(ROWS=file.ROWS, COLUMNS=file.COLUMNS)
print(json.dumps([
    [build(file._flat_kernel, grads, NESTEROV=True, FULL=full, BLOCK=file.FLAT) for full in (False, True)]
    + [build(file._squares_kernel, grads, **tile), build(file._moments_kernel, grads, BLOCK=file.SUMMED),
       build(file._factored_kernel, grads, NESTEROV=True, PARTS=4, **tile)]
    for grads in ("fp32", "bf16")]))
"""


def test_the_kernels_compile_for_hopper_without_spilling():
    for by_dtype in printed_by(PROGRAM):
        for kernel, (wide_loads, spills) in enumerate(by_dtype):
            assert spills == 0
            assert wide_loads > 0 or kernel == 3  # the small launch in the middle
