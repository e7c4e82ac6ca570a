"""records plot: what is drawn, of which runs, and what it says where there is nothing to draw."""
import json
import math
from itertools import combinations

import pytest
from made_runs import falling, make_run

from records.__main__ import main
from records.plot import COLOURS, arms_curves, loss_curve, mean_curve
from records.runs import read_run

matplotlib_image = pytest.importorskip("matplotlib.image")
matplotlib_colors = pytest.importorskip("matplotlib.colors")


def folder_with(path, losses, target=3.28):
    path.mkdir()
    points = [{"step": n, "tokens": 1000 * n, "train_time_s": 0.5 * n, "val_loss": loss}
              for n, loss in enumerate(losses)]
    (path / "record.json").write_text(json.dumps({"track": "text-local", "name": "muon", "target": target,
                                                  "validation": points}))
    return path


def amount(image, red, green, blue, within=0.15):
    """Number of pixels of about this colour."""
    return int((abs(image[..., :3] - [red, green, blue]).max(-1) < within).sum())


@pytest.mark.filterwarnings("error")        # matplotlib warns where the layout fails
@pytest.mark.parametrize("losses, target", [
    ([10.8, 5.0, 4.0, 3.5, 3.3, 3.27], 3.28), ([4.0], None), ([4.0, None, 3.9], 3.28), ([3.0, 3.0], 3.0), ([], 3.28)])
def test_curve_of_one_run(tmp_path, capsys, losses, target):
    folder = folder_with(tmp_path / "record", losses, target)
    assert main(["plot", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'loss.png'}\n"
    image = matplotlib_image.imread(folder / "loss.png")
    assert image.shape[:2] == (630, 1500)
    assert (amount(image, 0.12, 0.37, 0.75) > 50) == bool(losses)           # the curve
    assert (amount(image, 0.78, 0.22, 0.18) > 200) == (target is not None)  # the dashed line
    assert sorted(file.name for file in folder.iterdir()) == ["loss.png", "record.json"]


def test_curve_of_an_accuracy(tmp_path):
    run = make_run(tmp_path / "run", [(0, 0.1), (50, 0.8), (100, 0.94)], metric="accuracy", track="cifar10-94",
                   target=0.94)
    assert amount(matplotlib_image.imread(loss_curve(run)), 0.12, 0.37, 0.75) > 50


def arms_of(tmp_path, **finals):
    """Arms of runs that end at these losses."""
    return {label: [read_run(make_run(tmp_path / label / str(seed), falling(final), seed=seed, target=3.3))
                    for seed, final in enumerate(losses)] for label, losses in finals.items()}


def colour(number):
    return matplotlib_colors.to_rgb(COLOURS[number])


@pytest.mark.filterwarnings("error")
def test_arms_are_overlaid_with_their_bands(tmp_path):
    finals = dict(muon=[3.20, 3.30, 3.40], turbo=[3.10, 3.12, 3.11])
    png, svg = arms_curves(arms_of(tmp_path, **finals), tmp_path / "loss", "both")
    image = matplotlib_image.imread(png)
    for number in (0, 1):
        assert amount(image, *colour(number)) > 500
        band = [0.2 * part + 0.8 for part in colour(number)]
        assert amount(image, *band, within=0.01) > (2000 if number == 0 else 300)       # muon's is the wide one
    assert amount(image, *colour(2)) == 0
    text = svg.read_text()
    assert [words in text for words in ("muon (n = 3)", "turbo (n = 3)", "train time, seconds", "steps",
                                        "training tokens", "validation loss", "target 3.3", "both")] == [True] * 8
    before = svg.read_bytes()
    arms_curves(arms_of(tmp_path / "again", **finals), tmp_path / "loss", "both")
    assert svg.read_bytes() == before       # no dates, no random names
    assert not list(tmp_path.glob("*.tmp"))


def test_one_run_has_no_band_and_failed_runs_are_left_out(tmp_path):
    arms = arms_of(tmp_path, a=[3.2])
    arms["a"].append(read_run(make_run(tmp_path / "failed", falling(9.0), status="failed", seed=7)))
    png, svg = arms_curves(arms, tmp_path / "one", "one")
    assert amount(matplotlib_image.imread(png), *[0.2 * part + 0.8 for part in colour(0)], within=0.01) < 300
    assert "a (n = 1)" in svg.read_text()


def test_mean_curve_is_the_mean_where_all_runs_were_validated(tmp_path):
    runs = [read_run(make_run(tmp_path / "a", [(0, 5.0), (10, 4.0), (20, 3.0)], step_s=0.1)),
            read_run(make_run(tmp_path / "b", [(0, 6.0), (5, 1.0), (10, 4.4), (20, None), (30, 2.0)], step_s=0.2))]
    x, mean, sd = mean_curve(runs, "train_time_s")
    assert x == pytest.approx([0.0, 1.5]) and mean == pytest.approx([5.5, 4.2])
    assert sd == pytest.approx([math.sqrt(0.5), math.sqrt(0.08)])
    assert mean_curve(runs, "step")[0] == [0, 10] and mean_curve(runs[:1], "tokens")[2] == [0.0] * 3


def test_colours_differ_for_colour_blind_eyes():
    """Simulated with the matrices of Machado, Oliveira and Fernandes (2009), severity 1: the first five arms."""
    protan = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    deutan = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    for matrix in (protan, deutan):
        seen = [[sum(part * value for part, value in zip(row, (c ** 2.2 for c in colour(n)))) for row in matrix]
                for n in range(5)]
        for one, other in combinations([[max(value, 0) ** (1 / 2.2) for value in each] for each in seen], 2):
            assert max(abs(a - b) for a, b in zip(one, other)) > 0.12


def test_command_line_for_arms_and_experiments(tmp_path, capsys, monkeypatch):
    arms_of(tmp_path, muon=[3.2, 3.3], turbo=[3.1])
    words = [f"muon={tmp_path}/muon", f"turbo={tmp_path}/tur*", "--out", str(tmp_path / "both"), "--title", "A title"]
    assert main(["plot", *words]) == 0
    assert capsys.readouterr().out.split() == [f"{tmp_path}/both.png", f"{tmp_path}/both.svg"]
    assert "A title" in (tmp_path / "both.svg").read_text()
    folder = tmp_path / "experiment"
    make_run(folder / "runs" / "x-0", falling(3.0))
    (folder / "experiment.json").write_text(json.dumps({
        "schema": 1, "track": "somebody-3.3", "arms": [{"label": "x"}],
        "runs": [{"arm": "x", "index": 0, "folder": "runs/x-0", "status": "complete"}]}))
    assert main(["plot", str(folder)]) == 0 and "x (n = 1)" in (folder / "loss.svg").read_text()


def test_what_cannot_be_drawn(tmp_path, capsys):
    assert main(["plot", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert f"cannot read {tmp_path / 'record.json'}" in message and "expected a record's folder" in message
    arms_of(tmp_path, a=[3.2])
    make_run(tmp_path / "other", falling(1.0), track="text-local")
    make_run(tmp_path / "stopped", falling(1.0), status="interrupted")
    for words, expected in (((f"a={tmp_path}/a", f"b={tmp_path}/other"), "several tracks (somebody-3.3, text-local)"),
                            ((f"a={tmp_path}/a", str(tmp_path / "other")), "arms that are all called LABEL=PATH"),
                            ((f"a={tmp_path}/stopped",), "none of the runs is complete")):
        assert main(["plot", *words]) == 2
        assert expected in capsys.readouterr().err
