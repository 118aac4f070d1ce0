"""Operations counted ≡ the closed form."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import tiny_llama
from reftune import ReftConfig, get_reft_model
from reftune.operations import cost


@pytest.mark.parametrize("kind", ["loreft", "nodireft"])
@pytest.mark.parametrize(("positions", "edited"), [("f2+l2", 4), ("all", 14), ("l1+gen/2", 3), ("gen", 4)])
def test_the_count_is_the_closed_form(kind: str, positions: str, edited: int) -> None:
    config = ReftConfig(r=3, positions=positions, layers=[0, 2], intervention=kind, init_weights=False)
    found = cost(get_reft_model(tiny_llama(), config), prompt=10, new=4)
    assert found.edited == 2 * edited
    assert found.edits == found.formula == 2 * edited * 4 * 3 * 32
    assert found.base > 2 * 14 * (found.base_parameters - 2 * 99 * 32)
    assert found.parameters == sum(
        p.numel() for p in get_reft_model(tiny_llama(), config).parameters() if p.requires_grad
    )


def test_the_article_s_setting_on_a_model_without_weights() -> None:
    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig(vocab_size=32000))  # Llama-2-7B's shape
    found = cost(get_reft_model(base, ReftConfig(r=4, layers=[19], positions="f2+l2", share_weights=True)))
    assert found.parameters == 32_772
    assert found.edits == found.formula == 4 * 4 * 4 * 4096
    assert found.share_of_a_token < 0.0015 / 100
    assert "0.000005% in all" in str(found)


@pytest.mark.parametrize("form", [{"stack": [1, 2]}, {"subspaces": {"a": 1, "b": 2}}, {"nested": True}])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_parts_of_an_adapter_are_counted_together(form: dict, device: str) -> None:
    with torch.device(device):
        model = get_reft_model(tiny_llama(), ReftConfig(**{"r": 3, "positions": "f2", "layers": [1], **form}))
    found = cost(model, prompt=10, new=4)
    assert found.edits == found.formula == 2 * 4 * 3 * 32


def test_nothing_to_count_is_an_error() -> None:
    with pytest.raises(ValueError, match="prompt must be at least 1"):
        cost(get_reft_model(tiny_llama(), ReftConfig()), prompt=0)
