"""Gradient checkpointing: losses and gradients are those of the same pass without it, whatever is edited and wherever.

The reentrant kind gives parameters no gradient, silently, when no input of the recomputed block needs one; a site
inside a block is recomputed after its forward pass has ended, and two forwards may come before one backward.
"""

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from conftest import tiny_llama
from integration.tiny_training import batch
from reftune import ReftConfig, get_reft_model

# torch says so of the frozen blocks below the first edit, which get none without checkpointing either
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")

COMPONENTS = ("block_output", "block_input", "attention_output", "attention_input", "mlp_output", "mlp_input")


def reft(component: str, layers: str, **settings: object) -> PeftModel:
    config = ReftConfig(
        r=2, layers=layers, component=component, positions="f2+l2", init_weights=False, task_type="CAUSAL_LM"
    )
    for key, value in settings.items():
        setattr(config, key, value)
    torch.manual_seed(1)
    return get_reft_model(tiny_llama(layers=3), config).train()


def losses_and_gradients(model: PeftModel, *seeds: int) -> tuple[list[float], dict[str, Tensor]]:
    """All forwards first, then one backward through the sum of their losses."""
    model.zero_grad()
    torch.manual_seed(7)  # dropout
    losses = [model(**batch(seed)).loss for seed in seeds]
    torch.stack(losses).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return [loss.item() for loss in losses], gradients


def checkpoint(model: PeftModel, reentrant: bool, inputs_need_grad: bool = True) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})  # makes the embeddings' output need a gradient, in most versions
    if inputs_need_grad:
        model.enable_input_require_grads()
    elif hasattr(model.get_base_model(), "_require_grads_hook"):
        model.disable_input_require_grads()
    assert model(**batch(0)).logits.requires_grad


def assert_same(model: PeftModel, reentrant: bool, *seeds: int, inputs_need_grad: bool = True) -> None:
    losses, gradients = losses_and_gradients(model, *seeds)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(gradients) == trained
    assert sum(g.abs().sum() for g in gradients.values()) > 0

    checkpoint(model, reentrant, inputs_need_grad)
    again, recomputed = losses_and_gradients(model, *seeds)
    assert again == losses
    assert set(recomputed) == trained
    for name in trained:
        torch.testing.assert_close(recomputed[name], gradients[name], rtol=1e-5, atol=1e-7, msg=lambda m, n=name: n + m)

    getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
    assert losses_and_gradients(model, *seeds)[0] == losses


@pytest.mark.parametrize("inputs_need_grad", [False, True], ids=["", "input_require_grads"])
@pytest.mark.parametrize("layers", ["all", "mid"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])
@pytest.mark.parametrize("component", COMPONENTS)
def test_checkpointed_is_not_checkpointed(component: str, reentrant: bool, layers: str, inputs_need_grad: bool) -> None:
    model = reft(component, layers)
    assert_same(model, reentrant, 0, inputs_need_grad=inputs_need_grad)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])
@pytest.mark.parametrize("component", COMPONENTS)
def test_two_forwards_before_one_backward(component: str, reentrant: bool) -> None:
    """Each recomputation edits the rows of its own batch, not those of the last one."""
    assert_same(reft(component, "all"), reentrant, 0, 1)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])
@pytest.mark.parametrize("component", COMPONENTS)
def test_dropout_is_drawn_again_alike(component: str, reentrant: bool) -> None:
    model = reft(component, "all", dropout=0.5)
    assert_same(model, reentrant, 0)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])
@pytest.mark.parametrize("component", ["block_output", "mlp_output"])
def test_an_evaluation_between_forward_and_backward_changes_nothing(component: str, reentrant: bool) -> None:
    """A trainer's callback may generate or evaluate while a graph is alive."""
    model = reft(component, "all")
    _, expected = losses_and_gradients(model, 0)
    checkpoint(model, reentrant)
    model.zero_grad()
    loss = model(**batch(0)).loss
    with torch.no_grad():
        model.eval()(**batch(1))
    model.train()
    loss.backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-5, atol=1e-7)


def test_a_disabled_adapter_is_the_base_under_checkpointing() -> None:
    model = reft("mlp_output", "all")
    base = tiny_llama(layers=3).train()
    checkpoint(model, reentrant=False)
    with model.disable_adapter():
        assert torch.equal(model(**batch(0)).logits, base(**batch(0)).logits)


def test_a_checkpointing_around_the_blocks_says_what_to_use_instead() -> None:
    model = reft("block_output", "all")
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, LlamaDecoderLayer))
    loss = model(**batch(0), use_cache=False).loss
    with pytest.raises(RuntimeError, match=r"checkpoint_wrapper.*use the model's own, gradient_checkpointing_enable"):
        loss.backward()
