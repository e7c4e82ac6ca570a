"""Studies of what the optimizer orthogonalises: each command writes NAME.json, NAME.md and NAME.png into a folder.

    python -m optim.studies capture --at 20 60 120 190 --to /tmp/run.pt -- --preset wiki --steps 200 --optimizer muon
                                    train, and keep momentum M and second moment V of every matrix at those steps
    python -m optim.studies polar [--captured /tmp/run.pt]         error and alignment after each step, of every method
    python -m optim.studies operators --captured /tmp/run.pt       conditioning and error by operator, layer and stage
    python -m optim.studies second-moment --captured /tmp/run.pt   what dividing by √V does to the spectrum
    python -m optim.studies memory                                 bytes of state for a parameter, of every recipe
    python -m optim.studies spectra --captured /tmp/run.pt --to spectra.json       what optim.fit reads with --spectra

Folders are records/studies/NAME unless --out names another. The files are this command's: write what you make of them
into a README beside them. This is a tool: unlike the rest of this folder it imports records, and train_gpt for capture.
"""

import argparse
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, median

import numpy as np
import torch
from torch import Tensor, nn

from kernels.bench import DISTRIBUTIONS, inputs, lines, number, parse_shapes
from records import environment
from records.files import RecordError, write_whole

from . import OPTIMIZERS, Muon, get_optimizer, route, state_bytes
from .amo import AMO, Budget, operator_type, relative_residuals
from .collectives import Ranks
from .fit import Spectrum, error, momentum_entry, spectrum, test_entry, write_study
from .geometry import directional_alignment, polar_error, polar_factor, scaled_gram, singular_values
from .polar import POLARS
from .probe import spectral, spread
from .second_moment import momentum_update

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDER = Path("records/studies")
AMOS = {"amo": ("muon", AMO(average_steps=5, max_steps=7)), "turbo-amo": ("turbo", AMO(average_steps=4))}


class StudyError(ValueError):
    """A study cannot be made; the message says what is missing."""


# --- what a run leaves ------------------------------------------------------------------------------------------------


class Capture:
    """Keeps, at some steps, what the Muons of an optimizer orthogonalise, and the second moments of its gradients.

        capture = Capture(optimizer, at=(20, 120))          # before the first step; then train, on one process
        capture.save("run.pt", "what run this was")

    at     steps, counted from 1; kept after the optimizer's step, on the CPU
    beta2  of V ← β₂V + (1 − β₂)G², which starts at 0; Muon²'s (arXiv 2604.09967)

    An entry is a dict of step, name, operator, layer, momentum and second_moment (n, m) float32: M = G + μ(B − G) with
    Nesterov, else B; never divided by √V, whatever the optimizer does. V costs as much memory as the momentum.
    """

    def __init__(self, optimizer, at: Iterable[int], beta2: float = 0.95):
        self.muons = [one for one in getattr(optimizer, "optimizers", [optimizer]) if isinstance(one, Muon)]
        if not self.muons:
            raise StudyError("capture needs an optimizer with a Muon in it: this one has none")
        if any(muon.ranks.size > 1 for muon in self.muons):
            raise StudyError("capture needs one process: with many, each sees its own gradients and holds a share")
        self.at, self.beta2, self.step = set(at), beta2, 0
        self.squares: dict[Tensor, Tensor] = {}
        self.entries: list[dict] = []
        optimizer.register_step_pre_hook(lambda *_: self._before())
        optimizer.register_step_post_hook(lambda *_: self._after())

    def _parameters(self):
        return [(bank, name, p) for muon in self.muons for bank in muon.banks
                for name, p in zip(bank.names, bank.params) if p.grad is not None]

    @torch.no_grad()
    def _before(self) -> None:
        for _, _, p in self._parameters():
            if p not in self.squares:
                self.squares[p] = torch.zeros_like(p, dtype=torch.float32)
            grad = p.grad.float()
            self.squares[p].mul_(self.beta2).addcmul_(grad, grad, value=1 - self.beta2)

    @torch.no_grad()
    def _after(self) -> None:
        self.step += 1
        if self.step not in self.at:
            return
        states = {p: muon.state[p] for muon in self.muons for bank in muon.banks for p in bank.params}
        for bank, name, p in self._parameters():
            momentum = states[p]["momentum_buffer"]
            if bank.group["nesterov"]:
                momentum = p.grad.to(momentum.dtype).lerp(momentum, bank.group["momentum"])
            layer = re.search(r"\d+", name)
            for part, (m, v) in enumerate(zip(*(x.reshape(bank.shape).float().cpu() for x in
                                                (momentum, self.squares[p])))):
                self.entries.append({"step": self.step, "name": name + f"[{part}]" * (bank.shape[0] > 1),
                                     "operator": operator_type(name), "layer": int(layer[0]) if layer else 0,
                                     "momentum": m.clone(), "second_moment": v.clone()})

    def save(self, path: Path | str, about: str) -> None:
        """torch.save of {"about": str, "beta2", "entries"}. StudyError if a step was never reached."""
        if missing := self.at - {entry["step"] for entry in self.entries}:
            raise StudyError(f"capture: the run ended before step {min(missing)}, after {self.step}")
        torch.save({"about": about, "beta2": self.beta2, "entries": self.entries}, path)


