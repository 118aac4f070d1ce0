"""Plots of a grid's results: accuracy, or the held-out loss, against parameters and against training time, PNG."""

import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import Summary, primary, summarise

_MARKS = "osD^"


def plot(rows: Sequence[dict[str, Any]], directory: str | Path, stem: str = "bench") -> list[Path]:
    """Write `{stem}-parameters.png` and `{stem}-time.png`: means over the tasks, with the spread over seeds.

    Drawn are the tasks' primary metrics if all are shares, else their losses. Raises ImportError without matplotlib,
    ValueError if there is neither.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("Plots need the package matplotlib: pip install 'reftune[bench]'.") from error
    matplotlib.use("Agg")

    summaries = summarise(rows)
    columns = drawn(summaries)
    if not columns:
        raise ValueError("These results hold neither accuracies nor losses to average, so there is nothing to plot.")
    place = Path(directory)
    place.mkdir(parents=True, exist_ok=True)
    made = []
    axes = {
        "parameters": ("parameters trained (head apart)", lambda one: one.trainable),
        "time": ("seconds to train", lambda one: statistics.fmean(one.seconds) if one.seconds else None),
    }
    for name, (label, value) in axes.items():
        path = place / f"{stem}-{name}.png"
        _draw([(one, float(x)) for one in summaries if (x := value(one)) is not None], columns, label, path)
        made.append(path)
    return made


def drawn(summaries: Sequence[Summary]) -> list[tuple[str, str]]:
    """The (task, metric) columns that a plot averages: the primary ones if higher is better in all, else the losses."""
    from .tasks import task

    columns = primary(summaries)
    metrics = [next(m for m in task(name).metrics if m.name == metric) for name, metric in columns]
    if all(m.share and m.higher for m in metrics):
        return columns
    return [(name, "loss") for name, _ in columns if any(one.scores[name, "loss"] for one in summaries)]


def _draw(points: Sequence[tuple[Summary, float]], columns: list[tuple[str, str]], label: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    losses = columns[0][1] == "loss"
    for number, (one, x) in enumerate(points):
        values = [(1 if losses else 100) * v for v in one.by_seed(columns).values()]
        if not values:
            continue
        mean = statistics.fmean(values)
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        form = _MARKS[number // 10 % len(_MARKS)]  # matplotlib has ten colours
        axis.errorbar(x, mean, yerr=spread, marker=form, capsize=3, linestyle="none", label=one.method)
    axis.set_xscale("symlog" if any(x == 0 for _, x in points) else "log")
    axis.set_xlabel(label)
    unit = "loss (lower is better)" if losses else "percent"
    axis.set_ylabel(f"mean of {len(columns)} task{'s' if len(columns) > 1 else ''}, {unit}")
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)  # names beside the points would overlap
    figure.savefig(path, dpi=150)


def plot_all(rows: Sequence[dict[str, Any]], directory: str | Path) -> list[Path]:
    """The plots of every suite and model in the rows that has several methods and something to average."""
    made: list[Path] = []
    stems: list[str] = []
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["suite"], row["spec"]["model"]), []).append(row)
    for (suite, model), group in groups.items():
        summaries = summarise(group)
        if len(summaries) > 1 and drawn(summaries):
            # no spaces, which end a link in Markdown
            stem = suite if len(groups) == 1 else re.sub(r"[^\w.-]+", "-", f"{suite}-{Path(model).name}")
            stems.append(stem)
            alike = stems.count(stem)  # models of one name, in different folders
            made += plot(group, directory, f"{stem}-{alike}" if alike > 1 else stem)
    return made
