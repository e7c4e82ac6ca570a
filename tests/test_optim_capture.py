"""A step of the optimizers in a CUDA graph: learning rates on the device, and what may not happen on the host."""

import pytest
import torch
from torch import nn

import optim.finite
import optim.sharded
from kernels.graph import captured
from optim import AMO, Adam, Muon, OPTIMIZERS, get_optimizer, route

CAPTURABLE = [name for name in OPTIMIZERS if not name.endswith("amo")]


def model(device="cpu", dtype=torch.float32):
    """Two filters of one shape and one of another, small and large ones, a head, biases."""
    torch.manual_seed(0)
    made = nn.ModuleDict({"one": nn.Conv2d(4, 8, 3), "two": nn.Conv2d(4, 8, 3), "wide": nn.Conv2d(16, 130, 3),
                          "head": nn.Linear(8, 20, bias=False)})
    return made.to(device, dtype, memory_format=torch.channels_last)


def fill_gradients(model, seed):
    """In place where there are gradients already, as a graph would."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        grad = torch.randn(p.shape, generator=generator).to(p)
        if p.grad is None:
            p.grad = torch.empty_like(p)
        p.grad.copy_(grad)


def stepped(name, rates, dtype=torch.float32, **options):
    """The model after a step at each of `rates`: those of every group, in a tensor or as floats."""
    made = model(dtype=dtype)
    optimizer = get_optimizer(name, route(made), lr=0.1, weight_decay=0.1, **options)
    for seed, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        fill_gradients(made, seed)
        optimizer.step()
    return made


def difference(a, b):
    """The largest one of any parameter, relative to its largest entry."""
    return max(((p - q).abs().max() / p.abs().max()).item() for p, q in zip(a.parameters(), b.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["adamw", "turbo-muon", "muon2-f", "normuon"])
def test_a_learning_rate_in_a_tensor_is_as_good_as_a_number(name, dtype):
    rates = [0.125, 0.0625, 0.03125]
    numbers, tensors = (stepped(name, [make(rate) for rate in rates], dtype) for make in (float, torch.tensor))
    assert difference(numbers, tensors) <= (1e-6 if dtype == torch.float32 else 2e-3)
    assert difference(numbers, stepped(name, rates[:2], dtype)) > 1e-2  # each of them counts


def test_cautious_decay_takes_it_too():
    numbers, tensors = (stepped("muon", [make(0.125)] * 3, cautious=True) for make in (float, torch.tensor))
    assert difference(numbers, tensors) < 1e-6
    assert difference(numbers, stepped("muon", [0.125] * 3)) > 1e-4


class Unread(torch.Tensor):
    """Fails where the host would have to wait for its value."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        assert getattr(function, "__name__", "") not in ("item", "tolist", "__float__", "__bool__", "__int__", "cpu")
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("name", CAPTURABLE)
def test_the_host_does_not_read_a_learning_rate_on_the_device(name):
    rate = torch.tensor(0.125).as_subclass(Unread)
    with pytest.raises(AssertionError):
        float(rate)
    stepped(name, [rate, rate])


# ---------------------------------------------------------------------------------------------------------------------
# While a graph is captured


@pytest.fixture
def capture(monkeypatch):
    """capture(True): from now on the optimizers believe that a graph is captured."""
    def say(value):
        for module in (optim.sharded, optim.finite):
            monkeypatch.setattr(module, "capturing", lambda: value)

    return say


def test_the_first_step_which_makes_the_state_cannot_be_captured(capture):
    made = model()
    optimizer = get_optimizer("muon", route(made), lr=0.1)
    fill_gradients(made, 0)
    capture(True)
    with pytest.raises(RuntimeError, match="Muon: this step cannot be captured in a CUDA graph: take one before"):
        optimizer.step()
    capture(False)
    optimizer.step()
    before = made["one"].weight.detach().clone()
    capture(True)
    optimizer.step()
    assert not torch.equal(made["one"].weight, before)


