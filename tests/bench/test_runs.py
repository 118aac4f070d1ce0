"""One run: what the keys of a budget do to it, and what its row says; grids are in test_runner."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.bench.places import TRAIN, glue, silent

from reftune.bench import load_grid, run_grid
from reftune.bench.report import report
from reftune.bench.runs import this_device
from reftune.bench.store import read_rows


def test_rows_that_are_too_long_are_counted(places: dict[str, str], tmp_path: Path) -> None:
    content = {"suite": "instruct", "tasks": ["alpaca"], "model": places["causal"], "seeds": [0]}
    content |= {"methods": [{"method": "loreft", "lrs": [1e-2]}], "scoring": {"max_new_tokens": 2}}
    run_grid(load_grid(content | {"train": TRAIN}), tmp_path / "all", data=places["data"], say=silent)
    (row,) = read_rows(tmp_path / "all")
    assert (row["rows"]["alpaca"]["left_out"], row["rows"]["alpaca"]["cut"]) == (0, 0)
    short = TRAIN | {"max_length": 160}  # the prompts with an input are longer than that
    run_grid(load_grid(content | {"train": short}), tmp_path / "some", data=places["data"], say=silent)
    (row,) = read_rows(tmp_path / "some")
    assert 0 < row["rows"]["alpaca"]["left_out"] < row["rows"]["alpaca"]["train"]
    outcome = run_grid(
        load_grid(content | {"train": TRAIN | {"max_length": 8}}), tmp_path / "none", data=places["data"], say=silent
    )
    assert "No training row is left: every prompt has 8 tokens or more" in next(iter(outcome.failed.values()))


def test_the_best_epoch_is_kept_and_the_score_after_each_is_told(places: dict[str, str], tmp_path: Path) -> None:
    def value(keep: str) -> Any:
        methods = [{"method": "loreft", "lrs": [3e-2]}]
        train = {"epochs": 3, "batch_size": 4, "keep": keep}
        run_grid(
            glue(places, methods=methods, seeds=[0], train=train), tmp_path / keep, data=places["data"], say=silent
        )
        return read_rows(tmp_path / keep)[0]

    last, kept = value("last"), value("best")
    assert kept["selection"]["score"] >= last["selection"]["score"]
    assert kept["train_loss"] == last["train_loss"]
    assert len(kept["selection"]["epochs"]) == 3
    assert max(kept["selection"]["epochs"]) == kept["selection"]["score"]
    assert "epochs" not in last["selection"]


def test_the_heads_rate_is_every_methods_but_the_probes(places: dict[str, str], tmp_path: Path) -> None:
    methods = [{"method": method, "lrs": [1e-2]} for method in ("loreft", "probe")]

    def losses(**train: Any) -> dict[str, float]:
        directory = tmp_path / str(train)
        run_grid(
            glue(places, methods=methods, seeds=[0], train=TRAIN | train), directory, data=places["data"], say=silent
        )
        return {row["method"]: row["train_loss"] for row in read_rows(directory)}

    one, own = losses(), losses(head_lr=1e-4)
    assert one["probe"] == own["probe"]
    assert one["loreft"] != own["loreft"]


def test_without_dropout_a_run_draws_nothing(places: dict[str, str], tmp_path: Path, monkeypatch) -> None:
    drawn = []
    dropout = torch.nn.functional.dropout

    def counted(states: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        drawn.append(p if training else 0.0)
        return dropout(states, p, training, inplace)

    monkeypatch.setattr(torch.nn.functional, "dropout", counted)
    methods = [{"method": "loreft", "lrs": [1e-2]}]
    losses = []
    for disabled in (False, True):
        drawn.clear()
        grid = glue(places, methods=methods, seeds=[0], train=TRAIN | {"disable_dropout": disabled})
        run_grid(grid, tmp_path / str(disabled), data=places["data"], say=silent)
        (row,) = read_rows(tmp_path / str(disabled))
        losses.append(row["train_loss"])
        assert drawn
        assert any(drawn) is not disabled
        assert ("without dropout" in report([row])) is disabled
    assert losses[0] != losses[1]


@pytest.mark.parametrize("suite", ["glue", "instruct"])
def test_the_attention_of_a_grid_is_the_models(suite: str, places: dict[str, str], tmp_path: Path) -> None:
    used: list[str] = []

    def see(module: Any, *_: Any) -> None:
        used.append(getattr(getattr(module, "config", None), "_attn_implementation", ""))

    model, task = (places["encoder"], "rte") if suite == "glue" else (places["causal"], "alpaca")
    content = {"suite": suite, "tasks": [task], "model": model, "methods": [{"method": "loreft", "lrs": [1e-2]}]}
    budget = {"train": TRAIN | {"steps": 1}, "seeds": [0], "attention": "eager"}
    handle = torch.nn.modules.module.register_module_forward_pre_hook(see)
    try:
        outcome = run_grid(load_grid(content | budget), tmp_path, data=places["data"], say=silent)
    finally:
        handle.remove()
    assert (outcome.finished, outcome.failed) == (1, {})
    assert set(used) - {""} == {"eager"}


def test_a_row_names_the_accelerator_where_its_module_tells_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(get_device_name=lambda: "NVIDIA X"))
    assert this_device() == {"device": "cuda", "accelerator": "NVIDIA X"}
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace())
    assert this_device() == {"device": "cuda"}
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert this_device() == {"device": "cpu"}
