"""A batch whose rows have adapters of their own: every row edited by its adapter, in one batched computation a site.

    hidden (B, L, d) → the edited tokens, sorted by adapter (A, n, d) → + Δ of a bank → hidden

Adapters that edit the same positions with interventions of one form share a bank, whatever their ranks. Others, and an
adapter's second intervention at a site, take a further step. The result equals that of each row alone.

Where all rows have the same adapters, their interventions come in `turns`: those that share no token, together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..interventions.bank import Bank, bank_key, only_weights, plain_weights
from ..positions.overlap import TokenSet

if TYPE_CHECKING:
    from .batch import Batch, Rows, Slots
    from .layer import ReftLayer


@dataclass
class Step:
    """Interventions that run together: one for each of `adapters`, all for the same group of terms."""

    positions: str
    group: str
    adapters: tuple[str, ...]
    interventions: list[Any]
    bank: Bank | None = None

    def edit(self, rows: Tensor, slots: "Slots") -> Tensor:
        """The sorted rows (N, d), edited."""
        if self.bank is None or not self.bank.is_current():
            self.bank = Bank.of(self.interventions)
        assert self.bank is not None
        if slots.pad is None or slots.take is None:
            return self.bank(rows.view(len(self.adapters), -1, rows.shape[-1])).view(rows.shape)
        return self.bank(rows[slots.pad]).flatten(0, 1)[slots.take]


def plan(layer: "ReftLayer", adapters: Sequence[str]) -> list[Step]:
    """The steps of a site for a batch with these adapters."""
    steps: list[Step] = []
    for turn in range(max((len(layer.groups.get(name, ())) for name in adapters), default=0)):
        together: dict[Any, list[tuple[str, Any]]] = {}
        for name in adapters:
            if turn < len(layer.groups.get(name, ())):
                positions, group = layer.groups[name][turn]
                intervention = getattr(layer, f"reft_{group}")[name]
                key = bank_key(intervention)
                together.setdefault((positions, group, key, name if key is None else None), []).append(
                    (name, intervention)
                )
        for (positions, group, *_), members in together.items():
            steps.append(Step(positions, group, tuple(n for n, _ in members), [m for _, m in members]))
    return steps


def turns(layer: "ReftLayer", adapters: Sequence[str]) -> list[list[tuple[str, str, str]]]:
    """What edits a site for all rows, (adapter, positions, group) in order; those of one turn share no token, so that
    each sees the same states as if they came one after another. Names, not modules: a replica has its own."""
    found: list[list[tuple[str, str, str]]] = []
    for adapter in dict.fromkeys(adapters):
        for positions, group in layer.groups.get(adapter, ()):
            tokens = TokenSet.of(group, positions)
            apart = found and all(tokens.disjoint(TokenSet.of(g, p)) for _, p, g in found[-1])
            if not apart:
                found.append([])
            found[-1].append((adapter, positions, group))
    return found


def replace_rows(
    hidden: Tensor, parts: Sequence[tuple["Rows", Any]], batch: "Batch", banks: dict[Any, Any] | None = None
) -> Tensor:
    """The rows of hidden (B, L, d) replaced by their edits, in a new tensor: one gathering and one copy for all.

    With `banks`, which keeps them from call to call, also one computation where the interventions have one form.
    """
    flat, columns = hidden.reshape(-1, hidden.shape[-1]), hidden.shape[1]
    if len(parts) > 1:
        index, counts = batch.joined([rows for rows, _ in parts])
        selected = flat.index_select(0, index)
        bank = None if banks is None or min(counts) < max(counts) else _bank(banks, [one for _, one in parts])
        if bank is not None:
            edited = bank(selected.view(len(parts), -1, flat.shape[1])).view_as(selected)
            return flat.index_copy(0, index, edited).view_as(hidden)
        chosen = selected.split(counts)
        edits = [call(one, h, rows, batch, columns) for h, (rows, one) in zip(chosen, parts, strict=True)]
        return flat.index_copy(0, index, torch.cat(edits)).view_as(hidden)
    rows, intervention = parts[0]
    whole = rows.index.numel() == flat.shape[0]
    edited = call(intervention, flat if whole else flat.index_select(0, rows.index), rows, batch, columns)
    return (edited if whole else flat.index_copy(0, rows.index, edited)).view_as(hidden)


def _bank(banks: dict[Any, Any], interventions: list[Any]) -> Bank | None:
    """The bank of these interventions, if they fit in one and need not be called one by one."""
    if not all(map(only_weights, interventions)):
        return None
    key = tuple(map(id, interventions))
    _, bank = banks.get(key, (None, None))
    if bank is None or (isinstance(bank, Bank) and not bank.is_current()):
        plain = all(map(plain_weights, interventions))
        bank = (Bank.of(interventions) if plain else None) or "none fits"
        banks[key] = (interventions, bank)  # they are kept, so that their ids stay theirs
    return bank if isinstance(bank, Bank) else None


def call(method: Any, h: Tensor, rows: "Rows", batch: "Batch", columns: int) -> Tensor:
    """An intervention, or its `edit`, called with what it wants to know of its rows h (N, d)."""
    intervention = getattr(method, "__self__", method)
    more = {"rows": rows.index // columns, "choice": batch.choice} if intervention.needs_choice else {}
    edited: Tensor = method(h, rows.segments, **more)
    return edited


def edit_routed(layer: "ReftLayer", hidden: Tensor, batch: "Batch") -> Tensor:
    """hidden (B, L, d) with each row edited by the adapter that `batch.adapter_names` names for it."""
    adapters = batch.adapters
    if layer.routes is None or layer.routes[0] != adapters:
        layer.routes = (adapters, plan(layer, adapters))
    for step in layer.routes[1]:
        if len(step.adapters) == 1 or torch.is_grad_enabled():  # a bank's weights have no gradient
            for name, intervention in zip(step.adapters, step.interventions, strict=True):
                rows = batch.rows(name, step.positions, step.group, hidden, intervention.couples_positions)
                if rows is not None:
                    hidden = replace_rows(hidden, [(rows, intervention)], batch)
            continue
        slots = batch.slots(step.adapters, step.positions, step.group, hidden)
        if slots is None:
            continue
        flat = hidden.reshape(-1, hidden.shape[-1])
        selected = flat.index_select(0, slots.index)
        hidden = flat.index_copy(0, slots.index, step.edit(selected, slots)).view_as(hidden)
    return hidden
