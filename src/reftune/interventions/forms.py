"""An intervention as an algebraic form, for sums, sequences, merging and low-rank approximation:

    Δ(h) = D⊙h + Uᵀ f(V h + c)        U, V: r×d, c: r, D: d or none, f = act_fn or the identity

`form_of(intervention)` reads it off the known kinds; any other kind is probed, and taken if its Δ proves affine. All
tensors are fp64, so that what is made of them is exact to the precision it is stored in.
"""

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .base import Intervention, activation, kind_of
from .lowrank import LowRankIntervention

_TOLERANCE = 1e-6  # relative: parameters are fp32


class NoFormError(ValueError):
    """An intervention, or a combination of several, that has no such form; the message says why."""


@dataclass(frozen=True)
class Form:
    """Δ(h) = diagonal⊙h + upᵀ f(down·h + offset), in fp64. Shapes: up, down (r, d); offset (r,); diagonal (d,)."""

    up: Tensor
    down: Tensor
    offset: Tensor
    diagonal: Tensor | None = None
    act_fn: str | None = None

    @property
    def rank(self) -> int:
        return self.up.shape[0]

    @property
    def is_constant(self) -> bool:
        """Whether Δ is the same for every h."""
        return self.act_fn is None and self.diagonal is None and not bool(self.down.any())

    @property
    def constant(self) -> Tensor:
        """Δ(0) of an affine form, (d,)."""
        return self.offset @ self.up

    def __call__(self, h: Tensor) -> Tensor:
        """Δ(h), (..., d) → (..., d), in fp64."""
        h = h.to(self.up)
        source = h @ self.down.mT + self.offset
        function = activation(self.act_fn)
        edit: Tensor = (source if function is None else function(source)) @ self.up
        return edit if self.diagonal is None else edit + self.diagonal * h

    def scaled(self, strength: float) -> "Form":
        """strength · Δ."""
        diagonal = None if self.diagonal is None else strength * self.diagonal
        return replace(self, up=strength * self.up, diagonal=diagonal)

    def plus(self, other: "Form") -> "Form":
        """h ↦ Δ(h) + Δ'(h): the rows stacked, ranks add up."""
        if self.act_fn != other.act_fn:
            raise NoFormError(
                f"one source has the function {self.act_fn or 'identity'} and the other {other.act_fn or 'identity'}, "
                "and one intervention has one function"
            )
        return self._stacked(other.up, other.down, other.offset, _sum(self.diagonal, other.diagonal))

    def then(self, other: "Form") -> "Form":
        """h ↦ Δ(h) + Δ'(h + Δ(h)): the edit of `self` and after it that of `other`, both affine; ranks add up."""
        if self.act_fn or other.act_fn:
            raise NoFormError("in a sequence the second edit reads the first one's through an act_fn, which is no sum")
        down = other.down + (other.down @ self.up.mT) @ self.down
        offset = other.offset + other.down @ self.constant
        up, diagonal = self.up, _sum(self.diagonal, other.diagonal)
        if self.diagonal is not None:
            down = down + other.down * self.diagonal
        if other.diagonal is not None:
            up = up * (1 + other.diagonal)
            if self.diagonal is not None and diagonal is not None:
                diagonal = diagonal + self.diagonal * other.diagonal
        return replace(self, up=up)._stacked(other.up, down, offset, diagonal)

    def nearest(self, rank: int) -> tuple["Form", float]:
        """The best form of at most this rank, and its relative error.

        Best in the Frobenius norm of the affine map [UᵀV, Uᵀc] (Eckart and Young), which is the root mean square of
        the difference of the edits over h ~ N(0, I). The error is that norm over the norm of the whole map.
        """
        if self.act_fn is not None or self.diagonal is not None:
            raise NoFormError(
                "a low-rank approximation needs an affine low-rank edit: no act_fn, no scaling of every h"
            )
        if rank >= self.rank and self.rank <= self.up.shape[1]:
            return self, 0.0
        q_up, t_up = torch.linalg.qr(self.up.mT)
        q_down, t_down = torch.linalg.qr(torch.cat([self.down, self.offset.unsqueeze(1)], dim=1).mT)
        left, size, right = torch.linalg.svd(t_up @ t_down.mT)
        total = size.square().sum()
        error = float((size[rank:].square().sum() / total).sqrt()) if float(total) > 0 else 0.0
        count = min(rank, len(size))
        affine = size[:count, None] * (right[:count] @ q_down.mT)
        return Form((q_up @ left[:, :count]).mT, affine[:, :-1].contiguous(), affine[:, -1].contiguous()), error

    def _stacked(self, up: Tensor, down: Tensor, offset: Tensor, diagonal: Tensor | None) -> "Form":
        return Form(
            torch.cat([self.up, up]),
            torch.cat([self.down, down]),
            torch.cat([self.offset, offset]),
            diagonal,
            self.act_fn,
        )


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