def read_captured(path: Path | None) -> dict:
    """What Capture.save wrote. StudyError where it is not there or something else."""
    if path is None or not path.is_file():
        raise StudyError(f"no captured run at {path}: make one with python -m optim.studies capture")
    captured = torch.load(path, weights_only=True, mmap=True)
    if not isinstance(captured, dict) or not captured.get("entries"):
        raise StudyError(f"{path} holds no captured run: expected a file of python -m optim.studies capture")
    return captured


def capture(options) -> None:
    import train_gpt

    made: list[Capture] = []
    make_optimizer = train_gpt.make_optimizer

    def watched(*arguments):
        optimizer = make_optimizer(*arguments)
        made[:] = [Capture(optimizer, options.at)]  # the last that is made trains, those before warm up
        return optimizer

    train_gpt.make_optimizer = watched
    try:
        train_gpt.main(options.arguments)
    finally:
        train_gpt.make_optimizer = make_optimizer
    scrub = environment.Scrubber(REPOSITORY)
    made[0].save(options.to, " ".join(["train_gpt.py", *map(scrub, options.arguments)]))
    print(f"{len(made[0].entries)} matrices in {options.to}")


def spectra(options) -> None:
    """Entries by step and operator, and the test matrices, as the study that optim.fit fits to."""
    captured, groups = read_captured(options.captured), {}
    for entry in captured["entries"]:
        groups.setdefault((entry["step"], entry["operator"]), []).append(entry["momentum"])
    momentum = []
    for (step, operator), matrices in groups.items():
        kept = [[spectrum(x.to(options.device), mode) for x in matrices] for mode in ("aol", "frobenius")]
        momentum.append(momentum_entry(step, operator, *kept))
    tests = [test_entry(distribution, inputs(distribution, n, m)[0]) for _, n, m in options.shapes
             for distribution in DISTRIBUTIONS if distribution != "condition-1e6"]
    write_study(options.to, {"run": captured["about"]}, momentum, tests)


# --- (a) after each step ---------------------------------------------------------------------------------------------


def after_each_step(x: Tensor, method: str) -> dict[str, list[float]]:
    """polar_error and alignment of x (n, m) after 1, 2, … steps of a method, by the engine it takes on x's device."""
    exact, whole = polar_factor(x), POLARS[method]
    results = [replace(whole, coefficients=whole.coefficients[:steps])(x)
               for steps in range(1, len(whole.coefficients) + 1)]
    return {"polar_error": [polar_error(o, exact).item() for o in results],
            "alignment": [directional_alignment(o, exact).item() for o in results]}


