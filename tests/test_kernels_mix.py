"""kernels/mix.py against float64, forward and backward. Without a GPU the kernels run in Triton's interpreter.

At the end: they compile for Hopper, with loads of 16 bytes and no spills.
"""

import pytest
import torch
from hopper import printed_by

from kernels import mix as module
from kernels.mix import DTYPES, Cut, mix_norm, mix_norm_eager

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXACT = {torch.bfloat16: 2**-7, torch.float32: 5e-6}  # the interpreter cuts bfloat16 off where a GPU rounds


def tensors(count, gated, dtype, tokens=37, width=20):
    """(streams, weights, gate or nothing) and the slopes of the loss by y and n."""
    generator = torch.Generator(DEVICE).manual_seed(count)
    *streams, dy, dn = torch.randn(count + 2, tokens, width, generator=generator, device=DEVICE).to(dtype)
    weights = torch.randn(count, generator=generator, device=DEVICE)
    gate = 2 * torch.rand(tokens, 1, generator=generator, device=DEVICE)
    return [*streams, weights] + [gate.to(dtype)] * gated, (dy, dn)


def run(function, inputs, slopes, dtype=None, wanted=None, **options):
    """[y, n, gradients of the inputs], None for those whose number is not in wanted. slopes: None of what has none."""
    inputs = [x.detach().to(dtype or x.dtype, copy=True) for x in inputs]
    asked = [x.requires_grad_() for i, x in enumerate(inputs) if wanted is None or i in wanted]
    count = next(i for i, x in enumerate(inputs) if x.ndim == 1)
    results = function(inputs[:count], inputs[count], *inputs[count + 1 :], **options)
    used = [(result, slope.to(result.dtype)) for result, slope in zip(results, slopes) if slope is not None]
    given = iter(torch.autograd.grad([result for result, _ in used], asked, [slope for _, slope in used]))
    return [*(x.detach() for x in results), *(next(given) if x.requires_grad else None for x in inputs)]


def errors(found, truth):
    return [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(found, truth)]


def check(inputs, slopes, dtype, **options):
    found, twin = (run(f, inputs, slopes, **options) for f in (mix_norm, mix_norm_eager))
    truth = run(mix_norm_eager, inputs, slopes, torch.float64, **options)
    count = next(i for i, x in enumerate(inputs) if x.ndim == 1)
    assert all(a.dtype == b.dtype and a.shape == b.shape for a, b in zip(found, twin))
    of_weights, twin_of_weights = (errors(each, truth)[2 + count] for each in (found, twin))
    assert of_weights < max(5e-6, 0.1 * twin_of_weights), (of_weights, twin_of_weights)
    assert max(errors(found, truth)) < EXACT[dtype], errors(found, truth)


@pytest.mark.parametrize("cut", [Cut(), Cut(64, programs=1, stages=2)], ids=str)
@pytest.mark.parametrize("width", [1, 20, 512])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_results_and_gradients(count, gated, dtype, width, cut, monkeypatch):
    monkeypatch.setattr(module, "CUTS", dict(forward=cut, backward=cut))
    inputs, slopes = tensors(count, gated, dtype, width=width)
    if width == 1:
        slopes = slopes[0], None  # y r is ±1, whose gradient is nothing but rounding
    check(inputs, slopes, dtype)


@pytest.mark.parametrize("tokens, width", [(1, 20), (3, 4096), (5, 1100)])
@pytest.mark.parametrize("slopes", [slice(0, 1), slice(1, 2), slice(0, 2)], ids=["y", "n", "both"])
def test_what_the_loss_does_not_use_and_other_sizes(slopes, tokens, width):
    inputs, given = tensors(4, True, torch.bfloat16, tokens, width)
    check(inputs, [slope if i in range(2)[slopes] else None for i, slope in enumerate(given)], torch.bfloat16)


def test_epsilon_is_that_of_rms_norm_without_one():
    inputs, slopes = tensors(3, True, torch.bfloat16)
    inputs = [x * 1e-4 if x.ndim == 2 and x.size(1) > 1 else x for x in inputs]  # y² is a hundredth of ε
    y, n = mix_norm(inputs[:3], *inputs[3:])
    like = torch.nn.functional.rms_norm(mix_norm_eager(inputs[:3], *inputs[3:])[0], (20,))
    assert errors([n], [like.double()])[0] < 2e-2 and n.float().square().mean() < 0.5  # else it were 1
    check(inputs, slopes, torch.bfloat16, eps=1e-9)


def test_only_wanted_gradients_and_the_same_bits():
    inputs, slopes = tensors(4, True, torch.float32)
    full = run(mix_norm, inputs, slopes)
    for wanted in ([0], [1, 3], [4], [5], [2, 5], range(6)):
        found = run(mix_norm, inputs, slopes, wanted=wanted)
        assert all((b is None) == (i not in wanted) and (b is None or torch.equal(a, b))
                   for i, (a, b) in enumerate(zip(full[2:], found[2:])))


def test_layouts_of_gate_and_slopes_and_a_stream_given_twice():
    (*streams, weights, gate), slopes = tensors(3, True, torch.float32)
    full = run(mix_norm, [*streams, weights, gate], slopes)
    found = run(mix_norm, [*streams, weights, gate[:, 0]], [slope.T.contiguous().T for slope in slopes])
    assert torch.equal(found[-1], full[-1][:, 0]) and all(torch.equal(a, b) for a, b in zip(full[:-1], found[:-1]))
    wide = gate.repeat(1, 3)[:, :1]
    assert all(torch.equal(a, b) for a, b in zip(mix_norm(streams, weights, wide), full))
    x = streams[0].requires_grad_()
    mix_norm([x, x], weights[:2])[0].sum().backward()
    torch.testing.assert_close(x.grad, weights[:2].sum().expand_as(x))


