"""bf16 where it is slower than fp32 is said, by training and by a grid."""

from pathlib import Path

import pytest
import torch
from tests.bench.places import tiny_data, tiny_encoder

from reftune.bench import load_grid, run_grid
from reftune.train import precision
from reftune.train.precision import slow_bf16


def test_only_a_cpu_without_the_instructions_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_has_bf16", lambda: False)
    assert "no instructions for it" in (slow_bf16("cpu") or "")
    assert slow_bf16("cuda") is None
    monkeypatch.setattr(precision, "_has_bf16", lambda: True)
    assert slow_bf16("cpu") is None


@pytest.mark.parametrize("has", [True, False])
def test_the_cpu_itself_is_asked(has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has, raising=False)
    assert precision._has_bf16() == has
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert precision._has_bf16()  # a build that cannot tell


@pytest.mark.parametrize(("bf16", "has"), [(True, False), (True, True), (False, False)])
def test_a_grid_says_it_once(bf16: bool, has: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_has_bf16", lambda: has)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    content = {"suite": "glue", "tasks": ["rte"], "model": str(tiny_encoder(tmp_path / "encoder")), "methods": ["red"]}
    grid = load_grid(content | {"seeds": [0, 1], "train": {"steps": 1, "batch_size": 4, "bf16": bf16}})
    said: list[str] = []
    run_grid(grid, tmp_path / "out", data=str(tiny_data(tmp_path / "data")), say=said.append, minutes=0)
    assert (
        [line for line in said if "no instructions" in line] == said == ([slow_bf16("cpu")] if bf16 and not has else [])
    )
