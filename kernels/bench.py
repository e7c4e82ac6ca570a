"""How fast and how exact orthogonalisation is here, beside the best public implementations and the chip's limit.

    python -m kernels.bench                       every row, about three minutes on an H200
    python -m kernels.bench --quick               five rows, under a minute
    python -m kernels.bench --shapes 768x3072 12x768x768 64x216+3x256x2304 --contenders "turbo fused" "NS5 compiled"
    python -m kernels.bench --json bench.json --plot bench.png

Two times: graph, the replay of a CUDA graph, is what the GPU needs; call, ordinary calls from Python, what a user waits
for. A contender maps a list of tensors (batch, n, m) to the list of their polar factors. This is a tool, not a kernel:
unlike the rest of this folder it imports optim and records.
"""

import argparse
import io
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from optim.geometry import directional_alignment, polar_error, polar_factor, singular_values
from optim.polar import POLARS, Polar
from records import environment
from records.files import RecordError, write_whole

Shape = tuple[int, int, int]  # batch, n, m
Contender = Callable[[list[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Anchor:
    """What the public implementations need, in µs: measured on one H200, torch 2.11, November 2026 (triton 3.6)."""

    ns5_graph: float   # torch Muon's five steps, compiled
    peer_graph: float  # the best of Dion, flash-newton-schulz, modded-nanogpt, flash-muon, Gram-NS, Polar Express, NS5
    peer: str          # which
    peer_call: float   # the best of them, not always the same one
    limit: float       # AOL + Gram form, four steps, at ROOFLINE_TFLOPS; 0.1 where it is less
    target: float      # what we want of graph


CIFAR = "64x216+64x576+256x576+3x256x2304"  # the six conv filters of a CIFAR speedrun
ANCHORS = {
    "256x256": Anchor(81, 74, "Turbo-Muon", 344, 0.3, 12),
    "512x512": Anchor(94, 73, "PE4 on Dion", 446, 2.7, 30),
    "768x768": Anchor(113, 96, "PE4 on Dion", 266, 9.2, 40),
    "1024x1024": Anchor(139, 110, "Turbo-Muon", 282, 22, 55),
    "2048x2048": Anchor(481, 331, "PE4 on Dion", 471, 174, 260),
    "4096x4096": Anchor(3272, 1931, "PE4 on Dion", 1928, 1392, 1750),
    "8192x8192": Anchor(25858, 14423, "PE4 on Dion", 14423, 11134, 13500),
    "768x3072": Anchor(170, 130, "PE4 on Dion", 266, 14, 45),
    "1024x4096": Anchor(280, 187, "Turbo-Muon", 493, 34, 75),
    "2048x8192": Anchor(1325, 990, "Turbo-Muon", 924, 272, 420),
    "4096x11008": Anchor(6984, 4351, "PE4 on Dion", 4351, 1832, 2500),
    "12x768x768": Anchor(470, 361, "PE4 on Dion", 464, 110, 190),
    "44x768x768": Anchor(1557, 1183, "PE4 on Dion", 1209, 404, 620),
    "12x768x3072": Anchor(1187, 822, "Turbo-Muon compiled", 813, 172, 330),
    "64x256x256": Anchor(208, 155, "PE4 on Dion", 376, 22, 45),
    "64x216": Anchor(73, 66, "Turbo-Muon", 254, 0.1, 10),
    "64x576": Anchor(76, 60, "Turbo-Muon", 414, 0.1, 12),
    "256x576": Anchor(87, 66, "Turbo-Muon", 285, 0.4, 20),
    "256x2304": Anchor(102, 83, "Turbo-Muon", 347, 0.8, 25),
    CIFAR: Anchor(527, 299, "Turbo-Muon grouped, 4 steps", 668, 3, 60),
}
QUICK = ("256x256", "768x768", "12x768x3072", "44x768x768", CIFAR)
ON_CPU = ("64x216", "64x576", "256x256")
ROOFLINE_TFLOPS = 790  # what `limit` assumes; an 8192³ bfloat16 product reached 783 in the same session
DISTRIBUTIONS = ("gaussian", "student-t2", "condition-1e3", "condition-1e6", "low-rank", "row-scaled")
ACCURACY = ("256x1024", "768x768", "768x3072")  # where every distribution is judged
VERIFIED_N = 2048  # the rows themselves are verified up to this n, on their Gaussian input
ENGINES = ("auto", "eager", "fused")
BASELINE = "NS5 compiled"
QUICK_CONTENDERS = ("torch.optim.Muon", BASELINE, "turbo eager", "turbo fused")
CONTENDERS = (*QUICK_CONTENDERS, "muon eager", "turbo-published eager", "turbo-published fused")
L2_BYTES, MOST_SETS = 60e6, 32  # of an H200; of input sets to rotate among
REPOSITORY = Path(__file__).resolve().parent.parent

# --- shapes, FLOPs, inputs -------------------------------------------------------------------------------------------


def parse_shapes(spec: str) -> tuple[Shape, ...]:
    """"768x3072", "12x768x768" (a batch) or several joined by + (a model's set) -> ((batch, n, m), …)."""
    shapes = []
    for part in spec.lower().replace("×", "x").split("+"):
        sizes = part.split("x")
        if len(sizes) not in (2, 3) or not all(s.isascii() and s.isdigit() and int(s) > 0 for s in sizes):
            raise argparse.ArgumentTypeError(f"{spec!r} is no shape: expected NxM, BATCHxNxM, or several joined by +")
        shapes.append(tuple(map(int, ["1", *sizes][-3:])))
    return tuple(shapes)


def spec_of(shapes: tuple[Shape, ...]) -> str:
    """The inverse of parse_shapes, in one spelling: the key into ANCHORS."""
    return "+".join("x".join(map(str, shape[shape[0] == 1:])) for shape in shapes)


def label_of(shapes: tuple[Shape, ...]) -> str:
    return "six conv filters" if spec_of(shapes) == CIFAR else spec_of(shapes).replace("x", "×")


def minimal_flops(shapes: tuple[Shape, ...]) -> int:
    """FLOPs of AOL + Gram form, four steps, one triangle of what is symmetric: 3n²m + 13n³ a matrix, n ≤ m."""
    return sum(batch * (3 * min(n, m) ** 2 * max(n, m) + 13 * min(n, m) ** 3) for batch, n, m in shapes)


def inputs(distribution: str, n: int, m: int, seed: int = 0, device="cpu", batch: int = 1) -> Tensor:
    """`batch` matrices (batch, n, m) float32, made on `device`; n > m gives transposes of the wide ones.

    gaussian        independent normal entries
    student-t2      Student's t with two degrees of freedom: infinite variance
    condition-1e3   singular values from 1 to 1e-3, even in the logarithm, in random directions; condition-1e6 likewise
    low-rank        rank n/16 plus 3 % of noise
    row-scaled      Gaussian rows times 1 to 1e-3
    """
    if n > m:
        return inputs(distribution, m, n, seed, device, batch).mT.contiguous()
    generator = torch.Generator(device).manual_seed(seed)

    def normal(rows, columns):
        return torch.randn(batch, rows, columns, generator=generator, device=device)

    gaussian = normal(n, m)
    if distribution == "gaussian":
        return gaussian
    if distribution == "student-t2":
        chi2 = -2 * torch.rand(batch, n, m, generator=generator, device=device).log()
        return gaussian / (chi2 / 2).sqrt()
    if distribution in ("condition-1e3", "condition-1e6"):
        u, v = (torch.linalg.qr(normal(k, n).double())[0] for k in (n, m))
        return ((u * torch.logspace(0, -int(distribution[-1]), n, device=device).double()) @ v.mT).float()
    if distribution == "low-rank":
        rank = max(1, n // 16)
        return normal(n, rank) @ normal(rank, m) / rank**0.5 + 0.03 * gaussian
    if distribution == "row-scaled":
        return gaussian * torch.logspace(0, -3, n, device=device)[:, None]
    raise ValueError(f"unknown distribution {distribution!r}: expected one of {', '.join(DISTRIBUTIONS)}")


def set_count(size: int) -> int:
    """Input sets of `size` bytes to rotate among, so that none is still in the L2 cache when its turn comes again.

    Of small ones MOST_SETS must do: they all fit, but then it is launches that take the time, not memory.
    """
    return 1 if size > L2_BYTES else min(MOST_SETS, math.ceil(2 * L2_BYTES / size))


# --- contenders ------------------------------------------------------------------------------------------------------


def polar_contender(polar: Polar, engine: str) -> Contender:
    return replace(polar, engine=engine).many


def torch_muon() -> Contender:
    """What torch.optim.Muon runs (a private function of torch), one matrix after the other as it does."""
    from torch.optim._muon import _zeropower_via_newtonschulz as orthogonalize

    coefficients = POLARS["muon"].coefficients[0]
    return lambda tensors: [orthogonalize(matrix, coefficients, 5, 1e-7) for x in tensors for matrix in x]


def ns5_compiled() -> Contender:
    """Five plain Newton-Schulz steps in bfloat16 through torch.compile, whose default mode captures no CUDA graph."""
    torch._dynamo.config.recompile_limit = 1024  # beyond it (8 by default) a new shape would silently run eager
    polar = replace(POLARS["muon"], dtype=torch.bfloat16, engine="eager")
    return torch.compile(polar.many, dynamic=False)


BUILDERS = {"torch.optim.Muon": torch_muon, BASELINE: ns5_compiled}  # every other is "<name in POLARS> <engine>"


def contender_name(name: str) -> str:
    polar, _, engine = name.rpartition(" ")
    if name in BUILDERS or (polar in POLARS and engine in ENGINES):
        return name
    raise argparse.ArgumentTypeError(f"unknown contender {name!r}: expected {', '.join(BUILDERS)}, or POLAR ENGINE of "
                                     f"{', '.join(POLARS)} and {', '.join(ENGINES)}, such as 'turbo fused'")


def build(name: str) -> Contender:
    """The contender of this name; where it cannot be built, one that raises why."""
    polar, _, engine = name.rpartition(" ")
    try:
        return BUILDERS[name]() if name in BUILDERS else polar_contender(POLARS[polar], engine)
    except Exception as error:
        why = error

        def unavailable(tensors):
            raise why

        return unavailable


# --- measuring -------------------------------------------------------------------------------------------------------


def seconds(function: Callable[[], object]) -> float:
    """Wall-clock time of function() with everything it launched on a GPU."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def call_us(contender: Contender, sets: list[list[Tensor]], samples: int) -> float:
    """Median over `samples` batches of ordinary calls, synchronised once a batch: µs a call."""
    rotating = itertools.cycle(sets)
    once = statistics.median(seconds(lambda: contender(next(rotating))) for _ in range(3))
    calls = max(1, min(200, math.ceil(4e-3 / once)))

    def several():
        for _ in range(calls):
            contender(next(rotating))

    return statistics.median(seconds(several) for _ in range(samples)) / calls * 1e6


def event_us(launch: Callable[[], object], samples: int) -> float:
    """Median over `samples` spans between CUDA events, of as many launches as take a millisecond: µs a launch."""
    launch()
    repeats = max(1, math.ceil(1e-3 / seconds(launch)))
    spans = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(samples)]
    for start, end in spans:
        start.record()
        for _ in range(repeats):
            launch()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in spans) / repeats * 1e3


def graph_us(contender: Contender, sets: list[list[Tensor]], samples: int) -> tuple[float, list[Tensor]]:
    """One CUDA graph that takes every set once, replayed: µs a set, and what it made of sets[0]."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # capture wants a warm-up on a stream of its own
        for tensors in sets:
            contender(tensors)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.stream(torch.cuda.current_stream()):  # a capture that fails can leave its own stream behind
        with torch.cuda.graph(graph):
            for tensors in sets[1:] + sets[:1]:
                result = contender(tensors)
    return event_us(graph.replay, samples) / len(sets), [x.clone() for x in result]


def ceilings(device: torch.device, samples: int) -> dict[str, float | None]:
    """What this GPU does at best, now: TFLOP/s of an 8192³ bfloat16 product, TB/s (read and written) of a copy."""
    if device.type != "cuda":
        return {"product_tflops": None, "copy_tb_per_s": None}
    a, b = inputs("gaussian", 8192, 8192, 0, device, batch=2).bfloat16()
    product = event_us(lambda: a @ b, samples)
    source, target = torch.empty(2, 2**30, dtype=torch.uint8, device=device)
    copy = event_us(lambda: target.copy_(source), samples)
    return {"product_tflops": 2 * 8192**3 / product / 1e6, "copy_tb_per_s": 2 * 2**30 / copy / 1e6}


def ends(tensors: list[Tensor], shapes: tuple[Shape, ...]) -> list[Tensor]:
    """First and last matrix of every batch, where a wrong offset shows. `tensors` may hold one (n, m) a matrix."""
    matrices = [matrix for x in tensors for matrix in (x if x.ndim == 3 else [x])]
    starts = itertools.accumulate((batch for batch, _, _ in shapes[:-1]), initial=0)
    return [matrices[i] for start, (batch, _, _) in zip(starts, shapes) for i in sorted({start, start + batch - 1})]


def reason(error: Exception) -> str:
    """One line that says why a contender cannot run."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0][:200]}"


def measure(contender: Contender, shapes: tuple[Shape, ...], sets: list[list[Tensor]], exact: list[Tensor] | None,
            samples: int) -> dict:
    """One contender on one row. exact: polar factors of ends(sets[0]), or None to leave the error unmeasured.

    Returns first_call_s, call_us, graph_us, polar_error (the largest, of the call and of the graph), each None where
    not measured, and why: None, or what went wrong.
    """
    result = dict.fromkeys(("first_call_s", "call_us", "graph_us", "polar_error", "why"))

    def verify(output):
        if exact is not None:
            worst = torch.stack([polar_error(o, e) for o, e in zip(ends(output, shapes), exact, strict=True)]).max()
            if not worst.isfinite():
                raise ArithmeticError("its output is not finite")
            result["polar_error"] = max(result["polar_error"] or 0, worst.item())

    try:
        sets = [[x.clone() for x in tensors] for tensors in sets]  # torch.optim.Muon overwrites bfloat16 input
        outputs = []
        result["first_call_s"] = seconds(lambda: outputs.append(contender(sets[0])))
        verify(outputs.pop())
        result["call_us"] = call_us(contender, sets, samples)
        if sets[0][0].is_cuda:
            result["graph_us"], output = graph_us(contender, sets, samples)
            verify(output)
    except Exception as error:  # whatever it is, the others can still be measured
        result["why"] = reason(error)
    return result


def measure_row(shapes: tuple[Shape, ...], contenders: dict[str, Contender], options, device: torch.device) -> dict:
    count = set_count(options.dtype.itemsize * sum(math.prod(shape) for shape in shapes))
    sets = [[inputs("gaussian", n, m, len(shapes) * seed + i, device, batch).to(options.dtype)
             for i, (batch, n, m) in enumerate(shapes)] for seed in range(count)]
    verified = max(min(n, m) for _, n, m in shapes) <= VERIFIED_N
    exact = [polar_factor(x) for x in ends(sets[0], shapes)] if verified else None
    anchor, flops = ANCHORS.get(spec_of(shapes)), minimal_flops(shapes)
    return {"label": label_of(shapes), "shapes": shapes, "sets": count, "flops": flops,
            "limit_us": flops / ROOFLINE_TFLOPS / 1e6, "anchor": asdict(anchor) if anchor else None,
            "results": {name: measure(contender, shapes, sets, exact, options.samples)
                        for name, contender in contenders.items()}}


def judge(contender: Contender, x: Tensor, exact: Tensor) -> dict:
    """Accuracy on x (1, n, m) with polar factor `exact` (n, m): polar_error, alignment, sigma_min, sigma_max, why."""
    result = dict.fromkeys(("polar_error", "alignment", "sigma_min", "sigma_max", "why"))
    try:
        o = ends(contender([x.clone()]), (tuple(x.shape),))[0]
        sigma = singular_values(o)
        found = (polar_error(o, exact), directional_alignment(o, exact), sigma[-1], sigma[0])
        if not all(value.isfinite() for value in found):
            raise ArithmeticError("its output is not finite, or 0")
        result.update(zip(result, (value.item() for value in found)))
    except Exception as error:
        result["why"] = reason(error)
    return result


def measure_accuracy(contenders: dict[str, Contender], options, device: torch.device) -> list[dict]:
    cells = []
    for shapes, distribution in itertools.product(map(parse_shapes, options.accuracy), DISTRIBUTIONS):
        x = inputs(distribution, *shapes[0][1:], 0, device).to(options.dtype)
        exact = polar_factor(x[0])
        cells.append({"label": f"{label_of(shapes)} {distribution}", "distribution": distribution, "shapes": shapes,
                      "results": {name: judge(contender, x, exact) for name, contender in contenders.items()}})
    return cells


# --- what follows from the measurements ------------------------------------------------------------------------------


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    return numerator / denominator if numerator and denominator else None


def derived(row: dict, ours: str) -> dict[str, float | None]:
    """Speed-ups (the other's time over ours: more is better) and fractions of a row of the report.

    × NS5 compares graph times where both have one, else calls. The peers' times are a GPU's: without graph times
    (CPU, or a capture that failed) nothing is compared with them.
    """
    mine, base, anchor = row["results"][ours], row["results"].get(BASELINE, {}), row["anchor"] or {}
    kind = "graph_us" if mine["graph_us"] and base.get("graph_us") else "call_us"
    return {
        "× NS5": ratio(base.get(kind), mine[kind]),
        "× peer graph": ratio(anchor.get("peer_graph"), mine["graph_us"]),
        "× peer call": ratio(anchor.get("peer_call"), mine["call_us"] if mine["graph_us"] else None),
        "TFLOP/s": ratio(row["flops"] / 1e6, mine["graph_us"] or mine["call_us"]),
        "of roofline": ratio(row["limit_us"], mine["graph_us"]),
        "of target": ratio(anchor.get("target"), mine["graph_us"]),
    }


def geometric_means(rows: list[dict], ours: str) -> dict[str, float | None]:
    """Geometric mean of every derived number, over the rows that have it."""
    columns = [derived(row, ours) for row in rows]
    found = {key: [column[key] for column in columns if column[key]] for key in columns[0]}
    return {key: statistics.geometric_mean(values) if values else None for key, values in found.items()}


# --- what is printed and drawn ---------------------------------------------------------------------------------------

HEADER = ("matrices", "graph µs", "call µs", "peer graph", "peer call", "× NS5", "× peer graph", "× peer call",
          "TFLOP/s", "of roofline", "of target", "polar error", "first call s")


def number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "n/a"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.{digits}g}"


def derived_cells(values: dict[str, float | None]) -> list[str]:
    return [f"{100 * value:.1f} %" if value and key.startswith("of ") else number(value)
            for key, value in values.items()]


def row_cells(row: dict, ours: str) -> list[str]:
    mine, anchor = row["results"][ours], row["anchor"] or {}
    error = number(mine["polar_error"]) if mine["polar_error"] or mine["why"] else "not measured"
    return [row["label"], *map(number, (mine["graph_us"], mine["call_us"], anchor.get("peer_graph"),
                                        anchor.get("peer_call"))),
            *derived_cells(derived(row, ours)), error, number(mine["first_call_s"], 2)]


def lines(rows: list[list[str]], widths: list[int] | None = None, header: bool = True) -> str:
    """Rows of a Markdown table, aligned: the first column to the left, numbers to the right."""
    widths = widths or [max(map(len, column)) for column in zip(*rows)]
    text = ["| " + " | ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths)))
            + " |" for row in rows]
    if header:
        text.insert(1, "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|")
    return "\n".join(text)


def details(report: dict) -> str:
    """What stands below the first table: all contenders' times, accuracy, and who could not run and why."""
    names, text = report["contenders"], []
    for cells, title, *keys in (
            ("rows", "Every contender: graph µs / call µs", "graph_us", "call_us"),
            ("accuracy", "Accuracy: polar error / directional alignment", "polar_error", "alignment"),
            ("accuracy", "Accuracy: smallest / largest singular value", "sigma_min", "sigma_max")):
        text += ["", title, "", lines([["", *names]] + [
            [cell["label"]] + [" / ".join(number(cell["results"][name][key]) for key in keys) for name in names]
            for cell in report[cells]])]
    reasons = {}
    for cell in report["rows"] + report["accuracy"]:
        for name, result in cell["results"].items():
            if result["why"]:
                reasons.setdefault(f"{name}: {result['why']}", []).append(cell["label"])
    text += ["", "Could not run, or not all of it:", ""] if reasons else []
    return "\n".join(text + [f"- {why} ({len(where)} times, first {where[0]})" for why, where in reasons.items()])


def draw(report: dict) -> bytes:
    """Our speed-up by size as a PNG, in two of Okabe and Ito's colours, which the colour-blind can tell apart."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = sorted(report["rows"], key=lambda row: row["flops"])
    figure = Figure(figsize=(10, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for key, text, color, marker in (
            ("× NS5", f"over {BASELINE}, same run", "#0072B2", "o"),
            ("× peer graph", "over the best peer, measured before on an H200", "#D55E00", "s")):
        speedups = [derived(row, report["ours"])[key] or math.nan for row in rows]
        if not all(map(math.isnan, speedups)):
            axes.plot(range(len(rows)), speedups, color=color, marker=marker, linewidth=0.8, label=text)
    axes.axhline(1, color="#6b6b6b", linewidth=1, linestyle="--", label="as fast")
    axes.set_yscale("log", base=2, subs=[1.5])
    axes.yaxis.set_minor_formatter("{x:g}×")
    axes.yaxis.set_major_formatter("{x:g}×")
    axes.set_xticks(range(len(rows)), [row["label"] for row in rows], rotation=45, ha="right")
    axes.set(xlabel="matrices, by arithmetic", ylabel="speed-up (more is better)",
             title=f"{report['ours']} on {report['device']}, torch {report['versions']['torch']}")
    axes.grid(axis="y", color="#e3e3e3")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


# --- the command -----------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, without the usage before it
        self.exit(2, f"kernels.bench: {message}\n")


def output_path(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir() or path.is_dir():  # said now, not after the minutes of measuring
        raise argparse.ArgumentTypeError(f"cannot write {text}: expected a file in a folder that exists")
    return path


def parse_arguments(argv: list[str], cuda: bool) -> argparse.Namespace:
    parser = Parser(prog="python -m kernels.bench", description="Time orthogonalisation and say how exact it is.")
    parser.add_argument("--quick", action="store_true", help="five rows, four contenders, one accuracy shape")
    parser.add_argument("--shapes", nargs="+", type=parse_shapes, metavar="SHAPE",
                        help="NxM, BATCHxNxM, or several joined by + (default: every published row)")
    parser.add_argument("--contenders", nargs="+", type=contender_name, metavar="NAME",
                        help=f"of {', '.join(map(repr, BUILDERS))}, or 'POLAR ENGINE' such as 'turbo fused'")
    parser.add_argument("--ours", type=contender_name, default="turbo fused" if cuda else "turbo eager",
                        metavar="NAME", help="the contender of the first table (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the inputs")
    parser.add_argument("--json", type=output_path, metavar="PATH", help="write every number there")
    parser.add_argument("--plot", type=output_path, metavar="PATH.png", help="draw the speed-ups there")
    options = parser.parse_args(argv)
    if options.plot and options.plot.suffix != ".png":
        parser.error(f"argument --plot: {options.plot}: expected a name that ends in .png")
    if options.plot and not find_spec("matplotlib"):
        parser.error("argument --plot needs matplotlib; install it with python -m pip install matplotlib")
    whole = cuda and not options.quick and not options.shapes
    options.samples = 30 if whole else 20
    options.accuracy = ACCURACY if whole else ACCURACY[:1] if cuda else ("32x96",)
    default = ON_CPU if not cuda else QUICK if options.quick else ANCHORS
    options.shapes = options.shapes or [parse_shapes(spec) for spec in default]
    names = options.contenders or (QUICK_CONTENDERS if options.quick else CONTENDERS)
    options.contenders = list(dict.fromkeys([*names, options.ours]))
    options.dtype = getattr(torch, options.dtype)
    return options


def say(text: str):
    print(f"kernels.bench: {text}", file=sys.stderr, flush=True)


def main(argv: list[str]) -> int:
    """Measure, print, write. Returns the exit status: 0, or 2 with one line on stderr where a file is refused."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options, began = parse_arguments(argv, device.type == "cuda"), time.monotonic()
    hardware, git, scrub = environment.hardware(device), environment.git(REPOSITORY), environment.Scrubber(REPOSITORY)
    report = {
        "schema": 1, "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": [scrub(word) for word in ("kernels.bench", *argv)], "device": hardware["accelerator"] or "CPU",
        "hardware": hardware, "versions": environment.versions(), "commit": git["commit"], "dirty": git["dirty"],
        "dtype": str(options.dtype).removeprefix("torch."), "samples": options.samples, "ours": options.ours,
        "contenders": options.contenders, "roofline_tflops": ROOFLINE_TFLOPS,
        "ceilings": ceilings(device, options.samples), "rows": [],
    }
    product, copy = map(number, report["ceilings"].values())
    print(f"{report['device']}, torch {torch.__version__}, triton {report['versions']['triton']}, {report['dtype']} "
          f"inputs. Ceilings now: 8192³ product {product} TFLOP/s, copy {copy} TB/s.\nOurs is {options.ours!r}. "
          f"× NS5: against {BASELINE!r} of this run. Peers: measured before, on one H200. "
          f"Roofline: {ROOFLINE_TFLOPS} TFLOP/s.\n", flush=True)
    contenders = {name: build(name) for name in options.contenders}
    for contender in contenders.values():  # so that a row's first call is the first of its shape, not the very first
        judge(contender, torch.ones(1, 24, 40, device=device, dtype=options.dtype), torch.ones(24, 40, device=device))
    labels = [label_of(shapes) for shapes in options.shapes]
    widths = [max(map(len, [*labels, "geometric mean"])), *(max(len(title), 9) for title in HEADER[1:])]
    print(lines([HEADER], widths), flush=True)
    for i, shapes in enumerate(options.shapes):
        say(f"row {i + 1} of {len(labels)}: {labels[i]} ({time.monotonic() - began:.0f} s so far)")
        report["rows"].append(measure_row(shapes, contenders, options, device))
        print(lines([row_cells(report["rows"][-1], options.ours)], widths, header=False), flush=True)
    report["geometric_means"] = means = geometric_means(report["rows"], options.ours)
    print(lines([["geometric mean", *[""] * 4, *derived_cells(means), "", ""]], widths, header=False), flush=True)
    say(f"accuracy ({time.monotonic() - began:.0f} s so far)")
    report["accuracy"] = measure_accuracy(contenders, options, device)
    report["seconds"] = round(time.monotonic() - began, 1)
    print(details(report))
    try:
        if options.json:
            write_whole(options.json, (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
        if options.plot:
            write_whole(options.plot, draw(report))
    except RecordError as error:
        say(f"cannot write: {error.__cause__}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
