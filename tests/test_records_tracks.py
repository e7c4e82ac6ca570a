"""The tracks: what each is made of, and that it agrees with the scripts, the data module and the records that exist."""
import json
import re
from pathlib import Path

import pytest

import train_cifar
import train_gpt
from data import fineweb
from records.check_source import departures
from records.tracks import TRACKS, get_track, metric_of

ROOT = Path(__file__).resolve().parent.parent


def test_the_tracks_that_the_repository_promises():
    assert list(TRACKS) == ["fineweb-3.28", "wiki-3.324", "cifar10-94", "cifar10-96", "cifar10-local",
                            "text-local"]
    assert get_track("cifar10-94").direction == "up" and get_track("wiki-3.324").direction == "down"
    assert get_track("fineweb-3.28").rule.alpha == 0.01
    assert metric_of("cifar10-local") == "accuracy" and get_track("cifar10-local").target is None
    assert get_track("mine") is None and metric_of("mine") == "val_loss" and metric_of("cifar10-96") == "accuracy"


@pytest.mark.parametrize("track", TRACKS.values(), ids=list(TRACKS))
def test_a_track_is_consistent(track):
    assert (track.target is None) == (track.rule is None)       # a rule without a target decides nothing
    assert track.target is None or f"{track.target:g}".replace("0.", "") in track.name
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in track.data.values())
    assert len(set(track.data.values())) == len(track.data)
    assert not track.rule or 0 < track.rule.alpha < 0.5 and track.rule.least_runs >= 2


@pytest.mark.parametrize("script, preset", [(script, preset) for script in (train_gpt, train_cifar)
                                            for preset in script.PRESETS])
def test_the_presets_run_the_tracks_that_they_name(script, preset):
    s = script.Settings(**script.PRESETS[preset])
    track = get_track(s.track)
    assert track.script == Path(script.__file__).name and s.target == track.target
    assert {name: getattr(s, name) for name in track.fixed} == track.fixed


def test_accuracy_on_a_part_of_the_test_images_is_not_the_tracks():
    run = {"command": ["train_cifar.py"], "target": 0.94, "config": {"test_images": 9000}, "data": {}, "validation": []}
    assert [text for _, text in departures(run, get_track("cifar10-94"))] == ["its test_images is 9000, the track's "
                                                                              "10000"]
    assert not departures(run | {"config": {"test_images": 10000}}, get_track("cifar10-94"))


def test_the_data_of_the_tracks():
    assert get_track("fineweb-3.28").data == {fineweb.file_names(1)[0]: fineweb.VAL_SHA256}
    [*found] = (ROOT / "records/wiki-3.324").glob("*/record.json")
    assert found
    for file in found:
        data = json.loads(file.read_text())["data"]
        assert data.items() <= get_track("wiki-3.324").data.items() and "val_000000.bin" in data
