"""The input distributions on which polar factors are judged, and float64 truth to judge them by."""

from torch import Tensor

from kernels.bench import inputs
from optim.geometry import polar_factor  # noqa: F401

DISTRIBUTIONS = ("gaussian", "student-t2", "condition-1e3", "low-rank", "row-scaled")


def make(distribution: str, n: int, m: int, seed: int = 0) -> Tensor:
    """One (n, m) float32 matrix, n ≤ m."""
    return inputs(distribution, n, m, seed)[0]


def relative_error(approximation: Tensor, exact: Tensor) -> float:
    return ((approximation.double() - exact.double()).norm() / exact.double().norm()).item()
