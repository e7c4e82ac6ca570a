"""kernels/conv_pool.py against float64, forward and backward. Without a GPU the kernels run in Triton's interpreter.

At the end: they compile for Hopper, as the CIFAR network needs them, with tensor cores, wide loads and no spills.
"""

import pytest
import torch
from hopper import printed_by

from kernels import bench_conv_pool
from kernels import conv_pool as module
from kernels.conv_pool import Cut, conv_pool, conv_pool_eager

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# (batch, C, h, w, O): odd and even sides, one image, one window, a last tile that is not full, tiles across images.
SHAPES = [(2, 24, 7, 6, 64), (1, 8, 4, 7, 32), (3, 32, 6, 5, 96), (1, 16, 2, 2, 32), (1, 8, 3, 35, 128)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch, request):
    if "gpu" not in request.keywords:
        use(monkeypatch, True, 32)


def use(monkeypatch, resident, width):
    """Tiles of 16 places, several of them to a program."""
    cuts = dict(forward=Cut(16, programs=4, resident=resident), weight_sums=Cut(16, programs=8, width=width))
    monkeypatch.setattr(module, "CUTS", cuts)
    monkeypatch.setattr(module, "EXACT", cuts)


def tensors(batch, channels, height, width, out):
    """x, weight and the slope of the loss by the result, in float16's numbers as float64."""
    generator = torch.Generator().manual_seed(batch + channels + out)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).half().double().to(DEVICE)

    weight = (normal(out, channels, 3, 3) / 16).half().double()
    return normal(batch, channels, height, width), weight, normal(batch, out, height // 2, width // 2)


def run(function, dtype, x, weight, slope):
    """(result, gradients of x and weight, which of the four it was: None of the twin)"""
    x, weight, slope = (t.to(dtype, copy=True, memory_format=torch.channels_last) for t in (x, weight, slope))
    y = function(x.requires_grad_(), weight.requires_grad_())
    which = y.grad_fn.saved_tensors[2] if function is conv_pool else None
    return y.detach(), *torch.autograd.grad(y, (x, weight), slope), which


def error(found, truth):
    return ((found.double() - truth).abs().max() / truth.abs().max()).item()


def gradients_by(which, x, weight, slope):
    """(of x, of the weight) in float64, each pooled place's gradient sent to the one of four that `which` says."""
    dy = torch.zeros(len(x), len(weight), *x.shape[2:], dtype=torch.float64, device=DEVICE)
    height, width = slope.shape[2:]
    for tap in range(4):
        dy[:, :, tap // 2 : 2 * height : 2, tap % 2 : 2 * width : 2] = slope * (which == tap)
    return (torch.nn.grad.conv2d_input(x.shape, weight, dy, padding=1),
            torch.nn.grad.conv2d_weight(x, weight.shape, dy, padding=1))


@pytest.mark.parametrize("resident, width", [(True, 32), (False, 64)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_result_and_gradients(shape, resident, width, monkeypatch):
    use(monkeypatch, resident, width)
    given = tensors(*shape)
    truth = run(conv_pool_eager, torch.float64, *given)
    exact = run(conv_pool, torch.float32, *given)
    assert max(error(a, b) for a, b in zip(exact[:3], truth[:3])) < 2e-6
    y, dx, dw, which = run(conv_pool, torch.float16, *given)
    assert y.dtype == dx.dtype == dw.dtype == torch.float16
    assert y.is_contiguous(memory_format=torch.channels_last) and y.shape == truth[0].shape
    assert error(y, truth[0]) <= 1.1 * error(run(conv_pool_eager, torch.float16, *given)[0], truth[0]) + 1e-5
    true_dx, true_dw = gradients_by(which, *given)
    assert error(dw, true_dw) < 6e-4 and error(dx, true_dx) < 3e-3  # the latter is torch's own


def test_bfloat16(monkeypatch):
    use(monkeypatch, False, 128)
    given = tensors(2, 24, 5, 6, 32)
    truth = run(conv_pool_eager, torch.float64, *given)
    found = run(conv_pool, torch.bfloat16, *given)
    assert error(found[0], truth[0]) < 1e-2 and error(found[2], gradients_by(found[3], *given)[1]) < 1e-2


def passing(x, out):
    """A weight whose channel o is x's channel o % C: the convolution is exact, so that equals stay equal."""
    weight = torch.zeros(out, x.size(1), 3, 3, device=DEVICE)
    weight[torch.arange(out), torch.arange(out) % x.size(1), 1, 1] = 1
    return weight


def test_of_equal_values_the_first_gets_the_gradient():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(3, (2, 8, 7, 6), generator=generator).float().to(DEVICE)
    slope = torch.randint(-4, 5, (2, 32, 3, 3), generator=generator).float().to(DEVICE)
    weight = passing(x, 32)
    found, twin = (run(f, torch.float16, x, weight, slope) for f in (conv_pool, conv_pool_eager))
    assert all(torch.equal(a, b) for a, b in zip(found[:3], twin[:3]))
    windows = x[:, :, :6].unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
    first = (windows == windows.amax(4, keepdim=True)).int().argmax(4).repeat(1, 4, 1, 1)
    assert torch.equal(found[3].long(), first)


def test_what_float16_makes_equal_is_equal():
    """torch pools what the convolution has rounded: 2049 becomes 2048, and of two of them the first is the maximum."""
    x = torch.zeros(2, 8, 2, 2, device=DEVICE)
    x[0, 0] = torch.tensor([[0.0, 2048.0], [2048.0, 2047.0]])
    x[1, 0] = torch.tensor([[0.0, 2050.0], [2052.0, 2047.0]])  # 2051 becomes 2052
    x[0, 1, 1, 0] = x[1, 1, 0, 1] = 1
    weight, slope = passing(x, 32), torch.ones(2, 32, 1, 1, device=DEVICE)
    weight[0, 1, 1, 1] = 1
    y, _, _, which = run(conv_pool, torch.float16, x, weight, slope)
    assert y[:, 0, 0, 0].tolist() == [2048, 2052] and which[:, 0, 0, 0].tolist() == [1, 1]
    *_, which = run(conv_pool, torch.float32, x, weight, slope)
    assert which[:, 0, 0, 0].tolist() == [2, 2]


def test_not_a_number_spreads():
    x, weight, _ = tensors(2, 8, 7, 6, 32)
    for place in ((0, 3, 2, 3), (1, 0, 6, 5)):
        x[place] = float("nan")
    x, weight = (t.half().contiguous(memory_format=torch.channels_last) for t in (x, weight))
    found = conv_pool(x, weight).isnan()
    assert torch.equal(found, conv_pool_eager(x, weight).isnan()) and 0 < int(found.sum()) < found.numel()


def test_the_same_input_gives_the_same_bits():
    given = tensors(2, 24, 9, 8, 32)
    first, second = (run(conv_pool, torch.float16, *given) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_only_wanted_gradients_are_computed(monkeypatch):
    x, weight, slope = (t.float().contiguous(memory_format=torch.channels_last) for t in tensors(1, 8, 4, 4, 32))
    monkeypatch.setattr(module, "_input_gradient", None)
    conv_pool(x, weight.requires_grad_()).backward(slope)
    assert weight.grad.shape == weight.shape
    monkeypatch.undo()
    monkeypatch.setattr(module, "_weight_gradient", None)
    conv_pool(x.requires_grad_(), weight.detach()).backward(slope)
    assert x.grad.shape == x.shape


def test_strides_of_weight_and_slope_do_not_matter():
    x, weight, slope = (t.float() for t in tensors(2, 8, 5, 6, 32))
    x = x.contiguous(memory_format=torch.channels_last)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        w = weight.contiguous(memory_format=layout).requires_grad_()
        y = conv_pool(x, w)
        results.append((y.detach(), *torch.autograd.grad(y, w, slope.contiguous(memory_format=layout))))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("change, said", [
    (dict(x=lambda x: x.contiguous()), "channels_last, got strides"), (dict(x=lambda x: x[0]), "channels_last, got"),
    (dict(x=lambda x: x[:, :, :1].contiguous(memory_format=torch.channels_last)), r"2×2 pixels to pool.*\(2, 24, 1,"),
    (dict(x=lambda x: x[:0]), r"got shape \(0, 24"), (dict(x=lambda x: x.double()), "float64 and torch.float32"),
    (dict(x=lambda x: x[:, :12].contiguous(memory_format=torch.channels_last)), "8, 16, 24 or 32 channels.*got 12 "),
    (dict(x=lambda x: x.repeat(1, 2, 1, 1).contiguous(memory_format=torch.channels_last)), "got 48 channels"),
    (dict(weight=lambda w: w.half()), "float32 and torch.float16"), (dict(weight=lambda w: w[:, :8]), r"\(64, 8, 3, 3"),
    (dict(weight=lambda w: w[:24]), r"O a multiple of 32; got 24 channels and \(24,"), (dict(weight=lambda w: w[..., :2]), "3, 2"),
    (dict(weight=lambda w: w[:0]), r"channels and \(0, 24")], ids=lambda value: None)
def test_what_does_not_fit_is_said(change, said):
    x, weight, _ = (t.float().contiguous(memory_format=torch.channels_last) for t in tensors(2, 24, 6, 6, 64))
    arguments = dict(x=x, weight=weight)
    arguments |= {name: alter(arguments[name]) for name, alter in change.items()}
    with pytest.raises(ValueError, match=said):
        conv_pool(**arguments)


def test_what_fits_is_taken():
    for channels in (0, 8, 12, 32, 40):
        for out in (0, 16, 32, 48, 96):
            x, weight = torch.zeros(1, channels, 2, 2, device=DEVICE), torch.zeros(out, channels, 3, 3, device=DEVICE)
            x = x.contiguous(memory_format=torch.channels_last)
            if module.fits(channels, out):
                assert conv_pool(x, weight).shape == (1, out, 1, 1)
            else:
                with pytest.raises(ValueError, match=f"got {channels} channels and"):
                    conv_pool(x, weight)


def test_the_bench_counts_the_products_that_are_needed():
    """Those of the convolution at the places that are pooled; rates follow from them."""
    assert bench_conv_pool.flops(1, 64) == 2 * 64 * 24 * 9 * 30 * 30
    printed = bench_conv_pool.row("ours", 200.0, 50 * 10**9, 180 * 10**6)
    assert "200.0 µs" in printed and " 250 TFLOP/s" in printed and " 900 GB/s" in printed


@pytest.mark.gpu
@pytest.mark.parametrize("batch, out", [(2000, 64), (1000, 128)])
def test_the_size_of_the_network(batch, out):
    given = tensors(batch, 24, 31, 31, out)
    y, dx, dw, which = run(conv_pool, torch.float16, *given)
    twin = run(conv_pool_eager, torch.float16, *given)[0]
    truth = torch.cat([conv_pool_eager(images, given[1]) for images in given[0].split(250)])
    assert error(y, truth) <= 1.1 * error(twin, truth) + 1e-5
    sums = 0
    for i in range(0, batch, 250):
        dy, part = gradients_by(which[i : i + 250], given[0][i : i + 250], given[1], given[2][i : i + 250])
        assert error(dx[i : i + 250], dy) < 1e-3
        sums = sums + part
    assert error(dw, sums) < 1e-3
    again = run(conv_pool, torch.float16, *given)
    assert torch.equal(y, again[0]) and torch.equal(dw, again[2]) and torch.equal(which, again[3])


PROGRAM = """
import json, re, subprocess, tempfile, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels import conv_pool

def build(kernel, num_warps=4, **constants):
    kinds = dict.fromkeys(("x", "weight", "pooled", "dp", "dw"), "*fp16") | dict(which="*i8", sums="*fp32")
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names)
               if signature[name][0] == "*" or name == "O"}
    compiled = triton.compile(ASTSource(kernel, signature, constants, aligned), target=GPUTarget("cuda", 90, 32),
                              options=dict(num_warps=num_warps))
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        said = subprocess.run([triton.knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", file.name, "-o", "/dev/null"],
                              text=True, capture_output=True, check=True).stderr
    sizes = [int(size, 16) for size in re.findall(r"cp[.]async[.]c[ag][.]\\S+ .*, (0x[0-9a-f]+),", ptx)]
    return dict(shared=compiled.metadata.shared, wgmma=ptx.count("wgmma.mma_async"), sizes=sizes, said=said,
                narrow=len(re.findall(r"ld[.]global(?!\\S*v4)", ptx)))

def grid(name, channels):
    return conv_pool._grid(name, torch.float16, 450000, channels, 64)[-1]

print(json.dumps([build(conv_pool._conv_pool_kernel, **grid("forward", 24)),
                  build(conv_pool._conv_pool_kernel, **grid("forward", 32)),  # whose filters do not stay
                  build(conv_pool._weight_sums_kernel, **grid("weight_sums", 24))]))
"""


def test_the_kernels_compile_for_hopper_without_spilling():
    for found in printed_by(PROGRAM):
        assert "0 bytes spill stores, 0 bytes spill loads" in found["said"], found["said"]
        assert found["shared"] <= 232448 and found["wgmma"] > 0
        # 16 bytes a thread; of 32 places' `which` there are but 8 for each of 256
        assert 16 in found["sizes"] and set(found["sizes"]) <= {8, 16} and not found["narrow"]
