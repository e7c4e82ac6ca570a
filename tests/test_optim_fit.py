"""Fitted coefficients: the error from spectra against the error from matrices, and what FITTED promises."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from matrices import DISTRIBUTIONS, make, polar_factor, relative_error

from optim import POLARS, Polar, fit, polynomials

STUDY = fit.Path(__file__).resolve().parent.parent / fit.STUDY
PUBLISHED = POLARS["turbo-published"]


@pytest.fixture(scope="module")
def study():
    return fit.read_study(STUDY)


def pooled(momentum, mode="aol+bound"):
    return fit.histogram([modes[mode] for modes in momentum.values()])


@pytest.mark.parametrize("normalize", ["aol", "frobenius"])
@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("shape", [(48, 96), (40, 40), (96, 32)])
def test_the_error_from_a_spectrum_is_the_error_from_the_matrix(shape, bound, normalize):
    for distribution in ("student-t2", "low-rank"):
        x = make(distribution, min(shape), max(shape))
        exact, x = polar_factor(x), x if shape[0] <= shape[1] else x.T
        spectrum = fit.spectrum(x, normalize)
        spectrum = spectrum.bounded() if bound else spectrum
        for coefficients in (polynomials.MUON, polynomials.TURBO):
            result = Polar(coefficients, normalize=normalize, bound=bound, dtype=torch.float64)(x)
            direct = relative_error(result if shape[0] <= shape[1] else result.T, exact)
            assert fit.error(coefficients, spectrum) == pytest.approx(direct, abs=1e-7)


def test_a_histogram_has_the_error_of_its_spectra():
    spectra = [fit.spectrum(make("condition-1e3", 96, 128, seed)).bounded() for seed in range(3)]
    together = fit.histogram(spectra)
    assert together.count.sum() == 3 * 96 and len(together.sigma) == len(fit.EDGES) - 1
    each = [fit.error(polynomials.TURBO, s) for s in spectra]
    assert fit.error(polynomials.TURBO, together) == pytest.approx(np.sqrt(np.mean(np.square(each))), rel=0.01)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_fitted_sets_are_never_above_the_published_four_and_hold_in_float16(distribution):
    x = make(distribution, 256, 1024)
    exact = polar_factor(x)
    allowed = relative_error(replace(PUBLISHED, dtype=torch.float64, form="gram")(x), exact)
    for steps, restart in ((4, None), (5, 2), (6, 2)):  # restart: the four need none, the others would diverge
        polar = Polar(polynomials.FITTED[steps], normalize="aol", bound=True, form="gram", restart=restart)
        assert relative_error(replace(polar, dtype=torch.float64)(x), exact) <= 1.0001 * allowed, steps
        half = relative_error(replace(polar, dtype=torch.float16)(x), exact)
        assert half <= (1.0 if steps == 4 else 1.03) * allowed, steps


def test_fitted_sets_have_less_error_on_the_momentum_they_were_fitted_to(study):
    momentum, tests = study
    published = fit.error(polynomials.TURBO, pooled(momentum, "aol"))
    errors = [fit.error(polynomials.FITTED[steps], pooled(momentum)) for steps in (4, 5, 6)]
    assert published > errors[0] > errors[1] > errors[2]
    for modes in tests.values():  # in the study as from matrices
        allowed = fit.error(polynomials.TURBO, modes["aol"])
        for steps in (4, 5, 6):
            assert fit.error(polynomials.FITTED[steps], modes["aol+bound"]) <= 1.0001 * allowed


@pytest.mark.parametrize("steps", [3, 4, 5, 6])
def test_fitted_sets_neither_diverge_nor_turn_negative_where_rounding_enlarges(steps):
    x = np.linspace(0, 1, 10_001)
    for step in polynomials.FITTED[steps]:
        x = polynomials.evaluate((step,), fit.SLACK * x)
        assert -0.01 <= x.min() and x.max() <= 1.25


def test_the_study_is_complete(study):
    momentum, tests = study
    assert sorted({step for step, _ in momentum}) == [20, 60, 120, 190] and len(momentum) == 24 and len(tests) == 15
    for entry in json.loads(STUDY.read_text())["momentum"]:
        for mode, modes in momentum[entry["step"], entry["operator"]].items():
            assert modes.count.sum() == entry["matrices"] * entry["rank"] == 12 * 768, mode
        aol = momentum[entry["step"], entry["operator"]]["aol"]
        assert aol.weight.sum() / aol.count.sum() == pytest.approx(entry["aol_cos"], abs=1e-4)
    spectrum, kept = fit.spectrum(make("low-rank", 256, 1024)), tests["low-rank 256x1024"]["aol"]
    assert np.allclose(np.sort(spectrum.sigma), np.sort(kept.sigma), rtol=1e-4)


def test_a_study_survives_a_round_trip(tmp_path):
    x = [make("gaussian", 16, 32, seed) for seed in range(2)]
    entry = fit.momentum_entry(7, "q", [fit.spectrum(m) for m in x], [fit.spectrum(m, "frobenius") for m in x])
    fit.write_study(tmp_path / "study.json", {"what": "a test"}, [entry], [fit.test_entry("gaussian", x[0])])
    momentum, tests = fit.read_study(tmp_path / "study.json")
    direct = fit.spectrum(x[0]).bounded()
    assert momentum[7, "q"]["aol+bound"].count.sum() == 32
    kept = tests["gaussian 16x32"]["aol+bound"]
    assert fit.error(polynomials.TURBO, kept) == pytest.approx(fit.error(polynomials.TURBO, direct), rel=1e-3)


def test_the_objective_has_the_gradient_it_claims(study):
    momentum, tests = study
    modes = tests["low-rank 256x1024"]
    objective = fit._objective(pooled(momentum), [(modes["aol+bound"], 0.2)], top=1.0, penalty=10)
    at = np.array(polynomials.MUON[:3]).ravel()
    numeric = [(objective(at + 1e-6 * d)[0] - objective(at - 1e-6 * d)[0]) / 2e-6 for d in np.eye(9)]
    assert np.allclose(objective(at)[1], numeric, rtol=1e-5, atol=1e-5 * np.abs(numeric).max())


def test_fit_improves_on_its_starts_and_repeats_itself(study):
    momentum, tests = study
    on, modes = pooled(momentum), tests["gaussian 768x3072"]
    free = fit.fit(2, on, hops=2)
    assert free == fit.fit(2, on, hops=2) and len(free) == 2
    starts = [polynomials.minimax(2, lower) for lower in (0.5, 0.25, 0.1, 0.05)] + [polynomials.TURBO[-2:]]
    assert fit.error(free, on) < min(fit.error(start, on) for start in starts)
    limit = 1.2 * fit.error(polynomials.minimax(2, 0.3), modes["aol+bound"])
    kept = fit.fit(2, on, [(modes["aol+bound"], limit)], hops=2)
    assert fit.error(kept, modes["aol+bound"]) <= limit < fit.error(free, modes["aol+bound"])
    assert fit.error(kept, on) >= fit.error(free, on)


@pytest.mark.parametrize("steps", [2, 4, 5])
def test_the_best_minimax_set_is_the_best_of_a_finer_look(study, steps):
    momentum, _ = study
    on = pooled(momentum)
    lower, coefficients = fit.best_minimax(steps, on)
    most = min(0.5, 8 * 0.25**steps)
    assert np.allclose(coefficients, polynomials.minimax(steps, lower, safety=1.02), atol=5e-5)
    finer = [fit.error(polynomials.minimax(steps, l, safety=1.02), on) for l in np.geomspace(1e-6, most, 400)]
    assert min(finer) <= fit.error(coefficients, on) < 1.002 * min(finer)
    assert 1e-6 < lower < most, "an optimum inside of what is searched"


def test_rows_of_zeros_leave_a_spectrum_as_it_is():
    x = make("row-scaled", 24, 64)
    padded = torch.cat([x[:10], torch.zeros(3, 64), x[10:]])
    whole, more = fit.spectrum(x), fit.spectrum(padded)
    assert len(more.sigma) == 27 and more.bound == pytest.approx(whole.bound)
    assert np.allclose(np.sort(more.sigma)[3:], np.sort(whole.sigma), rtol=1e-9) and np.sort(more.sigma)[2] < 1e-7
    assert np.sort(more.weight)[3:] == pytest.approx(np.sort(whole.weight), abs=1e-6)


@pytest.mark.parametrize("value, says", [("wide", "wide"), ("1.5", "0 < lower < 1")])
def test_a_minimax_interval_that_is_none_is_refused(value, says, capsys):
    with pytest.raises(SystemExit):
        fit.main(["--minimax", value, "--spectra", str(STUDY)])
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("mistake, says", [
    (lambda: fit.spectrum(torch.ones(3, 4), "spectral"), "'spectral'.*aol, frobenius"),
    (lambda: fit.spectrum(torch.ones(2, 3, 4)), "shape \\(2, 3, 4\\)"),
    (lambda: fit.spectrum(torch.zeros(3, 4)), "not 0"),
    (lambda: fit.spectrum(torch.full((3, 4), torch.nan)), "finite"),
    (lambda: fit.fit(0, None), "steps >= 1.*got 0"),
    (lambda: fit.fit(4, None, [(None, -1.0)]), "limits > 0.*-1.0"),
    (lambda: fit.read_study("nowhere.json"), "no study at nowhere.json"),
])
def test_mistakes_are_named(mistake, says):
    with pytest.raises(ValueError, match=says):
        mistake()


def test_limits_that_cannot_be_kept_are_an_error(study):
    momentum, tests = study
    with pytest.raises(ValueError, match="no 1 steps within all limits"):
        fit.fit(1, pooled(momentum), [(tests["low-rank 256x1024"]["aol+bound"], 0.01)], hops=1)


@pytest.mark.parametrize("how", [["--free", "--hops", "1"], ["--minimax"], ["--minimax", "0.05", "--frobenius"]])
def test_the_command_line_prints_the_set_and_its_rivals(how, capsys):
    fit.main(["--steps", "2", *how, "--spectra", str(STUDY)])
    printed = capsys.readouterr().out
    steps = [json.loads(f"[{line.strip('(), ')}]") for line in printed.splitlines() if line.startswith("    (")]
    (a, _, _), (d, _, _) = steps
    assert f"{a * d:.1f}" in printed.splitlines()[-2]
    if "0.05" in how:
        assert np.allclose(steps, polynomials.minimax(2, 0.05, safety=1.02), atol=5e-5)
    assert ("minimax(2, " in printed) == (how == ["--minimax"])
    for word in ("20 q", "190 down", "low-rank 256x1024", "published", "minimax", "muon", "slope product"):
        assert word in printed
