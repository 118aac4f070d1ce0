"""A step of an optimiser that counts no versions, as torch's fused ones, is seen by the next pass, in whatever mode."""

from typing import Any

import pytest
import torch

from conftest import tiny_llama
from reftune import ReftConfig, get_reft_model
from reftune.interventions import orthonormality_error
from reftune.interventions.steps import Steps

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
LABELS = torch.where(torch.arange(6) < 4, -100, IDS)


def adapted(optimizer: type[torch.optim.Optimizer], lr: float, **settings: Any) -> tuple[Any, torch.optim.Optimizer]:
    model = get_reft_model(tiny_llama(layers=2), ReftConfig(r=4, layers="all", positions="f2+l2", **settings))
    weights = [p for p in model.parameters() if p.requires_grad]
    return model, optimizer(weights, lr=lr, fused=True)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("names", [None, ["default", "other"]], ids=["one adapter", "rows' own"])
@pytest.mark.parametrize("kind", ["loreft", "nodireft", "red"])
def test_training_in_eval_mode_is_seen_without_a_call_of_eval(kind: str, names: list[str] | None) -> None:
    model, optimizer = adapted(torch.optim.AdamW, 0.05, intervention=kind)
    model.add_adapter("other", ReftConfig(r=2, intervention=kind, layers="all", positions="f2+l2"))
    model.eval()
    inputs = {} if names is None else {"adapter_names": names}
    with torch.no_grad():
        before = model(IDS, **inputs).logits
    model(IDS, labels=LABELS).loss.backward()
    optimizer.step()  # one: before a second, R might be put right, which counts a version
    with torch.no_grad():
        after = model(IDS, **inputs).logits
        assert not torch.equal(after, before)
        assert torch.equal(after, model.eval()(IDS, **inputs).logits)


@pytest.mark.parametrize("subspaces", [None, {"a": 2, "b": 2}], ids=["whole", "divided"])
def test_rows_are_put_right_after_a_step_though_a_pass_came_between_it_and_the_backward(subspaces: Any) -> None:
    model, optimizer = adapted(torch.optim.SGD, 5.0, subspaces=subspaces, init_weights=False)
    model.train()
    model(IDS, labels=LABELS).loss.backward()
    logits(model)
    optimizer.step()
    seen = logits(model)
    for layer in model.base_model.session.layers:
        for module in layer.interventions("default"):
            rows = [p for name, p in module.named_parameters() if name.rpartition(".")[2] == "R"]
            assert orthonormality_error(torch.cat(rows)) < 1e-5
    assert torch.equal(seen, logits(model.train()))


@pytest.mark.slow
def test_a_compiled_step_is_noticed_and_compiled_once() -> None:
    torch._dynamo.reset()
    model, optimizer = adapted(torch.optim.AdamW, 1e-3)
    model(IDS, labels=LABELS).loss.backward()
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(2):
        step()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            last = Steps.last
            step()
            assert Steps.last is not last


def test_setting_to_eval_puts_r_right_and_a_backward_may_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    # as on a GPU, where nobody waits to hear that R is right already, and it is written again
    monkeypatch.setattr("reftune.interventions.orthogonal.may_ask", lambda device: False)
    model = get_reft_model(tiny_llama(layers=2), ReftConfig(r=2, layers="all"), adapter_name="first")
    model.add_adapter("then", ReftConfig(r=4, layers="all", orthogonal_to=["first"]))
    model.set_adapter("then")
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.5)
    rows = [parameter for name, parameter in model.named_parameters() if name.endswith("then.R")]
    for _ in range(2):
        loss = model.train()(IDS, labels=LABELS).loss
        model.eval()
        loss.backward()
        optimizer.step()
    assert max(map(orthonormality_error, rows)) > 0.1
    model.train().eval()
    assert max(map(orthonormality_error, rows)) < 1e-5
