"""Comparisons of arms of runs: the numbers, and what is said about them in words."""
import argparse
import dataclasses
import json
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats as scipy_stats

from made_runs import HARDWARE, falling, make_run
from records.compare import add_arguments, compare, compare_experiment, main
from records.files import RecordError
from records.runs import find_runs, read_experiment, read_run
from records.stats import sequential
from records.verdict import as_markdown, verdict

ROOT = Path(__file__).resolve().parent.parent
LOSSES = {"A": [3.2800, 3.2813, 3.2787, 3.2806, 3.2794], "B": [3.2811, 3.2792, 3.2801, 3.2783, 3.2815]}
STEPS_MS = {"A": [100.0, 100.2, 99.8, 100.1, 99.9], "B": [96.9, 97.1, 96.8, 97.2, 97.0]}


def arm(folder, label, finals, step_ms=None, **changes):
    """Runs of one arm, in folder/label-0 …; step_ms: list of float."""
    step_ms = step_ms or [100.0 + 0.1 * index for index in range(len(finals))]
    return [read_run(make_run(folder / f"{label}-{index}", falling(final, steps=1000), seed=index, name=label,
                              **{"step_s": ms / 1000, **changes}))
            for index, (final, ms) in enumerate(zip(finals, step_ms))]


def two_arms(folder, losses=LOSSES, step_ms=STEPS_MS, **changes):
    return {label: arm(folder, label, losses[label], step_ms and step_ms[label], **changes) for label in losses}


def strict(comparison):
    """Through strict JSON and back, with a look at the Markdown's tables."""
    content = json.loads(json.dumps(comparison.as_json(), allow_nan=False))
    width = None
    for line in as_markdown(comparison).splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else None
        assert width is None or cells in (width, None), line
        width = cells
    assert "nan" not in as_markdown(comparison).lower().replace("distinguishable", "")
    return content


def test_faster_and_as_good(tmp_path):
    comparison = compare(two_arms(tmp_path))
    words = verdict(comparison)
    assert re.match(r"B is faster by 2\.99 % ± 0\.37 % \(to the target 3\.3: 94\.31 against 97\.22 s\); its step "
                    r"takes 3\.00 % ± 0\.23 % less time; its loss is not distinguishable from A's \(\+0\.0000 ± "
                    r"0\.0017\): to see a 0\.001 difference, run n = 23 \(n = 5 an arm\)\.$", words[0]), words[0]
    result = comparison.results["B"]["final"]
    test = scipy_stats.ttest_ind(LOSSES["B"], LOSSES["A"], equal_var=False)
    interval = test.confidence_interval()
    assert (result.low, result.high, result.p) == pytest.approx((interval.low, interval.high, test.pvalue), rel=1e-9)
    assert result.p_holm == result.p and not result.distinguishable and result.method == "Welch"
    whole = [np.round(10_000 * np.array(LOSSES[label])) for label in "BA"]      # without rounding, ties are ties
    sums = scipy_stats.permutation_test(whole, lambda x, y, axis: x.sum(axis) - y.sum(axis), n_resamples=np.inf)
    assert result.p_permutation == pytest.approx(sums.pvalue, abs=1e-9)
    step = comparison.results["B"]["step_ms"]
    assert step.relative == pytest.approx(-0.03) and step.difference == pytest.approx(-3.0) and step.distinguishable
    content = strict(comparison)
    assert content["arms"][1]["samples"]["final"]["values"] == LOSSES["B"] and content["verdict"] == words
    assert content["results"]["B"]["step_ms"]["runs_needed"] == step.runs_needed >= 2
    assert comparison.notes == [] and comparison.settings == {}


def test_slower_and_better(tmp_path):
    losses = {"A": LOSSES["A"], "B": [loss - 0.01 for loss in LOSSES["B"]]}
    words = verdict(compare(two_arms(tmp_path, losses, {"A": STEPS_MS["B"], "B": STEPS_MS["A"]})))
    assert words[0].startswith("B is slower by 1.") and "its step takes 3.09 % ± 0.24 % longer" in words[0]
    assert "its loss is lower (better) by 0.0100 ± 0.0017, 3.2700 against 3.2800 (n = 5 an arm)." in words[0]


def test_more_runs_than_a_difference_needs(tmp_path):
    comparison = compare(two_arms(tmp_path), effect=0.01)
    assert ": a 0.01 difference would probably have been seen (n = 3 has 80 % power)" in verdict(comparison)[0]
    assert "3 (3 to " in as_markdown(comparison)


