"""Reports of made-up results: means, spreads, plots, and what is said beside them."""

from pathlib import Path
from typing import Any

import pytest

from reftune.bench.plots import drawn, plot, plot_all
from reftune.bench.report import cell, report, summarise


def row(method: str, task: str, seed: int, metrics: dict[str, dict[str, float]], **more: Any) -> dict[str, Any]:
    train = {"steps": 10, "epochs": 3.0, "batch_size": 8, "gradient_accumulation_steps": 2}
    content: dict[str, Any] = {
        "id": f"{method}-{task}-{seed}",
        "stage": "final",
        "suite": "glue",
        "task": task,
        "method": method,
        "seed": seed,
        "lr": 1e-3,
        "trainable": 4614 if method == "loreft" else 1_000_000,
        "head": 770,
        "total": 10**7,
        "metrics": metrics,
        "selection": {"loss": 1.0},
        "steps": 10,
        "sweep": [{"lr": 1e-3}],
        "seconds": {"train": 10.0, "step": 0.5, "all": 12.0},
        "rows": {name: {"train": 100, "select": 10, "test": 20, "digest": "x"} for name in metrics},
        "spec": {"model": "minilm-l6", "suite": "glue", "train": train},
        "versions": {"torch": "2.13", "numpy": "2"},
    }
    return content | more


def rows() -> list[dict[str, Any]]:
    made = []
    for seed, gain in ((0, 0.0), (1, 0.02)):
        made.append(row("loreft", "rte", seed, {"rte": {"accuracy": 0.6 + gain, "loss": 0.7}}, lr_at_end=True))
        made.append(row("loreft", "cola", seed, {"cola": {"matthews": 0.4 + gain, "accuracy": 0.8}}))
        made.append(row("lora", "rte", seed, {"rte": {"accuracy": 0.5, "loss": 0.8}}))
        made.append(row("lora", "cola", seed, {"cola": {"matthews": 0.3, "accuracy": 0.7}}))
    return made


def test_the_table_has_means_spreads_parameters_and_averages() -> None:
    text = report(rows(), "GLUE")
    assert "| method | parameters | cola (matthews) | rte (accuracy) | average | s a step | s to train |" in text
    assert "| loreft | 4,614 | 41.0 ± 1.4 | 61.0 ± 1.4 | 51.0 ± 1.4 | 0.50 | 10 |" in text
    assert "| lora | 1,000,000 | 30.0 ± 0.0 | 50.0 ± 0.0 | 40.0 ± 0.0 | 0.50 | 10 |" in text
    assert "| cola | accuracy | 80.0 ± 0.0 | 70.0 ± 0.0 |" in text
    assert "| rte | loss | 0.700 ± 0.000 | 0.800 ± 0.000 |" in text
    assert "10 steps of 16 rows" in text
    assert "cola 100/10/20" in text
    assert "770 numbers" in text
    assert "0.001†" in text
    assert "\n\n† the best of the sweep lies at its end" in text


def test_heads_of_several_sizes_are_all_told() -> None:
    made = rows()
    for one in made:
        one["head"] = 385 if one["task"] == "rte" else 770
    assert "train the head too (385 to 770 numbers, by task), not counted" in report(made)


def test_values_of_every_seed_are_shown_where_there_are_several() -> None:
    text = report([r for r in rows() if (r["method"], r["task"], r["seed"]) != ("lora", "cola", 1)])
    assert "## Seeds\n\n| task | method | seed 0 | seed 1 |" in text
    assert "| average | loreft | 50.0 | 52.0 |" in text
    assert "| average | lora" not in text  # of one seed alone it has both tasks
    losses = report(
        [row("lora", "alpaca", seed, {"alpaca": {"loss": 1.8512 + seed}}, suite="instruct") for seed in (0, 3)]
    )
    assert "| alpaca (loss) | lora | 1.8512 | 4.8512 |" in losses
    assert "## Seeds" not in report([r for r in rows() if r["seed"] == 0])


