"""How orthogonal a result is, and what the spectrum of its input was: the measures of a polar iteration.

Everything takes matrices (…, n, m) of any real dtype, n and m in either order, computes in float64 on the tensor's own
device, and returns one float64 value (or vector, or matrix) per matrix. Nothing here is meant for a training step.

Method: with the eigenvectors V of XXᵀ the rows of Y = VᵀX are orthogonal and their lengths are X's singular values,
more exact than the roots of the eigenvalues because X itself is not squared. An SVD is slower on a GPU. The price is
that XXᵀ knows singular values σ only down to 1e-8 σ_max, so σ < RANK · σ_max counts as 0: for a float32 matrix no loss,
as that is about the rounding of its entries.
"""

import torch
from torch import Tensor

RANK = 1e-7  # singular values below this fraction of the largest are taken as 0


def polar_factor(x: Tensor) -> Tensor:
    """The exact polar factor U Vᵀ of X = U S Vᵀ: (…, n, m) -> (…, n, m) float64.

    Of a rank-deficient X it is the sum of u_i v_iᵀ over the σ_i ≥ RANK · σ_max only, which is unique (completing it to
    an orthogonal matrix would not be); of X = 0 it is 0. NaN or infinite X gives NaN.
    Relative error 1e-13 at condition 1e3, 1e-10 at 1e6, 1e-3 at RANK, where the smallest directions begin to blur.
    """
    if x.size(-2) > x.size(-1):
        return polar_factor(x.mT).mT
    basis, rows, lengths = _principal_rows(x)
    unit = rows / lengths.where(lengths > 0, torch.inf).unsqueeze(-1)
    # Rounding of XXᵀ leaves overlaps e between short rows. (I + E)^-½ between rows of lengths σ is, to first order,
    # I − W∘E with W_ij = σ_j / (σ_i + σ_j): perturb (D(I + E)D)^½ = D + F, so that DF + FD = DED.
    overlap = unit @ unit.mT
    overlap.diagonal(dim1=-2, dim2=-1).zero_()
    total = lengths.unsqueeze(-1) + lengths.unsqueeze(-2)
    weight = lengths.unsqueeze(-2) / total.where(total > 0, 1)
    return basis @ (unit - (weight * overlap) @ unit)


def singular_values(x: Tensor) -> Tensor:
    """Singular values of every matrix, largest first: (…, n, m) -> (…, min(n, m)) float64.

    Exactly 0 where below RANK · σ_max. Relative error 1e-14 at σ = 1e-3 σ_max, 1e-8 at 1e-6, 1e-2 at RANK.
    NaN or infinite X gives NaN.
    """
    wide = x.mT if x.size(-2) > x.size(-1) else x
    return _principal_rows(wide)[2].sort(descending=True).values


def polar_error(o: Tensor, exact: Tensor) -> Tensor:
    """‖O − UVᵀ‖_F / ‖UVᵀ‖_F of every matrix: o, exact = polar_factor(x), both (…, n, m) -> (…) float64.

    0 is perfect, 1 is what O = 0 has. Where `exact` is 0 it is infinite, or NaN if O is 0 too.
    """
    exact = exact.double()
    return _norm(o.double() - exact) / _norm(exact)


def directional_alignment(o: Tensor, exact: Tensor) -> Tensor:
    """⟨O, UVᵀ⟩ / (‖O‖_F ‖UVᵀ‖_F) of every matrix: o, exact = polar_factor(x), both (…, n, m) -> (…) float64.

    Muon²'s measure of quality (arXiv 2604.09967): the cosine between the update and the exact one, 1 at best,
    whatever the scale of O. NaN where either is 0.
    """
    o, exact = o.double(), exact.double()
    return (o * exact).sum((-2, -1)) / (_norm(o) * _norm(exact))


def stable_rank(x: Tensor) -> Tensor:
    """‖X‖_F² / ‖X‖₂² of every matrix, between 1 and its rank: (…, n, m) -> (…) float64. NaN for X = 0."""
    values = singular_values(x)
    return values.square().sum(-1) / values[..., 0].square()


def condition(x: Tensor) -> Tensor:
    """σ_max / σ_min of every matrix: (…, n, m) -> (…) float64. Infinite above 1 / RANK, NaN for X = 0."""
    values = singular_values(x)
    return values[..., 0] / values[..., -1]


def scaled_gram(x: Tensor, normalize: str) -> Tensor:
    """DX(DX)ᵀ, what a polar iteration starts from: (…, n, m) -> (…, k, k) float64, k = min(n, m), entries at most 1.

    normalize  "frobenius": D = 1 / ‖X‖_F;  "aol": D = diag(Σ_j |XXᵀ|_ij)^-½, almost-orthogonal scaling of the rows
               (arXiv 2512.04632). The roots of the eigenvalues are the singular values of DX, down to 1e-8 of σ_max.
    X = 0 gives 0, and so do its rows of zeros; NaN stays NaN.
    """
    if normalize not in ("frobenius", "aol"):
        raise ValueError(f"scaled_gram normalize={normalize!r}: expected aol or frobenius")
    x = (x.mT if x.size(-2) > x.size(-1) else x).double()
    largest = x.abs().amax((-2, -1), keepdim=True)
    x = x / largest.where(largest != 0, 1)  # squares of tiny entries would vanish
    gram = x @ x.mT
    if normalize == "aol":
        sums = gram.abs().sum(-1, keepdim=True)
    else:
        sums = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].expand(*gram.shape[:-1], 1)
    scale = sums.where(sums != 0, 1).rsqrt()
    return scale * gram * scale.mT


def _principal_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """V (…, n, n), Y = VᵀX (…, n, m), row lengths of Y (…, n), for n ≤ m; rows shorter than RANK · longest are 0."""
    x = x.double()
    finite = x.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    x = x.where(finite, 0)  # eigh raises at NaN, on CPU
    basis = torch.linalg.eigh(x @ x.mT).eigenvectors
    rows = basis.mT @ x
    lengths = torch.linalg.vector_norm(rows, dim=-1)
    lengths = lengths.where(lengths >= RANK * lengths.amax(-1, keepdim=True), 0)
    rows = rows.where(lengths.unsqueeze(-1) > 0, 0)
    return basis, rows.where(finite, torch.nan), lengths.where(finite.squeeze(-1), torch.nan)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(x)
