"""What a user sees of a grid: a line after every run, with the time left for all of it."""

from collections import defaultdict
from typing import Any

from .grid import Job


def time_left(plan: list[Job], done: list[dict[str, Any]], workers: int) -> float | None:
    """Seconds until the grid is done: each missing run takes what its likes took, shared among `workers`.

    Its likes are runs of the same stage, tasks and method, else the same stage and method, else the same stage, else
    any. None before the first run is done.
    """
    if not done:
        return None
    times: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for row in done:
        for key in _keys(row["stage"], row["task"], row["method"]):
            times[key].append(row["seconds"]["all"])
    ids = {row["id"] for row in done}
    total = 0.0
    for job in plan:
        if job.id not in ids:
            known = next(times[k] for k in _keys(job.stage, job.task, job.method.name) if k in times)
            total += sum(known) / len(known)
    return total / max(workers, 1)


def line(row: dict[str, Any], done: int, total: int, left: float | None) -> str:
    """`[12/96] sst2 loreft seed 1: accuracy 91.3, 14 s; about 22 min left`"""
    scores = []
    for name, metrics in row["metrics"].items():
        first = next(iter(_order(name, metrics)), None)
        if first:
            value = metrics[first[0]]
            scores.append(f"{name} {100 * value:.1f}" if first[1] else f"{name} {first[0]} {value:.3f}")
    loss = row["selection"].get("loss")
    said = ", ".join(scores) or ("" if loss is None else f"selection loss {loss:.4f}")
    rate = f" lr {row['lr']:g}" if row["lr"] else ""
    what = f"{row['suite']} {row['stage']}" if "+" in row["task"] else f"{row['task']} {row['stage']}"
    ahead = f"; about {words(left)} left" if left is not None and done < total else ""
    took = f"{row['seconds']['all']:.0f} s"
    return f"[{done}/{total}] {what} {row['method']} seed {row['seed']}{rate}: {said}, {took}{ahead}"


def words(seconds: float) -> str:
    """42 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _keys(stage: str, task: str, method: str) -> list[tuple[str, ...]]:
    return [(stage, task, method), (stage, method), (stage,), ()]


def _order(name: str, metrics: dict[str, Any]) -> list[tuple[str, bool]]:
    from .tasks import task

    return [(m.name, m.share) for m in task(name).metrics if metrics.get(m.name) is not None]
