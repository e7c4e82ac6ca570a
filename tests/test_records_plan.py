"""python -m records plan: the numbers of runs it recommends, and what it says of questions that cannot be."""
import argparse
import dataclasses
import json

import pytest

from made_runs import falling, make_run
from records import stats
from records.files import RecordError
from records.plan import add_arguments, as_text, main, plan


def options(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(list(map(str, words)))


def test_the_plan_for_a_speedrun():
    found = plan(0.002)
    assert found.sigma == 0.0013 and found.runs == 8 == found.target_runs
    assert found.runs_power == stats.power(8, 0.002, 0.0013) and 0.8 <= found.runs_power < 0.85
    assert 8 < found.pairs_half < found.pairs_power < 25
    assert found.detectable[8] == pytest.approx(0.00197, abs=0.00001)
    assert list(found.detectable.values()) == sorted(found.detectable.values(), reverse=True)
    text = as_text(found)
    assert "n = 8 an arm: 81 % of experiments see it" in text
    assert f"half of all experiments are sure by {found.pairs_half} pairs of runs, 80 % by {found.pairs_power}" in text
    assert "n = 8 for a mean 0.002 beyond it to pass the one-sided test at p < 0.01 (80 %)" in text
    json.dumps(dataclasses.asdict(found), allow_nan=False)


def test_more_to_ask_takes_more_runs():
    first = plan(0.002)
    for harder in (plan(0.001), plan(0.002, sigma=0.002), plan(0.002, alpha=0.01), plan(0.002, power=0.95),
                   plan(0.002, arms=4)):
        assert harder.runs > first.runs
    assert plan(0.002, arms=3).runs == plan(0.002, alpha=0.025).runs
    large = plan(1e-7)
    assert large.runs is None and large.pairs_half is None and large.target_runs is None
    assert as_text(large).count("more than a million") == 2
    assert plan(1.0).runs == 2 and plan(1.0).pairs_half == 4


@pytest.mark.parametrize("arguments, message", [
    ({"effect": 0}, "--effect 0: expected a positive number$"), ({"effect": float("nan")}, "--effect nan"),
    ({"sigma": -1.0}, "--sigma -1.0"), ({"sigma": float("inf")}, "--sigma inf"),
    ({"alpha": 1}, "--alpha 1: expected a positive number below 1"), ({"power": 1.5}, "--power 1.5"),
    ({"arms": 1}, "--arms 1: expected two or more")])
def test_what_cannot_be_planned(arguments, message):
    with pytest.raises(RecordError, match=message):
        plan(**{"effect": 0.001} | arguments)


def test_the_command(tmp_path, capsys):
    for index, final in enumerate([3.20, 3.21, 3.23]):
        make_run(tmp_path / f"t/{index}", falling(final))
    make_run(tmp_path / "t/cut", falling(3.9), status="interrupted")
    assert main(options("--effect", 0.02, "--like", tmp_path / "t")) == 0
    text = capsys.readouterr().out
    assert text.startswith("Standard deviation of 3 runs: 0.0153 (95 % interval 0.00795 to 0.096).\n")
    assert main(options("--effect", 0.02, "--sigma", 0.0152752523, "--json")) == 0
    content = json.loads(capsys.readouterr().out)
    assert f"n = {content['runs']} an arm" in text and content["detectable"]["2"] > content["detectable"]["64"]
    assert main(options("--effect", 0.002)) == 0 and capsys.readouterr().out.startswith("A difference of 0.002 between")
    with pytest.raises(RecordError, match="--like: 1 complete runs, no arm has two runs; expected at least two"):
        main(options("--effect", 0.02, "--like", tmp_path / "t/0", tmp_path / "t/cut"))
    make_run(tmp_path / "t/other", falling(3.2), track="wiki-3.324")
    with pytest.raises(RecordError, match="the runs are of several tracks: somebody-3.3, wiki-3.324"):
        main(options("--effect", 0.02, "--like", tmp_path / "t"))
