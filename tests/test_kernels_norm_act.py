"""kernels/norm_act.py against float64, forward and backward. Without a GPU the kernels run in Triton's interpreter.

At the end: it and kernels/augment.py compile for Hopper, as the CIFAR network needs them, with wide loads.
"""

import pytest
import torch
import triton
import triton.language as tl
from hopper import printed_by

from kernels import norm_act as module
from kernels.augment import activated, activated_slope, activation
from kernels.norm_act import norm_act, norm_act_eager

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(3, 24, 9, 9), (2, 80, 7, 6), (5, 16, 4, 5)]  # odd sides, channels that are no power of two, more than 64
OPTIONS = dict(training=True, momentum=0.4, eps=1e-12)


def tensors(shape, pool, residual, offset=0.5):
    """x, residual or None, bias and the slope of the loss by the result, in float16's numbers as float64."""
    generator = torch.Generator().manual_seed(sum(shape))

    def normal(*size):
        return torch.randn(*size, generator=generator).half().double()

    x = (normal(*shape) * 2 + offset).half().double()  # else float16 would make equals, and pools choose among them

    after = (*shape[:2], shape[2] // 2, shape[3] // 2) if pool else shape
    return x, normal(*after) if residual else None, normal(shape[1]), normal(*after)


def run(function, dtype, x, residual, bias, slope, **options):
    """(result, running mean, running variance, gradients of x, bias and, where there is one, residual)."""
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    x, slope = (t.to(DEVICE, dtype, copy=True, memory_format=torch.channels_last) for t in (x, slope))
    residual = residual if residual is None else residual.to(DEVICE, dtype, copy=True).requires_grad_()
    x, bias = x.requires_grad_(), bias.to(DEVICE, statistics, copy=True).requires_grad_()
    mean, var = torch.full_like(bias, 0.1).detach(), torch.full_like(bias, 2.0).detach()
    y = function(x, bias, mean, var, residual=residual, **OPTIONS | options)
    y.backward(slope)
    return [y.detach(), mean, var, x.grad, bias.grad] + ([] if residual is None else [residual.grad])


def errors(found, truth):
    return [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(found, truth, strict=True)]


@triton.jit
def _activations(z, y, slope, SILU: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(z + at)
    tl.store(y + at, activated(value, SILU))
    tl.store(slope + at, activated_slope(value, SILU))


@pytest.mark.parametrize("act, exact", [("gelu", 1.3e-6), ("silu", 1e-6)])
def test_activations_are_those_of_float64(act, exact):
    z = torch.cat([torch.linspace(-7, 7, 4091), torch.tensor([-1e4, -50.0, 0.0, 50.0, 1e4])])[:4096].to(DEVICE)
    z = torch.cat([z, z.new_zeros(4096 - len(z))])
    y, slope = torch.empty_like(z), torch.empty_like(z)
    _activations[(4,)](z, y, slope, SILU=act == "silu", BLOCK=1024)
    exactly = z.double().requires_grad_()
    truth = activation(act)(exactly)
    (true_slope,) = torch.autograd.grad(truth.sum(), exactly)
    assert ((y - truth).abs() <= exact / 2 + exact * truth.abs()).all() and (slope - true_slope).abs().max() < exact
    far = (truth.abs() > 1e-7) & (z < 0)  # where y is small, too, it is right by float16's measure
    assert ((y - truth)[far] / truth[far]).abs().max() < torch.finfo(torch.float16).eps / 4


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("act", ["gelu", "silu"])
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_results_statistics_and_gradients(shape, pool, act, residual, monkeypatch):
    cut = module.Cut(programs=3, stages=3)  # several tiles to a program, several groups of programs
    monkeypatch.setattr(module, "CUTS", dict.fromkeys(module.CUTS, cut))
    monkeypatch.setattr(module, "GROUP", 2)
    given = tensors(shape, pool, residual)
    truth = run(norm_act_eager, torch.float64, *given, pool=pool, act=act)
    assert max(errors(run(norm_act, torch.float32, *given, pool=pool, act=act), truth)) < 5e-6
    half = run(norm_act, torch.float16, *given, pool=pool, act=act)
    assert half[0].dtype == half[3].dtype == torch.float16 and half[4].dtype == torch.float32
    assert max(errors(half, truth)) < 1e-3
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (half[0], half[3]))


def test_large_means_cost_no_precision():
    given = tensors((4, 16, 8, 8), False, False, offset=200.0)
    truth = run(norm_act_eager, torch.float64, *given, pool=False, act="gelu")
    assert max(errors(run(norm_act, torch.float32, *given, pool=False, act="gelu"), truth)) < 1e-4


def test_evaluation_takes_the_running_statistics_and_leaves_them():
    x, residual, bias, _ = (None if t is None else t.to(DEVICE).float() for t in tensors((3, 24, 9, 9), True, True))
    x = x.contiguous(memory_format=torch.channels_last)
    mean, var = torch.linspace(-1, 1, 24, device=DEVICE), torch.linspace(0.5, 2, 24, device=DEVICE)
    options = OPTIONS | dict(training=False, pool=True, act="silu", residual=residual)
    found = norm_act(x, bias, mean, var, **options)
    torch.testing.assert_close(found, norm_act_eager(x, bias, mean.clone(), var.clone(), **options))
    assert torch.equal(mean, torch.linspace(-1, 1, 24, device=DEVICE))


def test_of_equal_values_the_first_gets_the_gradient_and_the_rest_zeros():
    x = torch.zeros(2, 16, 5, 5, device=DEVICE).contiguous(memory_format=torch.channels_last)
    x[:, :, ::2] += torch.arange(5.0, device=DEVICE)  # columns differ, pairs of lines are decided
    x[1] += 1
    x.requires_grad_()
    eager = x.detach().clone(memory_format=torch.channels_last).requires_grad_()
    bias, slope = torch.zeros(16, device=DEVICE), torch.rand(2, 16, 2, 2, generator=torch.Generator().manual_seed(0))
    for function, tensor in ((norm_act, x), (norm_act_eager, eager)):
        stats = torch.zeros(16, device=DEVICE), torch.ones(16, device=DEVICE)
        function(tensor, bias, *stats, pool=True, act="gelu", **OPTIONS).backward(slope.to(DEVICE))
    assert not x.grad[:, :, 4].any() and not x.grad[..., 4].any()  # what no window covers
    torch.testing.assert_close(x.grad, eager.grad, rtol=1e-4, atol=1e-5)


def test_not_a_number_spreads_through_the_pool():
    x = torch.zeros(2, 16, 4, 4, device=DEVICE).contiguous(memory_format=torch.channels_last)
    x[0, 3, 1, 1] = float("nan")
    stats = torch.zeros(16, device=DEVICE), torch.ones(16, device=DEVICE)
    y = norm_act(x, torch.zeros(16, device=DEVICE), *stats, pool=True, act="gelu", **OPTIONS | dict(training=False))
    assert y[0, 3, 0, 0].isnan() and int(y.isnan().sum()) == 1


def test_the_same_input_gives_the_same_bits():
    given = tensors((3, 24, 9, 9), True, True)
    first, second = (run(norm_act, torch.float16, *given, pool=True, act="gelu") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_programs_leave_their_counters_as_they_were():
    run(norm_act, torch.float16, *tensors((3, 24, 9, 9), True, True), pool=True, act="gelu")
    assert not module._counters(torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device("cpu")).any()


def test_the_first_call_may_not_be_captured(monkeypatch):
    monkeypatch.setattr(module, "capturing", lambda: True)
    module._counters.cache_clear()
    with pytest.raises(RuntimeError, match="call it once, then capture"):
        run(norm_act, torch.float16, *tensors((3, 24, 9, 9), True, True), pool=True, act="gelu")


@pytest.mark.parametrize("change, said", [
    (dict(x=lambda x: x.contiguous()), "channels_last"), 
    (dict(x=lambda x: x[:, :, :1].contiguous(memory_format=torch.channels_last)), "2×2 to pool"),
    (dict(bias=lambda t: t.half()), "of float32"), (dict(bias=lambda t: t[:-1]), r"\(24,\) of float32"),
    (dict(act=lambda _: "relu"), "one of gelu, silu"), (dict(residual=lambda t: t[:, :, :2]), "needs a residual"),
    (dict(residual=lambda t: t.half()), "needs a residual")], ids=lambda value: None)
def test_what_does_not_fit_is_said(change, said):
    x, residual, bias, _ = (t.to(DEVICE).float() for t in tensors((3, 24, 9, 9), True, True))
    arguments = dict(x=x.contiguous(memory_format=torch.channels_last), bias=bias, running_mean=torch.zeros_like(bias),
                     running_var=torch.ones_like(bias), residual=residual, act="gelu", pool=True)
    arguments |= {name: alter(arguments[name]) for name, alter in change.items()}
    with pytest.raises(ValueError, match=said):
        norm_act(**arguments, **OPTIONS)


def test_a_gradient_outside_of_training_is_refused():
    x = torch.randn(2, 16, 4, 4, device=DEVICE).contiguous(memory_format=torch.channels_last).requires_grad_()
    stats = torch.zeros(16, device=DEVICE), torch.ones(16, device=DEVICE)
    y = norm_act(x, torch.zeros(16, device=DEVICE), *stats, pool=False, act="gelu", **OPTIONS | dict(training=False))
    with pytest.raises(RuntimeError, match="in training only"):
        y.sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("shape, pool", [((2000, 64, 31, 31), True), ((2000, 256, 15, 15), True),
                                         ((2000, 256, 7, 7), False)])
def test_the_sizes_of_the_network(shape, pool):
    given = tensors(shape, pool, False)
    truth = run(norm_act_eager, torch.float32, *given, pool=pool, act="gelu")
    assert max(errors(run(norm_act, torch.float16, *given, pool=pool, act="gelu"), truth)) < 2e-3


PROGRAM = """
import json, re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels import augment, norm_act

KINDS = dict.fromkeys(("x", "pooled", "p", "dy", "y", "dx", "residual", "dresidual", "weight", "out", "slope"), "*fp16")
KINDS |= dict.fromkeys(("sums", "running_mean", "running_var", "mean", "scale", "totals"), "*fp32")
KINDS |= dict(counters="*i32", momentum="fp32", eps="fp32", images="*u8", table="*i32", which="*i8")

def build(kernel, bias="*fp32", num_warps=4, maxnreg=None, **constants):
    kinds = KINDS | dict(bias=bias)
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names)
               if signature[name][0] == "*" or name == "C"}
    source = ASTSource(kernel, signature, constants, aligned)
    options = dict(num_warps=num_warps, maxnreg=maxnreg)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    wide = re.findall(r"ld[.]global[.]\\S*v4|cp[.]async.*0x10", ptx)
    return dict(wide=len(wide), products="mma" in ptx, spilled=".local" in ptx)

def cut(name):
    return norm_act._grid(name, 100000, 64)[-1]

flags = dict(SILU=False, RESIDUAL=True)
layer = dict(CHANNELS=24, CUT=12, SILU=False, OUT=32, bias="*fp16")
found = {"augment": build(augment._augment_kernel, CUT=12, BLOCK=1024),
         "whiten": build(augment._whiten_kernel, **layer, **augment.WHITEN),
         "whiten bias": build(augment._whiten_bias_kernel, **layer, **augment.WHITEN_BIAS),
         "activate": build(norm_act._activate_kernel, TRAINING=True, POOL=False, **flags, **cut("activate")),
         "at once": build(norm_act._activate_kernel, TRAINING=False, POOL=True, **flags, **cut("activate")),
         "sums": build(norm_act._slope_sums_kernel, **flags, **cut("slope_sums"))}
for pool in (True, False):
    found[f"pool {pool}"] = build(norm_act._pool_kernel, POOL=pool, **cut("pool"))
    found[f"slopes {pool}"] = build(norm_act._slopes_kernel, POOL=pool, **flags, **cut("slopes"))
print(json.dumps(found))
"""


def test_the_kernels_compile_for_hopper():
    found = printed_by(PROGRAM)
    assert len(found) == 10 and not any(each["spilled"] for each in found.values())
    for name in ("activate", "at once", "sums", "pool True", "pool False", "slopes True", "slopes False"):
        assert found[name]["wide"] > 0, name  # 16 bytes a thread
    assert found["whiten"]["products"] and found["whiten bias"]["products"]