@torch.no_grad()
def form_of(intervention: Intervention) -> Form:
    """The form of an intervention as it stands (without dropout, which is for training alone).

    Raises NoFormError, with the reason, where there is none: LoReFT or NoReFT with an act_fn, ReFT-r1, a kind of one's
    own that is not affine.
    """
    try:
        kind = kind_of(type(intervention))
    except ValueError:
        kind = ""
    if intervention.couples_positions:
        raise NoFormError(f"{type(intervention).__name__} couples the tokens of a prompt")
    if any(tensor.device.type == "mps" for tensor in intervention.state_dict().values()):
        intervention = copy.deepcopy(intervention).cpu()  # which has no fp64
    rows = intervention.rows().detach().double() if isinstance(intervention, LowRankIntervention) else None
    params = {name: value.detach().double() for name, value in intervention.state_dict().items()}
    zero = torch.zeros((), dtype=torch.float64, device="cpu")
    b = params.get("b", zero.to(next(iter(params.values()), zero).device))
    if rows is not None and kind in ("loreft", "noreft"):
        if intervention.act_fn is not None:
            raise NoFormError(
                f"{type(intervention).__name__} with act_fn={intervention.act_fn!r} reads h twice, through the "
                "function and plainly"
            )
        return Form(rows, params["W"] - rows, b.expand(len(rows)))
    if rows is not None and kind == "consreft":
        return Form(rows, -rows, b)
    if rows is not None and kind == "lobireft":
        return Form(rows, torch.zeros_like(rows), b)
    if rows is not None and kind in ("direft", "nodireft"):
        return Form(rows, params["W"], b.expand(len(rows)), act_fn=intervention.act_fn)
    if kind == "red":
        constant = b.expand(intervention.embed_dim).unsqueeze(0)
        return Form(constant, torch.zeros_like(constant), torch.ones_like(constant[:, 0]), params["s"] - 1)
    if kind == "postblock":
        down = params["W_down"]
        return Form(params["W_up"], down, down.new_zeros(len(down)), act_fn="silu")
    return _probed(intervention)


def _probed(intervention: Intervention) -> Form:
    """The form of an unknown kind from its values at 0 and at the unit vectors, if random points agree with it."""
    d = intervention.embed_dim
    device = next((t.device for t in intervention.state_dict().values()), None)
    eye = torch.eye(d, dtype=torch.float64, device=device)
    constant = intervention.delta(eye.new_zeros(1, d))[0]
    matrix = torch.cat([intervention.delta(rows) for rows in eye.split(512)]) - constant  # Δ(h) = h @ matrix + constant
    points = torch.randn(16, d, dtype=torch.float64, device=device, generator=_generator(device)) * 3
    wanted = intervention.delta(points)
    if not torch.allclose(
        points @ matrix + constant, wanted, rtol=_TOLERANCE, atol=_TOLERANCE * float(wanted.abs().max())
    ):
        raise NoFormError(f"the edit of {type(intervention).__name__} is not affine in h")
    row = Form(constant.unsqueeze(0), torch.zeros_like(constant).unsqueeze(0), constant.new_ones(1))
    if not bool(matrix.any()):
        return row
    diagonal = matrix.diagonal()
    if torch.equal(matrix, diagonal.diag()) and int(diagonal.count_nonzero()) > d // 2:
        return replace(row, diagonal=diagonal.clone())
    left, size, right = torch.linalg.svd(matrix)
    rank = int((size > _TOLERANCE * size[0]).sum())
    linear = Form(right[:rank], (left[:, :rank] * size[:rank]).mT, constant.new_zeros(rank))
    inside, error = linear.plus(row).nearest(
        rank
    )  # the constant usually lies in the rows: then it needs none of its own
    return inside if error < _TOLERANCE else linear.plus(row)


def _generator(device: torch.device | None) -> torch.Generator:
    return torch.Generator(device=device or "cpu").manual_seed(0)
