"""kernels/relu_squared.py against float64. Without a GPU the kernel runs in Triton's interpreter.

At the end: it compiles for Hopper, with its products in wgmma and its tiles moved by the copy engine.
"""

import pytest
import torch
from hopper import assert_products_are_hopper_s, printed_by

from kernels import relu_squared as module
from kernels.relu_squared import CUTS, DTYPES, Cut, relu_squared_mlp, relu_squared_mlp_eager

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = dict(forward=Cut(16, 256, 16), backward=Cut(32, 128, 16, flatten=False))
# (tokens, width, hidden): full tiles, none full, fewer tokens than a tile, tall, a wide MLP.
SHAPES = [(32, 32, 256), (37, 24, 264), (5, 8, 8), (300, 16, 64), (20, 40, 520)]


def tensors(tokens, width, hidden, dtype):
    """x, up, down as float32 parameters, and the slope of the result."""
    generator = torch.Generator().manual_seed(tokens + width)
    x, up, down, g = (torch.randn(shape, generator=generator).to(DEVICE)
                      for shape in ((tokens, width), (hidden, width), (width, hidden), (tokens, width)))
    return x.to(dtype), up / width**0.5, down / hidden**0.5, g.to(dtype)


def gradients(function, x, up, down, g, dtype=None):
    """[out, dx, dU, dV]. dtype: of everything, after x's rounding of the weights."""
    if dtype is not None:
        x, up, down, g = x.to(dtype), up.to(x.dtype).to(dtype), down.to(x.dtype).to(dtype), g.to(dtype)
    given = [t.clone().requires_grad_() for t in (x, up, down)]
    out = function(*given)
    return [out.detach(), *torch.autograd.grad(out, given, g)]


def errors(found, truth):
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, truth)]


@pytest.fixture
def small(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(module, "CUTS", SMALL)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_result_and_gradients(shape, dtype, small):
    """As exact as torch, which rounds x Uᵀ and g V before it goes on; the interpreter cuts off instead of rounding."""
    given = tensors(*shape, dtype)
    truth = gradients(relu_squared_mlp_eager, *given, dtype=torch.float64)
    ours, theirs = (errors(gradients(f, *given), truth) for f in (relu_squared_mlp, relu_squared_mlp_eager))
    assert all(a < 1.1 * b + (2 if DEVICE == "cpu" else 0.25) * torch.finfo(dtype).eps for a, b in zip(ours, theirs))
    assert max(ours) < 1.5 * torch.finfo(dtype).eps


def test_weights_get_gradients_of_their_own_dtype(small):
    x, up, down, g = tensors(37, 24, 264, torch.bfloat16)
    assert [t.dtype for t in gradients(relu_squared_mlp, x, up, down, g)] == [x.dtype, x.dtype, up.dtype, down.dtype]


def test_slopes_of_what_is_off_and_of_what_is_not_finite(small):
    """Where relu is 0 nothing comes back; what is NaN or infinite stays so, in its row."""
    x, up, down, g = tensors(37, 24, 264, torch.float16)
    up[:100] = 0
    assert (gradients(relu_squared_mlp, x, up, down, g)[2][:100] == 0).all()
    x[3, 0], x[5, 0] = float("nan"), float("inf")
    out = relu_squared_mlp(x, up, down)
    assert [i for i in range(37) if not out[i].isfinite().all()] == [3, 5]


def test_strides_and_places_that_the_copy_engine_cannot_take(small):
    x, up, down, g = tensors(40, 24, 264, torch.bfloat16)
    truth = gradients(relu_squared_mlp, x, up, down, g)
    apart = [torch.empty(t.numel() + 1, dtype=t.dtype, device=DEVICE)[1:].view(t.shape).copy_(t)
             for t in (x, up, down, g)]
    across = [t.T.contiguous().T for t in (x, up, down, g)]
    for given in (apart, across):  # what cuBLAS makes of them may differ in its last bits
        assert max(errors(gradients(relu_squared_mlp, *given), truth)) < 2e-3


@pytest.mark.parametrize("change, said", [
    (lambda x, u, d: (x.float(), u, d), "bfloat16 or float16, up .* of torch.float32"),
    (lambda x, u, d: (x[None], u, d), r"got \(1, 8, 16\)"),
    (lambda x, u, d: (x, u[:, :8], d), r"\(64, 8\), \(16, 64\)"),
    (lambda x, u, d: (x, u, d.T), r"\(64, 16\), \(64, 16\)"),
    (lambda x, u, d: (x[:, :12], u[:, :12], d[:12]), "multiples of 8, .* got 12 and 64"),
    (lambda x, u, d: (x, u[:60], d[:, :60]), "multiples of 8, .* got 16 and 60")], ids=lambda value: None)
def test_what_does_not_fit_is_said(change, said):
    with pytest.raises(ValueError, match=said):
        relu_squared_mlp(*change(*tensors(8, 16, 64, torch.bfloat16)[:3]))


def test_compiling_changes_nothing(small):
    """torch.compile with one graph."""
    x, up, down, g = tensors(37, 24, 264, torch.bfloat16)

    def function(x, up, down):
        return 2 * relu_squared_mlp(2 * x, up, down)

    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for a, b in zip(gradients(compiled, x, up, down, g), gradients(function, x, up, down, g)):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens, width", [(65536, 512), (65536, 768), (65511, 512)])
def test_real_sizes(tokens, width):
    given = tensors(tokens, width, 4 * width, torch.bfloat16)
    truth = gradients(relu_squared_mlp_eager, *given, dtype=torch.float64)
    ours, theirs = (errors(gradients(f, *given), truth) for f in (relu_squared_mlp, relu_squared_mlp_eager))
    assert all(a < 1.1 * b for a, b in zip(ours, theirs))


@pytest.mark.gpu
def test_more_than_two_to_the_31_numbers():
    """4.3 GB of y: rows beyond are as right as those before."""
    tokens, width, hidden = 2**20 + 40, 64, 2048
    x, up, down, _ = tensors(tokens, width, hidden, torch.bfloat16)
    x[-40:] = x[:40]
    out = relu_squared_mlp(x, up, down)
    assert tokens * hidden > 2**31 and torch.equal(out[-40:], out[:40])


PROGRAM = """
import json
from tests.hopper import built
from kernels import relu_squared
from kernels.relu_squared import _relu_squared_kernel as kernel

def build(name, cut):
    backward, piece = name == "backward", min(cut.columns, 128)
    constants = dict(BACKWARD=backward, ROWS=cut.rows, COLUMNS=cut.columns, PIECE=piece, DEPTH=cut.depth,
                     FLATTEN=cut.flatten)
    b = [cut.depth, cut.columns] if backward else [cut.columns, cut.depth]
    kinds = {name: f"tensordesc<bf16{box}>" for name, box in
             dict(a=[cut.rows, cut.depth], b=b, y=[cut.rows, piece], out=[cut.rows, piece]).items()}
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in kernel.arg_names}
    return built(kernel, signature, constants, num_warps=cut.warps, num_stages=cut.stages)

print(json.dumps([build(name, cut) for name, cut in relu_squared.CUTS.items()]))
"""


def test_the_kernel_compiles_for_hopper():
    found = printed_by(PROGRAM)
    assert len(found) == len(CUTS)
    for each in found:
        assert_products_are_hopper_s(each)
