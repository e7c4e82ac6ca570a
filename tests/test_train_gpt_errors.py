"""train_gpt.py: whatever is wrong ends in a status that is not 0 and one line that says what, where and the way out."""

import math
import os
import re
import subprocess
import sys

import pytest
import torch
from test_train_gpt import ROOT, arguments, data, losses, only_record, read, train, words  # noqa: F401

import train_gpt
from data.shards import HEADER_BYTES, write_shard
from records.log import parse_log
from records.settings import SettingsError

pytestmark = pytest.mark.usefixtures("one_thread")
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def only_line(stderr: str) -> str:
    """The message, which must be the one line on stderr."""
    [line] = stderr.strip().splitlines()
    assert line.startswith("train_gpt.py: ")
    return line


@pytest.fixture
def fails(tmp_path, capsys):
    """Runs train_gpt.main, which must end with exit status 1 or 2; returns its message."""

    def run(folder, status=1, records=tmp_path / "records", **changes) -> str:
        with pytest.raises(SystemExit) as ended:
            train(folder, records, **changes)
        assert ended.value.code == status
        return only_line(capsys.readouterr().err)

    return run


@pytest.fixture
def shards(tmp_path):
    """A folder of small sound shards, to be damaged."""
    write_shard(tmp_path / "shards" / "train_000.bin", words(30_000, seed=3))
    write_shard(tmp_path / "shards" / "val_000.bin", words(3_000, seed=4))
    return tmp_path / "shards"


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def cut_in_the_header(path):
    path.write_bytes(path.read_bytes()[:100])


def wrong_magic(path):
    path.write_bytes(bytes(4) + path.read_bytes()[4:])


def token_300(path):
    content = bytearray(path.read_bytes())
    content[HEADER_BYTES + 2 * 17:HEADER_BYTES + 2 * 18] = (300).to_bytes(2, "little")
    path.write_bytes(content)


def no_document(path):
    write_shard(path, words(30_000, seed=3) % 256)


def missing(path):
    path.unlink()


# ---------------------------------------------------------------------------------------------------------------------
# Data


@pytest.mark.parametrize("name, damage, said", [
    ("train_000.bin", cut, "truncated: 61017 bytes, but 30000 tokens take 61024"),
    ("val_000.bin", cut, "truncated: 7017 bytes"),
    ("train_000.bin", cut_in_the_header, "truncated"),
    ("train_000.bin", wrong_magic, "not a token shard: its first int32 is 0, expected 20240520"),
    ("train_000.bin", token_300, "token id 300 at position 17 is not in a vocabulary of 257"),
    ("val_000.bin", token_300, "token id 300 at position 17 is not in a vocabulary of 257"),
    ("train_000.bin", no_document, "the document token 256 of a vocabulary of 257 does not occur"),
], ids=lambda value: getattr(value, "__name__", None))
def test_a_damaged_shard_is_named_with_the_damage_and_the_command_that_makes_it_anew(fails, shards, name, damage, said):
    damage(shards / name)
    message = fails(shards, steps=2)
    assert f"{shards / name}: " in message and said in message
    assert f"delete it and run: python -m data.tokenize_text TEXTS {shards}" in message
    assert not (shards.parent / "records").exists()  # no record of a run that never began


@pytest.mark.parametrize("name, said", [("train_000.bin", "no train shard"), ("val_000.bin", "no val shard")])
def test_a_folder_without_shards_is_named_with_the_command_that_fills_it(fails, shards, name, said):
    missing(shards / name)
    message = fails(shards)
    assert f"{shards}: {said}" in message and f"run: python -m data.tokenize_text TEXTS {shards}" in message


def test_too_few_tokens_for_the_steps_say_how_many_there_are_and_both_ways_out(fails, shards):
    message = fails(shards, steps=1000)
    assert "1 train shard with 30,000 tokens" in message and "the run needs 8,000 (1,024,000 tokens)" in message
    assert "fewer --steps" in message and f"python -m data.tokenize_text TEXTS {shards}" in message
    assert not (shards.parent / "records").exists()


