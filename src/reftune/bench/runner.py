"""Run a grid: every job that is neither done nor worked on by another process, until none is left.

    run_grid(load_grid("recipes/bench/glue-minilm.yaml"), "runs/glue", data="shared/data")

Start it as often as you like, on as many machines as see the directory: they share the jobs. What was killed is done
again (from its last checkpoint, if the grid writes any); what is done is kept.
"""

import math
import random
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from reftune.train.precision import slow_bf16
from reftune.train.reuse import MemoryStore, store_near

from .checks import check_grounds
from .claims import Claims
from .data import data_folder
from .grid import Grid, Job, jobs
from .progress import line, time_left
from .runs import run_job, this_device
from .store import Store
from .trained import is_kept, tidy
from .wider import same_run


@dataclass(frozen=True)
class Outcome:
    """What a call of `run_grid` did: runs it finished, those that failed (job id: error), those not done yet."""

    finished: int
    failed: dict[str, str]
    left: int


def run_grid(
    grid: Grid,
    out: str | Path,
    *,
    data: str | None = None,
    minutes: float | None = None,
    wait: bool = True,
    say: Callable[[str], None] = print,
    stale: float = 300.0,
    reuse: Literal["auto", "off"] = "auto",
    reuse_budget: int | None = None,
) -> Outcome:
    """Work on a grid.

    Args:
        grid: what to run, see `load_grid`.
        out: directory of the results (`results.jsonl`, `rows/`), the claims and the failures' tracebacks.
        data: folder with data; None takes $REFTUNE_DATA, else the hub.
        minutes: begin no further run after so many; a run that was begun is finished.
        wait: stay while other processes work on what is left, and take over what they drop.
        say: takes a line after every run.
        stale: seconds after which another machine's silent claim is taken over.
        reuse: "auto" computes what the frozen base makes the same in all runs of a ReFT (its sweep, its seeds, its
            epochs) once and keeps it in memory, where that is exact; it changes rounding alone. "off" does not.
        reuse_budget: bytes to keep at most; None is a quarter of the free memory, for grids are often shared.
    """
    if reuse not in ("auto", "off"):
        raise ValueError(f'reuse is "auto" or "off", but is {reuse!r}.')
    device = torch.device(this_device()["device"])
    if reuse_budget is None and device.type == "cpu":
        reuse_budget = MemoryStore().budget // 2
    kept = store_near(device, reuse_budget) if reuse == "auto" else None
    folder, store = data_folder(data), Store(out)
    claims = Claims(store.directory / "claims", stale=stale)
    store.rows()  # a damaged one is said now, not after the first training
    plan = jobs(grid)
    if any(not store.has(job.id) for job in plan):
        check_grounds(grid, folder)
        if grid.train.bf16 and (hint := slow_bf16(device.type)):
            say(hint)
    failed: dict[str, str] = {}
    finished, started = 0, time.monotonic()
    while True:
        todo = [job for job in plan if job.id not in failed and not store.has(job.id)]
        todo = [job for job in todo if not _blocked(job, plan, failed)]
        if not todo:
            break
        moved = False
        for job in todo:
            if minutes is not None and time.monotonic() - started > 60 * minutes:
                return Outcome(finished, failed, _left(plan, store))
            if store.has(job.id) or not _ready(job, plan, store):
                continue
            with claims.take(job.id) as mine:
                if not mine or store.has(job.id):
                    continue
                moved = True
                try:
                    row = _run(job, plan, store, folder, kept)
                except Exception as error:
                    failed[job.id] = f"{type(error).__name__}: {error}"
                    _record_failure(store, job)
                    say(f"FAILED {job.id}: {failed[job.id]}")
                    continue
                finished += store.put(row)
                _clear(job, plan, store)  # not before: a run that fails late goes on late
            done = [store.get(j.id) for j in plan if store.has(j.id)]
            workers = max(1, len(claims.live()) + 1)
            say(line(row, len(done), len(plan), time_left(plan, done, workers)))
        if not moved:
            if not wait or not _others(todo, claims):
                break
            time.sleep(1 + random.random())
    claims.tidy()
    return Outcome(finished, failed, _left(plan, store))


