"""Orthonormal rows: the constraint R Rᵀ = I of LoReFT, kept without a d×d buffer and without an optimiser hook.

R is an ordinary fp32 parameter. Before a training forward every R of the model is pulled back onto the Stiefel
manifold in place, all equally shaped ones in one batched QR (`retract_`). The forward then uses R itself, and the
gradient is the one of the QR factorisation at that point, in closed form (`rows_at_manifold`):

    A = Rᵀ  (d×r, AᵀA = I),  A = Q T with Q = A, T = I
    ∂L/∂R = G − sym(G Rᵀ) R,   G = ∂L/∂Q ᵀ,   sym(M) = tril(M) + tril(M, −1)ᵀ

so a training step costs one batched QR and no backward through it, the scale of R cannot drift, weight decay cannot
shrink it, and what is saved is R bit for bit. The QR with a positive diagonal leaves orthonormal rows as they are.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

_TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}


def orthonormal_rows(matrix: Tensor) -> Tensor:
    """The nearest-by-QR matrix with orthonormal rows; rows that are orthonormal already come back bit for bit.

    Shapes: (..., r, d) → (..., r, d), r ≤ d, else ValueError. Computed in fp32 (fp64 stays fp64), returned in that
    precision. Differentiable by torch's own QR backward.
    """
    if matrix.shape[-2] > matrix.shape[-1]:
        raise ValueError(f"{matrix.shape[-2]} rows of width {matrix.shape[-1]} cannot all be orthogonal: take fewer.")
    wide = matrix if matrix.dtype == torch.float64 else matrix.float()
    with torch.autocast(device_type=wide.device.type, enabled=False):
        q, t = torch.linalg.qr(wide.mT, mode="reduced")
        sign = torch.where(t.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)
        projected = (q * sign.unsqueeze(-2)).mT
        if wide.requires_grad:
            return projected
        return torch.where(_is_orthonormal(wide), wide, projected)


def orthonormality_error(rows: Tensor) -> Tensor:
    """max |R Rᵀ − I| of each matrix, (..., r, d) → (...); R is taken in fp32 or wider."""
    wide = rows if rows.dtype == torch.float64 else rows.float()
    with torch.autocast(device_type=wide.device.type, enabled=False):
        gram = wide @ wide.mT
    return (gram - torch.eye(rows.shape[-2], dtype=gram.dtype, device=gram.device)).abs().amax(dim=(-2, -1))


def _is_orthonormal(rows: Tensor) -> Tensor:
    return (orthonormality_error(rows) <= _TOLERANCE[rows.dtype])[..., None, None]


def can_retract(parameter: Tensor) -> bool:
    """Whether the parameter may be rewritten in place: materialised, not sharded, and precise enough to hold R."""
    return parameter.dtype in _TOLERANCE and not isinstance(parameter, DTensor) and not parameter.is_meta


@torch.no_grad()
def retract_(parameters: Iterable[Tensor]) -> None:
    """Pull every R back onto orthonormal rows in place, one batched QR for each (shape, dtype, device)."""
    groups: dict[Any, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if can_retract(parameter):
            groups[parameter.shape, parameter.dtype, parameter.device].append(parameter)
    for (_, dtype, device), group in groups.items():
        stacked = torch.stack([p.detach() for p in group])
        # On the CPU the check is free and usually saves the QR (accumulation, recomputation, inference);
        # elsewhere it would be a synchronisation, so the choice is made on the device, matrix by matrix.
        if device.type == "cpu" and bool(_is_orthonormal(stacked).all()):
            continue
        for parameter, rows in zip(group, orthonormal_rows(stacked), strict=True):
            parameter.copy_(rows.to(dtype))


class _RowsAtManifold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        value = rows.clone()  # the parameter may be rewritten in place before the backward
        ctx.save_for_backward(value)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (rows,) = ctx.saved_tensors
        gram = grad @ rows.mT
        return grad - (gram.tril() + gram.tril(-1).mT) @ rows


def rows_at_manifold(rows: Tensor) -> Tensor:
    """R itself, with the gradient of the QR factorisation; R (r, d) must have orthonormal rows already."""
    return _RowsAtManifold.apply(rows)  # type: ignore[no-untyped-call,no-any-return]
