"""The low-rank family of the ReFT paper (Wu et al. 2024, arXiv 2404.03592, section 3.2 and appendix) and pyreft.

With R, W: r×d and b: r, and f = act_fn or the identity:

    LoReFT    h + Rᵀ(f(Wh + b) − Rh)   R Rᵀ = I   the paper's eq. 2
    NoReFT    h + Rᵀ(f(Wh + b) − Rh)   R free     pyreft
    ConsReFT  h + Rᵀ(b − Rh)           R Rᵀ = I   pyreft: the source is a constant
    LobiReFT  h + Rᵀb                  R Rᵀ = I   pyreft: a bias in the subspace
    DiReFT    h + Rᵀ f(Wh + b)         R Rᵀ = I   pyreft's DiReFT
    NodiReFT  h + Rᵀ f(Wh + b)         R free     pyreft's name; *the paper's DiReFT* (eq. 3, W₂ = R, W₁ = W)

`R` of LoReFT costs one batched factorisation a training step (see `orthogonal`), nothing at inference.
"""

import math
import warnings

import torch
from torch import Tensor, nn

from .base import register_intervention
from .rows import LowRankIntervention as LowRankIntervention


class _Sourced(LowRankIntervention):
    """A kind with the learned source f(Wh + b)."""

    def _linear(self) -> tuple[Tensor, Tensor]:
        """W and b as `nn.Linear` starts them, which is how pyreft starts its learned source."""
        r, d = self._shape()
        bound = 1 / math.sqrt(d)
        return torch.empty(r, d).uniform_(-bound, bound), torch.empty(r).uniform_(-bound, bound)

    def _not_identity(self) -> None:
        if self.init_weights:
            warnings.warn(
                f"{type(self).__name__} with act_fn={self.act_fn!r} has no start that leaves h as it is and learns, so "
                "the edit is not zero at step 0: it starts as pyreft does. Pass init_weights=False to say so yourself.",
                UserWarning,
                stacklevel=5,
            )

    def _source(self, h: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        source = nn.functional.linear(h, w, b)
        return source if self._activation is None else self._activation(source)


class _Replace(_Sourced):
    """h + Rᵀ(f(Wh + b) − Rh): the subspace is replaced by the learned source."""

    def reset_parameters(self) -> None:
        self._make_rows()
        w, b = self._linear()
        if self._activation is not None:
            self._not_identity()
        elif self.init_weights:
            w, b = self.R.detach().clone(), torch.zeros_like(b)
        self.W = nn.Parameter(w)
        self._register_bias(b)

    def delta(self, h: Tensor, segments: Tensor | None = None) -> Tensor:
        rows, w, b = self.tensors(h)
        if self._activation is None:  # Wh − Rh = (W − R)h, folded once: exactly zero where W = R
            return nn.functional.linear(h, w - rows, b) @ rows
        return (self._source(h, w, b) - nn.functional.linear(h, rows)) @ rows

    def directions(self) -> tuple[Tensor, Tensor]:
        rows = self.rows().detach()
        return rows, torch.cat([rows, self.W.detach().to(rows.dtype)])


@register_intervention("loreft")
class LoreftIntervention(_Replace):
    """LoReFT, h + Rᵀ(Wh + b − Rh) with R Rᵀ = I (eq. 2). 2rd + r numbers; starts at W = R, b = 0, so Δ = 0."""

    orthonormal = True


@register_intervention("noreft")
class NoreftIntervention(_Replace):
    """NoReFT: LoReFT's formula with R unconstrained (pyreft). 2rd + r numbers."""


class _Add(_Sourced):
    """h + Rᵀ f(Wh + b): the learned source is added."""

    def reset_parameters(self) -> None:
        self._make_rows()
        w, b = self._linear()
        if self.act_fn in ("sigmoid", "softplus", "relu"):  # f(0) ≠ 0, and relu has no gradient at 0
            self._not_identity()
        elif self.init_weights:
            w, b = torch.zeros_like(w), torch.zeros_like(b)
        self.W = nn.Parameter(w)
        self._register_bias(b)

    def delta(self, h: Tensor, segments: Tensor | None = None) -> Tensor:
        rows, w, b = self.tensors(h)
        return self._source(h, w, b) @ rows

    def directions(self) -> tuple[Tensor, Tensor]:
        rows = self.rows().detach()
        return rows, self.W.detach().to(rows.dtype)


@register_intervention("direft")
class DireftIntervention(_Add):
    """pyreft's DiReFT, h + Rᵀ(Wh + b) with R Rᵀ = I. The paper's DiReFT is `NodireftIntervention`."""

    orthonormal = True


@register_intervention("nodireft")
class NodireftIntervention(_Add):
    """NodiReFT, h + W₂ᵀ(W₁h + b) with nothing constrained: *the paper's DiReFT* (eq. 3). W₂ = R, W₁ = W.

    Starts at R = 0, so that what is written is learned from the first step on, and W random: Δ = 0 with any act_fn.
    From W = 0 only the reads would be learned at first, into r random directions (`docs/log.md` has both).
    """

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.init_weights:
            self.W.data.copy_(self._linear()[0])
            self.R.data.zero_()

    def _not_identity(self) -> None:
        """It is: R = 0 writes nothing, whatever the source."""


class _Constant(LowRankIntervention):
    """The source is a constant b (r,): a bias is all there is, so `bias="none"` makes no sense here."""

    def reset_parameters(self) -> None:
        if self.bias_mode == "none":
            raise ValueError(f'{type(self).__name__} learns nothing but b: use bias="learned" (or "frozen").')
        if self._activation is not None:
            raise ValueError(f"{type(self).__name__} has a constant source: act_fn={self.act_fn!r} has no place in it.")
        self._make_rows()
        self._register_bias(self._start())

    def _start(self) -> Tensor:
        return torch.rand(self._shape()[0])


@register_intervention("consreft")
class ConsreftIntervention(_Constant):
    """ConsReFT, h + Rᵀ(b − Rh): the subspace becomes the constant b (pyreft). No b leaves h as it is, so Δ ≠ 0 at
    step 0 whatever `init_weights` says. rd + r numbers."""

    orthonormal = True

    def delta(self, h: Tensor, segments: Tensor | None = None) -> Tensor:
        rows, _, b = self.tensors(h)
        return (b - nn.functional.linear(h, rows)) @ rows

    def directions(self) -> tuple[Tensor, Tensor]:
        rows = self.rows().detach()
        return rows, rows


@register_intervention("lobireft")
class LobireftIntervention(_Constant):
    """LobiReFT, h + Rᵀb: a low-rank bias, the same for every h (pyreft). rd + r numbers."""

    orthonormal = True

    def _start(self) -> Tensor:
        if not self.init_weights:
            return super()._start()
        if self.bias_mode == "frozen":
            raise ValueError('A frozen b = 0 never edits anything: use bias="learned", or init_weights=False.')
        return torch.zeros(self._shape()[0])

    def delta(self, h: Tensor, segments: Tensor | None = None) -> Tensor:
        rows, _, b = self.tensors(h)
        edit: Tensor = b @ rows
        return edit.expand_as(h)

    def directions(self) -> tuple[Tensor, Tensor]:
        rows = self.rows().detach()
        return rows, rows[:0]
