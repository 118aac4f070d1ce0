"""Results to a Markdown report: mean ± sd over seeds, parameters, rates, and every metric of every task.

print(report(read_rows("runs/glue")))
"""

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .about import about
from .epochs import by_epoch
from .grid import Grid
from .markdown import table
from .methods import Method
from .rates import short, tried
from .tasks import task
from .wider import current


@dataclass
class Summary:
    """A method over all its final runs. `scores` maps (task, metric) to one value a seed."""

    method: str
    trainable: int = 0
    heads: set[int] = field(default_factory=set)  # numbers of a classifier's head, which go with the task's classes
    scores: dict[tuple[str, str], dict[int, float]] = field(default_factory=lambda: defaultdict(dict))
    lost: dict[tuple[str, str], set[int]] = field(default_factory=lambda: defaultdict(set))  # seeds whose value was nan
    seconds: list[float] = field(default_factory=list)  # of runs that were not cut off
    step: list[float] = field(default_factory=list)
    rates: dict[str, float | None] = field(default_factory=dict)
    head_rates: dict[str, float] = field(default_factory=dict)  # where the head has a rate of its own
    at_end: set[str] = field(default_factory=set)
    reuses: bool = False
    resumed: bool = False

    def by_seed(self, columns: Sequence[tuple[str, str]]) -> dict[int, float]:
        """The mean over the columns, for each seed that has them all."""
        seeds = set.intersection(*(set(self.scores[c]) for c in columns)) if columns else set()
        return {seed: statistics.fmean(self.scores[c][seed] for c in columns) for seed in sorted(seeds)}


def summarise(rows: Sequence[dict[str, Any]]) -> list[Summary]:
    """One summary a method, by the order in which they first appear."""
    found: dict[str, Summary] = {}
    for row in current(rows):
        if row["stage"] != "final":
            continue
        one = found.setdefault(row["method"], Summary(row["method"]))
        one.trainable = max(one.trainable, row["trainable"])
        one.heads |= {row["head"]} - {0}
        if row.get("resumed"):  # it knows the time of its last part alone
            one.resumed = True
        else:
            one.seconds.append(_training_time(row))
        one.step.append(row["seconds"]["step"])
        one.rates[row["task"]] = row["lr"]
        if (head_lr := row["spec"]["train"].get("head_lr")) is not None:
            one.head_rates[row["task"]] = head_lr
        one.reuses |= bool(row.get("reuse"))
        if row.get("lr_at_end"):
            one.at_end.add(row["task"])
        for name, metrics in row["metrics"].items():
            for metric, value in metrics.items():
                if value is None:
                    one.lost[name, metric].add(row["seed"])
                else:
                    one.scores[name, metric][row["seed"]] = value
    return list(found.values())


def primary(summaries: Sequence[Summary]) -> list[tuple[str, str]]:
    """The (task, metric) columns of the main table: of each task the first metric that was measured."""
    seen = {key for one in summaries for key, values in one.scores.items() if values}
    names = dict.fromkeys(name for name, _ in seen)
    columns = []
    for name in sorted(names, key=_place):
        measured = [m.name for m in task(name).metrics if (name, m.name) in seen]
        columns += [(name, metric) for metric in measured[:1]]
    return columns


