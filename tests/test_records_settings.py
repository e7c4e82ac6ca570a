"""The command line made from a dataclass: values, presets, help, and what a mistyped argument is told."""
from dataclasses import dataclass

import pytest

from records.settings import SettingsError, check, option, parse


@dataclass
class Settings:
    preset: str = option("", "filled by --preset")
    steps: int = option(3250, "optimizer steps")
    lr: float = option(0.02, "learning rate")
    compile: bool = option(True, "whether to compile the model")
    optimizer: str = option("muon", "which optimizer", choices=("muon", "adamw", "turbo-muon"))
    target: float | None = option(3.28, "validation loss to reach")
    data_folder: str = option("data/text", "folder of the shards")
    decay: float = option(0.1, "weight decay", least=0, most=1)

    def __post_init__(self):
        if self.steps < 1:
            raise SettingsError(f"--steps expects a positive number, got {self.steps}")


PRESETS = {"record": {}, "quick": {"steps": 20, "target": None}}


def settings(*argv, cls=Settings, presets=PRESETS, default_preset="record"):
    return parse(cls, list(argv), presets=presets, program="train_gpt.py", description="Train a GPT.",
                 default_preset=default_preset)


def refused(capsys, *argv):
    """The one line that `argv` is refused with."""
    with pytest.raises(SystemExit) as exit:
        settings(*argv)
    output = capsys.readouterr()
    assert exit.value.code == 2 and output.out == ""
    assert output.err.count("\n") == 1 and output.err.endswith("see train_gpt.py --help\n")
    return output.err


def test_defaults():
    assert settings() == Settings(preset="record")


def test_options_override_preset_overrides_default():
    assert settings("--preset", "quick") == Settings(preset="quick", steps=20, target=None)
    assert settings("--steps", "7", "--preset=quick").steps == 7
    assert settings("--preset", "quick", "--target", "4").target == 4.0


def test_values_of_every_type():
    given = settings("--steps", "1_000", "--lr=-1e-3", "--compile", "false", "--target", "none", "--data_folder", "a b",
                     "--optimizer", "turbo-muon")
    assert given == Settings("record", 1000, -1e-3, False, "turbo-muon", None, "a b")
    assert settings("--data-folder=--odd").data_folder == "--odd"
    assert settings("--steps", "131072", "--steps", "5").steps == 5     # the last counts


@pytest.mark.parametrize("argv, parts", [
    (["--stepz", "3"], ["unknown option --stepz", "--steps"]),
    (["--data-foldr=x"], ["unknown option --data-foldr", "--data-folder"]),
    (["--step", "3"], ["unknown option --step ", "--steps"]),          # no abbreviations
    (["--preset", "quik"], ["unknown preset 'quik'", "quick"]),
    (["--steps", "many"], ["--steps expects int, got 'many'"]),
    (["--steps", "1.5"], ["--steps expects int, got '1.5'"]),
    (["--lr", "nan"], ["--lr expects float, got 'nan'"]),
    (["--target", "low"], ["--target expects float|none, got 'low'"]),
    (["--compile", "maybe"], ["--compile expects true|false, got 'maybe'"]),
    (["--steps", "none"], ["--steps expects int, got 'none'"]),
    (["--optimizer", "turbomuon"], ["--optimizer expects one of muon, adamw, turbo-muon", "nearest: turbo-muon"]),
    (["--compile"], ["--compile has no value", "--compile true|false"]),
    (["--lr", "--steps", "3"], ["--lr has no value"]),
    (["--preset"], ["--preset has no value"]),
    (["7"], ["unexpected argument '7'", "--key value"]),
    (["--steps", "0"], ["--steps expects a positive number, got 0"]),    # from __post_init__
])
def test_refusals(capsys, argv, parts):
    message = refused(capsys, *argv)
    for part in parts:
        assert part in message


def test_help_shows_every_option_with_the_presets_values(capsys):
    with pytest.raises(SystemExit) as exit:
        settings("--help", "--preset", "quick")
    text = capsys.readouterr().out
    assert exit.value.code == 0
    for part in ("--steps int = 20\n", "--lr float = 0.02\n", "--compile true|false = true\n", "learning rate",
                 "--target float|none = none\n", "--optimizer muon|adamw|turbo-muon = muon\n", "Train a GPT.",
                 "steps=20, target=none", "the defaults", "values of preset 'quick'",
                 "--data-folder str = data/text\n"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 120


def test_other_ranks_exit_silently(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    for argv, status in ((["--stepz", "3"], 2), (["--help"], 0)):
        with pytest.raises(SystemExit) as exit:
            settings(*argv)
        assert exit.value.code == status
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "0")
    assert "--stepz" in refused(capsys, "--stepz", "3")


def test_mistakes_of_the_program_raise():
    with pytest.raises(SettingsError, match="'stepz', which is no setting.*steps"):
        settings(presets={"record": {"stepz": 3}})
    with pytest.raises(SettingsError, match="--optimizer expects one of"):
        settings(presets={"record": {"optimizer": "sgd"}})
    with pytest.raises(SettingsError, match="default preset 'fast' is not one of record, quick"):
        settings(default_preset="fast")

    @dataclass
    class WithList:
        sizes: list = option((), "not a type of the command line")
    with pytest.raises(SettingsError, match="WithList.sizes"):
        settings(cls=WithList)


@pytest.mark.parametrize("text, wanted", [("-0.1", "at least 0"), ("inf", "at least 0"), ("-inf", "at least 0"),
                                          ("1.5", "at most 1")])
def test_numbers_out_of_bounds_are_refused(capsys, text, wanted):
    assert f"--decay {float(text)} must be {wanted}" in refused(capsys, "--decay", text)


def test_bounds_themselves_are_valid():
    assert settings("--decay", "0").decay == 0 and settings("--decay", "1").decay == 1


def test_check_looks_at_every_field_of_an_instance():
    check(Settings(target=None))
    with pytest.raises(SettingsError, match="--decay 2 must be at most 1"):
        check(Settings(decay=2))
    with pytest.raises(SettingsError, match="--optimizer expects one of"):
        check(Settings(optimizer="sgd"))