def test_higher_is_better(tmp_path):
    values = {"A": [0.9401, 0.9412, 0.9395, 0.9404], "B": [0.9451, 0.9463, 0.9447, 0.9455]}
    arms = {label: [read_run(make_run(tmp_path / f"{label}{index}", [(0, 0.1), (4, 0.8), (8, value)], step_s=0.3,
                                      metric="accuracy", track="cifar10-94", target=0.93, seed=index))
                    for index, value in enumerate(values[label])] for label in values}
    comparison = compare(arms)
    words = verdict(comparison)
    assert (comparison.metric, comparison.direction, comparison.common) == ("accuracy", "up", 0.9395)
    assert "its accuracy is higher (better) by 0.0051 ± 0.0012, 0.9454 against 0.9403" in words[0]
    assert words[0].startswith("B is faster by ") and "to the target 0.93" in words[0]
    rate = np.mean([(value - 0.8) / 1.2 for value in values["A"]])
    assert comparison.arms[0].rate["per_second"] == pytest.approx(rate)
    assert words[1].startswith(f"In the last 1.2 s of A's runs a second is worth {rate:.2g} in accuracy")
    strict(comparison)
    worse = verdict(compare(dict(reversed(arms.items()))))
    assert "its accuracy is lower (worse) by" in worse[0] and worse[0].startswith("A is slower by ")


def test_one_run_in_an_arm(tmp_path):
    comparison = compare({"A": arm(tmp_path, "A", LOSSES["A"]), "B": arm(tmp_path, "B", [3.2, ], [90.0])})
    result = comparison.results["B"]["final"]
    assert (result.low, result.p, result.p_permutation, result.distinguishable) == (None, None, None, False)
    assert result.difference == pytest.approx(-0.08) and result.runs_needed > 10       # A's runs have a spread
    words = verdict(comparison)[0]
    assert "its loss was lower by 0.08000, which shows nothing (an interval needs two runs in each arm)" in words
    assert "B was faster by 1" in words and "distinguishable" not in words
    strict(comparison)
    alone = compare({label: arm(tmp_path, "x" + label, [value]) for label, value in (("A", 3.2), ("B", 3.1))})
    assert alone.results["B"]["final"].runs_needed is None and "run n" not in verdict(alone)[0]
    strict(alone)


def test_arms_without_spread(tmp_path):
    comparison = compare({label: arm(tmp_path, label, [value] * 3, [100.0] * 3)
                          for label, value in (("A", 3.2), ("B", 3.1))})
    result = comparison.results["B"]["final"]
    assert (result.p, result.low, result.distinguishable) == (None, None, False)
    assert result.p_permutation == pytest.approx(0.1)
    assert "identical to the last digit: is it one seed again and again?" in verdict(comparison)[0]
    strict(comparison)
    assert compare({"A": arm(tmp_path, "C", [3.2] * 3), "B": arm(tmp_path, "D", [3.1, 3.11, 3.12])}) \
        .results["B"]["final"].distinguishable         # one arm without spread is no obstacle


def test_runs_that_do_not_reach_the_target(tmp_path):
    arms = {"A": arm(tmp_path, "A", [3.27, 3.28, 3.29, 3.31]), "B": arm(tmp_path, "B", [3.26, 3.25, 3.28, 3.27])}
    comparison = compare(arms)
    assert comparison.arms[0].samples["seconds_to_target"].reached == 3
    assert comparison.arms[0].samples["seconds_to_target"].mean is None
    result = comparison.results["B"]["seconds_to_target"]
    assert result.difference is None and result.p is None
    assert result.reason == ("reached by 4 of 4 runs of B and 3 of 4 of A (Fisher's exact test, p = 1); no mean over "
                             "only some runs")
    words = verdict(comparison)
    assert "3.3 was reached by 3 of 4 runs of A, 4 of 4 runs of B." in words
    # Time is then told to where all came: the worst of the final losses.
    assert comparison.common == 3.31 and "(to 3.3100, the loss that every run reached" in words[0]
    expected = [run.seconds_to(3.31, interpolate=True) for run in arms["B"]]
    assert comparison.arms[1].samples["seconds_to_common"].values == pytest.approx(expected)
    assert arms["A"][3].train_time_s == comparison.arms[0].samples["seconds_to_common"].values[3]
    assert "3 of 4 runs" in as_markdown(comparison)
    strict(comparison)
    easier = compare(arms, target=3.5)
    assert easier.results["B"]["seconds_to_target"].p is not None and "to the target 3.5" in verdict(easier)[0]


