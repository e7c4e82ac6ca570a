"""train_gpt.py: a tiny run from shards to record, what it must not depend on, and its parts against references."""

import contextlib
import io
import itertools
import json
import math
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_gpt
from data.shards import sha256, write_shard
from kernels.attention import bounds as bounds_of
from optim import get_polar, route
from records.log import Record, parse_log, unpack_source
from records.settings import SettingsError
from records.verify import inspect
from train_gpt import (GPT, PRESETS, Settings, attention, blockwise_attention, lr_scale, momentum_at,
                       windows_at)

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 257  # bytes and the document token
pytestmark = pytest.mark.usefixtures("one_thread")
TINY = dict(preset="local", source="none", device="cpu", layers=2, heads=2, width=32, value_embeddings=1,
            sequence_length=128, max_document=64, batch_tokens=1024, device_batch_tokens=1024, val_tokens=1024,
            val_every=2, steps=20, window=64, momentum_warmup=10, momentum_cooldown=0, bigram=0, key_shift=False,
            attention_gates="none", value_gates=False, row_normalize=False, logit_cap="30,0,7.5", weight_decay=0.0,
            cooldown=0.5, final_lr=0.05)  # the parts have tests of their own
COMMUNITY_LINE = re.compile(r"step:(\d+)/(\d+) val_loss:([\d.]+) train_time:(\d+)ms step_avg:([\d.]+)ms")


def batch_passes(s: Settings, world_size: int) -> int:
    return s.batch_tokens // s.sequence_length // world_size // s.sequences_at_once("batch_tokens", world_size)