def polar(options) -> tuple[dict, str, Callable]:
    cases = {f"{distribution} {n}×{m}": [inputs(distribution, n, m)[0]] for _, n, m in options.shapes
             for distribution in DISTRIBUTIONS}
    about = None
    if options.captured:
        captured = read_captured(options.captured)
        about = captured["about"]
        for entry in some(captured["entries"], options.matrices):
            cases.setdefault(f"momentum, step {entry['step']}: {entry['operator']}", []).append(entry["momentum"])
        for stage in sorted({entry["step"] for entry in captured["entries"]}):
            cases[f"momentum, step {stage}"] = []  # the mean of its operators, below
    rows = []
    for case, matrices in cases.items():
        for method in POLARS:
            if matrices:
                found = [after_each_step(x.to(options.device), method) for x in matrices]
            else:
                found = [row for row in rows if row["input"].startswith(case + ":") and row["method"] == method]
            rows.append({"input": case, "method": method, "matrices": len(matrices) or None,
                         **{key: [fmean(column) for column in zip(*(one[key] for one in found))]
                            for key in ("polar_error", "alignment")}})
    chosen = [case for case in cases if ":" not in case]
    by = {(row["input"], row["method"]): row for row in rows}
    final = [["polar error / alignment", *POLARS]] + [
        [case, *(" / ".join(number(by[case, method][key][-1]) for key in ("polar_error", "alignment"))
                 for method in POLARS)] for case in cases]
    most = max(len(one.coefficients) for one in POLARS.values())
    stepwise = [["polar error after step", *map(str, range(1, most + 1))]] + [
        [f"{case}, {method}", *map(number, by[case, method]["polar_error"]),
         *[""] * (most - len(by[case, method]["polar_error"]))] for case in chosen for method in POLARS]
    text = ("After all steps, in the precision that a method has on this device; means over the matrices.\n\n"
            f"{lines(final)}\n\nAfter each step; alignments are in polar.json.\n\n{lines(stepwise)}\n")

    def draw(figure):
        shown = chosen[: len(DISTRIBUTIONS)] + [case for case in chosen if case.startswith("momentum")]
        panels = figure.subplots(2, len(shown), sharex=True, sharey="row", squeeze=False)
        for column, case in enumerate(shown):
            for row, key in enumerate(("polar_error", "alignment")):
                for style, method in zip(styles(), POLARS):
                    values = by[case, method][key]
                    panels[row][column].plot(range(1, len(values) + 1), values, label=method, **style)
                panels[row][column].grid(color="#e3e3e3")
            panels[0][column].set(title=case.replace(", ", ",\n"), yscale="log")
            panels[1][column].set(xlabel="steps")
        panels[0][0].set(ylabel="polar error")
        panels[1][0].set(ylabel="directional alignment")
        figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
        return 2.6 * len(shown), 6.5

    return {"captured": about, "rows": rows}, text, draw


# --- (b) by operator, layer and stage --------------------------------------------------------------------------------


def modes_of(x: Tensor) -> dict[tuple[str, bool], Spectrum]:
    """(normalize, bound) of a Polar -> the Spectrum of x (n, m) that its steps start from."""
    plain = {normalize: spectrum(x, normalize) for normalize in ("aol", "frobenius")}
    return {(normalize, bound): one.bounded() if bound else one
            for normalize, one in plain.items() for bound in (False, True)}


def errors_of(x: Tensor) -> dict[str, float]:
    """Method -> polar error on x (n, m) in exact arithmetic."""
    modes = modes_of(x)
    return {name: error(one.coefficients, modes[one.normalize, one.bound]) for name, one in POLARS.items()}


