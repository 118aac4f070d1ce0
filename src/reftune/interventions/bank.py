"""Several interventions as one batched computation, for a batch whose rows have adapters of their own.

With up, down (A, r, d), offset (A, 1, r) and h (A, n, d), A the adapters and n the tokens that each of them edits:

    Δ(h) = D⊙h + f(h downᵀ + offset) up          two batched matrix products, whatever A is

    bank = Bank.of([first, second])      # None where the kind has no such form: then edit one by one
    bank(h)                              # Δ, (A, n, d)

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
    device = next(iter(intervention.state_dict().values())).device
    return cls is RedIntervention, function, intervention.embed_dim, device


class Bank:
    """The edits of A interventions with equal `bank_key`, computed together; their weights are copied once."""

    @torch.no_grad()
    def __init__(self, interventions: Sequence[Intervention]) -> None:
        self._source = [p for module in interventions for p in (*module.parameters(), *module.buffers())]
        first = interventions[0]
        self._function: Callable[[Tensor], Tensor] | None = first._activation
        self._diagonal: Tensor | None = None
        if isinstance(first, RedIntervention):
            self._diagonal = torch.stack([module.s - 1 for module in interventions]).unsqueeze(1)  # type: ignore[misc,operator]
            self._constant = _stack([_bias(module, module.embed_dim) for module in interventions]).unsqueeze(1)
        else:
            if isinstance(first, PostBlockIntervention):
                self._function = torch.nn.functional.silu
            parts = [_parts(module) for module in interventions]
            self._up, self._down = _stack([up for up, _, _ in parts]), _stack([down for _, down, _ in parts])
            self._offset = _stack([offset for _, _, offset in parts]).unsqueeze(1)
        self._versions = self._now()  # last: reading the rows may have put them right

    @classmethod
    def of(cls, interventions: Sequence[Intervention]) -> "Bank | None":
        """A bank of them, or None if they do not share one form."""
        keys = {bank_key(module) for module in interventions}
        return None if len(keys) != 1 or None in keys else cls(interventions)

    def is_current(self) -> bool:
        """Whether no weight has been written to since."""
        return self._versions is not None and self._versions == self._now()

    def _now(self) -> list[tuple[int, int]] | None:
        if any(p.is_inference() for p in self._source):
            return None
        return [(p.data_ptr(), p._version) for p in self._source]

    def __call__(self, h: Tensor) -> Tensor:
        """Δ(h), (A, n, d) → (A, n, d), in fp32 or wider."""
        h = h.to(torch.promote_types(h.dtype, torch.float32))
        with torch.autocast(device_type=h.device.type, enabled=False):
            if self._diagonal is not None:
                return torch.addcmul(self._constant.to(h.dtype), self._diagonal.to(h.dtype), h)
            source = torch.baddbmm(self._offset.to(h.dtype), h, self._down.to(h.dtype).mT)
            if self._function is not None:
                source = self._function(source)
            return torch.bmm(source, self._up.to(h.dtype))


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
