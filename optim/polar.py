"""Orthogonalise matrices: the polar factor O = U Vᵀ of X = U S Vᵀ, by a few matrix products.

    normalise  ×  polynomials  ×  form of the iteration
    ---------     -----------     ---------------------
    frobenius     polynomials.py  newton-schulz: X ← aX + (bA + cA²)X, A = XXᵀ                (n×m work in every step)
    aol                           gram: iterate on the n×n Gram matrix, touch X only at the end       (cheap if m » n)

X is n×m with n ≤ m; taller matrices are handled transposed. What stands here is eager torch, the reference that runs
anywhere; AOL with the Gram form has Triton kernels too (kernels/newton_schulz.py), taken on a GPU that runs them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import kernels

from . import polynomials
from .polynomials import Coefficients

_TINY = 1e-30  # keeps 0/0 at 0; matrices are scaled to a largest entry of about 1 before it is compared with anything


@dataclass(frozen=True)
class Polar:
    """A way to orthogonalise. Call it on a tensor (…, n, m); it returns the same shape in the iteration's dtype.

    coefficients  (a, b, c) of every step, see polynomials.py
    normalize     "frobenius": X / ‖X‖_F, as Muon;  "aol": rows scaled by rsqrt(Σ_j |XXᵀ|_ij), as Turbo-Muon
                  (arXiv 2512.04632); both guarantee ‖X‖₂ ≤ 1
    bound         divide X by min(1, ‖R²‖_F^¼) as well, R = XXᵀ: as ‖R²‖_F ≥ σ_max⁴, ‖X‖₂ ≤ 1 stays, and it is tight
                  where few singular values dominate. Costs one n×n product
    form          "newton-schulz", "gram", or "auto": in eager torch whichever has fewer FLOPs where both are accurate,
                  with the kernels whichever is faster
    dtype         of storage between products (which accumulate in float32, but for cuBLAS's split sums); None: on a
                  GPU float16 after AOL and bfloat16 otherwise, float32 on a CPU
    engine        "fused": the kernels, or ValueError where they cannot do it; "eager": this file; "auto": the kernels
                  for CUDA tensors wherever they can
    restart       gram form: steps after which Q is applied to X and the Gram matrix computed anew; None: never.
                  float16 needs it with Frobenius scaling, more than four steps (Dao-AILab's Gram Newton-Schulz), or
                  slopes as steep as the minimax ones: rounding of R grows with the square of the slope
    """

    coefficients: Coefficients
    normalize: str = "frobenius"
    bound: bool = False
    form: str = "newton-schulz"
    dtype: torch.dtype | None = None
    restart: int | None = None
    engine: str = "auto"

    def __post_init__(self):
        for field, known in (("normalize", ("frobenius", "aol")), ("form", ("newton-schulz", "gram", "auto")),
                             ("engine", ("auto", "eager", "fused"))):
            if getattr(self, field) not in known:
                raise ValueError(f"Polar {field}={getattr(self, field)!r}: expected one of {', '.join(known)}")
        if not self.coefficients or any(len(step) != 3 for step in self.coefficients):
            raise ValueError(f"Polar coefficients={self.coefficients!r}: expected one (a, b, c) for each step")

    def __call__(self, x: Tensor) -> Tensor:
        return self.many([x])[0]

    def many(self, xs: Sequence[Tensor]) -> list[Tensor]:
        """The polar factor of every tensor of a list: a model's whole set of matrices in one call."""
        for x in xs:
            if x.ndim < 2:
                raise ValueError(f"Polar needs matrices (…, n, m), got shape {tuple(x.shape)}")
        if xs and self.engine != "eager":
            obstacle = self.why_not_fused(xs[0].device)
            if self.engine == "fused" and obstacle:
                raise ValueError(f'Polar engine="fused": {obstacle}; use engine="auto" or "eager"')
            if not obstacle and (self.engine == "fused" or xs[0].is_cuda):
                from kernels.newton_schulz import orthogonalise  # needs triton

                dtype = self.dtype or torch.float16
                return orthogonalise(xs, self.coefficients, bound=self.bound, restart=self.restart, form=self.form,
                                     dtype=dtype)
        return [self._eager(x) for x in xs]

    def why_not_fused(self, device: torch.device) -> str | None:
        """Why the kernels cannot do this on `device`, or None if they can."""
        if self.normalize != "aol":
            return 'the kernels are for normalize="aol"'
        if self.dtype not in (None, torch.float16) or self.restart == 1 or len(self.coefficients) < 2:
            return "the kernels are for float16 and for two steps or more, also before a restart"
        return kernels.why_not(device)

    def _eager(self, x: Tensor) -> Tensor:
        if x.size(-2) > x.size(-1):
            return self._eager(x.mT).mT
        matrices = x.reshape(-1, *x.shape[-2:])
        dtype = self.dtype or _default_dtype(self.normalize, x.device)
        matrices = _power_of_two_scaled(matrices)
        scale = gram = None
        if self.normalize == "aol":
            matrices, scale, gram = _aol(matrices, dtype)
        else:
            matrices = _frobenius(matrices, dtype)
        if self.bound:
            scale, gram = _bounded(matrices, scale, gram)
        if self._use_gram(x.size(-2), x.size(-1), dtype):
            result = _gram_form(matrices, self.coefficients, scale, gram, self.restart)
        else:
            matrices = matrices if scale is None else (scale * matrices).to(dtype)
            result = _newton_schulz(matrices, self.coefficients, gram)
        return result.reshape(x.shape)

    def _use_gram(self, n: int, m: int, dtype: torch.dtype) -> bool:
        if self.form != "auto":
            return self.form == "gram"
        if dtype == torch.bfloat16:  # too few bits for the recursion on R: σ_max reaches 1.9 at a condition of 1e3
            return False
        steps = len(self.coefficients)
        segments = -(-steps // (self.restart or steps))
        gram_flops = segments * 4 * n * n * m + 2 * n**3 * (steps + 3 * (steps - segments))
        newton_schulz_flops = steps * (4 * n * n * m + 2 * n**3)
        return gram_flops < newton_schulz_flops


def _default_dtype(normalize: str, device: torch.device) -> torch.dtype:
    if device.type == "cpu":  # half-precision products are slower than float32 on most CPUs
        return torch.float32
    return torch.float16 if normalize == "aol" else torch.bfloat16


def _power_of_two_scaled(x: Tensor) -> Tensor:
    """x (batch, n, m) divided by a power of two so that its largest entry lies in [½, 1): exact, so no bit changes.

    Without it squares of tiny or huge gradients leave float32's range (1e-30 squared is 0).
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    largest = x.abs().amax(dim=(-2, -1), keepdim=True)
    mantissa, _ = torch.frexp(largest)
    return torch.where(largest > 0, x / (largest / mantissa), x)


def _frobenius(x: Tensor, dtype: torch.dtype) -> Tensor:
    """X / ‖X‖_F in `dtype`, cast first and divided then, as torch.optim.Muon does (to the bit in bfloat16)."""
    x = x.to(dtype)
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    return x / norm.clamp(min=torch.finfo(dtype).tiny)


def _aol(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Almost-orthogonal scaling: unit rows U (batch, n, m), scale t (batch, n, 1), Gram matrix of diag(t) U.

    With row norms r, X = diag(r) U and Γ = UUᵀ, AOL's s_i = (Σ_j r_i r_j |Γ_ij|)^-½ gives t_i = r_i s_i =
    (r_i / Σ_j |Γ_ij| r_j)^½. Only entries of size at most 1 are stored in `dtype`, which float16 can hold.
    """
    norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    unit = (x / norms.clamp(min=_TINY)).to(dtype)
    gram = _product(unit, unit.mT)
    scale = (norms / (gram.abs().to(norms.dtype) @ norms).clamp(min=_TINY)).sqrt()
    return unit, scale, (gram * scale * scale.mT).to(dtype)


def _bounded(x: Tensor, scale: Tensor | None, gram: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scale (batch, n or 1, 1) and Gram matrix of scale · x after division by the bound min(1, ‖R²‖_F^¼) on σ_max."""
    gram = _product(x, x.mT) if gram is None else gram
    square = _product(gram, gram).to(torch.promote_types(gram.dtype, torch.float32))
    bound = torch.linalg.matrix_norm(square, keepdim=True).sqrt().clamp(_TINY, 1)  # of σ_max²; ≥ _TINY for X = 0
    return bound.rsqrt() * (1 if scale is None else scale), (gram / bound).to(gram.dtype)


def _product(a: Tensor, b: Tensor, addend: Tensor | None = None, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    """alpha · ab + beta · addend, batched, accumulated in float32 and stored in the dtype of `a`."""
    if a.dtype == torch.float16 and a.device.type == "cpu":  # torch has only a slow loop for it there
        addend = None if addend is None else addend.float()
        return _product(a.float(), b.float(), addend, beta, alpha).half()
    return a @ b if addend is None else torch.baddbmm(addend, a, b, beta=beta, alpha=alpha)


def _newton_schulz(x: Tensor, coefficients: Coefficients, gram: Tensor | None) -> Tensor:
    """x (batch, n, m) with ‖x‖₂ ≤ 1; gram = x xᵀ if it is known already, else None."""
    for a, b, c in coefficients:
        gram = _product(x, x.mT) if gram is None else gram
        x = _product(_product(gram, gram, gram, beta=b, alpha=c), x, x, beta=a)
        gram = None
    return x


def _gram_form(
    x: Tensor, coefficients: Coefficients, scale: Tensor | None, gram: Tensor | None, restart: int | None
) -> Tensor:
    """O = Q X with Q and R = p(X)p(X)ᵀ updated on n×n matrices only (Gram Newton-Schulz, Dao-AILab 2026).

    W = aI + bR + cR²:  Q ← QW, R ← WRW. What is orthogonalised is scale · x; the scale goes into Q, so x is only read.
    """
    restart = restart or len(coefficients)
    for first in range(0, len(coefficients), restart):
        segment = coefficients[first : first + restart]
        r = _product(x, x.mT) if gram is None else gram
        q = None
        for i, (a, b, c) in enumerate(segment):
            w = _product(r, r, r, beta=b, alpha=c)
            w.diagonal(dim1=-2, dim2=-1).add_(a)
            q = w if q is None else _product(q, w)
            if i + 1 < len(segment):
                r = _product(_product(w, r), w)
        x = _product(q if scale is None else (q * scale.mT).to(x.dtype), x)
        scale = gram = None
    return x


POLARS: dict[str, Polar] = {
    "muon": Polar(polynomials.MUON),
    "muon-3": Polar(polynomials.MUON[:3]),  # as many of Muon's steps as Muon² takes (arXiv 2604.09967)
    "muon-plus": Polar(polynomials.MUON_PLUS),
    "polar-express": Polar(polynomials.POLAR_EXPRESS),
    # Four steps like Turbo-Muon's, no worse than those on any test distribution, better on the momentum of a run.
    "turbo": Polar(polynomials.FITTED[4], normalize="aol", bound=True, form="auto"),
    "turbo-3": Polar(polynomials.FITTED[3], normalize="aol", bound=True, form="auto"),
    "turbo-5": Polar(polynomials.FITTED[5], normalize="aol", bound=True, form="auto", restart=3),
    "turbo-published": Polar(polynomials.TURBO, normalize="aol", form="auto"),
}


def get_polar(polar: str | Polar, **changes) -> Polar:
    """A Polar from its name in POLARS (or as given), with fields replaced: get_polar("muon", dtype=torch.float32)."""
    if isinstance(polar, str):
        if polar not in POLARS:
            raise ValueError(f"unknown polar {polar!r}: expected one of {', '.join(POLARS)}, or a Polar(...)")
        polar = POLARS[polar]
    return replace(polar, **changes)