def test_no_token():
    inputs, slopes = tensors(2, True, torch.float32, tokens=0)
    *_, of_weights, of_gate = run(mix_norm, inputs, slopes)
    assert of_weights.tolist() == [0, 0] and of_gate.shape == (0, 1)


@pytest.mark.parametrize("slopes_of", ["y", "n", "yn"])
def test_torch_compile_keeps_it_whole(slopes_of):
    def work(streams, weights, gate=None):
        y, n = mix_norm([2 * streams[0], *streams[1:]], torch.cat([weights[:1], weights[1:]]),
                        gate if gate is None else 2 * torch.sigmoid(gate))
        return ("y" in slopes_of) * y.sin(), ("n" in slopes_of) * n

    compiled = torch.compile(work, fullgraph=True, backend="aot_eager")
    for count, gated, tokens in ((4, True, 37), (4, True, 21), (3, False, 21)):
        inputs, slopes = tensors(count, gated, torch.bfloat16, tokens)
        assert all(torch.equal(a, b) for a, b in zip(run(work, inputs, slopes), run(compiled, inputs, slopes)))


def test_the_operators_are_registered_as_they_behave():
    (*streams, weights, gate), slopes = tensors(3, True, torch.float32)
    given = [x.requires_grad_() for x in streams], weights.requires_grad_(), gate[:, 0].detach().requires_grad_(), 1e-6
    torch.library.opcheck(module._forward, given)
    given = [x.detach() for x in streams], weights.detach(), gate[:, 0], module._forward(*given)[2].detach()
    torch.library.opcheck(module._backward, (*slopes, *given, [True, False, True, True, True]))
    torch.library.opcheck(module._backward, (None, slopes[1], *given, [False, True, False, False, False]))


@pytest.mark.parametrize("change, said", [
    (dict(streams=lambda x: []), "1 to 4 streams.*got none"), (dict(streams=lambda x: x + x), "1 to 4 streams"),
    (dict(streams=lambda x: [x[0], x[1], x[2][1:]]), r"of one shape.*shape \(36, 20\)"),
    (dict(streams=lambda x: [each[0] for each in x]), r"got shape \(20,\)"),
    (dict(streams=lambda x: [each.repeat(1, 250) for each in x]), r"a width of 1 to 4096; got shape \(37, 5000\)"),
    (dict(streams=lambda x: [each.half() for each in x]), "torch.float16"),
    (dict(streams=lambda x: [x[0], x[1], x[2].bfloat16()]), "all of torch.float32; got .*torch.bfloat16"),
    (dict(streams=lambda x: [x[0], x[1], x[2].T.contiguous().T]), r"contiguous streams.*strides \(1, 37\)"),
    (dict(weights=lambda w: w[1:]), r"weights \(3,\) of torch.float32; got shape \(2,\)"),
    (dict(weights=lambda w: w.bfloat16()), "torch.bfloat16"), (dict(gate=lambda g: g[1:]), r"\(37,\) or \(37, 1\)"),
    (dict(gate=lambda g: g.bfloat16()), "of torch.float32; got .*torch.bfloat16")], ids=lambda value: None)
def test_what_does_not_fit_is_said(change, said):
    *streams, weights, gate = tensors(3, True, torch.float32)[0]
    arguments = dict(streams=streams, weights=weights, gate=gate)
    arguments |= {name: alter(arguments[name]) for name, alter in change.items()}
    with pytest.raises(ValueError, match=said):
        mix_norm(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [512, 768])
def test_real_sizes(width):
    inputs, slopes = tensors(4, True, torch.bfloat16, 65536, width)
    check(inputs, slopes, torch.bfloat16)
    first, second = (run(mix_norm, inputs, slopes) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


PROGRAM = """
import json, re, subprocess, tempfile, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels import mix

def build(name, width, gated):
    kernel = getattr(mix, f"_mix_{name}_kernel")
    constants = mix._plan(name, torch.empty(65536, width, device="meta"))[1] | dict(K=4, GATED=gated)
    constants |= dict(DY=True, DN=True, WANTED=31 + 32 * gated) if name == "backward" else {}
    options = dict(num_warps=constants.pop("num_warps"))
    kinds = dict.fromkeys(("weights", "scale", "sums"), "*fp32") | dict(T="i32", eps="fp32")
    signature = {name: "constexpr" if name in constants else kinds.get(name, "*bf16") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names)
               if signature[name][0] == "*" or name == "T"}
    ptx = triton.compile(ASTSource(kernel, signature, constants, aligned), target=GPUTarget("cuda", 90, 32),
                         options=options).asm["ptx"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        said = subprocess.run([triton.knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", file.name, "-o", "/dev/null"],
                              text=True, capture_output=True, check=True).stderr
    return [said, *(re.findall(rf"{access}[.]global\\S*[.](v\\d)[.]b32", ptx) for access in ("ld", "st"))]

print(json.dumps([[build(name, width, gated) for width in (512, 768) for gated in (False, True)]
                  for name in ("forward", "backward")]))
"""


def test_the_kernels_compile_for_hopper_with_wide_loads_and_without_spilling():
    for built, loads, stores in zip(printed_by(PROGRAM), (4, 6), (2, 4)):
        for said, loaded, stored in built:
            assert "0 bytes spill stores, 0 bytes spill loads" in said, said
            assert loaded == ["v4"] * loads and stored == ["v4"] * stores  # one of each tensor for a thread
