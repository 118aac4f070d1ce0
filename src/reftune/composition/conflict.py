"""Before combining adapters: where do they meet, how do their subspaces lie, and what do they do to each other?

report = reftune.conflicts(model, ["style", "tone"], prompts=["How are you?"], tokenizer=tokenizer)
print(report)                  # a table
report.figure("angles.png")    # the angles, site by site
"""

import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..tuner.mix import How
from .algebra import known, tuner_of
from .angles import SharedSite, shared_sites
from .measure import Measured, Measurer


@dataclass(frozen=True)
class Conflict:
    """Two adapters: the sites that both edit, and what was measured on prompts, if there were any."""

    a: str
    b: str
    sites: tuple[SharedSite, ...]
    measured: Measured | None = None

    def __str__(self) -> str:
        lines = [f"{self.a} (a) and {self.b} (b): {_count(len({site.site for site in self.sites}), 'shared site')}"]
        if self.sites:
            lines += _table(self._rows())
        else:
            lines.append("  They edit no site together: one meets the other's edits only through the layers between.")
        if self.measured is not None:
            m = self.measured
            lines.append(
                f"  Both on ({m.how}), next token of {_count(m.prompts, 'prompt')}: a's effect on the logits changes "
                f"by {m.a_changed:.0%}, b's by {m.b_changed:.0%}; the likeliest token is a's in {m.next_token_a:.0%} "
                f"and b's in {m.next_token_b:.0%} of them."
            )
        return "\n".join(lines)

    def _rows(self) -> list[list[str]]:
        head = ["site", "tokens", "writes", "a reads b", "b reads a", "overlap", "a, b disturbed"]
        rows = [head + (["a, b changed"] if self.measured else [])]
        for site in self.sites:
            tokens = site.tokens[0] if site.tokens[0] == site.tokens[1] else " / ".join(site.tokens)
            row = [
                site.site,
                tokens if site.same_tokens else f"{tokens} (never the same)",
                *(_range(found) for found in (site.writes, site.a_reads_b, site.b_reads_a)),
                _number(site.overlap),
                f"{_number(site.a_disturbed)}, {_number(site.b_disturbed)}",
            ]
            if self.measured:
                row.append(", ".join(f"{change:.0%}" for change in self.measured.states[site.site]))
            rows.append(row)
        return rows


@dataclass(frozen=True)
class ConflictReport:
    """What `conflicts` found, pair by pair. Printing it gives tables; `figure` draws the angles."""

    pairs: tuple[Conflict, ...]

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.pairs)) + "\n\n" + _LEGEND

    def figure(self, path: str | os.PathLike[str]) -> None:
        """Draw the principal angles of every pair, one column a site; the file's ending names the format.

        Needs matplotlib.
        """
        from .figure import draw_angles

        draw_angles(self.pairs, path)


def conflicts(
    model: Any,
    adapters: Sequence[str],
    prompts: Sequence[str] | None = None,
    tokenizer: Any = None,
    how: How = "sum",
    chat_template: bool | None = None,
) -> ConflictReport:
    """Where and how much adapters interfere, for every pair of them.

    Args:
        model: a PeftModel with ReFT adapters.
        adapters: at least two of their names.
        prompts: texts to measure on: each adapter's effect alone and beside the other. None: weights alone.
        tokenizer: needed for prompts; its chat template is used if it has one, unless `chat_template=False`.
        how: how the two are combined for the measurement.
    """
    tuner = tuner_of(model)
    known(tuner, adapters)
    if isinstance(adapters, str) or len(set(adapters)) < 2:
        raise ValueError(f"A conflict is between two adapters, but only {adapters!r} was named.")
    measurer = None
    if prompts is not None:
        if tokenizer is None:
            raise ValueError("To measure on prompts, pass the tokenizer too.")
        measurer = Measurer(model, tuner, tokenizer, prompts, how, chat_template)
    pairs = []
    for a, b in itertools.combinations(dict.fromkeys(adapters), 2):
        sites = tuple(shared_sites(tuner, a, b))
        measured = measurer.pair(a, b, list({site.site: None for site in sites})) if measurer else None
        pairs.append(Conflict(a, b, sites, measured))
    return ConflictReport(tuple(pairs))


_LEGEND = """\
Angles in degrees, smallest to largest: 90 is nothing in common, 0 a shared direction.
writes: between what a and b write. a reads b: between what a reads and b writes.
overlap: of the written spans, 0 to 1. disturbed: predicted change of an edit when the other's comes first, relative
to the edit, over random states. changed: measured on the prompts, of each one's effect on the states at the site."""


def _range(angles: tuple[float, ...]) -> str:
    if not angles:
        return "–"
    low, high = f"{angles[0]:.0f}", f"{angles[-1]:.0f}"
    return low if low == high else f"{low}–{high}"


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
