"""The one trainer of all methods: cut off and resumed to the bit, and what runs share."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import tiny_llama
from tests.tiny_chat import tiny_tokenizer

from reftune.bench.grid import BudgetSection
from reftune.bench.methods import METHODS, attach, resolve
from reftune.bench.training import fit
from reftune.data import ReftDataCollator
from reftune.train.reuse import MemoryStore


@pytest.mark.parametrize("method", [m for m in METHODS if m != "base"])
def test_a_cut_off_run_goes_on_from_its_checkpoint(method: str, tmp_path: Path) -> None:
    rows = [{"input_ids": [i, 3, 60, 61], "labels": [-100, -100, 60, 61]} for i in range(2, 42)]
    budget = BudgetSection(steps=8, batch_size=4, checkpoint_steps=3)

    class Cut(ReftDataCollator):
        calls = 0

        def __call__(self, features: Any) -> Any:
            Cut.calls += 1
            if Cut.calls == 6:
                raise KeyboardInterrupt
            return super().__call__(features)

    def model() -> Any:
        torch.manual_seed(0)
        return attach(tiny_llama(), resolve(method, "commonsense", {"positions": "l1"}), head=[], steps=8)[0]

    def train(made: Any, collator: Any, work: str) -> Any:
        return fit(made, rows, collator, budget, lr=1e-2, seed=1, causal=True, work=tmp_path / work)

    whole = model()
    assert not train(whole, ReftDataCollator(tiny_tokenizer()), "whole").resumed
    with pytest.raises(KeyboardInterrupt):
        train(model(), Cut(tiny_tokenizer()), "cut")
    (tmp_path / "cut" / "checkpoint-6").mkdir(parents=True)  # killed while it was written
    resumed = model()
    # AdaLoRA prunes its ranks, and PEFT does not read such factors back: it starts anew
    assert train(resumed, ReftDataCollator(tiny_tokenizer()), "cut").resumed == (method != "adalora")
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_runs_share_what_is_kept(tmp_path: Path) -> None:
    rows = [{"input_ids": [i, 3, 4, 60, 61], "labels": [-100] * 3 + [60, 61]} for i in range(2, 10)]
    kept = MemoryStore(10**8)
    for seed, epochs, computed in ((0, 1.0, 8), (1, 2.0, 8)):
        torch.manual_seed(0)
        model, _ = attach(tiny_llama(), resolve("loreft", "commonsense", {"positions": "l1"}), head=[], steps=2)
        budget = BudgetSection(epochs=epochs, batch_size=4)
        collator = ReftDataCollator(tiny_tokenizer())
        made = fit(model, rows, collator, budget, lr=1e-2, seed=seed, causal=True, work=tmp_path, kept=kept)
        assert made.reuse is not None
        assert "keys and values before the first edited token are computed once" in made.reuse
        assert kept.computed == computed
    assert kept.found >= 16