def allocations(members: Sequence[tuple[str, Tensor]], device: torch.device) -> dict[str, dict]:
    """Recipe -> what AMO would commit to if it had sampled just these: (operator, x (n, m)) each."""
    result = {}
    for recipe, (base, amo) in AMOS.items():
        budget = Budget(amo, POLARS[base], Ranks())
        sampled, shapes = {}, {}
        for operator, x in members:
            found = relative_residuals(scaled_gram(x, POLARS[base].normalize), budget.sets, POLARS[base].bound)
            sums = sampled.setdefault(operator, [0.0] * (1 + len(budget.sets)))
            sampled[operator] = [total + value for total, value in zip(sums, [1.0, *found])]
            shapes.setdefault(operator, []).append(tuple(x.shape))
        result[recipe] = budget.decide(sampled, shapes, device)
    return result


def operators(options) -> tuple[dict, str, Callable]:
    captured = read_captured(options.captured)
    stages = sorted({entry["step"] for entry in captured["entries"]})
    names = sorted({entry["operator"] for entry in captured["entries"]})
    rows, committed = [], {}
    for entry in captured["entries"]:
        x = entry["momentum"].to(options.device)
        if not x.any():
            continue
        rows.append({key: entry[key] for key in ("step", "operator", "layer", "name")}
                    | spectral(singular_values(x)) | {"error": errors_of(x)})
    for stage in stages:
        members = [(entry["operator"], entry["momentum"].to(options.device)) for entry in captured["entries"]
                   if entry["step"] == stage and entry["momentum"].any()]
        committed[stage] = allocations(members, options.device)

    def of(key, **wanted):
        return [row[key] for row in rows if all(row[k] == v for k, v in wanted.items())]

    def mean_error(method, **wanted):
        return fmean(one[method] for one in of("error", **wanted))

    methods = list(POLARS)
    table = [["operator", "step", "condition", "middle σ / σ_max", "stable rank", *methods,
              *(f"{recipe}: steps" for recipe in AMOS)]]
    for operator in names:
        for stage in stages:
            here = dict(operator=operator, step=stage)
            if of("condition", **here):
                table.append([operator, str(stage), *(number(median(of(key, **here))) for key in
                                                      ("condition", "middle", "stable_rank")),
                              *(number(mean_error(method, **here)) for method in methods),
                              *(str(committed[stage][recipe]["types"][operator]["steps"]) for recipe in AMOS)])
    gains = [["step", *(f"{recipe}: {what}" for recipe in AMOS for what in ("residual", "same for all"))]] + [
        [str(stage), *(number(committed[stage][recipe][key]) for recipe in AMOS
                       for key in ("residual", "uniform_residual"))] for stage in stages]
    layers = sorted({row["layer"] for row in rows})
    by_layer = [[f"turbo's error, step {stages[-1]}", *(f"layer {layer}" for layer in layers)]] + [
        [operator, *(number(mean_error("turbo", **here)) if of("error", **here) else "" for here in
                     (dict(operator=operator, layer=layer, step=stages[-1]) for layer in layers))]
        for operator in names]
    text = (f"Of {captured['about']}. Medians over layers of condition, middle singular value and stable rank; means "
            "of polar errors in exact arithmetic; the steps that AMO would commit to, had it sampled all matrices of "
            f"that step.\n\n{lines(table)}\n\nAMO's mean residual Σ (1 − p(σ))² / n, and that of as many steps for "
            "all:\n\n"
            f"{lines(gains)}\n\n{lines(by_layer)}\n")

    def draw(figure):
        panels = figure.subplots(1, 3)
        for style, operator in zip(styles(), names):
            at = [stage for stage in stages if of("middle", operator=operator, step=stage)]
            panels[0].plot(at, [median(of("middle", operator=operator, step=s)) for s in at], label=operator, **style)
            panels[1].plot(at, [mean_error("turbo", operator=operator, step=s) for s in at], label=operator, **style)
            deep = [layer for layer in layers if of("error", operator=operator, layer=layer, step=stages[-1])]
            panels[2].plot(deep, [mean_error("turbo", operator=operator, layer=layer, step=stages[-1])
                                  for layer in deep], label=operator, **style)
        panels[0].set(title="middle singular value over the largest", xlabel="step", yscale="log")
        panels[1].set(title="polar error of turbo", xlabel="step")
        panels[2].set(title=f"polar error of turbo, step {stages[-1]}", xlabel="layer")
        panels[2].xaxis.get_major_locator().set_params(integer=True)
        for panel in panels:
            panel.grid(color="#e3e3e3")
        panels[0].legend(frameon=False)
        return 13, 4.5

    return {"captured": captured["about"], "rows": rows,
            "amo": {str(stage): one for stage, one in committed.items()}}, text, draw


