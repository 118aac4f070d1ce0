"""Wider sweeps: final runs are kept where the best rate stays the best, and no report mixes those of two sweeps."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.bench.places import tiny_data, tiny_encoder

from reftune.bench import load_grid, run_grid, runner
from reftune.bench.report import report, summarise
from reftune.bench.store import read_rows
from reftune.bench.wider import current, same_run


def row(lrs: tuple[float, ...], lr: float, seed: int = 0, **more: Any) -> dict[str, Any]:
    method = {"name": "loreft", "method": "loreft", "lrs": list(lrs), "options": {"r": more.pop("r", 1)}}
    made = {"id": f"{lrs}{seed}", "stage": "final", "task": "rte", "method": "loreft", "seed": seed, "lr": lr}
    return made | {"spec": {"method": method, "seed": seed, "lr": None if len(lrs) > 1 else lr}} | more


def test_the_wider_sweeps_final_runs_replace_the_narrowers_of_all_seeds() -> None:
    narrow = [row((1e-3, 3e-3), 3e-3, seed) for seed in (0, 1)]
    single = [row((3e-3,), 3e-3, seed) for seed in (0, 1)]
    wide = [row((1e-3, 3e-3, 1e-2), 1e-2, 0)]
    others = [row((1e-3, 3e-3), 3e-3, method="lora"), row((1e-3, 3e-3), 3e-3, r=2), row((1e-3,), 1e-3, stage="sweep")]
    assert current([*narrow, *single, *others, *wide]) == [*others, *wide]
    assert current([*narrow, *single]) == narrow
    across = [*narrow, row((1e-3, 1e-2), 1e-2)]  # neither holds the other: it is for the reader to choose
    assert current(across) == across


def test_the_same_run_is_of_the_same_rate_seed_and_settings() -> None:
    spec = row((1e-3, 3e-3, 1e-2), 3e-3)["spec"]
    kept = row((1e-3, 3e-3), 3e-3)
    others = [
        row((1e-3, 3e-3), 1e-3),
        row((1e-3, 3e-3), 3e-3, 1),
        row((1e-3, 3e-3), 3e-3, r=2),
        row((1e-3, 3e-3), 3e-3, stage="sweep"),
    ]
    assert same_run(spec, 3e-3, others) is None
    assert same_run(spec, 3e-3, [*others, kept]) == kept
    assert same_run(spec, 1e-2, [kept]) is None


Trained = list[tuple[str, int, float]]
Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Trained:
    """Stage, seed and rate of what is trained from here on; the best rate by loss is 0.01."""
    jobs: Trained = []
    run_job = runner.run_job

    def counted(job: Any, *, lr: float | None, **more: Any) -> dict[str, Any]:
        assert lr is not None
        jobs.append((job.stage, job.seed, lr))
        made = run_job(job, lr=lr, **more)
        made["selection"]["loss"] = abs(math.log10(lr / 1e-2))
        return made

    monkeypatch.setattr(runner, "run_job", counted)
    return jobs


@pytest.fixture
def run(tmp_path: Path, trained: Trained) -> Run:
    """Runs a grid of these rates, always in the same place, and returns all rows."""
    data, encoder = str(tiny_data(tmp_path / "data")), str(tiny_encoder(tmp_path / "encoder"))

    def run(*lrs: float, **sweep: Any) -> list[dict[str, Any]]:
        trained.clear()
        methods = [{"method": "loreft", "lrs": list(lrs)}]
        content = {"suite": "glue", "tasks": ["rte"], "model": encoder, "methods": methods, "seeds": [0, 1]}
        grid = load_grid(content | {"train": {"steps": 3, "batch_size": 4}, "sweep": sweep})
        assert run_grid(grid, tmp_path / "out", data=data, say=lambda _: None).left == 0
        return read_rows(tmp_path / "out")

    return run


def test_a_grid_widened_in_place_trains_what_is_new_alone(run: Run, trained: Trained) -> None:
    before = summarise(run(1e-4, 1e-3))[0]
    assert before.rates == {"rte": 1e-3}
    assert len(trained) == 2 + 2
    rows = run(1e-5, 1e-4, 1e-3)
    assert trained == [("sweep", 0, 1e-5)]
    after = summarise(rows)[0]
    assert (after.scores, after.rates) == (before.scores, before.rates)
    finals = [found for found in current(rows) if found["stage"] == "final"]
    assert [len(found["sweep"]) for found in finals] == [3, 3]
    assert [len(found["spec"]["method"]["lrs"]) for found in finals] == [3, 3]
    rows = run(1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    assert trained == [("sweep", 0, 1e-2), ("sweep", 0, 1e-1), ("final", 0, 1e-2), ("final", 1, 1e-2)]
    assert summarise(rows)[0].rates == {"rte": 1e-2}
    assert "| loreft | 0.01 |" in report(rows)
    assert len([found for found in rows if found["stage"] == "final"]) == 6  # nothing is lost


def test_a_rate_that_was_run_alone_is_not_run_again_in_a_sweep(run: Run, trained: Trained) -> None:
    alone = run(1e-2)
    assert trained == [("final", 0, 1e-2), ("final", 1, 1e-2)]
    rows = run(1e-3, 1e-2, by="score")
    assert [job for job in trained if job[2] == 1e-2] == []
    held = next(found for found in rows if found["stage"] == "sweep" and found["lr"] == 1e-2)
    before = next(found for found in alone if found["seed"] == 0)
    assert (held["selection"], held["trained_by"], held["metrics"]) == (before["selection"], before["id"], {})
    assert before["metrics"] != {}
    assert [len(found["sweep"]) for found in rows if "sweep" in found] == [2, 2]
    run(1e-4, 1e-2, by="score", steps=2)  # of fewer steps than a final run's
    assert ("sweep", 0, 1e-2) in trained
