"""Muon, Adam and their chain: equality with torch's own, many ranks, state, and what they refuse."""

import copy

import pytest
import torch
from ranks import run_ranks
from torch import nn

from optim import (Adam, ChainedOptimizer, Muon, NonFiniteError, OPTIMIZERS, Polar, get_optimizer, polynomials, route,
                   route_table)

AS_TORCH = Polar(polynomials.MUON, dtype=torch.bfloat16)


def gradients(shape, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(steps)]


@pytest.mark.parametrize("shape", [(64, 64), (200, 64), (64, 200), (37, 101)])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust_lr_fn", [None, "original", "match_rms_adamw"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_torch_muon_to_the_bit_over_20_steps(shape, nesterov, adjust_lr_fn, weight_decay):
    torch.manual_seed(0)
    start = torch.randn(shape)
    theirs, ours, neighbour = (nn.Parameter(start.clone()) for _ in range(3))
    options = dict(lr=0.02, weight_decay=weight_decay, nesterov=nesterov, adjust_lr_fn=adjust_lr_fn)
    expected, tested = torch.optim.Muon([theirs], **options), Muon([ours, neighbour], polar=AS_TORCH, **options)
    for grad in gradients(shape, 20):
        theirs.grad, ours.grad, neighbour.grad = grad.clone(), grad.clone(), torch.randn(shape)
        expected.step()
        tested.step()
        assert torch.equal(ours, theirs)
        assert torch.equal(ours.grad, grad), "p.grad must not be written"
    assert not torch.equal(ours, start)


@pytest.mark.parametrize("shapes", [[(8, 4), (3,), (2, 3, 3, 3)]])
def test_adam_equals_torch_adamw(shapes):
    torch.manual_seed(0)
    theirs = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    ours = [nn.Parameter(p.detach().clone()) for p in theirs]
    options = dict(lr=0.01, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.1)
    expected, tested = torch.optim.AdamW(theirs, **options), Adam(ours, **options)
    for _ in range(20):
        for a, b in zip(theirs, ours):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        expected.step()
        tested.step()
    for a, b in zip(theirs, ours):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-7) and torch.equal(a.grad, b.grad)


def test_split_treats_a_fused_projection_as_separate_matrices():
    torch.manual_seed(0)
    fused, parts = nn.Parameter(torch.randn(48, 16)), [nn.Parameter(torch.empty(16, 16)) for _ in range(3)]
    for part, rows in zip(parts, fused.detach().split(16)):
        part.data.copy_(rows)
    one, many = Muon([{"params": [fused], "split": 3}]), Muon(parts)
    for grad in gradients((48, 16), 3):
        fused.grad = grad
        for part, rows in zip(parts, grad.split(16)):
            part.grad = rows.clone()
        one.step()
        many.step()
    assert torch.allclose(fused, torch.cat([p.detach() for p in parts]), atol=1e-6)


