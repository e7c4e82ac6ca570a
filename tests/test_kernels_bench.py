"""The benchmark: its arithmetic, its inputs, and a whole run on the CPU whose table is recomputed from its JSON."""

import argparse
import json
import math
from dataclasses import dataclass

import pytest
import torch
from matrices import DISTRIBUTIONS, make

from kernels import bench
from optim.geometry import condition, polar_factor, singular_values


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of tiny products: on a busy machine, waiting for a second thread takes longer than they do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- arithmetic and names --------------------------------------------------------------------------------------------


def test_the_flop_model_reproduces_the_limit_column():
    for spec, anchor in bench.ANCHORS.items():
        limit = bench.minimal_flops(bench.parse_shapes(spec)) / bench.ROOFLINE_TFLOPS / 1e6
        digit = 1 if anchor.limit >= 14 or spec == bench.CIFAR else 0.1  # what the column is rounded to
        if anchor.limit == 0.1:  # the two smallest, rounded up to what the column can show
            assert limit < 0.05
        else:
            assert abs(limit - anchor.limit) <= digit / 2, (spec, limit)
    assert round(bench.minimal_flops(((1, 8192, 8192),)) / 790e6) == 11134
    assert bench.minimal_flops(((12, 768, 3072),)) == 12 * (3 * 768**2 * 3072 + 13 * 768**3)
    assert bench.minimal_flops(((12, 3072, 768),)) == bench.minimal_flops(((12, 768, 3072),))


def test_every_published_row_is_here():
    assert len(bench.ANCHORS) == 20
    assert all(bench.spec_of(bench.parse_shapes(spec)) == spec for spec in bench.ANCHORS)
    assert set(bench.QUICK) | set(bench.ON_CPU) <= set(bench.ANCHORS)
    assert bench.parse_shapes(bench.CIFAR) == ((1, 64, 216), (1, 64, 576), (1, 256, 576), (3, 256, 2304))
    for anchor in bench.ANCHORS.values():
        assert anchor.limit < anchor.target < anchor.peer_graph <= anchor.ns5_graph


def test_shapes_are_parsed_and_mistakes_named():
    assert bench.parse_shapes("768x3072") == ((1, 768, 3072),)
    assert bench.parse_shapes("12×768X768+1x4x5") == ((12, 768, 768), (1, 4, 5))
    assert bench.spec_of(bench.parse_shapes("1x4x5")) == "4x5"
    for wrong in ("", "768", "0x5", "-1x5", "2x3x4x5", "axb", "4x5+", "4 x5", "4.0x5", "²x3"):
        with pytest.raises(argparse.ArgumentTypeError, match="NxM, BATCHxNxM"):
            bench.parse_shapes(wrong)