def test_failed_and_interrupted_runs_are_listed_and_left_out(tmp_path):
    arms = two_arms(tmp_path)
    arms["B"] += [read_run(make_run(tmp_path / "dead", falling(2.0), status="failed", message="out | of\nmemory")),
                  read_run(make_run(tmp_path / "cut", falling(2.0), status="interrupted")),
                  read_run(make_run(tmp_path / "blind", []))]
    lost = [{"arm": "A", "folder": None, "status": "interrupted", "seed": 3, "message": None}]
    comparison = compare(arms, unrecorded={"A": lost, "B": []})
    assert comparison.arms[1].n == 5 and comparison.arms[1].samples["final"].values == LOSSES["B"]
    assert [one["status"] for one in comparison.arms[1].excluded] == [
        "failed", "interrupted", "complete, but without a final validation"]
    words = verdict(comparison)
    assert "Left out: 1 of 6 runs of A (1 interrupted, left no record)." in words[1]
    assert ("Left out: 3 of 8 runs of B (1 complete, but without a final validation, 1 failed, 1 interrupted)."
            in words[2])
    assert "flatter" in words[2] and "5 of 8" in as_markdown(comparison)
    assert f"| B | {tmp_path / 'dead'} | failed | out \\| of memory |" in as_markdown(comparison)
    strict(comparison)
    with pytest.raises(RecordError, match=r"arm B has no complete run with a final validation \(failed, interrupted\)"):
        compare({"A": arms["A"], "B": arms["B"][5:7]})
    with pytest.raises(RecordError, match=r"arm B .* \(no records at all\)"):
        compare({"A": arms["A"], "B": []})
    with pytest.raises(RecordError, match=r"arm A .* \(no records at all\)"):
        compare({"A": [], "B": []})


def test_different_amounts_of_work(tmp_path):
    arms = {"A": arm(tmp_path, "A", LOSSES["A"]),
            "B": [read_run(make_run(tmp_path / f"B{index}", falling(final, steps=800), seed=index, step_s=0.1))
                  for index, final in enumerate(LOSSES["B"])]}
    comparison = compare(arms)
    assert "its loss (after 800 steps against 1,000) is not distinguishable" in verdict(comparison)[0]
    assert ("the runs have different numbers of steps, so final values are not at equal work: A: 1,000; B: 800"
            in comparison.notes)
    assert any("different numbers of tokens" in note for note in comparison.notes)
    strict(comparison)


def test_a_seed_may_lead_its_runs_to_files_of_its_own(tmp_path):
    def arms(**data):
        """Arms with a run for each word; its letters are the files that the run of that seed loaded."""
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        return {label: [read_run(make_run(place / label / str(seed), falling(3.28), seed=seed, step_s=0.1,
                                          data={letter: letter for letter in word}))
                        for seed, word in enumerate(words)] for label, words in data.items()}

    assert compare(arms(A=["x", "y"], B=["x", "y"])).notes == []
    assert compare(arms(A=["x", "y"], B=["x", "xy"])).notes == ["data that not all runs loaded: x (B)"]
    changed = arms(A=["x", "y"], B=["x", "y"])
    changed["B"][0].record["data"]["x"] = "z"
    assert compare(changed).notes == ["the data differ: x"]
    other_seeds = compare(arms(A=["x", "y"], B=["x"])).notes
    assert other_seeds[0] == "data that not all runs loaded: x (A, B), y (A)" and "runs of A differ" in other_seeds[1]


def test_what_else_differs(tmp_path):
    shared = {"lr": 0.1, "betas": [0.9, 0.95], "seed": 1, "name": "x"}
    arms = {"A": arm(tmp_path, "A", LOSSES["A"], config=shared),
            "B": arm(tmp_path, "B", LOSSES["B"], config=shared | {"lr": 0.2, "seed": 7, "extra": None},
                     hardware=HARDWARE | {"accelerator_count": 2}, source={"train.py": "11", "new.py": "22"},
                     data={"val.bin": "00"}, versions={"torch": "2.13"})}
    arms["B"][0].record["data"]["val.bin"] = "33"
    arms["A"].append(read_run(make_run(tmp_path / "again", falling(3.28, steps=1000, points=50), seed=0, step_s=0.1,
                                       config=shared | {"betas": [0.8, 0.9]})))
    comparison = compare(arms)
    assert comparison.settings == {"lr": ["0.1", "0.2"], "extra": ["not given", "null"]}
    assert comparison.notes == [
        "runs of A differ in --betas: [0.8, 0.9], [0.9, 0.95]",
        "the runs were validated at different intervals, and the straight line between two validations is late by more "
        "the further they are apart; number of validations: A: 6, 51; B: 6",
        "A has several runs of seed 0: they may not be independent",
        "the code differs: train.py",
        "code that not all runs loaded: new.py (B)",
        "the data differ: val.bin",
        "data that not all runs loaded: val.bin (B)",
        "runs of B differ in their data, so they are not of one data set",
        "the hardware differs, so times say little: A: 1 × NVIDIA H200; B: 2 × NVIDIA H200",
        "the versions of torch differ: 2.11, 2.13"]
    assert verdict(comparison)[0].startswith("on different hardware, B is")
    assert "| lr | 0.1 | 0.2 |" in as_markdown(comparison) and "To know before" in as_markdown(comparison)
    strict(comparison)


