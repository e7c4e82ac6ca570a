"""Several optimizers behind the interface of one."""

import inspect

from torch.optim import Optimizer


class EagerOptimizer(Optimizer):
    """Optimizer without the wrappers that keep torch.compile out of these four: their first call imports torch._dynamo,
    which takes seconds, for a process that compiles nothing too."""

    add_param_group, zero_grad = inspect.unwrap(Optimizer.add_param_group), inspect.unwrap(Optimizer.zero_grad)
    state_dict, load_state_dict = inspect.unwrap(Optimizer.state_dict), inspect.unwrap(Optimizer.load_state_dict)


class ChainedOptimizer(EagerOptimizer):
    """Steps each of `optimizers` in turn. `param_groups` is the list of all their groups (the same dicts), so
    learning-rate schedulers and hand-written schedules work; state_dict() holds one entry per optimizer, in order."""

    def __init__(self, *optimizers: Optimizer):
        self.optimizers = optimizers
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        self._share_groups()

    def _share_groups(self) -> None:
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def add_param_group(self, param_group: dict) -> None:
        if len(self.param_groups) == sum(len(optimizer.param_groups) for optimizer in self.optimizers):
            raise ValueError("ChainedOptimizer cannot tell whose group this is: add it to one of .optimizers first, "
                             "and chain them then")
        super().add_param_group(param_group)

    def step(self, closure=None):
        loss = None if closure is None else self.optimizers[0].step(closure)
        for optimizer in self.optimizers[0 if closure is None else 1 :]:
            optimizer.step()
        return loss

    def check_finite(self) -> None:
        """Wait for the verdict on every gradient seen so far; raises NonFiniteError."""
        for optimizer in self.optimizers:
            optimizer.check_finite()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict) -> None:
        states = state_dict["optimizers"]
        if len(states) != len(self.optimizers):
            raise ValueError(f"the checkpoint holds {len(states)} optimizers, this run has {len(self.optimizers)}")
        for optimizer, state in zip(self.optimizers, states):
            optimizer.load_state_dict(state)
        self._share_groups()
