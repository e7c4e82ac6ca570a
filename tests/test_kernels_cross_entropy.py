"""kernels/cross_entropy.py against float64, loss and gradients. Without a GPU its kernels run in Triton's interpreter.

At the end: its kernels and those of kernels/fp8.py compile for Hopper, with wide loads and no function computed twice.
"""

import pytest
import torch
import torch.nn.functional as F
from hopper import printed_by

from kernels import cross_entropy as module
from kernels.cross_entropy import softcapped_cross_entropy, softcapped_cross_entropy_eager

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
CAP = 23.0, 5.0, 7.5
SLACK = 1.2 if GPU else 4.0  # for chance; the interpreter cuts bits instead of rounding


def problem(tokens, vocabulary, width=32, spread=0.5, seed=0):
    """x, weight (both in bfloat16's numbers) and targets, a tenth of them ignored, as float64 and int64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator).bfloat16()
    weight = (spread * torch.randn(vocabulary, width, generator=generator)).bfloat16()
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[torch.rand(targets.shape, generator=generator) < 0.1] = -1
    targets[-1] = vocabulary - 1
    return x.double().to(DEVICE), weight.double().to(DEVICE), targets.to(DEVICE)


def run(function, x, weight, targets, slope=1.0, dtype=torch.float64, weight_dtype=None, cap=CAP, **options):
    """[loss, dx, dW] with x of dtype and weight of weight_dtype."""
    x = x.to(dtype, copy=True).requires_grad_()
    weight = weight.to(weight_dtype or dtype, copy=True).requires_grad_()
    loss = function(x, weight, targets, cap=cap, **options)
    (slope * loss).backward()
    assert x.grad.dtype == dtype and weight.grad.dtype == weight.dtype
    return [loss.detach(), x.grad, weight.grad]


def fused(*arguments, **options):
    return softcapped_cross_entropy(*arguments, engine="fused", **options)


def errors(found, truth):
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, truth, strict=True)]


SIZES = [(20, 300), (33, 257), (48, 640), (16, 40), (1, 7)]


@pytest.mark.parametrize("tokens, vocabulary", SIZES)
def test_loss_and_gradients_in_float32(tokens, vocabulary, monkeypatch):
    monkeypatch.setattr(module, "ROWS", 16)  # several parts, the last one short
    monkeypatch.setattr(module, "_BLOCK", 128 if not GPU else module._BLOCK)
    monkeypatch.setattr(module, "FAST_TANH", False)
    given = problem(tokens, vocabulary)
    truth = run(softcapped_cross_entropy_eager, *given, slope=-0.3)
    found = run(fused, *given, slope=-0.3, dtype=torch.float32)
    assert found[0].dtype == torch.float32 and found[0].shape == () and max(errors(found, truth)) < 5e-6


@pytest.mark.parametrize("tokens, vocabulary", SIZES)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_is_no_worse_than_the_eager_route(tokens, vocabulary, weight_dtype, monkeypatch):
    monkeypatch.setattr(module, "FAST_TANH", False)
    given = problem(tokens, vocabulary)
    truth = run(softcapped_cross_entropy_eager, *given)
    kinds = dict(dtype=torch.bfloat16, weight_dtype=weight_dtype)
    eager = errors(run(softcapped_cross_entropy_eager, *given, **kinds), truth)
    for ours, theirs in zip(errors(run(fused, *given, **kinds), truth), eager):
        assert ours <= SLACK * theirs + 1e-6


def test_the_loss_is_the_cross_entropy_also_of_a_tanh_softcap():
    x, weight, targets = problem(40, 200)
    targets = targets.clamp(min=0)
    logits = (x @ weight.T).float()
    for cap, capped in ((CAP, 23 * torch.sigmoid((logits + 5) / 7.5)), ((30, 0, 7.5), 15 * torch.tanh(logits / 15))):
        expected = F.cross_entropy(capped, targets)
        for engine in ("fused", "eager"):
            loss = softcapped_cross_entropy(x.float(), weight.float(), targets, cap=cap, engine=engine)
            torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cap", [CAP, (80.0, 0.0, 20.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_ten_thousand(dtype, cap, monkeypatch):
    x, weight, targets = problem(12, 130)
    x[:, 0], weight[:, 0] = 100.0, torch.linspace(-100, 100, 130)
    x[3] = -x[3]
    given = x, weight, targets
    assert (x @ weight.T).abs().max() > 9000
    truth = run(softcapped_cross_entropy_eager, *given, cap=cap)
    assert all(t.isfinite().all() for t in run(fused, *given, cap=cap, dtype=dtype, weight_dtype=torch.float32))
    monkeypatch.setattr(module, "FAST_TANH", False)
    found = run(fused, *given, cap=cap, dtype=dtype, weight_dtype=torch.float32)
    eager = run(softcapped_cross_entropy_eager, *given, cap=cap, dtype=dtype, weight_dtype=torch.float32)
    assert all(t.isfinite().all() for t in found) and errors(found[:1], truth[:1])[0] < 1e-3
    for ours, theirs in zip(errors(found[1:], truth[1:]), errors(eager[1:], truth[1:])):
        assert ours <= max(SLACK * theirs + 1e-5, 2.0**-7 if dtype == torch.bfloat16 else 0)  # a rounding of its slopes


def test_x_of_any_strides(monkeypatch):
    monkeypatch.setattr(module, "FAST_TANH", False)
    x, weight, targets = problem(24, 96)
    expected = fused(x.float(), weight.float(), targets, cap=CAP)
    wide = torch.cat([x, x], 1).float()[:, : x.size(1)]
    for other in (wide, x.float().T.contiguous().T):
        assert not other.is_contiguous()
        other = other.detach().requires_grad_()
        loss = fused(other, weight.float().T.contiguous().T, targets.repeat_interleave(2)[::2], cap=CAP)
        torch.testing.assert_close(loss, expected)
        loss.backward()
        truth = run(softcapped_cross_entropy_eager, x, weight, targets)[1]
        assert errors([other.grad], [truth])[0] < 5e-6


def test_nothing_to_learn_gives_zeros():
    x, weight, targets = problem(16, 48)
    for precision in ("bfloat16", "fp8"):
        found = run(fused, x, weight, torch.full_like(targets, -1), dtype=torch.bfloat16, weight_dtype=torch.float32,
                    precision=precision)
        assert not any(t.any() for t in found)


def test_a_target_outside_of_the_vocabulary_is_not_silent():
    x, weight, targets = problem(16, 48)
    targets[5] = 48
    for precision in ("bfloat16", "fp8"):
        loss, dx, _ = run(fused, x, weight, targets, dtype=torch.bfloat16, weight_dtype=torch.float32,
                          precision=precision)
        assert loss.isnan() and dx[5].isnan().all() and dx[:5].isfinite().all() and dx[6:].isfinite().all()


def test_without_gradients_none_are_computed(monkeypatch):
    x, weight, targets = problem(16, 48)
    x, weight = x.float().requires_grad_(), weight.float()
    asked = []
    sum_rows = module._sum_rows
    monkeypatch.setattr(module, "_sum_rows", lambda *a, **k: (asked.append(a[-1]), sum_rows(*a, **k)))
    monkeypatch.setattr(module, "_float32_product", None)
    with torch.no_grad():
        assert not fused(x, weight, targets, cap=CAP).requires_grad
    assert not fused(x.detach(), weight, targets, cap=CAP).requires_grad
    assert asked == [False, False]


@pytest.mark.parametrize("engine", ["auto", "eager"])
def test_the_engine_is_chosen_by_device_and_dtype(engine, monkeypatch):
    x, weight, targets = problem(16, 48)
    asked, operator = [], module._operator
    monkeypatch.setattr(module, "_operator", lambda *given: (asked.append(given), operator(*given))[1])
    for dtype, kernels in ((torch.float32, GPU and engine == "auto"), (torch.float64, False)):
        expected = softcapped_cross_entropy_eager(x.to(dtype), weight.to(dtype), targets, CAP)
        asked.clear()
        found = softcapped_cross_entropy(x.to(dtype), weight.to(dtype), targets, cap=CAP, engine=engine)
        torch.testing.assert_close(found, expected)
        assert bool(asked) == kernels


def test_the_same_input_gives_the_same_bits():
    given = problem(40, 300)
    first, second = (run(fused, *given, dtype=torch.bfloat16, weight_dtype=torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("precision", ["bfloat16", "fp8"])
def test_torch_compile_keeps_one_graph_and_the_result(precision):
    x, weight, targets = problem(32, 96)
    options = dict(cap=CAP, precision=precision, engine="fused")

    def loss(x, weight, targets):
        return 2 * softcapped_cross_entropy(2 * x, weight, targets, **options)

    results = []
    compiled = torch.compile(loss, fullgraph=True, backend="inductor" if GPU else "aot_eager")
    for function in (loss, compiled):
        a, b = x.bfloat16().requires_grad_(), weight.float().requires_grad_()
        value = function(a, b, targets)
        value.backward()
        with torch.no_grad():
            results.append([value, a.grad, b.grad, function(a, b, targets)])
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(results[0][3], results[0][0], rtol=1e-2, atol=0)


# --- fp8 -------------------------------------------------------------------------------------------------------------


def cosines(found, truth):
    return [F.cosine_similarity(a.double().flatten(), b.flatten(), dim=0).item() for a, b in zip(found, truth)]


@pytest.mark.parametrize("rows", [64, 32])
def test_fp8_is_close_to_float64(rows, monkeypatch):
    monkeypatch.setattr(module, "ROWS", rows)
    given = problem(64, 320, width=64, spread=0.3)
    truth = run(softcapped_cross_entropy_eager, *given, slope=2.0)
    kinds = dict(dtype=torch.bfloat16, weight_dtype=torch.float32, slope=2.0)
    found = run(fused, *given, precision="fp8", **kinds)
    assert abs(found[0] - truth[0]) < 0.01 * truth[0]
    assert min(cosines(found[1:], truth[1:])) > 0.99
    for a, b in zip(found[1:], truth[1:]):
        assert 0.95 < a.double().norm() / b.norm() < 1.05


def test_slopes_in_8_bits_are_within_their_rounding_and_transposed(monkeypatch):
    monkeypatch.setattr(module, "FAST_TANH", False)
    x, weight, targets = problem(48, 160)
    logits = (x @ weight.T).bfloat16()
    exact = logits.double().requires_grad_()
    eye = torch.eye(160, dtype=torch.float64, device=DEVICE)
    softcapped_cross_entropy_eager(exact, eye, targets, CAP).backward()
    losses, lses = torch.empty(2, 48, device=DEVICE)
    module._sum_rows(logits, targets, losses, lses, CAP, 48, True, in_place=False)
    straight, transposed = module._slopes(logits, targets, lses, CAP)
    assert torch.equal(straight.float().T, transposed.float())
    expected = exact.grad * 48 * 4 * CAP[2] / CAP[0] * module.GRADIENT_MOST
    assert 0.4 * module.GRADIENT_MOST < expected.abs().max() < module.GRADIENT_MOST
    assert ((straight.double() - expected).abs() <= 0.1251 * expected.abs() + 2.0**-16).all()  # 3 significant bits
    loss = softcapped_cross_entropy_eager(exact, eye, targets, CAP)
    assert errors([losses.mean()], [loss])[0] < 1e-5


# --- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, says", [
    (dict(x=lambda x: x[:, :5]), r"got \(16, 5\), \(48, 32\) and \(16,\)"), (dict(x=lambda x: x[0]), "needs x"),
    (dict(targets=lambda t: t[:9]), r"\(9,\)"), (dict(targets=lambda t: t[:, None]), r"\(16, 1\)"),
    (dict(targets=lambda t: t.int()), "int64 targets, got torch.int32"),
    (dict(cap=lambda c: (81.0, 0.0, 7.5)), "0 < A ≤ 80"), (dict(cap=lambda c: (23.0, 0.0, 0.0)), "C > 0"),
    (dict(precision=lambda p: "int8"), "one of bfloat16, fp8"), (dict(engine=lambda e: "fast"), "auto, fused, eager"),
    (dict(weight=lambda w: w.half()), "not torch.bfloat16 and torch.float16"),
    (dict(x=lambda x: x.half(), weight=lambda w: w.half(), precision=lambda p: "fp8"), "float16"),
    (dict(x=lambda x: x[:15], targets=lambda t: t[:15], precision=lambda p: "fp8"), "multiples of 16"),
    (dict(weight=lambda w: w[:47], precision=lambda p: "fp8"), "multiples of 16"),
    (dict(engine=lambda e: "eager", precision=lambda p: "fp8"), "is for the kernels")], ids=lambda value: None)
def test_mistakes_are_named(changes, says):
    x, weight, targets = problem(16, 48)
    arguments = dict(x=x.bfloat16(), weight=weight.float(), targets=targets, cap=CAP, precision="bfloat16",
                     engine="fused")
    with pytest.raises(ValueError, match=says):
        softcapped_cross_entropy(**{name: changes.get(name, lambda v: v)(value) for name, value in arguments.items()})


# --- real sizes ------------------------------------------------------------------------------------------------------


def real_size(tokens, vocabulary=50304, width=768):
    """x, weight, targets as in training: rows of x of unit mean square, logits with a deviation of 3."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(tokens, width, generator=generator, device="cuda")
    x = F.rms_norm(x, (width,)).bfloat16()
    weight = torch.randn(vocabulary, width, generator=generator, device="cuda") * 3 / width**0.5
    targets = torch.randint(vocabulary, (tokens,), generator=generator, device="cuda")
    return x, weight, targets


