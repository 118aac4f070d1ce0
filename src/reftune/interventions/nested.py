"""Nested ranks (as in Matryoshka representations, arXiv 2205.13147): one adapter of rank r whose first k rows are a
good adapter of rank k, so that it can be loaded or shipped at any lower rank.

    ReftConfig(r=8, nested=True)          # each training pass uses the first k rows, k drawn from 1..8
    ReftConfig(r=8, nested=[1, 2, 4, 8])  # drawn from these

The edit of the first k rows depends on nothing of the others: a QR puts rows right in order, so what the later rows do
does not bend the earlier ones, and the gradient of a pass with k rows reaches only those.
"""

from collections.abc import Sequence
from typing import Any


def nested_ranks(nested: Any, rank: int | None, what: str = "The intervention") -> tuple[int, ...]:
    """The ranks to draw from, ascending; () for none. ValueError for ranks that are not between 1 and `rank`."""
    if nested is None or nested is False or nested in ((), []):
        return ()
    if rank is None:
        raise ValueError(f"{what} has no rank, so nested={nested!r} has no meaning for it.")
    if nested is True:
        return tuple(range(1, rank + 1))
    whole = isinstance(nested, Sequence) and all(isinstance(k, int) and not isinstance(k, bool) for k in nested)
    if not whole or not all(1 <= k <= rank for k in nested):
        raise ValueError(
            f"nested must be True or a list of ranks between 1 and r={rank}, such as [1, {rank}], but is {nested!r}."
        )
    return tuple(sorted(set(nested)))
