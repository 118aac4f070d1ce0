"""The angles of a conflict report as a picture; needs matplotlib."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .conflict import Conflict

_SERIES = (
    ("writes", "writes: a, b", "o"),
    ("a_reads_b", "a reads, b writes", "^"),
    ("b_reads_a", "b reads, a writes", "v"),
)


def draw_angles(pairs: "Sequence[Conflict]", path: str | os.PathLike[str]) -> None:
    """One panel a pair, one column a shared site, one mark an angle; 90° is nothing in common."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The figure needs matplotlib: pip install matplotlib.") from error

    columns = max((len(pair.sites) for pair in pairs), default=1)
    figure = Figure(figsize=(min(16, 4 + 0.35 * columns), 3.2 * len(pairs)), layout="constrained")
    for axes, pair in zip(figure.subplots(len(pairs), squeeze=False)[:, 0], pairs, strict=True):
        _panel(axes, pair)
    figure.savefig(path, dpi=150)


def _panel(axes: Any, pair: "Conflict") -> None:
    for offset, (name, label, marker) in zip((-0.2, 0.0, 0.2), _SERIES, strict=True):
        points = [(i + offset, angle) for i, site in enumerate(pair.sites) for angle in getattr(site, name)]
        if points:
            axes.scatter(*zip(*points, strict=True), marker=marker, s=24, alpha=0.8, label=label)
    axes.axhline(90, color="grey", linewidth=0.8, linestyle=":")
    axes.set(ylim=(-3, 95), yticks=range(0, 91, 15), ylabel="principal angle, degrees")
    axes.set_title(f"a: {pair.a}, b: {pair.b}")
    axes.set_xlim(-0.6, max(len(pair.sites), 1) - 0.4)
    labels = [f"{site.layer if site.layer is not None else site.site}\n{site.tokens[0]}" for site in pair.sites]
    axes.set_xticks(range(len(labels)), labels, fontsize=8)
    axes.set_xlabel("layer, tokens")
    if pair.sites:
        axes.legend(fontsize=8, loc="lower right")
    else:
        axes.text(0, 45, "no shared site", ha="center")