def report(rows: Sequence[dict[str, Any]], title: str = "Results") -> str:
    """The report of rows, Markdown; a part for each suite and model.

    Raises ValueError if a method's runs on a task differ in more than the seed, or methods saw other rows of a task.
    """
    rows = current(rows)
    suites = sorted({row["suite"] for row in rows})
    models = sorted({row["spec"]["model"] for row in rows})
    if len(suites) > 1 or len(models) > 1:
        parts = [
            report([r for r in rows if r["suite"] == s and r["spec"]["model"] == m], f"{title}: {s} on {m}")
            for s in suites
            for m in models
            if any(r["suite"] == s and r["spec"]["model"] == m for r in rows)
        ]
        return "\n".join(parts)
    _agree(rows)
    summaries = summarise(rows)
    if not summaries:
        return f"# {title}\n\nNo final run is done yet; {len(rows)} sweep runs are.\n\n{tried(rows)}\n"
    columns = primary(summaries)
    text = [f"# {title}", "", about(rows), "", _main(summaries, columns), ""]
    text += [_notes(summaries, columns), "", "## Every metric", "", _breakdown(summaries), "", "## Learning rates", ""]
    every, epochs, seeds = tried(rows), by_epoch(rows), _by_seed(summaries, columns)
    text += [_rates(summaries), "", *([every, ""] if every else [])]
    text += ["## Seeds", "", seeds, ""] if seeds else []
    return "\n".join([*text, *(["## Epochs", "", epochs, ""] if epochs else [])])


def cell(values: Sequence[float], share: bool = True) -> str:
    """`81.3 ± 0.4`: mean and sample standard deviation, shares as percent; a single value has no spread."""
    if not values:
        return "–"
    scale, digits = (100, 1) if share else (1, 3)
    mean = f"{scale * statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def _main(summaries: Sequence[Summary], columns: list[tuple[str, str]]) -> str:
    heads = ["method", "parameters", *(f"{name} ({metric})" for name, metric in columns)]
    heads += ["average"] if _has_average(columns) else []
    lines = []
    for one in summaries:
        cells = [one.method, f"{one.trainable:,}"]
        cells += [cell(list(one.scores[c].values()), _metric(c).share) for c in columns]
        cells += [cell(list(one.by_seed(columns).values()))] if len(heads) > len(cells) else []
        whole = f"{statistics.fmean(one.seconds):.0f}" if one.seconds else "–"
        lines.append([*cells, f"{statistics.fmean(one.step):.2f}", whole])
    return table([*heads, "s a step", "s to train"], lines)


def _has_average(columns: Sequence[tuple[str, str]]) -> bool:
    return len(columns) > 1 and all(_metric(c).share and _metric(c).higher for c in columns)


def _by_seed(summaries: Sequence[Summary], columns: list[tuple[str, str]]) -> str:
    """Whether a method is ahead on each seed: the averages where two seeds have one, else each task; "" of one seed."""
    seeds = sorted({seed for one in summaries for c in columns for seed in one.scores[c]})
    averages = _has_average(columns) and any(len(one.by_seed(columns)) > 1 for one in summaries)
    lines = []
    for group in [columns] if averages else [[c] for c in columns]:
        name = "average" if len(group) > 1 else f"{group[0][0]} ({group[0][1]})"
        scale, digits = (100, 1) if _metric(group[0]).share else (1, 4)
        for one in summaries:
            found = one.by_seed(group)
            shown = [f"{scale * found[seed]:.{digits}f}" if seed in found else "–" for seed in seeds]
            lines += [[name, one.method, *shown]] if len(found) > 1 else []
    return table(["task", "method", *(f"seed {seed}" for seed in seeds)], lines) if lines else ""


def _breakdown(summaries: Sequence[Summary]) -> str:
    keys = sorted({key for one in summaries for key, v in one.scores.items() if v}, key=lambda k: (_place(k[0]), k[1]))
    lines = []
    for name, metric in keys:
        share = next((m.share for m in task(name).metrics if m.name == metric), False)
        values = [cell(list(one.scores[name, metric].values()), share) for one in summaries]
        lines.append([name, metric, *values])
    return table(["task", "metric", *(one.method for one in summaries)], lines)


def _rates(summaries: Sequence[Summary]) -> str:
    tasks = list(dict.fromkeys(name for one in summaries for name in one.rates))
    lines = []
    for one in summaries:
        shown = []
        for name in tasks:
            rate = one.rates.get(name)
            head = f", head {one.head_rates[name]:g}" if name in one.head_rates else ""
            shown.append("–" if rate is None else f"{rate:g}{'†' if name in one.at_end else ''}{head}")
        lines.append([one.method, *shown])
    whole = table(["method", *map(short, tasks)], lines)
    if not any(one.at_end for one in summaries):
        return whole
    return whole + "\n\n† the best of the sweep lies at its end: a wider one may do better."