def test_only_the_arm_on_other_hardware_is_said_to_be(tmp_path):
    arms = two_arms(tmp_path)
    arms["C"] = arm(tmp_path, "C", LOSSES["A"], hardware=HARDWARE | {"accelerator": None})
    words = verdict(compare(arms))
    assert words[0].startswith("B is faster") and words[1].startswith("on different hardware, C is")
    assert "C: some, 8 cores" in compare(arms).notes[0]


def test_targets(tmp_path):
    arms = two_arms(tmp_path)
    assert compare(arms).target == 3.3 and compare(arms, target=3.4).target == 3.4
    none = compare({label: arm(tmp_path, label + "none", LOSSES[label], target=None) for label in LOSSES})
    assert none.target is None and "target" not in verdict(none)[0]
    assert none.results["B"]["seconds_to_target"].reason == "there is no target"
    strict(none)
    known = compare({label: arm(tmp_path, label + "wiki", LOSSES[label], target=None, track="wiki-3.324")
                     for label in LOSSES})
    assert known.target == 3.324        # the track's
    begun = compare(arms, target=4.5)       # at the first validation of all: no time, and nothing to take a part of
    assert begun.results["B"]["seconds_to_target"].difference == 0.0 and "nan" not in verdict(begun)[0]
    assert "the loss that every run reached" in verdict(begun)[0]
    strict(begun)
    mixed = compare({"A": arms["A"], "B": arm(tmp_path, "E", LOSSES["B"], target=3.2)})
    assert mixed.target is None
    assert mixed.notes[0] == "the runs had different targets (3.2, 3.3): --target chooses one for all"


def test_no_value_that_every_run_reached(tmp_path):
    arms = two_arms(tmp_path)
    arms["B"].append(read_run(make_run(tmp_path / "worse", falling(5.0, steps=1000), seed=9)))
    comparison = compare(arms, target=3.25)
    assert comparison.common is None and "a step: " in verdict(comparison)[0]
    assert comparison.results["B"]["seconds_to_common"].reason.startswith("there is no value that every run reached")
    assert strict(comparison)["common"] is None


def test_three_arms_are_corrected_for(tmp_path):
    losses = LOSSES | {"C": [loss + 0.0017 for loss in LOSSES["A"]]}
    three = compare(two_arms(tmp_path / "3", losses, None))
    two = compare(two_arms(tmp_path / "2", {"A": LOSSES["A"], "C": losses["C"]}, None))
    alone, corrected = two.results["C"]["final"], three.results["C"]["final"]
    assert alone.distinguishable and not corrected.distinguishable
    assert alone.p == corrected.p and corrected.p_holm == pytest.approx(2 * alone.p) and alone.p < 0.05 < 2 * alone.p
    words = verdict(three)
    assert words[0].startswith("B is ") and words[1].startswith("C is ") and "p, Holm" in as_markdown(three)
    assert corrected.sd == alone.sd and corrected.runs_needed > alone.runs_needed      # alpha is shared
    strict(three)


@pytest.mark.parametrize("curve, expected", [
    ([(0, 10.0), (200, 5.0), (400, 4.0), (600, 3.4)], 0.6 / 20),                            # the last two
    ([(0, 10.0)] + [(10 * n, 5 - 0.01 * n) for n in range(1, 61)], 0.01),                   # a straight line
    ([(0, 10.0), (500, 4.0), (550, 3.9), (600, 3.4)], (4.0 - 3.4) / 10)])                   # three, equally spaced
