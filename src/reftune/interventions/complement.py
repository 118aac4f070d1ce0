"""`orthogonal_to`: the directions that other interventions write and read at a site, and staying out of their way.

For an intervention beside others, all at one site and one after the other:

    its R ⟂ what the others write    they do not write over each other
    its R ⟂ what the others read     they do not read what it writes
    its W ⟂ what the others write    it does not read what they write

so that each edit is the same whether the others are there or not. W may read what the others read.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .base import Intervention


@dataclass(frozen=True)
class Taken:
    """What others take up at a site: orthonormal rows, those of `reads` orthogonal to those of `writes`."""

    writes: Tensor  # (k, d), spans everything the others write
    reads: Tensor  # (l, d), spans what they read besides

    @property
    def rank(self) -> int:
        return self.writes.shape[0] + self.reads.shape[0]


@torch.no_grad()
def taken_by(interventions: Iterable[Intervention]) -> Taken:
    """What interventions of one width read and write, as they are now; computed in fp64, returned in their precision.

    Raises ValueError for a kind that edits all directions (RED) or does not say which.
    """
    writes, reads = [], []
    for intervention in interventions:
        directions = intervention.directions()
        if directions is None:
            raise ValueError(
                f"A {type(intervention).__name__} reads or writes every direction of the hidden states (or does not "
                "say which): nothing can be orthogonal to it."
            )
        writes.append(directions[0])
        reads.append(directions[1])
    dtype = torch.promote_types(writes[0].dtype, torch.float32)
    rounding = 1e-13 if dtype == torch.float64 else 1e-6
    span = _span(torch.cat(writes).double(), rounding)
    more = _span(torch.cat(reads).double(), rounding, span)
    return Taken(span.to(dtype), more.to(dtype))


def _span(rows: Tensor, rounding: float, beside: Tensor | None = None) -> Tensor:
    """Orthonormal rows (k, d) that span the part of fp64 rows (r, d) orthogonal to `beside`; singular values below
    `rounding` (of a row's own length) are none."""
    length = rows.norm(dim=1, keepdim=True)
    unit = rows[length.squeeze(1) > 0] / length[length.squeeze(1) > 0]
    if beside is not None:
        for _ in range(2):
            unit = unit - (unit @ beside.mT) @ beside
    _, size, right = torch.linalg.svd(unit, full_matrices=False)
    found = right[size > rounding]
    if beside is not None and found.shape[0]:
        found = found - (found @ beside.mT) @ beside
        found = torch.linalg.qr(found.mT)[0].mT
    return found.contiguous()


def without(matrix: Tensor, basis: Tensor) -> Tensor:
    """The rows of matrix (r, d) with their part in the span of the orthonormal rows of basis (k, d) taken away."""
    basis = basis.to(matrix.dtype)
    for _ in range(2):  # once leaves the rounding of what was taken away
        matrix = matrix - (matrix @ basis.mT) @ basis
    return matrix


class _OutOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor, basis: Tensor) -> Tensor:
        ctx.save_for_backward(basis)
        return matrix.clone()  # the parameter may be rewritten in place before the backward

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (basis,) = ctx.saved_tensors
        return without(grad, basis), None


def at_complement(matrix: Tensor, basis: Tensor) -> Tensor:
    """The matrix itself, whose rows are orthogonal to those of basis already, with the gradient of `without`."""
    return _OutOf.apply(matrix, basis)  # type: ignore[no-untyped-call,no-any-return]