def test_a_captured_step_is_not_watched_and_does_not_ask_for_what_was(capture):
    made = model()
    optimizer = get_optimizer("muon", route(made), lr=0.1)
    fill_gradients(made, 0)
    optimizer.step()
    waiting = [len(one.finite.queue) for one in optimizer.optimizers]
    capture(True)
    for _ in range(4):
        optimizer.step()
    assert [len(one.finite.queue) for one in optimizer.optimizers] == waiting and min(waiting) > 0
    capture(False)
    optimizer.check_finite()
    assert not any(one.finite.queue for one in optimizer.optimizers)


def test_what_decides_on_the_host_is_not_capturable(capture):
    p = nn.Parameter(torch.randn(8, 8))
    amo, plain, adam = Muon([p], polar="turbo", budget=AMO()), Muon([p]), Adam([p])
    assert plain.capturable and adam.capturable and not amo.capturable
    p.grad = torch.randn(8, 8)
    amo.step()
    capture(True)
    with pytest.raises(RuntimeError, match="several ranks or a budget .AMO. have a part on the host; capture the grad"):
        amo.step()


# ---------------------------------------------------------------------------------------------------------------------
# float16 weights


def test_adam_keeps_float32_moments_of_float16_weights():
    """Squares of 1e-4 are 0 in float16, those of 300 infinite."""
    for size in (1e-4, 300.0):
        p = nn.Parameter(torch.ones(64, dtype=torch.float16))
        exact = nn.Parameter(torch.ones(64))
        ours = Adam([p], lr=0.01, betas=(0.8, 0.95), eps=1e-10)
        expected = torch.optim.AdamW([exact], lr=0.01, betas=(0.8, 0.95), eps=1e-10, weight_decay=0)
        for seed in range(4):
            p.grad = (size * torch.randn(64, generator=torch.Generator().manual_seed(seed))).half()
            exact.grad = p.grad.float()
            ours.step()
            expected.step()
        assert torch.allclose(p.float(), exact, atol=4e-3) and not torch.equal(p, torch.ones_like(p))
        assert {ours.state[p][key].dtype for key in ("exp_avg", "exp_avg_sq", "step")} == {torch.float32}
        resumed = nn.Parameter(p.detach().clone())
        again = Adam([resumed], lr=0.01, betas=(0.8, 0.95), eps=1e-10)
        again.load_state_dict(ours.state_dict())
        p.grad = resumed.grad = torch.full_like(p, size)
        ours.step()
        again.step()
        assert torch.equal(p, resumed) and again.state[resumed]["exp_avg_sq"].dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", CAPTURABLE)
def test_replays_of_a_captured_step_are_steps(name, dtype):
    """At two learning rates, with gradients that change between replays."""
    plain, graphed = (model("cuda", dtype) for _ in range(2))
    expected, tested = (get_optimizer(name, route(one), lr=0.1, weight_decay=0.1) for one in (plain, graphed))
    rates = [torch.tensor(0.0, device="cuda") for _ in tested.param_groups]
    for group, rate in zip(tested.param_groups, rates):
        group["lr"] = rate
    fill_gradients(graphed, 0)
    replay = captured(tested.step)
    for seed, lr in enumerate([0.0, 0.0, 0.0, 0.125, 0.125, 0.03125]):
        if seed > 2:  # three times it has run
            fill_gradients(graphed, seed)
            for rate in rates:
                rate.fill_(lr)
            replay()
        for group in expected.param_groups:
            group["lr"] = lr
        fill_gradients(plain, seed if seed > 2 else 0)
        expected.step()
        assert difference(plain, graphed) <= 4e-3, f"step {seed}"
    expected.check_finite()
    tested.check_finite()


@pytest.mark.gpu
def test_a_captured_amo_is_refused_on_a_gpu():
    made = model("cuda")
    optimizer = get_optimizer("amo", route(made), lr=0.1)
    fill_gradients(made, 0)
    with pytest.raises(RuntimeError, match="capture the gradients alone"):
        captured(optimizer.step)
