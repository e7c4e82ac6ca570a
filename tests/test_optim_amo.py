"""AMO: the allocation against brute force, residuals against matrices, costs by hand, and a commitment in Muon."""

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from matrices import make
from ranks import run_ranks
from torch import nn

from kernels import newton_schulz
from optim import AMO, Muon, OPTIMIZERS, Polar, fit, get_optimizer, get_polar, polynomials, route
from optim.amo import Budget, allocate, budgets, flops, operator_type, relative_residuals
from optim.collectives import Ranks
from optim.geometry import scaled_gram
from optim.polar import POLARS

CPU = torch.device("cpu")
QUICK = dict(observe_start=1, observe_end=4, every=1, say=lambda table: None)  # commits in the fifth step


# --- what is allocated -----------------------------------------------------------------------------------------------


def brute_force(costs, residuals, budget):
    """(least residual, its cost, its choice) of all choices within the budget."""
    found = []
    for choice in itertools.product(*(range(len(row)) for row in costs)):
        cost = sum(row[i] for row, i in zip(costs, choice))
        if cost <= budget:
            found.append((sum(row[i] for row, i in zip(residuals, choice)), cost, list(choice)))
    return min(found)


@pytest.mark.parametrize("seed", range(60))
def test_the_allocation_is_brute_forces(seed):
    rng = random.Random(seed)
    types, choices = rng.randint(1, 6), rng.randint(1, 4)
    shape = rng.choice(["any", "convex", "units"])
    costs = [sorted(rng.randint(1, 50) for _ in range(choices)) for _ in range(types)]
    residuals = [[rng.random() for _ in range(choices)] for _ in range(types)]  # not even falling: gains need not be
    if shape == "units":  # many ties
        costs, residuals = [[1, 2, 3, 4][:choices]] * types, [[rng.randint(0, 3) for _ in row] for row in residuals]
    elif shape == "convex":
        residuals = [[0.5**i * row[0] for i in range(choices)] for row in residuals]
    least, most = sum(map(min, costs)), sum(map(max, costs))
    budget = least + rng.random() * (most - least)
    expected, cost, choice = brute_force(costs, residuals, budget)
    chosen = allocate(costs, residuals, budget)
    assert sum(row[i] for row, i in zip(costs, chosen)) <= budget
    assert sum(row[i] for row, i in zip(residuals, chosen)) == pytest.approx(expected, abs=1e-12)
    assert sum(row[i] for row, i in zip(costs, chosen)) == cost, "of equal residuals the cheaper"
    assert chosen == choice or shape == "units"
    assert chosen == allocate(costs, residuals, budget)


def test_a_greedy_walk_would_lose():
    """The first step of the second row gains nothing alone, so that greed by the next step's gain never takes it."""
    costs, residuals = [[1, 2, 3], [1, 2, 3]], [[1.0, 0.9, 0.8], [1.0, 1.0, 0.1]]
    assert allocate(costs, residuals, 4) == [0, 2]


def test_many_types_are_decided_quickly():
    rng = random.Random(1)
    costs = [[(k + 3) * rng.choice((7, 20, 31)) for k in range(4)] for _ in range(60)]
    residuals = [[0.4 ** (k + rng.random()) for k in range(4)] for _ in range(60)]
    budget = sum(row[1] for row in costs)
    chosen = allocate(costs, residuals, budget)
    assert 0.98 * budget < sum(row[i] for row, i in zip(costs, chosen)) <= budget


def test_a_budget_below_the_cheapest_choice_is_an_error():
    with pytest.raises(ValueError, match="cheapest choice costs 5, more than the budget of 4"):
        allocate([[2, 3], [3, 4]], [[1, 0], [1, 0]], 4)


