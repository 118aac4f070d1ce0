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

from ..interventions.bank import Bank, bank_key, plain_weights
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


def turns(layer: "ReftLayer", adapters: Sequence[str]) -> list[tuple[tuple[str, str, str], ...]]:
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
    return [tuple(turn) for turn in found]


def replace_rows(hidden: Tensor, parts: Sequence[tuple["Rows", Any]], batch: "Batch") -> Tensor:
    """The rows of hidden (B, L, d) replaced by their edits, in a new tensor: one gathering and one copy for all."""
    flat, columns = hidden.reshape(-1, hidden.shape[-1]), hidden.shape[1]
    if len(parts) > 1:
        index, counts = batch.joined([rows for rows, _ in parts])
        chosen = flat.index_select(0, index).split(counts)
        edits = [call(one, h, rows, batch, columns) for h, (rows, one) in zip(chosen, parts, strict=True)]
        return flat.index_copy(0, index, torch.cat(edits)).view_as(hidden)
    rows, intervention = parts[0]
    whole = rows.index.numel() == flat.shape[0]
    edited = call(intervention, flat if whole else flat.index_select(0, rows.index), rows, batch, columns)
    return (edited if whole else flat.index_copy(0, rows.index, edited)).view_as(hidden)


class Together:
    """The interventions of a turn as one bank, for as long as calling them would do nothing else.

    What a call costs a small model is mostly Python that is not in the processor's cache, so this is kept short.
    """

    def __init__(self, members: Sequence[tuple[dict[str, Any], str]]) -> None:
        self._members = [(table, adapter, table[adapter], table[adapter].__dict__) for table, adapter in members]
        self.bank: Bank | None = None
        self._formless = False  # they share no form, and will not

    @property
    def stands(self) -> bool:
        """Whether calling them does what their weights say and no more: no hook, no forward put before their own, no
        dropout, no weights that are gathered for the call (FSDP2 hooks into the state dict of what it gathers)."""
        for table, adapter, module, state in self._members:
            if table.get(adapter) is not module or state["training"] or "forward" in state or state.get("sharded"):
                return False
            if state.get("_forward_hooks") or state.get("_forward_pre_hooks") or state.get("_state_dict_pre_hooks"):
                return False  # .get: a lean module has no tables until it has a hook
        return True

    def _fit(self) -> Bank | None:
        """Their bank as they are now; None if they share no form."""
        modules = [module for _, _, module, _ in self._members]
        if not all(map(plain_weights, modules)):
            return None
        bank = Bank.of(modules)
        self._formless = bank is None
        return bank

    def replace(self, hidden: Tensor, index: Tensor, autocast: bool) -> Tensor | None:
        """The rows `index` (A·n,) of hidden (B, L, d) replaced by their edits, or None: then they must be called.

        autocast: whether it is on; to ask again at every site would take half as long as a product.
        """
        if self._formless or not self.stands:
            return None
        bank = self.bank
        if bank is None or not bank.is_current():
            bank = self.bank = self._fit()
            if bank is None:
                return None
        flat = hidden.flatten(0, 1)
        selected = flat.index_select(0, index).view(len(self._members), -1, bank.width)
        edited = bank(selected) if autocast else bank.plainly(selected)
        return flat.index_copy(0, index, edited.flatten(0, 1)).view_as(hidden)


def call(method: Any, h: Tensor, rows: "Rows", batch: "Batch", columns: int) -> Tensor:
    """An intervention, or its `edit`, called with what it wants to know of its rows h (N, d)."""
    intervention = getattr(method, "__self__", method)
    more = {"rows": rows.index // columns, "choice": batch.choice} if intervention.needs_choice else {}
    edited: Tensor = method(h, rows.segments, **more)
    return edited


def edit_routed(layer: "ReftLayer", hidden: Tensor, batch: "Batch") -> Tensor:
    """hidden (B, L, d) with each row edited by the adapter that `batch.adapter_names` names for it."""
    adapters = batch.adapters
    routes = layer.routes  # once: another thread may put its own there
    if routes is None or routes[0] != adapters:
        routes = layer.routes = (adapters, plan(layer, adapters))
    for step in routes[1]:
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
