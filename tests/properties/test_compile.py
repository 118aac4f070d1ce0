"""torch.compile: no more graph breaks and graphs than the base has, and the same numbers."""

from typing import Any

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters
from transformers import CompileConfig, StaticCache

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
    counters.clear()


def adapted(positions: str, depth: int = 2, **settings: Any) -> Any:
    torch.manual_seed(1)
    config = ReftConfig(positions=positions, layers="all", init_weights=False, **settings)
    return get_reft_model(tiny_llama(layers=depth), config)


def breaks(model, **inputs) -> int:
    return torch._dynamo.explain(model)(IDS, attention_mask=MASK, use_cache=False, **inputs).graph_break_count


def test_no_graph_breaks_in_training() -> None:
    """In inference there is none either: the next test's `fullgraph` refuses them."""
    assert breaks(tiny_llama(layers=2).train(), labels=LABELS) == 0
    for positions in POSITIONS:
        assert breaks(adapted(positions).train(), labels=LABELS) == 0


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


def test_a_graph_compiled_after_training_takes_r_on_orthonormal_rows() -> None:
    model = adapted("all").train()
    optimiser = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=10.0)
    model(IDS, attention_mask=MASK, labels=LABELS).loss.backward()
    optimiser.step()
    compiled = torch.compile(model.eval(), backend="eager", fullgraph=True)
    with torch.no_grad():
        found = compiled(IDS, attention_mask=MASK).logits
        torch.testing.assert_close(found, model(IDS, attention_mask=MASK).logits)


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


def generates(model: Any, sizes: Any = ((8, 4), (6, 7), (7, 3)), **settings: Any) -> int:
    """Generates over one static cache as without, from prompts of several lengths; the number of graphs."""
    cache = StaticCache(model.config, max_cache_len=24)
    for columns, steps in sizes:
        inputs = {"input_ids": IDS[:, -columns:], "attention_mask": MASK[:, -columns:], "max_new_tokens": steps}
        inputs |= {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        with torch.compiler.set_stance("force_eager"):
            expected = model.generate(**inputs)
        cache.reset()
        assert torch.equal(model.generate(**inputs, past_key_values=cache, **settings), expected)
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(("positions", "more"), [("f2+l2", 0), ("all", 0), ("l1+gen/2", 1)])
@torch.no_grad()
def test_generate_compiles_its_steps_as_often_as_the_bases(positions: str, more: int) -> None:
    """As it does by itself on a GPU with a static cache. `gen/2` has a graph more, for it asks for the cache's length
    before the pass."""
    compile_config = CompileConfig(backend="aot_eager", fullgraph=False, mode=None)
    compile_config._compile_all_devices = True
    expected = generates(tiny_llama(layers=2), compile_config=compile_config)
    torch._dynamo.reset()
    counters.clear()
    assert generates(adapted(positions).eval(), compile_config=compile_config) == expected + more > 0


@torch.no_grad()
def test_a_compiled_forward_is_compiled_as_often_as_the_bases_in_generation() -> None:
    base, model = tiny_llama(layers=1), adapted("l1+gen/2", depth=1).eval()
    found = []
    for one, inner in ((base, base), (model, model.get_base_model())):
        torch._dynamo.reset()
        counters.clear()
        inner.forward = torch.compile(inner.forward, backend="aot_eager")
        found.append(generates(one, [(8, 4), (6, 7)]))
    assert found[0] == found[1] > 0


def test_labels_without_a_prompt_are_refused_in_a_graph_too() -> None:
    compiled = torch.compile(adapted("f2+l2").train(), backend="aot_eager")
    with pytest.raises(RuntimeError, match="leave no prompt"):
        compiled(IDS, labels=IDS)
