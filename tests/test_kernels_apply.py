"""kernels/apply.py against float64, and Muon with it. Without a GPU the kernel runs in Triton's interpreter.

At the end: it compiles for Hopper, takes 16 bytes of a parameter at a time, and has no use for shared memory.
"""

import pytest
import torch
from hopper import printed_by

from kernels import apply as module
from kernels.apply import BLOCK, DTYPES, Addresses, apply_updates
from optim import Muon, Polar
from optim.muon import apply_updates_eager
from optim.polynomials import MUON

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# How many parameters of which shape: one number, last blocks that are not full, sizes that 16 divides or not, filters.
BANKS = [(1, (1, 1)), (3, (5, 7)), (1, (2, BLOCK)), (3, (BLOCK // 16 + 1, 16)), (2, (1, 4099)), (5, (6, 3, 4, 4))]
KINDS = [dict(decay=0.0, cautious=True), dict(decay=0.25, cautious=False), dict(decay=0.25, cautious=True)]


def judge(count, shape, dtype, update_dtype, decay, cautious):
    """Against float64. Filters lie channels last; of three or more parameters the second sleeps; an update is left."""
    draw = torch.Generator().manual_seed(count)
    numbers = torch.randn(4 + count * torch.Size(shape).numel() + 8, generator=draw).to(DEVICE, dtype)
    p = numbers[4:-8].view(count, *shape)  # of float16 not on a multiple of 16 bytes
    u = torch.randn(count + 1, *shape, generator=draw).to(DEVICE, update_dtype)
    if count > 1:
        p[0, 0, 0] = u[1, 0, 0] = 0  # which agrees with everything
    params = [None if i == 1 and count > 2 else t.permute(0, 3, 1, 2) if t.ndim == 4 else t for i, t in enumerate(p)]
    for lr in (0.25, torch.tensor(0.125, device=DEVICE)):
        options = dict(lr=lr, ratio=1.5, decay=decay, cautious=cautious)
        before, w, v = p.clone(), p.double(), u.double()
        truth = w - lr * decay * ((w * v[:-1] >= 0) | (not cautious)) * w - lr * 1.5 * v[:-1]
        apply_updates_eager([w], [v[:-1]], **options)
        outside = numbers[:4].tolist(), numbers[-8:].tolist()
        apply_updates(params, u, **options)
        assert outside == (numbers[:4].tolist(), numbers[-8:].tolist()) and torch.equal(u.double(), v)
        rounding = torch.finfo(dtype).eps / (2 if GPU or dtype != torch.bfloat16 else 1)  # interpreter: cuts its bits
        for i in range(count):
            exact = truth[i] if params[i] is not None else before[i].double()
            assert ((p[i] - exact).abs() <= 1.001 * rounding * exact.abs() + 1e-6).all()
        assert (w - truth).abs().max() < 1e-12


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("update_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bank", BANKS, ids=str)
def test_formula(bank, dtype, update_dtype, options):
    judge(*bank, dtype, update_dtype, **options)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("lr", [0.0, 0.25])
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_what_is_not_finite_or_tiny_becomes_what_it_does_in_the_twin(options, lr):
    inf = float("inf")
    values = torch.tensor([0.0, -0.0, 1.0, -2.0, 1e-20, -1e-20, 1e-30, -1e-30, inf, -inf, inf - inf], device=DEVICE)
    p, u = (t.contiguous() for t in torch.meshgrid(values, values, indexing="ij"))
    twin = p.clone()
    apply_updates_eager([twin], [u], lr=lr, **options)
    apply_updates([p], u[None], lr=lr, **options)
    torch.testing.assert_close(p, twin, rtol=1e-6, atol=0, equal_nan=True)


def test_a_table_of_addresses_is_made_once_and_anew_where_one_has_moved(monkeypatch):
    a, b, moved = (torch.ones(4, 8, device=DEVICE) for _ in range(3))
    addresses, tables = Addresses(), []
    for params in ([a, b], [a, b], [None, b], [a, moved]):
        apply_updates(params, torch.ones(2, 32, device=DEVICE), addresses, lr=1.0)
        tables.append(addresses.table)
    assert tables[0] is tables[1] is not tables[2] and [int(p.sum()) for p in (a, b, moved)] == [-64, -64, 0]
    assert [table.tolist()[0] for table in tables] == [a.data_ptr(), a.data_ptr(), 0, a.data_ptr()]
    monkeypatch.setattr(module, "capturing", lambda: True)
    graphs = [addresses.of([a, moved], a.device), addresses.of([a, b], a.device)]  # replays fill the latter
    assert graphs[0] is addresses.table is tables[-1] and list(map(id, graphs)) == list(map(id, addresses.captured))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("second_moment, launches", [("full", 3), ("factored", 2)])  # the latter: see Bank.in_order
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_muon_steps_alike_with_kernel_and_twin(options, second_moment, launches, dtype, monkeypatch):
    """Two filters, a tall matrix, a transposed one, two in one; a launch for each bank whose updates lie as it does."""
    calls, results, polar = [], [], Polar(MUON[:3], dtype=torch.float32)
    monkeypatch.setattr(module, "apply_updates", lambda *given, **more: calls.append(apply_updates(*given, **more)))
    for engine, lr in (("eager", 0.125), ("fused", 0.125), ("fused", torch.tensor(0.125, device=DEVICE))):
        draw = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape, generator=draw).to(DEVICE, dtype))
                  for shape in [(8, 3, 3, 2), (8, 3, 3, 2), (12, 5), (7, 4), (16, 6)]]
        for p in params[:2]:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
        params[3].data = params[3].data.mT
        optimizer = Muon([dict(params=params[:4]), dict(params=params[4:], split=2)], lr, options["decay"], polar=polar,
                         cautious=options["cautious"], second_moment=second_moment)
        optimizer.engine = engine
        for step in range(3):
            for i, p in enumerate(params):
                p.grad = None if i == step == 1 else torch.randn(p.shape, generator=draw).to(p)
            optimizer.step()
        results.append(params)
    assert len(calls) == 2 * 3 * launches
    for eager, *fused in zip(*results):
        rounding = 1e-5 if dtype == torch.float32 else 5e-3
        assert all((p - eager).abs().max() <= rounding * eager.abs().max() for p in fused)