def test_tasks_stand_alone_where_one_seed_alone_has_them_all() -> None:
    text = report([r for r in rows() if (r["task"], r["seed"]) != ("cola", 1)])
    assert "| loreft | 4,614 | 40.0 | 61.0 ± 1.4 | 50.0 |" in text
    assert "An average is over the seeds that have all tasks." in text
    assert "| rte (accuracy) | loreft | 60.0 | 62.0 |" in text
    assert "| average | loreft" not in text
    assert "An average is" not in report(rows())


def test_what_is_said_of_budgets_and_rates_is_true_of_all_rows() -> None:
    assert "learning rate chosen on the selection rows. " in report(rows())
    assert "Versions: torch 2.13." in report(rows())
    longer = {"model": "minilm-l6", "suite": "glue", "train": {**rows()[0]["spec"]["train"], "steps": 20}}
    mixed = [r | ({"spec": longer} if r["task"] == "cola" else {"sweep": None}) for r in rows()]
    text = report(mixed)
    assert "Every method: 10 steps of 16 rows or 20 steps of 16 rows" in text
    assert "learning rate chosen on the selection rows where several were tried." in text
    given = report([r | {"sweep": None, "lr_at_end": False} for r in rows()])
    assert "learning rate given." in given
    assert "†" not in given


def test_a_heads_own_rate_is_shown() -> None:
    made = rows()
    for one in made:
        if one["method"] == "loreft":
            one["spec"]["train"]["head_lr"] = 5e-4
    text = report(made)
    assert "| loreft | 0.001†, head 0.0005 | 0.001, head 0.0005 |" in text
    assert "| lora | 0.001 | 0.001 |" in text


def test_scores_after_every_epoch_are_shown_where_the_best_was_kept() -> None:
    assert "## Epochs" not in report(rows())
    made = rows()
    kept = {
        ("loreft", 0): [0.1, 0.2, 0.4],
        ("loreft", 1): [0.3, 0.4, 0.2],
        ("lora", 0): [0.5, 0.5],
        ("lora", 1): [0.1, 0.5],
    }
    for one in made:
        if one["task"] == "cola":
            one["selection"]["epochs"] = kept[one["method"], one["seed"]]
    text = report(made)
    assert "| method | task | 1 | 2 | 3 | last is best |" in text
    assert "| loreft | cola | 20.0 | 30.0 | 30.0 | 1 of 2 |" in text
    assert "| lora | cola | 30.0 | 50.0 | – | 1 of 2 |" in text  # of equals the earliest is kept
    assert "| cola | 20.0 | 30.0 |" not in report([one | {"stage": "sweep"} for one in made] + rows())


def test_runs_of_different_grids_are_not_averaged() -> None:
    other = {"model": "minilm-l6", "suite": "glue", "train": {**rows()[0]["spec"]["train"], "steps": 30, "new": 1}}
    with pytest.raises(ValueError, match=r"loreft has runs of different settings on rte.*train.steps 10 and 30"):
        report([*rows(), row("loreft", "rte", 2, {"rte": {"accuracy": 0.6}}, spec=other)])
    seen = {"rte": {"train": 100, "select": 10, "test": 20, "digest": "y"}}
    with pytest.raises(ValueError, match="red had other rows of rte than another method with seed 1"):
        report([*rows(), row("red", "rte", 1, {"rte": {"accuracy": 0.6}}, rows=seen)])


def test_runs_trained_on_other_tasks_are_not_averaged() -> None:
    """A joint grid that was given one task more has trained all of its runs on other rows."""

    def joint(seed: int, trained: list[str], *evaluated: str) -> dict[str, Any]:
        made = row("loreft", "+".join(evaluated), seed, {n: {"accuracy": 0.5} for n in evaluated}, suite="commonsense")
        return made | {"spec": made["spec"] | {"tasks": list(evaluated), "train_tasks": trained}}

    few, more = ["boolq"], ["boolq", "piqa"]
    for other in (joint(1, more, "boolq", "piqa"), joint(1, more, "boolq")):
        with pytest.raises(ValueError, match=r"on boolq here: train_tasks \['boolq'\] and \['boolq', 'piqa'\]"):
            report([joint(0, few, "boolq"), other])
    assert "| 50.0 ± 0.0 |" in report([joint(0, more, "boolq"), joint(1, more, "boolq", "piqa")])


