"""The learning rates that a report shows: all that were tried, with what they reached on the selection rows."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .markdown import table


def tried(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of every rate of the sweeps with what it reached on the selection rows; "" without a sweep."""
    sweeps = [row for row in rows if row["stage"] == "sweep"]
    if not sweeps:
        return ""
    tasks = list(dict.fromkeys(row["task"] for row in sweeps))
    lines = []
    for method in dict.fromkeys(row["method"] for row in sweeps):
        own = [[row for row in sweeps if (row["method"], row["task"]) == (method, task)] for task in tasks]
        lines.append([method, *(_cell(sorted(found, key=lambda row: row["lr"])) for found in own)])
    by = " and ".join(sorted({_by(row) for row in sweeps}))
    steps = " or ".join(f"{count:,}" for count in sorted({row["steps"] for row in sweeps}))
    seeds = ", ".join(str(seed) for seed in sorted({row["seed"] for row in sweeps}))
    said = f"Selection rows, {by}, after {steps} steps, seed {seeds}; the best in bold."
    return f"{said}\n\n{table(['method', *map(short, tasks)], lines)}"


def short(task: str) -> str:
    """A joint run's column is named "all tasks"."""
    return task if "+" not in task else "all tasks"


def _by(row: Mapping[str, Any]) -> str:
    return str(row["spec"].get("sweep", {}).get("by", "loss"))


def _value(row: Mapping[str, Any]) -> float:
    """What the best has least of; inf for a run that broke down, which has no finite loss (see `runner.best_lr`)."""
    selection = row["selection"]
    found = selection.get(_by(row))
    if any(value is None or not math.isfinite(value) for value in (found, selection.get("loss", 0.0))):
        return math.inf
    return -float(found) if _by(row) == "score" else float(found)


def _cell(rows: Sequence[Mapping[str, Any]]) -> str:
    best = min(map(_value, rows), default=math.inf)
    shown = []
    for row in rows:
        value = _value(row)
        scored = _by(row) == "score"
        text = "broke down" if value == math.inf else f"{-100 * value:.1f}" if scored else f"{value:.4f}"
        shown.append(f"{row['lr']:g}: {f'**{text}**' if value == best < math.inf else text}")
    return ", ".join(shown) or "–"
