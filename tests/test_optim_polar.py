"""The polar iterations against float64, and their coefficients against the published ones."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from matrices import DISTRIBUTIONS, make, polar_factor, relative_error

from optim import POLARS, Polar, get_polar, polynomials

FLOAT32 = {name: replace(polar, dtype=torch.float32) for name, polar in POLARS.items()}


def reference(x, polar):
    """What a Polar computes, in float64 and in the words of the papers."""
    x = x.double()
    if polar.normalize == "aol":
        x = torch.diag((x @ x.T).abs().sum(1).rsqrt()) @ x
    else:
        x = x / x.norm()
    if polar.bound:
        gram = x @ x.T
        x = x / min(1, (gram @ gram).norm() ** 0.25)
    for a, b, c in polar.coefficients:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize("form", ["newton-schulz", "gram", "auto"])
@pytest.mark.parametrize("name", POLARS)
@pytest.mark.parametrize("shape", [(48, 48), (32, 96), (96, 32), (7, 50), (1, 9), (9, 1)])
def test_equals_the_formula_in_float64(name, shape, form):
    wide = make("gaussian", min(shape), max(shape))
    polar = replace(POLARS[name], dtype=torch.float64, form=form)
    expected = reference(wide, polar)
    x, expected = (wide, expected) if shape[0] <= shape[1] else (wide.T, expected.T)
    assert relative_error(polar(x.double()), expected) < 1e-9
    assert relative_error(replace(polar, dtype=torch.float32)(x), expected) < 1e-4


@pytest.mark.parametrize("name", POLARS)
def test_singular_values_end_where_the_polynomials_send_them(name):
    x = make("condition-1e3", 64, 128)
    polar = replace(POLARS[name], dtype=torch.float64)
    start = torch.linalg.svdvals(x.double() / x.double().norm())
    if polar.normalize == "frobenius" and not polar.bound:
        expected = polynomials.evaluate(polar.coefficients, start).sort().values
        assert torch.allclose(torch.linalg.svdvals(polar(x.double())).sort().values, expected, atol=1e-9)
    assert torch.linalg.svdvals(polar(x.double())).max() < 1.25


@pytest.mark.parametrize("normalize", ["frobenius", "aol"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_bound_is_one_and_tighter_than_the_scaling_before_it(distribution, normalize):
    keep = Polar(((1.0, 0.0, 0.0),), normalize=normalize, dtype=torch.float64)  # p(x) = x shows what is iterated on
    x = make(distribution, 64, 128)
    loose, tight = (torch.linalg.matrix_norm(replace(keep, bound=b)(x), 2).item() for b in (False, True))
    assert loose <= tight + 1e-9 and tight <= 1 + 1e-9


def in_half_and_single(name, x, **changes):
    """Polar errors of the float16 Gram form and of the float32 Newton-Schulz form."""
    exact = polar_factor(x)
    half = replace(POLARS[name], dtype=torch.float16, form="gram", **changes)(x)
    assert half.dtype == torch.float16
    single = replace(POLARS[name], dtype=torch.float32, form="newton-schulz")(x)
    return relative_error(half, exact), relative_error(single, exact)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("shape", [(256, 256), (256, 1024), (768, 3072)])
def test_published_four_steps_hold_in_float16_gram_form_without_restart(distribution, shape):
    polar = POLARS["turbo-published"]
    assert len(polar.coefficients) == 4 and polar.normalize == "aol" and polar.restart is None
    half, single = in_half_and_single("turbo-published", make(distribution, *shape))
    assert half <= 1.02 * single


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("shape", [(256, 1024), (768, 768), (768, 3072)])
def test_fitted_four_steps_in_float16_are_nowhere_worse_than_the_published_in_float32(distribution, shape):
    assert POLARS["turbo"].coefficients == polynomials.FITTED[4] and POLARS["turbo"].restart is None
    x = make(distribution, *shape)
    half, _ = in_half_and_single("turbo", x)
    _, published = in_half_and_single("turbo-published", x)
    assert half <= (0.9 if distribution in ("condition-1e3", "low-rank") else 1.01) * published


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_fitted_five_steps_with_one_restart_beat_the_four_in_float16(distribution):
    x = make(distribution, 256, 1024)
    five, _ = in_half_and_single("turbo-5", x)
    four, _ = in_half_and_single("turbo", x)
    assert five <= (0.5 if distribution in ("condition-1e3", "low-rank") else 1.03) * four


def test_fitted_five_steps_need_that_restart():
    half, single = in_half_and_single("turbo-5", make("low-rank", 256, 1024), restart=None)
    assert not half <= 5 * single


@pytest.mark.parametrize("distribution", ["condition-1e3", "low-rank", "row-scaled"])
def test_fitted_five_steps_beat_muons_five_where_small_singular_values_matter(distribution):
    x = make(distribution, 256, 1024)
    exact = polar_factor(x)
    turbo, muon = (relative_error(FLOAT32[name](x), exact) for name in ("turbo-5", "muon"))
    assert turbo < 0.7 * muon


def test_bfloat16_gram_form_needs_the_restart():
    x = make("condition-1e3", 256, 1024)
    exact = polar_factor(x)
    single = relative_error(FLOAT32["turbo-published"](x), exact)
    gram = replace(POLARS["turbo-published"], dtype=torch.bfloat16, form="gram")
    assert relative_error(replace(gram, restart=2)(x), exact) <= 1.02 * single
    assert relative_error(gram(x), exact) > 1.02 * single


@pytest.mark.parametrize("name", POLARS)
def test_batches_views_and_tall_matrices_give_the_same_as_single_wide_ones(name):
    polar = FLOAT32[name]
    x = torch.stack([make("gaussian", 24, 40, seed) for seed in range(6)])
    one_by_one = torch.stack([polar(matrix) for matrix in x])
    assert torch.allclose(polar(x), one_by_one, atol=1e-5)
    assert torch.allclose(polar(x.view(2, 3, 24, 40)).view_as(x), one_by_one, atol=1e-5)
    assert torch.allclose(polar(x.mT), one_by_one.mT, atol=1e-5)
    wide = torch.zeros(6, 48, 80)
    strided = wide[:, ::2, 1::2]
    strided.copy_(x)
    assert not strided.is_contiguous() and torch.allclose(polar(strided), one_by_one, atol=1e-5)
    assert torch.equal(strided, x), "the input must not be overwritten"


@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("name", POLARS)
def test_scale_of_the_input_does_not_matter(name, dtype, rounding):
    x = make("gaussian", 32, 64)
    polar = replace(POLARS[name], dtype=dtype)
    exact = polar(x)
    for scale in (2.0**-100, 2.0**100):
        assert torch.equal(polar(x * scale), exact)
    for scale in (1e-30, 1e30):
        assert relative_error(polar(x * scale), exact) < rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", POLARS)
def test_zero_stays_zero_and_nan_stays_visible(name, dtype):
    polar = replace(POLARS[name], dtype=dtype)
    assert torch.equal(polar(torch.zeros(8, 16)), torch.zeros(8, 16, dtype=dtype))
    x = torch.stack([make("gaussian", 8, 16, seed) for seed in range(3)])
    x[1, 2] = 0  # a row without gradient
    assert polar(x).isfinite().all() and (polar(x)[1, 2] == 0).all()
    for bad in (float("nan"), float("inf")):
        x[2, 0, 0] = bad
        finite = polar(x).isfinite().flatten(1).all(1)
        assert finite.tolist() == [True, True, False]


@pytest.mark.parametrize("dtype, rounding", [(torch.float16, 0.01), (torch.bfloat16, 0.04)])
@pytest.mark.parametrize("name", POLARS)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_half_precision_is_nearly_as_good_as_float32(name, distribution, dtype, rounding):
    x = make(distribution, 96, 192)
    exact = polar_factor(x)
    half = replace(POLARS[name], dtype=dtype, form="newton-schulz")(x)
    assert relative_error(half, exact) < 1.05 * relative_error(FLOAT32[name](x), exact) + rounding


def test_input_dtypes_are_accepted():
    x = make("gaussian", 16, 32)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert relative_error(FLOAT32["turbo"](x.to(dtype)), FLOAT32["turbo"](x)) < 0.05


def test_auto_takes_the_form_with_fewer_flops_and_never_gram_in_bfloat16():
    turbo = POLARS["turbo-published"]
    assert turbo._use_gram(768, 3072, torch.float16) and not turbo._use_gram(768, 768, torch.float16)
    assert not turbo._use_gram(768, 3072, torch.bfloat16)


@pytest.mark.parametrize("mistake, says", [
    (lambda: Polar(polynomials.MUON, normalize="spectral"), "frobenius, aol"),
    (lambda: Polar(polynomials.MUON, form="fast"), "newton-schulz, gram, auto"),
    (lambda: Polar(()), "one \\(a, b, c\\)"),
    (lambda: get_polar("turbo-muon"), "muon, muon-3, muon-plus, polar-express, turbo, turbo-3, turbo-5"),
    (lambda: POLARS["muon"](torch.zeros(3)), "shape \\(3,\\)"),
])
def test_mistakes_are_named(mistake, says):
    with pytest.raises(ValueError, match=says):
        mistake()


# --- polynomials -----------------------------------------------------------------------------------------------------


def test_minimax_reproduces_polar_express():
    # arXiv 2505.16932, the coefficients printed in its implementation, before the safety factor
    published = np.array([
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    ])
    assert np.allclose(polynomials.minimax(5, 1e-3, cushion=0.02407327424182761), published, rtol=1e-9)
    scaled = published / np.array([1.05, 1.05**3, 1.05**5])
    assert np.allclose(polynomials.POLAR_EXPRESS, scaled, rtol=1e-9)


@pytest.mark.parametrize("lower, upper", [(0.001, 1.0), (0.1, 1.0), (0.5, 1.5), (0.9, 1.1), (1 - 1e-5, 1 + 1e-5)])
def test_minimax_quintic_equioscillates_so_that_no_quintic_is_better(lower, upper):
    a, b, c = polynomials.minimax_quintic(lower, upper)
    x = np.linspace(lower, upper, 200_001)
    error = 1 - polynomials.evaluate(((a, b, c),), x)
    q2, r2 = sorted(np.roots([5 * c, 3 * b, a]).real)
    extrema = [1 - polynomials.evaluate(((a, b, c),), p) for p in (lower, q2**0.5, r2**0.5, upper)]
    assert np.allclose(np.abs(extrema), np.abs(error).max(), rtol=1e-3, atol=1e-14)  # Chebyshev: four equal extrema …
    if np.abs(error).max() > 1e-12:
        assert [np.sign(e) for e in extrema] == [1, -1, 1, -1]  # … of alternating sign


def test_minimax_beats_every_published_set_on_its_interval():
    x = np.linspace(3e-3, 1, 100_001)
    worst = {steps: np.abs(1 - polynomials.evaluate(polynomials.minimax(steps, 3e-3), x)).max() for steps in (3, 4, 5)}
    assert worst[5] < worst[4] < worst[3]
    for published in (polynomials.MUON, polynomials.MUON_PLUS):
        assert worst[5] < np.abs(1 - polynomials.evaluate(published, x)).max()


@pytest.mark.parametrize("arguments", [(0, 0.1), (3, 0.0), (3, 1.5)])
def test_minimax_rejects_the_impossible(arguments):
    with pytest.raises(ValueError, match="minimax needs"):
        polynomials.minimax(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("shape", [(256, 256), (768, 3072), (3072, 768)])
def test_gpu_default_dtypes_against_float64(distribution, shape):
    x = make(distribution, min(shape), max(shape))
    exact, x = polar_factor(x), x.cuda()
    exact, x = (exact, x) if shape[0] <= shape[1] else (exact.T, x.T)
    for name, polar in POLARS.items():
        single = relative_error(FLOAT32[name](x).cpu(), exact)
        assert relative_error(polar(x).cpu(), exact) <= 1.02 * single + 0.01, name
    assert POLARS["turbo"](x).dtype == torch.float16 and POLARS["muon"](x).dtype == torch.bfloat16