@pytest.mark.parametrize(
    ("more", "key", "without", "named"),
    [
        ({"train": {"disable_dropout": True}}, "train.disable_dropout", "False", "True"),
        ({"method": {"init_rows": 32}}, "method.init_rows", "0", "32"),
        ({"method": {"options": {"r": 2}}}, "method.options.r", "None", "2"),
        ({"scoring": {"judge": {"reward_model": "x"}}}, "scoring.judge.reward_model", "None", "'x'"),
    ],
)
def test_a_setting_that_one_row_alone_names_tells_runs_apart(
    more: dict[str, Any], key: str, without: str, named: str
) -> None:
    spec = rows()[0]["spec"]
    spec |= {section: spec.get(section, {}) | values for section, values in more.items()}
    odd = row("loreft", "rte", 2, {"rte": {"accuracy": 0.6}}, spec=spec)
    with pytest.raises(ValueError, match=f"different settings on rte.*{key} {without} and {named}"):
        report([*rows(), odd])
    with pytest.raises(ValueError, match=f"different settings on rte.*{key} {named} and {without}"):
        report([odd, *rows()])


def test_a_setting_at_its_default_is_the_same_named_or_not() -> None:
    spec = rows()[0]["spec"]
    newer = spec | {
        "train": spec["train"] | {"disable_dropout": False},
        "template": "paper",
        "method": {"init_rows": 0},
    }
    assert "| 61.0 ± 1.0 |" in report([*rows(), row("loreft", "rte", 2, {"rte": {"accuracy": 0.61}}, spec=newer)])


def test_the_methods_that_reused_the_frozen_base_are_named() -> None:
    assert "computed once" not in report(rows())
    assert "in all runs was computed once for loreft." in report(
        [*rows(), rows()[0] | {"seed": 2, "reuse": "Reuse: x"}]
    )


def test_on_a_cpu_the_time_to_train_is_cpu_time() -> None:
    seconds = {"train": 99.0, "train_cpu": 7.0, "step": 0.5, "all": 12.0}
    for device, expected in (("cpu", 7.0), ("cuda", 99.0)):
        made = row("loreft", "rte", 0, {"rte": {"accuracy": 0.6}}, machine={"device": device}, seconds=seconds)
        assert summarise([made])[0].seconds == [expected]


def test_a_run_that_went_on_from_a_checkpoint_has_no_time() -> None:
    """It knows how long its last part took."""
    found = rows()
    found[0] |= {"resumed": True, "seconds": {"train": 1.0, "step": 0.5, "all": 2.0}}
    text = report(found)
    assert "| 51.0 ± 1.4 | 0.50 | 10 |" in text
    assert "The time of runs that were cut off and went on is left out." in text
    text = report([one | {"resumed": one["method"] == "lora"} for one in rows()])
    assert "| 40.0 ± 0.0 | 0.50 | – |" in text
    assert "cut off" not in report(rows())


def test_seeds_without_a_finite_value_are_named() -> None:
    found = [row("lora", "alpaca", seed, {"alpaca": {"loss": 1.8}}, suite="instruct") for seed in (0, 1)]
    broken = row("lora", "alpaca", 2, {"alpaca": {"loss": None}}, suite="instruct")
    text = report([*found, broken])
    assert "| lora | 1,000,000 | 1.800 ± 0.000 |" in text
    assert "Without a finite value, and so in no mean: lora on alpaca (loss), seed 2." in text
    assert "finite" not in report(found)


