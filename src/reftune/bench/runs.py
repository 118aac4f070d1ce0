"""One run: a job to a row of results. The two kinds are text tasks on causal models and GLUE on classifiers."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, set_seed

import reftune
from reftune.models import disable_dropout
from reftune.train.recipe_file import from_dict
from reftune.train.reuse import Store

from . import trained
from .data import Parts, load_rows, split
from .grid import BudgetSection, Job, RowsSection, ScoringSection
from .methods import Counts, attach, is_reft
from .tasks import task
from .training import Fit, fit, total_steps

NOTHING = Fit(0, float("nan"), 0.0, 0.0, 0.0, False)


@dataclasses.dataclass
class Setup:
    """A job's sections read back, and its rows."""

    job: Job
    lr: float
    rows: RowsSection
    train: BudgetSection
    scoring: ScoringSection
    parts: dict[str, Parts]
    work: Path
    keep: bool = False  # in `work`, what is trained
    data: Path | None = None
    kept: Store | None = None
    lengths: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)  # task: rows left out, answers cut ...
    revision: str | None = None  # of the base's weights, where the hub tells
    room: int | None = None  # the tokens that the model can read

    def fit_in(self, room: int | None) -> None:
        """Train on no more tokens than the model can read, and score no more."""
        self.room = room
        if room is not None:
            self.train.max_length = min(self.train.max_length, room)


def run_job(
    job: Job, *, lr: float | None, data: Path | None, work: Path, keep: bool = False, kept: Store | None = None
) -> dict[str, Any]:
    """Train and evaluate; returns the row.

    `lr` is the rate to use, `work` a directory for checkpoints, `kept` what runs share of the frozen base. `keep`
    leaves in `work` what was trained; a final run that finds that in its `work` trains nothing (see `trained`).
    """
    started = time.time()
    s = job.settings
    rows, train = from_dict(RowsSection, s["rows"]), from_dict(BudgetSection, s["train"])
    if job.stage == "sweep" and s["sweep"]["steps"] is not None:
        train.steps = s["sweep"]["steps"]
    names = dict.fromkeys((*job.train_tasks, *job.tasks))
    cut = job.seed if rows.split_seed is None else rows.split_seed
    parts = {
        name: split(
            task(name), load_rows(task(name), data), seed=cut, train=rows.train, select=rows.select, test=rows.test
        )
        for name in names
    }
    scoring = from_dict(ScoringSection, s["scoring"])
    setup = Setup(job, lr or 0.0, rows, train, scoring, parts, work, keep, data, kept)
    if job.classifies:
        from .classify import run
    else:
        from .causal import run
    counts, fitted, metrics, selection, seconds = run(setup)
    return _row(setup, counts, fitted, metrics, selection, seconds, started)


def train_method(
    setup: Setup,
    model: Any,
    rows: list[Any],
    collator: Any,
    head: list[str],
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[Any, Counts, Fit]:
    """Attach the method and train it, unless it is the untouched base."""
    job = setup.job
    setup.revision = getattr(model.config, "_commit_hash", None)
    steps = total_steps(len(rows), setup.train)
    if setup.train.disable_dropout:
        disable_dropout(model)
    set_seed(job.seed)  # so that what a method draws does not depend on what was drawn before
    kept, method = job.stage == "final" and trained.is_kept(setup.work), job.method
    if kept and is_reft(method.method):  # its start is in what is kept; LoRA's is in the base's weights, too
        method = dataclasses.replace(method, init_rows=0)
    before = time.perf_counter(), time.process_time()
    batches = _batches(rows[: method.init_rows], setup.train.batch_size, collator, model)
    model, counts = attach(model, method, head=head, steps=steps, batches=batches)
    after = time.perf_counter(), time.process_time()
    if job.method.method == "base":
        return model.eval(), counts, NOTHING
    if kept:
        return model, counts, trained.take(model, setup.work)
    fitted = fit(
        model,
        rows,
        collator,
        setup.train,
        lr=setup.lr,
        seed=job.seed,
        head=head,
        work=setup.work,
        kept=setup.kept,
        more_callbacks=callbacks,
    )
    if method.init_rows:  # what its start takes is a part of training
        seconds, cpu = fitted.seconds + after[0] - before[0], fitted.cpu_seconds + after[1] - before[1]
        fitted = dataclasses.replace(fitted, seconds=seconds, cpu_seconds=cpu)
    if setup.keep:
        trained.keep(model, fitted, setup.work)
    return model, counts, fitted


def _batches(rows: list[Any], size: int, collator: Any, model: Any) -> list[dict[str, Any]]:
    """Rows in batches on the model's device."""
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [{name: value.to(model.device) for name, value in collator(part).items()} for part in parts]


def _row(
    setup: Setup,
    counts: Counts,
    fitted: Fit,
    metrics: dict[str, dict[str, float]],
    selection: dict[str, Any],
    seconds: dict[str, float],
    started: float,
) -> dict[str, Any]:
    job = setup.job
    return {
        "id": job.id,
        "stage": job.stage,
        "suite": job.suite,
        "task": job.task,
        "method": job.method.name,
        "seed": job.seed,
        "lr": setup.lr or None,
        "trainable": counts.trainable,
        "head": counts.head,
        "total": counts.total,
        "metrics": metrics,
        "selection": selection,
        "steps": fitted.steps,
        "train_loss": fitted.loss if fitted.steps else None,
        "resumed": fitted.resumed,
        "reuse": fitted.reuse,
        "seconds": {
            "train": round(fitted.seconds, 3),
            "train_cpu": round(fitted.cpu_seconds, 3),
            "step": round(fitted.step_seconds, 4),
            **{name: round(value, 3) for name, value in seconds.items()},
            "all": round(time.time() - started, 3),
        },
        "rows": {
            name: {
                "train": len(p.train),
                "select": len(p.select),
                "test": len(p.test),
                "digest": p.digest,
                **setup.lengths.get(name, {}),
            }
            for name, p in setup.parts.items()
        },
        "data": "hub" if setup.data is None else str(setup.data),
        "revision": setup.revision,
        "spec": job.spec(),
        "versions": versions(),
        "machine": {"host": platform.node(), "threads": _threads(), **this_device()},
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
    }


PACKAGES = ("reftune", "torch", "transformers", "peft", "tokenizers", "datasets", "numpy", "scipy", "scikit-learn")


def versions() -> dict[str, str]:
    """Of python and of the packages that a result depends on; reftune's commit, where it runs from a checkout."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    found.setdefault("reftune", reftune.__version__)
    return found | ({"commit": commit} if (commit := _commit()) else {})


@functools.cache
def _commit() -> str | None:
    place = Path(reftune.__file__).parents[2]
    if not (place / ".git").exists():
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = subprocess.run(
            ["git", "-C", str(place), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=9
        )
        return asked.stdout.strip() or None
    return None


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def this_device() -> dict[str, str]:
    """The type of the device that runs take, and an accelerator's name where its module tells one."""
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is None:
        return {"device": "cpu"}
    name = getattr(torch.get_device_module(found), "get_device_name", None)
    return {"device": found.type} | ({"accelerator": name()} if name else {})
