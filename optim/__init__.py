"""Optimizers for speedruns: Turbo-Muon and its relatives for matrices, Adam for the rest, behind one object.

    groups = route(model)
    optimizer = OPTIMIZERS["turbo-muon"](groups, lr=0.03)
    loss.backward(); optimizer.step()
"""

from functools import partial

import torch
from torch import nn

from .adam import Adam
from .amo import AMO, budgets
from .chained import ChainedOptimizer
from .finite import NonFiniteError, parameter_names
from .muon import Muon
from .polar import POLARS, Polar, get_polar

__all__ = ["AMO", "Adam", "ChainedOptimizer", "Muon", "NonFiniteError", "OPTIMIZERS", "POLARS", "Polar", "budgets",
           "get_optimizer", "get_polar", "route", "route_table", "state_bytes", "state_table"]

HEADS = ("head", "lm_head", "classifier")  # modules that map to classes, whose weight is not a hidden layer's
KINDS = ("matrix", "embedding", "head", "scalar")


def route(model: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Sort the trainable parameters of `model`: "matrix", "embedding", "head", "scalar" -> list of (name, parameter).

    Embeddings are the weights of nn.Embedding; heads are modules named head, lm_head or classifier; of the rest, what
    has two or more dimensions is a matrix (convolutions too) and what has fewer a scalar. Every trainable parameter is
    in exactly one list (a tied one under its first name): asserted.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {kind: [] for kind in KINDS}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if id(p) in embeddings:
            kind = "embedding"
        elif p.ndim < 2:
            kind = "scalar"
        elif set(name.split(".")[:-1]) & set(HEADS):
            kind = "head"
        else:
            kind = "matrix"
        groups[kind].append((name, p))
    routed = [id(p) for group in groups.values() for _, p in group]
    wanted = {id(p) for p in model.parameters() if p.requires_grad}
    assert len(routed) == len(set(routed)) and set(routed) == wanted, "every parameter must be optimised exactly once"
    return groups


def route_table(groups: dict[str, list[tuple[str, nn.Parameter]]]) -> str:
    """What `route` decided, one line per kind: tensors, parameters, shapes."""
    lines = []
    for kind, members in groups.items():
        shapes: dict[str, int] = {}
        for _, p in members:
            shape = "×".join(map(str, p.shape)) or "scalar"
            shapes[shape] = shapes.get(shape, 0) + 1
        listed = ", ".join(f"{count} of {shape}" for shape, count in shapes.items())
        parameters = sum(p.numel() for _, p in members)
        lines.append(f"{kind:<10}{len(members):>4} tensors {parameters:>12,} parameters: {listed}")
    return "\n".join(lines)


def state_bytes(optimizer: torch.optim.Optimizer) -> list[tuple[str, str, int, int]]:
    """(kind of group, name, elements, bytes of state on this rank) of every parameter that has state: after a step.

    Tensors of the state alone, of one optimizer or a chain; scratch memory and padding of shares are not counted.
    """
    found = []
    for one in getattr(optimizer, "optimizers", [optimizer]):
        for group in one.param_groups:
            for name, p in zip(parameter_names(group), group["params"]):
                held = [value for value in one.state.get(p, {}).values() if isinstance(value, torch.Tensor)]
                if held:
                    size = sum(value.numel() * value.element_size() for value in held)
                    found.append((group.get("kind", "all"), name, p.numel(), size))
    return found


def state_table(optimizer: torch.optim.Optimizer) -> str:
    """`state_bytes` summed, a line for each kind of group: elements, bytes, bytes for each element."""
    lines, held = [], state_bytes(optimizer)
    for kind in dict.fromkeys(kind for kind, *_ in held):
        elements, size = (sum(entry[column] for entry in held if entry[0] == kind) for column in (2, 3))
        lines.append(f"{kind:<10}{elements:>14,} parameters {size:>14,} bytes of state {size / elements:>8.3f} each")
    return "\n".join(lines)


def _with_adam(
    groups,
    *,
    matrices=None,
    lr: float,
    weight_decay: float = 0.0,
    momentum: float = 0.95,
    embedding_lr: float = 0.3,
    head_lr: float = 0.004,
    scalar_lr: float = 0.015,
    adam_betas: tuple[float, float] = (0.8, 0.95),
    adam_eps: float = 1e-10,
    adam_weight_decay: float = 0.0,
    engine: str = "auto",
    process_group=None,
    **matrix_options,
) -> ChainedOptimizer:
    """`matrices`(params, lr=…, …) for the matrix group, or Adam at the same `lr` if None; Adam for the other groups.

    engine          what Muon works with, "auto", "fused" or "eager" (see optim.polar.Polar)
    matrix_options  of Muon, over the recipe's own: polar="turbo-3", beta2=0.9, cautious=True, …
    """
    if matrices is None and matrix_options:
        raise ValueError(f"{', '.join(matrix_options)}: options of Muon, and this recipe has only Adam")
    rates = {"embedding": embedding_lr, "head": head_lr, "scalar": scalar_lr}
    adam_groups = [{"params": groups[kind], "lr": rate, "kind": kind} for kind, rate in rates.items() if groups[kind]]
    matrix_group = {"params": groups["matrix"], "lr": lr, "weight_decay": weight_decay, "kind": "matrix"}
    optimizers = []
    if matrices is None:
        adam_groups.insert(0, matrix_group)
    else:
        optimizers.append(matrices([matrix_group], momentum=momentum, engine=engine,
                                   process_group=process_group, **matrix_options))
    if adam_groups:
        optimizers.append(Adam(adam_groups, betas=adam_betas, eps=adam_eps, weight_decay=adam_weight_decay,
                               process_group=process_group))
    return ChainedOptimizer(*optimizers)


OPTIMIZERS = {  # name -> factory(route(model), lr=…, …) -> one optimizer for all parameters
    "adamw": partial(_with_adam, matrices=None),
    "muon": partial(_with_adam, matrices=partial(Muon, polar="muon")),
    "muon-plus": partial(_with_adam, matrices=partial(Muon, polar="muon-plus")),
    "polar-express": partial(_with_adam, matrices=partial(Muon, polar="polar-express")),
    "turbo-muon": partial(_with_adam, matrices=partial(Muon, polar="turbo")),
    "turbo-muon-5": partial(_with_adam, matrices=partial(Muon, polar="turbo-5")),
    "turbo-muon-published": partial(_with_adam, matrices=partial(Muon, polar="turbo-published")),
    "muon2": partial(_with_adam, matrices=partial(Muon, polar="muon-3", second_moment="full")),
    "muon2-f": partial(_with_adam, matrices=partial(Muon, polar="muon-3", second_moment="factored")),
    "turbo-muon2": partial(_with_adam, matrices=partial(Muon, polar="turbo", second_moment="full")),
    "turbo-muon2-f": partial(_with_adam, matrices=partial(Muon, polar="turbo", second_moment="factored")),
    "normuon": partial(_with_adam, matrices=partial(Muon, polar="muon", row_normalize=True)),
    "amo": partial(_with_adam, matrices=partial(Muon, polar="muon", budget=AMO(average_steps=5, max_steps=7))),
    "turbo-amo": partial(_with_adam, matrices=partial(Muon, polar="turbo", budget=AMO(average_steps=4))),
}


def get_optimizer(name: str, groups, **options) -> ChainedOptimizer:
    """OPTIMIZERS[name](groups, **options), with a ValueError that lists the names when there is none of this name."""
    if name not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {name!r}: expected one of {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name](groups, **options)
