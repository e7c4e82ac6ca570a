"""Muon's updates applied to a bank of parameters, weight decay with them, in one launch.

    p ← (1 − lr·decay)·p − lr·ratio·u,     cautious (arXiv 2510.12402):  p ← p − lr·decay·[p·u ≥ 0]·p − lr·ratio·u

Parameters are tensors of their own, updates are stacked: the kernel finds p by its address in a table, u by its number.
With p in float32 and u in float16 it moves 10 bytes a number: p and u are read, p is written. The eager twin moves 18,
26 with decay and 78 with cautious decay: the cast of u is a pass over memory, each call of foreach one more.

A thread takes 16 bytes of p at a time and as many numbers of u (max_contiguous): with 16 bytes of u they would have to
pass through shared memory. All is computed in float32 and rounded once.

Eager twin: optim.muon.apply_updates_eager.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .graph import capturing

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
BLOCK = 2048  # numbers of a program


class Addresses:
    """Where parameters lie, in a tensor on their device, 0 for None; made anew only when a number is another."""

    def __init__(self):
        self.numbers, self.table = (), None
        self.captured: list[Tensor] = []  # what CUDA graphs read must stay where it is

    def of(self, params: Sequence[Tensor | None], device: torch.device) -> Tensor:
        numbers, table = tuple(0 if p is None else p.data_ptr() for p in params), self.table
        if numbers != self.numbers:
            table = torch.zeros(len(numbers), dtype=torch.int64, device=device)
            torch._foreach_add_(table.unbind(), numbers)  # as arguments of a launch: no copy that the host waits for
            if not capturing():  # where it is replays that fill it
                self.numbers, self.table = numbers, table
        if capturing():
            self.captured.append(table)
        return table


@triton.jit
def _apply_kernel(addresses, updates, lr, size, blocks, ratio, decay, DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
                  VECTOR: tl.constexpr, MOVING: tl.constexpr, DECAY: tl.constexpr, CAUTIOUS: tl.constexpr,
                  BLOCK: tl.constexpr):
    """BLOCK numbers of one parameter: programs (parameters · blocks). MOVING: lr is where the learning rate lies."""
    slot, block = (tl.program_id(0) // blocks).to(tl.int64), (tl.program_id(0) % blocks).to(tl.int64)
    at = tl.max_contiguous(block * BLOCK + tl.arange(0, BLOCK), VECTOR)
    u = tl.load(updates + slot * size + at, mask=at < size, other=0.0).to(tl.float32)
    address = tl.load(addresses + slot)
    param, inside = address.to(tl.pointer_type(DTYPE)), (at < size) & (address != 0)
    if ALIGNED:
        param = tl.multiple_of(param, 16)
    p = tl.load(param + at, mask=inside, other=0.0).to(tl.float32)
    rate = tl.load(lr).to(tl.float32) if MOVING else lr
    if DECAY and CAUTIOUS:
        p -= rate * decay * (tl.where(p * u < 0, 0.0, 1.0) * p)
    elif DECAY:
        p *= 1 - rate * decay
    tl.store(param + at, (p - rate * ratio * u).to(DTYPE), mask=inside)


def fits(params: Sequence[Tensor | None], updates: Tensor) -> bool:
    """Whether apply_updates takes these: what it says of them, and that they are on one device."""
    size, awake = updates[0].numel(), [p for p in params if p is not None]
    return len(updates) >= len(params) and {updates.dtype, *(p.dtype for p in awake)} <= DTYPES.keys() and all(
        p.dtype == awake[0].dtype and p.device == updates.device and p.numel() == size
        and (p.is_contiguous() or p.is_contiguous(memory_format=torch.channels_last)) for p in awake)


def apply_updates(params: Sequence[Tensor | None], updates: Tensor, addresses: Addresses | None = None, *,
                  lr: float | Tensor, ratio: float = 1.0, decay: float = 0.0, cautious: bool = False) -> None:
    """The formula above for every one of params but None, in place. ValueError where they do not fit.

    params     of one dtype of DTYPES and one size, contiguous or channels last        addresses   kept with them
    updates    (k or more, …) for k params, of any of DTYPES, each in the order in which its parameter lies
    lr         a number, or a 0-D tensor on the device, which stays there
    """
    if not fits(params, updates):
        got = [(tuple(t.shape), t.stride(), t.dtype, t.device) for t in [*params, updates] if t is not None]
        raise ValueError(f"apply_updates needs params of one kind and an update of their size for each; got {got}")
    size, awake = updates[0].numel(), [p for p in params if p is not None]
    if awake and size:
        moving, dtype, blocks = isinstance(lr, Tensor), awake[0].dtype, triton.cdiv(size, BLOCK)
        table = (addresses or Addresses()).of(params, updates.device)
        _apply_kernel[(len(params) * blocks,)](
            table, updates.contiguous(), lr if moving else float(lr), size, blocks, float(ratio), float(decay),
            DTYPE=DTYPES[dtype], ALIGNED=all(p.data_ptr() % 16 == 0 for p in awake), VECTOR=16 // dtype.itemsize,
            MOVING=moving, DECAY=decay != 0, CAUTIOUS=cautious, BLOCK=BLOCK, num_warps=8)
