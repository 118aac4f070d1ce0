"""Rows of results: one file a run, written whole or not at all, and `results.jsonl` with all of them.

store = Store("runs/glue")
store.put(row); store.has(job.id); store.rows()
"""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock

from .grid import run_id
from .jsonl import read_lines


class Store:
    """The results of a grid in a directory; several processes may write at once.

    A directory that has a `results.jsonl` alone, such as a report's, goes on from it.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._rows = self.directory / "rows"
        if not self._rows.is_dir():
            self.directory.mkdir(parents=True, exist_ok=True)
            with FileLock(self.directory / ".lock"):
                if not self._rows.is_dir():
                    self._begin()

    def _begin(self) -> None:
        work = self.directory / f".rows.{os.getpid()}"
        work.mkdir(exist_ok=True)
        if (self.directory / "results.jsonl").is_file():
            for row in map(_renamed, _lines(self.directory / "results.jsonl")):
                _write(work / f"{row['id']}.json", json.dumps(row))
        os.replace(work, self._rows)

    def has(self, name: str) -> bool:
        """Whether the run of that id is done."""
        return (self._rows / f"{name}.json").is_file()

    def put(self, row: dict[str, Any]) -> bool:
        """Write a row; False, and nothing is written, if the run has one already."""
        with FileLock(self.directory / ".lock"):
            if self.has(row["id"]):
                return False
            _write(self._rows / f"{row['id']}.json", json.dumps(_plain(row)))
            lines = [json.dumps(found) for found in self.rows()]
            _write(self.directory / "results.jsonl", "".join(line + "\n" for line in lines))
        return True

    def get(self, name: str) -> dict[str, Any]:
        """The row of a run."""
        return _row(self._rows / f"{name}.json")

    def rows(self) -> list[dict[str, Any]]:
        """All rows, in the order in which their runs began."""
        return sorted(_rows(self._rows), key=lambda row: (row["started"], row["id"]))


def done(directory: str | Path) -> set[str]:
    """The ids of the runs that a directory has rows of; none if it is not there, and nothing is made.

    Raises ValueError for a damaged row.
    """
    rows, lines = Path(directory) / "rows", Path(directory) / "results.jsonl"
    if rows.is_dir():
        return {row["id"] for row in _rows(rows)}
    return {_renamed(row)["id"] for row in _lines(lines)} if lines.is_file() else set()


def read_rows(source: str | Path) -> list[dict[str, Any]]:
    """The rows of a grid's directory, or of a results.jsonl by itself."""
    path = Path(source)
    if (path / "rows").is_dir():
        rows = Store(path).rows()
    elif path.is_file() or (path / "results.jsonl").is_file():
        file = path if path.is_file() else path / "results.jsonl"
        rows = _lines(file)
    else:
        raise FileNotFoundError(f"No results in {path}: give the directory that `reftune bench run --out` wrote.")
    if not rows:
        raise ValueError(f"{path} has no results yet.")
    return rows


def publish(rows: Iterable[dict[str, Any]], directory: str | Path) -> Path:
    """Write rows as `results.jsonl`, without the names of the machine and the folder that they were made with."""
    told = []
    for row in rows:
        machine = {key: value for key, value in row.get("machine", {}).items() if key != "host"}
        told.append(row | {"machine": machine, "data": "hub" if row.get("data") == "hub" else "a folder"})
    path = Path(directory) / "results.jsonl"
    _write(path, "".join(json.dumps(_plain(row)) + "\n" for row in told))
    return path


def _renamed(row: dict[str, Any]) -> dict[str, Any]:
    """A sweep's run was once named by all rates of its sweep."""
    method = row.get("spec", {}).get("method", {})
    if row.get("stage") != "sweep" or "lrs" not in method:
        return row
    spec = row["spec"] | {"method": {key: value for key, value in method.items() if key != "lrs"}}
    return row | {"spec": spec, "id": run_id(spec)}


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [_row(path) for path in folder.glob("*.json") if not path.name.startswith(".")]


def _row(file: Path) -> dict[str, Any]:
    try:
        row = json.loads(file.read_bytes())
    except ValueError:
        row = None
    if not _is_result(row):
        raise ValueError(f"{file} is damaged: delete it, and its run is done again.")
    return dict(row)


def _lines(file: Path) -> list[dict[str, Any]]:
    found = []
    for number, row in read_lines(file):
        if not _is_result(row):
            raise ValueError(
                f"{file} holds no rows of results (see line {number}): give what `reftune bench run --out` wrote."
            )
        found.append(row)
    return found


def _is_result(row: Any) -> bool:
    return isinstance(row, dict) and {"id", "started"} <= row.keys()


def _write(path: Path, text: str) -> None:
    work = path.with_name(f".{path.name}.{os.getpid()}")
    with work.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(work, path)


def _plain(value: Any) -> Any:
    """JSON has no nan: null stands for it."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
