"""train_cifar.py: tiny runs from images to record, what they must not depend on, and their parts against references."""

import contextlib
import io
import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_cifar
from data import cifar10
from kernels.conv_pool import Cut, conv_pool
from optim import OPTIMIZERS, get_polar, route
from records.log import Record, parse_log, unpack_source
from records.runs import read_experiment, read_run
from records.settings import SettingsError
from records.verify import verify
from train_cifar import PRESETS, Net, Settings, Trainer, lr_scale, whiten_lr_scale, whitening_filters

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("one_thread")
TINY = dict(preset="local", device="cpu", train_images=300, test_images=120, width1=8, width2=16, width3=16, epochs=3.5,
            batch_size=50)
CPU = torch.device("cpu")


def arguments(records, **changes) -> list[str]:
    """The command line of a tiny run."""
    options = TINY | dict(records=records) | changes
    return [text for key, value in options.items() for text in ("--" + key.replace("_", "-"), str(value).lower()
            if isinstance(value, bool) else str(value))]


def train(records, **changes) -> str:
    """A tiny run in this process; returns what it printed."""
    stdout, words = io.StringIO(), arguments(records, **changes)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stdout):
        patch.setattr(train_cifar, "end_on_signal", lambda message: None)  # pytest keeps its own handlers
        patch.setattr(Record, "_draw", lambda record: None)  # half a second each
        patch.setattr("sys.argv", ["train_cifar.py", *words])
        train_cifar.main(words)
    return stdout.getvalue()


def only_record(records) -> dict:
    """The content of the one record.json below `records`, and its "folder"."""
    [path] = Path(records).glob("*/*/record.json")
    return json.loads(path.read_text()) | {"folder": path.parent}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    stdout = train(folder)
    return only_record(folder) | {"stdout": stdout}


@pytest.fixture(scope="module")
def data():
    return cifar10.synthetic(TINY["train_images"], TINY["test_images"])


def trainer(data, **changes) -> Trainer:
    """Ready to run; `prepare` is called."""
    made = Trainer(Settings(**PRESETS["local"] | TINY | changes), CPU, *data)
    made.prepare()
    return made


# ---------------------------------------------------------------------------------------------------------------------
# A run and its record


def test_a_run_leaves_a_complete_record_that_verifies(finished):
    assert finished["status"] == "complete" and finished["steps"] == 21  # 3.5 epochs of 6 steps
    assert finished["accuracy"] == finished["extra"]["test accuracy"]
    [point] = finished["validation"]
    assert point["step"] == 21 and point["tokens"] == 21 * 50 and 0 < point["train_time_s"] == finished["train_time_s"]
    extra = finished["extra"]
    assert len(extra["first losses"]) == 10 and extra["first losses"][0] == pytest.approx(math.log(10), abs=0.3)
    assert list(extra["phases_s"]) == ["whitening and draws", "training", "evaluation"]
    assert sum(extra["phases_s"].values()) == pytest.approx(finished["train_time_s"], abs=0.005)
    assert {"augmentation and whitening", "forward", "backward", "muon: orthogonalise"} <= set(extra["step_parts_ms"])
    assert all(ms > 0 for ms in extra["step_parts_ms"].values())
    assert set(finished["data"]) == {"synthetic_train_300", "synthetic_test_120"}  # said to be what it is
    assert verify(finished["folder"]) == []
    facts, curve = parse_log((finished["folder"] / "log.txt").read_text())
    assert facts["result"]["status"] == "complete" and len(curve) == 1
    files = unpack_source((finished["folder"] / "source.txt").read_bytes())
    assert {"train_cifar.py", "data/cifar10.py", "data/views.py", "kernels/augment.py", "optim/muon.py"} <= set(files)


def test_what_is_printed_says_accuracy_time_and_where_it_went(finished):
    for words in ("accuracy   0.", "seconds    ", "training", "forward", "seed 0 on cpu", "step:21/21"):
        assert words in finished["stdout"]


def test_a_track_of_accuracy_gets_accuracy_and_another_the_loss(tmp_path, data, monkeypatch):
    monkeypatch.setattr(train_cifar, "open_data", lambda s: data)
    train(tmp_path, track="cifar10-94", source="official", target=0.02)
    record = only_record(tmp_path)
    assert record["accuracy"] == record["extra"]["test accuracy"] > 0.02 and record["reached"]
    train(tmp_path, track="somewhere", target="none", name="loss")
    [path] = tmp_path.glob("somewhere/*/record.json")
    record = json.loads(path.read_text())
    assert record["val_loss"] == record["extra"]["test loss"] and "accuracy" not in record


