"""Rows of several tasks that are orthonormal as a whole, put right so that no task pays for another.

A QR takes rows in order: what the first task does bends the rows of the second. Here

    1. rows that nothing has moved since the last time (or only scaled, as weight decay does) and rows of frozen tasks
       stay bit for bit;
    2. rows that have moved are projected onto the complement of those;
    3. and are then replaced by their polar factor (M Mᵀ)^(−1/2) M, the nearest orthonormal rows, which treats all of
       them alike: the result does not depend on the order in which the tasks are named.

The gradient that goes with it holds the other tasks fixed: `rows_at_manifold(R, beside=others, symmetric=True)`.
"""

import torch
from torch import Tensor

from .orthogonal import are_orthonormal, may_ask


@torch.no_grad()
def rows_together(rows: Tensor, last: Tensor, frozen: Tensor, fixed: Tensor | None = None) -> Tensor:
    """Orthonormal rows for n sites at once, (n, r, d) → (n, r, d), fp32 or fp64.

    Args:
        rows: the rows as the optimiser left them.
        last: (n, r, d), what this function returned last time; zeros where there is no last time.
        frozen: (r,) bool, rows that must stay as they are.
        fixed: (n, k, d) orthonormal rows that all of them must be orthogonal to, or None.
    """
    good = are_orthonormal(rows, fixed)
    if may_ask(rows.device) and bool(good.all()):
        return rows
    still = _only_scaled(rows, last)
    kept = frozen.view(1, -1, 1) | still
    keep = torch.where(kept, torch.where(frozen.view(1, -1, 1), rows, last), 0)
    # Site by site: a batched product may round otherwise than a single one, and a saved adapter is put right alone.
    fixed_of = [None] * len(rows) if fixed is None else list(fixed)
    moved = [
        _away(torch.where(k, 0, new), [old] if f is None else [old, f]) + old
        for new, k, old, f in zip(rows, kept, keep, fixed_of, strict=True)
    ]
    stacked = torch.stack(moved)
    count = 0 if fixed is None else fixed.shape[1]
    q, t = torch.linalg.qr((stacked if fixed is None else torch.cat([fixed, stacked], dim=1)).mT)
    left, _, right = torch.linalg.svd(t[:, count:, count:])
    polar = torch.stack([(a @ (u @ v)).mT for a, u, v in zip(q[:, :, count:], left, right, strict=True)])
    return torch.where(good, rows, torch.where(kept, keep, polar))


def _only_scaled(rows: Tensor, last: Tensor) -> Tensor:
    """Which rows (n, r, 1) are those of last time up to a positive factor and rounding."""
    scale = (rows * last).sum(-1, keepdim=True)
    rounding = 8 * torch.finfo(rows.dtype).eps
    near = (rows - scale * last).abs() <= rounding * scale.abs() * (last.abs() + rounding)
    return near.all(-1, keepdim=True) & (scale > 0)


def _away(rows: Tensor, others: list[Tensor]) -> Tensor:
    """The part of rows (r, d) orthogonal to the others, which are orthonormal (or zero)."""
    for _ in range(2):  # once leaves an error as large as the rounding of what was taken away
        for other in others:
            rows = rows - (rows @ other.mT) @ other
    return rows
