"""python -m records: every command is there, says what is wrong in one line, and its options reach it."""
import subprocess
import sys

import pytest
from test_train_gpt import ROOT

from records import __main__ as records_main
from records.files import RecordError


@pytest.mark.parametrize("name", ["ab", "compare", "plan", "verify", "submit", "replay", "import", "table", "plot"])
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as ended:
        records_main.main([name, "--help"])
    assert ended.value.code == 0
    assert f"usage: python -m records {name}" in capsys.readouterr().out
    assert f"  {name} " in records_main.usage()


def test_without_a_command_it_says_what_there_is():
    done = subprocess.run([sys.executable, "-m", "records"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == records_main.usage() + "\n" and done.stderr == ""


def test_a_mistyped_command(capsys):
    assert records_main.main(["comapre", "x"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("records: no command 'comapre' (nearest: compare); expected one of ab, ")
    assert error.count("\n") == 1


class Fake:
    """A command that notes its options and ends as it is told."""

    def __init__(self, end):
        self.end, self.options = end, None

    @staticmethod
    def add_arguments(parser):
        parser.add_argument("things", nargs="*")
        parser.add_argument("--number", type=int)

    def main(self, options):
        self.options = options
        if isinstance(self.end, BaseException):
            raise self.end
        return self.end


@pytest.mark.parametrize("end, status, error", [
    (0, 0, ""), (3, 3, ""), (RecordError("a.json is 7, expected 8"), 2, "records ab: a.json is 7, expected 8\n"),
    (KeyboardInterrupt(), 130, "")])
def test_how_a_command_ends(monkeypatch, capsys, end, status, error):
    monkeypatch.setattr(records_main.importlib, "import_module", lambda name: Fake(end))
    assert records_main.main(["ab"]) == status
    assert capsys.readouterr().err == error


def test_what_follows_two_dashes_is_for_the_scripts_of_ab_only(monkeypatch):
    fake = Fake(0)
    monkeypatch.setattr(records_main.importlib, "import_module", lambda name: fake)
    words = ["ab", "x", "--number", "3", "--", "--steps", "9", "--", "y"]
    assert records_main.main(words) == 0
    assert fake.options.common == ["--steps", "9", "--", "y"] and fake.options.words == words
    assert (fake.options.things, fake.options.number) == (["x"], 3)
    assert records_main.main(["plot", "--", "x"]) == 0 and fake.options.things == ["x"]
    with pytest.raises(SystemExit):
        records_main.main(["ab", "--num", "3"])     # no abbreviations: --a and --all-gpus are different things