def test_names_may_hold_what_divides_cells() -> None:
    assert r"| l1\|l2 | 1,000,000 |" in report([row("l1|l2", "rte", 0, {"rte": {"accuracy": 0.6}})])


def test_an_accelerator_is_named() -> None:
    assert "accelerator" not in report(rows()).lower()
    gpu = {"device": "cuda", "accelerator": "NVIDIA H100"}
    (first, *others) = rows()
    assert "Accelerator: NVIDIA H100 (1 of 8 runs)." in report([first | {"machine": gpu}, *others])
    assert "Accelerator: NVIDIA H100." in report([one | {"machine": gpu} for one in rows()])


def test_all_versions_are_named() -> None:
    (first, *others) = rows()
    text = report([first | {"versions": {"torch": "2.11", "numpy": "1"}}, *others])
    assert "Versions: torch 2.11 and 2.13." in text


def test_cells() -> None:
    assert cell([0.5]) == "50.0"
    assert cell([]) == "–"
    assert cell([1.0, 2.0], share=False) == "1.500 ± 0.707"


def test_only_seeds_with_every_task_are_averaged_and_sweeps_are_no_results() -> None:
    some = rows()[:-1]  # lora has no cola at seed 1
    (_, lora) = summarise([*some, row("dora", "rte", 0, {}, stage="sweep")])
    assert lora.method == "lora"
    assert lora.by_seed([("rte", "accuracy"), ("cola", "matthews")]) == {0: 0.4}
    assert "No final run is done yet; 1 sweep" in report([row("dora", "rte", 0, {}, stage="sweep")])


def test_losses_and_shares_are_not_averaged_and_suites_stand_apart() -> None:
    metrics = {"alpaca": {"loss": 1.5}, "ultrafeedback": {"preference": 0.6, "margin": 0.1, "loss": 1.2}}
    text = report([row("loreft", "alpaca+ultrafeedback", 0, metrics, suite="instruct")])
    assert "average" not in text
    assert "alpaca (loss) | ultrafeedback (preference)" in text
    assert "| all tasks |" in text
    both = report([*rows(), row("loreft", "alpaca", 0, metrics, suite="instruct")])
    assert "# Results: glue on minilm-l6" in both
    assert "# Results: instruct on minilm-l6" in both


