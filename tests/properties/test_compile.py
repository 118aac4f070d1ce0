"""torch.compile: no more graph breaks than the base has, and the same numbers."""

import pytest
import torch
import torch._dynamo

from conftest import tiny_llama
from reftune import LoreftIntervention, ReftConfig, get_reft_model
from reftune.interventions import orthonormality_error

IDS = torch.tensor([[0, 0, 5, 6, 7, 8, 9, 3], [11, 12, 13, 14, 15, 16, 17, 18]])
MASK = (IDS != 0).long()
LABELS = torch.where(torch.arange(8) < 5, -100, IDS)
POSITIONS = ["f2+l2", "mid1+gen"]
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def adapted(positions: str, **settings):
    torch.manual_seed(1)
    config = ReftConfig(positions=positions, layers="all", init_weights=False, **settings)
    return get_reft_model(tiny_llama(layers=2), config)


def breaks(model, **inputs) -> int:
    return torch._dynamo.explain(model)(IDS, attention_mask=MASK, use_cache=False, **inputs).graph_break_count


@pytest.mark.parametrize("positions", POSITIONS)
def test_no_graph_breaks_in_training_and_inference(positions: str) -> None:
    assert breaks(tiny_llama(layers=2).train(), labels=LABELS) == 0
    assert breaks(adapted(positions).train(), labels=LABELS) == 0
    with torch.no_grad():
        assert breaks(adapted(positions).eval()) == 0


@pytest.mark.parametrize("positions", POSITIONS)
@torch.no_grad()
def test_a_compiled_forward_is_the_plain_one(positions: str) -> None:
    model = adapted(positions).eval()
    expected = model(IDS, attention_mask=MASK).logits
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(IDS, attention_mask=MASK).logits, expected)
    with model.disable_adapter():
        assert torch.equal(
            compiled(IDS, attention_mask=MASK).logits, tiny_llama(layers=2)(IDS, attention_mask=MASK).logits
        )
    torch.testing.assert_close(compiled(IDS, attention_mask=MASK).logits, expected)


@pytest.mark.parametrize("kind", ["loreft", "postblock"])
def test_compiled_training_is_plain_training_and_keeps_r_orthonormal(kind: str) -> None:
    plain, other = (adapted("f2+l2", intervention=kind).train() for _ in range(2))
    compiled = torch.compile(other, backend="aot_eager")
    optimisers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.02) for m in (plain, other)]
    for _ in range(4):
        losses = []
        for model, optimiser in zip((plain, compiled), optimisers, strict=True):
            loss = model(IDS, attention_mask=MASK, labels=LABELS).loss
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses)
    for one, two in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)
    other(IDS, attention_mask=MASK, labels=LABELS)
    for module in other.modules():
        if isinstance(module, LoreftIntervention):
            assert orthonormality_error(module.R.detach()) < 1e-5


@pytest.mark.parametrize("positions", ["l1+gen/2"])
@torch.no_grad()
def test_a_compiled_model_generates_the_same_tokens(positions: str) -> None:
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = adapted(positions).eval().generate(input_ids=IDS, attention_mask=MASK, **settings)
    model = adapted(positions).eval()
    base = model.get_base_model()
    base.forward = torch.compile(base.forward, backend="aot_eager")
    found = model.generate(input_ids=IDS, attention_mask=MASK, cache_implementation="static", **settings)
    assert torch.equal(found, expected)


def test_labels_without_a_prompt_are_refused_in_a_graph_too() -> None:
    compiled = torch.compile(adapted("f2+l2").train(), backend="aot_eager")
    with pytest.raises(RuntimeError, match="leave no prompt"):
        compiled(IDS, labels=IDS)
