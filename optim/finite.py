"""Notice a NaN or infinite gradient, by parameter and step, without making the host wait for the device."""

from collections import deque

import torch
from torch import Tensor

from kernels.graph import capturing

from .collectives import Ranks


class NonFiniteError(FloatingPointError):
    """A gradient held NaN or infinity; the message names the parameters and the step."""


class FiniteCheck:
    """Queue gradients with `push`; `poll` raises NonFiniteError once their verdict has reached the host.

    The optimizers poll for what is two steps old: by then a GPU has answered, so nothing waits, and all ranks raise at
    the same step. The cost is one read of the gradients. Steps that a CUDA graph replays are not watched, as no host
    takes part in them: a loss that is not finite tells of them.
    """

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.queue = deque()

    def push(self, step: int, names: list[str], grads: list[Tensor], device: torch.device, first: int = 0):
        """grads: this rank's, belonging to names[first : first + len(grads)]; every rank pushes the same names."""
        if capturing():
            return
        bad = torch.zeros(len(names), device=device)
        if grads:
            largest = torch.stack(torch._foreach_norm(grads, ord=float("inf")))
            bad[first : first + len(grads)] = (~torch.isfinite(largest)).float()
        bad, arrived = self.ranks.all_reduce(bad).wait(), None
        if bad.is_cuda:
            bad = torch.empty(bad.shape, dtype=bad.dtype, pin_memory=True).copy_(bad, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self.queue.append((step, names, bad, arrived))

    def poll(self, before: float = float("inf")) -> None:
        """Wait for the verdicts on steps before `before`."""
        while self.queue and self.queue[0][0] < before:
            step, names, bad, arrived = self.queue.popleft()
            if arrived is not None:
                arrived.synchronize()
            culprits = [name for name, is_bad in zip(names, bad.tolist()) if is_bad]
            if culprits:
                more = f" and {len(culprits) - 3} more" if len(culprits) > 3 else ""
                raise NonFiniteError(
                    f"step {step}: the gradient of {', '.join(culprits[:3])}{more} is NaN or infinite; "
                    "a lower learning rate or a look at the data of that step helps"
                )


def parameter_names(group: dict) -> list[str]:
    """The names of a parameter group, or descriptions where the optimizer was built without names."""
    if "param_names" in group:
        return list(group["param_names"])
    return [f"parameter {i} of shape {tuple(p.shape)}" for i, p in enumerate(group["params"])]
