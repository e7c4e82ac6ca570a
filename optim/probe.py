"""A look inside an optimizer while it trains: how well conditioned things are, and how orthogonal updates come out.

    numbers = probe(optimizer, model)          at a validation, the clock stopped; a collective: call it on every rank

For every operator type (see optim.amo.operator_type) a few matrices, spread over the layers, are measured in float64:

    momentum   what is orthogonalised: momentum B, for Muon² B / (√V + ε). Without Nesterov's share of a gradient,
               because between two steps there is none
    update     the optimizer's own polar of that, by the engine and with the steps that it has now; with NorMuon's rows
    weight     the parameter

It writes nothing and keeps nothing. The cost is some three eigendecompositions a matrix.
"""

import math

import torch
from torch import Tensor, nn

from .amo import operator_type
from .geometry import RANK, directional_alignment, polar_error, polar_factor, singular_values
from .muon import Muon
from .second_moment import moment_shapes, momentum_update, row_normalised

SPECTRAL = ("condition", "middle", "stable_rank", "norm")  # of momentum, update and weight alike


def spectral(values: Tensor) -> dict[str, float]:
    """A few numbers for singular values (k,) float64, largest first, not all 0.

    condition    σ_max / σ_min, at most 1 / RANK (all that float64 can tell)     stable_rank  ‖X‖_F² / ‖X‖₂²
    middle       the middle singular value over σ_max, at least RANK             norm         ‖X‖_F / √k, rms of σ
    """
    largest, squares = values[0].item(), values.square().sum().item()
    return {"condition": min(largest / max(values[-1].item(), 1e-300), 1 / RANK),
            "middle": max(values[len(values) // 2].item() / largest, RANK),
            "stable_rank": squares / largest**2, "norm": math.sqrt(squares / len(values))}


def spread(length: int, count: int) -> list[int]:
    """At most `count` places of a list: the first, the last, and evenly between; of one, the first."""
    count = min(count, length)
    return [round(i * (length - 1) / max(count - 1, 1)) for i in range(count)]


def orthogonalised(muon: Muon, bank, slot: int, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Of this rank's `slot` of a bank of `muon`: what is orthogonalised, its polar factor by the optimizer's polar, and
    the update made of that; (split, n, m) each. Nothing of the optimizer's state changes."""
    group, state = bank.group, {key: tensor[slot : slot + 1].clone() for key, tensor in bank.state.items()}
    moments = [state[key] for key in moment_shapes(group["second_moment"], *bank.shape)]
    momentum = state["momentum_buffer"]
    # a β₂ of 1 leaves V as it is, and a gradient equal to the momentum leaves that
    entering = momentum_update(momentum.clone(), momentum, moments, mu=0.0, nesterov=False, beta2=1.0,
                               eps=group["second_moment_eps"], engine="eager")
    polar = muon.budget.polar_of(name) if muon.budget else muon.polar
    o = update = polar(entering)
    if group["row_normalize"]:
        update = row_normalised(o, state["row_second_moment"], beta2=1.0, eps=group["second_moment_eps"])
    return entering[0], o[0], update[0]


def probe(optimizer, model: nn.Module, matrices: int = 3) -> dict[str, dict]:
    """Operator type -> {"matrices", "momentum", "update", "weight"}, plain numbers for JSON, the same on every rank.

    optimizer  a Muon, or a chain that holds one or more (others have no part in it)
    model      whose parameters it trains: gives the names
    matrices   of each type at most: the first, the last, and between; of a fused projection, all its parts

    "momentum", "update" and "weight" hold SPECTRAL, see `spectral`; "update" also steps, polar_error and alignment
    (against the exact polar factor of "momentum"; arXiv 2604.09967 has the alignment). They are means over the
    matrices, geometric ones of condition and middle, to six digits; None where all matrices are 0, before the first
    step, or where what they are taken of is not finite.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    muons = [one for one in getattr(optimizer, "optimizers", [optimizer]) if isinstance(one, Muon)]
    result = {}
    for muon in muons:
        type_of = muon.budget.amo.type_of if muon.budget else operator_type
        found: dict[str, list] = {}
        for bank in muon.banks:
            for number, (p, own_name) in enumerate(zip(bank.params, bank.names)):
                kind = type_of(names.get(id(p), own_name))
                found.setdefault(kind, []).append((bank, number, p, own_name))
        for kind, members in found.items():
            result[kind] = _measured(muon, [members[place] for place in spread(len(members), matrices)])
    return result


KEYS = [*(("momentum", key) for key in SPECTRAL), *(("weight", key) for key in SPECTRAL),
        *(("update", key) for key in (*SPECTRAL, "steps", "polar_error", "alignment"))]


@torch.no_grad()
def _measured(muon: Muon, members: list) -> dict:
    """The numbers of one type, from all ranks: each measures what it holds of the state, and its share of weights."""
    ranks = muon.ranks
    sums = torch.zeros(2, len(KEYS), dtype=torch.float64)  # sums, and how many matrices they are of

    def add(what: str, numbers: dict[str, float]) -> None:
        for key, value in numbers.items():
            column = KEYS.index((what, key))
            sums[0, column] += math.log(value) if key in ("condition", "middle") else value
            sums[1, column] += 1

    for place, (bank, number, p, name) in enumerate(members):
        weights = p.detach().reshape(bank.shape) if place % ranks.size == ranks.rank else ()
        for weight in weights:
            _add_spectrum(add, "weight", weight)
        slot = number - ranks.rank * ranks.share(len(bank.params))
        if bank.state is None or not 0 <= slot < ranks.share(len(bank.params)):
            continue
        steps = len((muon.budget.polar_of(name) if muon.budget else muon.polar).coefficients)
        for momentum, o, update in zip(*orthogonalised(muon, bank, slot, name)):
            if _add_spectrum(add, "momentum", momentum):
                exact = polar_factor(momentum)
                add("update", {"steps": steps, "polar_error": polar_error(o, exact).item(),
                               "alignment": directional_alignment(o, exact).item()})
                _add_spectrum(add, "update", update)
    sums = ranks.all_reduce(sums.to(members[0][2].device)).wait().tolist()
    result: dict = {"matrices": len(members), "momentum": {}, "update": {}, "weight": {}}
    for (what, key), total, count in zip(KEYS, *sums):
        mean = total / count if count else math.nan
        mean = math.exp(mean) if key in ("condition", "middle") else mean
        result[what][key] = float(f"{mean:.6g}") if math.isfinite(mean) else None
    return result


def _add_spectrum(add, what: str, x: Tensor) -> bool:
    """Adds the numbers of x (n, m); False where it is 0 or not finite."""
    values = singular_values(x)
    if not values[0] > 0 or not values.isfinite().all():
        return False
    add(what, spectral(values))
    return True
