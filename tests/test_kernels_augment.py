"""kernels/augment.py: the eager twin against padding and cropping, the kernels against the twin and float64.

Without a GPU the kernels run in Triton's interpreter.
"""

import pytest
import torch
import torch.nn.functional as F

from kernels.augment import MEAN, STD, augment, augment_eager, whiten, whiten_eager

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = [  # image, flip, down, right, cut row, cut column
    [0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 20, 20], [2, 0, 2, -2, 5, 9], [1, 1, -4, 4, 0, 20], [3, 1, 31, -31, 20, 0],
]
HALVES = [torch.float16, torch.float32]


def images(count=4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=generator).to(DEVICE)


def table(rows=ROWS) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32, device=DEVICE)


def reference(pixels, rows, cut) -> torch.Tensor:
    """What a row asks for, step by step in float64: mirror, pad with reflection, crop, normalise, blank."""
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (MEAN, STD))
    results = []
    for image, flip, down, right, row, column in rows:
        x = pixels[image].cpu().permute(2, 0, 1).double() / 255
        padded = F.pad(x[None], (31,) * 4, mode="reflect")[0]
        x = padded[:, 31 + down : 63 + down, 31 + right : 63 + right]
        if flip:  # of the shifted image: x' = 31 − x, then to the right
            x = padded[:, 31 + down : 63 + down].flip(-1)[..., 31 - right : 63 - right]
        x = (x - mean) / std
        x[:, row : row + cut, column : column + cut] = 0
        results.append(x)
    return torch.stack(results)


@pytest.mark.parametrize("cut", [0, 12])
def test_the_twin_is_mirror_pad_crop_normalise_blank(cut):
    found = augment_eager(images(), table(), cut, torch.float32)
    torch.testing.assert_close(found.cpu().double(), reference(images(), ROWS, cut), rtol=1e-5, atol=1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("cut", [0, 12])
@pytest.mark.parametrize("dtype", HALVES)
def test_the_kernel_is_its_twin(cut, dtype):
    found, expected = augment(images(), table(), cut, dtype), augment_eager(images(), table(), cut, dtype)
    assert found.dtype == dtype and found.stride() == expected.stride() and found.shape == (5, 3, 32, 32)
    if DEVICE == "cpu":
        assert torch.equal(found, expected)
    else:  # a compiler may multiply and add in one
        torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def test_a_blanked_square_is_zero_and_nothing_else_is():
    found = augment(images(), table(), 12, torch.float32)
    assert (found[2, :, 5:17, 9:21] == 0).all() and int((found[2] == 0).all(0).sum()) == 144


def filters(channels=24, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(channels, 3, 2, 2, generator=generator) * 0.4
    return weight.to(DEVICE, dtype), torch.randn(channels, generator=generator).to(DEVICE, dtype)


def run(function, dtype, cut, act, channels=24):
    """Result and gradient of the bias, for a fixed slope of the loss by the result."""
    weight, bias = (t.to(dtype) for t in filters(channels, torch.float16))  # the same numbers in every dtype
    bias.requires_grad_()
    y = function(images(), table(), cut, weight, bias, act)
    slope = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE).half()
    y.backward(slope.to(dtype))
    return y.detach(), bias.grad


@pytest.mark.parametrize("act", ["gelu", "silu"])
@pytest.mark.parametrize("cut, channels", [(0, 24), (12, 24), (0, 10)])
def test_whitening_is_no_worse_than_its_twin(act, cut, channels):
    """Against float64 of the half-precision images, which both round to first."""
    def exact(pixels, rows, cut, weight, bias, act):
        x = augment_eager(pixels, rows, cut, torch.float16).double()
        return {"gelu": F.gelu, "silu": F.silu}[act](F.conv2d(x, weight.double(), bias.double()))

    (y, gradient), (twin, twin_gradient) = (run(f, torch.float16, cut, act, channels) for f in (whiten, whiten_eager))
    truth, truth_gradient = run(exact, torch.float64, cut, act, channels)
    assert y.shape == truth.shape == (5, channels, 31, 31) and y.is_contiguous(memory_format=torch.channels_last)
    assert y.dtype == torch.float16 and gradient.dtype == torch.float16
    assert (y.double() - truth).abs().max() <= 1.1 * (twin.double() - truth).abs().max() + 1e-4
    wrong, twin_wrong = ((g.double() - truth_gradient).abs().max() for g in (gradient, twin_gradient))
    assert wrong <= 1.1 * twin_wrong + 2 * torch.finfo(torch.float16).eps * truth_gradient.abs().max()


@pytest.mark.parametrize("act", ["gelu", "silu"])
def test_whitening_in_float32(act):
    (y, gradient), (twin, twin_gradient) = (run(f, torch.float32, 12, act) for f in (whiten, whiten_eager))
    torch.testing.assert_close(y, twin, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, twin_gradient, rtol=1e-5, atol=1e-5 * twin_gradient.abs().max().item())


def test_a_frozen_bias_needs_no_gradient():
    weight, bias = filters()
    assert not whiten(images(), table(), 0, weight, bias, "gelu").requires_grad


@pytest.mark.parametrize("change, said", [
    (dict(images=lambda t: t.float()), "of uint8"), (dict(images=lambda t: t[:, :16]), "contiguous images"),
    (dict(table=lambda t: t.long()), "table .batch, 6. of int32"), (dict(table=lambda t: t[:, :4]), "contiguous table"),
    (dict(weight=lambda t: t[:, :, :1]), "frozen filters"),
    (dict(weight=lambda t: t.requires_grad_()), "with gradient"), (dict(bias=lambda t: t[:-1]), "as many biases"),
    (dict(act=lambda t: "relu"), "one of gelu, silu")],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None)
def test_what_does_not_fit_is_said(change, said):
    weight, bias = filters()
    arguments = dict(images=images(), table=table(), cut=0, weight=weight, bias=bias, act="gelu")
    arguments |= {name: alter(arguments[name]) for name, alter in change.items()}
    with pytest.raises(ValueError, match=said):
        whiten(*arguments.values())


@pytest.mark.gpu
def test_a_whole_data_set():
    pixels = torch.randint(0, 256, (50000, 32, 32, 3), dtype=torch.uint8, device="cuda")
    rows = torch.randint(0, 5, (2000, 6), dtype=torch.int32, device="cuda")
    rows[:, 0] = torch.randint(48000, 50000, (2000,))  # offsets near the end
    rows[:, 1] %= 2
    assert torch.equal(augment(pixels, rows, 12, torch.float16), augment_eager(pixels, rows, 12, torch.float16))