def test_what_a_second_is_worth(tmp_path, curve, expected):
    runs = [read_run(make_run(tmp_path / f"{index}", curve, step_s=0.1)) for index in range(2)]
    other = [read_run(make_run(tmp_path / f"x{index}", curve, step_s=0.1)) for index in range(2)]
    rate = compare({"A": runs, "B": other}).arms[0].rate
    assert rate["per_second"] == pytest.approx(expected) and rate["n"] == 2
    assert rate["low"] == pytest.approx(expected) == rate["high"]


def test_no_rate_without_two_validations(tmp_path):
    comparison = compare({label: [read_run(make_run(tmp_path / label, [(10, 3.2)]))] for label in "AB"})
    assert comparison.arms[0].rate is None and not any("a second is worth" in line for line in verdict(comparison))
    strict(comparison)


def test_what_cannot_be_compared(tmp_path):
    arms = two_arms(tmp_path)
    with pytest.raises(RecordError, match="1 arm cannot be compared: expected two or more"):
        compare({"A": arms["A"]})
    with pytest.raises(RecordError, match="A-0 is in two arms, A and B: a run can be in one only"):
        compare({"A": arms["A"], "B": [*arms["B"], arms["A"][0]]})
    other = read_run(make_run(tmp_path / "other", falling(3.2), track="wiki-3.324"))
    with pytest.raises(RecordError, match="the runs are of several tracks.*A-0? ?.*somebody-3.3.*other is wiki-3.324"):
        compare({"A": arms["A"], "B": [other]})


@pytest.mark.filterwarnings("error")
def test_strange_numbers_give_words_or_an_error_but_never_nan(tmp_path):
    rng = random.Random(0)
    strange = [0.0, -0.0, 1e-320, 5e-324, 1e-200, 1e-9, 3.0, 3.0000000000000004, 3.5, -2.0, 1e15, -1e15, None]
    compared = 0
    for number in range(150):
        arms = {}
        for label in "ABC"[:rng.choice((2, 2, 3))]:
            pool = rng.sample(strange, rng.choice((1, 2, 5)))
            scale = rng.choice((0.0, 1e-320, 1e-9, 0.1, 1e9))
            arms[label] = [read_run(make_run(
                tmp_path / f"{number}{label}{index}", [(5 * n, rng.choice(pool)) for n in range(rng.choice((1, 2, 4)))],
                step_s=lambda step: 0.0, target=rng.choice((None, 3.0)), train_time_s=scale)) for index in range(3)]
            for index, run in enumerate(arms[label]):      # times that json's three decimals would not hold
                points = tuple(dataclasses.replace(point, train_time_s=scale * point.step) for point in run.curve)
                arms[label][index] = dataclasses.replace(run, curve=points)
        try:
            comparison = compare(arms, target=rng.choice((None, 0.0, 1e-300, 3.0)), sequential=rng.random() < 0.5)
        except RecordError:
            continue
        strict(comparison)
        compared += 1
    assert compared > 50


# -- experiments and the command line --------------------------------------------------------------------------------

def experiment(folder, losses, question):
    """An experiment's folder, A B B A."""
    count, entries = len(losses["A"]), []
    for index in range(count):
        for label in ("AB", "BA")[index % 2]:
            make_run(folder / f"runs/{label}-{index}", falling(losses[label][index], steps=1000), seed=index,
                     step_s=0.1 + 0.0001 * index)
            entries.append({"arm": label, "folder": f"runs/{label}-{index}", "status": "complete"})
    ledger = {"schema": 1, "track": "somebody-3.3", "question": question, "runs": entries,
              "arms": [{"label": label} for label in losses]}
    (folder / "experiment.json").write_text(json.dumps(ledger))
    return folder


def test_an_experiment_that_ran_until_sure(tmp_path):
    losses = {"A": LOSSES["A"], "B": [loss - 0.01 for loss in LOSSES["B"]]}
    rule = {"metric": "val_loss", "target": 3.4, "runs": None, "sequential": {"alpha": 0.1}}
    comparison = compare_experiment(read_experiment(experiment(tmp_path / "e", losses, rule)))
    assert comparison.sequential and comparison.alpha == 0.1 and comparison.target == 3.4
    result, test = comparison.results["B"]["final"], sequential(losses["A"], losses["B"], 0.1)
    assert (result.low, result.high, result.p, result.pairs) == (test.low, test.high, test.p, 5)
    assert result.method == "anytime-valid" and result.p_permutation is None and result.distinguishable
    words, text = verdict(comparison)[0], as_markdown(comparison)
    assert "its loss is lower (better) by 0.0100 ± " in words
    assert words.endswith("(5 pairs; the intervals hold whenever one stops).")
    assert "p, anytime-valid" in text and "arXiv 2310.03722" in text and "permutation" not in text
    assert "chosen beforehand" not in text and "90 % interval" in text
    strict(comparison)
    early = compare_experiment(read_experiment(experiment(tmp_path / "f", {k: v[:2] for k, v in losses.items()}, rule)))
    assert "2 pairs are too few to bound the difference" in verdict(early)[0]
    strict(early)


