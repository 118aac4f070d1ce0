"""A saved adapter at a lower rank: its first k rows.

    config = ReftConfig.from_pretrained("runs/style", rank=2)
    model = PeftModel.from_pretrained(base, "runs/style", config=config)

An adapter trained with `nested` has its first rows trained to stand alone. Those of any other one with orthonormal rows
are no more than the rows that happen to come first: they can be cut, with a warning. Without orthonormal rows, or with
rows that belong to tasks or stages, there is nothing to cut.
"""

import re
import warnings
from typing import Any

from torch import Tensor

from ..interventions import LowRankIntervention, intervention_class
from .config import ReftConfig

_CUT = re.compile(r"\.reft_[^.]+\.(R|W|b)$")


def truncate_config(config: ReftConfig, rank: int) -> None:
    """Make it the config of the adapter's first `rank` rows, in place. ValueError, with nothing changed, where that
    cannot be; a warning where the rows were not trained for it."""
    edits: list[Any] = config.representations or [config.edits()[0]]
    reasons = dict.fromkeys(reason for edit in edits if (reason := _check(edit, rank)))
    for reason in reasons:
        warnings.warn(reason, UserWarning, stacklevel=3)
    for number, edit in enumerate(edits):
        edit["r"], edit["nested"] = rank, _ranks_up_to(edit["nested"], rank)
        if number == 0:
            config.r, config.nested = rank, edit["nested"]
    config.rows_kept = rank


def truncate_state(state: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The tensors of a saved adapter, cut to its first `rank` rows."""
    return {key: value[:rank].contiguous() if _CUT.search(key) else value for key, value in state.items()}


def _check(edit: dict[str, Any], rank: Any) -> str:
    """ValueError if these rows cannot be cut; else why they are better not, or ""."""
    cls = intervention_class(edit["intervention"])
    full, nested = edit["r"], edit.get("nested")
    if not (issubclass(cls, LowRankIntervention) and cls.has_rank):
        raise ValueError(f"An adapter of kind {edit['intervention']!r} has no rows that could be cut to a lower rank.")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= full:
        raise ValueError(f"rank must be a whole number between 1 and the adapter's own, {full}, but is {rank!r}.")
    for key, what in (("subspaces", "belong to its tasks"), ("stack", "belong to the stages of its stack")):
        if edit.get(key):
            raise ValueError(f"This adapter cannot be cut to rank {rank}: its rows {what}, {key}={edit[key]!r}.")
    if rank == full or nested is True or (nested and rank in nested):
        return ""
    if not nested and not cls.orthonormal:
        raise ValueError(
            f"This adapter cannot be cut to rank {rank}: the rows of a {edit['intervention']!r} are in no order. Train "
            "it with nested=True."
        )
    wanted = sorted({*nested, rank}) if nested else True
    return (
        f"The first {rank} rows of this adapter were not trained to stand alone: they are not as good an adapter of "
        f"rank {rank} as there could be. Train with nested={wanted!r}, or at this rank."
    )


def _ranks_up_to(nested: Any, rank: int) -> bool | list[int]:
    if not nested or nested is True:
        return bool(nested)
    return [k for k in nested if k <= rank] or False