# --- what it is decided by -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", ["aol", "frobenius"])
@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_residuals_are_the_iterations_distance_from_the_polar_factor_of_the_scaled_matrix(shape, bound, normalize):
    x = make("condition-1e3", min(shape), max(shape)).double()
    x = x if shape[0] <= shape[1] else x.T
    sets = {k: polynomials.FITTED[k] for k in (3, 4, 5)}
    found = relative_residuals(scaled_gram(x, normalize), sets, bound)
    wide = x if shape[0] <= shape[1] else x.T
    scaled = wide / wide.norm()
    if normalize == "aol":
        scaled = scaled / (scaled @ scaled.T).abs().sum(1, keepdim=True).sqrt()
    u, s, vt = np.linalg.svd(scaled.numpy(), full_matrices=False)
    for coefficients, residual in zip(sets.values(), found):
        o = Polar(coefficients, normalize=normalize, bound=bound, dtype=torch.float64)(wide)
        assert residual == pytest.approx(np.linalg.norm(o.numpy() - u @ vt) ** 2 / len(s), rel=1e-7)
        p = polynomials.evaluate(coefficients, s / (min(1.0, (s**8).sum() ** 0.125) if bound else 1.0))
        assert residual == pytest.approx(((1 - p) ** 2).mean(), rel=1e-7)


def test_residuals_agree_with_the_error_that_coefficients_are_fitted_by():
    x = make("low-rank", 48, 96)
    spectrum = fit.spectrum(x, "frobenius").bounded()
    (residual,) = relative_residuals(scaled_gram(x, "frobenius"), {5: polynomials.MUON}, True)
    assert residual**0.5 == pytest.approx(fit.error(polynomials.MUON, spectrum), rel=1e-6)


@pytest.mark.parametrize("x", [torch.zeros(3, 4), torch.full((3, 4), torch.nan), torch.tensor([[1.0, torch.inf]])])
def test_matrices_without_a_spectrum_are_no_sample(x):
    assert relative_residuals(scaled_gram(x, "aol"), {5: polynomials.MUON}, True) is None


@pytest.mark.parametrize("name, kind", [
    ("blocks.3.attention.q.weight", "q"), ("blocks.11.mlp.up.weight", "up"), ("layers.2.conv1.weight", "conv1"),
    ("features.0.weight", "features.0"), ("weight", "weight"), ("blocks.0.attention.qkv", "qkv"),
    ("parameter 3 of shape (8, 12)", "shape (8, 12)"), ("0.weight", "0")])
def test_names_give_types(name, kind):
    assert operator_type(name) == kind


# --- what it costs ---------------------------------------------------------------------------------------------------