def _agree(rows: Sequence[dict[str, Any]]) -> None:
    """Refuse to average over runs of different grids that were written to one directory."""
    settings: dict[Any, Any] = {}
    digests: dict[Any, Any] = {}
    # what a row does not name was at its default, and mostly before it had a name
    usual = _flat(dataclasses.asdict(Grid()) | {"method": dataclasses.asdict(Method("", "", ()))})
    for row in rows:
        if row["stage"] != "final":
            continue
        own = usual | _flat({k: v for k, v in row["spec"].items() if k not in ("seed", "lr", "tasks")})
        for name in row["task"].split("+"):  # the tasks of a joint run are averaged one by one
            first = settings.setdefault((name, row["method"]), own)
            differ = [key for key in first | own if first.get(key) != own.get(key)]
            if differ:
                shown = "; ".join(f"{key} {first.get(key)!r} and {own.get(key)!r}" for key in differ[:3])
                raise ValueError(
                    f"{row['method']} has runs of different settings on {name} here: {shown}. "
                    "Give each grid an --out of its own, and remove the rows that do not belong."
                )
        for name, found in row["rows"].items():
            if digests.setdefault((row["seed"], row["task"], name), found["digest"]) != found["digest"]:
                raise ValueError(
                    f"{row['method']} had other rows of {name} than another method with seed {row['seed']} here: give "
                    "each grid an --out of its own."
                )


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def _training_time(row: Mapping[str, Any]) -> float:
    """Seconds: CPU time on a CPU, which a busy or suspended machine does not lengthen, else wall time."""
    spent = row["seconds"]
    on_cpu = row.get("machine", {}).get("device") == "cpu"
    return float(spent["train_cpu"] if on_cpu and "train_cpu" in spent else spent["train"])


def _notes(summaries: Sequence[Summary], columns: list[tuple[str, str]]) -> str:
    heads = sorted({size for one in summaries for size in one.heads})
    sizes = " to ".join(f"{size:,}" for size in heads[:1] + heads[1:][-1:])
    by_task = ", by task" if len(heads) > 1 else ""
    head = f" All methods train the head too ({sizes} numbers{by_task}), not counted." if heads else ""
    reusing = ", ".join(one.method for one in summaries if one.reuses)
    reuse = f" What the frozen base makes the same in all runs was computed once for {reusing}." if reusing else ""
    uneven = any(set(one.by_seed(columns)) != set(one.scores[c]) for one in summaries for c in columns if one.scores[c])
    average = " An average is over the seeds that have all tasks." if _has_average(columns) and uneven else ""
    cut = " The time of runs that were cut off and went on is left out." if any(s.resumed for s in summaries) else ""
    return (
        f"Mean ± sample standard deviation over seeds; shares, accuracies and correlations in percent.{average}{head} "
        f"A step: the median, wall time; to train: CPU time on a CPU, else wall time.{cut}{reuse}{_lost(summaries)}"
    )


def _lost(summaries: Sequence[Summary]) -> str:
    """The runs that have no finite value of a metric, as where training broke down; "" if there are none."""
    found = [
        f"{one.method} on {name} ({metric}), seed {', '.join(map(str, sorted(seeds)))}"
        for one in summaries
        for (name, metric), seeds in one.lost.items()
    ]
    return f" Without a finite value, and so in no mean: {'; '.join(found)}." if found else ""


def _metric(column: tuple[str, str]) -> Any:
    return next(m for m in task(column[0]).metrics if m.name == column[1])


def _place(name: str) -> tuple[int, str]:
    from .tasks import SUITES

    order = [n for names in SUITES.values() for n in names]
    return order.index(name), name
