"""`ReftLayer`: the interventions of one site, a child module of the module whose hidden states it edits.

    h (B, L, d) → rows of each (adapter, group) → edited rows → h

The keys of a saved adapter read like `…layers.15.edit_output.reft_f2.R`.
"""

import functools
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..interventions import Intervention, retract_all
from .batch import Batch
from .mix import Mix
from .routing import Together, call, edit_routed, replace_rows, turns
from .session import Session


@functools.cache
def shared(value: Any) -> Any:
    """The value, one object for all adapters that have an equal one: thousands may be resident."""
    return value


class ReftLayer(nn.Module, BaseTunerLayer):
    """Edits hidden states (B, L, d) at the tokens the session's batch names; other tokens stay as they are."""

    adapter_layer_names: tuple[str, ...] = ()  # grows by one ModuleDict "reft_<group>" with each new group
    other_param_names: tuple[str, ...] = ("groups",)

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session
        self.groups: dict[str, tuple[tuple[str, str], ...]] = {}  # adapter → [(positions, group)], in order
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.merged_adapters: list[str] = []
        self.routes: Any = None  # of the last mixed batch: its adapters and their steps
        self.turns: Any = None  # of the last batch with one set of adapters for all rows: they, their turns and banks

    def update_layer(self, adapter_name: str, positions: str, interventions: dict[str, Intervention]) -> None:
        """Give the adapter one intervention for each group of terms of `positions`."""
        self.routes = self.turns = None
        if self not in self.session.layers:
            self.session.layers.append(self)
        for group, intervention in interventions.items():
            attribute = f"reft_{group}"
            if attribute not in self.adapter_layer_names:
                setattr(self, attribute, nn.ModuleDict())
                self.adapter_layer_names = (*self.adapter_layer_names, attribute)
            if adapter_name in getattr(self, attribute):
                raise ValueError(f"Adapter {adapter_name!r} names the same site and positions twice: {group!r}.")
            getattr(self, attribute)[adapter_name] = intervention
            self.groups[adapter_name] = shared((*self.groups.get(adapter_name, ()), (positions, group)))

    def interventions(self, adapter_name: str) -> list[Intervention]:
        """The adapter's interventions at this site."""
        groups: tuple[tuple[str, str], ...] = self.groups.get(adapter_name, ())
        return [getattr(self, f"reft_{group}")[adapter_name] for _, group in groups]

    def forward(self, hidden: Tensor) -> Tensor:
        if self._disable_adapters:
            return hidden
        batch = self.session.state.batch
        if batch is None:
            if not self.session.editing:
                return hidden
            raise RuntimeError(
                "A block with a ReFT adapter ran outside a forward pass of its model, so its positions cannot be "
                "told. Call the model, or disable the adapter around this call (model.disable_adapter()). In a "
                "backward pass: the block is recomputed by a checkpointing around it, torch's checkpoint_wrapper or "
                "FSDP's activation_checkpointing; use the model's own, gradient_checkpointing_enable()."
            )
        if batch.nothing:
            return hidden
        if batch.adapter_names is not None:
            return edit_routed(self, hidden, batch)
        return self._edit(hidden, batch) if batch.mix is None else self._edit_mixed(hidden, batch, batch.mix)

    def _edit(self, hidden: Tensor, batch: Batch) -> Tensor:
        found = self.turns  # once: another thread may put its own there, or none
        if found is None or found[0] != self._active_adapter:
            names = self._active_adapter
            names = names if isinstance(names, str) else list(names)
            found = self.turns = (names, turns(self, [names] if isinstance(names, str) else names), {})
        _, members, banks = found
        one_by_one = torch.compiler.is_compiling() or torch.is_grad_enabled()
        for turn in members:
            edited = None if one_by_one or len(turn) < 2 else self._edit_together(hidden, batch, turn, banks)
            hidden = self._edit_turn(hidden, batch, turn) if edited is None else edited
        return hidden

    def _edit_together(self, hidden: Tensor, batch: Batch, turn: Any, banks: dict[Any, Together]) -> Tensor | None:
        """hidden with the edits of a turn, in one computation; None where they must be called one by one."""
        found = batch.together(turn, hidden)
        if found is None:
            return None
        together = banks.get(turn)
        if together is None:
            tables = [(getattr(self, f"reft_{group}")._modules, adapter) for adapter, _, group in turn]
            together = banks[turn] = Together(tables)
        return together.replace(hidden, *found)

    def _edit_turn(self, hidden: Tensor, batch: Batch, turn: Any) -> Tensor:
        dense = torch.compiler.is_compiling()
        groups: Any = self._modules
        parts = []
        for adapter, positions, group in turn:
            intervention: Intervention = groups[f"reft_{group}"]._modules[adapter]
            if dense and not (intervention.couples_positions or intervention.needs_choice):
                hidden = batch.edit_masked(positions, group, hidden, intervention)
                continue
            rows = batch.rows(adapter, positions, group, hidden, intervention.couples_positions)
            if rows is not None:
                parts.append((rows, intervention))
            elif self.training and torch.is_grad_enabled():
                hidden = _keep_in_graph(hidden, intervention)
        return replace_rows(hidden, parts, batch) if parts else hidden

    def _edit_mixed(self, hidden: Tensor, batch: Batch, mix: Mix) -> Tensor:
        source = hidden if mix.how == "sum" else None
        for adapter, strength in mix.active().items():
            for positions, group in self.groups.get(adapter, ()):
                intervention: Intervention = getattr(self, f"reft_{group}")[adapter]
                rows = batch.rows(adapter, positions, group, hidden, intervention.couples_positions)
                if rows is not None:
                    flat = (hidden if source is None else source).reshape(-1, hidden.shape[-1])
                    selected = flat.index_select(0, rows.index)
                    edit = strength * call(intervention.edit, selected, rows, batch, hidden.shape[1])
                    added = hidden.reshape(flat.shape).index_add(0, rows.index, edit.to(hidden.dtype))
                    hidden = added.view_as(hidden)
                elif self.training and torch.is_grad_enabled():
                    hidden = _keep_in_graph(hidden, intervention)
        return hidden

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Train (or use, with `inference_mode`) these; only what was active and what becomes it is looked at."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        before: Any = self.active_adapters
        for name in dict.fromkeys([*before, *names]):
            for intervention in self.interventions(name):
                intervention.requires_grad_(name in names and not inference_mode)
        self._active_adapter = names
        self.session.active = names

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self.session.enabled = enabled

    def train(self, mode: bool = True) -> "ReftLayer":
        self.routes = self.turns = None  # the copies of weights that they hold may be old, see `Bank`
        trained = self.training and not mode
        super().train(mode)
        if trained:  # a compiled graph takes R as it stands, and the optimiser touched it last
            active: Any = self.active_adapters
            retract_all(module for name in active for module in self.interventions(name))
        return self

    def delete_adapter(self, adapter_name: str) -> None:
        self.routes = self.turns = None
        super().delete_adapter(adapter_name)
        for attribute in self.adapter_layer_names:
            if not len(getattr(self, attribute)):
                delattr(self, attribute)
        self.adapter_layer_names = tuple(a for a in self.adapter_layer_names if hasattr(self, a))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "routes": None, "turns": None}  # copies of weights are not copied with the model

    def _replicate_for_data_parallel(self) -> "ReftLayer":
        replica: ReftLayer = super()._replicate_for_data_parallel()
        replica.routes = replica.turns = None  # they hold interventions, and a replica has its own
        return replica

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """There is no base layer: adapters are made on the device of the module they edit and stay in fp32."""
        for intervention in self.interventions(adapter_name):
            if device is not None and not any(p.is_meta for p in intervention.parameters()):
                intervention.to(device)

    # PEFT's own exception for layers that cannot be merged in place, with what to do instead.
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError(
            "A ReFT adapter cannot be merged in place and taken out again. Use merge_and_unload(), which merges it "
            "into the weights where that is exact, or disable_adapter()."
        )

    def unmerge(self) -> None:
        raise NotImplementedError("A ReFT adapter is never merged in place, so there is nothing to unmerge.")

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def __repr__(self) -> str:
        edits = ", ".join(f"{a}: {p}" for a, groups in self.groups.items() for p in dict.fromkeys(g[0] for g in groups))
        return f"ReftLayer({edits})"


def _keep_in_graph(hidden: Tensor, intervention: Intervention) -> Tensor:
    """hidden as it is, with the parameters in its graph: a batch that edits nothing still has a (zero) gradient."""
    learned = [p for p in intervention.parameters() if p.requires_grad]
    return hidden + torch.stack([p.sum() * 0 for p in learned]).sum().to(hidden.dtype) if learned else hidden