class Counted(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the FLOPs of matrix products."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.baddbmm):
            first = args[-2]
            if result.shape[-1] > 1:  # AOL's row sums are products with a vector
                self.flops += 2 * result.numel() * first.size(-1)
        return result


@pytest.mark.parametrize("shape", [(32, 32), (32, 128), (128, 32), (32, 300)])
@pytest.mark.parametrize("name, steps", [("muon", 3), ("muon", 7), ("turbo", 3), ("turbo", 4), ("turbo", 5),
                                         ("turbo", 6)])
def test_the_eager_paths_cost_what_is_counted(name, steps, shape):
    polar = AMO(average_steps=steps, max_steps=7, sets=None if name == "muon" else polynomials.FITTED | {
        7: polynomials.MUON * 1 + polynomials.MUON[:2]}).polars(get_polar(name))[steps]
    with Counted() as counted:
        polar(torch.randn(1, *shape))
    assert flops(polar, *shape, CPU) == counted.flops


@pytest.mark.parametrize("steps, n, m, expected", [
    (4, 768, 3072, 3 * 768**2 * 3072 + 13 * 768**3),  # DESIGN.md's count of the Gram form
    (4, 768, 768, 4 * (3 * 768**3 + 768**3)),  # nearly square: the Newton-Schulz form
    (3, 768, 3072, 3 * 768**2 * 3072 + 9 * 768**3),
    (4, 64, 576, 4 * 64**2 * 576 + 2 * 21 * 64**3),  # in one launch: 21 products, U Uᵀ and Q U, all whole
])
def test_the_fused_paths_cost_what_their_files_say(steps, n, m, expected):
    polar = replace(POLARS["turbo"], engine="fused", coefficients=polynomials.FITTED[steps])
    assert flops(polar, n, m, CPU) == flops(polar, m, n, CPU) == expected
    assert newton_schulz._form(n, m) == ("newton-schulz" if n == m else "gram")


@pytest.mark.parametrize("engine", ["fused", "eager"])
@pytest.mark.parametrize("n, m", [(64, 576), (256, 256), (256, 1024), (256, 4096)])
def test_every_further_step_costs_more(engine, n, m):
    polars = AMO().polars(replace(POLARS["turbo"], engine=engine))
    costs = [flops(polar, n, m, CPU) for polar in polars.values()]
    assert list(polars) == [3, 4, 5, 6] and costs == sorted(set(costs))


@pytest.mark.parametrize("base, amo", [("turbo", AMO()), ("muon", AMO(average_steps=5, max_steps=7))])
def test_on_the_momentum_of_a_run_the_budget_leaves_less_residual_than_the_same_steps_for_all(base, amo):
    """The histograms of records/studies/momentum-spectra, the costs of the H200's kernels (Muon's: eager)."""
    momentum, _ = fit.read_study(fit.Path(__file__).resolve().parent.parent / fit.STUDY)
    mode, shapes = {"turbo": "aol+bound", "muon": "frobenius"}[base], {"up": (3072, 768), "down": (768, 3072)}
    budget = Budget(amo, replace(POLARS[base], engine="fused" if base == "turbo" else "eager"), Ranks())
    for stage in (20, 60, 120, 190):
        sampled = {}
        for operator in ("q", "k", "v", "o", "up", "down"):
            spectrum = momentum[stage, operator][mode]
            misses = [(1 - polynomials.evaluate(c, spectrum.sigma)) ** 2 for c in budget.sets.values()]
            sampled[operator] = [1.0, *(float((miss * spectrum.count).sum() / spectrum.count.sum()) for miss in misses)]
        made = budget.decide(sampled, {kind: [shapes.get(kind, (768, 768))] * 12 for kind in sampled}, CPU)
        assert made["flops"] <= made["budget_flops"]
        assert made["residual"] < 0.9 * made["uniform_residual"], stage
        chosen = {kind: one["steps"] for kind, one in made["types"].items()}
        assert chosen["v"] == max(chosen.values()) and chosen["up"] == min(chosen.values()), chosen


# --- in an optimizer -------------------------------------------------------------------------------------------------


def model_of(seed=0):
    """Operators whose gradients differ in conditioning: `easy` and `hard` share a shape, `wide` has its own."""
    torch.manual_seed(seed)
    return nn.ModuleDict({f"block{i}": nn.ModuleDict({"easy": nn.Linear(24, 24, bias=False),
                                                      "hard": nn.Linear(24, 24, bias=False),
                                                      "wide": nn.Linear(64, 24, bias=False)}) for i in range(3)})


def fill(model, step, share=slice(None)):
    """Gradients of a step: the mean over `share` of four parts."""
    for number, (name, p) in enumerate(model.named_parameters()):
        kind = "condition-1e3" if "hard" in name else "gaussian"
        n, m = p.shape
        parts = torch.stack([make(kind, n, m, seed=1000 * step + 10 * number + i) for i in range(4)])
        parts = parts + 10 * torch.eye(n) if "easy" in name else parts
        p.grad = parts[share].mean(0).to(p.device)


SETS = {steps: polynomials.minimax(steps, 2 * 0.25**steps, safety=1.02) for steps in (3, 4, 5, 6)}


def make_muon(model, **options):
    amo = AMO(**QUICK | dict(average_steps=4, min_steps=3, max_steps=6, sets=SETS) | options)
    return Muon(list(model.named_parameters()), lr=0.02, polar="turbo", budget=amo)


def run(optimizer, model, steps, first=0):
    for step in range(first, first + steps):
        fill(model, step)
        optimizer.step()
    return optimizer


def steps_of(optimizer):
    return {kind: one["steps"] for kind, one in optimizer.budget.commitment["types"].items()}


def test_hard_operators_get_more_steps_than_easy_ones_and_the_budget_holds():
    model, said = model_of(), []
    optimizer = run(make_muon(model, say=said.append, matrices=2), model, 4)
    assert optimizer.budget.commitment is None and not said
    run(optimizer, model, 1, first=4)
    made, chosen = optimizer.budget.commitment, steps_of(optimizer)
    assert sorted(chosen) == ["easy", "hard", "wide"]
    assert chosen["hard"] > max(chosen["easy"], chosen["wide"]), chosen
    assert made["step"] == 4 and made["flops"] <= made["budget_flops"]
    assert made["residual"] < made["uniform_residual"]
    assert all(one["samples"] == 6 and one["matrices"] == 3 for one in made["types"].values())
    for kind, one in made["types"].items():  # the residuals are those of what was sampled: hard is hard
        assert list(one["residual"]) == list(one["flops"]) == ["3", "4", "5", "6"]
        shape = (24, 64) if kind == "wide" else (24, 24)
        assert one["flops"]["4"] == 3 * flops(POLARS["turbo"], *shape, CPU)
    costs, residuals = ([[one[key][str(k)] * (one["rank"] if key == "residual" else 1) for k in (3, 4, 5, 6)]
                         for one in made["types"].values()] for key in ("flops", "residual"))
    assert [chosen[kind] - 3 for kind in made["types"]] == brute_force(costs, residuals, made["budget_flops"])[2]
    (table,) = said
    assert "AMO at step 4" in table and all(kind in table for kind in chosen) and "of the budget" in table
    run(optimizer, model, 2, first=5)
    assert optimizer.budget.commitment is made and optimizer.budget._thread is None, "frozen, and nothing observes"


def test_after_the_commitment_every_matrix_gets_its_types_steps():
    model, twin = model_of(), model_of()
    optimizer, plain = make_muon(model), Muon(list(twin.named_parameters()), lr=0.02, polar="turbo")
    run(optimizer, model, 4)
    run(plain, twin, 4)
    for p, q in zip(model.parameters(), twin.parameters()):
        assert torch.equal(p, q), "observing changes nothing"
    run(optimizer, model, 1, first=4)
    before = {name: p.detach().clone() for name, p in twin.named_parameters()}
    fill(twin, 4)
    plain.step()
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        momentum = plain.state[q]["momentum_buffer"]
        update = q.grad.lerp(momentum, 0.95)
        polar = optimizer.budget.polar_of(name)
        assert len(polar.coefficients) == steps_of(optimizer)[name.split(".")[1]]
        expected = before[name] - 0.02 * max(1, p.size(0) / p.size(1)) ** 0.5 * polar(update)
        assert torch.allclose(p, expected, atol=1e-6), name


def test_a_budget_of_the_fewest_or_most_steps_is_that_for_all():
    for average in (3, 6):
        model = model_of()
        optimizer = make_muon(model, average_steps=average)
        optimizer.budget.sets = {k: optimizer.budget.sets[3] for k in (3, 4, 5)} | {6: optimizer.budget.sets[6]}
        assert set(steps_of(run(optimizer, model, 5)).values()) == {average}


def test_a_fraction_of_a_step_buys_something_between():
    spent = []
    for average in (4, 4.5, 5):
        model = model_of()
        made = run(make_muon(model, average_steps=average), model, 5).budget.commitment
        assert made["flops"] <= made["budget_flops"]
        spent.append(made["budget_flops"])
    assert spent[1] == pytest.approx((spent[0] + spent[2]) / 2)


def test_types_without_gradient_keep_the_optimizers_own_polar():
    model = model_of()
    optimizer = make_muon(model)
    for step in range(7):
        fill(model, step)
        if step < 6:
            for i in range(3):
                model[f"block{i}"]["wide"].weight.grad = None
        optimizer.step()
    assert sorted(steps_of(optimizer)) == ["easy", "hard"]
    assert optimizer.budget.polar_of("block0.wide.weight") == POLARS["turbo"]


def test_users_types_and_sets_and_fused_projections():
    torch.manual_seed(0)
    qkv = nn.Parameter(torch.randn(48, 16))
    sets = {2: polynomials.minimax(2, 0.1), 3: polynomials.minimax(3, 0.01)}
    amo = AMO(**QUICK | dict(average_steps=3, min_steps=2, max_steps=3, sets=sets, type_of=lambda name: "mine"))
    optimizer = Muon([{"params": [("qkv", qkv)], "split": 3}], polar="polar-express", budget=amo)
    for step in range(5):
        qkv.grad = make("gaussian", 16, 48, seed=step).T
        optimizer.step()
    (only,) = optimizer.budget.commitment["types"].items()
    assert only[0] == "mine" and only[1]["matrices"] == 3 and only[1]["shapes"] == "16×16" and only[1]["steps"] == 3


@pytest.mark.parametrize("name, average", [("amo", 5), ("turbo-amo", 4)])
def test_the_recipes_have_one_budget_for_each_optimizer_made(name, average):
    first, second = (get_optimizer(name, route(model_of()), lr=0.02) for _ in range(2))
    (a,), (b,) = budgets(first), budgets(second)
    assert a is not b and a.amo.average_steps == average
    base = {"amo": "muon", "turbo-amo": "turbo"}[name]
    assert a.polar == POLARS[base] and a.polars[average].coefficients == POLARS[base].coefficients


@pytest.mark.parametrize("at", [1, 3, 5])  # before, during and after the observation
def test_state_round_trips_through_a_file_and_continues_to_the_bit(at, tmp_path):
    straight, resumed = model_of(), model_of()
    a, b = make_muon(straight), make_muon(resumed)
    run(a, straight, 8)
    run(b, resumed, at)
    torch.save({"model": resumed.state_dict(), "optimizer": b.state_dict()}, tmp_path / "checkpoint.pt")
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed = model_of(seed=1)
    b = make_muon(resumed)
    resumed.load_state_dict(saved["model"])
    b.load_state_dict(saved["optimizer"])
    run(b, resumed, 8 - at, first=at)
    assert a.budget.commitment == b.budget.commitment
    for p, q in zip(straight.parameters(), resumed.parameters()):
        assert torch.equal(p, q)


def test_a_checkpoint_of_another_kind_of_budget_is_refused():
    model = model_of()
    with_budget, without = make_muon(model), Muon(list(model.named_parameters()))
    with pytest.raises(ValueError, match="budget"):
        with_budget.load_state_dict(without.state_dict())
    with pytest.raises(ValueError, match="budget"):
        without.load_state_dict(with_budget.state_dict())


@pytest.mark.parametrize("mistake, says", [
    (lambda: AMO(average_steps=7), "min_steps <= average_steps <= max_steps.*7"),
    (lambda: AMO(observe_start=5, observe_end=5), "observe_start < observe_end.*5, 5"),
    (lambda: AMO(matrices=0), "matrices >= 1"),
    (lambda: AMO().polars(POLARS["polar-express"]), "sets="),
    (lambda: AMO(max_steps=7).polars(POLARS["turbo"]), "has no 7 steps.*\\[3, 4, 5, 6\\]"),
    (lambda: AMO(sets={3: polynomials.MUON}).polars(POLARS["muon"]), "has no 3 steps"),
    (lambda: scaled_gram(torch.ones(2, 3), "spectral"), "'spectral'.*aol or frobenius"),
])
def test_mistakes_are_named(mistake, says):
    with pytest.raises(ValueError, match=says):
        mistake()


# --- many ranks ------------------------------------------------------------------------------------------------------


def train_ranks(rank, size, folder):
    model, said = model_of(), []
    optimizer = make_muon(model, say=said.append)
    for step in range(7):
        fill(model, step, slice(4 * rank // size, 4 * (rank + 1) // size))
        optimizer.step()
    torch.save({"model": model.state_dict(), "commitment": optimizer.budget.commitment, "said": said,
                "samples": sum(map(len, optimizer.budget.samples.values()))}, f"{folder}/{size}_{rank}.pt")


@pytest.mark.parametrize("size", [2])
def test_all_ranks_commit_to_what_one_rank_would(size, tmp_path):
    for count in (1, size):
        run_ranks(train_ranks, count, tmp_path)
    alone, *every = [torch.load(tmp_path / f"{count}_{rank}.pt") for count in (1, size) for rank in range(count)]
    assert sum(one["samples"] for one in every) == alone["samples"] == 9
    assert sum(one["samples"] > 0 for one in every) > 1, "ranks sample what they hold"
    assert [len(one["said"]) for one in every] == [1] + [0] * (size - 1)
    for one in every:
        assert one["commitment"] == every[0]["commitment"]
        for kind, types in alone["commitment"]["types"].items():
            assert one["commitment"]["types"][kind]["steps"] == types["steps"]
            assert one["commitment"]["types"][kind]["residual"] == pytest.approx(types["residual"], rel=1e-3)
        for name, p in alone["model"].items():
            assert torch.equal(one["model"][name], every[0]["model"][name])
            assert torch.allclose(one["model"][name], p, rtol=1e-3, atol=1e-5)


def test_padding_of_a_share_comes_back_as_zeros():
    budget = Budget(AMO(**QUICK), POLARS["turbo"], Ranks())
    budget.commitment = {"types": {"a": {"steps": 3}, "b": {"steps": 5}}}
    x = torch.stack([make("gaussian", 8, 12, seed) for seed in range(4)])[:, None]
    o, same = budget.many([x, x[:2]], [["0.a.weight", "0.b.weight", "1.a.weight"], ["a", "other.a"]])
    assert (o[3] == 0).all() and torch.equal(o[[0, 2]], budget.polars[3](x[[0, 2]]))
    assert torch.equal(o[1], budget.polars[5](x[1:2])[0]) and torch.equal(same, budget.polars[3](x[:2]))


def test_the_fused_kernels_do_the_same_with_types_of_different_steps():
    found = []
    for engine in ("eager", "fused"):
        budget = Budget(AMO(**QUICK), replace(POLARS["turbo"], engine=engine), Ranks())
        budget.commitment = {"types": {"a": {"steps": 3}, "b": {"steps": 4}}}
        x = torch.stack([make("gaussian", 16, 24, seed) for seed in range(3)])[:, None]
        tall = make("student-t2", 16, 40, 5).T[None, None]
        found.append(budget.many([x, tall], [["0.a.weight", "0.b.weight", "1.a.weight"], ["0.b.weight"]]))
    for eager, fused in zip(*found):
        assert fused.dtype == torch.float16 and fused.shape == eager.shape
        assert (fused.float() - eager).norm() < 0.02 * eager.norm()


def test_compiling_runs_every_number_of_steps_on_about_a_types_share_of_each_batch():
    class Recorder:
        seen = []

        def many(self, updates):
            self.seen.append([tuple(update.shape) for update in updates])

    budget = Budget(AMO(**QUICK), POLARS["turbo"], Ranks())
    budget.polars = {steps: Recorder() for steps in budget.polars}
    batches = [[f"{i}.{kind}.weight" for i in range(3) for kind in "qkvo"], ["0.up.weight", "1.up.weight"]]
    budget._compile([torch.zeros(12, 1, 8, 8), torch.zeros(2, 1, 8, 32)], batches)
    assert Recorder.seen == [[(3, 1, 8, 8), (2, 1, 8, 32)]] * 4


@pytest.mark.gpu
def test_gpu_commits_like_the_cpu():
    chosen = []
    for device in ("cpu", "cuda"):
        model = model_of().to(device)
        optimizer = make_muon(model)
        for step in range(7):
            fill(model, step)
            optimizer.step()
        chosen.append({kind: one["residual"] for kind, one in optimizer.budget.commitment["types"].items()})
        assert optimizer.budget.commitment["flops"] <= optimizer.budget.commitment["budget_flops"]
    for kind, residual in chosen[0].items():
        assert chosen[1][kind] == pytest.approx(residual, rel=1e-3)


def test_every_recipe_of_the_package_can_be_asked_for_its_budgets():
    for name in OPTIMIZERS:
        assert len(budgets(get_optimizer(name, route(model_of()), lr=0.01))) == ("amo" in name)
