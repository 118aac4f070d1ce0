"""`orthogonal_to`: a new adapter neither reads nor writes what others write, trained, saved and loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from conftest import tiny_llama
from integration.tiny_training import losses, trainer
from reftune import ReftConfig, get_reft_model
from reftune.interventions import orthonormality_error
from reftune.interventions.rows import LowRankIntervention
from reftune.tuner import ReftLayer

IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])
LIMIT = {torch.float32: 1e-6, torch.float64: 1e-12}


def config(**options: Any) -> ReftConfig:
    return ReftConfig(**{"r": 2, "layers": [0, 1], "positions": "f1+l2", "task_type": "CAUSAL_LM", **options})


def trained(directory: Path, dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    """A model with the trained adapter "style"."""
    torch.manual_seed(1)
    model = get_reft_model(tiny_llama(layers=3, dtype=dtype), config(**options), adapter_name="style")
    trainer(model, directory, max_steps=6, learning_rate=0.1).train()
    return model


def with_tone(model: PeftModel, **options: Any) -> PeftModel:
    torch.manual_seed(2)
    model.add_adapter("tone", config(orthogonal_to=["style"], **options))
    model.set_adapter("tone")
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def layers(model: PeftModel) -> list[ReftLayer]:
    return [module for module in model.modules() if isinstance(module, ReftLayer)]


def assert_apart(model: PeftModel, dtype: torch.dtype = torch.float32) -> None:
    """At every shared site: R ⟂ what style writes and reads, W ⟂ what it writes; neither edit changes the other."""
    logits(model)
    shared = 0
    for layer in layers(model):
        for new in layer.interventions("tone"):
            for old in layer.interventions("style"):
                shared += 1
                with torch.no_grad():
                    for a, b in ((new.rows(), old.rows()), (new.rows(), old.W), (new.W, old.rows())):
                        size = (a.norm(dim=1, keepdim=True) * b.norm(dim=1)).clamp(min=1)
                        assert ((a @ b.mT).abs() <= LIMIT[dtype] * size).all()
                    h = torch.randn(30, new.embed_dim, dtype=dtype)
                    new.eval(), old.eval()
                    for first, second in ((new, old), (old, new)):
                        before, after = second.edit(h), second.edit(h + first.edit(h))
                        size = max(float(before.abs().max()), float(first.edit(h).abs().max()), 1.0)
                        assert (after - before).abs().max() <= 10 * LIMIT[dtype] * size
                    assert (new.edit(h) @ old.rows().mT).abs().max() <= 10 * LIMIT[dtype] * size
    assert shared > 0


# -- trained ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_apart_to_machine_precision_through_hard_training(tmp_path: Path, dtype: torch.dtype) -> None:
    model = with_tone(trained(tmp_path, dtype), r=3)
    assert_apart(model, dtype)
    style = {n: p.detach().clone() for n, p in model.named_parameters() if ".style." in n}
    start = logits(model)
    trainer(model, tmp_path, max_steps=12, learning_rate=0.3, weight_decay=0.3).train()
    assert (logits(model) - start).abs().max() > 1e-2
    assert_apart(model, dtype)
    assert all(torch.equal(p, style[n]) for n, p in model.named_parameters() if ".style." in n)
    model.save_pretrained(tmp_path / "saved")
    rows = [
        v for k, v in load_file(tmp_path / "saved" / "tone" / "adapter_model.safetensors").items() if k.endswith(".R")
    ]
    assert len(rows) == 4
    assert all(orthonormality_error(r) < 1e-5 for r in rows)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_llama(layers=3, dtype=dtype)))


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    kinds=st.tuples(st.sampled_from(["loreft", "noreft", "direft", "nodireft"]), st.sampled_from(["loreft", "direft"])),
    ranks=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    shape=st.sampled_from(["plain", "subspaces", "nested"]),
    seed=st.integers(0, 99),
)
def test_of_any_kind_and_rank(kinds: tuple[str, str], ranks: tuple[int, int], shape: str, seed: int) -> None:
    torch.manual_seed(seed)
    old = config(intervention=kinds[0], r=ranks[0], init_weights=False)
    model = get_reft_model(tiny_llama(layers=3, dtype=torch.float64), old, adapter_name="style")
    more: dict[str, Any] = {"plain": {}, "subspaces": {"subspaces": {"a": ranks[1]}}, "nested": {"nested": True}}[shape]
    model.add_adapter(
        "tone", config(orthogonal_to="style", intervention=kinds[1], r=ranks[1], init_weights=False, **more)
    )
    for layer in layers(model):
        for new in layer.interventions("tone"):
            writes, reads = new.directions()
            for other in layer.interventions("style"):
                their_writes, their_reads = other.directions()
                for a, b in ((writes, their_writes), (writes, their_reads), (reads, their_writes)):
                    assert (a @ b.mT).abs().max() <= 1e-12 * (a.norm() * b.norm()).clamp(min=1)


@pytest.mark.parametrize("kind", ["loreft", "noreft", "direft", "nodireft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_kind_trains_apart(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The sites' W lie in one piece of memory, so that putting one right had forbidden the backward of another."""
    model = with_tone(trained(tmp_path, dtype), intervention=kind)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if ".tone." in n}
    trainer(model, tmp_path, max_steps=4, learning_rate=0.1).train()
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert_apart(model, dtype)