@pytest.mark.parametrize("second_moment", [None, "full", "factored"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_is_the_matrix_of_its_filters(layout, second_moment):
    torch.manual_seed(0)
    filters = nn.Parameter(torch.randn(8, 3, 3, 3).contiguous(memory_format=layout))
    matrix = nn.Parameter(filters.detach().reshape(8, 27).clone())
    a, b = (Muon([p], lr=0.1, second_moment=second_moment) for p in (filters, matrix))
    for grad in gradients((8, 27), 3):
        filters.grad, matrix.grad = grad.view(8, 3, 3, 3).contiguous(memory_format=torch.channels_last), grad.clone()
        a.step()
        b.step()
    assert torch.allclose(filters.reshape(8, 27), matrix, atol=1e-6)
    for name, value in a.state[filters].items():
        assert torch.allclose(value.reshape(b.state[matrix][name].shape), b.state[matrix][name], atol=1e-6), name


def test_a_checkpoint_does_not_depend_on_how_filters_lie_in_memory():
    torch.manual_seed(0)
    one = nn.Parameter(torch.randn(8, 3, 3, 3))
    other = nn.Parameter(one.detach().contiguous(memory_format=torch.channels_last))
    a, b = (Muon([p], lr=0.1, second_moment="full") for p in (one, other))
    for grad in gradients((8, 27), 3):
        one.grad = other.grad = grad.view(8, 3, 3, 3)
        a.step()
        if not b.steps:
            b.load_state_dict(copy.deepcopy(a.state_dict()))
            other.data.copy_(one.data)
        else:
            b.step()
        b.steps = a.steps
    assert torch.allclose(one, other, atol=1e-6)


def test_parameters_without_gradient_are_left_alone():
    torch.manual_seed(0)
    a, b = (nn.Parameter(torch.randn(8, 8)) for _ in range(2))
    alone = nn.Parameter(b.detach().clone())
    pair, single = Muon([a, b], weight_decay=0.1), Muon([alone], weight_decay=0.1)
    before = a.detach().clone()
    first, second = gradients((8, 8), 2)
    a.grad = torch.randn(8, 8)
    b.grad, alone.grad = first, first.clone()
    pair.step()
    single.step()
    moved = a.detach().clone()
    assert not torch.equal(moved, before)
    a_momentum = pair.state[a]["momentum_buffer"].clone()
    a.grad, b.grad, alone.grad = None, second, second.clone()
    pair.step()
    single.step()
    assert torch.equal(a, moved) and torch.equal(pair.state[a]["momentum_buffer"], a_momentum)
    assert torch.allclose(b, alone, atol=1e-7)


def small_model():
    torch.manual_seed(0)
    return nn.ModuleDict({"embed": nn.Embedding(20, 8), "up": nn.Linear(8, 32), "down": nn.Linear(32, 8, bias=False),
                          "square": nn.Linear(8, 8, bias=False), "head": nn.Linear(8, 20, bias=False)})


def fill_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_round_trips_through_a_file_and_continues_to_the_bit(name, tmp_path):
    straight, resumed = small_model(), small_model()
    make = lambda model: get_optimizer(name, route(model), lr=0.02, weight_decay=0.01)  # noqa: E731
    a, b = make(straight), make(resumed)
    for step in range(6):
        if step == 3:
            torch.save({"model": resumed.state_dict(), "optimizer": b.state_dict()}, tmp_path / "checkpoint.pt")
            saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
            resumed = small_model()
            b = make(resumed)
            resumed.load_state_dict(saved["model"])
            b.load_state_dict(saved["optimizer"])
        fill_gradients(straight, step)
        fill_gradients(resumed, step)
        a.step()
        b.step()
    for p, q in zip(straight.parameters(), resumed.parameters()):
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_recipe_learns(name):
    model = small_model()
    optimizer = get_optimizer(name, route(model), lr=0.02, embedding_lr=0.05, head_lr=0.01)
    tokens = torch.randint(0, 20, (256,), generator=torch.Generator().manual_seed(3))
    losses = []
    for _ in range(30):
        x = model["embed"](tokens)
        x = x + model["square"](x) + model["down"](model["up"](x).relu().square())
        loss = nn.functional.cross_entropy(model["head"](x), (3 * tokens + 1) % 20)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.25 * losses[0]


def test_adam_groups_are_marked_fused_so_that_torch_loads_their_step_to_the_device():
    p = nn.Parameter(torch.zeros(3))
    assert Adam([p]).param_groups[0]["fused"] is True  # what torch's load_state_dict decides by


def test_schedulers_and_hand_written_schedules_reach_every_optimizer():
    model = small_model()
    optimizer = get_optimizer("turbo-muon", route(model), lr=0.02)
    rates = [group["lr"] for group in optimizer.param_groups]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    fill_gradients(model, 0)
    optimizer.step()
    scheduler.step()
    inner = [group["lr"] for one in optimizer.optimizers for group in one.param_groups]
    assert inner == [rate / 2 for rate in rates] and len(optimizer.optimizers) == 2
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = 0.0
    before = model["square"].weight.detach().clone()
    optimizer.step()
    assert torch.equal(model["square"].weight, before)


def test_a_group_added_later_is_trained_and_one_that_would_not_be_is_refused():
    torch.manual_seed(0)
    a, b = (nn.Parameter(torch.randn(8, 8)) for _ in range(2))
    optimizer = Muon([a])
    a.grad = torch.randn(8, 8)
    optimizer.step()
    momentum, before = optimizer.state[a]["momentum_buffer"].clone(), b.detach().clone()
    optimizer.add_param_group({"params": [b]})
    a.grad, b.grad = torch.randn(8, 8), torch.randn(8, 8)
    optimizer.step()
    assert not torch.equal(b, before)
    assert torch.allclose(optimizer.state[a]["momentum_buffer"], momentum.lerp(a.grad, 0.05))
    with pytest.raises(ValueError, match="whose group"):
        ChainedOptimizer(optimizer).add_param_group({"params": [nn.Parameter(torch.zeros(8, 8))]})


def test_closure_is_evaluated_once_with_gradients():
    model = nn.ModuleDict({"square": nn.Linear(4, 4, bias=True)})
    optimizer, calls = get_optimizer("muon", route(model), lr=0.1), []

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        loss = model["square"](torch.ones(1, 4)).square().sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert len(calls) == 1 and loss.item() > 0


@pytest.mark.parametrize("where", ["square.weight", "embed.weight", "up.bias"])
def test_a_gradient_that_is_not_finite_is_named_with_its_step(where):
    model = small_model()
    optimizer = get_optimizer("turbo-muon", route(model), lr=0.02)
    for step in range(1, 4):
        fill_gradients(model, step)
        if step == 2:
            model.get_parameter(where).grad.view(-1)[1] = float("nan")
        optimizer.step()
    with pytest.raises(NonFiniteError, match=rf"step 2: the gradient of {where} is NaN"):
        fill_gradients(model, 4)
        optimizer.step()


def test_check_finite_waits_for_the_last_step():
    model = small_model()
    optimizer = get_optimizer("muon", route(model), lr=0.02)
    fill_gradients(model, 0)
    optimizer.step()
    optimizer.check_finite()
    model["down"].weight.grad[0, 0] = float("inf")
    optimizer.step()
    with pytest.raises(NonFiniteError, match="step 2: the gradient of down.weight"):
        optimizer.check_finite()


def test_route_finds_every_kind_and_its_table_says_so():
    groups = route(small_model())
    assert {kind: [name for name, _ in members] for kind, members in groups.items()} == {
        "matrix": ["up.weight", "down.weight", "square.weight"], "embedding": ["embed.weight"],
        "head": ["head.weight"], "scalar": ["up.bias"]}
    assert "3 tensors" in route_table(groups) and "1 of 8×32" in route_table(groups)


def test_route_takes_a_tied_head_once_and_skips_frozen_parameters():
    model = small_model()
    model["head"].weight = model["embed"].weight
    model["square"].weight.requires_grad_(False)
    names = [name for members in route(model).values() for name, _ in members]
    assert names.count("embed.weight") == 1 and "head.weight" not in names and "square.weight" not in names


@pytest.mark.parametrize("mistake, says", [
    (lambda: Muon([nn.Parameter(torch.zeros(3))]), "belong to Adam"),
    (lambda: Muon([nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64))]), "complex"),
    (lambda: Muon([{"params": [nn.Parameter(torch.zeros(4, 3))], "split": 3}]), "do not divide into split=3"),
    (lambda: Muon([nn.Parameter(torch.zeros(3, 3))], lr=-1), "lr >= 0"),
    (lambda: Muon([{"params": [nn.Parameter(torch.zeros(3, 3))], "lr": -1.0}]), "lr >= 0"),
    (lambda: Muon([nn.Parameter(torch.zeros(3, 3))], adjust_lr_fn="rms"), "original, match_rms_adamw"),
    (lambda: Adam([nn.Parameter(torch.zeros(3))], betas=(1.0, 0.9)), "betas"),
    (lambda: get_optimizer("sophia", route(small_model()), lr=1), "turbo-muon"),
    (lambda: ChainedOptimizer(Adam([nn.Parameter(torch.zeros(3))])).load_state_dict({"optimizers": []}), "holds 0"),
])
def test_mistakes_are_named(mistake, says):
    with pytest.raises(ValueError, match=says):
        mistake()


