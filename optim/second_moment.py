"""Second moments around the polar factor: Muon² and Muon²-F before it, NorMuon after it.

    momentum   B ← B + (1 − μ)(G − B),   M = G + μ(B − G) with Nesterov, else B
    full       V ← β₂V + (1 − β₂)G²,     M̃ = M / (√V + ε)                      Muon²    (arXiv 2604.09967, algorithm 1)
    factored   r, c: means of V over rows and columns, V_ij = r_i c_j / mean(r)  Muon²-F  (section 3.6)
    rows       v ← β₂v + (1 − β₂) mean_j O_ij²,  O'_i = O_i / (√v_i + ε), ‖O'‖_F = ‖O‖_F   NorMuon (arXiv 2510.05491)

G² and the divisions are elementwise. The rank-one V is Adafactor's (arXiv 1804.04235): exact where V has rank one, and
n + m numbers for a matrix instead of n·m. Moments start at 0 and there is no bias correction, as in the published
algorithm: it would divide V by one number, 1 − β₂^t, which the polar factor does not see (nor does NorMuon's O', whose
norm is set after). V's scale matters through ε alone, and ε = 1e-10 is far below √V of all but vanishing gradients.

Moments are float32 (float64 for float64 gradients) whatever the gradients are: with β₂ = 0.95 a bfloat16 V would stop
following once it is within some 4 to 8 % of G². What stands here is eager torch; kernels/momentum.py is the same in one
pass (two for the factored form), taken on a GPU that runs it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

import kernels

SECOND_MOMENTS = (None, "full", "factored")


def moment_shapes(kind: str | None, split: int, n: int, m: int) -> dict[str, tuple[int, ...]]:
    """State name -> shape of what `momentum_update` needs besides the momentum, for `split` matrices n×m."""
    return {None: {}, "full": {"second_moment": (split, n, m)},
            "factored": {"second_moment_rows": (split, n), "second_moment_columns": (split, m)}}[kind]


def moment_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the moments that belong to gradients of `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def momentum_update(
    grads: Tensor,
    momentum: Tensor,
    moments: Sequence[Tensor] = (),
    *,
    mu: float,
    nesterov: bool = True,
    beta2: float = 0.95,
    eps: float = 1e-10,
    engine: str = "auto",
) -> Tensor:
    """What is to be orthogonalised, (…, n, m) in the dtype of `grads`; updates momentum and moments in place.

    grads     (…, n, m) of any real dtype, read only        momentum  like it; returned if plain and without Nesterov
    moments   (), or (V,) of shape (…, n, m), or (r, c) of shapes (…, n) and (…, m), of moment_dtype
    engine    "eager": torch; "fused": the kernel, or ValueError where it cannot run; "auto": the kernel for CUDA
              tensors wherever it can
    """
    if not moments and not nesterov:
        return momentum.lerp_(grads, 1 - mu)  # one pass as it is
    if engine != "eager":
        obstacle = _why_not_fused(grads)
        if engine == "fused" and obstacle:
            raise ValueError(f'momentum with engine="fused": {obstacle}; use engine="auto" or "eager"')
        if not obstacle and (engine == "fused" or grads.is_cuda):
            from kernels.momentum import momentum_update as fused  # needs triton

            return fused(grads, momentum, moments, mu=mu, nesterov=nesterov, beta2=beta2, eps=eps)
    momentum.lerp_(grads, 1 - mu)
    if not moments:
        return grads.lerp(momentum, mu)
    exact = grads.to(moments[0].dtype)
    update = exact.lerp(momentum.to(exact.dtype), mu) if nesterov else momentum.to(exact.dtype, copy=True)
    if len(moments) == 1:
        root = moments[0].mul_(beta2).addcmul_(exact, exact, value=1 - beta2).sqrt()
    else:
        rows, columns = moments
        squares = exact.square()
        rows.lerp_(squares.mean(-1), 1 - beta2)
        columns.lerp_(squares.mean(-2), 1 - beta2)
        mean = rows.mean(-1, keepdim=True)
        root = (rows / mean.where(mean > 0, 1)).sqrt().unsqueeze(-1) * columns.sqrt().unsqueeze(-2)
    return update.div_(root.add_(eps)).to(grads.dtype)


def _why_not_fused(grads: Tensor) -> str | None:
    if grads.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernel is for float32, bfloat16 and float16, not {grads.dtype}"
    return kernels.why_not(grads.device)


def row_normalised(o: Tensor, rows: Tensor, *, beta2: float = 0.95, eps: float = 1e-10) -> Tensor:
    """NorMuon's update of the same shape and dtype: every row of O over its root mean square, ‖O‖_F kept.

    o     (…, n, m), orthogonalised, any real dtype, read only; a row is an output neuron's
    rows  (…, n), float32 or float64: v, updated in place

    Both norms follow from the row sums of squares, so O is read twice and written once.
    """
    squares = torch.linalg.vector_norm(o, dim=-1, dtype=rows.dtype).square() / o.size(-1)
    rows.lerp_(squares, 1 - beta2)
    inverse = 1 / (rows.sqrt() + eps)
    scaled = (squares * inverse.square()).sum(-1, keepdim=True)
    inverse *= (squares.sum(-1, keepdim=True) / scaled.where(scaled > 0, 1)).sqrt()
    return torch.mul(o, inverse.unsqueeze(-1), out=torch.empty_like(o))