def test_the_seed_decides_everything(finished, tmp_path):
    train(tmp_path / "same")
    train(tmp_path / "other", seed=1)
    same, other = (only_record(tmp_path / name)["extra"] for name in ("same", "other"))
    for key in ("first losses", "test accuracy", "test loss"):
        assert same[key] == finished["extra"][key]  # to the last bit on one machine
    assert other["first losses"] != same["first losses"] and other["test loss"] != same["test loss"]


def test_it_learns(tmp_path):
    train(tmp_path, train_images=1500, test_images=300, epochs=4)
    assert only_record(tmp_path)["extra"]["test accuracy"] > 0.35  # one in ten by chance


def test_runs_in_one_process_are_those_of_many(finished, tmp_path):
    stdout = train(tmp_path, runs=3, name="three")
    [folder] = tmp_path.glob("*/*_three")
    assert verify(folder) == []
    experiment = read_experiment(folder)
    runs = experiment.arms["three"]
    assert [run.seed for run in runs] == [0, 1, 2] and all(run.complete for run in runs)
    ledger = experiment.ledger
    assert ledger["status"] == "complete" and ledger["question"]["runs"] == 3 and len(ledger["runs"]) == 3
    first = json.loads((runs[0].folder / "record.json").read_text())
    assert first["extra"]["first losses"] == finished["extra"]["first losses"]
    train(tmp_path / "alone", seed=2)
    last = json.loads((runs[2].folder / "record.json").read_text())
    assert last["extra"]["test loss"] == only_record(tmp_path / "alone")["extra"]["test loss"]
    accuracies = [json.loads((run.folder / "record.json").read_text())["extra"]["test accuracy"] for run in runs]
    found = ledger["statistics"]
    assert found["accuracy"] == {"mean": pytest.approx(statistics.fmean(accuracies)), "min": min(accuracies),
                                 "sd": pytest.approx(statistics.stdev(accuracies)), "max": max(accuracies)}
    assert found["seconds"]["mean"] == pytest.approx(statistics.fmean(run.train_time_s for run in runs), abs=0.001)
    assert found["runs"] == 3 and "run 3/3 seed 2: " in stdout and f"sd {found['accuracy']['sd']:.5f}" in stdout
    assert not (folder / "running").exists()


