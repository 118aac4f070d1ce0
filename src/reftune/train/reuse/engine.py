"""`Reuse`: a padded batch in, the smaller batch with the same loss and gradients out.

    reuse = Reuse(model, store=MemoryStore())
    prepared = reuse.prepare(batch, keep=True)      # None: use the batch as it is
    with prepared.active():
        loss = model(**prepared.inputs).loss

ReftTrainer does this; a training loop of one's own can do the same.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...tuner.caches import cache_name
from .attention import packed
from .compute import Frozen, takes
from .fingerprint import entry_key, fingerprint, holders, versions
from .logits import only_rows
from .plan import LOGITS, Plan, base_of, block_modules, make_plan
from .prefix import head_cache
from .states import skip_blocks
from .store import MemoryStore, Store
from .window import NotReusableError, Row, lay_out, read_rows


@dataclass
class Prepared:
    """inputs: for the model. `active` is the context in which they are right."""

    inputs: dict[str, Any]
    _contexts: list[Callable[[], Any]]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Around the forward pass; the backward pass does not need it."""
        with ExitStack() as stack:
            for context in self._contexts:
                stack.enter_context(context())
            yield


class Reuse:
    """What a model's frozen base makes unnecessary, left out of its batches.

    Args:
        model: a PeftModel with a ReFT adapter.
        store: where kept states go; None keeps none.
        autocast: makes the context that the model's forward pass runs in, if any.
        say: takes messages for the user.
        select: False leaves all logits of the window to a loss that needs them.
        alone: compute what is kept of each example by itself, so that it is the same to the bit whatever batch it
            came in; a batch's examples together take less time (on a CPU 0.7 of it).
    """

    def __init__(
        self,
        model: Any,
        store: Store | None = None,
        autocast: Callable[[], Any] = nullcontext,
        say: Callable[[str], None] = print,
        select: bool = True,
        alone: bool = False,
    ) -> None:
        self.model, self.say, self.select, self.autocast = model, say, select, autocast
        self.alone = alone
        self.store = store if store is not None else MemoryStore(0)
        self.store.say = say
        self._plans: dict[Any, tuple[tuple[Any, ...], Plan]] = {}
        self._nothing: Plan | None = None
        self._frozen: Frozen | None = None
        self._versions: Any = None
        self._held: list[Any] | None = None
        self._said: set[str] = set()

    # -- what is reused -------------------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """The plan for the model as it stands."""
        session, base = base_of(self.model)
        if self._nothing is not None:
            return self._nothing
        if session is None:
            return make_plan(self.model)
        key = (tuple(session.names), session.enabled, base.training)
        # another adapter may come under the same name, and a base's weight be unfrozen between two steps
        seen = (self._base_learns(base), *(session.interventions.get(name) for name in session.names))
        before, plan = self._plans.get(key, ((), Plan()))
        if len(before) != len(seen) or any(old is not new for old, new in zip(before, seen, strict=True)):
            plan = make_plan(self.model)
            if plan.logits and not self.select:
                plan = replace(
                    plan, logits=False, why_not={LOGITS: "the trainer has a loss of its own", **plan.why_not}
                )
            self._plans[key] = seen, plan
        return plan

    def begin(self) -> None:
        """Look at the model again: to be called when a training or evaluation begins."""
        self._plans.clear()
        self._versions = self._held = None

    def forget(self, reason: str) -> None:
        """Reuse nothing from now on."""
        self._nothing = Plan(why_not={"anything": reason})

    def takes(self, inputs: Mapping[str, Any]) -> bool:
        """Whether `prepare` can do anything for such a batch; where not, it says why."""
        plan = self.plan
        try:
            return plan.anything and bool(read_rows(inputs, plan.positions, plan.split, plan.logits))
        except NotReusableError as error:
            self._once(f"Reuse: this batch is computed whole, because {error}.")
            return False

    # -- a batch --------------------------------------------------------------------------------------------------

    def prepare(self, inputs: Mapping[str, Any], keep: bool) -> Prepared | None:
        """The batch without what need not be computed, or None if there is nothing to leave out.

        Args:
            inputs: (B, L) tensors from a collator: input_ids and labels, and any of attention_mask, prompt_mask and
                position_ids.
            keep: whether the rows will come again, so that keeping their states pays.
        """
        plan = self.plan
        if not plan.anything:
            return None
        try:
            rows = read_rows(inputs, plan.positions, plan.split, plan.logits)
            return self._prepared(inputs, rows, plan, keep)
        except NotReusableError as error:
            self._once(f"Reuse: this batch is computed whole, because {error}.")
            return None

    def _prepared(self, inputs: Mapping[str, Any], rows: Sequence[Row], plan: Plan, keep: bool) -> Prepared:
        session, base = base_of(self.model)
        depth = plan.depth if keep else 0
        device = inputs["input_ids"].device
        pad = getattr(base.config, "pad_token_id", None)
        window = lay_out(rows, pad if isinstance(pad, int) and pad > 0 else 0, device)
        contexts: list[Callable[[], Any]] = []
        call = {k: v for k, v in inputs.items() if not isinstance(v, Tensor)}
        call |= {"input_ids": window.input_ids, "attention_mask": window.attention_mask}
        call |= {"prompt_mask": window.prompt_mask, "labels": window.targets if plan.logits else window.labels}
        if takes(base, "position_ids"):
            call["position_ids"] = window.position_ids
        if takes(base, "use_cache"):
            call["use_cache"] = False
        if depth or window.past:
            frozen = self._base(base, session)
            heads, states = self._kept(frozen, rows, depth, keep)
            if window.past:
                heads = [{name: tensor.to(device) for name, tensor in entry.items()} for entry in heads]
                call[str(cache_name(base))] = head_cache(heads, [row.start for row in rows], len(frozen.blocks))
                contexts.append(lambda: packed(frozen.attention))
            if depth:
                width = window.input_ids.shape[1]
                state = _stacked(states, width, _device(frozen.blocks[depth - 1], device))
                contexts.append(lambda: skip_blocks(frozen.blocks[:depth], state, frozen.as_tuple))
        if plan.logits:
            head = base.get_output_embeddings()
            contexts.append(lambda: only_rows(head, window.rows))
        return Prepared(call, contexts)

    # -- what is kept ---------------------------------------------------------------------------------------------

    def _kept(
        self, frozen: Frozen, rows: Sequence[Row], depth: int, keep: bool
    ) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
        """Heads and window states of the rows, from the store or computed now."""
        heads: list[dict[str, Tensor] | None] = [None if row.start else {} for row in rows]
        states: list[Tensor | None] = [None] * len(rows)
        if keep:
            self._open(frozen)
            for i, row in enumerate(rows):
                if row.start:
                    heads[i] = self.store.get(_head_key(row, depth))
                if depth:
                    states[i] = (self.store.get(_state_key(row, depth)) or {}).get("state")
        missing = [i for i in range(len(rows)) if heads[i] is None or (depth and states[i] is None)]
        self.store.computed += len(missing)
        self.store.found += len(rows) - len(missing)
        for group in [[i] for i in missing] if keep and self.alone else [missing] if missing else []:
            need_heads = any(heads[i] is None for i in group)
            need_states = bool(depth) and any(states[i] is None for i in group)
            found, outputs = frozen.compute([rows[i] for i in group], depth, need_heads, need_states)
            for place, i in enumerate(group):
                if heads[i] is None:
                    heads[i] = found[place]
                    if keep:
                        self.store.put(_head_key(rows[i], depth), found[place])
                if depth and states[i] is None:
                    states[i] = outputs[place]
                    if keep:
                        self.store.put(_state_key(rows[i], depth), {"state": outputs[place]})
        return heads, states  # type: ignore[return-value]

    def _open(self, frozen: Frozen) -> None:
        """Make sure that the store's entries belong to the base as it is now."""
        now = versions(self._holders(frozen.base))
        if now == self._versions:
            return
        with self.autocast():
            kind = next(frozen.base.parameters()).device.type
            autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        try:
            self.store.open(fingerprint(frozen.base, autocast))
        except (TypeError, RuntimeError, NotImplementedError) as error:
            self._once(f"Reuse: the base weights cannot be read ({error}), so nothing is kept from before.")
            self.store = MemoryStore(self.store.budget)
            self.store.say = self.say
        self._versions = now

    def _holders(self, base: Any) -> list[Any]:
        if self._held is None:
            self._held = holders(base)
        return self._held

    def _base_learns(self, base: Any) -> bool:
        return any(t is not None and t.requires_grad for held in self._holders(base) for t in held.values())

    def _base(self, base: Any, session: Any) -> Frozen:
        if self._frozen is None or self._frozen.base is not base:
            self._frozen = Frozen(base, session, block_modules(base), self.autocast)
        return self._frozen

    def _once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.say(text)


def _head_key(row: Row, depth: int) -> str:
    return entry_key("head", depth, row.head)


def _state_key(row: Row, depth: int) -> str:
    return entry_key("state", depth, row.head, row.ids[row.start : row.end])


def _stacked(states: Sequence[Tensor], width: int, device: torch.device) -> Tensor:
    """(n, d) each → (B, width, d) on the device; some may lie elsewhere than others."""
    where = {state.device for state in states}
    states = states if len(where) == 1 else [state.to(device) for state in states]
    return torch.stack([torch.nn.functional.pad(s, (0, 0, 0, width - s.shape[0])) for s in states]).to(device)


def _device(module: Any, default: Any) -> Any:
    parameter = next(module.parameters(), None)
    return default if parameter is None else parameter.device