@pytest.mark.parametrize("kind", ["loreft", "noreft", "direft", "nodireft"])
@pytest.mark.parametrize("frozen", ["stack", "subspaces"])
def test_every_kind_trains_apart_beside_a_frozen_part(kind: str, frozen: str, tmp_path: Path) -> None:
    parts: dict[str, Any] = {"stack": [1, 1]} if frozen == "stack" else {"subspaces": {"a": 1, "b": 1}}
    model = with_tone(trained(tmp_path), intervention=kind, init_weights=False, **parts)
    model.train_only(**({"stage": 0} if frozen == "stack" else {"subspaces": "a"}))
    learned = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer(model, tmp_path, max_steps=4, learning_rate=0.1).train()
    assert all(not torch.equal(p, learned[n]) for n, p in model.named_parameters() if n in learned)
    logits(model)
    for layer in layers(model):
        for new, old in zip(layer.interventions("tone"), layer.interventions("style"), strict=True):
            (writes, reads), (their_writes, their_reads) = new.directions(), old.directions()
            for a, b in ((writes, their_writes), (writes, their_reads), (reads, their_writes)):
                assert (a @ b.mT).abs().max() <= 1e-5 * (a.norm() * b.norm()).clamp(min=1)


@pytest.mark.parametrize("kind", ["loreft", "noreft", "direft", "nodireft"])
def test_two_forward_passes_before_one_backward(kind: str, tmp_path: Path) -> None:
    """The second puts R and W right again, in place, while the first still needs them."""
    model = with_tone(trained(tmp_path), intervention=kind, init_weights=False).train()
    gradients = []
    for together in (True, False):
        model.zero_grad()
        rows = [{"input_ids": ids, "labels": ids.masked_fill(torch.arange(5) < 3, -100)} for ids in IDS.split(1)]
        if together:
            torch.stack([model(**row).loss for row in rows]).sum().backward()
        else:
            for row in rows:
                model(**row).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_rows_are_put_right_once_for_inference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_tone(trained(tmp_path))
    calls: list[Any] = []
    put = LowRankIntervention.put_right_
    monkeypatch.setattr(LowRankIntervention, "put_right_", lambda self, *args: (calls.append(self), put(self, *args)))
    logits(model)
    once = len(calls)
    assert once == 4
    logits(model)  # eval() forgets them: they may have been written through `.data`
    calls.clear()
    with torch.no_grad():
        for _ in range(3):
            model(IDS)
    assert not calls


def test_together_they_do_at_a_site_what_each_does_alone(tmp_path: Path) -> None:
    """One layer, one term: h + Δstyle(h) + Δtone(h), in either order."""
    model = trained(tmp_path, torch.float64, layers=[2], positions="l1")
    with_tone(model, layers=[2], positions="l1")
    trainer(model, tmp_path, max_steps=8, learning_rate=0.1).train()
    model.set_adapter(["style", "tone"])
    one = logits(model)
    model.set_adapter(["tone", "style"])
    torch.testing.assert_close(logits(model), one, atol=1e-6, rtol=1e-6)


