"""What recipes of the training tests have in common: six sums, a tiny chat model, two rows a step."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_chat import save_tiny


def write_sums(path: Path, factor: int = 2) -> None:
    """Six rows, each the answer to a sum, times factor / 2."""
    rows = [{"prompt": f"{i}+{i}", "completion": str(factor * i)} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def base_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A recipe's keys but how long it trains."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    write_sums(tmp_path / "data.jsonl")
    return {
        "model.name": str(save_tiny(tmp_path / "base")),
        "data.train": str(tmp_path / "data.jsonl"),
        "output_dir": str(tmp_path / "out"),
        "r": 2,
        "positions": "l2",
        "batch_size": 2,
        "lr": 1e-2,
    }
