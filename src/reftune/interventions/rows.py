"""The base of the low-rank kinds: R (r, d), its rows orthonormal or not, alone or beside what others take up.

    rows()          R as it must be now: orthonormal, and orthogonal to what `stay_out_of` was told of
    source_rows(h)  W likewise
    tensors(h)      both and b, in the precision of h, cut to the rank of a nested training pass

Before a training forward R is put right in place (see `orthogonal`); at inference once after it was last written to.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .base import Intervention, in_precision_of
from .choice import Choice
from .complement import Taken, at_complement, without
from .nested import nested_ranks
from .orthogonal import can_retract, orthonormal_rows, retract_, right_rows, rows_at_manifold
from .steps import Steps

_ACROSS = {torch.float32: 5e-7, torch.float64: 1e-14}


class LowRankIntervention(Intervention):
    """R (r, d) with or without orthonormal rows; the other parameters are the kind's own.

    Args:
        nested: True, or a list of ranks: each training pass uses the first k rows only, k drawn anew (see `nested`).
    """

    R: nn.Parameter
    W: nn.Parameter  # of the kinds with a learned source

    nested: tuple[int, ...] = ()  # the ranks that training draws from
    sharded = False  # FSDP2 holds R in pieces: what a forward writes into the gathered copy would be lost
    siblings: Sequence["LowRankIntervention"] = ()  # the other tasks of one divided intervention
    expects_others = False  # its weights, still to be loaded, say what it stays out of
    given: Tensor | None = None  # rows found by the whole that this is a part of
    _settled: "_Settled | None" = None
    _fresh: int | None = None  # version of R that `retract_all` put right for the forward that follows
    _first: int | None = None  # rows that this training pass uses

    def __init__(
        self,
        embed_dim: int,
        low_rank_dimension: int | None = 4,
        *,
        nested: bool | Sequence[int] = False,
        **settings: Any,
    ) -> None:
        super().__init__(embed_dim, low_rank_dimension, **settings)
        ranks = nested_ranks(nested, self.low_rank_dimension if self.has_rank else None, type(self).__name__)
        if ranks:  # thousands of adapters are held at once: what most do not have is kept in the class
            self.nested, self.needs_choice = ranks, True

    @property
    def others_write(self) -> Tensor | None:
        """(k, d) orthonormal: R and W stay orthogonal to it; a buffer, saved where it is there."""
        return self._buffers.get("others_write")

    @property
    def others_read(self) -> Tensor | None:
        """(l, d) orthonormal: R stays orthogonal to it too."""
        return self._buffers.get("others_read")

    def set_others(self, **rows: Tensor) -> None:
        """`others_write=` and `others_read=`, for weights that are loaded; `stay_out_of` puts R and W right as well."""
        self._buffers |= {name: value.to(self.R) for name, value in rows.items()}

    def rows(self) -> Tensor:
        """R (r, d) to compute with, fp32 or wider; orthonormal if the kind says so."""
        if self.given is not None:
            return self.given
        settled = self._settled  # the usual case at inference, where every small thing counts, comes first
        if settled is not None and not self._learns() and settled.holds_plainly(self):
            return settled.rows
        beside = self.beside()
        if not self.orthonormal and beside is None:
            return self.R
        if self._learns():
            if self.expects_others and self.others_write is None:
                raise RuntimeError(
                    "This adapter was made from the config of a saved one with orthogonal_to, without its weights, "
                    "which say what it stays out of. Load it with PeftModel.from_pretrained(..., is_trainable=True)."
                )
            self._settled = None
            fresh, self._fresh = self._fresh, None
            beside = self._with_siblings(beside)
            if self.sharded or not can_retract(self.R) or not isinstance(self.R, nn.Parameter):
                return self._found(self.R, beside)
            if fresh is None or (not torch.compiler.is_compiling() and fresh != self.R._version):
                self.put_right_(beside)
            if not self.orthonormal and beside is not None:
                return at_complement(self.R, beside)
            return rows_at_manifold(self.R, beside, symmetric=bool(self.siblings))
        if self.sharded or (torch.compiler.is_compiling() and not can_retract(self.R)):
            return self._found(self.R.detach(), beside)
        if torch.compiler.is_compiling():
            return self.R
        # After training R was last touched by the optimiser: put it right once, then never again.
        if self._settled is None or not self._settled.holds(self):
            self._settled = _Settled(self)
        return self._settled.rows

    def source_rows(self, h: Tensor) -> Tensor:
        """W (r, d) to compute with, in the precision of h; `rows()` has been called before."""
        w: Tensor = self.W.to(h.dtype)
        if self.others_write is None:
            return w
        if self.sharded or not can_retract(self.W) or not isinstance(self.W, nn.Parameter):
            return without(w, self.others_write)
        return at_complement(w, self.others_write)

    def tensors(self, h: Tensor) -> tuple[Tensor, Any, Any]:
        """R, W and b in the precision of h, the latter two None where there are none."""
        rows = self.rows()
        w = self.source_rows(h) if "W" in self._parameters else None
        rows, w, b = in_precision_of(h, rows, w, self.b if hasattr(self, "b") else None)
        if self._first is None:
            return rows, w, b
        cut = slice(self._first)
        return rows[cut], None if w is None else w[cut], None if b is None else b[cut]

    def edit(
        self, h: Tensor, segments: Tensor | None = None, rows: Tensor | None = None, choice: Choice | None = None
    ) -> Tensor:
        if not self.nested or not self.training or not torch.is_grad_enabled():
            return super().edit(h, segments)
        self._first = (choice or Choice()).rank(self.nested)
        try:
            return super().edit(h, segments)
        finally:
            self._first = None

    def stay_out_of(self, taken: Taken) -> None:
        """Keep R and W out of what others take up, from now on; an edit that is zero stays zero.

        Raises ValueError if the complement has too few dimensions, or if R has.
        """
        free = self.embed_dim - taken.rank
        if len(self.R) > free:
            raise ValueError(
                f"There is no room for {len(self.R)} more rows here: the adapters in orthogonal_to write and read "
                f"{taken.rank} of the {self.embed_dim} dimensions, which leaves {free}. Take r={max(free, 0)} or less."
            )
        self.set_others(others_write=taken.writes, others_read=taken.reads)
        if self.R.is_meta:
            return
        with torch.no_grad():
            identity = "W" in self._parameters and torch.equal(self.W, self.R)
            self.put_right_()
            if identity:
                self.W.copy_(self.R)

    def beside(self) -> Tensor | None:
        """What R must be orthogonal to, (k, d), or None."""
        if self.others_write is None or self.others_read is None:
            return None
        return torch.cat([self.others_write, self.others_read])

    @torch.no_grad()
    def put_right_(self, beside: Tensor | None = None) -> None:
        """Write R, and W beside others, back to where they belong; does nothing where that holds to rounding."""
        beside = self.beside() if beside is None else beside
        if self.orthonormal:
            retract_([self.R], [beside])
        elif beside is not None and can_retract(self.R):
            self.R.copy_(_out_of(self.R, beside))
        self.put_source_right_()

    @torch.no_grad()
    def put_source_right_(self) -> None:
        """The same for W alone; a frozen W beside a learning R was right before, and an earlier graph may hold it."""
        if self.others_write is None or "W" not in self._parameters or not can_retract(self.W):
            return
        if self.W.requires_grad or not self.R.requires_grad:
            self.W.copy_(_out_of(self.W, self.others_write))

    @torch.no_grad()
    def righted(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        state = dict(state)
        beside = self.beside()
        for name, basis in (("R", beside), ("W", self.others_write)):
            value = state.get(name)
            if value is None or value.dtype not in _ACROSS:  # a narrower one is put right when it is used
                continue
            basis = None if basis is None else basis.to(value.device)
            if name == "R" and self.orthonormal:
                state[name] = right_rows(value.detach(), basis)
            elif basis is not None:
                state[name] = _out_of(value.detach(), basis)
        return state

    def config(self) -> dict[str, Any]:
        ranks = list(self.nested)
        everything = ranks == list(range(1, (self.low_rank_dimension or 0) + 1))
        return {**super().config(), "nested": everything or ranks if ranks else False}

    def train(self, mode: bool = True) -> "LowRankIntervention":
        self.__dict__.pop("_settled", None)  # R may have been written through `.data`, which leaves no trace
        super().train(mode)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_settled": None, "_fresh": None, "given": None}  # a copy has memory of its own

    def _found(self, rows: Tensor, beside: Tensor | None) -> Tensor:
        """What rows() is for these, written nowhere, differentiable."""
        if self.orthonormal:
            return orthonormal_rows(rows, beside)
        wide = rows if rows.dtype == torch.float64 else rows.float()
        return wide if beside is None else without(wide, beside)

    def _with_siblings(self, beside: Tensor | None) -> Tensor | None:
        others = [sibling.R.detach() for sibling in self.siblings]
        if beside is not None:
            others.append(beside.to(self.R.dtype))
        return torch.cat(others) if others else None

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


class _Settled:
    """The rows of an intervention, good until something may have been written to its R (or, beside others, its W)."""

    def __init__(self, module: LowRankIntervention) -> None:
        self.step = Steps.last
        module.put_right_()
        self.source = [p.detach() for p in self._watched(module)]  # kept, so that the memory cannot become another's
        rows = self.source[0]
        self.rows = rows if can_retract(module.R) else module._found(rows, module.beside())
        self.versions = None if module.R.is_inference() else [p._version for p in self._watched(module)]
        plain = self.versions and len(self.source) == 1 and self.rows is rows and module.beside() is None
        self.version: int | None = self.versions[0] if plain and self.versions else None

    def holds_plainly(self, module: LowRankIntervention) -> bool:
        """A quick `holds` for R beside nothing that is itself what it computes with; False says nothing."""
        if self.version is None or module.sharded or module.others_write is not None or torch.compiler.is_compiling():
            return False
        now = module.R
        same = not now.is_inference() and now._version == self.version and now.dtype == self.rows.dtype
        return same and self.step is Steps.last and now.data_ptr() == self.rows.data_ptr()

    @staticmethod
    def _watched(module: LowRankIntervention) -> list[Tensor]:
        return [module.R] if module.others_write is None or "W" not in module._parameters else [module.R, module.W]

    def holds(self, module: LowRankIntervention) -> bool:
        watched = self._watched(module)
        if len(watched) != len(self.source) or any(p.is_inference() for p in watched):
            return False
        if self.step is not Steps.last or self.versions != [p._version for p in watched]:
            return False
        if self.rows.is_inference() and not torch.is_inference_mode_enabled():
            return False  # autograd refuses it
        same = zip(watched, self.source, strict=True)
        return all(p.dtype == s.dtype and p.data_ptr() == s.data_ptr() for p, s in same)


def _out_of(matrix: Tensor, basis: Tensor) -> Tensor:
    """`without`, but rows that are out of the span already, to rounding, come back bit for bit."""
    inside = (matrix @ basis.to(matrix.dtype).mT).abs().amax(dim=1, keepdim=True) if basis.shape[0] else None
    if inside is None:
        return matrix
    limit = _ACROSS[matrix.dtype] * matrix.norm(dim=1, keepdim=True)
    return torch.where(inside <= limit, matrix, without(matrix, basis))
