"""The one trainer of all methods: cut off and resumed to the bit, and what runs share."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.bench.places import tiny_encoder
from tests.conftest import tiny_llama
from tests.tiny_chat import tiny_tokenizer

from reftune.bench.classify import BestEpoch, Collator
from reftune.bench.grid import BudgetSection
from reftune.bench.methods import METHODS, attach, resolve
from reftune.bench.models import head_modules, load_classifier
from reftune.bench.order import ByLength
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
        return fit(made, rows, collator, budget, lr=1e-2, seed=1, head=[], work=tmp_path / work)

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


def test_a_cut_between_a_checkpoint_and_the_score_of_its_epoch_loses_no_epoch(tmp_path: Path) -> None:
    rows = [{"input_ids": [i, 3, 60], "labels": i % 2} for i in range(4, 20)]
    encoder = tiny_encoder(tmp_path / "encoder")

    def train(work: str, cut: int | None = None) -> tuple[Any, list[float]]:
        """The model of the best epoch and the scores; cut off when that many are known."""
        model, tokenizer = load_classifier(str(encoder), 2, 0, None, None)
        model, _ = attach(model, resolve("loreft", "glue", {}), head=head_modules(model), steps=12)

        def score(made: Any) -> float:
            if cut is not None and (tmp_path / work / f"checkpoint-{4 * (cut + 1)}").is_dir():
                raise KeyboardInterrupt
            return float(made.eval()(input_ids=torch.tensor([[5, 3, 60]])).logits[0, 1].detach())

        best = BestEpoch(score, tmp_path / work)
        budget = BudgetSection(epochs=3, batch_size=4, checkpoint_steps=4)
        how: Any = {"lr": 1e-2, "seed": 1, "head": ["pooler", "classifier"], "work": tmp_path / work}
        fit(model, rows, Collator(tokenizer), budget, **how, more_callbacks=[best])
        return model, best.restore(model)

    whole, expected = train("whole")
    assert len(expected) == 3
    for cut in (0, 1):
        with pytest.raises(KeyboardInterrupt):
            train(f"cut{cut}", cut)
        model, scores = train(f"cut{cut}")
        assert scores == expected
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("method", ["loreft", "lora", "full"])
def test_the_head_has_a_rate_of_its_own(method: str, tmp_path: Path) -> None:
    encoder = tiny_encoder(tmp_path / "encoder")
    rows = [{"input_ids": [i, 3, 60], "labels": i % 2} for i in range(4, 20)]

    def trained(lr: float, head_lr: float) -> tuple[bool, bool]:
        """Whether the head and the rest have moved."""
        model, tokenizer = load_classifier(str(encoder), 2, 0, None, None)
        head = head_modules(model)
        assert set(head) == {"pooler", "classifier"}
        model, _ = attach(model, resolve(method, "glue", {}), head=head, steps=3)
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        budget = BudgetSection(steps=3, batch_size=4, head_lr=head_lr)
        fit(model, rows, Collator(tokenizer), budget, lr=lr, seed=1, head=head, work=tmp_path)
        moved = {name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])}
        in_head = {name for name in moved if set(name.split(".")) & set(head)}
        return bool(in_head), bool(moved - in_head)

    assert trained(0.0, 1e-2) == (True, False)
    assert trained(1e-2, 0.0) == (False, True)


def test_runs_share_what_is_kept(tmp_path: Path) -> None:
    rows = [{"input_ids": [i, 3, 4, 60, 61], "labels": [-100] * 3 + [60, 61]} for i in range(2, 10)]
    kept = MemoryStore(10**8)
    for seed, epochs, computed in ((0, 1.0, 8), (1, 2.0, 8)):
        torch.manual_seed(0)
        model, _ = attach(tiny_llama(), resolve("loreft", "commonsense", {"positions": "l1"}), head=[], steps=2)
        budget = BudgetSection(epochs=epochs, batch_size=4)
        collator = ReftDataCollator(tiny_tokenizer())
        made = fit(model, rows, collator, budget, lr=1e-2, seed=seed, head=[], work=tmp_path, kept=kept)
        assert made.reuse is not None
        assert "keys and values before the first edited token are computed once" in made.reuse
        assert kept.computed == computed
    assert kept.found >= 16


def test_rows_grouped_by_length_are_each_once_in_batches_of_one_length() -> None:
    lengths = [1 + (7 * i) % 40 for i in range(1003)]
    sampler = ByLength(lengths, 8, seed=3)
    order = list(sampler)
    assert sorted(order) == list(range(1003))
    assert len(sampler) == 1003
    batches = [[lengths[i] for i in order[k : k + 8]] for k in range(0, 1003, 8)]
    assert max(max(batch) - min(batch) for batch in batches) <= 3
    tops = [max(batch) for batch in batches]
    assert tops != sorted(tops)
    assert tops[:50] != sorted(tops[:50], reverse=True)  # long and short ones mixed
    assert order == list(ByLength(lengths, 8, seed=3)) != list(ByLength(lengths, 8, seed=4))
    sampler.set_epoch(1)
    assert order != list(sampler)
    assert list(ByLength([5, 6], 8, seed=0)) in ([0, 1], [1, 0])


def test_rows_grouped_by_length_are_the_same_for_every_method_and_after_a_cut(tmp_path: Path) -> None:
    rows = [{"input_ids": [5] * (i % 9) + [3, 60, 61], "labels": [-100] * (i % 9 + 1) + [60, 61]} for i in range(40)]
    budget = BudgetSection(
        steps=24, batch_size=4, checkpoint_steps=9, lr_scheduler="constant", train_sampling_strategy="group_by_length"
    )

    class Seen(ReftDataCollator):
        def __init__(self, cut: int | None = None) -> None:
            super().__init__(tiny_tokenizer())
            self.lengths: list[list[int]] = []
            self.cut = cut

        def __call__(self, features: Any) -> Any:
            self.lengths.append([len(row["input_ids"]) for row in features])
            if len(self.lengths) == self.cut:
                raise KeyboardInterrupt
            return super().__call__(features)

    def train(method: str, work: str, cut: int | None = None) -> tuple[Any, list[list[int]]]:
        torch.manual_seed(0)
        model = attach(tiny_llama(), resolve(method, "commonsense", {"positions": "l1"}), head=[], steps=24)[0]
        seen = Seen(cut)
        with contextlib.suppress(KeyboardInterrupt):
            fit(model, rows, seen, budget, lr=1e-2, seed=1, head=[], work=tmp_path / work)
        return model, seen.lengths

    whole, seen = train("loreft", "whole")
    assert all(max(lengths) - min(lengths) <= 2 for lengths in seen)
    assert seen[:10] != seen[10:20]  # the second epoch has an order of its own
    assert train("lora", "other")[1] == seen
    train("loreft", "cut", cut=23)  # in the third epoch; goes on from the second
    for a, b in zip(whole.parameters(), train("loreft", "cut")[0].parameters(), strict=True):
        assert torch.equal(a, b)
