"""Interventions that share no token run in one turn, and the result is that of one after the other."""

import copy

import pytest
import torch

from conftest import tiny_llama
from reftune import ReftConfig, get_reft_model
from reftune.tuner.layer import ReftLayer

IDS = torch.tensor([[0, 0, 5, 6, 7, 8, 9, 3], [11, 12, 13, 14, 15, 16, 17, 18], [0, 0, 0, 0, 0, 0, 0, 4]])
INPUTS = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}


def adapted(positions: str, **settings):
    torch.manual_seed(3)
    config = ReftConfig(positions=positions, layers="all", init_weights=False, **settings)
    return get_reft_model(tiny_llama(layers=2, dtype=torch.float64), config).eval()


def layers(model) -> list[ReftLayer]:
    return [module for module in model.modules() if isinstance(module, ReftLayer)]


@pytest.mark.parametrize(
    ("positions", "sizes"),
    [("f2+l2", [2]), ("l1+gen", [2]), ("f2+mid1+l2", [1, 1, 1]), ("f2+all", [1, 1]), ("gen:2+gen/3", [2]), ("l1", [1])],
)
def test_terms_without_a_common_token_share_a_turn_and_the_order_stays(positions: str, sizes: list[int]) -> None:
    model = adapted(positions)
    with torch.no_grad():
        found = model(**INPUTS).logits
    for layer in layers(model):
        turns = layer.turns[1]
        assert [len(turn) for turn in turns] == sizes
        layer.turns = (layer.turns[0], [[member] for turn in turns for member in turn])  # one by one
    with torch.no_grad():
        torch.testing.assert_close(model(**INPUTS).logits, found, rtol=1e-12, atol=1e-12)


def test_turns_follow_the_active_adapters() -> None:
    model = adapted("f2+l2")
    model.add_adapter("other", ReftConfig(positions="l1", layers="all", init_weights=False))
    with torch.no_grad():
        one = model(**INPUTS).logits
        model.set_adapter("other")
        two = model(**INPUTS).logits
        model.set_adapter("default")
        assert torch.equal(model(**INPUTS).logits, one)
        model.base_model.set_adapter(["default", "other"])
        model(**INPUTS)
        assert [len(turn) for turn in layers(model)[0].turns[1]] == [2, 1]  # l1 lies in f2+l2
        model.delete_adapter("other")
        assert torch.equal(model(**INPUTS).logits, one)
    assert not torch.equal(one, two)


def test_an_adapter_named_twice_edits_once() -> None:
    model = adapted("l1")
    with torch.no_grad():
        once = model(**INPUTS).logits
        model.base_model.set_adapter(["default", "default"])
        assert torch.equal(model(**INPUTS).logits, once)


def test_a_replica_edits_with_its_own_interventions() -> None:
    model = adapted("f2+l2")
    with torch.no_grad():
        model(**INPUTS)
        layer = layers(model)[0]
        layer.routes = "those of the original"
        twin = layer._replicate_for_data_parallel()  # as DataParallel does: what is not a module is shared
        assert twin.routes is None
        layer.routes = None
        for attribute in layer.adapter_layer_names:
            copied = torch.nn.ModuleDict({"default": copy.deepcopy(getattr(layer, attribute)["default"])})
            copied["default"].W.zero_()
            twin._modules[attribute] = copied
        seen = []
        for attribute in twin.adapter_layer_names:
            getattr(twin, attribute)["default"].register_forward_hook(lambda *_: seen.append(1))
        hook = layers(model)[1].register_forward_pre_hook(lambda _, args: seen.append(twin(args[0]).sum()))
        model(**INPUTS)
        hook.remove()
    assert seen[:2] == [1, 1]


def test_gradients_are_those_of_one_after_the_other() -> None:
    grads = []
    for together in (True, False):
        model = adapted("f2+l2").train()
        labels = torch.where(torch.arange(8) < 7, -100, IDS)
        data = {key: value[:2] for key, value in INPUTS.items()}
        if not together:
            model(**data, labels=labels[:2])
            for layer in layers(model):
                layer.turns = (layer.turns[0], [[member] for turn in layer.turns[1] for member in turn])
        model(**data, labels=labels[:2]).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