ONES = torch.ones(4, 6)


@pytest.mark.parametrize("params, updates", [
    ([ONES.double()], ONES[None]), ([ONES], ONES[None].double()), ([ONES, ONES.half()], ONES.expand(2, 4, 6)),
    ([ONES.mT], ONES[None]), ([ONES.to("meta")], ONES[None]), ([ONES[:2]], ONES[None]), ([ONES] * 2, ONES[None])])
def test_what_does_not_fit_is_refused(params, updates):
    with pytest.raises(ValueError, match="params of one kind and an update of their size for each; got"):
        apply_updates(params, updates, lr=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("count, shape", [(48, (512, 512)), (12, (2048, 512)), (12, (512, 2048))])
def test_72_matrices_of_blocks_of_512(count, shape):
    judge(count, shape, torch.float32, torch.float16, **KINDS[2])


@pytest.mark.gpu
def test_more_updates_than_an_int32_can_count():
    u = torch.zeros(3, 1 << 20, 1030, dtype=torch.float16, device=DEVICE)
    p = torch.ones_like(u[2].normal_(), dtype=torch.float32)
    apply_updates([None, None, p], u, lr=1.0)
    assert torch.equal(p, 1 - u[2].float())


PROGRAM = """
import json, re, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels.apply import BLOCK, _apply_kernel as kernel

def build(dtype, vector):
    constants = dict(DTYPE=dtype, VECTOR=vector, BLOCK=BLOCK, ALIGNED=True, MOVING=True, DECAY=True, CAUTIOUS=True)
    kinds = dict(addresses="*i64", updates="*fp16", lr="*fp32", size="i32", blocks="i32", ratio="fp32", decay="fp32")
    signature = {name: kinds.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in ("addresses", "updates", "size")}
    compiled = triton.compile(ASTSource(kernel, signature, constants, aligned), target=GPUTarget("cuda", 90, 32),
                              options=dict(num_warps=8))
    moves = re.findall(r"(?:ld|st)[.]global[.](\\S+)", compiled.asm["ptx"])
    return [compiled.metadata.shared, "STL" in compiled.asm["sass"], sorted(moves)]

print(json.dumps([build(tl.float32, 4), build(tl.float16, 8)]))
"""


def test_the_kernel_compiles_for_hopper_with_16_bytes_at_a_time_and_without_spilling():
    """It loads an address and the learning rate; p and u, and stores p, in two halves each where p is float32."""
    moves = [["b32", "b64", *["v2.b32"] * 2, *["v4.b32"] * 4], ["b32", "b64", *["v4.b32"] * 3]]
    assert printed_by(PROGRAM) == [[0, False, expected] for expected in moves]
