"""The probes against numpy's SVD."""

import numpy as np
import pytest
import torch
from matrices import DISTRIBUTIONS, make

from optim.geometry import (condition, directional_alignment, polar_error, polar_factor, scaled_gram, singular_values,
                            stable_rank)

SHAPES = [(32, 32), (24, 96), (96, 24), (1, 7), (7, 1), (1, 1)]


def with_spectrum(n, m, values, seed=0):
    """A float64 matrix of known singular values and its exact polar factor (over the values that are not 0)."""
    generator = torch.Generator().manual_seed(seed)
    rank = len(values)
    u, v = (torch.linalg.qr(torch.randn(k, rank, generator=generator, dtype=torch.float64))[0] for k in (n, m))
    return (u * torch.as_tensor(values)) @ v.T, u @ v.T


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_everything_equals_numpys_svd(shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    u, s, vt = np.linalg.svd(x.double().numpy(), full_matrices=False)
    assert np.allclose(polar_factor(x), u @ vt, atol=1e-11)
    assert np.allclose(singular_values(x), s, rtol=1e-11)
    assert np.isclose(stable_rank(x), (s**2).sum() / s[0] ** 2) and np.isclose(condition(x), s[0] / s[-1], rtol=1e-9)
    for probe in (polar_factor, singular_values, stable_rank, condition):
        assert probe(x).dtype == torch.float64


@pytest.mark.parametrize("shape", [(48, 48), (48, 160), (160, 48)])
@pytest.mark.parametrize("decades, factor_error, value_error", [(3, 1e-12, 1e-12), (6, 1e-9, 1e-7)])
def test_errors_are_as_documented_at_high_condition(shape, decades, factor_error, value_error):
    values = np.logspace(0, -decades, 48)
    x, exact = with_spectrum(*shape, values)
    assert polar_error(polar_factor(x), exact) < factor_error
    assert np.allclose(singular_values(x), np.linalg.svd(x.numpy(), compute_uv=False), rtol=value_error, atol=0)
    assert np.isclose(condition(x), 10.0**decades, rtol=value_error)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_on_the_distributions_of_the_other_tests(distribution):
    x = make(distribution, 64, 128)
    u, s, vt = np.linalg.svd(x.double().numpy(), full_matrices=False)
    assert np.linalg.norm(polar_factor(x).numpy() - u @ vt) < 1e-10 * np.linalg.norm(u @ vt)
    assert np.allclose(singular_values(x), s, rtol=1e-10)


@pytest.mark.parametrize("shape", [(40, 40), (40, 64), (64, 40)])
def test_rank_deficiency_leaves_the_partial_isometry(shape):
    x, exact = with_spectrum(*shape, np.logspace(0, -3, 9))
    assert polar_error(polar_factor(x), exact) < 1e-9
    values = singular_values(x)
    assert (values > 0).sum() == 9 and (values[9:] == 0).all() and condition(x) == torch.inf
    twice = x.clone()
    twice[1], twice[2] = twice[0], 0  # two equal rows, and one of zeros: still the same row space or less
    u, s, vt = np.linalg.svd(twice.numpy(), full_matrices=False)
    kept = s > 1e-7 * s[0]
    assert np.allclose(polar_factor(twice), u[:, kept] @ vt[kept], atol=1e-9)


def test_values_below_the_rank_threshold_are_zero():
    x, _ = with_spectrum(16, 32, [1.0, 1e-3, 3e-8])
    _, exact = with_spectrum(16, 32, [1.0, 1e-3, 0.0])
    assert (singular_values(x) > 0).sum() == 2
    assert torch.linalg.matrix_rank(polar_factor(x), atol=1e-3) == 2
    assert (singular_values(x * 1e-30) > 0).sum() == 2 and polar_factor(x * 1e30).isfinite().all()


def test_batches_equal_single_matrices_and_a_bad_one_stays_alone():
    x = torch.randn(2, 3, 12, 20, generator=torch.Generator().manual_seed(2))
    x[0, 1], x[1, 2, 3, 4] = 0, torch.nan
    factor, values = polar_factor(x), singular_values(x)
    assert factor.shape == x.shape and values.shape == (2, 3, 12)
    assert stable_rank(x).shape == condition(x).shape == polar_error(x, factor).shape == (2, 3)
    assert directional_alignment(x, factor).shape == (2, 3)
    for i in np.ndindex(2, 3):
        if i == (1, 2):
            assert factor[i].isnan().all() and values[i].isnan().all() and condition(x)[i].isnan()
        else:
            assert torch.allclose(factor[i], polar_factor(x[i]), atol=1e-12)
            assert torch.allclose(values[i], singular_values(x[i]), atol=1e-12)
    assert (factor[0, 1] == 0).all() and (values[0, 1] == 0).all() and stable_rank(x)[0, 1].isnan()
    x[0, 0, 0, 0] = torch.inf
    assert singular_values(x)[0, 0].isnan().all()


def test_polar_error_and_alignment_are_their_formulas():
    x, exact = with_spectrum(8, 16, np.linspace(1, 2, 8))
    o = exact.clone()
    assert polar_error(o, exact) == 0 and torch.isclose(directional_alignment(o, exact), torch.tensor(1.0).double())
    assert np.isclose(polar_error(1.25 * o, exact), 0.25) and np.isclose(directional_alignment(9 * o, exact), 1)
    assert polar_error(torch.zeros_like(o), exact) == 1 and np.isclose(directional_alignment(-o, exact), -1)
    # X itself: ⟨X, UVᵀ⟩ is the sum of its singular values
    values = singular_values(x)
    assert np.isclose(directional_alignment(x, exact), values.sum() / (values.norm() * 8**0.5))
    assert polar_error(o.half(), exact) < 1e-3 and polar_error(o.half(), exact).dtype == torch.float64


def test_stable_rank_and_condition_of_known_spectra():
    x, _ = with_spectrum(6, 9, [2.0, 1.0, 1.0, 1.0, 1.0, 0.5])
    assert np.isclose(stable_rank(x), 8.25 / 4) and np.isclose(condition(x), 4)
    assert np.isclose(stable_rank(torch.eye(5)), 5) and np.isclose(condition(torch.eye(5)), 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("normalize", ["aol", "frobenius"])
def test_the_scaled_gram_matrix_is_its_formula(shape, normalize):
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    wide = (x if shape[0] <= shape[1] else x.mT).numpy()
    gram = wide @ wide.transpose(0, 2, 1)
    if normalize == "aol":
        scale = 1 / np.sqrt(np.abs(gram).sum(-1))
        expected = scale[..., None] * gram * scale[..., None, :]
    else:
        expected = gram / np.trace(gram, axis1=-2, axis2=-1)[:, None, None]
    found = scaled_gram(x, normalize)
    assert found.dtype == torch.float64 and np.allclose(found, expected, atol=1e-14)
    assert np.linalg.eigvalsh(found).max() <= 1 + 1e-12, "neither lets σ exceed 1"
    for factor in (1e-30, 1e30):
        assert torch.allclose(scaled_gram((x * factor).float(), normalize), found, atol=1e-6)


def test_the_scaled_gram_matrix_of_zeros_is_zero_and_nan_stays():
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(5))
    x[1] = 0
    for normalize in ("aol", "frobenius"):
        found = scaled_gram(x, normalize)
        assert (found[1] == 0).all() and (found[:, 1] == 0).all() and found[0, 0] > 0
        assert (scaled_gram(torch.zeros(2, 3), normalize) == 0).all()
        assert scaled_gram(torch.full((2, 3), torch.nan), normalize).isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(256, 256), (3, 96, 768)])
def test_gpu_gives_the_same(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    assert polar_factor(x.cuda()).is_cuda
    assert torch.allclose(polar_factor(x.cuda()).cpu(), polar_factor(x), atol=1e-10)
    assert torch.allclose(singular_values(x.cuda()).cpu(), singular_values(x), rtol=1e-9)