def test_too_few_validation_tokens_say_how_many_there_are(fails, shards):
    message = fails(shards, val_tokens=4096)
    assert f"{shards}: 1 val shard with 3,000 tokens" in message and "4,097" in message
    assert "validate on fewer tokens" in message


# ---------------------------------------------------------------------------------------------------------------------
# Options


@pytest.mark.parametrize("changes, said", [
    (dict(stepz=3), "unknown option --stepz (nearest: --steps"),
    (dict(preset="rekord"), "unknown preset 'rekord' (nearest: record"),
    (dict(optimizer="turbo-moun"), "--optimizer expects one of adamw, muon, muon-plus, polar-express, turbo-muon"),
    (dict(steps="many"), "--steps expects int, got 'many'"),
    (dict(device_batch_tokens=64), "--device-batch-tokens 64 is less than one sequence"),
    # what would divide by zero, or turn training upside down
    (dict(heads=0), "--heads 0"), (dict(heads=-2), "--heads -2"), (dict(width=0), "--width 0"),
    (dict(layers=0, value_embeddings=0), "--layers 0"),
    (dict(logit_cap="nan,0,1"), "--logit-cap 'nan,0,1' expects numbers"),
    (dict(vocab_size=1), "--vocab-size 1"), (dict(vocab_size=70000), "--vocab-size 70000"),
    (dict(max_document=0), "--max-document 0"), (dict(seed=-1), "--seed -1"), (dict(momentum=1.5), "--momentum 1.5"),
    (dict(lr=-0.5), "--lr -0.5"), (dict(embedding_lr=-1), "--embedding-lr -1"), (dict(target="inf"), "--target inf"),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else None)
def test_an_option_that_cannot_work_is_named_and_ends_the_run_before_it_begins(fails, data, changes, said):
    message = fails(data, status=2, **changes)
    assert said in message and message.endswith("; see train_gpt.py --help")


@pytest.mark.parametrize("changes, said", [
    (dict(val_tokens=1000), "--val-tokens"), (dict(name="a/b"), "--name")])
def test_an_option_that_does_not_suit_the_data_or_the_record_is_named(fails, data, changes, said):
    message = fails(data, **changes)
    assert said in message and repr(next(iter(changes.values()))) in message


def test_a_file_in_the_place_of_the_record_folder_is_named_with_the_option_for_another(fails, data, tmp_path):
    (tmp_path / "taken").write_text("mine")
    message = fails(data, records=tmp_path / "taken")
    assert f"cannot write {tmp_path / 'taken'}" in message and "--records FOLDER" in message
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said_with_the_option_that_does_without(fails, data):
    message = fails(data, device="cuda")
    assert "no GPU" in message and "--device cpu" in message


def test_eight_bits_without_a_gpu_are_refused_with_the_option_that_does_without(fails, data):
    assert "--head-precision fp8" in (message := fails(data, head_precision="fp8")) and "bfloat16" in message


def test_what_a_gpu_s_attention_cannot_do_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(train_gpt, "why_not", lambda device: None)
    with pytest.raises(SettingsError, match="--width 768 and --heads 8 make heads of 96 channels: .* 16, 32, 64, 128"):
        train_gpt.pick_device(train_gpt.Settings(width=768, heads=8))


# ---------------------------------------------------------------------------------------------------------------------
# Training


def failed(tmp_path, message) -> dict:
    """The record, which must say why the run failed, in record.json and in log.txt."""
    folder = only_record(tmp_path / "records")
    record = read(folder)
    assert record["status"] == "failed" and record["message"] == message.removeprefix("train_gpt.py: ")
    facts, curve = parse_log((folder / "log.txt").read_text())
    assert facts["result"]["status"] == "failed" and facts["result"]["message"] == record["message"]
    assert curve == [point | {"val_loss": value and pytest.approx(value, abs=1e-6)} for point, value in
                     zip(record["validation"], losses(record))]
    return record


def test_a_mistake_of_ours_is_in_the_record_and_its_traceback_on_the_screen(data, tmp_path, monkeypatch):
    def broken(*_):
        raise KeyError("no such thing")

    monkeypatch.setattr(train_gpt, "train_step", broken)
    monkeypatch.setattr(train_gpt, "end_on_signal", lambda message: None)
    with pytest.raises(KeyError, match="no such thing"):
        train(data, tmp_path / "records")
    assert failed(tmp_path, "KeyError: 'no such thing'")["steps"] == 0


def test_out_of_gpu_memory_names_the_option_that_takes_less(fails, data, tmp_path, monkeypatch):
    forward, calls = train_gpt.GPT.forward, []

    def full(model, *inputs):
        calls.append(1)
        if len(calls) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return forward(model, *inputs)

    monkeypatch.setattr(train_gpt.GPT, "forward", full)
    message = fails(data)
    assert "out of GPU memory: lower --device-batch-tokens (now 1024)" in message
    assert len(failed(tmp_path, message)["validation"]) > 1  # what was measured before is kept


@pytest.mark.parametrize("name", ["blocks.1.mlp.up.weight", "values.0.weight", "head.weight", "blocks.0.mix"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_names_the_parameter_and_the_step(fails, data, tmp_path, monkeypatch, name, bad):
    set_schedule = train_gpt.set_schedule

    def poison(optimizer, step, s):
        set_schedule(optimizer, step, s)
        if step == 5:  # the sixth step
            [p] = [p for group in optimizer.param_groups
                   for p, known in zip(group["params"], group["param_names"]) if known == name]
            hook = optimizer.register_step_pre_hook(lambda *_: (hook.remove(), p.grad.mul_(bad))[0])

    monkeypatch.setattr(train_gpt, "set_schedule", poison)
    message = fails(data, steps=12, val_every=4)
    assert f"step 6: the gradient of {name} is NaN or infinite" in message
    record = failed(tmp_path, message)
    assert [point["step"] for point in record["validation"]] == [0, 4]  # nothing after it counts


def test_an_absurd_learning_rate_ends_a_run_on_the_gradient(data, tmp_path):
    command = [sys.executable, "train_gpt.py", *arguments(data, tmp_path / "records", lr=1e38, val_every=100)]
    ended = subprocess.run(command, cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    message = only_line(ended.stderr)
    assert re.search(r"step [234]: the gradient of blocks\.\d\.\S+\.weight\b.* is NaN or infinite; .*rate", message)
    failed(tmp_path, message)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_validation_loss_that_is_not_finite_names_the_step(fails, data, tmp_path, monkeypatch, value):
    validate, seen = train_gpt.validate, []

    def spoilt(*args):
        loss = validate(*args)
        seen.append(loss)
        return value if len(seen) == 5 else loss  # two validations belong to warm-up: this is at step 4

    monkeypatch.setattr(train_gpt, "validate", spoilt)
    message = fails(data)
    assert f"step 4: the validation loss is {value}" in message and "--lr" in message
    record = failed(tmp_path, message)
    assert [point["step"] for point in record["validation"]] == [0, 2, 4] and record["val_loss"] is None


def test_a_missing_data_folder_ends_a_real_process_with_one_line(tmp_path):
    command = [sys.executable, "train_gpt.py", *arguments(tmp_path / "nowhere", tmp_path / "records")]
    ended = subprocess.run(command, cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1 and ended.stdout == ""
    assert only_line(ended.stderr) == (f"train_gpt.py: {tmp_path}/nowhere: no such folder of token shards; "
                                       f"run: python -m data.tokenize_text TEXTS {tmp_path}/nowhere")
    assert not (tmp_path / "records").exists()