def words(tokens: int, seed: int) -> np.ndarray:
    """(tokens,) uint16: a stream of 64 words of five bytes, the first ones often, in documents of 8 to 90 tokens."""
    vocabulary = np.random.default_rng(0).integers(0, VOCABULARY - 1, (64, 5))
    rng = np.random.default_rng(seed)
    text = vocabulary[np.minimum(rng.geometric(0.08, tokens // 5 + 1) - 1, 63)].reshape(-1)[:tokens].astype(np.uint16)
    starts = np.cumsum(rng.integers(8, 91, tokens // 8))
    text[starts[starts < tokens]] = text[0] = VOCABULARY - 1
    return text


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of byte-level shards: enough for 3000 tiny sequences."""
    folder = tmp_path_factory.mktemp("shards")
    write_shard(folder / "train_000.bin", words(600_000, seed=1))
    write_shard(folder / "val_000.bin", words(5_000, seed=2))
    return folder


def arguments(data, records, **changes) -> list[str]:
    """The command line of a tiny run."""
    options = TINY | dict(data=data, records=records) | changes
    return [text for key, value in options.items() for text in ("--" + key.replace("_", "-"), str(value).lower()
            if isinstance(value, bool) else str(value))]


def only_record(records) -> Path:
    """The folder of the one record below `records`."""
    [path] = Path(records).glob("*/*/record.json")
    return path.parent


def read(folder) -> dict:
    return json.loads((folder / "record.json").read_text())


def train(data, records, draw=False, **changes) -> dict:
    """A tiny run in this process: the content of record.json, and its "folder" and "stdout"."""
    stdout = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stdout):
        for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            patch.delenv(variable, raising=False)
        patch.setattr(train_gpt, "end_on_signal", lambda message: None)  # pytest keeps its own handlers
        if not draw:
            patch.setattr(Record, "_draw", lambda record: None)  # half a second each
        train_gpt.main(arguments(data, records, **changes))
    folder = only_record(records)
    return read(folder) | {"folder": folder, "stdout": stdout.getvalue()}


def losses(record: dict) -> list[float]:
    return [point["val_loss"] for point in record["validation"]]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """The tiny run, once."""
    return train(data, tmp_path_factory.mktemp("finished"), draw=True, target=5.0)


def model_of(seed=0, **changes) -> tuple[Settings, GPT]:
    s = Settings(**PRESETS["local"] | TINY | changes)
    torch.manual_seed(seed)
    return s, GPT(s)


def randomised(model: GPT) -> GPT:
    """The model with its zero weights set to noise, so that every part has a say in the result."""
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(std=0.1)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# A run


def test_a_run_learns_and_leaves_a_complete_record(finished, data):
    assert finished["status"] == "complete" and finished["message"] is None
    assert losses(finished)[0] == pytest.approx(math.log(384), abs=1e-5)  # the head starts at zero; 257 padded to 384
    assert losses(finished)[-1] < 4.5
    first_below = next(point for point in finished["validation"] if point["val_loss"] <= 5.0)
    assert finished["reached"] and finished["time_to_target_s"] == first_below["train_time_s"] > 0
    assert finished["steps"] == 20 and finished["tokens"] == 20 * 1024 and finished["train_time_s"] > 0
    assert finished["config"]["width"] == 32 and finished["config"]["optimizer"] == "turbo-muon-5"
    assert finished["data"] == {name: sha256(data / name) for name in ("train_000.bin", "val_000.bin")}
    assert {path.name for path in finished["folder"].iterdir()} == {"record.json", "log.txt", "source.txt", "loss.png"}


def test_validation_comes_at_the_start_every_val_every_steps_and_at_the_end(data, tmp_path):
    record = train(data, tmp_path, val_every=4, steps=10)
    assert [point["step"] for point in record["validation"]] == [0, 4, 8, 10]
    assert [point["tokens"] for point in record["validation"]] == [0, 4096, 8192, 10240]
    seconds = [point["train_time_s"] for point in record["validation"]]
    assert seconds[0] == 0 and seconds == sorted(seconds)


def test_a_profile_goes_into_the_record_which_verifies_and_changes_no_loss(data, tmp_path, monkeypatch):
    changes = dict(steps=2, name="profiled", batch_schedule="1,2")
    monkeypatch.setattr("sys.argv", ["train_gpt.py", *arguments(data, tmp_path, profile=True, **changes)])
    seen, train_step = [], train_gpt.train_step

    def watched(model, optimizer, batches, count, windows):
        batches = list(itertools.islice(batches, count))
        seen.append((windows, [batch.tokens.tolist() for batch in batches]))
        train_step(model, optimizer, iter(batches), count, windows)

    monkeypatch.setattr(train_gpt, "train_step", watched)
    record = train(data, tmp_path, profile=True, draw=True, **changes)
    assert seen[4:] == seen[2:3] * 9 + seen[3:4] * 9 and seen[2] != seen[3]  # 2 of warm-up, 2 of training; 3 · 3 each
    profile, s = record["extra"]["profile"], Settings(**PRESETS["local"] | TINY | changes)
    assert [(one["first_step"], one["steps"], one["work"]) for one in profile["stages"]] == [
        (steps[0], len(steps), work) for steps, work in train_gpt.stages(s)] and len(profile["stages"]) == 2
    for one in (*profile["stages"], profile["mean"]):
        assert one["parts_ms"].keys() == {"forward and backward", "muon: gradients", "muon: momentum",
                                          "muon: orthogonalise", "muon: apply", "adam"}
        assert all(ms > 0 for ms in one["parts_ms"].values()) and sum(one["parts_ms"].values()) <= one["step_ms"]
        assert all(one["groups_ms"][group] > 0 for group in ("products", "attention", "others", "optimizer"))
        assert one["tflops"] > 0 and one["mfu"] is None
    assert losses(record) == losses(train(data, tmp_path / "plain", **changes))
    log = (record["folder"] / "log.txt").read_text()
    assert "muon: orthogonalise" in log and profile["costs"] in log
    assert "512 tokens, windows 16 and 32" in log and "1024 tokens, windows 32 and 64" in log
    assert (record["folder"] / "profile.png").read_bytes().startswith(b"\x89PNG")
    [report] = inspect(record["folder"])
    assert report.problems == [] and report.notes == []


def test_probes_and_amo_go_into_the_record(finished, data, tmp_path):
    record = train(data, tmp_path / "probe", probe=True, val_every=10)
    assert record["extra"]["probe"].keys() == {"0", "10", "20"} and "q" in str(record["extra"]["probe"]["10"])
    assert losses(record)[-1] == losses(finished)[-1]
    record = train(data, tmp_path / "amo", optimizer="turbo-amo", steps=2)
    assert record["extra"]["amo"] is None  # it ended before the commitment


def test_source_txt_holds_the_code_that_ran(finished):
    source = unpack_source((finished["folder"] / "source.txt").read_bytes())
    for path in ("train_gpt.py", "optim/__init__.py", "optim/muon.py", "optim/polar.py", "data/shards.py",
                 "records/log.py", "requirements.txt", "run.sh"):
        assert path in source
    assert source["data/shards.py"] == (ROOT / "data/shards.py").read_bytes()
    assert b"def train_step(" in source["train_gpt.py"]


def test_validation_lines_are_in_the_community_s_format_in_the_log_and_on_the_screen(finished):
    log = (finished["folder"] / "log.txt").read_text()
    for text in (log, finished["stdout"]):
        found = COMMUNITY_LINE.findall(text)
        assert [(int(step), int(steps)) for step, steps, *_ in found] == [(step, 20) for step in range(0, 21, 2)]
        assert [float(loss) for _, _, loss, *_ in found] == pytest.approx(losses(finished), abs=1e-6)
        milliseconds = [int(time) for *_, time, _ in found]
        assert [time / 1000 for time in milliseconds] == [point["train_time_s"] for point in finished["validation"]]
        for (step, *_, average), time in zip(found[1:], milliseconds[1:]):
            assert float(average) == pytest.approx(time / int(step), abs=0.01)
    _, curve = parse_log(log)
    assert [point["step"] for point in curve] == list(range(0, 21, 2))


# ---------------------------------------------------------------------------------------------------------------------
# What the losses must and must not depend on


def test_the_same_seed_gives_the_same_losses_to_the_bit(finished, data, tmp_path):
    assert losses(train(data, tmp_path)) == losses(finished)


def test_another_seed_gives_other_losses(finished, data, tmp_path):
    other = losses(train(data, tmp_path, seed=1, steps=4, val_every=1))
    assert len(set(other[1:]) & set(losses(finished))) == 0


def test_a_run_without_warm_up_has_the_same_losses_to_the_bit(finished, data, tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(train_gpt, "warm_up", lambda *args: called.append(args))
    assert losses(train(data, tmp_path)) == losses(finished)
    assert len(called) == 1


def test_reset_puts_everything_back_to_the_bit_after_warm_up(data, monkeypatch):
    s, model = model_of(data=str(data), seed=3)
    loader, validation = train_gpt.open_data(s, 0, 1)
    before = {name: p.clone() for name, p in (*model.named_parameters(), *model.named_buffers())}
    loss = train_gpt.validate(model, validation, (16, 32), 1)
    randomised(model)

    inside = []  # names of the weights that differ while warm_up validates
    validate = train_gpt.validate

    def spy(model, *rest):
        inside.append({name for name, p in model.named_parameters() if not torch.equal(p, before[name])})
        return validate(model, *rest)

    monkeypatch.setattr(train_gpt, "validate", spy)
    train_gpt.warm_up(s, model, loader, validation, 1)
    train_gpt.pass_loss(model, loader.batch(0, 8, 0, 1), (16, 32)).backward()
    assert any(p.grad is not None for p in model.parameters())
    places = [p.data_ptr() for p in (*model.parameters(), *model.buffers())]
    train_gpt.reset(model, s, 3)
    now = dict((*model.named_parameters(), *model.named_buffers()))
    assert inside and all("blocks.0.mlp.up.weight" in names for names in inside)
    assert now.keys() == before.keys() and all(torch.equal(tensor, before[name]) for name, tensor in now.items())
    assert places == [p.data_ptr() for p in now.values()]  # in place: compiled graphs may know where they lie
    assert all(p.grad is None for p in model.parameters())
    assert validate(model, validation, (16, 32), 1) == loss


def test_the_loss_at_step_0_is_that_of_a_freshly_seeded_model(finished, data):
    s, model = model_of(data=str(data))
    _, validation = train_gpt.open_data(s, 0, 1)
    fresh = train_gpt.validate(model, validation, windows_at(0, s), 1)
    assert losses(finished)[0] == fresh


@pytest.mark.parametrize("count", [2, 4])
def test_gradients_of_several_passes_are_their_mean(count, data):
    s, model = model_of(data=str(data))
    loader, _ = train_gpt.open_data(s, 0, 1)
    randomised(model)
    found = []
    still = SimpleNamespace(step=lambda: found.append([p.grad.clone() for p in model.parameters()]),
                            zero_grad=lambda set_to_none: model.zero_grad())
    for parts in (1, count):
        train_gpt.train_step(model, still, (loader.batch(0, 8, i, parts) for i in range(parts)), parts, (16, 32))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tokens, passes", [(256, 4), (128, 8), (640, 2)])
def test_gradient_accumulation_changes_no_loss(finished, data, tmp_path, tokens, passes):
    # 640 tokens: five sequences fit, but eight divide into two passes of four only
    record = train(data, tmp_path, device_batch_tokens=tokens)
    assert f", {passes} passes of {1024 // passes} tokens a step" in record["stdout"]
    assert losses(record) == pytest.approx(losses(finished), rel=1e-5)


def test_a_batch_schedule_changes_batches_rates_and_tokens_and_no_sequence(data, tmp_path):
    schedule = dict(batch_schedule="1,2,3", batch_tokens=1536, steps=6, val_every=1)
    s = Settings(**PRESETS["local"] | TINY | schedule | dict(data=str(data)))
    assert [train_gpt.batch_at(step, s) for step in range(7)] == [512, 512, 1024, 1024, 1536, 1536, 1536]
    assert lr_scale(0, s) == pytest.approx((1 / 3) ** 0.5) and lr_scale(2, s) == pytest.approx((2 / 3) ** 0.5)
    assert lr_scale(4, s) == lr_scale(4, Settings(steps=6, cooldown=0.5, final_lr=0.05))
    asked = list(train_gpt.requests(s, 1))  # 1024 tokens fit the device, but 512 divide every batch
    assert asked == [(0, 4, 0, 1), (4, 4, 0, 1), *((8, 8, part, 2) for part in range(2)), *((16, 8, part, 2) for part in
                     range(2)), *((24, 12, part, 3) for part in range(3)), *((36, 12, part, 3) for part in range(3))]
    one = train(data, tmp_path / "one", **schedule)
    assert ", 1, 2, 3 passes of 512 tokens a step" in one["stdout"]
    assert [point["tokens"] for point in one["validation"]] == [0, 512, 1024, 2048, 3072, 4608, 6144]
    other = train(data, tmp_path / "other", device_batch_tokens=256, **schedule)
    assert losses(other) == pytest.approx(losses(one), rel=1e-5)


def test_weight_decay_follows_the_learning_rate_and_the_options_of_muon_arrive():
    s, model = model_of(weight_decay=0.1, cautious=True, row_normalize=True, adam_beta1=0.5, steps=10, cooldown=1.0,
                        final_lr=0)
    optimizer = train_gpt.make_optimizer(s, model)
    for group in optimizer.param_groups:
        group |= {"initial_lr": group["lr"], "initial_weight_decay": group["weight_decay"]}
    train_gpt.set_schedule(optimizer, 4, s)
    [muon] = [group for group in optimizer.param_groups if group["kind"] == "matrix"]
    assert muon["lr"] == pytest.approx(0.6 * s.lr) and muon["weight_decay"] == pytest.approx(0.06)
    assert muon["momentum"] == momentum_at(4, s) and muon["cautious"] and muon["row_normalize"]
    assert {group["betas"] for group in optimizer.param_groups if "betas" in group} == {(0.5, 0.95)}
    _, model = model_of()
    plain = train_gpt.make_optimizer(Settings(optimizer="normuon"), model).param_groups[0]
    assert not plain["cautious"] and plain["row_normalize"]
    for settings, polar in ((Settings(), "turbo-5"), (Settings(optimizer="muon2", polar="turbo-3"), "turbo-3")):
        assert train_gpt.make_optimizer(settings, model).optimizers[0].polar == get_polar(polar)


# ---------------------------------------------------------------------------------------------------------------------
# Settings and schedules


def test_learning_rates_are_constant_and_then_fall_linearly():
    s = Settings(steps=100, cooldown=0.4, final_lr=0.1, batch_schedule="1")
    assert all(lr_scale(step, s) == 1 for step in range(61))
    assert lr_scale(80, s) == pytest.approx(0.55) and lr_scale(100, s) == pytest.approx(0.1)
    falling = [lr_scale(step, s) for step in range(60, 101)]
    assert np.allclose(np.diff(falling), -0.9 / 40)
    assert all(lr_scale(step, Settings(steps=100, cooldown=0, batch_schedule="1")) == 1 for step in range(100))
    assert lr_scale(50, Settings(steps=100, cooldown=1, final_lr=0, batch_schedule="1")) == pytest.approx(0.5)


def test_momentum_rises_from_0_85_and_falls_again():
    s = Settings(momentum=0.95, momentum_warmup=300)
    values = [momentum_at(step, s) for step in range(400)]
    assert values[0] == 0.85 and values[150] == pytest.approx(0.9) and values[300:] == [0.95] * 100
    assert all(a < b for a, b in zip(values[:300], values[1:]))
    assert momentum_at(0, Settings(momentum_warmup=0)) == 0.95
    falling = Settings(momentum=0.95, momentum_warmup=0, momentum_cooldown=50, steps=100)
    assert momentum_at(50, falling) == 0.95 and momentum_at(75, falling) == pytest.approx(0.9)
    assert momentum_at(100, falling) == 0.85 and momentum_at(99, falling) == pytest.approx(0.852)
    assert momentum_at(99, Settings(momentum_warmup=0, momentum_cooldown=0, steps=100)) == 0.95
    short = Settings(momentum_warmup=10, momentum_cooldown=50, steps=20)  # they overlap: the lower one counts
    assert max(momentum_at(step, short) for step in range(21)) == pytest.approx(0.882)
    assert {round(momentum_at(step, Settings(momentum=0.8)), 12) for step in range(400)} == {0.8}


@pytest.mark.parametrize("steps", [1, 5, 8, 100, 1601])
def test_the_window_grows_in_eighths_to_the_whole(steps):
    s = Settings(steps=steps, window=1792, short_window=None, window_start=None)
    windows = [windows_at(step, s) for step in range(steps)]
    assert windows[-1] == windows_at(steps, s) == (896, 1792) and windows == sorted(windows)
    assert set(windows) <= {(112 * eighth, 224 * eighth) for eighth in range(1, 9)}
    if steps >= 8:
        assert windows[0] == (112, 224) and len(set(windows)) == 8
    s = Settings(steps=steps, window=2, short_window=None, window_start=None)
    assert {windows_at(step, s) for step in range(steps)} == {(1, 2)}


def test_stages_are_stretches_of_steps_of_the_same_work():
    s = Settings(steps=64, window=1792, short_window=None, window_start=None, batch_tokens=131072, batch_schedule="1,2")
    found = train_gpt.stages(s)
    assert [(steps[0], work) for steps, work in found] == [
        (0, "65536 tokens, windows 112 and 224"), (8, "65536 tokens, windows 224 and 448"),
        (16, "65536 tokens, windows 336 and 672"), (24, "65536 tokens, windows 448 and 896"),
        (32, "131072 tokens, windows 560 and 1120"), (40, "131072 tokens, windows 672 and 1344"),
        (48, "131072 tokens, windows 784 and 1568"), (56, "131072 tokens, windows 896 and 1792")]
    assert [step for steps, _ in found for step in steps] == list(range(64))
    s = Settings(steps=5, window=2, short_window=1, window_start=2, batch_schedule="1")
    assert [steps for steps, _ in train_gpt.stages(s)] == [[0, 1, 2, 3, 4]]


def test_windows_have_a_first_value_and_a_short_one():
    s = Settings(steps=80, window=1664, short_window=768, window_start=384)
    windows = [windows_at(step, s) for step in range(80)]
    assert windows[0] == windows[9] == (177, 384) and windows[10] == (261, 566) and windows[79] == (768, 1664)


@pytest.mark.parametrize("world_size, passes", [(1, 6), (2, 3), (4, 3), (8, 3)])
def test_passes_of_the_record_run_keep_the_batch_whatever_the_number_of_gpus(world_size, passes):
    assert batch_passes(Settings(), world_size) == passes  # 24 sequences, 8 at first: at most four, which divide both


@pytest.mark.parametrize("device_sequences", [1, 2, 3, 5, 8, 31, 32, 100])
def test_passes_are_equal_fit_the_device_and_are_as_few_as_can_be(device_sequences):
    s = Settings(device_batch_tokens=device_sequences * 16384, batch_tokens=524288, batch_schedule="1")
    for world_size in (1, 2, 4, 8):
        share = 32 // world_size
        size = share // batch_passes(s, world_size)
        assert size * batch_passes(s, world_size) == share and size <= device_sequences
        assert not any(share % larger == 0 for larger in range(size + 1, min(share, device_sequences) + 1))


def test_processes_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(SettingsError, match=r"--batch-tokens 524288 .* 49152: 3 processes .* --nproc_per_node"):
        batch_passes(Settings(batch_tokens=524288, batch_schedule="1"), 3)
    with pytest.raises(SettingsError, match="--batch-tokens 16385 must be a multiple of 16384"):
        batch_passes(Settings(batch_tokens=16385, batch_schedule="1"), 1)
    with pytest.raises(SettingsError, match=r"--batch-tokens 174763 \(of --batch-schedule 1,3\) must be a multiple of"):
        batch_passes(Settings(batch_tokens=524288, batch_schedule="1,3"), 1)


@pytest.mark.parametrize("changes, named", [
    (dict(batch_tokens=0), "--batch-tokens 0"),
    (dict(sequence_length=0), "--sequence-length 0"),
    (dict(sequence_length=-128), "--sequence-length -128"),
    (dict(device_batch_tokens=1000), "--device-batch-tokens 1000"),
    (dict(width=100), "--width 100 must be a multiple of 4 × --heads 6"),
    (dict(value_embeddings=7), "--value-embeddings 7 needs at least twice as many --layers, not 12"),
    (dict(value_embeddings=-1), "--value-embeddings -1"),
    (dict(polar="turbo-5", optimizer="adamw"), "--polar, --cautious"),
    (dict(logit_cap="15"), "--logit-cap 15 must be three numbers A,B,C"),
    (dict(logit_cap="141,0,1"), "--logit-cap 141,0,1"), (dict(logit_cap="30,0,0"), "--logit-cap 30,0,0"),
    (dict(short_window=1665), "--short-window 1665 must be at most --window 1664"),
    (dict(window_start=3000), "--window-start 3000 must be at most --window 1664"),
    (dict(batch_schedule="1,half"), "--batch-schedule '1,half' expects numbers with commas between, such as 1,2,3"),
    (dict(batch_schedule="0,1"), "--batch-schedule 0,1: sizes of a batch must be more than 0"),
    (dict(steps=0), "--steps 0"), (dict(val_every=0), "--val-every 0"), (dict(window=1), "--window 1"),
])
def test_settings_that_cannot_work_are_refused_by_name(changes, named):
    with pytest.raises(SettingsError, match=re.escape(named)):
        Settings(**changes)


@pytest.mark.parametrize("preset, most", [("record", 8), ("wiki", 4), ("local", 1)])
def test_every_preset_is_valid_on_one_gpu_and_on_its_own_number(preset, most):
    assert len(PRESETS) == 3
    s = Settings(**PRESETS[preset])
    assert batch_passes(s, 1) * min(s.device_batch_tokens, s.batch_tokens) >= s.batch_tokens
    assert batch_passes(s, most) >= 1


# ---------------------------------------------------------------------------------------------------------------------
# Model


def test_every_parameter_of_the_record_model_is_routed_to_one_group_and_counted():
    with torch.device("meta"):
        model = GPT(Settings())
    groups = route(model)
    routed = [name for members in groups.values() for name, _ in members]
    assert sorted(routed) == sorted(name for name, _ in model.named_parameters())
    padded, width, layers = 50304, 768, 12
    assert {kind: sum(p.numel() for _, p in members) for kind, members in groups.items()} == {
        "embedding": (1 + 3) * padded * width + 251520 * width,  # tokens, three tables of values, pairs of tokens
        "head": padded * width,
        "matrix": layers * (4 + 8) * width**2,  # q, k, v, o; up and down
        # mix of x0, mix of values; gates of 12 channels for 6 heads, of values and in wide blocks
        "scalar": layers * 2 + 2 * 3 * 2 + (2 * 3 + 3) * 6 * 12,
    }
    assert {name for name, _ in groups["embedding"]} == {"tokens.weight", "bigram.weight",
                                                         *(f"values.{i}.weight" for i in range(3))}
    assert {name for name, _ in groups["head"]} == {"head.weight"}
    assert all(p.ndim == 2 and name.startswith("blocks.") for name, p in groups["matrix"])


@pytest.mark.parametrize("changes", [{}, dict(layers=4, bigram=500)])
def test_a_step_s_flops_are_torch_s_count_of_products_and_the_pairs_that_may_see_each_other(changes):
    from torch.utils.flop_counter import FlopCounterMode
    _, model = model_of(**changes)
    bounds, windows = [0, 50, 114, 128, 200, 256], (16, 40)
    tokens, cu_seqlens = torch.randint(0, VOCABULARY, (2, 128)), torch.tensor(bounds, dtype=torch.int32)
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens, cu_seqlens, windows).backward()
    counted = sum(flops for name, flops in counter.get_flop_counts()["Global"].items() if str(name) == "aten.mm")
    for i in range(len(model.blocks)):  # width 32: each pair 2 products of 2 FLOPs, thrice
        counted += 12 * 32 * visible(bounds, windows[i in model.wide]).sum().item()
    batch = SimpleNamespace(cu_seqlens=cu_seqlens)
    assert train_gpt.step_flops(model, [batch], windows) == counted
    assert train_gpt.step_flops(model, [batch, batch], windows) == 2 * counted


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_look_up_adds_autograd_s_gradient_to_the_table_s(dtype):
    s, model = model_of(dtype=dtype)
    table, other = model.values[0].weight, model.values[0].weight.detach().clone().requires_grad_()
    for seed in (0, 1):  # and another pass adds
        torch.manual_seed(seed)
        rows, weights = torch.randint(0, 20, (256,)), torch.randn(256, 32, dtype=getattr(torch, dtype))
        found, expected = train_gpt.LookUp.apply(table, rows, model), F.embedding(rows, other).to(weights.dtype)
        assert torch.equal(found, expected)
        (found * weights).sum().backward()
        (expected * weights).sum().backward()
    torch.testing.assert_close(table.grad, other.grad)


@pytest.mark.parametrize("scale", [0.1, 3.0, 300.0])
def test_the_loss_is_cross_entropy_of_softcapped_logits(scale):
    s, model = model_of(logit_cap="14,0,3.5")  # 7 · tanh(logit / 7)
    torch.manual_seed(1)
    x = torch.randn(50, 32, requires_grad=True)
    with torch.no_grad():
        model.head.weight.normal_(std=scale)
    targets = torch.randint(0, VOCABULARY, (50,))
    loss = model.loss(x, targets)
    weight = model.head.weight.detach().double().requires_grad_()
    x64 = x.detach().double().requires_grad_()
    logits = F.rms_norm(x64, (32,)) @ weight.T
    expected = F.cross_entropy(7.0 * torch.tanh(logits / 7.0), targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    expected.backward()
    for found, wanted in ((x.grad, x64.grad), (model.head.weight.grad, weight.grad)):
        assert (found - wanted).norm() <= 2e-4 * wanted.norm()  # where a logit is saturated float32 keeps few digits


def test_logits_are_capped_off_centre():
    s, model = model_of(logit_cap="23,5,7.5")
    randomised(model)
    streams, loss = [], model.loss
    model.loss = lambda x, *rest: (streams.append(x), loss(x, *rest))[1]
    tokens, targets = torch.randint(0, VOCABULARY, (2, 2, 128), generator=torch.Generator().manual_seed(1))
    bounds = torch.tensor([0, 128, 256], dtype=torch.int32)
    found = model(tokens, targets, bounds, (32, 64)).item()
    logits = F.rms_norm(streams[0].double(), (32,)) @ model.head.weight.double().T
    expected = F.cross_entropy(23 * torch.sigmoid((logits + 5) / 7.5), targets.flatten())
    assert found == pytest.approx(expected.item(), rel=1e-6)


def pair_row(before: int, token: int, rows: int) -> int:
    mixed = (before * 65536 + token) * 2654435769 % 2**32
    return (mixed ^ mixed // 2**15) * 2246822507 % 2**32 * rows // 2**32


def test_pairs_of_tokens_spread_over_all_rows_as_at_random():
    for start, end, stride in ((0, 200, 1), (0, 65536, 613), (65336, 65536, 1)):
        for rows in (97, 1000, 251520):
            some = torch.arange(start, end, stride)
            both = torch.cartesian_prod(some, some)  # pairs one after the other: every second row is of one of them
            model = SimpleNamespace(document=0, bigram=SimpleNamespace(num_embeddings=rows))
            row = GPT.pair_rows(model, both.flatten(), limits([0, both.numel()]))[1::2]
            counts = torch.bincount(row, minlength=rows).double()
            assert counts.numel() == rows
            assert counts.var() == pytest.approx(row.numel() / rows, rel=0.35)  # Poisson: the variance is the mean
        assert row[-1] == pair_row(*both[-1].tolist(), 251520)


def test_the_bigram_embedding_is_of_a_token_and_the_one_before_it_in_its_document():
    s, model = model_of(bigram=500)
    with torch.no_grad():
        model.bigram.weight.normal_()
    tokens = torch.randint(0, VOCABULARY, (256,), generator=torch.Generator().manual_seed(1))
    x, _ = model.embed(tokens, limits([0, 50, 128, 256]))
    for i in (0, 1, 49, 50, 51, 127, 128, 255):
        other = VOCABULARY - 1 if i in (0, 50, 128) else int(tokens[i - 1])
        pair = model.bigram.weight[pair_row(other, int(tokens[i]), 500)]
        torch.testing.assert_close(x[i], F.rms_norm(model.tokens.weight[tokens[i]], (32,)) + pair)
    assert "bigram.weight" in {name for name, _ in route(model)["embedding"]}


def test_a_run_learns_with_a_bigram_embedding_that_starts_as_nothing(finished, data, tmp_path):
    record = train(data, tmp_path, bigram=1000)
    assert losses(record)[0] == losses(finished)[0] and losses(record)[-1] < losses(finished)[-1]


def test_shifted_keys_have_the_previous_token_s_half_without_position():
    s, model = model_of(key_shift=True)
    assert [block.attention.shifted is not None for block in model.blocks] == [False, True]  # the last one is wide
    attention, documents = model.blocks[1].attention, limits([0, 100, 256])
    attention.o.weight.data = torch.eye(32)
    x, seen = torch.randn(256, 32), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "attention", lambda q, k, v, *rest: (seen.append(k), v)[1])
        attention(x, None, documents, 64)
        attention.shifted = None
        attention(x, None, documents, 64)
    shifted, plain = seen
    still = [4, 5, 6, 7, 12, 13, 14, 15]
    moving = [0, 1, 2, 3, 8, 9, 10, 11]
    assert torch.equal(shifted[..., moving], plain[..., moving])
    for i in (0, 1, 2, 99, 100, 101, 255):
        assert torch.equal(shifted[i][:, still], plain[i if i in (0, 100) else i - 1][:, still])


GATES = dict(attention_gates="all", value_gates=True)


@pytest.mark.parametrize("part", GATES)
def test_a_gate_starts_without_effect_and_learns(part):
    torch.manual_seed(1)
    tokens, targets = torch.randint(0, VOCABULARY, (2, 2, 128))
    inputs = tokens, targets, torch.tensor([0, 50, 128, 256], dtype=torch.int32), (32, 64)
    _, plain = model_of(layers=6)
    randomised(plain)
    s, model = model_of(layers=6, **{part: GATES[part]})
    new = model.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert new and set(new) <= {name for name, _ in route(model)["scalar"]}
    model(*inputs).backward()
    assert model(*inputs).item() == plain(*inputs).item()
    assert all(p.grad.any() for name, p in model.named_parameters() if name in new)


def test_a_gate_scales_a_head_s_output_and_its_value_embedding():
    s, model = model_of(attention_gates="all", value_gates=True)
    attention, documents = randomised(model).blocks[0].attention, limits([0, 100, 256])
    x, value = torch.randn(2, 256, 32)
    attention.o.weight.data = torch.eye(32)
    factors = 2 * torch.sigmoid(x[:, :12] @ attention.gate.weight.view(2, 12).T).repeat_interleave(16, dim=1)
    values = 2 * torch.sigmoid(x[:, :12] @ attention.value_gate.weight.view(2, 12).T).repeat_interleave(16, dim=1)
    found = attention(x, value, documents, 64)
    attention.gate = attention.value_gate = None
    torch.testing.assert_close(found, factors * attention(x, values * value, documents, 64))


def test_gates_for_wide_blocks_alone_are_in_every_fourth_and_the_last():
    _, model = model_of(layers=6, attention_gates="wide")
    assert [i for i, block in enumerate(model.blocks) if block.attention.gate is not None] == [3, 5]


def test_a_run_with_all_parts_learns(data, tmp_path):
    assert losses(train(data, tmp_path, layers=4, bigram=1000, key_shift=True, row_normalize=True,
                        **GATES))[-1] < 4.5


@pytest.mark.parametrize("parts", [{}, GATES | dict(bigram=500, key_shift=True)])
def test_a_document_s_stream_through_the_model_depends_on_no_other_document_and_no_later_token(parts):
    s, model = model_of(layers=4, **parts)  # one block of four has the full window
    randomised(model).loss = lambda x, *rest: x
    torch.manual_seed(2)
    tokens = torch.randint(0, VOCABULARY, (2, 128))
    bounds = torch.tensor([0, 50, 128, 200, 256], dtype=torch.int32)  # the second document: tokens 50 to 127
    here = torch.zeros(256, dtype=torch.bool)
    here[50:100] = True
    with torch.no_grad():
        x = model(tokens, tokens, bounds, (32, 64))
        other = torch.where(here, tokens.flatten(), torch.randint(0, VOCABULARY, (256,))).view(2, 128)
        y = model(other, other, bounds, (32, 64))
        torch.testing.assert_close(y[here], x[here], rtol=1e-6, atol=1e-6)
        assert (y[~here] != x[~here]).any(1).sum() > 150
        merged = model(tokens, tokens, torch.tensor([0, 128, 200, 256], dtype=torch.int32), (32, 64))
        assert (merged[here] - x[here]).abs().max() > 1e-3  # without the boundary it would see the first document


# ---------------------------------------------------------------------------------------------------------------------
# Attention

DOCUMENTS = {100: [0, 1, 8, 9, 40, 77, 100], 64: [0, 64], 130: [0, 65, 130], 1: [0, 1]}  # tokens -> where they begin
WINDOWS = [1, 2, 7, 64, 1000]


def visible(bounds: list[int], window: int) -> torch.Tensor:
    """(tokens, tokens) bool: may query i see key j? Written out as the definition says."""
    document = [number for number, (a, b) in enumerate(zip(bounds, bounds[1:])) for _ in range(a, b)]
    tokens = len(document)
    return torch.tensor([[document[i] == document[j] and i - window < j <= i for j in range(tokens)]
                         for i in range(tokens)])


def limits(edges):
    """(2, tokens): of each token's document."""
    return bounds_of(torch.tensor(edges, dtype=torch.int32), edges[-1])


def dense_attention(q, k, v, mask, scale):
    """(tokens, heads, head_dim) by the full matrix of scores."""
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~mask, -math.inf).softmax(-1), v)


def queries_keys_values(tokens, dtype=torch.float64, heads=2, head_dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, heads, head_dim, dtype=dtype, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("tokens", DOCUMENTS)
def test_attention_and_its_gradient_are_those_of_the_dense_formula(tokens, window):
    bounds = DOCUMENTS[tokens]
    ours, dense = ([x.requires_grad_() for x in queries_keys_values(tokens)] for _ in range(2))
    found = attention(*ours, limits(bounds), window, 8.0)
    wanted = dense_attention(*dense, visible(bounds, window), 0.12)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    weights = queries_keys_values(tokens, seed=1)[0]
    (found * weights).sum().backward()
    (wanted * weights).sum().backward()
    for x, y in zip(ours, dense):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("window", WINDOWS)
def test_a_token_sees_its_window_of_its_document_and_nothing_else(window):
    bounds = DOCUMENTS[100]
    mask, documents = visible(bounds, window), limits(bounds)
    q, k, v = queries_keys_values(100)
    y = blockwise_attention(q, k, v, documents, window)
    other = queries_keys_values(100, seed=2)
    for i in (0, 1, 7, 8, 9, 39, 40, 60, 99):
        row = mask[i][:, None, None]
        itself = (torch.arange(100) == i)[:, None, None]
        mixed = [torch.where(kept, x, new) for kept, x, new in zip((itself, row, row), (q, k, v), other)]
        changed = blockwise_attention(*mixed, documents, window)
        torch.testing.assert_close(changed[i], y[i], rtol=1e-12, atol=1e-12)
        seen = torch.nonzero(mask[i]).flatten().tolist()
        for j in {seen[0], seen[-1]}:  # and the ends of what it should see count
            one = v.clone()
            one[j] += 1000
            assert (blockwise_attention(q, k, one, documents, window)[i] - y[i]).abs().max() > 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("window", [1, 2, 7, 64, 1000, 5000])
def test_the_kernels_of_a_gpu_compute_the_same(window):
    documents = limits([0, 1, 100, 1124, 1200, 2000, 2777]).cuda()
    half = [x.to("cuda", torch.bfloat16) for x in queries_keys_values(2777, heads=3, head_dim=64)]
    half[2] = torch.stack(half, dim=1)[:, 2]  # values are a part of a fused product
    half = [x.requires_grad_() for x in half]
    full = [x.detach().float().requires_grad_() for x in half]
    found = attention(*half, documents, window, 24.0)  # 0.12 · 64, and that q and k are not normalised
    wanted = blockwise_attention(*full, documents, window)
    weights = queries_keys_values(2777, heads=3, head_dim=64, seed=1)[0].to("cuda", torch.bfloat16)
    (found * weights).sum().backward()
    (wanted * weights.float()).sum().backward()
    for x, y in ((found, wanted), *((a.grad, b.grad) for a, b in zip(half, full))):
        if y.norm() > 1e-3:  # with a window of 1 the gradients of q and k are zero
            assert (x.float() - y).norm() < 1e-2 * y.norm()
        else:
            assert x.float().norm() < 1e-1


# ---------------------------------------------------------------------------------------------------------------------
# Scripts around it


@pytest.mark.parametrize("script", ["run.sh", ".ci/run"])
def test_shell_scripts_are_executable_and_parse(script):
    checked = subprocess.run(["bash", "-n", ROOT / script], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert (ROOT / script).stat().st_mode & 0o100


def test_ci_runs_the_tests_through_run_sh():
    assert re.search(r"^(exec )?\./run\.sh test\b", (ROOT / ".ci/run").read_text(), re.MULTILINE)


@pytest.mark.parametrize("package", ["torch", "triton"])
def test_requirements_pin_what_numerics_and_kernels_depend_on(package):
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if re.match(rf"{package}\b", line)]
    assert len(lines) == 1 and re.match(rf"{package}==\d+\.\d+\.\d+(; .*)?$", lines[0])
