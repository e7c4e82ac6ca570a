"""kernels/fp8.py against its twin, which torch's own cast rounds."""

import pytest
import torch

from kernels.fp8 import E4M3, quantised, quantised_eager

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


SHAPES = [((65, 130), 1.0), ((3, 300), 1e-4), ((200, 7), 3e5), ((128, 256), 1.0), ((64, 320), 1.0), ((320, 64), 1.0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape, size", SHAPES, ids=str)
def test_values_transpose_and_scale(shape, size, dtype):
    x = (size * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(DEVICE, dtype)
    q, transposed, scale = quantised(x)
    expected, _, expected_scale = quantised_eager(x)
    assert q.dtype == transposed.dtype == E4M3 and scale.dtype == torch.float32 and scale.shape == ()
    assert torch.equal(q.float().T, transposed.float()) and torch.equal(scale, expected_scale)
    assert q.float().abs().max() == 448
    wrong = (q.double() * scale.double() - x.double()).abs()
    assert (wrong <= 2.0**-4 * 1.001 * x.double().abs() + 2.0**-9 * scale).all()  # 4 significant bits
    normal = expected.float().abs() >= 2.0**-6
    assert torch.equal(q.float()[normal], expected.float()[normal])  # below, the interpreter cuts


def test_zeros_and_what_is_not_finite():
    for function in (quantised, quantised_eager):
        q, transposed, scale = function(torch.zeros(16, 32, device=DEVICE, dtype=torch.bfloat16))
        assert scale == 1 and not q.float().any() and not transposed.float().any()
        for wrong in (float("nan"), float("inf")):
            x = torch.ones(16, 32, device=DEVICE, dtype=torch.bfloat16)
            x[3, 4] = wrong
            q, _, scale = function(x)
            assert not (q.float() * scale).isfinite().any()


def test_what_is_not_contiguous_is_refused():
    with pytest.raises(ValueError, match=r"got shape \(32, 16\) and strides \(1, 32\)"):
        quantised(torch.zeros(16, 32, device=DEVICE).T)
