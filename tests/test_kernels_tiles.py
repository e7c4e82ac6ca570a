"""The choice of tiles: rules, the cache that tuning writes, and tuning with a stopwatch of our own."""

from dataclasses import replace

import pytest
import torch

from kernels import tiles, tune
from kernels.tiles import Tiles

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TURBORUN_CACHE", str(tmp_path / "cache"))
    tiles.tuned.cache_clear()
    yield tmp_path / "cache" / "tiles.json"
    tiles.tuned.cache_clear()


@pytest.mark.parametrize("n, batch, expected", [(256, 1, tiles.SMALL), (768, 1, tiles.SMALL), (768, 12, tiles.MIDDLE), (256, 64, tiles.NARROW),
                                                (768, 44, replace(tiles.MIDDLE, chunk=6, lanes=4)),
                                                (4096, 1, tiles.MIDDLE), (8192, 1, tiles.LARGE)])
def test_rules(n, batch, expected):
    assert tiles.default(n, batch, 132) == expected


def test_count_is_the_number_of_tiles_that_touch_the_upper_triangle():
    for cut in (Tiles(2, 2), Tiles(2, 4)):
        n = 16
        touching = sum(row <= column + cut.columns - cut.rows for row in range(0, n, cut.rows)
                       for column in range(0, n, cut.columns))
        assert cut.count(n) == touching


def test_tuned_tiles_are_remembered_for_this_device_n_and_batch_alone(cache):
    cut = Tiles(16, 16, depth=32)
    before = tiles.choose(40, 2, CPU)
    assert before != cut and not cache.exists()
    assert tiles.remember({tiles.key(40, 2, CPU): cut}) == cache
    tiles.remember({tiles.key(41, 2, CPU): Tiles(16, 32, depth=16)})
    tiles.tuned.cache_clear()  # as another process would
    assert tiles.choose(40, 2, CPU) == cut
    assert tiles.choose(41, 2, CPU) == Tiles(16, 32, depth=16)
    assert tiles.choose(40, 3, CPU) == tiles.default(40, 3, 3)
    assert [path.name for path in cache.parent.iterdir()] == ["tiles.json"]


@pytest.mark.parametrize("content", ["{", "[]", '{"cpu, 2 × 40": {"rows": 16}}', '{"cpu, 2 × 40": {"lines": 3}}',
                                     '{"cpu, 2 × 40": {"rows": 16, "columns": 17}}'])
def test_a_broken_cache_is_named_with_what_mends_it(cache, content):
    cache.parent.mkdir()
    cache.write_text(content)
    with pytest.raises(ValueError, match="tiles.json .*delete the file.*kernels.tune"):
        tiles.choose(40, 2, CPU)


def test_tune_takes_the_fastest_that_runs():
    cuts = [Tiles(16, 16, depth=16), Tiles(16, 32, depth=16), Tiles(32, 32, depth=16)]
    times = {cuts[0]: 30.0, cuts[1]: 20.0}
    asked, said = [], []

    def stopwatch(function, sets):
        cut = cuts[len(asked)]
        asked.append(cut)
        assert function(sets[0])[0].shape == (2, 20, 24)  # it is the real thing that is timed
        if cut not in times:
            raise RuntimeError("out of shared memory")
        return times[cut]

    assert tune.tune((2, 20, 24), cuts, stopwatch, CPU, said.append) == cuts[1]
    assert asked == cuts and "out of shared memory" in said[2]
    with pytest.raises(RuntimeError, match="none of 1 cuts"):
        tune.tune((2, 20, 24), [Tiles(4, 4, depth=4)], lambda function, sets: 1 / 0, CPU, said.append)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("shape, message", [("768x768", "cannot be tuned here"), ("768", "768"), ("axb", "axb")])
def test_tune_ends_with_one_clear_message(shape, message, capsys):
    assert tune.main([shape]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