def test_a_sharded_dtensor_is_refused_rather_than_orthogonalised_as_if_whole():
    class LooksLikeDTensor(nn.Parameter):
        def to_local(self):
            return self

    with pytest.raises(ValueError, match="DTensor"):
        Muon([LooksLikeDTensor(torch.zeros(4, 4))])


# --- many ranks ------------------------------------------------------------------------------------------------------


def uneven_model():
    """Five matrices of one shape, three of another, a table that is sharded, one whose size no rank count divides."""
    torch.manual_seed(0)
    return nn.ModuleDict({f"square{i}": nn.Linear(12, 12) for i in range(5)}
                         | {f"wide{i}": nn.Linear(24, 12) for i in range(3)}
                         | {"embed": nn.Embedding(4096, 16), "odd": nn.Embedding(4099, 17)})


RECIPES = ("turbo-muon", "muon", "adamw")


def train_ranks(rank, size, folder):
    """Six steps of every recipe on this rank's share of the gradients; saves the weights."""
    for name in RECIPES:
        model = uneven_model()
        optimizer = get_optimizer(name, route(model), lr=0.02, weight_decay=0.01)
        square, table = model["square0"].weight, model["embed"].weight
        for step in range(6):
            for p in model.parameters():
                shares = torch.stack(gradients(p.shape, 4, seed=17 * step + p.numel()))  # four, dealt to the ranks
                p.grad = shares.chunk(size)[rank].mean(0)
            if step >= 3:
                model["square4"].weight.grad = None
            before = square.grad.clone(), table.grad.clone()
            optimizer.step()
            assert torch.equal(before[0], square.grad) and torch.equal(before[1], table.grad)
        optimizer.check_finite()
        torch.save(model.state_dict(), f"{folder}/{name}_{size}_{rank}.pt")
        if rank == size - 1:
            model["square1"].weight.grad = torch.full_like(model["square1"].weight, float("nan"))
        optimizer.step()
        with pytest.raises(NonFiniteError, match="square1.weight"):  # every rank hears of it
            optimizer.check_finite()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(recipe, ranks) -> one state dict a rank."""
    folder = tmp_path_factory.mktemp("ranks")
    for size in (1, 2, 4):
        run_ranks(train_ranks, size, folder)
    return lambda name, size: [torch.load(folder / f"{name}_{size}_{rank}.pt") for rank in range(size)]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", RECIPES)
def test_ranks_share_the_work_and_agree(name, size, trained):
    alone, every = trained(name, 1)[0], trained(name, size)
    for key, expected in alone.items():
        assert all(torch.equal(every[0][key], one[key]) for one in every), "ranks must stay identical"
        assert torch.allclose(every[0][key], expected, rtol=1e-4, atol=1e-6), key