def test_of_the_processes_that_torchrun_starts_for_several_gpus_one_trains(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert train(tmp_path) == "" and not list(tmp_path.iterdir())


def test_a_run_that_fails_is_in_the_ledger_and_ends_the_series(tmp_path, monkeypatch, capsys):
    run, seeds = Trainer.run, []

    def breaks(self, seed, *rest):
        seeds.append(seed)
        if len(seeds) == 2:
            raise train_cifar.NonFiniteError("the loss of step 3 is nan")
        return run(self, seed, *rest)

    monkeypatch.setattr(Trainer, "run", breaks)
    with pytest.raises(SystemExit) as ended:
        train(tmp_path, runs=3)
    assert ended.value.code == 1 and seeds == [0, 1]
    assert capsys.readouterr().err == "train_cifar.py: the loss of step 3 is nan\n"
    [file] = tmp_path.glob("*/*/experiment.json")
    ledger = json.loads(file.read_text())
    assert [entry["status"] for entry in ledger["runs"]] == ["complete", "failed"] and ledger["status"] == "stopped"
    assert "the loss of step 3 is nan" in read_run(file.parent / ledger["runs"][1]["folder"]).message
    assert verify(file.parent) == []  # two runs are still to come, which is true


# ---------------------------------------------------------------------------------------------------------------------
# The same training by other ways


@pytest.fixture(scope="module")
def losses(data):
    return trainer(data).run(5).losses


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run in the interpreter only where there is no GPU")
@pytest.mark.parametrize("changes", [dict(width1=32), dict(depth=3, cutout=8, activation="silu")], ids=["94", "96"])
def test_fused_kernels_train_as_torch_does(data, changes, monkeypatch):
    pooled, large = [], Cut(1024, stages=1, width=128, resident=False)  # few tiles: the interpreter's time
    monkeypatch.setattr("kernels.conv_pool.EXACT", dict(forward=large, weight_sums=large))
    monkeypatch.setattr(train_cifar, "conv_pool", lambda *tensors: pooled.append(1) or conv_pool(*tensors))
    small = dict(epochs=0.5, batch_size=4, train_images=16, test_images=4, whiten_epochs=0.25, views=2, **changes)
    eager, fused = (trainer(data, engine=engine, **small).run(5) for engine in ("eager", "fused"))
    assert bool(pooled) == ("width1" in changes)  # 8 filters are too few for it
    assert fused.losses == pytest.approx(eager.losses, abs=2e-3) and len(fused.losses) == 2  # with and without bias
    assert fused.test_loss == pytest.approx(eager.test_loss, abs=5e-3)


def test_half_precision_begins_as_single_does(data):
    """Of weights and activations; what a GPU does in float16 can be done on a CPU, slowly."""
    small = dict(epochs=0.5, batch_size=10, train_images=60, test_images=10, views=2)
    half, single = (trainer(data, dtype=dtype, **small).run(5) for dtype in ("float16", "float32"))
    assert half.losses == pytest.approx(single.losses, abs=1e-2) and half.losses != single.losses


def not_captured(work, before=lambda: None, pool=None):
    """Stands in for a CUDA graph: the work again, after as many calls of it as capturing takes."""
    for _ in range(3):
        before()
        work()
    before()
    work()
    return work


def graphed(data, graph, monkeypatch, **changes) -> Trainer:
    """Ready to run as a GPU would: what graphs hold is called instead of replayed."""
    monkeypatch.setattr(train_cifar, "captured", not_captured)
    made = Trainer(Settings(**PRESETS["local"] | TINY | changes), CPU, *data)
    made.graph = graph
    made.prepare()
    return made


def test_a_graph_of_the_gradients_changes_nothing(data, losses, monkeypatch):
    made = graphed(data, "gradients", monkeypatch)
    assert made.graph == "gradients"
    assert made.run(5).losses == losses and made.run(6).losses != losses and made.run(5).losses == losses


@pytest.mark.parametrize("changes", [dict(), dict(rest="adam", bias_lr=0.01, head_lr=0.05, optimizer="muon2"),
                                     dict(optimizer="adamw", lr=0.01, depth=3, whiten_epochs=0)], ids=str)
def test_a_graph_of_the_whole_step_changes_nothing_but_rounding(data, monkeypatch, changes):
    """Learning rates are float32 in it, from a table that the step's number on the device looks up."""
    changes = dict(epochs=1.25, whiten_epochs=0.5) | changes
    expected = trainer(data, **changes)
    at_first = expected.run(5)
    weights = [p.detach().clone() for p in expected.params]
    made = graphed(data, "auto", monkeypatch, **changes)
    assert made.graph == "step" and all(isinstance(group["lr"], torch.Tensor) for group in made.groups)
    found = made.run(5)
    assert found.losses == pytest.approx(at_first.losses, abs=1e-5)
    assert found.test_loss == pytest.approx(at_first.test_loss, abs=1e-5)
    for p, weight in zip(made.params, weights):
        torch.testing.assert_close(p, weight, rtol=0, atol=1e-4)
    assert made.step.item() == made.s.steps
    assert [float(group["lr"]) for group in made.groups] == pytest.approx(made.rates_at(made.s.steps - 1))


@pytest.mark.parametrize("changes", [dict(), dict(rest="adam", bias_lr=0.01, head_lr=0.05, optimizer="muon2-f")],
                         ids=str)
def test_a_run_of_replays_begins_as_the_first_did(data, monkeypatch, changes):
    """The state of the optimizers stays where it is and is all as before the first step."""
    made = graphed(data, "step", monkeypatch, epochs=1, **changes)
    first, held = made.run(5), [value.data_ptr() for value in state_of(made)]
    weights = [p.detach().clone() for p in made.params]
    other, again = made.run(6), made.run(5)
    assert first.losses == again.losses != other.losses and first.test_loss == again.test_loss
    assert all(torch.equal(p, weight) for p, weight in zip(made.params, weights))
    assert [value.data_ptr() for value in state_of(made)] == held and len(held) >= 14  # of 14 parameters
    made.reset(5)
    assert not any(value.any() for value in state_of(made))


def state_of(made: Trainer) -> list[torch.Tensor]:
    banks = [value for one in made.matrices.optimizers for bank in one.banks for value in bank.state.values()]
    return banks + [value for one in (*made.matrices.optimizers, made.rest) for state in one.state.values()
                    for value in state.values() if value is not None]


def test_what_cannot_be_captured_is_said_and_gets_a_graph_of_its_gradients(data, monkeypatch):
    with pytest.raises(SettingsError, match="--graph step: --optimizer amo with --rest sgd cannot be captured"):
        graphed(data, "step", monkeypatch, optimizer="amo")
    assert graphed(data, "auto", monkeypatch, optimizer="amo", epochs=0.5).graph == "gradients"


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_of_the_package_takes_the_filters(data, optimizer):
    found = trainer(data, optimizer=optimizer, epochs=0.4, lr=0.01 if optimizer == "adamw" else 0.1).run(0)
    assert len(found.losses) == 3 and all(math.isfinite(loss) for loss in found.losses)


def test_another_polar_takes_the_place_of_the_recipe_s(data):
    assert trainer(data, optimizer="muon2").matrices.optimizers[0].polar == get_polar("muon-3")
    assert trainer(data, optimizer="muon2", polar="turbo-3").matrices.optimizers[0].polar == get_polar("turbo-3")


def test_adam_takes_biases_and_head(data):
    found = trainer(data, rest="adam", rest_momentum=0.8, bias_lr=0.01, head_lr=0.05).run(0)
    assert found.losses[-1] < found.losses[0] - 0.05


def test_rounds_of_a_trainer_start_afresh(data):
    made = trainer(data)
    first, other, again = made.run(1), made.run(2), made.run(1)
    assert first.losses == again.losses != other.losses and first.test_loss == again.test_loss


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def test_whitened_patches_are_white(data):
    pixels = torch.from_numpy(data[0].pixels[:200])
    filters = whitening_filters(pixels)
    assert filters.shape == (24, 3, 2, 2) and torch.equal(filters[12:], -filters[:12])
    x = (pixels.permute(0, 3, 1, 2).float() / 255 - torch.tensor((0.4914, 0.4822, 0.4465))[:, None, None])
    x = x / torch.tensor((0.2470, 0.2435, 0.2616))[:, None, None]
    responses = F.conv2d(x, filters[:12]).double().transpose(0, 1).flatten(1)
    second_moments = responses @ responses.T / responses.size(1)
    assert (second_moments - torch.diag(second_moments.diagonal())).abs().max() < 1e-3
    assert (second_moments.diagonal() - 1).abs().max() < 0.05  # but for ε, which counts little in noisy images
    largest = filters[:12].flatten(1).gather(1, filters[:12].flatten(1).abs().argmax(1, keepdim=True))
    assert (largest > 0).all()  # no sign is left to chance


def test_initial_weights_pass_their_input_on_and_depend_on_the_seed():
    net = Net(Settings(**PRESETS["local"] | TINY), fused=False)
    net.reset(3)
    weight = net.groups[1].convs[0].weight  # 8 -> 16
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(F.conv2d(x, weight, padding=1)[:, :8], x)
    bound = (8 * 9) ** -0.5
    assert 0.9 * bound < weight[8:].abs().max() <= bound and net.head.weight.std().item() == pytest.approx(1, abs=0.15)
    before = {name: p.clone() for name, p in net.named_parameters()}
    net.reset(4)
    assert not torch.equal(net.head.weight, before["head.weight"])
    net.reset(3)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


@pytest.mark.parametrize("changes, matrices, parameters", [(dict(), 6, 2_000_000), (PRESETS["96"], 9, 11_000_000)])
def test_the_record_networks_are_those_of_airbench(changes, matrices, parameters):
    s = Settings(**changes)
    with torch.device("meta"):
        routed = route(Net(s, fused=False))
    shapes = [tuple(p.shape) for _, p in routed["matrix"]]
    assert len(shapes) == matrices and shapes[0] == (s.width1, 24, 3, 3) and shapes[-1] == (s.width3, s.width3, 3, 3)
    assert sum(math.prod(shape) for shape in shapes) == pytest.approx(parameters, rel=0.1)
    assert [name for name, _ in routed["head"]] == ["head.weight"] and len(routed["scalar"]) == 1 + matrices


def test_the_default_is_197_steps():
    s = Settings()
    assert (s.steps, s.epoch_steps, s.whiten_steps, s.batch_size) == (197, 25, 25, 2000)


def test_filters_have_the_norm_of_their_number_before_each_step(data):
    made, norms = trainer(data), []
    step = made.matrices.step
    made.matrices.step = lambda: (norms.append([f.norm().item() for f in made.filters]), step())
    made.gradients(True)
    made.update()
    assert norms[0] == pytest.approx([len(f) ** 0.5 for f in made.filters], rel=1e-5)


def test_rates_fall_to_nothing_and_the_whitening_bias_stops_before(data):
    made = trainer(data, whiten_epochs=2)
    s = made.s
    assert [lr_scale(step, s) for step in (0, 7, 14)] == pytest.approx([1, 2 / 3, 1 / 3])
    assert [whiten_lr_scale(step, s) for step in (0, 6, 12, 20)] == [1, 0.5, 0, 0]
    filters, whitening, norms, head = made.rates_at(6)
    assert whitening == pytest.approx(s.bias_lr / 2) and norms == pytest.approx(s.bias_lr * 15 / 21)
    assert filters == pytest.approx(s.lr * 15 / 21) and head == pytest.approx(s.head_lr * 15 / 21)
    s.warmup = 3
    assert [made.rates_at(step)[3] / s.head_lr for step in (0, 1, 2, 3, 4)] == pytest.approx(
        [1 / 4, 2 / 4 * 20 / 21, 3 / 4 * 19 / 21, 18 / 21, 17 / 21])


def test_the_whitening_bias_is_frozen_after_its_epochs(data):
    made, seen = trainer(data, whiten_epochs=1), []
    update = made.update
    made.update = lambda: (update(), seen.append(made.net.whitening_bias.detach().clone()))
    made.run(0)
    assert not torch.equal(seen[0], seen[5]) and all(torch.equal(bias, seen[5]) for bias in seen[6:])


def by_hand(made, views):
    """Mean logits over views of the test images, each (flip, shift), through an image that was padded and cropped."""
    pixels = made.test_images.permute(0, 3, 1, 2).float()
    mean, std = (torch.tensor(v)[:, None, None] * 255 for v in (train_cifar.MEAN, train_cifar.STD))
    padded = F.pad((pixels - mean) / std, (1,) * 4, mode="reflect")
    total = 0
    with torch.no_grad():
        for flip, shift in views:
            x = padded[:, :, 1 + shift : 33 + shift, 1 + shift : 33 + shift]
            x = padded[:, :, 1 + shift : 33 + shift].flip(-1)[..., 1 - shift : 33 - shift] if flip else x
            weight = 0.25 if shift == 0 else 0.125
            x = F.gelu(F.conv2d(x, made.net.whitening, made.net.whitening_bias))
            total = total + weight * made.net(x)
    return total


def test_six_views_are_the_weighted_mean_by_hand(data):
    made = trainer(data, views_for=1.0)
    made.run(0)
    made.net.eval()
    logits = by_hand(made, [(flip, shift) for flip in (0, 1) for shift in (0, -1, 1)])
    accuracy, loss = made.evaluate().tolist()
    assert loss == pytest.approx(F.cross_entropy(logits, made.test_labels).item(), abs=1e-5)
    assert accuracy == pytest.approx((logits.argmax(1) == made.test_labels).float().mean().item(), abs=0.009)


def test_only_the_least_certain_get_more_views(data):
    made = trainer(data, views_for=0.25)
    made.run(0)
    made.net.eval()
    two = 2 * by_hand(made, [(0, 0), (1, 0)])
    margin = two.topk(2).values
    unsure = (margin[:, 0] - margin[:, 1]).argsort()[:30]  # of 120
    expected = two.clone()
    expected[unsure] = by_hand(made, [(flip, shift) for flip in (0, 1) for shift in (0, -1, 1)])[unsure]
    assert made.evaluate()[1].item() == pytest.approx(F.cross_entropy(expected, made.test_labels).item(), abs=1e-5)
    made.s.views_for = 0.0
    assert made.evaluate()[1].item() == pytest.approx(F.cross_entropy(two, made.test_labels).item(), abs=1e-5)
    made.s.views = 1
    one = 4 * by_hand(made, [(0, 0)])
    assert made.evaluate()[1].item() == pytest.approx(F.cross_entropy(one, made.test_labels).item(), abs=1e-5)


def test_the_loss_is_the_smoothed_cross_entropy_of_the_batch(data):
    made = trainer(data)
    made.reset(0)
    made.look(0)
    made.gradients(True)
    rows = made.table[0]
    made.net.reset(0)
    with torch.no_grad():
        logits = made.net(made.net.first_layer(made.images, rows, 0, True))
        target = F.one_hot(made.labels[rows[:, 0].long()], 10) * 0.8 + 0.02
        expected = -(target * logits.log_softmax(1)).sum(1).mean()
    assert made.losses[0].item() == pytest.approx(expected.item(), abs=1e-5)


def test_no_part_of_the_images_is_looked_at_that_was_not_asked_for():
    data = cifar10.synthetic(300, 120)
    made = Trainer(Settings(**PRESETS["local"] | TINY | dict(train_images=100, test_images=40)), CPU, *data)
    assert len(made.images) == len(made.labels) == 100 and len(made.test_images) == 40
    assert np.array_equal(made.images.numpy(), data[0].pixels[:100])


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU


# Differences in the last bits grow by 1e5 in ten steps of TINY, by 1e2 in ten of these. 32 filters: conv_pool's.
CALM = TINY | dict(width1=32, batch_size=150, epochs=6, lr=0.03)


@pytest.fixture(scope="module")
def on_cpu(data):
    return trainer(data, **CALM).run(5).losses[:10]


@pytest.fixture
def on_gpu(data):
    def run(**changes):
        made = Trainer(Settings(**PRESETS["local"] | CALM | dict(device="cuda") | changes), torch.device("cuda"), *data)
        made.prepare()
        return made, made.run(5)

    return run


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["eager", "fused"])
def test_the_first_ten_losses_are_those_of_a_cpu(on_gpu, on_cpu, engine):
    for dtype in ("float32", "float16"):
        assert on_gpu(engine=engine, dtype=dtype)[1].losses[:10] == pytest.approx(on_cpu, abs=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("graph", ["gradients", "step"])
def test_graphs_change_nothing_on_a_gpu(on_gpu, graph, dtype):
    none, (made, found) = on_gpu(graph="none", dtype=dtype)[1], on_gpu(graph=graph, dtype=dtype)
    assert made.graph == graph and found.losses[:10] == pytest.approx(none.losses[:10], abs=2e-3)
    assert found.losses == pytest.approx(none.losses, abs=5e-2)
    other, again = made.run(6), made.run(5)
    assert again.losses[:10] == pytest.approx(found.losses[:10], abs=2e-3) and other.losses[:3] != again.losses[:3]
    assert made.step_parts()["forward"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [dict(optimizer="adamw", lr=0.01), dict(rest="adam", bias_lr=0.01, head_lr=0.05),
                                     *(dict(optimizer=name) for name in OPTIMIZERS if name != "adamw")], ids=str)
def test_every_optimizer_in_a_graph_on_a_gpu(on_gpu, changes):
    """AMO's gradients alone."""
    changes = dict(dtype="float16", epochs=2) | changes
    none, (made, found) = on_gpu(graph="none", **changes)[1], on_gpu(graph="auto", **changes)
    assert made.graph == ("gradients" if "amo" in changes.get("optimizer", "") else "step")
    assert found.losses[:10] == pytest.approx(none.losses[:10], abs=5e-3)


@pytest.mark.gpu
def test_rates_move_under_a_graph_on_a_gpu(on_gpu):
    """One graph: at rates of 0 biases and head stay, and in the next step, at those of the table, they do not."""
    made, _ = on_gpu(graph="step")
    rest = [p for p in made.params if p.ndim != 4]
    made.reset(5)
    made.look(5)
    made.schedule[0] = 0
    for moves in (False, True):
        before = [p.detach().clone() for p in rest]
        made.work[True]()
        assert [torch.equal(p, was) for p, was in zip(rest, before)] == [not moves] * len(rest)


@pytest.mark.gpu
def test_compiling_changes_nothing_on_a_gpu(on_gpu):
    assert on_gpu(compile=True)[1].losses[:10] == pytest.approx(on_gpu()[1].losses[:10], abs=5e-3)
