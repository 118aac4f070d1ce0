"""What a report shows of runs that kept their best epoch: the score after each, and how often the last was the best."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .markdown import table


def by_epoch(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of final runs' scores on the selection rows after every epoch, means over seeds; "" where none was kept.

    The last column says for how many of the runs the last epoch was the best: more steps may do better there.
    """
    finals = [row for row in rows if row["stage"] == "final" and row["selection"].get("epochs")]
    if not finals:
        return ""
    longest = max(len(row["selection"]["epochs"]) for row in finals)
    lines = []
    for method, task in dict.fromkeys((row["method"], row["task"]) for row in finals):
        runs = [row["selection"]["epochs"] for row in finals if (row["method"], row["task"]) == (method, task)]
        means = [statistics.fmean(kept) for kept in zip(*runs, strict=False)]  # as many as the shortest run has
        shown = [f"{100 * mean:.1f}" for mean in means] + ["–"] * (longest - len(means))
        last = sum(scores.index(max(scores)) == len(scores) - 1 for scores in runs)
        lines.append([method, task, *shown, f"{last} of {len(runs)}"])
    heads = ["method", "task", *(str(number + 1) for number in range(longest)), "last is best"]
    return f"Selection rows, the score after each epoch, mean over seeds.\n\n{table(heads, lines)}"
