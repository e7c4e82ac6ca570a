"""What the optimizers of this package share: ranks, the watch on gradients, and the frame of a step."""

import torch
from torch.optim import Optimizer

from .collectives import Ranks
from .finite import FiniteCheck


class ShardedOptimizer(Optimizer):
    """A torch optimizer whose subclass writes `_update`, one step over all its groups, and reads `ranks`, `steps`."""

    def __init__(self, params, defaults: dict, process_group=None):
        super().__init__(params, defaults)
        self.ranks = Ranks(process_group)
        self.finite = FiniteCheck(self.ranks)
        self.steps = 0

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient; returns closure()'s loss if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.finite.poll(before=self.steps)
        self.steps += 1
        self._update()
        return loss

    def _update(self) -> None:
        raise NotImplementedError

    def check_finite(self) -> None:
        """Wait for the verdict on every gradient seen so far; raises NonFiniteError."""
        self.finite.poll()
