"""The input distributions on which polar factors are judged, and float64 truth to judge them by."""

import torch
from torch import Tensor

DISTRIBUTIONS = ("gaussian", "student-t2", "condition-1e3", "low-rank", "row-scaled")


def make(distribution: str, n: int, m: int, seed: int = 0) -> Tensor:
    """One (n, m) float32 matrix, n ≤ m."""
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(n, m, generator=generator)
    if distribution == "gaussian":
        return gaussian
    if distribution == "student-t2":
        chi2 = -2 * torch.rand(n, m, generator=generator).log()  # χ² with two degrees of freedom
        return gaussian / (chi2 / 2).sqrt()
    if distribution == "condition-1e3":
        u = torch.linalg.qr(torch.randn(n, n, generator=generator))[0]
        v = torch.linalg.qr(torch.randn(m, n, generator=generator))[0]
        return (u * torch.logspace(0, -3, n)) @ v.T
    if distribution == "low-rank":
        rank = n // 16
        left, right = torch.randn(n, rank, generator=generator), torch.randn(rank, m, generator=generator)
        return left @ right / rank**0.5 + 0.03 * gaussian
    if distribution == "row-scaled":
        return gaussian * torch.logspace(0, -3, n)[:, None]
    raise ValueError(distribution)


def polar_factor(x: Tensor) -> Tensor:
    """U Vᵀ = (XXᵀ)^-½ X in float64; squaring a condition of 1e3 leaves ten of its sixteen digits."""
    x = x.double()
    values, vectors = torch.linalg.eigh(x @ x.T)
    return vectors @ (values.rsqrt()[:, None] * (vectors.T @ x))


def relative_error(approximation: Tensor, exact: Tensor) -> float:
    return ((approximation.double() - exact.double()).norm() / exact.double().norm()).item()
