"""`reftune bench`: LoReFT beside LoRA, DoRA, RED, full fine-tuning and the rest, on the paper's four categories.

from reftune.bench import load_grid, run_grid, read_rows, report
run_grid(load_grid("recipes/bench/glue-minilm.yaml"), "runs/glue", data="shared/data")
print(report(read_rows("runs/glue")))
"""

from .grid import Grid, Job, jobs, load_grid, presets
from .methods import METHODS, Method
from .report import report
from .runner import Outcome, run_grid
from .store import Store, read_rows
from .tasks import SUITES, task

__all__ = [
    "METHODS",
    "SUITES",
    "Grid",
    "Job",
    "Method",
    "Outcome",
    "Store",
    "jobs",
    "load_grid",
    "presets",
    "read_rows",
    "report",
    "run_grid",
    "task",
]