def test_resumed_is_uninterrupted(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "max_steps": 7, "weight_decay": 0.1}
    whole = trainer(with_tone(trained(tmp_path)), tmp_path / "whole", **options)
    whole.train()
    resumed = trainer(with_tone(trained(tmp_path)), tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(resumed)[-4:] == losses(whole)[-4:]
    expected = dict(whole.model.named_parameters())
    for name, value in resumed.model.named_parameters():
        assert torch.equal(value, expected[name]), name


# -- saved and loaded -------------------------------------------------------------------------------------------------


def test_it_loads_alone_and_trains_on_within_its_complement(tmp_path: Path) -> None:
    model = with_tone(trained(tmp_path))
    trainer(model, tmp_path, max_steps=4, learning_rate=0.1).train()
    expected = logits(model)
    model.save_pretrained(tmp_path / "saved")

    alone = PeftModel.from_pretrained(tiny_llama(layers=3), tmp_path / "saved" / "tone", is_trainable=True)
    assert alone.peft_config["default"].orthogonal_to == ["style"]
    assert torch.equal(logits(alone), expected)
    trainer(alone, tmp_path, max_steps=8, learning_rate=0.3, weight_decay=0.3).train()
    logits(alone)
    alone.save_pretrained(tmp_path / "alone")

    both = PeftModel.from_pretrained(tiny_llama(layers=3), tmp_path / "saved" / "style", adapter_name="style")
    both.load_adapter(tmp_path / "alone", "tone")
    both.set_adapter(["style", "tone"])
    assert_apart(both)


def test_the_config_without_the_weights_does_not_train(tmp_path: Path) -> None:
    with_tone(trained(tmp_path)).save_pretrained(tmp_path / "saved")
    config = ReftConfig.from_pretrained(str(tmp_path / "saved" / "tone"))
    config.inference_mode = False
    model = get_reft_model(tiny_llama(layers=3), config)
    with pytest.raises(RuntimeError, match="without its weights"):
        trainer(model, tmp_path, max_steps=1).train()


def test_what_is_stayed_out_of_is_as_it_was_then(tmp_path: Path) -> None:
    """Other adapters that train on later are not followed: the documented limit."""
    model = with_tone(trained(tmp_path))
    before = [i.others_write.clone() for layer in layers(model) for i in layer.interventions("tone")]
    model.set_adapter("style")
    trainer(model, tmp_path, max_steps=4, learning_rate=0.3).train()
    after = [i.others_write for layer in layers(model) for i in layer.interventions("tone")]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


# -- errors -----------------------------------------------------------------------------------------------------------


def adding(model: PeftModel, **options: Any) -> None:
    before = [(n, p.requires_grad) for n, p in model.named_parameters()]
    try:
        model.add_adapter("tone", config(**options))
    finally:
        assert [(n, p.requires_grad) for n, p in model.named_parameters()] == before
        assert list(model.peft_config) == ["style"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"orthogonal_to": ["stlye"]}, "the adapter 'stlye', which this model does not have; it has 'style'"),
        ({"orthogonal_to": ["tone"]}, "the adapter 'tone', which this model does not have"),
        ({"orthogonal_to": ["style"], "layers": [2]}, "it edits none of the places that 'tone' edits"),
        ({"orthogonal_to": ["style"], "component": "mlp_output"}, "it edits none of the places"),
        (
            {"orthogonal_to": ["style"], "r": 25},
            r"At 'model\.layers\.0\.output': There is no room for 25 more rows.* 8 of the 32 dimensions.*r=24",
        ),
        ({"orthogonal_to": ["style"], "intervention": "red"}, "needs an intervention with rows of its own"),
    ],
)
def test_what_cannot_be_is_an_error_that_leaves_the_model_alone(options: dict, message: str) -> None:
    model = get_reft_model(tiny_llama(layers=3), config(init_weights=False), adapter_name="style")
    with pytest.raises(ValueError, match=message):
        adding(model, **options)
    logits(model)


def test_others_that_edit_every_direction_leave_no_complement() -> None:
    model = get_reft_model(tiny_llama(layers=3), config(intervention="red"), adapter_name="style")
    with pytest.raises(ValueError, match="RedIntervention reads or writes every direction"):
        adding(model, orthogonal_to=["style"])


def test_a_first_adapter_has_no_others() -> None:
    base = tiny_llama(layers=3)
    with pytest.raises(ValueError, match="which this model does not have; it has none"):
        get_reft_model(base, config(orthogonal_to=["style"]))
    assert torch.equal(logits(base), logits(tiny_llama(layers=3)))
