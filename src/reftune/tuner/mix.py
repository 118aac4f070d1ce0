"""`Mix`: several adapters on one hidden state at once, each with a strength.

    sum        h + Σᵢ sᵢ Δᵢ(h)              every Δ is computed from the same h
    sequence   h ← h + sᵢ Δᵢ(h), i = 1, 2…  each adapter edits what the one before it left

`set_adapter([...])` is a sequence with strengths of 1. A strength of 0 leaves the adapter out, bit for bit.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

How = Literal["sum", "sequence"]


@dataclass(frozen=True)
class Mix:
    """Adapters with their strengths, in the order of a sequence."""

    strengths: Mapping[str, float]
    how: How = "sum"

    def __post_init__(self) -> None:
        if self.how not in ("sum", "sequence"):
            raise ValueError(f'how must be "sum" or "sequence", but is {self.how!r}.')
        for name, strength in self.strengths.items():
            number = isinstance(strength, (int, float)) and not isinstance(strength, bool)
            if not number or not math.isfinite(strength):
                raise ValueError(f"The strength of adapter {name!r} must be a finite number, but is {strength!r}.")

    def active(self) -> dict[str, float]:
        """The adapters that edit at all."""
        return {name: float(strength) for name, strength in self.strengths.items() if strength != 0}