# --- (c) second moments ----------------------------------------------------------------------------------------------


def preconditioned(momentum: Tensor, second_moment: Tensor) -> dict[str, Tensor]:
    """"none", "full" (Muon²), "factored" (Muon²-F) -> what is orthogonalised, (n, m), by optim.second_moment."""
    moments = {"none": [], "full": [second_moment], "factored": [second_moment.mean(-1), second_moment.mean(-2)]}
    return {kind: momentum_update(momentum.clone(), momentum.clone(), [v.clone() for v in parts], mu=0.0,
                                  nesterov=False, beta2=1.0, engine="eager") for kind, parts in moments.items()}


def second_moment(options) -> tuple[dict, str, Callable]:
    captured = read_captured(options.captured)
    places = np.linspace(0, 1, 65)
    rows = []
    for entry in some(captured["entries"], options.matrices):
        momentum, moment = (entry[key].to(options.device) for key in ("momentum", "second_moment"))
        if not momentum.any():
            continue
        exact = polar_factor(momentum)
        for kind, x in preconditioned(momentum, moment).items():
            values = singular_values(x)
            curve = np.interp(places, np.linspace(0, 1, len(values)), (values / values[0]).cpu().numpy())
            rows.append({key: entry[key] for key in ("step", "operator", "layer", "name")} | {"preconditioning": kind}
                        | spectral(values) | {"error": errors_of(x), "curve": [float(f"{v:.4g}") for v in curve],
                                              "turned": directional_alignment(polar_factor(x), exact).item()})
    kinds, methods = ("none", "full", "factored"), list(POLARS)
    stages, names = sorted({row["step"] for row in rows}), sorted({row["operator"] for row in rows})
    groups = [("all", {})] + [(f"step {stage}", {"step": stage}) for stage in stages] + [
        (operator, {"operator": operator}) for operator in names]
    table = [["", "V", "condition", "middle σ / σ_max", "stable rank", "cosine of polar factors", *methods]]
    for group, wanted in groups:
        for kind in kinds:
            here = [row for row in rows if all(row[k] == v for k, v in (wanted | {"preconditioning": kind}).items())]
            table.append([group, kind, *(number(median(row[key] for row in here)) for key in
                                         ("condition", "middle", "stable_rank")),
                          number(fmean(row["turned"] for row in here), 4),
                          *(number(fmean(row["error"][method] for row in here)) for method in methods)])
    text = (f"Of {captured['about']}; V with β₂ = {captured['beta2']}; at most {options.matrices} matrices of an "
            "operator and step, spread over the layers. Medians of condition, middle singular value and "
            "stable rank of M / (√V + ε); the mean cosine between its polar factor and that of M; mean polar errors "
            f"in exact arithmetic, each against the polar factor of its own input.\n\n{lines(table)}\n")

    def draw(figure):
        panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
        for panel, operator in zip(panels, names):
            for style, kind in zip(styles(), kinds):
                curves = [row["curve"] for row in rows if (row["step"], row["operator"], row["preconditioning"])
                          == (stages[-1], operator, kind)]
                panel.plot(places, np.median(curves, 0).clip(1e-7), label=kind, **style | {"marker": None})
            panel.set(title=operator, xlabel="place in the spectrum", yscale="log")
            panel.grid(color="#e3e3e3")
        panels[0].set(ylabel=f"σ / σ_max, median, step {stages[-1]}")
        panels[0].legend(frameon=False)
        return 2.8 * len(names), 3.6

    return {"captured": captured["about"], "beta2": captured["beta2"], "rows": rows}, text, draw


