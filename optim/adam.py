"""Adam with decoupled weight decay for embeddings, heads and scalars: torch's own update, sharded over ranks.

Large parameters are cut into equal flat slices: reduce-scatter the gradient, update this rank's slice, all-gather the
parameter (the optimizer-state sharding of ZeRO, arXiv 1910.02054). Small or indivisible ones are updated on every rank.
"""

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .collectives import Pending, reject_unsupported
from .finite import parameter_names
from .parts import part
from .sharded import ShardedOptimizer

SMALLEST_SHARDED = 1 << 16  # elements; below that a second collective costs more than the whole update


class Adam(ShardedOptimizer):
    """AdamW (arXiv 1711.05101) with names and meaning as torch.optim.AdamW; one rank or many.

    Gradients are averaged over `process_group` (None: the default group if torch.distributed runs, else this process
    alone). `p.grad` is read, never written; parameters without gradient are skipped (on every rank alike). A NaN or
    infinite gradient raises NonFiniteError within a step or so. state_dict() holds this rank's slices. lr may be a
    0-D tensor on the parameters' device, which can move under a CUDA graph (see `step`).

    float16 parameters get float32 moments and a float32 update, then rounded: squares of gradients leave its range, and
    where one becomes 0 the update is divided by ε alone.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, *, process_group=None):
        super().__init__(params, dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, fused=True),
                         process_group)  # fused=True also keeps `step` on the device when a state is loaded
        for group in self.param_groups:
            if min(group["lr"], group["eps"], group["weight_decay"]) < 0 or not all(0 <= b < 1 for b in group["betas"]):
                raise ValueError("Adam needs lr, eps, weight_decay >= 0 and betas in [0, 1); got "
                                 f"{group['lr']}, {group['eps']}, {group['weight_decay']}, {group['betas']}")
            for name, p in zip(parameter_names(group), group["params"]):
                reject_unsupported(p, name, "Adam")

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        for ours, theirs in zip(self.param_groups, state_dict["param_groups"]):
            for p, number in zip(ours["params"], theirs["params"]):
                if p.dtype == torch.float16:  # which torch has cast the moments to
                    for key, value in state_dict["state"].get(number, {}).items():
                        self.state[p][key] = value.to(p.device, torch.float32, copy=True)

    def _update(self) -> None:
        with part("adam"):
            reduced = [self._reduce(group) for group in self.param_groups]
            gathered = [self._update_group(group, work) for group, work in zip(self.param_groups, reduced)]
            for pending in (one for group in gathered for one in group):
                pending.wait()

    def _is_sharded(self, p: Tensor) -> bool:
        divides = p.numel() % self.ranks.size == 0 and p.is_contiguous()
        return self.ranks.size > 1 and p.numel() >= SMALLEST_SHARDED and divides

    def _reduce(self, group: dict) -> list[tuple[str, Tensor, Pending]]:
        work = []
        for name, p in zip(parameter_names(group), group["params"]):
            if p.grad is None:
                continue
            if self._is_sharded(p):
                pending = self.ranks.reduce_scatter(p.grad.reshape(-1))
            else:
                pending = self.ranks.all_reduce(p.grad if self.ranks.size == 1 else p.grad.clone())
            work.append((name, p, pending))
        return work

    def _update_group(self, group: dict, work: list[tuple[str, Tensor, Pending]]) -> list[Pending]:
        params, grads, means, squares, steps = [], [], [], [], []
        for _, p, pending in work:
            grad = pending.wait()
            if self.ranks.size > 1:
                grad = grad.div_(self.ranks.size)
            own = p.view(-1).chunk(self.ranks.size)[self.ranks.rank] if self._is_sharded(p) else p
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                dtype = torch.float32 if p.dtype == torch.float16 else p.dtype
                state["exp_avg"] = torch.zeros_like(own, dtype=dtype)
                state["exp_avg_sq"] = torch.zeros_like(own, dtype=dtype)
            for column, value in zip((params, grads, means, squares, steps),
                                     (own, grad, state["exp_avg"], state["exp_avg_sq"], state["step"])):
                column.append(value)
        if not params:
            return []
        self.finite.push(self.steps, [name for name, _, _ in work], grads, grads[0].device)
        lr, (beta1, beta2) = group["lr"], group["betas"]
        exact, grads = ([t.float() if t.dtype == torch.float16 else t for t in tensors] for tensors in (params, grads))
        adamw(exact, grads, means, squares, [], steps, fused=True, amsgrad=False, beta1=beta1, beta2=beta2,
              lr=lr if isinstance(lr, Tensor) else float(lr), weight_decay=group["weight_decay"], eps=group["eps"],
              maximize=False)
        for p, updated in zip(params, exact):
            if updated is not p:
                p.copy_(updated)
        return [self.ranks.all_gather(own, output=p.view(-1))
                for own, (_, p, _) in zip(params, work) if self._is_sharded(p)]
