"""CoLA's training rows that a grid with `rows.train: 4800` leaves over, as a data folder to choose settings by.

python benchmarks/cola_held_out.py DIR HELD    (DIR: the data folder of `reftune bench`; HELD: the folder to write)

Its training rows are those 4,800, its validation rows the others, which `reftune bench` halves: no test row is in it.
"""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

from reftune.bench.data import load_rows, split
from reftune.bench.tasks import task

TRAIN = 4800


def main(folder: str, held: str) -> None:
    """Write the two parts."""
    cola = task("cola")
    rows = split(cola, load_rows(cola, Path(folder)), seed=0, train=None, select=None, test=None).train
    place = Path(held) / "glue" / "cola"
    place.mkdir(parents=True, exist_ok=True)
    _write(place / "train.jsonl.gz", rows[:TRAIN])
    _write(place / "validation.jsonl.gz", rows[TRAIN:])
    print(f"{place}: {len(rows[:TRAIN]):,} training rows, {len(rows[TRAIN:]):,} for validation")


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
