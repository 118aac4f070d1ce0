"""The low-rank family of the ReFT paper (Wu et al. 2024, arXiv 2404.03592, section 3.2 and appendix) and pyreft.

With R, W: r×d and b: r, and f = act_fn or the identity:

    LoReFT    h + Rᵀ(f(Wh + b) − Rh)   R Rᵀ = I   the paper's eq. 2
    NoReFT    h + Rᵀ(f(Wh + b) − Rh)   R free     pyreft
    ConsReFT  h + Rᵀ(b − Rh)           R Rᵀ = I   pyreft: the source is a constant
    LobiReFT  h + Rᵀb                  R Rᵀ = I   pyreft: a bias in the subspace
    DiReFT    h + Rᵀ f(Wh + b)         R Rᵀ = I   pyreft's DiReFT
    NodiReFT  h + Rᵀ f(Wh + b)         R free     pyreft's name; *the paper's DiReFT* (eq. 3, W₂ = R, W₁ = W)

`R` of LoReFT costs one batched QR a training step (see `orthogonal`), nothing at inference.
"""

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .base import Intervention, in_precision_of, register_intervention
from .orthogonal import can_retract, orthonormal_rows, retract_, rows_at_manifold


class LowRankIntervention(Intervention):
    """R (r, d) with or without orthonormal rows; the other parameters are the kind's own."""

    R: nn.Parameter
    W: nn.Parameter  # of the kinds with a learned source

    sharded = False  # FSDP2 holds R in pieces: what a forward writes into the gathered copy would be lost
    _settled: "_Settled | None" = None
    _fresh: int | None = None  # version of R that `retract_all` put right for the forward that follows

    def rows(self) -> Tensor:
        """R (r, d) to compute with, fp32 or wider; orthonormal if the kind says so."""
        if not self.orthonormal:
            return self.R
        if self._learns():
            self._settled = None
            fresh, self._fresh = self._fresh, None
            if self.sharded or not can_retract(self.R) or not isinstance(self.R, nn.Parameter):
                return orthonormal_rows(self.R)
            if fresh is None or fresh != self.R._version:
                retract_([self.R])
            return rows_at_manifold(self.R)
        if self.sharded:
            return orthonormal_rows(self.R.detach())
        if torch.compiler.is_compiling():
            return self.R if can_retract(self.R) else orthonormal_rows(self.R.detach())
        # After training R was last touched by the optimiser: put it right once, then never again.
        if self._settled is None or not self._settled.holds(self.R):
            self._settled = _Settled(self.R)
        return self._settled.rows

    def train(self, mode: bool = True) -> "LowRankIntervention":
        self._settled = None  # R may have been written through `.data`, which leaves no trace
        super().train(mode)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_settled": None, "_fresh": None}  # a copy has memory of its own

    def _learns(self) -> bool:
        return torch.is_grad_enabled() and self.R.requires_grad

    def _shape(self) -> tuple[int, int]:
        assert self.low_rank_dimension is not None
        return self.low_rank_dimension, self.embed_dim

    def _make_rows(self) -> None:
        rows = torch.randn(self._shape(), dtype=torch.float32)
        if self.orthonormal:
            rows = rows if rows.is_meta else orthonormal_rows(rows)
        else:
            rows = rows / math.sqrt(self.embed_dim)
        self.R = nn.Parameter(rows)

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
                stacklevel=4,
            )

    def _source(self, h: Tensor) -> Tensor:
        w, b = in_precision_of(h, self.W, self.b)
        source = nn.functional.linear(h, w, b)
        return source if self._activation is None else self._activation(source)


class _Settled:
    """The orthonormal rows of an R, good until something is written to it."""

    def __init__(self, parameter: Tensor) -> None:
        retract_([parameter])
        self.source = parameter.detach()  # kept, so that its memory cannot become another tensor's
        self.rows = self.source if can_retract(parameter) else orthonormal_rows(self.source)
        self.version = None if parameter.is_inference() else parameter._version

    def holds(self, parameter: Tensor) -> bool:
        if parameter.is_inference() or parameter._version != self.version:
            return False
        if self.rows.is_inference() and not torch.is_inference_mode_enabled():
            return False  # autograd refuses it
        return parameter.dtype == self.source.dtype and parameter.data_ptr() == self.source.data_ptr()


def retract_all(interventions: Iterable[nn.Module]) -> None:
    """Before a training forward: put every R that learns on orthonormal rows, in one batched QR for all sites.

    The forward that follows takes them as they are. Modules without such an R are passed over; one whose R is a
    DTensor is marked as sharded and sees to its rows itself.
    """
    ready = []
    for module in interventions:
        if isinstance(module, LowRankIntervention) and module.orthonormal and module.R.requires_grad:
            module.sharded = module.sharded or isinstance(module.R, DTensor)
            if can_retract(module.R) and not module.sharded:
                ready.append(module)
    retract_([module.R for module in ready])
    for module in ready:
        module._fresh = module.R._version


class _Replace(LowRankIntervention):
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
        rows, w, b = in_precision_of(h, self.rows(), self.W, self.b)
        if self._activation is None:  # Wh − Rh = (W − R)h, folded once: exactly zero where W = R
            return nn.functional.linear(h, w - rows, b) @ rows
        return (self._source(h) - nn.functional.linear(h, rows)) @ rows


@register_intervention("loreft")
class LoreftIntervention(_Replace):
    """LoReFT, h + Rᵀ(Wh + b − Rh) with R Rᵀ = I (eq. 2). 2rd + r numbers; starts at W = R, b = 0, so Δ = 0."""

    orthonormal = True


@register_intervention("noreft")
class NoreftIntervention(_Replace):
    """NoReFT: LoReFT's formula with R unconstrained (pyreft). 2rd + r numbers."""


class _Add(LowRankIntervention):
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
        return self._source(h) @ self.rows().to(h.dtype)


@register_intervention("direft")
class DireftIntervention(_Add):
    """pyreft's DiReFT, h + Rᵀ(Wh + b) with R Rᵀ = I. The paper's DiReFT is `NodireftIntervention`."""

    orthonormal = True


@register_intervention("nodireft")
class NodireftIntervention(_Add):
    """NodiReFT, h + W₂ᵀ(W₁h + b) with nothing constrained: *the paper's DiReFT* (eq. 3). W₂ = R, W₁ = W."""


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
        rows, b = in_precision_of(h, self.rows(), self.b)
        return (b - nn.functional.linear(h, rows)) @ rows


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
        rows, b = in_precision_of(h, self.rows(), self.b)
        edit: Tensor = b @ rows
        return edit.expand_as(h)
