"""What the optimizers of this package share: ranks, the watch on gradients, and the frame of a step."""

import torch

from kernels.graph import capturing

from .chained import EagerOptimizer
from .collectives import Ranks
from .finite import FiniteCheck


class ShardedOptimizer(EagerOptimizer):
    """A torch optimizer whose subclass writes `_update`, one step over all its groups, and reads `ranks`, `steps`."""

    def __init__(self, params, defaults: dict, process_group=None):
        super().__init__(params, defaults)
        self.ranks = Ranks(process_group)
        self.finite = FiniteCheck(self.ranks)
        self.steps = 0

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient; returns closure()'s loss if one is given.

        A CUDA graph can hold it where `capturable` says so, after a first step that makes the state. A learning rate
        that is to move under the graph is a 0-D tensor on the device, which is written between replays.
        """
        if capturing() and not (self.capturable and self.steps):
            raise RuntimeError(f"{type(self).__name__}: this step cannot be captured in a CUDA graph: " + (
                "take one before, which makes the state" if self.capturable else
                "several ranks or a budget (AMO) have a part on the host; capture the gradients alone"))
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not capturing():
            self.finite.poll(before=self.steps)
        self.steps += 1
        self._update()
        return loss

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can hold a step."""
        return self.ranks.size == 1

    def _update(self) -> None:
        raise NotImplementedError

    def check_finite(self) -> None:
        """Wait for the verdict on every gradient seen so far; raises NonFiniteError."""
        self.finite.poll()
