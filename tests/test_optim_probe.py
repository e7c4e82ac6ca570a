"""The probe against the formulas by hand, for every recipe, on one rank and on two; it changes nothing."""

import json
import math

import numpy as np
import pytest
import torch
from matrices import polar_factor, relative_error
from ranks import run_ranks
from torch import nn

from optim import AMO, Muon, OPTIMIZERS, Polar, get_optimizer, polynomials, route
from optim.geometry import RANK
from optim.probe import probe, spectral, spread


def model_of(seed=0):
    torch.manual_seed(seed)
    blocks = [nn.ModuleDict({"q": nn.Linear(12, 12, bias=False), "up": nn.Linear(12, 30, bias=False)})
              for _ in range(5)]
    return nn.ModuleDict({"blocks": nn.ModuleList(blocks), "embed": nn.Embedding(7, 12)})


def train(optimizer, model, steps=3):
    for step in range(steps):
        for number, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + number))
        optimizer.step()
    return optimizer


def by_hand(matrices):
    """Means over (n, m) float64: condition and middle geometric, stable rank, rms singular value."""
    values = [np.linalg.svd(x.double().numpy(), compute_uv=False) for x in matrices]
    return {"condition": math.exp(np.mean([np.log(s[0] / s[-1]) for s in values])),
            "middle": math.exp(np.mean([np.log(s[len(s) // 2] / s[0]) for s in values])),
            "stable_rank": np.mean([(s**2).sum() / s[0] ** 2 for s in values]),
            "norm": np.mean([np.sqrt((s**2).mean()) for s in values])}


@pytest.mark.parametrize("name, moments", [("muon", None), ("turbo-muon", None), ("muon2", "full"),
                                           ("muon2-f", "factored"), ("normuon", "rows")])
def test_the_numbers_are_those_of_the_formulas(name, moments):
    model = model_of()
    optimizer = train(get_optimizer(name, route(model), lr=0.02), model)
    found = probe(optimizer, model)
    muon = optimizer.optimizers[0]
    assert sorted(found) == ["q", "up"] and json.loads(json.dumps(found, allow_nan=False)) == found
    for kind, numbers in found.items():
        assert numbers["matrices"] == 3
        weights = [model["blocks"][i][kind].weight for i in (0, 2, 4)]
        entering, orthogonal, updates = [], [], []
        for w in weights:
            state = muon.state[w]
            x = state["momentum_buffer"]
            if moments == "full":
                x = x / (state["second_moment"].sqrt() + 1e-10)
            elif moments == "factored":
                rows, columns = (state[f"second_moment_{side}"].flatten() for side in ("rows", "columns"))
                x = x / (torch.outer(rows, columns) / rows.mean()).sqrt()
            entering.append(x)
            o = muon.polar(x)
            orthogonal.append(o)
            if moments == "rows":
                scaled = o / (state["row_second_moment"].flatten().sqrt()[:, None] + 1e-10)
                o = scaled * o.norm() / scaled.norm()
            updates.append(o)
        for what, matrices in (("weight", [w.detach() for w in weights]), ("momentum", entering), ("update", updates)):
            for key, expected in by_hand(matrices).items():
                assert numbers[what][key] == pytest.approx(expected, rel=1e-3), (kind, what, key)
        errors = [relative_error(o, polar_factor(x)) for o, x in zip(orthogonal, entering)]
        cosines = [torch.nn.functional.cosine_similarity(o.double().flatten(), polar_factor(x).flatten(), 0).item()
                   for o, x in zip(orthogonal, entering)]
        assert numbers["update"]["polar_error"] == pytest.approx(np.mean(errors), rel=1e-3)
        assert numbers["update"]["alignment"] == pytest.approx(np.mean(cosines), rel=1e-3)
        assert numbers["update"]["steps"] == len(muon.polar.coefficients)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_changes_nothing(name):
    model, twin = model_of(), model_of()
    watched, alone = (get_optimizer(name, route(m), lr=0.02) for m in (model, twin))
    assert all(numbers["momentum"]["condition"] is None and numbers["weight"]["condition"] > 1
               for numbers in probe(watched, model).values()), "before the first step there are weights only"
    for _ in range(2):
        train(watched, model)
        train(alone, twin)
        assert (probe(watched, model) == {}) == (name == "adamw")
    for p, q in zip(model.parameters(), twin.parameters()):
        assert torch.equal(p, q)


def test_it_knows_what_amo_has_committed_to():
    model = model_of()
    sets = {2: polynomials.minimax(2, 0.1), 5: polynomials.minimax(5, 1e-3)}
    sets |= {3: sets[5][:3], 4: sets[5][:4]}
    amo = AMO(average_steps=4, min_steps=2, max_steps=5, observe_start=0, observe_end=2, every=1, sets=sets,
              type_of=lambda name: name[-9:], say=lambda table: None)  # the users' types
    optimizer = Muon([(n, p) for n, p in model.named_parameters() if "embed" not in n], budget=amo, polar="turbo")
    train(optimizer, model)
    committed = optimizer.budget.commitment["types"]
    found = probe(optimizer, model)
    assert sorted(found) == sorted(committed) and len(found) == 2
    assert {kind: one["update"]["steps"] for kind, one in found.items()} == {
        kind: one["steps"] for kind, one in committed.items()}


def test_zero_matrices_are_left_out_and_fused_projections_taken_apart():
    weight = nn.Parameter(torch.zeros(12, 4))
    model = nn.ParameterDict({"qkv": weight})
    optimizer = Muon([{"params": [("qkv", weight)], "split": 3}], lr=0.1, polar=Polar(polynomials.MUON))
    weight.grad = torch.cat([torch.zeros(4, 4), torch.randn(8, 4, generator=torch.Generator().manual_seed(0))])
    assert probe(optimizer, model)["qkv"]["weight"] == dict.fromkeys(("condition", "middle", "stable_rank", "norm"))
    optimizer.step()
    found = probe(optimizer, model)["qkv"]
    parts = optimizer.state[weight]["momentum_buffer"].view(3, 4, 4)[1:]
    assert found["momentum"]["condition"] == pytest.approx(by_hand(parts)["condition"], rel=1e-4)


def test_a_result_that_is_not_finite_is_none_not_nan():
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = Muon([("w", weight)], lr=0.0, polar=Polar(((1e30, 1e30, 1e30),) * 3, dtype=torch.float32))
    weight.grad = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    found = probe(optimizer, nn.ParameterDict({"w": weight}))["w"]
    assert found["update"]["polar_error"] is None and found["update"]["norm"] is None
    assert found["momentum"]["condition"] > 1 and found["update"]["steps"] == 3


def test_a_spread_has_both_ends_and_no_place_twice():
    assert spread(12, 3) == [0, 6, 11] and spread(2, 5) == [0, 1] and spread(7, 1) == [0] and spread(0, 3) == []
    assert all(len(set(spread(length, count))) == min(length, count) for length in range(30) for count in range(1, 9))


def test_conditions_beyond_what_can_be_told_are_cut():
    numbers = spectral(torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64))
    assert numbers == {"condition": 1 / RANK, "middle": RANK, "stable_rank": 1.0, "norm": pytest.approx(2 / 3**0.5)}


def on_rank(rank, size, folder):
    model = model_of()
    optimizer = train(get_optimizer("turbo-muon", route(model), lr=0.02), model)
    torch.save(probe(optimizer, model, matrices=4), f"{folder}/{size}_{rank}.pt")


def test_two_ranks_find_what_one_does(tmp_path):
    for size in (1, 2):
        run_ranks(on_rank, size, tmp_path)
    alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1_0", "2_0", "2_1"))
    assert first == second and first.keys() == alone.keys()
    for kind in alone:
        for what in ("momentum", "update", "weight"):
            assert first[kind][what] == pytest.approx(alone[kind][what], rel=1e-4)
    assert 0 < alone["q"]["update"]["polar_error"] < 1
