"""Grids: YAML to jobs, ids that change with anything that matters, mistakes said."""

from pathlib import Path
from typing import Any

import pytest

from reftune.bench.grid import Grid, jobs, load_grid, presets

SMALL: dict[str, Any] = {"suite": "glue", "tasks": ["rte", "cola"], "methods": ["loreft", "lora"], "seeds": [0, 1]}
RECIPES = sorted((Path(__file__).parents[2] / "recipes" / "bench").glob("*.yaml"))


def test_a_grid_is_sweeps_first_then_seed_by_seed() -> None:
    plan = jobs(load_grid(SMALL))
    sweeps, finals = plan[:12], plan[12:]
    assert {job.stage for job in sweeps} == {"sweep"}
    assert [(j.seed, j.task, j.method.name) for j in finals] == [
        (s, t, m) for s in (0, 1) for t in ("rte", "cola") for m in ("loreft", "lora")
    ]
    assert len({job.id for job in plan}) == len(plan)
    assert {job.lr for job in finals} == {None}


def test_text_suites_train_once_on_all_tasks_and_one_rate_needs_no_sweep() -> None:
    methods = [{"method": "loreft", "lrs": [9e-4]}, "base"]
    (loreft, base) = jobs(load_grid({"suite": "instruct", "methods": methods, "seeds": [5]}))
    assert loreft.tasks == ("alpaca", "ultrafeedback_sft", "ultrafeedback", "alpaca_eval")
    assert loreft.train_tasks == ("alpaca", "ultrafeedback_sft", "ultrafeedback")
    assert (loreft.stage, loreft.lr, base.lr) == ("final", 9e-4, None)
    single = jobs(load_grid({"suite": "commonsense", "tasks": ["piqa", "boolq"], "joint": False, "methods": ["base"]}))
    assert {(job.tasks, job.train_tasks) for job in single} == {(("piqa",),) * 2, (("boolq",),) * 2}


def test_an_id_changes_with_what_decides_the_result() -> None:
    def one(overrides: dict[str, Any]) -> str:
        return jobs(load_grid(SMALL, overrides))[-1].id

    same = one({})
    assert same == one({"seeds": [1]})
    changes = ({"rows.train": 5}, {"train.steps": 5}, {"model": "x"}, {"scoring.batch_size": 1}, {"sweep.steps": 9})
    assert len({same, *(one(change) for change in changes)}) == 1 + len(changes)


def test_settings_by_task_and_by_method() -> None:
    grid = load_grid(
        SMALL
        | {
            "methods": ["loreft", {"name": "lora-long", "method": "lora", "train": {"epochs": 9}}],
            "reft": {"r": 2},
            "per_task": {"rte": {"positions": "f7", "lrs": [5e-4], "train": {"epochs": 7, "warmup": 0.5}}},
        }
    )
    finals = {(j.task, j.method.name): j for j in jobs(grid) if j.stage == "final" and j.seed == 0}
    rte, cola, lora = finals["rte", "loreft"], finals["cola", "loreft"], finals["rte", "lora-long"]
    assert (rte.method.options["positions"], rte.method.options["r"], rte.lr) == ("f7", 2, 5e-4)
    assert (rte.settings["train"]["epochs"], rte.settings["train"]["warmup"]) == (7.0, 0.5)
    assert (cola.method.options["positions"], cola.lr) == ("f3", None)
    assert "positions" not in lora.method.options
    assert lora.settings["train"]["epochs"] == 9.0


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"sute": "glue"}, "Unknown key 'sute'.*Did you mean suite"),
        ({"train": {"step": 3}}, r"Unknown key 'train\.step'.*Did you mean steps"),
        ({"train": {"steps": "many"}}, "train.steps must be a whole number or null"),
        ({"suite": "super"}, "no suite 'super'.*Known: commonsense"),
        ({"suite": "glue", "tasks": ["piqa"]}, "piqa is of the suite commonsense"),
        ({"suite": "glue", "methods": ["base"]}, "use probe instead"),
        ({"methods": []}, "at least one seed, one method"),
        ({"methods": ["lora", {"name": "lora", "method": "lora", "r": 2}]}, "a `name` of its own"),
        ({"per_task": {"rte": {"train": {"lr": 1}}}, "tasks": ["rte"]}, "Unknown key 'per_task.train.lr'"),
    ],
)
def test_mistakes(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load_grid(wrong)


def test_a_missing_file_names_the_presets(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="paper/commonsense"):
        load_grid("nowhere.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ValueError, match="must be keys with values"):
        load_grid(tmp_path / "list.yaml")


@pytest.mark.parametrize("source", [*presets(), *map(str, RECIPES)], ids=lambda s: Path(s).stem)
def test_every_grid_that_comes_with_the_project_loads(source: str) -> None:
    grid = load_grid(source)
    assert isinstance(grid, Grid)
    assert jobs(grid)


def test_the_papers_presets_are_all_there() -> None:
    wanted = ("arithmetic", "commonsense", "glue-base", "glue-large", "ultrafeedback")
    assert presets() == [f"paper/{name}" for name in wanted]
    base = {j.task: j for j in jobs(load_grid("paper/glue-base"))}
    assert (base["cola"].lr, base["cola"].settings["train"]["epochs"]) == (4e-4, 60.0)
    assert base["qnli"].method.options["positions"] == "f11"
