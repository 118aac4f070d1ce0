"""`Choice`: what one forward pass chooses for its interventions: the subspaces of each row, the rank of a nested one.

One object a pass: all sites draw the same rank, and a recomputation under gradient checkpointing draws it again.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

_ALL = ("all", "__all__")


class Choice:
    """The choices of one forward pass.

    Args:
        subspaces: None (every row uses all of them), one entry for the whole batch, or a list with an entry for each
            row. An entry is a name, a list of names, "a+b", "__base__" or [] (none), or None (all).
    """

    def __init__(self, subspaces: Any = None) -> None:
        self.per_row: list[frozenset[str] | None] | None = None
        self.for_all: frozenset[str] | None = None
        if isinstance(subspaces, str):
            self.for_all = _names(subspaces)
        elif isinstance(subspaces, Sequence):
            self.per_row = [_names(entry) for entry in subspaces]
        elif subspaces is not None:
            raise ValueError(
                'subspaces must be a name such as "a", or a list with one entry for each row of the batch (a name, a '
                f"list of names, or None for all), but is {subspaces!r}."
            )
        self._tables: dict[Any, Tensor] = {}
        self._ranks: dict[tuple[int, ...], int] = {}

    def check(self, known: Iterable[str], rows: int | None = None) -> None:
        """ValueError if a name is not among `known`, or if there are not as many entries as the batch has rows."""
        known = sorted(set(known))
        entries = self.per_row if self.per_row is not None else [self.for_all]
        for name in sorted({name for entry in entries for name in entry or ()}):
            if name not in known:
                has = f"The active adapters have {', '.join(known)}." if known else "No active adapter has subspaces."
                raise ValueError(f"There is no subspace {name!r}. {has}")
        if rows is not None and self.per_row is not None and len(self.per_row) != rows:
            raise ValueError(
                f"subspaces has {len(self.per_row)} entries, but the batch has {rows} rows: give one for each."
            )

    def whole(self, names: Sequence[str]) -> tuple[str, ...] | None:
        """Those of `names` that every row uses, in their order; None if the rows differ."""
        if self.per_row is not None:
            return None
        return tuple(name for name in names if self.for_all is None or name in self.for_all)

    def table(self, names: Sequence[str], device: torch.device) -> Tensor:
        """Which row uses which of `names`, bool (rows, len(names))."""
        key = (tuple(names), device)
        if key not in self._tables:
            entries = self.per_row or []
            chosen = [[entry is None or name in entry for name in names] for entry in entries]
            self._tables[key] = torch.tensor(chosen, dtype=torch.bool, device=device).view(len(entries), len(names))
        return self._tables[key]

    def rank(self, ranks: Sequence[int]) -> int:
        """One of `ranks`, drawn once a pass from torch's CPU generator, whose state a Trainer's checkpoint keeps."""
        key = tuple(ranks)
        if key not in self._ranks:
            self._ranks[key] = key[int(torch.randint(len(key), ()))]
        return self._ranks[key]


def _names(entry: Any) -> frozenset[str] | None:
    if entry is None or (isinstance(entry, str) and entry in _ALL):
        return None
    if isinstance(entry, str):
        return frozenset() if entry == "__base__" else frozenset(part.strip() for part in entry.split("+"))
    if isinstance(entry, Sequence) and all(isinstance(name, str) for name in entry):
        return frozenset(entry)
    raise ValueError(f"An entry of subspaces must be a name, a list of names or None, but is {entry!r}.")