def test_an_experiment_with_a_fixed_number(tmp_path):
    folder = experiment(tmp_path / "e", LOSSES, {"target": 3.4, "alpha": 0.01, "runs": 5, "sequential": None})
    comparison = compare_experiment(read_experiment(folder))
    assert not comparison.sequential and comparison.alpha == 0.01 and "99 % interval" in as_markdown(comparison)
    assert comparison.notes == []
    assert compare_experiment(read_experiment(folder), alpha=0.2, target=3.5).alpha == 0.2
    early = compare_experiment(read_experiment(experiment(tmp_path / "early", LOSSES, {"runs": 8})))
    assert early.notes[0].startswith("8 runs an arm were declared and these are fewer (A 5, B 5)")
    for number, target in enumerate(("low", 10**400, [3])):
        with pytest.raises(RecordError, match="target is .*, expected a number"):
            compare_experiment(read_experiment(experiment(tmp_path / f"t{number}", LOSSES, {"target": target})))
    wrong = experiment(tmp_path / "f", LOSSES, {"alpha": "small"})
    with pytest.raises(RecordError, match="alpha is 'small', expected a number between 0 and 1"):
        compare_experiment(read_experiment(wrong))


def options(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(list(map(str, words)))


def test_the_command(tmp_path, capsys):
    two_arms(tmp_path)
    words = (f"fast={tmp_path}/B-*", f"slow={tmp_path}/A-0,{tmp_path}/A-[1-4]")
    assert main(options(*words)) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("# slow against fast on somebody-3.3\n") and "slow is slower by 3." in printed
    assert main(options(*words, "--json", "--target", 3.5, "--effect", 0.01)) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["target"] == 3.5 and content["results"]["slow"]["final"]["effect"] == 0.01
    folder = experiment(tmp_path / "e", LOSSES, {})
    assert main(options(folder)) == 0 and capsys.readouterr().out.startswith("# B against A on")
    assert main(options(folder, "--alpha", 0.1)) == 0 and "90 % interval" in capsys.readouterr().out


@pytest.mark.parametrize("words, message", [
    (["muon"], r"'muon': expected ARM=PATH\[,PATH...\]"), (["=x"], "'=x': expected"), (["a="], "'a=': expected"),
    (["a={0}", "a={0}"], "two arms are called 'a'"), (["a={0}", "b={0}/none"], "no run in .*none"),
    (["a={0}"], "1 arm cannot be compared"),
    (["a={0}", "b={0}", "--alpha", "1"], "--alpha 1.0: expected a positive number below 1"),
    (["a={0}", "b={0}", "--effect", "0"], "--effect 0.0: expected a positive number"),
    (["a={0}", "b={0}", "--target", "nan"], "--target nan: expected a")])
def test_wrong_usage(tmp_path, words, message):
    make_run(tmp_path / "run", falling(3.2))
    with pytest.raises(RecordError, match=message):
        main(options(*(word.format(tmp_path) for word in words)))


def test_the_runs_of_this_repository():
    place = f"{ROOT}/records/wiki-3.324/2026-11-22_2"
    comparison = compare({"muon": find_runs([f"{place}*_muon-seed?"]),
                          "turbo": find_runs([f"{place}*_turbo-muon-seed?"])})
    result = comparison.results["turbo"]["final"]
    assert result.p == pytest.approx(0.588, abs=0.001) and result.difference == pytest.approx(0.0046, abs=0.0001)
    assert comparison.settings == {"optimizer": ["muon", "turbo-muon"]} and comparison.notes == []
    words = verdict(comparison)
    assert "turbo is not distinguishable from muon in speed" in words[0] and "(n = 3 against 2)" in words[0]
    assert "3.324 was reached by 0 of 2 runs of muon, 0 of 3 runs of turbo." in words
    assert words[2].startswith("Left out: 1 of 3 runs of muon (1 interrupted).")
    assert comparison.arms[0].rate["per_second"] == pytest.approx(0.0048, abs=0.0001)
    assert not any(math.isnan(value) for value in comparison.arms[0].samples["final"].values)
