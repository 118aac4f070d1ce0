"""Subspaces (ReFT paper, appendix on composition): one intervention whose rows are divided among tasks.

    h + Σₛ Rₛᵀ(f(Wₛ h + bₛ) − Rₛ h)      s over the chosen tasks; R, all rows together, has orthonormal rows

    SubspaceIntervention(embed_dim=d, subspaces={"a": 2, "b": 2})(h, choice=Choice(["a", "b", "a+b", None]))
    ReftConfig(r=4, subspaces={"a": 2, "b": 2})

Every task has parameters of its own (`subspace_a.R`, ...), so a task that is frozen, or that a whole pass leaves out,
is left alone by any optimiser; where a pass has rows of several tasks, each row's gradient reaches its own tasks only.
How the rows stay orthonormal as a whole without one task bending another is in `together`.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .base import Intervention, intervention_class, kind_of
from .choice import Choice
from .complement import Taken
from .orthogonal import can_retract, may_ask, orthonormal_rows
from .rows import LowRankIntervention
from .steps import Steps
from .together import rows_together

_PREFIX = "subspace_"


class SubspaceIntervention(Intervention):
    """The rows of a low-rank kind, divided among named tasks.

    Args:
        embed_dim: d, the width of the hidden states.
        subspaces: task → its number of rows.
        kind: of the low-rank family, such as "loreft".
        settings: those of the kind: act_fn, dropout, bias, init_weights, ...
    """

    needs_choice = True

    def __init__(self, embed_dim: int, subspaces: Mapping[str, int], kind: str = "loreft", **settings: Any) -> None:
        cls = intervention_class(kind)
        check_subspaces(subspaces)
        if not (issubclass(cls, LowRankIntervention) and cls.has_rank):
            raise ValueError(f"{kind!r} has no rows to divide: subspaces need a kind of the low-rank family.")
        self.part_class: type[LowRankIntervention] = cls
        self.setting_names = cls.setting_names  # type: ignore[misc]
        self.subspaces = tuple(subspaces)
        self.orthonormal = cls.orthonormal  # type: ignore[misc]
        self.ranks = dict(subspaces)
        self.active: tuple[str, ...] | None = None  # chosen for all passes that do not choose themselves
        self.trained: tuple[str, ...] | None = None
        self._last: Tensor | None = None  # R as it was last put right
        self._seen: Any = None
        super().__init__(embed_dim, sum(subspaces.values()), **settings)

    def reset_parameters(self) -> None:
        settings = {
            "act_fn": self.act_fn,
            "dropout": self.dropout,
            "bias": self.bias_mode,
            "init_weights": self.init_weights,
            **self.settings,
        }
        whole = self.part_class(self.embed_dim, self.low_rank_dimension, **settings)
        start = 0
        for name, rank in self.ranks.items():
            part = self.part_class(self.embed_dim, rank, **{**settings, "init_weights": self._quiet()})
            with torch.no_grad():
                for key, value in part.state_dict().items():
                    if not value.is_meta:
                        value.copy_(whole.state_dict()[key][start : start + rank])
            self.add_module(_PREFIX + name, part)
            start += rank
        for part in self.parts.values():
            part.siblings = [other for other in self.parts.values() if other is not part] if self.orthonormal else ()

    def _quiet(self) -> bool:
        """The parts are written over: only the whole may warn of its start (a LobiReFT at b = 0 needs the True)."""
        return self.init_weights and self.act_fn is None

    @property
    def parts(self) -> dict[str, LowRankIntervention]:
        """Task → the intervention with its rows."""
        return {name: self._modules[_PREFIX + name] for name in self.subspaces}  # type: ignore[misc]

    def edit(
        self, h: Tensor, segments: Tensor | None = None, rows: Tensor | None = None, choice: Choice | None = None
    ) -> Tensor:
        """Σ of the chosen tasks' edits, (..., d) in fp32 or wider; each row gets those of its own tasks."""
        self.put_right_()
        chosen = self.active if self.active is not None else self.subspaces
        table = None
        if choice is not None and choice.per_row is not None:
            table = choice.table(self.subspaces, h.device)
            rows = torch.arange(len(h), device=h.device) if rows is None else rows
            table, chosen = table[rows], self.subspaces
        elif choice is not None and choice.for_all is not None:
            chosen = choice.whole(self.subspaces) or ()
        edit = torch.zeros_like(h, dtype=torch.promote_types(h.dtype, torch.float32))
        for number, (name, part) in enumerate(self.parts.items()):
            if name in chosen:
                own = part(h, segments, edit_only=True)
                if table is not None:
                    mine = table[:, number].view(-1, *[1] * (h.dim() - 1))
                    own = torch.where(mine, own, torch.zeros_like(own))
                edit = edit + own
        return edit

    def delta(self, h: Tensor, segments: Tensor | None = None) -> Tensor:
        return self.edit(h, segments)

    # -- which tasks ----------------------------------------------------------------------------------------------

    def use(self, names: Iterable[str] | None) -> None:
        """Switch on these tasks alone wherever a pass does not choose itself; None for all."""
        self.active = None if names is None else self._known(names)

    def train_only(self, names: Iterable[str] | None) -> None:
        """Train these tasks alone; the others' parameters are frozen, bit for bit. None for all."""
        self.trained = None if names is None else self._known(names)
        self.requires_grad_(True)

    def requires_grad_(self, requires_grad: bool = True) -> "SubspaceIntervention":
        for name, part in self.parts.items():
            part.requires_grad_(requires_grad and (self.trained is None or name in self.trained))
        return self

    def _known(self, names: Iterable[str]) -> tuple[str, ...]:
        names = (names,) if isinstance(names, str) else tuple(names)
        for name in names:
            if name not in self.subspaces:
                raise ValueError(f"There is no subspace {name!r}; this intervention has {', '.join(self.subspaces)}.")
        return names

    # -- the rows -------------------------------------------------------------------------------------------------

    def stay_out_of(self, taken: Taken) -> None:
        """`LowRankIntervention.stay_out_of` for all tasks together."""
        free = self.embed_dim - taken.rank
        if sum(self.ranks.values()) > free:
            raise ValueError(
                f"There is no room for {sum(self.ranks.values())} more rows here: the adapters in orthogonal_to write "
                f"and read {taken.rank} of the {self.embed_dim} dimensions, which leaves {free}. Divide fewer rows."
            )
        zero = [(p, "W" in p._parameters and torch.equal(p.W, p.R)) for p in self.parts.values() if not p.R.is_meta]
        for part in self.parts.values():
            part.stay_out_of(taken)
        self._last = None
        self.put_right_()
        with torch.no_grad():
            for part, identity in zero:
                if identity:
                    part.W.copy_(part.R)

    def put_right_(self) -> None:
        """Before the parts run: their rows orthonormal as a whole, in place where that is possible."""
        parts = list(self.parts.values())
        if not self.orthonormal or any(part.R.is_meta for part in parts):
            return
        if any(p.sharded or not can_retract(p.R) or not isinstance(p.R, nn.Parameter) for p in parts):
            self._give_rows(parts)
            return
        if torch.compiler.is_compiling():
            return
        learning = [part for part in parts if part._learns()]
        if learning:
            if any(part._fresh is None or part._fresh != part.R._version for part in learning):
                put_right_together([self])
            return
        if self._seen is None or self._seen != self._versions():
            put_right_together([self])
            self._seen = self._versions()

    def _give_rows(self, parts: list[LowRankIntervention]) -> None:
        """Where R cannot be rewritten (FSDP2, bf16): one QR of all rows in the graph, handed to the parts."""
        learns = any(part._learns() for part in parts)
        stacked = torch.cat([part.R.float() if part.R.dtype != torch.float64 else part.R for part in parts])
        rows = orthonormal_rows(stacked if learns else stacked.detach(), parts[0].beside())
        for part, own in zip(parts, rows.split([len(part.R) for part in parts]), strict=True):
            part.given = own

    def _versions(self) -> list[object] | None:
        every = [part.R for part in self.parts.values()]
        if any(p.is_inference() for p in every):
            return None
        return [Steps.last, *((p.data_ptr(), p._version) for p in every)]

    def train(self, mode: bool = True) -> "SubspaceIntervention":
        self._seen = None
        super().train(mode)
        return self

    def __getstate__(self) -> dict[str, Any]:
        parts = {key: value for key, value in self.__dict__.items() if key != "_seen"}
        return {**parts, "_seen": None}

    @torch.no_grad()
    def righted(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        out = dict(state)
        for name, part in self.parts.items():
            prefix = f"{_PREFIX}{name}."
            own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            alone = part.righted(own) | ({"R": own["R"]} if self.orthonormal and "R" in own else {})
            out |= {prefix + key: value for key, value in alone.items()}
        keys = [f"{_PREFIX}{name}.R" for name in self.subspaces]
        rows = [out[key].detach() for key in keys if key in out]
        if not self.orthonormal or len(rows) < len(keys) or rows[0].dtype not in (torch.float32, torch.float64):
            return out
        whole = torch.cat(rows)
        last = torch.zeros_like(whole) if self._last is None else self._last.to(whole)
        beside = self._first_part().beside()
        fixed = None if beside is None else beside.to(whole).unsqueeze(0)
        put_right = rows_together(whole.unsqueeze(0), last.unsqueeze(0), self._frozen(whole.device), fixed)[0]
        return out | dict(zip(keys, put_right.split(list(self.ranks.values())), strict=True))

    def _first_part(self) -> LowRankIntervention:
        return self.parts[self.subspaces[0]]

    def _frozen(self, device: torch.device) -> Tensor:
        """Which rows belong to a frozen task, while another one learns."""
        flags = [not part.R.requires_grad for part in self.parts.values() for _ in range(len(part.R))]
        return torch.tensor(flags if not all(flags) else [False] * len(flags), device=device)

    def directions(self) -> tuple[Tensor, Tensor] | None:
        self.put_right_()
        both = [part.directions() for part in self.parts.values()]
        if any(pair is None for pair in both):
            return None
        return torch.cat([pair[0] for pair in both if pair]), torch.cat([pair[1] for pair in both if pair])

    def config(self) -> dict[str, Any]:
        return {**super_config(self, kind_of(self.part_class)), "subspaces": dict(self.ranks)}

    def extra_repr(self) -> str:
        return f"d={self.embed_dim}, " + ", ".join(f"{name}: {rank}" for name, rank in self.ranks.items())


@torch.no_grad()
def put_right_together(interventions: Iterable[SubspaceIntervention]) -> None:
    """The rows of several divided interventions, one batched factorisation for equally shaped ones."""
    groups: dict[Any, list[SubspaceIntervention]] = defaultdict(list)
    for module in interventions:
        parts = list(module.parts.values())
        first, beside = parts[0].R, parts[0].beside()
        frozen = tuple(not part.R.requires_grad for part in parts)
        ranks = tuple(len(part.R) for part in parts)
        key = ranks, frozen, module.embed_dim, first.dtype, first.device, 0 if beside is None else len(beside)
        groups[key].append(module)
    for (ranks, frozen, _, dtype, device, count), group in groups.items():
        rows = torch.stack([torch.cat([part.R.detach() for part in module.parts.values()]) for module in group])
        last = torch.stack(
            [torch.zeros_like(r) if m._last is None else m._last.to(r) for m, r in zip(group, rows, strict=True)]
        )
        every = [module._first_part().beside() for module in group]
        fixed = torch.stack([b.to(rows) for b in every if b is not None]) if count else None
        right = rows_together(rows, last, group[0]._frozen(device), fixed)
        for module, old, new in zip(group, rows, right, strict=True):
            module._last = new.clone()
            same = right is rows or (may_ask(device) and torch.equal(old, new))
            for part, own, still in zip(module.parts.values(), new.split(list(ranks)), frozen, strict=True):
                if not same and (not still or all(frozen)):  # an earlier graph may hold the rows of a frozen task
                    part.R.copy_(own.to(dtype))
                part.put_source_right_()
                part.given = None
                part._fresh = part.R._version


def check_subspaces(subspaces: Any) -> None:
    """ValueError unless it is a dict of names and row numbers."""
    if not isinstance(subspaces, Mapping) or not subspaces:
        raise ValueError(f'subspaces must be a dict such as {{"a": 2, "b": 2}}, but is {subspaces!r}.')
    for name, rank in subspaces.items():
        if not isinstance(name, str) or not name.replace("_", "").replace("-", "").isalnum():
            raise ValueError(f"A subspace is named by letters, digits, - and _, but one here is {name!r}.")
        if name in ("all", "__all__", "__base__"):
            raise ValueError(f"{name!r} has a meaning of its own in a choice of subspaces: name this one otherwise.")
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ValueError(f"Subspace {name!r} must have a whole number of rows, at least 1, but has {rank!r}.")


def super_config(module: Intervention, kind: str) -> dict[str, Any]:
    """The config of a whole made of parts of this kind."""
    return {
        "intervention": kind,
        "r": module.low_rank_dimension,
        "act_fn": module.act_fn,
        "dropout": module.dropout,
        "bias": module.bias_mode,
        "init_weights": module.init_weights,
        "intervention_kwargs": dict(module.settings),
    }
