"""Muon: momentum, orthogonalised. Matrices of one shape are one batch; with many ranks each orthogonalises a slice.

    gradients of one shape ── stack ──> (P, split, n, m) ── reduce-scatter ──> this rank's (P / ranks, split, n, m)
    momentum: B ← B + (1 − μ)(G − B),  Nesterov: M = G + μ(B − G),  Muon²: M / (√V + ε)       second_moment.py
    O = polar(M),  NorMuon: rows of equal size ── all-gather ──> W ← (1 − lr·decay)·W − lr·ratio·O

Keller Jordan, https://kellerjordan.github.io/posts/muon/; the sharding follows the idea of modded-nanogpt's.
"""

import math
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

import kernels

from .amo import AMO, Budget
from .collectives import reject_unsupported
from .finite import parameter_names
from .parts import part
from .polar import Polar, get_polar
from .second_moment import SECOND_MOMENTS, moment_dtype, moment_shapes, momentum_update, row_normalised
from .sharded import ShardedOptimizer

ADJUST_LR = {  # how the learning rate depends on a matrix's (rows, columns); names as in torch.optim.Muon
    "original": lambda rows, columns: math.sqrt(max(1, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
}
# Options that older checkpoints do not name, and what those did:
YOUNGER = dict(second_moment=None, row_normalize=False, beta2=0.95, second_moment_eps=1e-10, cautious=False)


class Muon(ShardedOptimizer):
    """Muon for parameters of two or more dimensions; embeddings, heads, scalars belong to Adam (see optim.route).

    A convolution (out, in, kh, kw) is the matrix (out, in·kh·kw). The group option `split=k` treats a parameter as k
    matrices stacked by rows (a fused QKV projection: 3). Names, order and meaning of the arguments follow
    torch.optim.Muon where it has them; with polar=Polar(polynomials.MUON, dtype=torch.bfloat16) a step equals its.

    lr            learning rate; the update's spectral norm is about lr times adjust_lr_fn(rows, columns)
    polar         a name in optim.polar.POLARS or a Polar
    second_moment None, "full" (Muon²) or "factored" (Muon²-F, arXiv 2604.09967): M / (√V + ε) is orthogonalised
    row_normalize NorMuon (arXiv 2510.05491): rows of the update, the output neurons', are brought to one size over time
    beta2, second_moment_eps   decay and ε of either second moment, see optim.second_moment
    budget        AMO(...): operator types get numbers of steps of their own, see optim.amo (arXiv 2605.17806)
    cautious      weight decay only where update and weight agree in sign, or one is 0 (arXiv 2510.12402)
    engine        "auto", "fused" or "eager": replaces the Polar's own, which None keeps
    process_group ranks that share the work; None: the default group if torch.distributed runs, else this process alone.
                  Gradients are averaged over the ranks here: do not wrap the model in DistributedDataParallel.

    `p.grad` is read, never written; parameters without gradient are skipped (on every rank alike). A NaN or infinite
    gradient raises NonFiniteError within a step or so; `check_finite()` waits for the last one. state_dict() holds this
    rank's share of momentum and moments; loading one with other parts than this optimizer's raises ValueError.
    All options but polar, budget and engine can be set by parameter group. lr may be a 0-D tensor on the parameters'
    device, which nothing waits for: so it can move under a CUDA graph (see `step`), where all other options are fixed.
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
        second_moment: str | None = None,
        row_normalize: bool = False,
        beta2: float = 0.95,
        second_moment_eps: float = 1e-10,
        budget: AMO | None = None,
        adjust_lr_fn: str | None = "original",
        cautious: bool = False,
        engine: str | None = None,
        process_group=None,
    ):
        if adjust_lr_fn is not None and adjust_lr_fn not in ADJUST_LR:
            raise ValueError(f"unknown adjust_lr_fn {adjust_lr_fn!r}: expected one of {', '.join(ADJUST_LR)}")
        defaults = dict(lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov,
                        second_moment=second_moment, row_normalize=row_normalize, beta2=beta2,
                        second_moment_eps=second_moment_eps, adjust_lr_fn=adjust_lr_fn or "original",
                        cautious=cautious, split=1)
        self.polar = get_polar(polar) if engine is None else get_polar(polar, engine=engine)
        self.engine = self.polar.engine
        super().__init__(params, defaults, process_group)
        self.budget = budget and Budget(budget, self.polar, self.ranks)

    @property
    def capturable(self) -> bool:
        return super().capturable and self.budget is None  # which counts steps on the host and decides there

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        self._make_all_banks()

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # a checkpoint from before an option existed
            for option, before in YOUNGER.items():
                group.setdefault(option, before)

    def state_dict(self) -> dict:
        return super().state_dict() | ({"budget": self.budget.state_dict()} if self.budget else {})

    def load_state_dict(self, state_dict: dict) -> None:
        if ("budget" in state_dict) != (self.budget is not None):
            raise ValueError(f"Muon: the checkpoint has {'a' if 'budget' in state_dict else 'no'} budget, unlike this "
                             "optimizer; resume with the recipe that it was saved from")
        for ours, theirs in zip(self.param_groups, state_dict["param_groups"]):
            for option in ("second_moment", "row_normalize"):  # they decide what a state holds
                saved = theirs.get(option, YOUNGER[option])
                if ours[option] != saved:
                    raise ValueError(f"Muon: the checkpoint has {option}={saved!r}, this optimizer {ours[option]!r}: "
                                     "its state does not serve")
        super().load_state_dict(state_dict)
        if self.budget:
            self.budget.load_state_dict(state_dict["budget"])
        for ours, theirs in zip(self.param_groups, state_dict["param_groups"]):
            for p, number in zip(ours["params"], theirs["params"]):
                for key, value in state_dict["state"].get(number, {}).items():
                    if key != "momentum_buffer":  # torch has cast the moments to p.dtype
                        self.state[p][key] = value.to(p.device)
        self._make_all_banks()

    def _make_all_banks(self) -> None:
        self.banks = [bank for group in self.param_groups for bank in self._make_banks(group)]

    def _make_banks(self, group: dict) -> list["Bank"]:
        if group["lr"] < 0 or group["weight_decay"] < 0 or not 0 <= group["momentum"] < 1:
            raise ValueError("Muon needs lr >= 0, weight_decay >= 0, 0 <= momentum < 1; got "
                             f"{group['lr']}, {group['weight_decay']}, {group['momentum']}")
        if not 0 <= group["beta2"] < 1 or group["second_moment_eps"] <= 0:
            raise ValueError("Muon needs 0 <= beta2 < 1, second_moment_eps > 0; got "
                             f"{group['beta2']}, {group['second_moment_eps']}")
        if group["second_moment"] not in SECOND_MOMENTS:
            raise ValueError(f"unknown second_moment {group['second_moment']!r}: expected one of "
                             f"{', '.join(map(repr, SECOND_MOMENTS))}")
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
            if self.budget:
                orthogonal = self.budget.many(updates, [bank.names for bank in banks])
            else:
                orthogonal = self.polar.many(updates)
        if any(bank.group["row_normalize"] for bank in banks):
            with part("muon: normalise rows"):
                orthogonal = [self._row_normalised(bank, o) if bank.group["row_normalize"] else o
                              for bank, o in zip(banks, orthogonal)]
        with part("muon: apply"):
            gathered = [self.ranks.all_gather(o) for o in orthogonal]
            for bank, grads in zip(banks, summed):  # only now: collectives run in the order in which they are asked for
                own = self._own(bank, grads)
                self.finite.push(self.steps, bank.names, list(grads[: len(own)].unbind()), grads.device, own.start)
            for bank, pending in zip(banks, gathered):
                self._apply(bank, pending.wait())

    def _reduce(self, bank: "Bank"):
        first = bank.params[0]
        count = self.ranks.share(len(bank.params)) * self.ranks.size
        full = count == len(bank.params) and all(p.grad is not None for p in bank.params)
        stacked = (first.new_empty if full else first.new_zeros)(count, *bank.shape)
        slots, grads = [], []
        for slot, p in zip(stacked, bank.params):
            if p.grad is not None:
                if p.grad.is_sparse:
                    raise ValueError("Muon: sparse gradients are not supported; give this parameter to Adam")
                slots.append(bank.seen_as(p, slot))
                grads.append(p.grad)  # in any layout
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
        group, state = bank.group, self._state(bank, grads)
        moments = [state[key] for key in moment_shapes(group["second_moment"], *bank.shape)]
        with self._asleep_kept(bank, [state["momentum_buffer"], *moments]):
            return momentum_update(grads, state["momentum_buffer"], moments, mu=group["momentum"],
                                   nesterov=group["nesterov"], beta2=group["beta2"], eps=group["second_moment_eps"],
                                   engine=self.engine)

    def _row_normalised(self, bank: "Bank", orthogonal: Tensor) -> Tensor:
        rows = bank.state["row_second_moment"]
        with self._asleep_kept(bank, [rows]):
            return row_normalised(orthogonal, rows, beta2=bank.group["beta2"], eps=bank.group["second_moment_eps"])

    @contextmanager
    def _asleep_kept(self, bank: "Bank", tensors: list[Tensor]):
        """Parameters without gradient have, after the block, what they had in `tensors` (share, …) before it."""
        asleep = [slot for slot, i in enumerate(self._own(bank, tensors[0])) if bank.params[i].grad is None]
        kept = [(tensor[slot], tensor[slot].clone()) for tensor in tensors for slot in asleep]
        yield
        for place, before in kept:
            place.copy_(before)

    def _state(self, bank: "Bank", grads: Tensor) -> dict[str, Tensor]:
        """This rank's momentum and moments by name, each (share, …); state[p][name] are views of them.

        Made at the first call, from what a checkpoint left in self.state.
        """
        if bank.state is None:
            exact = moment_dtype(grads.dtype)
            layout = {"momentum_buffer": (bank.shape, grads.dtype)}
            for name, shape in moment_shapes(bank.group["second_moment"], *bank.shape).items():
                layout[name] = shape, exact
            if bank.group["row_normalize"]:
                layout["row_second_moment"] = bank.shape[:2], exact
            bank.state = {name: torch.zeros(len(grads), *shape, dtype=dtype, device=grads.device)
                          for name, (shape, dtype) in layout.items()}
            for slot, i in enumerate(self._own(bank, grads)):
                p, loaded = bank.params[i], dict(self.state[bank.params[i]])
                if loaded.keys() - layout.keys() or loaded and layout.keys() - loaded.keys():
                    raise ValueError(f"Muon: the checkpoint's state of {bank.names[i]} holds {', '.join(loaded)}, "
                                     f"this optimizer needs {', '.join(layout)}")
                for name, (shape, _) in layout.items():
                    view = bank.state[name][slot]
                    view = bank.seen_as(p, view) if shape == bank.shape else view
                    if loaded:
                        view.copy_(loaded[name].reshape(view.shape))
                    self.state[p][name] = view
        return bank.state

    def _apply(self, bank: "Bank", updates: Tensor) -> None:
        """updates: (k or more, split, n, m) for k parameters. One launch where the engine takes kernels; whatever it is,
        plain torch for what kernels/apply.py does not take and for what is not in order (Bank.in_order)."""
        params, group, lr = [None if p.grad is None else p for p in bank.params], bank.group, bank.group["lr"]
        options = dict(lr=lr if isinstance(lr, Tensor) and lr.device == updates.device else float(lr),
                       ratio=ADJUST_LR[group["adjust_lr_fn"]](*bank.shape[1:]), decay=group["weight_decay"],
                       cautious=group["cautious"])
        wanted = self.engine == "fused" or (
            self.engine == "auto" and updates.is_cuda and kernels.why_not(updates.device) is None)
        if wanted:
            from kernels.apply import Addresses, apply_updates, fits  # needs triton
            if fits(params, updates) and bank.in_order(params):
                bank.addresses = bank.addresses or Addresses()
                return apply_updates(params, updates, bank.addresses, **options)
        updates = updates.to(bank.params[0].dtype)
        pairs = [(p, bank.seen_as(p, u)) for p, u in zip(params, updates) if p is not None]
        apply_updates_eager(*zip(*pairs), **options)


def apply_updates_eager(params: Sequence[Tensor], updates: Sequence[Tensor], *, lr: float | Tensor, ratio: float = 1.0,
                        decay: float = 0.0, cautious: bool = False) -> None:
    """params ← (1 − lr · decay) · params − lr · ratio · updates; cautious: decay only where params · updates ≥ 0.

    params in any layout, with an update of its shape and dtype for each. lr is a number, or on the parameters' device.
    Kernel: kernels/apply.py.
    """
    if cautious and decay:
        agree = torch._foreach_mul(params, updates)
        torch._foreach_sign_(agree)
        torch._foreach_add_(agree, 1)
        torch._foreach_clamp_max_(agree, 1)  # 1 where the product is at least 0, else 0
        torch._foreach_mul_(agree, params)
        _add_scaled(params, agree, lr * -decay)
    elif decay:
        torch._foreach_mul_(params, 1 - lr * decay)
    _add_scaled(params, updates, lr * -ratio)


def _add_scaled(params: Sequence[Tensor], others: Sequence[Tensor], factor: float | Tensor) -> None:
    """params += factor · others; a factor on the device stays there."""
    if isinstance(factor, Tensor):
        torch._foreach_add_(params, torch._foreach_mul(others, factor.to(params[0].dtype)))
    else:
        torch._foreach_add_(params, others, alpha=factor)


@dataclass
class Bank:
    """The parameters of one group that share a shape: one batch for every operation of a step."""

    group: dict
    shape: tuple[int, int, int]  # (split, n, m)

    def __post_init__(self):
        self.names: list[str] = []
        self.params: list[Tensor] = []
        self.state: dict[str, Tensor] | None = None  # this rank's share, made at the first step
        self.addresses = None  # kernels.apply.Addresses, once there is one

    def seen_as(self, p: Tensor, matrix: Tensor) -> Tensor:
        """`matrix`, of the bank's shape, as p, in p's own order in memory where that goes by rows: so a filter that is
        channels last has its columns in that order, and is copied and added to by kernels that need no strides. Nothing
        but factored moments, whose checkpoints name columns, could tell."""
        if self._channels_last(p):
            return matrix.reshape(p.size(0), *p.shape[2:], p.size(1)).permute(0, 3, 1, 2)
        return matrix.reshape(p.shape)

    def in_order(self, params: Sequence[Tensor | None]) -> bool:
        """Whether each of `params` but None lies as a contiguous matrix that is `seen_as` it does."""
        return all(p is None or p.is_contiguous() or self._channels_last(p) for p in params)

    def _channels_last(self, p: Tensor) -> bool:
        return p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last) and (
            self.group["second_moment"] != "factored")