@pytest.mark.gpu
@pytest.mark.parametrize("fast", [False, True])
def test_real_size_is_no_worse_than_the_eager_route(fast, monkeypatch):
    monkeypatch.setattr(module, "FAST_TANH", fast)
    given = real_size(2048)
    truth = run(softcapped_cross_entropy_eager, *given)
    kinds = dict(dtype=torch.bfloat16, weight_dtype=torch.float32)
    eager = errors(run(softcapped_cross_entropy_eager, *given, **kinds), truth)
    found = run(softcapped_cross_entropy, *given, **kinds)
    print("fused", errors(found, truth), "eager", eager)
    for ours, theirs in zip(errors(found, truth)[1:], eager[1:]):
        assert ours <= (1.5 if fast else SLACK) * theirs
    assert errors(found, truth)[0] < 1e-3
    with torch.no_grad():
        validation = softcapped_cross_entropy(*given, cap=CAP)
    assert abs(validation - truth[0]) <= 2e-4 * truth[0]


@pytest.mark.gpu
def test_real_size_in_fp8():
    given = real_size(2048)
    truth = run(softcapped_cross_entropy_eager, *given)
    found = run(softcapped_cross_entropy, *given, dtype=torch.bfloat16, weight_dtype=torch.float32, precision="fp8")
    print("fp8", errors(found, truth), cosines(found[1:], truth[1:]))
    assert abs(found[0] - truth[0]) < 5e-3 * truth[0] and min(cosines(found[1:], truth[1:])) > 0.99


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bfloat16", "fp8"])
def test_more_logits_than_an_int32_can_count(precision, monkeypatch):
    monkeypatch.setattr(module, "ROWS", 65536)
    tokens, last = 45056, 256  # 2.27e9 logits in one piece
    x, weight, targets = real_size(tokens)
    targets[:-last] = -1
    found = run(softcapped_cross_entropy, x, weight, targets, dtype=torch.bfloat16, weight_dtype=torch.float32,
                precision=precision)
    truth = run(softcapped_cross_entropy_eager, x[-last:], weight, targets[-last:], slope=last / tokens)
    truth[0] = truth[0] * last / tokens
    assert not found[1][:-last].any()
    assert min(cosines([found[1][-last:], found[2]], truth[1:])) > (0.99 if precision == "fp8" else 0.9999)
    assert errors(found[:1], truth[:1])[0] < 5e-3