@pytest.mark.parametrize("arguments, says", [
    (["--shapes", "768"], "'768' is no shape"),
    (["--contenders", "turbo fast"], "'turbo fused'"),
    (["--contenders", "turbo-muon eager"], "turbo-published"),
    (["--ours", "fused"], "unknown contender 'fused'"),
    (["--dtype", "float64"], "float32"),
    (["--json", "/nowhere/at/all.json"], "cannot write /nowhere/at/all.json"),
    (["--plot", "curve.pdf"], "curve.pdf: expected a name that ends in .png"),
    (["--fast"], "--fast"),
])
def test_bad_arguments_end_with_one_line(arguments, says, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(arguments)
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and captured.out == ""
    assert captured.err.startswith("kernels.bench: ") and captured.err.count("\n") == 1 and says in captured.err


def test_options_choose_rows_samples_and_contenders():
    gpu, quick, cpu = (bench.parse_arguments(*given) for given in (([], True), (["--quick"], True), ([], False)))
    assert len(gpu.shapes) == 20 and gpu.accuracy == bench.ACCURACY and gpu.ours == "turbo fused"
    assert len(quick.shapes) == 5 and 20 <= quick.samples < gpu.samples and len(quick.accuracy) == 1
    assert len(cpu.shapes) == 3 and cpu.ours == "turbo eager"
    alone = bench.parse_arguments(["--contenders", "muon eager", "--ours", "turbo auto"], False)
    assert alone.contenders == ["muon eager", "turbo auto"]


def test_rotation_leaves_the_cache_and_stays_bounded():
    for size in (4, 10**6, 10**7, 59 * 10**6, 61 * 10**6, 10**9):
        count = bench.set_count(size)
        assert 1 <= count <= bench.MOST_SETS
        assert size * count > bench.L2_BYTES or count == bench.MOST_SETS
    assert bench.set_count(10**9) == 1 and bench.set_count(4) == bench.MOST_SETS


def test_a_call_time_is_the_median_over_all_sets(monkeypatch):
    now, seen = [0.0], []

    def contender(tensors):  # a second each, but the 37th, which hiccups
        seen.append(tensors[0])
        now[0] += 100 if len(seen) == 37 else 1

    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    assert bench.call_us(contender, [["a"], ["b"], ["c"]], samples=20) == 1e6
    assert {seen.count(name) for name in "abc"} <= {len(seen) // 3, len(seen) // 3 + 1}
    assert seen[:4] == ["a", "b", "c", "a"] and len(seen) >= 20


# --- inputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_inputs_are_what_the_other_tests_use(distribution):
    x = bench.inputs(distribution, 48, 80, seed=3)
    assert x.shape == (1, 48, 80) and x.dtype == torch.float32
    if distribution != "low-rank":  # whose factors are drawn in another order
        assert torch.allclose(x[0], make(distribution, 48, 80, seed=3), atol=1e-5)


@pytest.mark.parametrize("shape", [(64, 160), (160, 64), (64, 64)])
@pytest.mark.parametrize("distribution", bench.DISTRIBUTIONS)
def test_inputs_have_the_property_they_claim(distribution, shape):
    x = bench.inputs(distribution, *shape, batch=3)
    assert x.shape == (3, *shape) and x.is_contiguous() and x.isfinite().all()
    assert torch.equal(x, bench.inputs(distribution, *shape, batch=3))
    assert not torch.equal(x[0], x[1]) and not torch.equal(x, bench.inputs(distribution, *shape, seed=1, batch=3))
    x = x if shape[0] <= shape[1] else x.mT
    values, rows = singular_values(x), x.double().norm(dim=-1)
    if distribution == "gaussian":
        assert abs(x.std() - 1) < 0.02 and abs(x.mean()) < 0.02
    elif distribution == "student-t2":
        assert abs(x.abs().median() - 0.816) < 0.05 and x.abs().max() > 30  # the median of |t₂| is √(2/3)
    elif distribution.startswith("condition"):
        decades = int(distribution[-1])
        expected = torch.logspace(0, -decades, 64, dtype=torch.float64).expand(3, -1)
        assert torch.allclose(values, expected, rtol=0.03 if decades == 6 else 1e-4)
        assert torch.allclose(condition(x), torch.tensor(10.0**decades).double(), rtol=0.03)
    elif distribution == "low-rank":
        assert (values[:, 3] > 10 * values[:, 4]).all() and (values[:, -1] > 0).all()
    else:
        assert torch.allclose(rows[:, 0] / rows[:, -1], torch.tensor(1e3).double(), rtol=0.5)


def test_an_unknown_distribution_and_the_smallest_matrices():
    with pytest.raises(ValueError, match="gaussian, student-t2"):
        bench.inputs("uniform", 4, 4)
    for distribution in bench.DISTRIBUTIONS:
        assert bench.inputs(distribution, 1, 2).isfinite().all()


# --- contenders ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stub:
    """A Polar as it will be: with an engine and with `many`."""

    engine: str = "auto"

    def __call__(self, x):
        return polar_factor(x).float()

    def many(self, tensors):
        if self.engine == "fused":
            raise RuntimeError("needs a Hopper GPU\nand more | lines")
        return [self(x) for x in tensors]


@pytest.fixture
def small_baseline(monkeypatch):
    """The baseline without torch.compile, which takes half a minute on a slow CPU."""
    monkeypatch.setitem(bench.BUILDERS, bench.BASELINE, lambda: bench.polar_contender(bench.POLARS["muon"], "eager"))


def rows_and_sets(shapes, count=2):
    sets = [[bench.inputs("gaussian", n, m, seed, batch=batch) for batch, n, m in shapes] for seed in range(count)]
    return sets, [polar_factor(x) for x in bench.ends(sets[0], shapes)]


def test_ends_are_the_first_and_last_of_every_batch():
    shapes = ((3, 2, 4), (1, 2, 5), (2, 2, 6))
    tensors = [torch.full(shape, i) + torch.arange(shape[0])[:, None, None] / 10 for i, shape in enumerate(shapes)]
    expected = [0.0, 0.2, 1.0, 2.0, 2.1]
    assert [round(x[0, 0].item(), 1) for x in bench.ends(tensors, shapes)] == expected
    one_by_one = [matrix for x in tensors for matrix in x]
    assert [round(x[0, 0].item(), 1) for x in bench.ends(one_by_one, shapes)] == expected


def test_polar_contenders_pass_the_engine_on_and_use_many():
    x = bench.inputs("gaussian", 8, 12)
    assert torch.allclose(bench.polar_contender(Stub(), "eager")([x])[0], polar_factor(x).float())
    with pytest.raises(RuntimeError, match="Hopper"):
        bench.polar_contender(Stub(), "fused")([x])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_routine_equals_muon_and_leaves_the_inputs(dtype):
    shapes = ((2, 8, 24), (1, 24, 8))
    sets, exact = rows_and_sets(shapes)
    sets = [[x.to(dtype) for x in tensors] for tensors in sets]
    before = [[x.clone() for x in tensors] for tensors in sets]
    result = bench.measure(bench.build("torch.optim.Muon"), shapes, sets, exact, 2)
    assert result["why"] is None and 0 < result["polar_error"] < 0.5
    assert all(torch.equal(a, b) for s, t in zip(sets, before) for a, b in zip(s, t))


def test_a_contender_that_fails_or_is_wrong_is_reported():
    shapes = ((2, 8, 12),)
    sets, exact = rows_and_sets(shapes)

    def measured(contender):
        return bench.measure(contender, shapes, sets, exact, 2)

    assert measured(Stub(engine="fused").many)["why"] == "RuntimeError: needs a Hopper GPU"
    nan = measured(lambda tensors: [x * math.nan for x in tensors])
    assert nan["why"] == "ArithmeticError: its output is not finite" and nan["polar_error"] is None
    assert "IndexError" in measured(lambda tensors: [])["why"]
    half = measured(lambda tensors: [torch.cat([polar_factor(x[:1]), 0 * x[1:]]) for x in tensors])
    assert half["why"] is None and half["polar_error"] == 1  # right for the first of the batch only
    good = measured(Stub().many)
    assert good["polar_error"] < 1e-6 and good["call_us"] > 0 and good["graph_us"] is None
    assert bench.measure(Stub().many, shapes, sets, None, 2)["polar_error"] is None
    judged = bench.judge(Stub(engine="fused").many, sets[0][0][:1], exact[0])
    assert judged["why"] == "RuntimeError: needs a Hopper GPU" and judged["polar_error"] is None
    judged = bench.judge(lambda tensors: [1.5 * polar_factor(x) for x in tensors], sets[0][0][:1], exact[0])
    assert [judged.pop("why"), *(round(value, 6) for value in judged.values())] == [None, 0.5, 1, 1.5, 1.5]


# --- a whole run -----------------------------------------------------------------------------------------------------


def cells_of(table_line):
    return [cell.strip() for cell in table_line.strip().strip("|").split("|")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks at what a CPU run says")
def test_a_run_on_the_cpu_prints_what_its_json_says(tmp_path, capsys, monkeypatch, small_baseline):
    def broken():
        raise OSError("no such | kernel")

    monkeypatch.setitem(bench.BUILDERS, "broken", broken)
    path, image = tmp_path / "bench.json", tmp_path / "bench.png"
    assert bench.main(["--shapes", "16x32", "2x24x24", "64x216", "--json", str(path), "--plot", str(image),
                       "--contenders", "torch.optim.Muon", bench.BASELINE, "broken"]) == 0
    printed, errors = capsys.readouterr()
    report = json.loads(path.read_text())
    assert report["contenders"] == ["torch.optim.Muon", bench.BASELINE, "broken", "turbo eager"]
    assert report["device"] == "CPU" and report["versions"]["torch"] == torch.__version__ and report["seconds"] > 0
    assert str(tmp_path) not in path.read_text() and "row 3 of 3: 64×216" in errors

    tables = [block.splitlines() for block in printed.split("\n\n") if block.startswith("|")]
    assert len(tables) == 4 and all(len({len(text) for text in table}) == 1 for table in tables), "aligned"
    header, _, *rows, means = tables[0]
    assert [cells_of(row)[0] for row in rows] == ["16×32", "2×24×24", "64×216"]
    speedups = []
    for row, told in zip(report["rows"], rows):
        told = dict(zip(cells_of(header), cells_of(told)))
        ours, base = (row["results"][name] for name in ("turbo eager", bench.BASELINE))
        flops = sum(b * (3 * n * n * m + 13 * n**3) for b, n, m in row["shapes"])
        speedups.append(base["call_us"] / ours["call_us"])
        assert told["graph µs"] == told["× peer graph"] == told["of roofline"] == told["of target"] == "n/a"
        assert float(told["call µs"]) == pytest.approx(ours["call_us"], rel=0.01)
        assert float(told["× NS5"]) == pytest.approx(speedups[-1], rel=0.01)
        assert float(told["TFLOP/s"]) == pytest.approx(flops / ours["call_us"] / 1e6, rel=0.01)
        assert float(told["polar error"]) == pytest.approx(ours["polar_error"], rel=0.01) and ours["polar_error"] < 0.6
        assert row["results"]["broken"]["why"] == "OSError: no such | kernel" and ours["first_call_s"] > 0
        assert row["limit_us"] == pytest.approx(flops / 790e6) and row["sets"] == bench.MOST_SETS
    assert told["peer graph"] == "66" and told["peer call"] == "254" and report["rows"][2]["anchor"]["target"] == 10
    mean = math.prod(speedups) ** (1 / 3)
    assert report["geometric_means"]["× NS5"] == pytest.approx(mean) and report["geometric_means"]["of target"] is None
    assert float(cells_of(means)[cells_of(header).index("× NS5")]) == pytest.approx(mean, rel=0.01)

    assert [cell["distribution"] for cell in report["accuracy"]] == list(bench.DISTRIBUTIONS)
    for cell, told in zip(report["accuracy"], tables[2][2:]):
        result = cell["results"]["turbo eager"]
        error, alignment = map(float, cells_of(told)[-1].split(" / "))
        assert error == pytest.approx(result["polar_error"], rel=0.01)
        assert alignment == pytest.approx(result["alignment"], rel=0.01)
        assert result["sigma_min"] < result["sigma_max"] < 1.3
    assert "- broken: OSError: no such | kernel (9 times, first 16×32)" in printed
    assert image.read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 2


def made_up_row(ours, base, spec="768x768"):
    blank = dict.fromkeys(("graph_us", "call_us", "polar_error", "first_call_s", "why"))
    shapes = bench.parse_shapes(spec)
    anchor = bench.ANCHORS.get(spec)
    return {"label": spec, "shapes": shapes, "flops": bench.minimal_flops(shapes), "sets": 1,
            "limit_us": bench.minimal_flops(shapes) / 790e6, "anchor": anchor and bench.asdict(anchor),
            "results": {"ours": blank | ours, bench.BASELINE: blank | base}}


def test_speedups_compare_like_with_like():
    both = bench.derived(made_up_row({"graph_us": 40, "call_us": 133}, {"graph_us": 120, "call_us": 200}), "ours")
    assert both["× NS5"] == 3 and both["× peer graph"] == 96 / 40 and both["× peer call"] == 2
    assert both["of target"] == 1 and both["of roofline"] == pytest.approx(9.17 / 40, rel=1e-3)
    assert both["TFLOP/s"] == pytest.approx(16 * 768**3 / 40e-6 / 1e12)
    calls = bench.derived(made_up_row({"call_us": 100}, {"graph_us": 120, "call_us": 200}), "ours")
    assert calls["× NS5"] == 2 and calls["× peer graph"] is calls["× peer call"] is calls["of roofline"] is None
    nothing = made_up_row({"why": "RuntimeError: no"}, {"graph_us": 120, "call_us": 200})
    assert set(bench.derived(nothing, "ours").values()) == {None}
    unpublished = bench.derived(made_up_row({"graph_us": 40, "call_us": 133}, {"graph_us": 80}, "10x10"), "ours")
    assert unpublished["× NS5"] == 2 and unpublished["× peer graph"] is unpublished["of target"] is None
    means = bench.geometric_means([made_up_row({"graph_us": 40}, {"graph_us": 80}), nothing,
                                   made_up_row({"graph_us": 10}, {"graph_us": 80})], "ours")
    assert means["× NS5"] == pytest.approx(4) and means["of target"] == pytest.approx(2)


def test_cells_say_what_was_not_measured():
    row = made_up_row({"graph_us": 16000, "call_us": 16001.5, "first_call_s": 0.5}, {}, "8192x8192")
    cells = dict(zip(bench.HEADER, bench.row_cells(row, "ours")))
    assert cells["polar error"] == "not measured" and cells["of roofline"] == "69.6 %" and cells["× NS5"] == "n/a"
    assert cells["peer graph"] == "14423" and cells["first call s"] == "0.5" and cells["graph µs"] == "16000"
    row["results"]["ours"] = dict.fromkeys(row["results"]["ours"]) | {"why": "RuntimeError: no"}
    assert dict(zip(bench.HEADER, bench.row_cells(row, "ours")))["polar error"] == "n/a"


@pytest.mark.filterwarnings("error")  # matplotlib warns where the layout fails
@pytest.mark.parametrize("graph_us", [40, None])
def test_the_plot_shows_both_speedups_where_there_are_both(graph_us):
    image = pytest.importorskip("matplotlib.image")
    import io

    rows = [made_up_row({"graph_us": graph_us, "call_us": 50}, {"graph_us": 120, "call_us": 90}, spec)
            for spec in bench.ANCHORS]
    png = bench.draw({"rows": rows, "ours": "ours", "device": "GPU", "versions": {"torch": "2"}})
    pixels = image.imread(io.BytesIO(png))[..., :3]

    def amount(red, green, blue):
        return int((abs(pixels - [red / 255, green / 255, blue / 255]).max(-1) < 0.1).sum())

    assert amount(0x00, 0x72, 0xB2) > 500 and (amount(0xD5, 0x5E, 0x00) > 500) == (graph_us is not None)


def test_a_file_that_cannot_be_written_is_named(tmp_path, capsys, monkeypatch, small_baseline):
    monkeypatch.setattr(bench, "write_whole", lambda path, content: bench_error(path))
    assert bench.main(["--shapes", "4x4", "--contenders", "muon eager", "--json", str(tmp_path / "a.json")]) == 2
    assert "kernels.bench: cannot write: [Errno 28] full" in capsys.readouterr().err


def bench_error(path):
    raise bench.RecordError(f"cannot write {path}") from OSError(28, "full")


@pytest.mark.gpu
def test_a_quick_run_on_the_gpu(tmp_path, capsys):
    path = tmp_path / "bench.json"
    assert bench.main(["--shapes", "256x256", "3x64x96+32x32", "--json", str(path), "--ours", "turbo eager"]) == 0
    report = json.loads(path.read_text())
    for row in report["rows"]:
        for name in ("torch.optim.Muon", bench.BASELINE, "turbo eager"):
            result = row["results"][name]
            assert result["why"] is None and 0 < result["graph_us"] < result["call_us"] * 1.5, name
            assert result["polar_error"] < 0.6
    assert report["ceilings"]["product_tflops"] > 10 and report["ceilings"]["copy_tb_per_s"] > 0.1
    assert "fused" in capsys.readouterr().out