# --- (d) memory ------------------------------------------------------------------------------------------------------


def transformer(layers: int, width: int) -> nn.Module:
    """The matrices of a GPT: q, k, v, o, up, down of every layer, without biases."""
    sizes = {**dict.fromkeys("qkvo", (width, width)), "up": (width, 4 * width), "down": (4 * width, width)}
    return nn.ModuleList(nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})
                         for _ in range(layers))


def memory(options) -> tuple[dict, str, Callable]:
    rows = []
    for recipe in OPTIMIZERS:
        with torch.device(options.device):
            model = transformer(options.layers, options.width)
        optimizer = get_optimizer(recipe, route(model), lr=0.01)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        peak = None
        if options.device.type == "cuda":  # of the second step: the first allocates the state
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            optimizer.step()
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
        held = state_bytes(optimizer)
        elements, total = sum(count for _, _, count, _ in held), sum(size for *_, size in held)
        rows.append({"recipe": recipe, "parameters": elements, "state_bytes": total,
                     "bytes_per_parameter": total / elements, "peak_bytes": peak,
                     "peak_per_parameter": peak and peak / elements})
        del model, optimizer, p
    table = [["recipe", "state, bytes a parameter", "state, MB", "more during a step, bytes a parameter"]] + [
        [row["recipe"], f"{row['bytes_per_parameter']:.3f}", f"{row['state_bytes'] / 1e6:.2f}",
         number(row["peak_per_parameter"])] for row in rows]
    text = (f"Float32 matrices of {options.layers} layers of width {options.width} ({rows[0]['parameters']:,} "
            "parameters); tensors of the optimizer's state after a step, and what a later step allocates at most "
            f"besides (a GPU's allocator says so; workspace that kernels keep is not in it).\n\n{lines(table)}\n")

    def draw(figure):
        axes, ordered = figure.subplots(), rows[::-1]
        axes.barh([row["recipe"] for row in ordered], [row["bytes_per_parameter"] for row in ordered], color="#0072b2")
        for place, row in enumerate(ordered):
            axes.text(row["bytes_per_parameter"], place, f" {row['bytes_per_parameter']:.2f}", va="center")
        axes.set(xlabel="bytes of state for a parameter of a matrix")
        axes.spines[["top", "right"]].set_visible(False)
        return 7, 0.4 * len(rows) + 1

    return {"layers": options.layers, "width": options.width, "rows": rows}, text, draw


# --- the command -----------------------------------------------------------------------------------------------------

STUDIES = {"polar": polar, "operators": operators, "second-moment": second_moment, "memory": memory}
TITLES = {"polar": "Polar error and alignment after each step", "memory": "Memory of the recipes",
          "operators": "Conditioning by operator, layer and stage", "second-moment": "Spectra with second moments"}


def styles():
    """Colour, dash and marker of one line after the other: told apart in grey, too."""
    from records.plot import COLOURS, DASHES, MARKERS

    for i in range(len(COLOURS) * len(DASHES)):
        yield {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)], "linewidth": 1.4,
               "marker": MARKERS[i % len(MARKERS)], "markersize": 3.5}


def some(entries: Sequence[dict], count: int) -> list[dict]:
    """At most `count` entries of every step and operator: the first, the last, and evenly between."""
    groups: dict[tuple, list[dict]] = {}
    for entry in entries:
        groups.setdefault((entry["step"], entry["operator"]), []).append(entry)
    return [group[place] for group in groups.values() for place in spread(len(group), count)]


