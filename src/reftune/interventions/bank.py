"""Several interventions as one batched computation: of one adapter at a site, or of the adapters of a batch's rows.

With up, down (A, r, d), offset (A, 1, r) and h (A, n, d), A the interventions and n the tokens that each of them edits:

    Δ(h) = D⊙h + f(h downᵀ + offset) up          two batched matrix products, whatever A is

    bank = Bank.of([first, second])      # None where the kind has no such form: then edit one by one
    bank(h)                              # h + Δ(h), (A, n, d)

Smaller ranks are filled up with rows of zeros, which add exactly nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Intervention
from .lowrank import (
    ConsreftIntervention,
    DireftIntervention,
    LobireftIntervention,
    LoreftIntervention,
    NodireftIntervention,
    NoreftIntervention,
)
from .other import PostBlockIntervention, RedIntervention
from .steps import Steps

_REPLACE = (LoreftIntervention, NoreftIntervention)
_ADD = (DireftIntervention, NodireftIntervention)
_KINDS = (*_REPLACE, *_ADD, ConsreftIntervention, LobireftIntervention, PostBlockIntervention, RedIntervention)


def bank_key(intervention: Intervention) -> Any:
    """What interventions must share to be in one bank; None for one that fits in none.

    LoReFT with an act_fn reads h twice, ReFT-r1 couples tokens, and what a kind of one's own does is not known.
    """
    cls = type(intervention)
    if cls not in _KINDS or (cls in _REPLACE and intervention.act_fn is not None):
        return None
    function = "silu" if cls is PostBlockIntervention else intervention.act_fn
    device = next(intervention.parameters()).device  # not state_dict(): FSDP2 takes its weights away when asked for it
    return cls is RedIntervention, function, intervention.embed_dim, device


def plain_weights(intervention: Intervention) -> bool:
    """Whether its weights are its own parameters, whole: not pieces, nor tensors given in their place for a call."""
    weights = [p for p in intervention._parameters.values() if p is not None]
    return bool(weights) and all(type(p) is torch.nn.Parameter and type(p.data) is Tensor for p in weights)


class Bank:
    """The edits of A interventions with equal `bank_key`, computed together; their weights are copied once.

    What is written to a weight through `.data` leaves no trace: call `model.eval()` after it, which drops the copies.
    """

    @torch.no_grad()
    def __init__(self, interventions: Sequence[Intervention]) -> None:
        first = interventions[0]
        self._step = Steps.last
        self.width = first.embed_dim
        self._function: Callable[[Tensor], Tensor] | None = first._activation
        self._diagonal = isinstance(first, RedIntervention)
        if self._diagonal:
            scale = torch.stack([module.s - 1 for module in interventions]).unsqueeze(1)  # type: ignore[misc,operator]
            constant = _stack([_bias(module, module.embed_dim) for module in interventions]).unsqueeze(1)
            self._stacked = (constant, scale, scale)
        else:
            if isinstance(first, PostBlockIntervention):
                self._function = torch.nn.functional.silu
            parts = [_parts(module) for module in interventions]
            up, down, offset = (_stack([part[i] for part in parts]) for i in range(3))
            self._stacked = (offset.unsqueeze(1), down.mT, up)
        self._weights: dict[torch.dtype, list[Tensor]] = {}  # the same, for an h of this dtype
        # Last, for reading the rows may have put them right. The memory is kept, so that it cannot become another's.
        self._source = [
            (table, name, value, value.data_ptr(), value.detach(), None if value.is_inference() else value._version)
            for module in interventions
            for table in (module._parameters, module._buffers)
            for name, value in table.items()
            if value is not None
        ]

    @classmethod
    def of(cls, interventions: Sequence[Intervention]) -> "Bank | None":
        """A bank of them, or None if they do not share one form."""
        keys = {bank_key(module) for module in interventions}
        return None if len(keys) != 1 or None in keys else cls(interventions)

    def is_current(self) -> bool:
        """Whether the interventions still have these weights, and nothing can have been written to them since."""
        if self._step is not Steps.last:
            return False
        try:
            for table, name, value, address, _, version in self._source:
                if table.get(name) is not value or value._version != version or value.data_ptr() != address:
                    return False
        except RuntimeError:  # an inference tensor counts no versions
            return False
        return True

    def __call__(self, h: Tensor) -> Tensor:
        """h + Δ(h), (A, n, d) → (A, n, d), computed in fp32 or wider and returned in the dtype of h."""
        if torch.is_autocast_enabled(h.device.type):
            with torch.autocast(device_type=h.device.type, enabled=False):
                return self.plainly(h)
        return self.plainly(h)

    def plainly(self, h: Tensor) -> Tensor:
        """The same, where autocast is known to be off."""
        weights = self._weights.get(h.dtype)
        if weights is None:
            wide = torch.promote_types(h.dtype, torch.float32)
            weights = self._weights[h.dtype] = [weight.to(wide) for weight in self._stacked]
        if weights[0].dtype is h.dtype:
            return self._edited(h, *weights)
        return self._edited(h.to(weights[0].dtype), *weights).to(h.dtype)

    def _edited(self, h: Tensor, offset: Tensor, down: Tensor, up: Tensor) -> Tensor:
        if self._diagonal:
            return h + torch.addcmul(offset, down, h)
        source = torch.baddbmm(offset, h, down)
        return torch.baddbmm(h, source if self._function is None else self._function(source), up)


def _parts(module: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(up, down, offset) of one intervention: (r, d), (r, d), (r,)."""
    if isinstance(module, PostBlockIntervention):
        return module.W_up, module.W_down, module.W_down.new_zeros(module.W_down.shape[0])
    rows = module.rows()
    if isinstance(module, _REPLACE):
        return rows, module.W - rows, _bias(module, len(rows))
    if isinstance(module, _ADD):
        return rows, module.W, _bias(module, len(rows))
    if isinstance(module, ConsreftIntervention):
        return rows, -rows, _bias(module, len(rows))
    return rows, torch.zeros_like(rows), _bias(module, len(rows))


def _bias(module: Any, length: int) -> Tensor:
    b: Tensor | None = module.b
    return next(module.parameters()).new_zeros(length) if b is None else b


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """(A, r, ...), the shorter ones filled up with zeros."""
    longest = max(len(tensor) for tensor in tensors)
    if all(len(tensor) == longest for tensor in tensors):
        return torch.stack(list(tensors))
    stacked = tensors[0].new_zeros(len(tensors), longest, *tensors[0].shape[1:])
    for place, tensor in zip(stacked, tensors, strict=True):
        place[: len(tensor)] = tensor
    return stacked