def best_lr(job: Job, plan: list[Job], store: Store) -> tuple[float | None, list[dict[str, Any]]]:
    """The learning rate of a final job and the sweep behind it; by held-out loss, or by score with the loss as tie.

    A run that broke down, which has no finite loss, comes last either way: its answers are all of one class.
    """
    if job.lr is not None or not job.method.lrs:
        return job.lr, []
    rows = [store.get(sweep.id) for sweep in _sweeps(job, plan)]
    by_score = job.settings["sweep"]["by"] == "score"

    def key(row: dict[str, Any]) -> tuple[float, float]:
        loss, score = row["selection"].get("loss"), row["selection"].get("score")
        if loss is None:
            return (math.inf, math.inf)
        return (-(score if score is not None else -math.inf), loss) if by_score else (loss, loss)

    best = min(rows, key=key)
    return best["lr"], [{"lr": row["lr"], **row["selection"]} for row in rows]


def _run(job: Job, plan: list[Job], store: Store, folder: Path | None, kept: MemoryStore | None) -> dict[str, Any]:
    lr, sweep = best_lr(job, plan, store)
    held = same_run(job.spec(), lr, store.rows()) if job.stage == "final" or _whole(job) else None
    if held is not None:  # of another sweep, or of that rate alone
        row = {key: value for key, value in held.items() if key not in ("sweep", "lr_at_end")}
        row |= {"id": job.id, "spec": job.spec(), "stage": job.stage}
        if job.stage == "sweep":
            row |= {"metrics": {}, "trained_by": held["id"]}
    else:
        same = [j for j in _sweeps(job, plan) if (j.seed, j.lr) == (job.seed, lr)] if sweep else []
        taken = next((j for j in same if is_kept(_work(store, j))), None)
        work = _work(store, taken or job)
        row = run_job(job, lr=lr, data=folder, work=work, keep=_keeps(job, plan), kept=kept)
        if taken:
            row["trained_by"] = taken.id
            row["seconds"]["all"] = round(row["seconds"]["all"] + row["seconds"]["train"], 3)
    if sweep:
        row["sweep"] = sweep
        row["lr_at_end"] = lr in (min(job.method.lrs), max(job.method.lrs))
    return row


def _keeps(job: Job, plan: list[Job]) -> bool:
    """Whether what a sweep's run trains may be what a final run would train again, and is small enough to be kept.

    AdaLoRA's pruned ranks are of another shape than those that it starts with.
    """
    if job.stage == "final" or not _whole(job) or job.method.method in ("full", "adalora"):
        return False
    return any(j.stage == "final" and j.seed == job.seed and _like(j) == _like(job) for j in plan)


def _clear(job: Job, plan: list[Job], store: Store) -> None:
    """Remove what a run that is done needs no more, a final one also what its seed's sweep kept for it."""
    if _keeps(job, plan):
        return tidy(_work(store, job))
    sweeps = _sweeps(job, plan) if job.stage == "final" else []
    for over in (job, *(j for j in sweeps if j.seed == job.seed)):
        shutil.rmtree(_work(store, over), ignore_errors=True)


def _whole(job: Job) -> bool:
    """Whether the runs of the job's sweep take all steps, as final ones do."""
    return job.settings["sweep"]["steps"] is None


def _work(store: Store, job: Job) -> Path:
    return store.directory / "work" / job.id


def _sweeps(job: Job, plan: list[Job]) -> list[Job]:
    return [j for j in plan if j.stage == "sweep" and _like(j) == _like(job)]


def _like(job: Job) -> tuple[tuple[str, ...], tuple[str, ...], str]:
    """What the runs that share a sweep have in common."""
    return job.tasks, job.train_tasks, job.method.name


def _ready(job: Job, plan: list[Job], store: Store) -> bool:
    return job.stage == "sweep" or all(store.has(sweep.id) for sweep in _sweeps(job, plan))


def _blocked(job: Job, plan: list[Job], failed: dict[str, str]) -> bool:
    """A final run whose sweep failed cannot be done."""
    return job.stage == "final" and any(sweep.id in failed for sweep in _sweeps(job, plan))


def _others(todo: list[Job], claims: Claims) -> bool:
    return bool({job.id for job in todo} & set(claims.live())) or bool(claims.live())


def _left(plan: list[Job], store: Store) -> int:
    return sum(not store.has(job.id) for job in plan)


def _record_failure(store: Store, job: Job) -> None:
    place = store.directory / "failures"
    place.mkdir(exist_ok=True)
    (place / f"{job.id}.txt").write_text(traceback.format_exc(), encoding="utf-8")
