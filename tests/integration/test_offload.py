"""accelerate's device maps: it puts a `forward` of its own on every module, before or after the adapter comes."""

from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_submodules
from peft import PeftModel

from conftest import tiny_llama
from reftune import ReftConfig, get_reft_model

IDS = torch.arange(5, 13)[None]


def offload(base: Any) -> None:
    """What `device_map` does: weights aside, and a hook on every block to move its inputs."""
    cpu_offload(base, execution_device=torch.device("cpu"))
    for block in base.model.layers:
        add_hook_to_module(block, ModelHook())


def attach(base: Any, component: str) -> PeftModel:
    torch.manual_seed(1)
    config = ReftConfig(r=2, layers="all", component=component, init_weights=False, task_type="CAUSAL_LM")
    return get_reft_model(base, config).eval()


@pytest.mark.parametrize("first", ["adapter", "offload"])
@pytest.mark.parametrize("component", ["block_output", "block_input", "mlp_output"])
@torch.no_grad()
def test_edits_are_made_whichever_comes_first(component: str, first: str) -> None:
    expected = attach(tiny_llama(layers=2), component)(IDS).logits
    base = tiny_llama(layers=2)
    assert not torch.allclose(expected, base(IDS).logits, atol=1e-4)
    if first == "offload":
        offload(base)
        model = attach(base, component)
    else:
        model = attach(base, component)
        offload(base)
    assert "forward" in base.model.layers[0].__dict__
    # to rounding: what must be called to have its weights is called alone, otherwise terms are computed together
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-6)
    remove_hook_from_submodules(base)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-6)