def test_plots_are_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    probe = row("probe", "rte", 0, {"rte": {"accuracy": 0.5}, "cola": {"matthews": 0.0}}, trainable=0)
    made = plot([*rows(), probe], tmp_path / "plots", "glue")
    assert [path.name for path in made] == ["glue-parameters.png", "glue-time.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in made)
    scored = {"alpaca": {"loss": 1.5}, "ultrafeedback": {"loss": 1.2, "preference": 0.5}}
    loss = row("loreft", "alpaca+ultrafeedback", 0, scored, suite="instruct")
    assert len(plot_all([*rows(), loss], tmp_path)) == 2  # one method alone is no plot
    assert len(plot_all([*rows(), loss, loss | {"method": "lora"}], tmp_path)) == 4
    assert len(plot([one | {"resumed": True} for one in rows()], tmp_path / "resumed")) == 2  # whose times are unknown
    assert drawn(summarise(rows())) == [("cola", "matthews"), ("rte", "accuracy")]
    assert drawn(summarise([loss])) == [("alpaca", "loss"), ("ultrafeedback", "loss")]
    with pytest.raises(ValueError, match="nothing to plot"):
        plot([row("loreft", "alpaca", 0, {"alpaca": {}}, suite="instruct")], tmp_path)


def test_every_model_has_plots_of_its_own(tmp_path: Path) -> None:
    """Also two of one name in different folders; a link in Markdown ends at a space."""
    pytest.importorskip("matplotlib")
    made = []
    for model in ("a/my model", "b/my model", "c"):
        made += [one | {"spec": one["spec"] | {"model": model}} for one in rows()]
    names = [path.name for path in plot_all(made, tmp_path)]
    assert names[::2] == [f"glue-{name}-parameters.png" for name in ("my-model", "my-model-2", "c")]
    assert sorted(names) == sorted(path.name for path in tmp_path.iterdir())


def test_rows_left_out_or_cut_are_counted() -> None:
    assert "Of the training rows" not in report(rows())
    seen = {"rte": {"train": 100, "select": 10, "test": 20, "digest": "x", "left_out": 3, "cut": 0}}
    text = report([row("loreft", "rte", 0, {"rte": {"accuracy": 0.6}}, rows=seen)])
    assert "Of the training rows, left out for a prompt that is too long: rte 3. " in text
    seen["rte"]["cut"] = 7
    text = report([row("loreft", "rte", 0, {"rte": {"accuracy": 0.6}}, rows=seen)])
    assert "too long: rte 3; answers cut: rte 7. " in text


def test_the_precision_is_named_where_methods_differ_in_it() -> None:
    made = rows()
    for one in made:
        one["spec"]["train"]["bf16"] = True
    assert "Trained in bf16 autocast. " in report(made)
    for one in made:
        one["spec"]["train"]["bf16"] = (one["method"], one["task"]) != ("lora", "rte")
    assert "Trained in bf16 autocast, but float32 for lora (rte). " in report(made)
    for one in made:
        one["spec"]["train"]["bf16"] = False
    assert "Trained in float32. " in report(made)
    gpu = {"device": "cuda"}
    assert "Trained in the checkpoint's dtype. " in report([one | {"machine": gpu} for one in made])
    for one in made:
        one["spec"]["dtype"] = "bfloat16"
    assert "Trained in bfloat16. " in report([one | {"machine": gpu} for one in made])


def sweep(method: str, task: str, lr: float, loss: float | None, by: str = "loss", **more: Any) -> dict[str, Any]:
    made = row(method, task, 0, {}, stage="sweep", lr=lr, selection={by: loss}, **more)
    return made | {"spec": made["spec"] | {"sweep": {"by": by}}}


def test_every_rate_that_was_tried_is_shown_with_the_best_in_bold() -> None:
    found = [sweep("lora", "rte", 2e-3, 0.5), sweep("lora", "rte", 1e-3, 0.71234), sweep("lora", "rte", 4e-3, None)]
    found += [sweep("red", "cola", 1e-3, 0.9), sweep("red", "cola", 5e-4, float("nan"))]
    text = report(rows() + found)
    assert "Selection rows, loss, after 10 steps, seed 0; the best in bold." in text
    assert "| lora | 0.001: 0.7123, 0.002: **0.5000**, 0.004: broke down | – |" in text
    assert "| red | – | 0.0005: broke down, 0.001: **0.9000** |" in text
    assert "Selection rows" not in report(rows())


def test_a_rate_that_broke_down_is_not_the_best_by_score() -> None:
    """nan answers are all of one class, which may be the larger one."""
    broken = sweep("lora", "rte", 1e-2, 0.6, "score")
    broken["selection"]["loss"] = None
    assert "| lora | 0.001: **50.0**, 0.01: broke down |" in report([sweep("lora", "rte", 1e-3, 0.5, "score"), broken])


def test_where_only_the_base_is_final_the_sweeps_say_what_is_trained() -> None:
    base = row("base", "rte", 0, {"rte": {"accuracy": 0.5}}, steps=0, lr=None, sweep=None)
    text = report([base, sweep("lora", "rte", 2e-3, 0.5)])
    assert "Every method: 10 steps of 16 rows" in text
    assert "learning rate chosen on the selection rows." in text
    assert "no training" in report([base])


def test_sweeps_alone_are_shown_too() -> None:
    text = report([sweep("lora", "rte", 1e-3, 0.25, "score"), sweep("lora", "rte", 2e-3, 0.5, "score")])
    assert "No final run is done yet; 2 sweep runs are." in text
    assert "Selection rows, score, after" in text
    assert "| lora | 0.001: 25.0, 0.002: **50.0** |" in text
