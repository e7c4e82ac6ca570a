"""Muon: momentum, orthogonalised. Matrices of one shape are one batch; with many ranks each orthogonalises a slice.

    gradients of one shape ── stack ──> (P, split, n, m) ── reduce-scatter ──> this rank's (P / ranks, split, n, m)
    momentum: B ← B + (1 − μ)(G − B),  Nesterov: M = G + μ(B − G)
    O = polar(M) ── all-gather ──> W ← (1 − lr·decay)·W − lr·ratio·O

Keller Jordan, https://kellerjordan.github.io/posts/muon/; the sharding follows the idea of modded-nanogpt's.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .collectives import reject_unsupported
from .finite import parameter_names
from .parts import part
from .polar import Polar, get_polar
from .sharded import ShardedOptimizer

ADJUST_LR = {  # how the learning rate depends on a matrix's (rows, columns); names as in torch.optim.Muon
    "original": lambda rows, columns: math.sqrt(max(1, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
}


class Muon(ShardedOptimizer):
    """Muon for parameters of two or more dimensions; embeddings, heads, scalars belong to Adam (see optim.route).

    A convolution (out, in, kh, kw) is the matrix (out, in·kh·kw). The group option `split=k` treats a parameter as k
    matrices stacked by rows (a fused QKV projection: 3). Names, order and meaning of the arguments follow
    torch.optim.Muon where it has them; with polar=Polar(polynomials.MUON, dtype=torch.bfloat16) a step equals its.

    lr            learning rate; the update's spectral norm is about lr times adjust_lr_fn(rows, columns)
    polar         a name in optim.polar.POLARS or a Polar
    engine        "auto", "fused" or "eager": replaces the Polar's own, which None keeps
    process_group ranks that share the work; None: the default group if torch.distributed runs, else this process alone.
                  Gradients are averaged over the ranks here: do not wrap the model in DistributedDataParallel.

    `p.grad` is read, never written; parameters without gradient are skipped (on every rank alike). A NaN or infinite
    gradient raises NonFiniteError within a step or so; `check_finite()` waits for the last one. state_dict() holds this
    rank's share of the momentum.
    """

    def __init__(
        self,
        params,
        lr: float = 0.02,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        *,
        polar: str | Polar = "turbo",
        adjust_lr_fn: str | None = "original",
        engine: str | None = None,
        process_group=None,
    ):
        if adjust_lr_fn is not None and adjust_lr_fn not in ADJUST_LR:
            raise ValueError(f"unknown adjust_lr_fn {adjust_lr_fn!r}: expected one of {', '.join(ADJUST_LR)}")
        defaults = dict(lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov,
                        adjust_lr_fn=adjust_lr_fn or "original", split=1)
        self.polar = get_polar(polar) if engine is None else get_polar(polar, engine=engine)
        super().__init__(params, defaults, process_group)

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        self._make_all_banks()

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._make_all_banks()

    def _make_all_banks(self) -> None:
        self.banks = [bank for group in self.param_groups for bank in self._make_banks(group)]

    def _make_banks(self, group: dict) -> list["Bank"]:
        if group["lr"] < 0 or group["weight_decay"] < 0 or not 0 <= group["momentum"] < 1:
            raise ValueError("Muon needs lr >= 0, weight_decay >= 0, 0 <= momentum < 1; got "
                             f"{group['lr']}, {group['weight_decay']}, {group['momentum']}")
        by_shape: dict[tuple, Bank] = {}
        for name, p in zip(parameter_names(group), group["params"]):
            reject_unsupported(p, name, "Muon")
            if p.ndim < 2:
                raise ValueError(f"Muon: {name} has shape {tuple(p.shape)}; "
                                 "vectors and scalars belong to Adam (optim.route)")
            rows, columns = p.size(0), p[0].numel()
            if rows % group["split"]:
                raise ValueError(f"Muon: the {rows} rows of {name} do not divide into split={group['split']} matrices")
            shape = (group["split"], rows // group["split"], columns)
            bank = by_shape.setdefault((shape, p.dtype, p.device), Bank(group, shape))
            bank.names.append(name)
            bank.params.append(p)
        return list(by_shape.values())

    def _update(self) -> None:
        banks = [bank for bank in self.banks if any(p.grad is not None for p in bank.params)]
        with part("muon: gradients"):
            reduced = [self._reduce(bank) for bank in banks]
            summed = [pending.wait() for pending in reduced]
        with part("muon: momentum"):
            updates = [self._momentum_update(bank, grads) for bank, grads in zip(banks, summed)]
        with part("muon: orthogonalise"):
            orthogonal = self.polar.many(updates)
        with part("muon: apply"):
            gathered = [self.ranks.all_gather(o) for o in orthogonal]
            for bank, grads in zip(banks, summed):  # only now: collectives run in the order in which they are asked for
                own = self._own(bank, grads)
                self.finite.push(self.steps, bank.names, list(grads[: len(own)].unbind()), grads.device, own.start)
            for bank, pending in zip(banks, gathered):
                self._apply(bank, pending.wait())

    def _reduce(self, bank: "Bank"):
        first = bank.params[0]
        share = self.ranks.share(len(bank.params))
        stacked = first.new_zeros(share * self.ranks.size, *bank.shape)
        slots, grads = [], []
        for slot, p in zip(stacked, bank.params):
            if p.grad is not None:
                if p.grad.is_sparse:
                    raise ValueError("Muon: sparse gradients are not supported; give this parameter to Adam")
                slots.append(slot)
                grads.append(p.grad.reshape(bank.shape))
        torch._foreach_copy_(slots, grads)
        return self.ranks.reduce_scatter(stacked)

    def _own(self, bank: "Bank", share: Tensor) -> range:
        """Which of the bank's parameters this rank's share (k, …) holds; fewer than k where padding begins."""
        first = self.ranks.rank * len(share)
        return range(first, max(first, min(first + len(share), len(bank.params))))

    def _momentum_update(self, bank: "Bank", grads: Tensor) -> Tensor:
        """grads: (share, split, n, m), summed over ranks. What this rank is to orthogonalise, of the same shape."""
        if self.ranks.size > 1:
            grads = grads.div_(self.ranks.size)
        momentum = self._momentum(bank, grads)
        asleep = [slot for slot, i in enumerate(self._own(bank, grads)) if bank.params[i].grad is None]
        kept = momentum[asleep].clone() if asleep else None
        mu = bank.group["momentum"]
        momentum.lerp_(grads, 1 - mu)
        update = grads.lerp(momentum, mu) if bank.group["nesterov"] else momentum
        if asleep:
            momentum[asleep] = kept
        return update

    def _momentum(self, bank: "Bank", grads: Tensor) -> Tensor:
        """This rank's momentum, (share, split, n, m); state[p]["momentum_buffer"] are views of it."""
        if bank.momentum is None:
            bank.momentum = torch.zeros_like(grads)
            for slot, p in zip(bank.momentum, (bank.params[i] for i in self._own(bank, grads))):
                if "momentum_buffer" in self.state[p]:  # loaded from a checkpoint
                    slot.copy_(self.state[p]["momentum_buffer"].reshape(bank.shape))
                self.state[p]["momentum_buffer"] = slot.view(p.shape)
        return bank.momentum

    def _apply(self, bank: "Bank", updates: Tensor) -> None:
        group = bank.group
        lr, decay = float(group["lr"]), group["weight_decay"]
        updates = updates.to(bank.params[0].dtype)
        awake = [(p, u.reshape(p.shape)) for p, u in zip(bank.params, updates) if p.grad is not None]
        params, updates = zip(*awake)
        torch._foreach_mul_(params, 1 - lr * decay)
        torch._foreach_add_(params, updates, alpha=-lr * ADJUST_LR[group["adjust_lr_fn"]](*bank.shape[1:]))


@dataclass
class Bank:
    """The parameters of one group that share a shape: one batch for every operation of a step."""

    group: dict
    shape: tuple[int, int, int]  # (split, n, m)

    def __post_init__(self):
        self.names: list[str] = []
        self.params: list[Tensor] = []
        self.momentum: Tensor | None = None