def png(draw: Callable, title: str) -> bytes:
    """What `draw` paints on a figure; it returns the size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    figure.set_size_inches(*draw(figure))
    figure.suptitle(title, fontweight="bold")
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def write(name: str, options, report: dict, text: str, draw: Callable) -> None:
    hardware, git, scrub = (environment.hardware(options.device), environment.git(REPOSITORY),
                            environment.Scrubber(REPOSITORY))
    device = hardware["accelerator"] or hardware["cpu"]
    about = {"schema": 1, "study": name, "command": [scrub(word) for word in options.command], "device": device,
             "versions": environment.versions(), "commit": git["commit"], "dirty": git["dirty"]}
    folder = options.out or FOLDER / name
    image = png(draw, TITLES[name])
    body = (f"# {TITLES[name]}\n\n`python -m optim.studies {' '.join(about['command'])}` on {device}, torch "
            f"{torch.__version__}.\n\n{text}\n![{TITLES[name]}]({name}.png)\n")
    write_whole(folder / f"{name}.json", (json.dumps(about | report, allow_nan=False) + "\n").encode())
    write_whole(folder / f"{name}.md", body.encode())
    write_whole(folder / f"{name}.png", image)
    print(f"{body}\n{folder}: {name}.json, {name}.md, {name}.png")


def parse(argv: Sequence[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(prog="python -m optim.studies", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="study", required=True, metavar="STUDY")

    def command(name: str, about: str, *wanted: str):
        one = commands.add_parser(name, help=about, description=about)
        one.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
        if "captured" in wanted:
            one.add_argument("--captured", type=Path, required=name != "polar", metavar="FILE", help="of capture")
        if "matrices" in wanted:
            one.add_argument("--matrices", type=int, default=4, help="of each operator and step (default: %(default)s)")
        if "to" in wanted:
            one.add_argument("--to", type=Path, required=True, metavar="FILE", help="what to write")
        if "shapes" in wanted:
            default = [shape for spec in ("256x1024", "768x768", "768x3072") for shape in parse_shapes(spec)]
            one.add_argument("--shapes", nargs="+", type=lambda spec: parse_shapes(spec)[0], default=default,
                             metavar="NxM", help="of the test matrices")
        if name in STUDIES:
            one.add_argument("--out", type=Path, metavar="FOLDER", help=f"default: {FOLDER / name}")
        return one

    one = command("capture", "train with train_gpt.py, and keep momentum and second moments", "to")
    one.add_argument("--at", nargs="+", type=int, required=True, metavar="STEP")
    command("spectra", "histograms of captured momentum, for optim.fit", "captured", "to", "shapes")
    command("polar", TITLES["polar"], "captured", "matrices", "shapes")
    command("operators", TITLES["operators"], "captured")
    command("second-moment", TITLES["second-moment"], "captured", "matrices")
    one = command("memory", TITLES["memory"])
    one.add_argument("--layers", type=int, default=12)
    one.add_argument("--width", type=int, default=768)
    own, dashes, arguments = argv, [], []
    if "--" in argv:
        place = list(argv).index("--")
        own, dashes, arguments = argv[:place], argv[place : place + 1], list(argv[place + 1 :])
    options = parser.parse_args(own)
    if dashes and options.study != "capture":
        parser.error("only capture takes arguments after --, those of train_gpt.py")
    options.arguments, options.command = arguments, list(argv)
    return parser, options


def ready(options) -> None:
    """Make the folder of what will be written: whatever is in the way is said now, not after minutes of measuring."""
    if options.study in STUDIES and not find_spec("matplotlib"):
        raise StudyError("studies draw with matplotlib; install it with python -m pip install matplotlib")
    folder = options.out or FOLDER / options.study if options.study in STUDIES else options.to.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StudyError(f"cannot make the folder {folder}: {error.strerror}") from error


def main(argv: Sequence[str]) -> None:
    parser, options = parse(argv)
    try:
        ready(options)
        if options.study in STUDIES:
            write(options.study, options, *STUDIES[options.study](options))
        else:
            {"capture": capture, "spectra": spectra}[options.study](options)
    except (StudyError, RecordError) as problem:
        parser.error(str(problem))


if __name__ == "__main__":
    main(sys.argv[1:])