@pytest.mark.gpu
def test_validation_keeps_no_logits():
    x, weight, targets = real_size(32768)
    with torch.no_grad():
        softcapped_cross_entropy(x[:64], weight, targets[:64], cap=CAP)  # cuBLAS keeps a workspace from now on
        before = torch.cuda.memory_allocated()
        softcapped_cross_entropy(x, weight, targets, cap=CAP)
    assert torch.cuda.memory_allocated() - before < 2**20


PROGRAM = """
import json, re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels import cross_entropy as file, fp8

def build(kernel, warps, **constants):
    kinds = dict(logits="*bf16", x="*bf16", targets="*i64", straight="*fp8e5", transposed="*fp8e5")
    kinds |= dict.fromkeys(("losses", "lses", "scale"), "*fp32")
    kinds |= dict.fromkeys(("R", "V", "C"), "i32")
    signature = {name: "constexpr" if name in constants else kinds.get(name, "fp32") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names)
               if signature[name][0] in "*i"}
    ptx = triton.compile(ASTSource(kernel, signature, constants, aligned), target=GPUTarget("cuda", 90, 32),
                         options=dict(num_warps=warps)).asm["ptx"]
    count = lambda pattern: len(re.findall(pattern, ptx))
    return dict(loads=count(r"ld[.]global[.]\\S*v4"), stores=count(r"st[.]global[.]\\S*v4"),
                tanh=count("tanh[.]approx"), exp=count("ex2[.]approx"), fours=count("low, high"),
                spilled=".local" in ptx)

tile = dict(ROWS=file._TILE_ROWS, COLUMNS=file._TILE_COLUMNS)
rows = dict(FAST=True, BLOCK=file._BLOCK)
print(json.dumps(dict(
    sums=build(file._rows_kernel, file._WARPS, IN_PLACE=False, **rows),
    slopes=build(file._rows_kernel, file._WARPS, IN_PLACE=True, **rows),
    exact=build(file._rows_kernel, file._WARPS, IN_PLACE=False, **rows | dict(FAST=False)),
    both=build(file._slopes_kernel, file._TILE_WARPS, FAST=True, **tile),
    cast=build(fp8._cast_kernel, 8, ROWS=fp8._ROWS, COLUMNS=fp8._COLUMNS))))
"""


def test_the_kernels_compile_for_hopper():
    found = printed_by(PROGRAM)
    assert not any(each["spilled"] for each in found.values())
    assert all(found[name]["loads"] > 0 for name in found)
    assert all(found[name]["stores"] > 0 for name in ("slopes", "both", "cast"))  # 16 bytes a thread
    assert found["exact"]["tanh"] == 0
    assert found["cast"]["fours"] and found["both"]["fours"]  # not triton's own cast: see kernels/fp8.py
    threads = 32 * module._TILE_WARPS
    each = module._TILE_ROWS * module._TILE_COLUMNS // threads + -(-module._TILE_ROWS // threads)  # and of targets
    assert found["both"]["tanh"] == found["both"]["exp"] == each  # not once more for the transposed store
