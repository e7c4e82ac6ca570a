"""Muon², Muon²-F, NorMuon and cautious decay: against float64 in the papers' words, states, ranks, memory."""

import pytest
import torch
from ranks import run_ranks
from test_optim_muon import fill_gradients, gradients, small_model, uneven_model
from torch import nn

from optim import Muon, Polar, get_optimizer, route, state_bytes, state_table
from optim.polynomials import MUON
from optim.second_moment import moment_dtype, moment_shapes, momentum_update, row_normalised

PLAIN = Polar(MUON[:3], dtype=torch.float64)
KINDS = ("full", "factored")
NEW = ("muon2", "muon2-f", "turbo-muon2", "turbo-muon2-f", "normuon")


def fresh(kind, shape, dtype=torch.float32):
    """Momentum and moments before the first step, shape (k, n, m)."""
    moments = [torch.zeros(s, dtype=moment_dtype(dtype)) for s in moment_shapes(kind, *shape).values()]
    return torch.zeros(shape, dtype=dtype), moments


def reference(grads, kind, mu, nesterov, beta2, eps):
    """The updates of one matrix over the steps of `grads`, float64, step by step as the papers write it."""
    momentum = v = rows = columns = 0
    for grad in grads:
        grad = grad.double()
        momentum = mu * momentum + (1 - mu) * grad
        update = mu * momentum + (1 - mu) * grad if nesterov else momentum
        if kind == "full":
            v = beta2 * v + (1 - beta2) * grad**2
        else:
            rows = beta2 * rows + (1 - beta2) * (grad**2).mean(1)
            columns = beta2 * columns + (1 - beta2) * (grad**2).mean(0)
            v = torch.outer(rows, columns) / rows.mean()
        yield update / (v.sqrt() + eps)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("dtype, rounding", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("kind", KINDS)
def test_update_before_the_polar_factor(kind, dtype, rounding, nesterov):
    options = dict(mu=0.9, nesterov=nesterov, beta2=0.8, eps=0.01)
    grads = [g.to(dtype) for g in gradients((3, 5, 9), 6)]
    momentum, moments = fresh(kind, (3, 5, 9), dtype)
    references = [reference([g[k] for g in grads], kind, **options) for k in range(3)]
    for grad in grads:
        update = momentum_update(grad, momentum, moments, **options)
        expected = torch.stack([next(one) for one in references])
        assert update.dtype == dtype and all(v.dtype == moment_dtype(dtype) for v in moments)
        assert (update.double() - expected).abs().max() <= rounding * expected.abs().max()


def test_factored_equals_full_where_the_second_moment_has_rank_one():
    torch.manual_seed(0)
    left, right = torch.rand(2, 6, 1, dtype=torch.float64) + 0.1, torch.rand(2, 1, 8, dtype=torch.float64) + 0.1
    states = {kind: fresh(kind, (2, 6, 8), torch.float64) for kind in KINDS}
    for step in range(5):
        signs = torch.randn(2, 6, 8).sign().double()
        updates = [momentum_update((step + 1) * signs * left * right, *states[kind], mu=0.9, eps=1e-3)
                   for kind in KINDS]
        assert torch.allclose(*updates, rtol=1e-12)
    other = [momentum_update(gradients((2, 6, 8), 1)[0].double(), *states[kind], mu=0.9, eps=1e-3) for kind in KINDS]
    assert not torch.allclose(*other, rtol=1e-2), "of higher rank they must differ"


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros_and_one_dead_row_or_column_harms_no_other(kind):
    grad = gradients((1, 5, 7), 1)[0]
    grad[0, 2], grad[0, :, 3] = 0, 0
    update = momentum_update(grad, *fresh(kind, (1, 5, 7)), mu=0.9)
    assert update.isfinite().all() and not update[0, 2].any() and not update[0, :, 3].any()
    assert (update[0, [0, 1, 3, 4]][:, [0, 1, 2, 4, 5, 6]] != 0).all()
    assert not momentum_update(torch.zeros(1, 5, 7), *fresh(kind, (1, 5, 7)), mu=0.9).any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_scale_of_gradients_and_of_v_does_not_matter_but_for_epsilon(kind):
    grad = gradients((2, 5, 9), 1)[0]
    update = momentum_update(grad, *fresh(kind, grad.shape), mu=0.9)
    tiny = momentum_update(1e-4 * grad, *fresh(kind, grad.shape), mu=0.9)
    assert torch.allclose(tiny, update, rtol=1e-3)
    slower = momentum_update(grad, *fresh(kind, grad.shape), mu=0.9, beta2=0.99)  # first step: v is 5 times smaller
    assert torch.allclose(slower, update * 5**0.5, rtol=1e-4)


def test_rows_after_the_polar_factor():
    """NorMuon's algorithm (arXiv 2510.05491), the norm kept as in its authors' code."""
    rows, v = torch.zeros(3, 5), torch.zeros(3, 5, dtype=torch.float64)
    for o in gradients((3, 5, 9), 6):
        before, exact = o.clone(), o.double()
        v = 0.9 * v + 0.1 * exact.square().mean(-1)
        expected = exact / (v.sqrt() + 0.01).unsqueeze(-1)
        expected *= exact.norm(dim=(1, 2), keepdim=True) / expected.norm(dim=(1, 2), keepdim=True)
        result = row_normalised(o, rows, beta2=0.9, eps=0.01)
        assert torch.equal(o, before) and torch.allclose(result.double(), expected, rtol=1e-5)
        assert torch.allclose(rows.double(), v, rtol=1e-5)


def test_rows_of_one_first_step_are_of_equal_size_and_zeros_stay_zeros():
    o = torch.diag(torch.arange(6.0))[None].half()
    result = row_normalised(o.mT, torch.zeros(1, 6))
    assert result.dtype == torch.float16 and not result[0, 0].any()
    assert torch.allclose(result[0].float().norm(dim=1)[1:], torch.full((5,), (55 / 5) ** 0.5), rtol=2e-3)
    assert not row_normalised(torch.zeros(1, 4, 5), torch.zeros(1, 4)).any()


def whole_step(w, grads, kind, rows, cautious, lr=0.1, decay=0.3, eps=1e-10):
    """Muon with everything, in float64: the weights of one matrix after the steps of `grads`."""
    w, v = w.double(), torch.zeros(w.size(0), dtype=torch.float64)
    for x in reference(grads, kind, 0.95, True, 0.95, eps):
        x = x / x.norm()
        for a, b, c in PLAIN.coefficients:
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        if rows:
            v = 0.95 * v + 0.05 * x.square().mean(1)
            scaled = x / (v.sqrt() + eps).unsqueeze(1)
            x = scaled * x.norm() / scaled.norm()
        mask = (x * w >= 0).double() if cautious else 1
        w = w - lr * decay * mask * w - lr * max(1, w.size(0) / w.size(1)) ** 0.5 * x
    return w


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_whole_steps_of_muon(shape, kind, rows, cautious):
    torch.manual_seed(0)
    start = [torch.randn(shape) for _ in range(2)]
    params = [nn.Parameter(w.clone().double()) for w in start]
    optimizer = Muon(params, lr=0.1, weight_decay=0.3, polar=PLAIN, second_moment=kind, row_normalize=rows,
                     cautious=cautious)
    grads = [gradients(shape, 5, seed) for seed in (1, 2)]
    for step in range(5):
        for p, own in zip(params, grads):
            p.grad = own[step].double()
        optimizer.step()
    for p, w, own in zip(params, start, grads):
        assert torch.allclose(p, whole_step(w, own, kind, rows, cautious), rtol=1e-9, atol=1e-12)


def test_cautious_decay_spares_what_the_update_would_enlarge():
    w = nn.Parameter(torch.tensor([[2.0, -2.0], [-3.0, 3.0]]))
    w.grad = torch.tensor([[1.0, 1.0], [1.0, -1.0]])  # orthogonal already; its sign agrees with W's in one entry
    before = w.detach().clone()
    still = Muon([w], lr=1e-6, weight_decay=1e5, cautious=True, polar=Polar(MUON, dtype=torch.float64))
    still.step()
    agree = (w.grad * before) > 0
    assert agree.tolist() == [[True, False], [False, False]]
    assert torch.allclose(w, torch.where(agree, before * 0.9, before), atol=1e-5)


@pytest.mark.parametrize("options", [dict(second_moment="full"), dict(second_moment="factored"),
                                     dict(row_normalize=True), dict(second_moment="factored", row_normalize=True)])
def test_split_convolution_and_sleep(options):
    """A fused projection is three matrices, a filter bank one, and who sleeps keeps weights and all state."""
    torch.manual_seed(0)
    fused, parts = nn.Parameter(torch.randn(48, 16)), [nn.Parameter(torch.empty(16, 16)) for _ in range(3)]
    for one, rows in zip(parts, fused.detach().split(16)):
        one.data.copy_(rows)
    filters = nn.Parameter(torch.randn(8, 3, 3, 3))
    matrix = nn.Parameter(filters.detach().reshape(8, 27).clone())
    sleeper = nn.Parameter(torch.randn(16, 16))
    one = Muon([{"params": [fused], "split": 3}, {"params": [filters]}], **options)
    many = Muon([*parts, sleeper, matrix], **options)
    for step, grad in enumerate(gradients((48, 16), 5)):
        fused.grad = grad
        for p, rows in zip(parts, grad.split(16)):
            p.grad = rows.clone()
        filters.grad = torch.randn(8, 3, 3, 3)
        matrix.grad = filters.grad.reshape(8, 27).clone()
        sleeper.grad = torch.randn(16, 16) if step < 2 else None
        asleep = [sleeper.detach().clone(), *(v.clone() for v in many.state[sleeper].values())]
        one.step()
        many.step()
        after = [sleeper.detach(), *many.state[sleeper].values()]
        assert step == 0 or all(torch.equal(a, b) for a, b in zip(asleep, after)) == (step >= 2)
    assert torch.allclose(fused, torch.cat([p.detach() for p in parts]), atol=1e-5)
    assert torch.allclose(filters.reshape(8, 27), matrix, atol=1e-5)


def test_with_no_second_moment_nothing_else_is_held_or_changed():
    p, q = nn.Parameter(torch.ones(4, 6)), nn.Parameter(torch.ones(4, 6))
    plain, lively = Muon([p]), Muon([q], beta2=0.5, second_moment_eps=1.0)
    for grad in gradients((4, 6), 3):
        p.grad, q.grad = grad, grad.clone()
        plain.step()
        lively.step()
    assert list(plain.state[p]) == ["momentum_buffer"] and torch.equal(p, q)


@pytest.mark.parametrize("options", [dict(second_moment="full"), dict(second_moment="factored"),
                                     dict(row_normalize=True, second_moment="full", cautious=True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_survives_a_file_to_the_bit_also_beside_bfloat16_weights(dtype, options, tmp_path):
    """torch's load_state_dict casts states to the dtype of the weights, which must not reach the moments."""
    torch.manual_seed(0)
    start = torch.randn(8, 12).to(dtype)
    straight, resumed = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    a, b = Muon([straight], weight_decay=0.1, **options), Muon([resumed], weight_decay=0.1, **options)
    for step, grad in enumerate(gradients((8, 12), 8)):
        straight.grad, resumed.grad = grad.to(dtype), grad.to(dtype)
        if step == 4:
            torch.save(b.state_dict(), tmp_path / "state.pt")
            resumed = nn.Parameter(resumed.detach().clone())
            resumed.grad = grad.to(dtype)
            b = Muon([resumed], weight_decay=0.1, **options)
            b.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
            saved = b.state_dict()["state"][0]
            assert {v.dtype for k, v in saved.items() if k != "momentum_buffer"} == {torch.float32}
        a.step()
        b.step()
    assert torch.equal(straight, resumed)
    assert all(torch.equal(a.state[straight][key], b.state[resumed][key]) for key in a.state[straight])
    assert not torch.equal(straight, start)


def stepped(**options):
    p = nn.Parameter(torch.ones(4, 6))
    p.grad = gradients((4, 6), 1)[0]
    optimizer = Muon([p], **options)
    optimizer.step()
    return optimizer


def test_a_checkpoint_from_before_these_options_still_loads():
    saved = stepped().state_dict()
    for option in ("second_moment", "row_normalize", "beta2", "second_moment_eps", "cautious"):
        del saved["param_groups"][0][option]
    optimizer = stepped()
    optimizer.load_state_dict(saved)
    optimizer.step()
    with pytest.raises(ValueError, match="second_moment=None, this optimizer 'full'"):
        stepped(second_moment="full").load_state_dict(saved)


def incomplete():
    optimizer = stepped(second_moment="factored")
    saved = optimizer.state_dict()
    del saved["state"][0]["second_moment_rows"]
    optimizer.load_state_dict(saved)
    optimizer.step()


@pytest.mark.parametrize("mistake, says", [
    (lambda: Muon([nn.Parameter(torch.zeros(3, 3))], second_moment="rows"), "'full', 'factored'"),
    (lambda: Muon([nn.Parameter(torch.zeros(3, 3))], beta2=1.0), "beta2 < 1"),
    (lambda: Muon([nn.Parameter(torch.zeros(3, 3))], second_moment_eps=0.0), "second_moment_eps > 0"),
    (lambda: stepped(second_moment="full").load_state_dict(stepped(second_moment="factored").state_dict()),
     "second_moment='factored', this optimizer 'full'"),
    (lambda: stepped(row_normalize=True).load_state_dict(stepped().state_dict()), "row_normalize=False"),
    (incomplete, "holds momentum_buffer, second_moment_columns"),
    (lambda: get_optimizer("adamw", route(small_model()), lr=0.1, cautious=True), "cautious: options of Muon"),
    (lambda: momentum_update(torch.zeros(1, 2, 2).double(), torch.zeros(1, 2, 2).double(), mu=0.9, engine="fused"),
     "not torch.float64"),
])
def test_mistakes_are_named(mistake, says):
    with pytest.raises(ValueError, match=says):
        mistake()


def test_recipes_are_what_their_papers_say_and_options_go_through():
    matrices = {name: get_optimizer(name, route(small_model()), lr=0.1).optimizers[0] for name in NEW}
    kinds = {name: muon.param_groups[0]["second_moment"] for name, muon in matrices.items()}
    assert kinds == {"muon2": "full", "muon2-f": "factored", "turbo-muon2": "full", "turbo-muon2-f": "factored",
                     "normuon": None}
    assert matrices["muon2"].polar.coefficients == ((3.4445, -4.7750, 2.0315),) * 3
    assert matrices["muon2"].polar.normalize == "frobenius" and matrices["turbo-muon2"].polar.normalize == "aol"
    assert matrices["normuon"].param_groups[0]["row_normalize"] and len(matrices["normuon"].polar.coefficients) == 5
    changed = get_optimizer("turbo-muon2-f", route(small_model()), lr=0.1, polar="turbo-3", cautious=True, beta2=0.9)
    group = changed.optimizers[0].param_groups[0]
    assert len(changed.optimizers[0].polar.coefficients) == 3 and group["cautious"] and group["beta2"] == 0.9


def test_memory_of_a_matrix_n_by_m():
    """float32: 4 bytes an element of momentum; 4 more for V, or n + m numbers instead."""
    expected = {"muon": 4 * 768, "muon2": 8 * 768, "muon2-f": 4 * (768 + 24 + 32), "normuon": 4 * (768 + 24)}
    for name, size in expected.items():
        model = nn.ModuleDict({"up": nn.Linear(32, 24, bias=False), "embed": nn.Embedding(20, 8)})
        optimizer = get_optimizer(name, route(model), lr=0.1)
        assert state_bytes(optimizer) == [] and state_table(optimizer) == ""
        fill_gradients(model, 0)
        optimizer.step()
        assert state_bytes(optimizer)[0] == ("matrix", "up.weight", 768, size)
        first, second = state_table(optimizer).splitlines()
        assert first.startswith("matrix") and f"{size / 768:.3f} each" in first and second.startswith("embedding")


# --- many ranks ------------------------------------------------------------------------------------------------------

RANKED = {"muon2": {}, "turbo-muon2-f": dict(cautious=True, row_normalize=True), "normuon": {}}


def train_ranks(rank, size, folder):
    """Six steps of every recipe on this rank's share of the gradients, resumed in the middle; saves the weights."""
    for name, options in RANKED.items():
        model = uneven_model()
        optimizer = get_optimizer(name, route(model), lr=0.02, weight_decay=0.1, **options)
        for step in range(6):
            for p in model.parameters():
                shares = torch.stack(gradients(p.shape, 4, seed=17 * step + p.numel()))  # four, dealt to the ranks
                p.grad = shares.chunk(size)[rank].mean(0)
            if step in (3, 4):
                model["square4"].weight.grad = None
            if step == 2:
                saved = optimizer.state_dict()
                optimizer = get_optimizer(name, route(model), lr=0.02, weight_decay=0.1, **options)
                optimizer.load_state_dict(saved)
            optimizer.step()
        optimizer.check_finite()
        held = sum(entry[3] for entry in state_bytes(optimizer) if entry[0] == "matrix")
        torch.save((model.state_dict(), held), f"{folder}/{name}_{size}_{rank}.pt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(recipe, ranks) -> (state dict, bytes of the matrices' state) of every rank."""
    folder = tmp_path_factory.mktemp("ranks")
    for size in (1, 2):
        run_ranks(train_ranks, size, folder)
    return lambda name, size: [torch.load(folder / f"{name}_{size}_{rank}.pt") for rank in range(size)]


@pytest.mark.parametrize("size", [2])
@pytest.mark.parametrize("name", RANKED)
def test_ranks_share_work_and_state_and_agree(name, size, trained):
    (alone, whole), every = trained(name, 1)[0], trained(name, size)
    assert sum(held for _, held in every) == whole and max(held for _, held in every) < whole
    for key, expected in alone.items():
        assert all(torch.equal(every[0][0][key], one[key]) for one, _ in every), "ranks must stay identical"
        assert torch.allclose(every[0][0][key], expected, rtol=1e-5, atol=1e-5), key
