"""The three collectives a sharded optimizer needs, with one rank (no process group at all) as the plain case."""

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed them; 2.11 knows the old names only.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)
_all_gather = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


class Pending:
    """A tensor that a collective is still writing: `wait()` returns it when it may be read."""

    def __init__(self, tensor: Tensor, work=None):
        self.tensor, self.work = tensor, work

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
        return self.tensor


class Ranks:
    """The ranks that share an optimizer's work: `process_group`, or torch's default group, or this process alone."""

    def __init__(self, process_group=None):
        distributed = process_group is not None or (dist.is_available() and dist.is_initialized())
        self.group = process_group
        self.size = dist.get_world_size(process_group) if distributed else 1
        self.rank = dist.get_rank(process_group) if distributed else 0

    def share(self, count: int) -> int:
        """How many of `count` equal things each rank gets, rounded up: the last ranks may have padding."""
        return -(-count // self.size)

    def reduce_scatter(self, tensor: Tensor) -> Pending:
        """Sum `tensor` (size·k, …) over ranks; rank r gets rows [r·k, (r+1)·k). With one rank: `tensor` itself."""
        if self.size == 1:
            return Pending(tensor)
        output = tensor.new_empty(tensor.size(0) // self.size, *tensor.shape[1:])
        return Pending(output, _reduce_scatter(output, tensor, group=self.group, async_op=True))

    def all_gather(self, tensor: Tensor, output: Tensor | None = None) -> Pending:
        """Every rank's `tensor` (k, …) as one (size·k, …), into `output` if given. With one rank: `tensor` itself."""
        if self.size == 1:
            return Pending(tensor)
        if output is None:
            output = tensor.new_empty(tensor.size(0) * self.size, *tensor.shape[1:])
        return Pending(output, _all_gather(output, tensor.contiguous(), group=self.group, async_op=True))

    def all_reduce(self, tensor: Tensor) -> Pending:
        """Sum `tensor` over ranks in place."""
        if self.size == 1:
            return Pending(tensor)
        return Pending(tensor, dist.all_reduce(tensor, group=self.group, async_op=True))


def reject_unsupported(parameter: Tensor, name: str, optimizer: str) -> None:
    """Raise on parameters whose local storage is not the whole matrix, or is not real."""
    if hasattr(parameter, "to_local"):  # a shard of a DTensor orthogonalised as if whole would be silently wrong
        raise ValueError(f"{optimizer}: {name} is a DTensor, which is not supported yet; pass unsharded parameters")
    if torch.is_complex(parameter):
        raise ValueError(f"{optimizer}: {name} is complex ({parameter.dtype}); only real parameters are supported")
