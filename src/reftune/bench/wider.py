"""A sweep that has been given more rates: which runs of the narrower one still hold, which are out of date.

rows = current(read_rows("runs/glue"))       # what a report averages
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def same_run(spec: Mapping[str, Any], lr: float | None, rows: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The final run among rows that trained what a run of `spec` at the rate `lr` would train, whatever the other rates
    of its sweep were and whatever chose among them."""
    wanted = _apart_from_rates(spec)
    finals = (row for row in rows if row["stage"] == "final" and row["lr"] == lr)
    return next((row for row in finals if _apart_from_rates(row["spec"]) == wanted), None)


def current(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without the final runs of a sweep that a wider one of the same method replaced, in any of its seeds."""
    tried: dict[str, set[frozenset[float]]] = {}
    for row in rows:
        if row["stage"] == "final":
            tried.setdefault(_of_any_seed(row), set()).add(_rates(row))
    return [
        row
        for row in rows
        if row["stage"] != "final" or not any(_rates(row) < wider for wider in tried[_of_any_seed(row)])
    ]


def _rates(row: Mapping[str, Any]) -> frozenset[float]:
    return frozenset(row["spec"].get("method", {}).get("lrs", ()))


def _of_any_seed(row: Mapping[str, Any]) -> str:
    return json.dumps([row["method"], row["task"], _apart_from_rates({**row["spec"], "seed": None})])


def _apart_from_rates(spec: Mapping[str, Any]) -> str:
    method = {key: value for key, value in spec.get("method", {}).items() if key != "lrs"}
    return json.dumps({**spec, "method": method, "lr": None, "stage": None, "sweep": None}, sort_keys=True)
