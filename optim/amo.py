"""AMO: observe, then commit. Operators differ in conditioning, so each type of operator gets steps of its own.

    observe   now and then in steps [observe_start, observe_end): singular values σ of what is orthogonalised, a matrix
              of each type (q, k, v, o, up, down, conv1 …) in turn
    decide    k steps leave the residual r_k = Σ (1 − p_k(σ))², p_k the composition of their polynomials, and cost the
              FLOPs of the path that k steps take; choose k for every type: the least total residual within a budget
    commit    for the rest of training: printed, kept in state_dict, the same on all ranks

The idea is that of arXiv 2605.17806, whose rule is not public to us; this rule is ours (DESIGN.md). Residuals are those
of exact arithmetic, and against the polar factor of the scaled matrix: what AOL itself turns is the same for every k.

What it costs. A sample is a float64 product XXᵀ where X lies and a copy of that to the host; the eigenvalues are
computed there by a thread of its own while training goes on, 0.3 to 0.6 s each for n = 768 on two busy cores, growing
with n³. With the defaults that is four a type. Afterwards the cost is a gather and a scatter of those batches whose
types have different steps.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from . import polynomials
from .collectives import Ranks
from .geometry import scaled_gram
from .polar import Polar, _default_dtype
from .polynomials import Coefficients, evaluate

GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, spread evenly however many are taken


def operator_type(name: str) -> str:
    """The type of a parameter by its name: the last part, "weight" left out; with the part before it if it is a number.

    blocks.3.attention.q.weight -> q    layers.2.conv1.weight -> conv1    features.0.weight -> features.0
    Parameters without names ("parameter 3 of shape (8, 12)") have their shape as type.
    """
    if anonymous := re.fullmatch(r"parameter \d+ of (shape .*)", name):
        return anonymous[1]
    parts = name.split(".")
    parts = parts[:-1] if parts[-1] == "weight" and len(parts) > 1 else parts
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


@dataclass(frozen=True)
class AMO:
    """How to observe and what may be committed: Muon(..., polar="turbo", budget=AMO(average_steps=4)).

    average_steps  the budget: what this many steps for every matrix would cost (a fraction: in between)
    min_steps      fewest and most steps of a type; `sets` must hold all of them
    observe_start  first step (counted from 0) that is observed; until observe_end, where the commitment is made, the
                   optimizer's own polar does the work
    every          steps between two observations
    matrices       of each type in an observation
    sets           steps -> coefficients; None: FITTED behind AOL, else the optimizer's own if it repeats one (a, b, c)
    type_of        parameter name -> operator type
    say            takes the table of the commitment, on rank 0
    """

    average_steps: float = 4.0
    min_steps: int = 3
    max_steps: int = 6
    observe_start: int = 20
    observe_end: int = 60
    every: int = 10
    matrices: int = 1
    sets: Mapping[int, Coefficients] | None = field(default=None, hash=False)
    type_of: Callable[[str], str] = operator_type
    say: Callable[[str], None] = print

    def __post_init__(self):
        if not 1 <= self.min_steps <= self.average_steps <= self.max_steps:
            raise ValueError("AMO needs 1 <= min_steps <= average_steps <= max_steps; got "
                             f"{self.min_steps}, {self.average_steps}, {self.max_steps}")
        if not 0 <= self.observe_start < self.observe_end or self.every < 1 or self.matrices < 1:
            raise ValueError("AMO needs 0 <= observe_start < observe_end, every >= 1, matrices >= 1; got "
                             f"{self.observe_start}, {self.observe_end}, {self.every}, {self.matrices}")

    def polars(self, polar: Polar) -> dict[int, Polar]:
        """`polar` with every number of steps from min_steps to max_steps."""
        sets, wanted = self.sets, range(self.min_steps, self.max_steps + 1)
        if sets is None and polar.normalize == "aol":
            sets = polynomials.FITTED
        elif sets is None and len(set(polar.coefficients)) == 1:
            sets = {steps: polar.coefficients[:1] * steps for steps in wanted}
        elif sets is None:
            raise ValueError("AMO needs sets={steps: coefficients} for a polar whose steps differ and that is not "
                             'normalize="aol"; polynomials.minimax computes some')
        for steps in wanted:
            if len(sets.get(steps, ())) != steps:
                raise ValueError(f"AMO sets has no {steps} steps: expected coefficients for each number of them from "
                                 f"min_steps={self.min_steps} to max_steps={self.max_steps}; it has {sorted(sets)}")
        return {steps: replace(polar, coefficients=tuple(map(tuple, sets[steps])),
                               restart=self._restart(polar, steps)) for steps in wanted}

    @staticmethod
    def _restart(polar: Polar, steps: int) -> int | None:
        """More than four steps need one in float16, six come near to float32 after every two only (the study of
        momentum-spectra); more are done in pairs too."""
        if polar.normalize != "aol":
            return polar.restart
        return None if steps <= 4 else 3 if steps == 5 else 2


def flops(polar: Polar, n: int, m: int, device: torch.device) -> int:
    """FLOPs that `polar` takes for one n×m (or m×n) matrix on `device`, by the path it takes there."""
    n, m, steps = min(n, m), max(n, m), len(polar.coefficients)
    fused = polar.engine == "fused" or (polar.engine == "auto" and device.type == "cuda")
    if fused and polar.why_not_fused(device) is None:
        return _fused_flops(polar, n, m, steps)
    bound = 2 * n**3 if polar.bound else 0
    if polar._use_gram(n, m, polar.dtype or _default_dtype(polar.normalize, device)):
        segments = -(-steps // (polar.restart or steps))
        return bound + segments * 4 * n * n * m + 2 * n**3 * (steps + 3 * (steps - segments))
    return bound + steps * (4 * n * n * m + 2 * n**3)


def _fused_flops(polar: Polar, n: int, m: int, steps: int) -> int:
    """Of kernels/newton_schulz.py, symmetric halves counted once; of small_polar.py, which takes its products whole."""
    from kernels import newton_schulz, small_polar  # need triton

    if n <= small_polar.SMALL:
        steep = math.prod(a for a, _, _ in polar.coefficients) > small_polar._STEEP
        return 2 * n**3 * (3 + (6 + steep) * (steps - 1)) + (4 + 2 * steep) * n * n * m
    form = newton_schulz._form(n, m) if polar.form == "auto" else polar.form
    if form == "newton-schulz":
        return steps * (3 * n * n * m + n**3)
    segments = -(-steps // (polar.restart or steps))
    full = steps - segments if segments > 1 else 0  # before a restart W R is computed whole
    return segments * 3 * n * n * m + n**3 * (steps + 3 * (steps - segments) + full)


def allocate(costs: Sequence[Sequence[float]], residuals: Sequence[Sequence[float]], budget: float) -> list[int]:
    """One choice for each row: the least sum of residuals whose costs sum to at most `budget`. Exact.

    costs, residuals  a row for each operator type, a column for each choice
    Dynamic programming over the rows: of all choices for the rows so far, those that nothing cheaper equals. Of equal
    sums the cheaper wins, and then the choice that comes first in order. ValueError if the cheapest is above budget.
    """
    cheapest = [min(row) for row in costs]
    if sum(cheapest) > budget:
        raise ValueError(f"allocate: the cheapest choice costs {sum(cheapest)}, more than the budget of {budget}")
    frontier: list[tuple[float, float, tuple[int, ...]]] = [(0, 0.0, ())]  # ever dearer, ever less residual
    for row, (cost, residual) in enumerate(zip(costs, residuals, strict=True)):
        room = budget - sum(cheapest[row + 1 :])
        grown = sorted((spent + c, left + r, (*choice, i)) for spent, left, choice in frontier
                       for i, (c, r) in enumerate(zip(cost, residual, strict=True)) if spent + c <= room)
        frontier, least = [], float("inf")
        for state in grown:
            if state[1] < least:
                frontier.append(state)
                least = state[1]
    return list(frontier[-1][2])


def relative_residuals(gram: Tensor, sets: Mapping[int, Coefficients], bound: bool) -> list[float] | None:
    """Σ (1 − p_k(σ))² / n of every set, for the n singular values σ whose squares are the eigenvalues of `gram`.

    gram (n, n) float64, made by scaled_gram; bound: divide σ by min(1, ‖gram²‖_F^¼) as optim.polar.Polar does.
    None where gram is 0 or not finite.
    """
    if not gram.isfinite().all() or not gram.any():
        return None
    squares = torch.linalg.eigvalsh(gram).clamp(min=0)
    if bound:
        squares = squares / squares.pow(4).sum().pow(0.25).clamp(max=1)
    sigma = squares.sqrt().cpu().numpy()
    return [float(((1 - evaluate(coefficients, sigma)) ** 2).mean()) for coefficients in sets.values()]


Names = Sequence[str]  # of a batch: its parameters on all ranks, in the order of their slots


class Budget:
    """AMO at work in one optimizer: stands before its `polar`, one call of `many` a step."""

    def __init__(self, amo: AMO, polar: Polar, ranks: Ranks):
        self.amo, self.polar, self.ranks = amo, polar, ranks
        self.polars = amo.polars(polar)
        self.sets = {steps: one.coefficients for steps, one in self.polars.items()}
        self.say = amo.say
        self.step = 0
        self.samples: dict[str, list[list[float]]] = {}  # type -> of every sample of this rank, residuals by steps
        self.commitment: dict | None = None  # see decide
        self._pending: list[tuple[str, Future]] = []
        self._thread: ThreadPoolExecutor | None = None
        self._slots: dict[tuple, Tensor] = {}

    def polar_of(self, name: str) -> Polar:
        """The polar that the parameter `name` gets now. Types of which nothing was sampled keep the optimizer's own."""
        decided = self.commitment["types"].get(self.amo.type_of(name)) if self.commitment else None
        return self.polars[decided["steps"]] if decided else self.polar

    def many(self, updates: Sequence[Tensor], batches: Sequence[Names]) -> list[Tensor]:
        """One step: orthogonalise this rank's share of every batch, observing or deciding first where it is time.

        updates  (share, split, n, m) each: slots rank · share … of the batch; those beyond its names are padding
        batches  names of every batch's parameters; the same on all ranks
        """
        step, self.step = self.step, self.step + 1
        if step == 0 and updates and updates[0].is_cuda:
            self._compile(updates, batches)
        if self.commitment is None and step >= self.amo.observe_end:
            self._commit(updates, batches)
        elif self.commitment is None and step >= self.amo.observe_start:
            draw, rest = divmod(step - self.amo.observe_start, self.amo.every)
            if rest == 0:
                self._observe(draw, updates, batches)
        return self._orthogonalise(updates, batches) if self.commitment else self.polar.many(updates)

    # --- observe

    def _matrices(self, updates: Sequence[Tensor], batches: Sequence[Names]) -> dict[str, list[tuple[int, int, int]]]:
        """Operator type -> (batch, parameter, part of it) of all its matrices, over all ranks."""
        found: dict[str, list[tuple[int, int, int]]] = {}
        for batch, (update, names) in enumerate(zip(updates, batches, strict=True)):
            for parameter, name in enumerate(names):
                places = found.setdefault(self.amo.type_of(name), [])
                places += [(batch, parameter, part) for part in range(update.size(1))]
        return found

    def _observe(self, draw: int, updates: Sequence[Tensor], batches: Sequence[Names]) -> None:
        """Take `matrices` of every type, others in every draw, if they are this rank's."""
        for kind, places in self._matrices(updates, batches).items():
            first = draw * self.amo.matrices
            for number in range(first, first + min(self.amo.matrices, len(places))):
                batch, parameter, part = places[int(len(places) * (number * GOLDEN % 1))]
                slot = parameter - self.ranks.rank * len(updates[batch])
                if 0 <= slot < len(updates[batch]):
                    self._sample(kind, updates[batch][slot, part])

    def _sample(self, kind: str, x: Tensor) -> None:
        gram, arrived = scaled_gram(x, self.polar.normalize), None
        if gram.is_cuda:
            gram = torch.empty(gram.shape, dtype=gram.dtype, pin_memory=True).copy_(gram, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()

        def residuals():
            if arrived is not None:
                arrived.synchronize()
            return relative_residuals(gram, self.sets, self.polar.bound)

        self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="amo")
        self._pending.append((kind, self._thread.submit(residuals)))

    def _collect(self) -> None:
        """Wait for all samples that are under way."""
        for kind, future in self._pending:
            if (residuals := future.result()) is not None:
                self.samples.setdefault(kind, []).append(residuals)
        self._pending.clear()

    # --- decide and commit

    def _commit(self, updates: Sequence[Tensor], batches: Sequence[Names]) -> None:
        """All ranks' samples to rank 0, which decides, and its decision to all."""
        self._collect()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
        matrices = self._matrices(updates, batches)
        kinds = sorted(matrices)
        device = updates[0].device if updates else torch.device("cpu")
        sums = torch.zeros(len(kinds), 1 + len(self.sets), dtype=torch.float64)  # samples, and the sum of residuals
        for row, kind in zip(sums, kinds):
            for residuals in self.samples.get(kind, ()):
                row += torch.tensor([1.0, *residuals], dtype=torch.float64)
        sums = self.ranks.all_reduce(sums.to(device)).wait()
        if self.ranks.rank:
            sums.zero_()
        sums = self.ranks.all_reduce(sums).wait().cpu()  # what rank 0 has
        sampled = {kind: row for kind, row in zip(kinds, sums.tolist()) if row[0]}
        shapes = {kind: [tuple(updates[batch].shape[2:]) for batch, _, _ in matrices[kind]] for kind in sampled}
        self.commitment = self.decide(sampled, shapes, device)
        steps = torch.tensor([one["steps"] for one in self.commitment["types"].values()], device=device)
        if self.ranks.rank:
            steps.zero_()
        for one, decided in zip(self.commitment["types"].values(), self.ranks.all_reduce(steps).wait().tolist()):
            one["steps"] = decided
        if self.ranks.rank == 0:
            self.say(self.table())

    def decide(self, sampled: dict[str, list[float]], shapes: dict[str, list[tuple[int, int]]],
                device: torch.device) -> dict:
        """sampled: type -> (samples, sum of residuals by steps); shapes: type -> (n, m) of all its matrices.

        Returns what is committed, of plain numbers and strings: step, average_steps, and of the whole budget_flops,
        flops, residual, uniform_residual (with the average for all); for every type its steps, matrices, shapes,
        samples, and by steps: residual, the mean of a matrix's Σ (1 − p(σ))² / n, and flops of all its matrices.
        """
        types, budget = {}, 0.0
        lower = int(self.amo.average_steps)
        for kind, (samples, *residuals) in sampled.items():
            costs = {steps: sum(flops(polar, *shape, device) for shape in shapes[kind])
                     for steps, polar in self.polars.items()}
            fraction = self.amo.average_steps - lower
            budget += costs[lower] + (fraction * (costs[lower + 1] - costs[lower]) if fraction else 0)
            spelled = sorted({"×".join(map(str, shape)) for shape in shapes[kind]})
            types[kind] = {"steps": 0, "matrices": len(shapes[kind]), "shapes": ", ".join(spelled),
                           "rank": sum(map(min, shapes[kind])), "samples": int(samples),
                           "residual": {str(k): r / samples for k, r in zip(self.sets, residuals)},
                           "flops": {str(k): cost for k, cost in costs.items()}}
        chosen = allocate([list(one["flops"].values()) for one in types.values()],
                          [[one["rank"] * r for r in one["residual"].values()] for one in types.values()], budget)
        for one, choice in zip(types.values(), chosen):
            one["steps"] = list(self.sets)[choice]
        rank = sum(one["rank"] for one in types.values()) or 1

        def mean(steps_of):
            return sum(one["rank"] * one["residual"][str(steps_of(one))] for one in types.values()) / rank

        return {"step": self.step - 1, "average_steps": self.amo.average_steps, "budget_flops": budget,
                "flops": sum(one["flops"][str(one["steps"])] for one in types.values()),
                "residual": mean(lambda one: one["steps"]), "uniform_residual": mean(lambda one: lower),
                "types": types}

    def table(self) -> str:
        """The commitment, a line for each operator type."""
        made = self.commitment
        lines = [f"AMO at step {made['step']}: steps by operator type, within the FLOPs of {made['average_steps']:g}",
                 f"{'type':<16}{'steps':>6}  {'matrices':<24}{'samples':>8}  residual, a step count each: "
                 f"{', '.join(map(str, self.sets))}"]
        for kind, one in made["types"].items():
            residuals = " ".join(f"{r:.4f}" for r in one["residual"].values())
            matrices = f"{one['matrices']} of {one['shapes']}"
            lines.append(f"{kind:<16}{one['steps']:>6}  {matrices:<24}{one['samples']:>8}  {residuals}")
        spent = made["flops"] / made["budget_flops"] if made["budget_flops"] else 0.0
        lines.append(f"{'all':<16}{spent:>6.1%} of the budget; residual {made['residual']:.4f}, with "
                     f"{int(made['average_steps'])} for all {made['uniform_residual']:.4f}")
        return "\n".join(lines)

    # --- afterwards

    def _compile(self, updates: Sequence[Tensor], batches: Sequence[Names]) -> None:
        """Run every number of steps once on batches of about the later sizes, so that no kernel is compiled at the
        commitment: in a first step, which scripts take untimed."""
        types = [len({self.amo.type_of(name) for name in names}) for names in batches]
        parts = [update[: -(-len(update) // kinds)] for update, kinds in zip(updates, types)]
        for polar in self.polars.values():
            polar.many(parts)

    def _orthogonalise(self, updates: Sequence[Tensor], batches: Sequence[Names]) -> list[Tensor]:
        """Every matrix by its type's polar, one call of `many` for each: batches of mixed types are cut and put
        together again. Padding comes back as zeros."""
        pieces: dict[Polar, list[tuple[int, list[int] | None]]] = {}
        for batch, (update, names) in enumerate(zip(updates, batches, strict=True)):
            own = names[self.ranks.rank * len(update) :][: len(update)]
            by_polar: dict[Polar, list[int]] = {}
            for slot, name in enumerate(own):
                by_polar.setdefault(self.polar_of(name), []).append(slot)
            for polar, slots in by_polar.items():
                pieces.setdefault(polar, []).append((batch, None if len(slots) == len(update) else slots))
        results: list[Tensor | None] = [None] * len(updates)
        for polar, members in pieces.items():
            places = [slots and self._index(slots, updates[batch].device) for batch, slots in members]
            taken = [updates[batch] if place is None else updates[batch].index_select(0, place)
                     for (batch, _), place in zip(members, places)]
            for (batch, _), place, o in zip(members, places, polar.many(taken)):
                if place is None:
                    results[batch] = o
                    continue
                if results[batch] is None:
                    results[batch] = o.new_zeros(updates[batch].shape)
                results[batch].index_copy_(0, place, o.to(results[batch].dtype))
        dtype = next((o.dtype for o in results if o is not None), None)
        return [update.new_zeros(update.shape, dtype=dtype) if o is None else o for update, o in zip(updates, results)]

    def _index(self, slots: list[int], device: torch.device) -> Tensor:
        """`slots` on the device, kept: copying them there would wait for it in every step."""
        key = (tuple(slots), device)
        if key not in self._slots:
            self._slots[key] = torch.tensor(slots, device=device)
        return self._slots[key]

    # --- state

    def state_dict(self) -> dict:
        """Plain numbers, strings, lists and dicts; samples are this rank's."""
        self._collect()
        return {"step": self.step, "samples": self.samples, "commitment": self.commitment}

    def load_state_dict(self, state: dict) -> None:
        self._collect()
        self.step, self.samples, self.commitment = state["step"], state["samples"], state["commitment"]


def budgets(optimizer) -> list[Budget]:
    """The budgets of an optimizer, or of those that it chains: none, or one for each Muon that has one."""
    chained = getattr(optimizer, "optimizers", [optimizer])
    return [one.budget for one in chained if getattr(one, "budget", None) is not None]
