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


def test_runs_keep_their_names_where_dropout_stays() -> None:
    """Grids begun before there was such a key go on."""
    plain, without = (
        jobs(load_grid(SMALL, {"train.disable_dropout": value}))[-1].spec()["train"] for value in (False, True)
    )
    assert "disable_dropout" not in plain
    assert without == plain | {"disable_dropout": True}


def test_a_wider_sweep_keeps_the_runs_that_are_done() -> None:
    def plan(*lrs: float) -> list[tuple[str, str]]:
        return [(job.stage, job.id) for job in jobs(load_grid(SMALL, {"methods": [{"method": "lora", "lrs": lrs}]}))]

    narrow, wide = set(plan(1e-3, 3e-3)), set(plan(3e-4, 1e-3, 3e-3))
    assert {stage for stage, _ in narrow & wide} == {"sweep"}
    assert len(narrow & wide) == 4  # two tasks, two rates
    assert len(wide - narrow) == 2 + 4  # the new rate, and the final runs, for their rate may be another now


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
        ({"per_task": {"rte": {"train": 5}}, "tasks": ["rte"]}, "per_task.rte.train must be keys"),
        ({"per_task": {"rte": 5}, "tasks": ["rte"]}, "per_task.rte must be keys with values"),
        ({"per_task": {"rte": {"posit": "f1"}}, "tasks": ["rte"]}, r"loreft \(rte\).*posit"),
        ({"per_task": {"rte": {"lrs": [-1]}}, "tasks": ["rte"]}, "per_task.rte must be positive numbers"),
        ({"per_task": {"rte": {"r": 2}}, "tasks": ["cola"]}, "rte, which is not among the grid's tasks"),
        ({"suite": "commonsense", "per_task": {"boolq": {"r": 2}}}, "one training serves them all"),
        ({"methods": [5]}, "A method is a name or"),
        ({"methods": [{"method": "lora", "train": 5}]}, "train of lora must be keys"),
        ({"methods": [{"method": "lora", "train": {"steps": 0}}]}, r"train of lora.steps must be at least 1"),
        ({"methods": [{"method": "loreft", "rank": 4}]}, "The method loreft .*has no setting 'rank'"),
        ({"methods": [{"method": "lora", "rank": 3}]}, "The method lora .*has no setting 'rank'"),
        ({"methods": ["adalora"], "train": {"steps": 1}}, "The method adalora .*two at least"),
        ({"reft": {"positions": "zz"}}, "The method loreft .*zz"),
        ({"train": {"batch_size": 0}}, "train.batch_size must be at least 1, but is 0"),
        ({"train": {"epochs": 0}}, "train.epochs must be above 0, but is 0"),
        ({"rows": {"train": -5}}, "rows.train must be at least 1"),
        ({"train": {"lr_scheduler": "zigzag"}}, "lr_scheduler 'zigzag' is none of linear"),
        ({"train": {"head_lr": 0}}, "train.head_lr must be above 0, but is 0"),
        ({"suite": "arithmetic", "train": {"head_lr": 1e-3}}, "a classifier's head, and a language model has none"),
        ({"suite": "arithmetic", "train": {"keep": "best"}}, "keep: best is for GLUE"),
        ({"dtype": "float99"}, "no dtype of torch"),
        ({"attention": "eagre"}, "attention 'eagre' is none of eager, "),
        ({"scoring": {"generation": {"beams": 4}}}, "beams is no argument of transformers' generate"),
        ({"scoring": {"generation": {"max_new_tokens": 9}}}, "generation.max_new_tokens: set scoring.max_new_tokens"),
        ({"scoring": {"generation": {"pad_token_id": 0}}}, "generation.pad_token_id: the tokenizer's is taken"),
        ({"scoring": {"generation": {"num_return_sequences": 2}}}, "generation.num_return_sequences: a prompt has one"),
        ({"scoring": {"generation": {"return_dict_in_generate": True}}}, "generation.return_dict_in_generate: answers"),
        ({"suite": "arithmetic", "tasks": ["aqua"], "template": "cloze"}, "commonsense tasks and .*; aqua has none"),
        ({"suite": "glue", "tasks": ["rte", "stsb"], "template": "cloze"}, "GLUE's classes; stsb has none"),
        (
            {"tasks": ["rte"], "template": "cloze", "model": "minilm-l6"},
            "is an encoder, which classifies; answers in words",
        ),
        ({"suite": "arithmetic", "model": "minilm-l6"}, "is an encoder, which classifies; answers in words"),
        ({"tasks": ["rte"], "template": "cloze", "train": {"keep": "best"}}, "keep: best is for GLUE's classifiers"),
        (
            {"suite": "arithmetic", "methods": [{"method": "lora", "train": {"keep": "best"}}]},
            "train of lora.keep: best",
        ),
        ({"methods": [{"method": "lora", "train": {"lr_scheduler": "zigzag"}}]}, "train of lora.lr_scheduler 'zigzag'"),
        ({"tasks": ["rte"], "template": "cloze", "train": {"head_lr": 1e-3}}, "a language model has none"),
        ({"suite": "commonsense", "template": "cloze", "scoring": {"loglikelihood": False}}, "set loglikelihood: true"),
        ({"train": {"train_sampling_strategy": "sequential"}}, "train_sampling_strategy"),
        ({"seeds": ["a"]}, "seeds must be a list of whole numbers"),
        ({"seeds": [1, 1]}, "seeds names something twice"),
        ({"tasks": ["rte", "rte"]}, "tasks names something twice"),
        ({"tasks": ["rte"], "train_tasks": ["mnli"]}, "rte: a classifier is trained on the task that it is scored on"),
        ({"tasks": ["rte", "wnli"], "joint": True}, r"rte\+wnli: a classifier is trained on the task"),
        ({"suite": "instruct", "tasks": ["alpaca_eval"]}, "alpaca_eval: no task with rows to train on"),
        ({"suite": "instruct", "tasks": ["alpaca", "alpaca_eval"], "joint": False}, "alpaca_eval: no task with rows"),
    ],
)
def test_mistakes(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load_grid(wrong)


def test_glue_as_a_cloze_is_a_language_models() -> None:
    content = {"suite": "glue", "tasks": ["rte", "cola"], "methods": ["loreft", "lora", "base"], "seeds": [0]}
    found = jobs(load_grid(content | {"template": "cloze"}))
    assert {job.classifies for job in found} == {False}
    assert {job.task for job in found} == {"rte", "cola"}  # one training a task, as always on GLUE
    loreft = next(job.method for job in found if job.method.method == "loreft")
    assert (loreft.options["positions"], loreft.options["r"]) == ("f7+l7", 8)
    assert all(job.classifies for job in jobs(load_grid(content | {"methods": ["loreft"]})))


def test_what_is_trained_on_one_task_and_scored_on_others_is_for_language_models() -> None:
    content = {"suite": "glue", "template": "cloze", "tasks": ["rte", "wnli"], "methods": ["loreft"], "seeds": [0]}
    assert {job.train_tasks for job in jobs(load_grid(content | {"train_tasks": ["mnli"]}))} == {("mnli",)}
    assert {job.task for job in jobs(load_grid(content | {"joint": True}))} == {"rte+wnli"}
    assert jobs(load_grid({"suite": "instruct", "tasks": ["alpaca_eval"], "methods": ["base"]}))


def test_a_section_cannot_be_set_below_a_value() -> None:
    with pytest.raises(ValueError, match=r"train.steps.x cannot be set: steps has no keys, it is 3"):
        load_grid(SMALL | {"train": {"steps": 3}}, {"train.steps.x": 1})


def test_the_untouched_base_runs_once_unless_its_answers_are_sampled() -> None:
    content = {"suite": "arithmetic", "methods": [{"method": "loreft", "lrs": [9e-4]}, "base"], "seeds": [3, 4]}
    assert [(j.method.name, j.seed) for j in jobs(load_grid(content))] == [("loreft", 3), ("base", 3), ("loreft", 4)]
    sampled = jobs(load_grid(content | {"scoring": {"generation": {"do_sample": True}}}))
    assert [j.seed for j in sampled if j.method.name == "base"] == [3, 4]


def test_a_baseline_that_is_added_to_a_preset_has_its_rates_chosen() -> None:
    plan = jobs(load_grid("paper/glue-base", {"methods": ["loreft", "lora", "full"]}))
    swept = {(job.method.name, job.task) for job in plan if job.stage == "sweep"}
    assert {name for name, _ in swept} == {"lora", "full"}
    assert len(swept) == 2 * 8
    finals = {(job.method.name, job.task): job for job in plan if job.stage == "final"}
    assert finals["loreft", "rte"].lr == 9e-4
    assert finals["lora", "rte"].lr is None
    assert finals["lora", "rte"].settings["train"]["epochs"] == 60.0  # the budget is one for all
    text = jobs(load_grid("paper/commonsense", {"methods": ["loreft", "lora"]}))
    assert {job.method.name for job in text if job.stage == "sweep"} == {"loreft", "lora"}
    assert {job.settings["sweep"]["steps"] for job in text} == {300}


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
