"""The studies at toy size: what is captured against a run by hand, tables against their definitions."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from matrices import make, polar_factor, relative_error
from torch import nn

from optim import OPTIMIZERS, Muon, fit, get_optimizer, polynomials, route, studies
from optim.amo import relative_residuals
from optim.geometry import scaled_gram
from optim.polar import POLARS


def small_model():
    torch.manual_seed(0)
    blocks = {f"block{i}": nn.ModuleDict({"q": nn.Linear(8, 8, bias=False), "up": nn.Linear(8, 24, bias=False)})
              for i in range(2)}
    return nn.ModuleDict(blocks | {"head": nn.Linear(8, 5)})


def gradients(model, step):
    for number, p in enumerate(model.parameters()):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + number))


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    """A file of three steps, of which the second and third were kept."""
    path = tmp_path_factory.mktemp("captured") / "run.pt"
    model = small_model()
    optimizer = get_optimizer("turbo-muon", route(model), lr=0.02, momentum=0.9)
    capture = studies.Capture(optimizer, at=(2, 3))
    for step in range(3):
        gradients(model, step)
        optimizer.step()
    capture.save(path, "a toy")
    return path


def test_what_is_captured_is_what_the_formulas_say(captured):
    entries = studies.read_captured(captured)["entries"]
    assert [(e["step"], e["operator"], e["layer"]) for e in entries if e["operator"] == "q"] == [
        (2, "q", 0), (2, "q", 1), (3, "q", 0), (3, "q", 1)]
    assert len(entries) == 8 and {e["operator"] for e in entries} == {"q", "up"}, "the head is not Muon's"
    model = small_model()
    for name, parameter in [("block1.up.weight", model["block1"]["up"].weight)]:
        momentum = moment = torch.zeros(24, 8)
        for step in range(3):
            gradients(model, step)
            momentum = 0.9 * momentum + 0.1 * parameter.grad
            moment = 0.95 * moment + 0.05 * parameter.grad**2
            if step:
                (entry,) = [e for e in entries if (e["step"], e["name"]) == (step + 1, name)]
                expected = 0.1 * parameter.grad + 0.9 * momentum
                assert torch.allclose(entry["momentum"], expected, atol=1e-6)
                assert torch.allclose(entry["second_moment"], moment, atol=1e-6)


def test_capture_leaves_training_as_it_is_and_splits_fused_projections():
    weights = [nn.Parameter(make("gaussian", 6, 12).T.contiguous()) for _ in range(2)]
    one, two = (Muon([{"params": [("3.qkv", w)], "split": 2}], lr=0.1, nesterov=False) for w in weights)
    capture = studies.Capture(one, at=[2])
    for step in range(2):
        for w in weights:
            w.grad = torch.randn(12, 6, generator=torch.Generator().manual_seed(step))
        one.step()
        two.step()
    assert torch.equal(*weights)
    assert [e["name"] for e in capture.entries] == ["3.qkv[0]", "3.qkv[1]"] and capture.entries[0]["layer"] == 3
    assert torch.equal(torch.cat([e["momentum"] for e in capture.entries]), one.state[weights[0]]["momentum_buffer"])


def run(name, captured, folder, *more):
    studies.main([name, *(["--captured", str(captured)] if captured else []), "--out", str(folder), *more])
    report, text = json.loads((folder / f"{name}.json").read_text()), (folder / f"{name}.md").read_text()
    assert (folder / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert report["study"] == name and report["versions"]["torch"] == torch.__version__
    assert "![" in text and "\n| " in text and "nan" not in text
    return report, text


def test_polar_after_each_step(captured, tmp_path):
    report, text = run("polar", captured, tmp_path, "--shapes", "16x32", "--matrices", "1")
    rows = {(row["input"], row["method"]): row for row in report["rows"]}
    x = make("low-rank", 16, 32)
    for method, whole in POLARS.items():
        row = rows["low-rank 16×32", method]
        assert len(row["polar_error"]) == len(row["alignment"]) == len(whole.coefficients)
        three = [rows[f"momentum, step 3: {operator}", method]["polar_error"] for operator in ("q", "up")]
        assert rows["momentum, step 3", method]["polar_error"] == pytest.approx(np.mean(three, 0))
        for steps, error in enumerate(row["polar_error"], 1):
            fewer = replace(whole, coefficients=whole.coefficients[:steps])
            assert error == pytest.approx(relative_error(fewer(x), polar_factor(x)), rel=1e-3)
    assert rows["gaussian 16×32", "polar-express"]["polar_error"][-1] < 0.2
    assert "momentum, step 2: up" in text and "polar error after step" in text


def test_operators_by_layer_and_stage(captured, tmp_path):
    report, text = run("operators", captured, tmp_path)
    entries = studies.read_captured(captured)["entries"]
    for row, entry in zip(report["rows"], entries, strict=True):
        assert row["name"] == entry["name"]
        values = np.linalg.svd(entry["momentum"].double(), compute_uv=False)
        assert row["condition"] == pytest.approx(values[0] / values[-1], rel=1e-6)
        assert row["middle"] == pytest.approx(values[4] / values[0], rel=1e-6)
        direct = relative_error(POLARS["turbo"](entry["momentum"]), polar_factor(entry["momentum"]))
        assert row["error"]["turbo"] == pytest.approx(direct, rel=1e-3)
    for stage in ("2", "3"):
        decided = report["amo"][stage]["turbo-amo"]
        assert decided["flops"] <= decided["budget_flops"] and decided["residual"] <= decided["uniform_residual"]
        stage_q = [e["momentum"] for e in entries if (str(e["step"]), e["operator"]) == (stage, "q")]
        direct = [relative_residuals(scaled_gram(x, "aol"), {4: polynomials.FITTED[4]}, True)[0] for x in stage_q]
        assert decided["types"]["q"]["residual"]["4"] == pytest.approx(np.mean(direct))
    assert "turbo-amo: steps" in text and "layer 1" in text


def test_second_moments_and_spectra(captured, tmp_path):
    report, text = run("second-moment", captured, tmp_path)
    entries = studies.some(studies.read_captured(captured)["entries"], 4)  # grouped, and all of them
    assert len(report["rows"]) == 3 * len(entries) == 24
    for number, entry in enumerate(entries):
        m, v = entry["momentum"].double(), entry["second_moment"].double()
        by_hand = {"none": m, "full": m / (v.sqrt() + 1e-10),
                   "factored": m / ((v.mean(1, keepdim=True) * v.mean(0) / v.mean()).sqrt() + 1e-10)}
        for row, (kind, x) in zip(report["rows"][3 * number :], by_hand.items()):
            values = np.linalg.svd(x, compute_uv=False)
            assert row["preconditioning"] == kind
            assert row["condition"] == pytest.approx(values[0] / values[-1], rel=1e-3)
            assert row["curve"][0] == 1 and row["curve"][-1] == pytest.approx(values[-1] / values[0], rel=1e-2)
            cosine = (polar_factor(x) * polar_factor(m)).sum() / 8
            assert row["turned"] == pytest.approx(cosine.item(), abs=1e-4)
    assert "step 2" in text and "factored" in text


def test_memory_of_every_recipe(tmp_path):
    report, text = run("memory", None, tmp_path, "--layers", "1", "--width", "16")
    found = {row["recipe"]: row for row in report["rows"]}
    assert list(found) == list(OPTIMIZERS) and all(row["parameters"] == 12 * 16**2 for row in found.values())
    assert found["muon"]["bytes_per_parameter"] == found["turbo-amo"]["bytes_per_parameter"] == 4
    assert found["muon2"]["bytes_per_parameter"] == 8
    statistics = 4 * (4 * 32 + 2 * 80)  # rows and columns of four 16×16 and two 16×64
    assert found["muon2-f"]["state_bytes"] == 4 * 12 * 16**2 + statistics
    assert all(recipe in text for recipe in OPTIMIZERS)


def test_captured_momentum_becomes_a_study_that_fit_reads(captured, tmp_path):
    studies.main(["spectra", "--captured", str(captured), "--to", str(tmp_path / "s.json"), "--shapes", "16x32"])
    momentum, tests = fit.read_study(tmp_path / "s.json")
    assert sorted(momentum) == [(2, "q"), (2, "up"), (3, "q"), (3, "up")] and len(tests) == 5
    entries = studies.read_captured(captured)["entries"]
    three = [fit.spectrum(e["momentum"]).bounded() for e in entries if (e["step"], e["operator"]) == (3, "up")]
    direct = np.sqrt(np.mean([fit.error(polynomials.FITTED[4], s) ** 2 for s in three]))
    assert fit.error(polynomials.FITTED[4], momentum[3, "up"]["aol+bound"]) == pytest.approx(direct, abs=0.01)


def test_capture_runs_the_training_script(tmp_path, monkeypatch, capsys):
    """With a script of the same functions: make_optimizer once to warm up, once to train."""
    script = type(sys)("train_gpt")
    script.made = []

    def make_optimizer(model):
        script.made.append(get_optimizer("muon", route(model), lr=0.02))
        return script.made[-1]

    def main(arguments):
        script.arguments = arguments
        for steps in (2, 5):
            model = small_model()
            optimizer = script.make_optimizer(model)
            for step in range(steps):
                gradients(model, step)
                optimizer.step()

    script.make_optimizer, script.main = make_optimizer, main
    monkeypatch.setitem(sys.modules, "train_gpt", script)
    studies.main(["capture", "--at", "1", "5", "--to", str(tmp_path / "run.pt"), "--", "--preset", "local"])
    assert script.arguments == ["--preset", "local"] and len(script.made) == 2
    assert script.make_optimizer is make_optimizer, "put back"
    found = studies.read_captured(tmp_path / "run.pt")
    assert [e["step"] for e in found["entries"]] == [1] * 4 + [5] * 4
    assert found["about"] == "train_gpt.py --preset local" and "8 matrices" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, says", [
    (["operators", "--captured", "nowhere.pt"], "no captured run at nowhere.pt"),
    (["polar", "--", "--preset", "wiki"], "only capture takes arguments after --"),
    (["memory", "--out", "/dev/null/x", "--layers", "1", "--width", "8"], "/dev/null/x"),
])
def test_mistakes_are_named(arguments, says, capsys):
    with pytest.raises(SystemExit):
        studies.main(arguments)
    assert says in capsys.readouterr().err


def test_what_cannot_be_captured_is_said(tmp_path):
    model = small_model()
    with pytest.raises(studies.StudyError, match="a Muon in it"):
        studies.Capture(get_optimizer("adamw", route(model), lr=0.1), at=[1])
    capture = studies.Capture(get_optimizer("muon", route(model), lr=0.1), at=[1, 9])
    with pytest.raises(studies.StudyError, match="before step 1, after 0"):
        capture.save(tmp_path / "run.pt", "")
    torch.save({"entries": []}, tmp_path / "empty.pt")
    with pytest.raises(studies.StudyError, match="holds no captured run"):
        studies.read_captured(tmp_path / "empty.pt")
