"""A stack (hierarchical interventions): several edits of growing rank at one site, one after the other.

    e₀ = 0,   eₖ = eₖ₋₁ + Δₖ(h + g(eₖ₋₁)),   h ↦ h + eₙ        Δₖ: stage k, of rank rₖ;  g: `between`, or the identity

Without `between` this is a sequence of interventions, each editing what the one before it left. With it, a stage sees
the edits before it through the non-linearity, so that the whole is no affine map any more; what earlier stages wrote
stays as it is. Every stage starts at zero, also one that is trained after the others.

    StackIntervention(embed_dim=d, ranks=[1, 2, 4, 8], between="gelu")
    ReftConfig(stack=[1, 2, 4, 8], between="gelu")
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Intervention, activation, intervention_class, kind_of
from .choice import Choice
from .complement import Taken
from .rows import LowRankIntervention
from .subspaces import super_config

_PREFIX = "stage_"


class StackIntervention(Intervention):
    """Stages of a low-rank kind, one after the other at one site.

    Args:
        embed_dim: d, the width of the hidden states.
        ranks: the rank of each stage, in order.
        between: name of the function through which a stage sees the edits before it, or None.
        kind: of the low-rank family, such as "loreft".
        settings: those of the kind: act_fn, dropout, bias, init_weights, ...
    """

    def __init__(
        self, embed_dim: int, ranks: Sequence[int], between: str | None = None, kind: str = "loreft", **settings: Any
    ) -> None:
        cls = intervention_class(kind)
        check_stack(ranks)
        if not (issubclass(cls, LowRankIntervention) and cls.has_rank):
            raise ValueError(f"{kind!r} has no rank: the stages of a stack are of the low-rank family.")
        self.part_class: type[LowRankIntervention] = cls
        self.setting_names = cls.setting_names  # type: ignore[misc]
        self.orthonormal = cls.orthonormal  # type: ignore[misc]
        self.ranks = tuple(ranks)
        self.between = None if between in (None, "linear") else between
        self._between = activation(self.between)
        self.trained: tuple[int, ...] | None = None
        if max(ranks) > embed_dim:
            raise ValueError(f"A stage of rank {max(ranks)} does not fit hidden states of width {embed_dim}.")
        super().__init__(embed_dim, 1, **settings)
        self.low_rank_dimension = sum(ranks)

    def reset_parameters(self) -> None:
        settings = {
            "act_fn": self.act_fn,
            "dropout": self.dropout,
            "bias": self.bias_mode,
            "init_weights": self.init_weights,
            **self.settings,
        }
        for number, rank in enumerate(self.ranks):
            self.add_module(f"{_PREFIX}{number}", self.part_class(self.embed_dim, rank, **settings))

    @property
    def stages(self) -> list[LowRankIntervention]:
        return [self._modules[f"{_PREFIX}{number}"] for number in range(len(self.ranks))]  # type: ignore[misc]

    def edit(
        self, h: Tensor, segments: Tensor | None = None, rows: Tensor | None = None, choice: Choice | None = None
    ) -> Tensor:
        """eₙ, (..., d) → (..., d), in fp32 or wider."""
        wide = h.to(torch.promote_types(h.dtype, torch.float32))
        first, *others = self.stages
        edit = first(wide, segments, edit_only=True)
        for stage in others:
            seen = edit if self._between is None else self._between(edit)
            edit = edit + stage(wide + seen, segments, edit_only=True)
        return edit

    def delta(self, h: Tensor, segments: Tensor | None = None) -> Tensor:
        return self.edit(h, segments)

    def train_only(self, stage: int | Iterable[int] | None) -> None:
        """Train one stage, or some, alone; the others' parameters are frozen. None for all."""
        numbers = None if stage is None else (stage,) if isinstance(stage, int) else tuple(stage)
        if numbers is not None:
            count = len(self.ranks)
            for number in numbers:
                if not -count <= number < count:
                    raise ValueError(f"There is no stage {number}: this stack has {count}, numbered from 0.")
            numbers = tuple(number % count for number in numbers)
        self.trained = numbers
        self.requires_grad_(True)

    def requires_grad_(self, requires_grad: bool = True) -> "StackIntervention":
        for number, stage in enumerate(self.stages):
            stage.requires_grad_(requires_grad and (self.trained is None or number in self.trained))
        return self

    def stay_out_of(self, taken: Taken) -> None:
        """`LowRankIntervention.stay_out_of` for every stage."""
        for stage in self.stages:
            stage.stay_out_of(taken)

    def righted(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        out = dict(state)
        for number, stage in enumerate(self.stages):
            prefix = f"{_PREFIX}{number}."
            own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            out |= {prefix + key: value for key, value in stage.righted(own).items()}
        return out

    def directions(self) -> tuple[Tensor, Tensor] | None:
        both = [stage.directions() for stage in self.stages]
        if any(pair is None for pair in both):
            return None
        return torch.cat([pair[0] for pair in both if pair]), torch.cat([pair[1] for pair in both if pair])

    def config(self) -> dict[str, Any]:
        return {**super_config(self, kind_of(self.part_class)), "stack": list(self.ranks), "between": self.between}

    def extra_repr(self) -> str:
        return f"d={self.embed_dim}, ranks={list(self.ranks)}, between={self.between}"


def check_stack(ranks: Any) -> None:
    """ValueError unless it is a list of ranks."""
    whole = isinstance(ranks, Sequence) and all(isinstance(r, int) and not isinstance(r, bool) for r in ranks)
    if not whole or isinstance(ranks, str) or not ranks or min(ranks) < 1:
        raise ValueError(f"stack must be a list of ranks, at least 1 each, such as [1, 2, 4, 8], but is {ranks!r}.")
