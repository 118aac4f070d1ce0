"""Orthonormal rows: the constraint R Rᵀ = I of LoReFT, kept without a d×d buffer and without an optimiser hook.

R is an ordinary fp32 parameter. Before a training forward every R of the model is pulled back onto the Stiefel
manifold in place, all equally shaped ones in one batched factorisation (`retract_`). The forward then uses R itself,
and the gradient is the one of the QR factorisation at that point, in closed form (`rows_at_manifold`):

    A = Rᵀ  (d×r, AᵀA = I),  A = Q T with Q = A, T = I
    ∂L/∂R = G − sym(G Rᵀ) R,   G = ∂L/∂Q ᵀ,   sym(M) = tril(M) + tril(M, −1)ᵀ

so a training step costs one batched factorisation and no backward through it, the scale of R cannot drift, weight
decay cannot shrink it, and what is saved is R bit for bit. The QR with a positive diagonal leaves orthonormal rows as
they are. An optimiser's step leaves R near the manifold, and there the same Q and T come from a Cholesky factorisation
of r×r numbers, R Rᵀ = Tᵀ T and Qᵀ = T⁻ᵀ R; from a QR elsewhere.

`beside=B` (k, d), orthonormal rows too, keeps R in the complement of B: the QR is that of [B; R] and its last r rows
are taken, which are orthogonal to B to machine precision however R lies, and ∂L/∂R loses its part G Bᵀ B.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

_TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}
_TOLERANCE_ACROSS = {torch.float32: 5e-7, torch.float64: 1e-13}  # a QR's error lies on the diagonal mostly


def orthonormal_rows(matrix: Tensor, beside: Tensor | None = None) -> Tensor:
    """The nearest-by-QR matrix with orthonormal rows; rows that are orthonormal already come back bit for bit.

    Shapes: (..., r, d) → (..., r, d), r ≤ d, else ValueError. Computed in fp32 (fp64 stays fp64), returned in that
    precision. Differentiable by torch's own QR backward. The rows come out orthogonal to those of `beside`
    (..., k, d) too, which are orthonormal; k + r ≤ d then.
    """
    if matrix.shape[-2] + (0 if beside is None else beside.shape[-2]) > matrix.shape[-1]:
        kept = "" if beside is None else f" beside {beside.shape[-2]} others"
        raise ValueError(
            f"{matrix.shape[-2]} rows of width {matrix.shape[-1]} cannot all be orthogonal{kept}: take fewer."
        )
    wide = matrix if matrix.dtype == torch.float64 else matrix.float()
    first = 0 if beside is None else beside.shape[-2]
    with torch.autocast(device_type=wide.device.type, enabled=False):
        stacked = wide if beside is None else torch.cat([beside.to(wide), wide], dim=-2)
        q, t = torch.linalg.qr(stacked.mT, mode="reduced")
        sign = torch.where(t.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)
        projected = (q * sign.unsqueeze(-2)).mT[..., first:, :]
        if wide.requires_grad:
            return projected
        return torch.where(are_orthonormal(wide, beside), wide, projected)


def orthonormality_error(rows: Tensor) -> Tensor:
    """max |R Rᵀ − I| of each matrix, (..., r, d) → (...) in fp32 or wider."""
    error = _gram_error(_exact(rows))[1].amax(dim=(-2, -1))
    return error if rows.dtype == torch.float64 else error.float()


def _exact(rows: Tensor) -> Tensor:
    """In fp64, which neither TF32 nor autocast blurs; in fp32 on a device without it."""
    return rows.float() if rows.device.type == "mps" else rows.double()


def are_orthonormal(rows: Tensor, beside: Tensor | None = None) -> Tensor:
    """Whether rows (..., r, d) are orthonormal, and orthogonal to `beside` (..., k, d), to rounding: (..., 1, 1)."""
    whole = rows if beside is None else torch.cat([beside.to(rows), rows], dim=-2)
    first = whole.shape[-2] - rows.shape[-2]
    return _are_good(_gram_error(_exact(whole))[1], first, rows.dtype)[..., None, None]


def _gram_error(wide: Tensor) -> tuple[Tensor, Tensor]:
    """R Rᵀ and |R Rᵀ − I|, (..., r, r)."""
    gram = wide @ wide.mT
    return gram, (gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).abs()


def _are_good(error: Tensor, first: int, dtype: torch.dtype) -> Tensor:
    """Whether all but the `first` rows, which are taken as they are, lie as they should: (..., k, k) → (...)."""
    good = error[..., first:, first:].amax((-2, -1)) <= _TOLERANCE[dtype]
    if first:
        good = good & (error[..., first:, :first].amax((-2, -1)) <= _TOLERANCE_ACROSS[dtype])
    return good


def may_ask(device: torch.device) -> bool:
    """Whether the program may look at a number on the device: not while a graph is recorded of it."""
    recording = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return not recording and not torch.compiler.is_compiling()


def can_retract(parameter: Tensor) -> bool:
    """Whether the parameter may be rewritten in place: materialised, not sharded, and precise enough to hold R."""
    return parameter.dtype in _TOLERANCE and not isinstance(parameter, DTensor) and not parameter.is_meta


@torch.no_grad()
def retract_(parameters: Iterable[Tensor], beside: Iterable[Tensor | None] | None = None) -> None:
    """Pull every R back onto orthonormal rows in place, one batched factorisation for each (shape, dtype, device).

    `beside` has an entry for each parameter: None, or the orthonormal rows (k, d) that R stays orthogonal to.
    """
    parameters = list(parameters)
    groups: dict[Any, list[tuple[Tensor, Tensor | None]]] = defaultdict(list)
    for parameter, other in zip(parameters, beside or [None] * len(parameters), strict=True):
        if can_retract(parameter):
            key = parameter.shape, parameter.dtype, parameter.device, 0 if other is None else other.shape[0]
            groups[key].append((parameter, other))
    for (_, dtype, device, kept), group in groups.items():
        stacked = torch.stack([p.detach() for p, _ in group])
        others = torch.stack([o.to(stacked) for _, o in group if o is not None]) if kept else None
        found = _righted(stacked, others) if may_ask(device) else orthonormal_rows(stacked, others)
        if found is not None:
            for (parameter, _), rows in zip(group, found, strict=True):
                parameter.copy_(rows.to(dtype))


def _righted(rows: Tensor, beside: Tensor | None) -> Tensor | None:
    """`orthonormal_rows` of (n, r, d), not differentiable; None if all are so already. Waits once for the device."""
    first = 0 if beside is None else beside.shape[-2]
    wide = _exact(rows if beside is None else torch.cat([beside, rows], dim=-2))
    gram, error = _gram_error(wide)
    good = _are_good(error, first, rows.dtype)
    near = error.amax((-2, -1)) * gram.shape[-1] < 0.5  # so far at most are the Gram's eigenvalues from 1
    done, all_near, some_near = torch.stack([good.all(), near.all(), near.any()]).tolist()
    if done:  # accumulation, recomputation, a second forward
        return None
    if not some_near or gram.dtype != torch.float64:
        return orthonormal_rows(rows, beside)
    factor = torch.linalg.cholesky_ex(gram).L
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(factor)
    inverse = torch.linalg.solve_triangular(factor, eye, upper=False)[:, first:]
    found = torch.where(good[:, None, None], rows, (inverse @ wide).to(rows.dtype))
    # Each by itself, whatever stands beside it: a saved adapter is put right alone and must come out the same.
    return found if all_near else torch.where(near[:, None, None], found, orthonormal_rows(rows, beside))


@torch.no_grad()
def right_rows(rows: Tensor, beside: Tensor | None = None) -> Tensor:
    """What `retract_` would write for rows (r, d) beside (k, d)."""
    if not can_retract(rows):
        return orthonormal_rows(rows, beside)
    found = _righted(rows[None], None if beside is None else beside[None].to(rows))
    return rows if found is None else found[0]


class _RowsAtManifold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, beside: Tensor | None, symmetric: bool) -> Tensor:
        value = rows.clone()  # the parameter may be rewritten in place before the backward
        ctx.save_for_backward(value, beside)
        ctx.symmetric = symmetric
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        rows, beside = ctx.saved_tensors
        gram = grad @ rows.mT
        sym = 0.5 * (gram + gram.mT) if ctx.symmetric else gram.tril() + gram.tril(-1).mT
        out = grad - sym @ rows
        return (out if beside is None else out - (grad @ beside.mT) @ beside), None, None


def rows_at_manifold(rows: Tensor, beside: Tensor | None = None, symmetric: bool = False) -> Tensor:
    """R itself, with the gradient of the QR factorisation of [beside; R]; R (r, d) must have orthonormal rows already,
    orthogonal to those of `beside` (k, d).

    `symmetric=True` gives the gradient of the polar factor instead, which treats all rows alike (see `together`).
    """
    return _RowsAtManifold.apply(rows, beside, symmetric)  # type: ignore[no-untyped-call,no-any-return]
