"""What a sweep trained is its seed's final run: taken over bit for bit, trained once, and cleared away."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.bench.places import tiny_data, tiny_encoder, tiny_grid

import reftune
from reftune.bench import jobs, load_grid, run_grid, runner, runs
from reftune.bench.store import read_rows
from reftune.bench.trained import is_kept, keep, numbers, put_back, take, tidy
from reftune.bench.training import Fit

METHODS = [
    {"method": "loreft", "positions": "all", "lrs": [1e-3, 1e-2]},
    {"method": "lora", "r": 2, "lrs": [1e-3, 1e-2]},
    {"name": "lora by rows", "method": "lora", "r": 2, "init_rows": 4, "lrs": [1e-3, 1e-2]},
    {"method": "nodireft", "positions": "all", "init_rows": 4, "lrs": [1e-3, 1e-2]},
    {"method": "full", "lrs": [1e-5, 1e-4]},
    {"method": "adalora", "lrs": [1e-3, 1e-2]},
]
ANEW = {"full", "adalora"}


class Counting(torch.nn.Module):
    """A layer with a buffer that training moves, beside a frozen one."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.learned, self.frozen = torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 2)
        self.frozen.requires_grad_(False)
        for tensor in (*self.learned.parameters(), *self.learned.buffers(), *self.frozen.parameters()):
            tensor.data.fill_(value)


def test_what_training_changes_is_put_back_and_nothing_else(tmp_path: Path) -> None:
    one, other = Counting(1), Counting(2)
    assert set(numbers(one)) == {
        f"learned.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    kept = numbers(one)
    one.learned.weight.data.fill_(9)  # the copies are copies
    put_back(other, kept)
    assert all(bool((tensor == 1).all()) for tensor in numbers(other).values())
    assert bool((other.frozen.weight == 2).all())

    assert not is_kept(tmp_path)
    (tmp_path / "checkpoint-3").mkdir()
    keep(other, Fit(3, 0.5, 1.0, 2.0, 0.1, False, "words"), tmp_path)
    tidy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["trained.pt"]
    assert is_kept(tmp_path)
    fresh = Counting(3)
    assert take(fresh, tmp_path) == Fit(3, 0.5, 1.0, 2.0, 0.1, False, "words")
    assert not fresh.training
    assert bool((fresh.learned.running_var == 1).all())


@pytest.mark.parametrize("suite", ["glue", "instruct"])
def test_the_final_run_of_the_sweeps_seed_is_the_sweeps_run(
    suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, content = tiny_grid(tmp_path, suite)
    train = {"epochs": 2, "batch_size": 4, "checkpoint_steps": 2, **({"keep": "best"} if suite == "glue" else {})}
    methods, seeds = (METHODS, [1, 0]) if suite == "glue" else (METHODS[:1], [0])
    content |= {"methods": methods, "seeds": seeds, "train": train}
    grid = load_grid(content)
    fitted: list[Path] = []  # seed 1 comes first, while what the sweep of seed 0 trained still lies there
    fit = runs.fit

    def counted(*args: Any, work: Path, **more: Any) -> Fit:
        fitted.append(work)
        return fit(*args, work=work, **more)

    started: list[Any] = []
    start = reftune.initialize_reft_weights
    monkeypatch.setattr(reftune, "initialize_reft_weights", lambda *args: (started.append(args), start(*args)))
    monkeypatch.setattr(runs, "fit", counted)
    assert run_grid(grid, tmp_path / "once", data=data, say=lambda _: None).failed == {}
    begun = {work.name for work in fitted}
    assert len(begun) == len(fitted)
    anew = {job.id for job in jobs(grid) if job.stage == "sweep" or job.seed == 1 or job.method.method in ANEW}
    assert begun == anew
    assert len(started) == sum(job.id in anew and job.method.method == "nodireft" for job in jobs(grid))
    assert not list((tmp_path / "once" / "work").glob("*"))

    monkeypatch.setattr(runner, "is_kept", lambda work: False)
    again = load_grid(content | {"methods": methods[:4], "seeds": [0]})
    run_grid(again, tmp_path / "anew", data=data, say=lambda _: None)
    assert len(fitted) == len(begun) + len(jobs(again))
    once, trained = ({row["id"]: row for row in read_rows(tmp_path / name)} for name in ("once", "anew"))
    for job in jobs(again):
        a, b = once[job.id], trained[job.id]
        assert [a[key] for key in ("lr", "metrics", "selection", "steps", "train_loss")] == [
            b[key] for key in ("lr", "metrics", "selection", "steps", "train_loss")
        ]
        taken = a.get("trained_by")
        assert (taken is not None) == (job.id not in anew)
        if taken is not None:
            assert once[taken]["lr"] == a["lr"]
            assert once[taken]["seconds"]["train"] == a["seconds"]["train"] < a["seconds"]["all"]


def test_sweeps_that_are_shorter_or_of_another_seed_leave_nothing(tmp_path: Path) -> None:
    data, base = str(tiny_data(tmp_path / "data")), str(tiny_encoder(tmp_path / "base"))
    content = {"suite": "glue", "tasks": ["rte"], "model": base, "methods": [METHODS[0]], "seeds": [1]}
    for name, sweep in (("short", {"steps": 1, "seed": 1}), ("other", {"seed": 0})):
        grid = load_grid(content | {"train": {"steps": 2, "batch_size": 4}, "sweep": sweep})
        run_grid(grid, tmp_path / name, data=data, say=lambda _: None)
        assert not [row for row in read_rows(tmp_path / name) if "trained_by" in row]
        assert not list((tmp_path / name / "work").glob("*"))
