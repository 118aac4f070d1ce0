"""Interventions that share no token run in one turn, and the result is that of one after the other."""

import copy

import pytest
import torch

from conftest import tiny_llama
from reftune import ReftConfig, get_reft_model
from reftune.interventions.bank import Bank
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
        layer.turns = (layer.turns[0], [(member,) for turn in turns for member in turn], {})  # one by one
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
        model(**INPUTS)  # and the turns have a bank of the original's weights
        layer.routes = "those of the original"
        twin = layer._replicate_for_data_parallel()  # as DataParallel does: what is not a module is shared
        assert twin.routes is None
        assert twin.turns is None
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
                layer.turns = (layer.turns[0], [(member,) for turn in layer.turns[1] for member in turn], {})
        model(**data, labels=labels[:2]).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def banks(model) -> list[Bank]:
    return [together.bank for layer in layers(model) for together in layer.turns[2].values()]


@pytest.mark.parametrize("kind", ["loreft", "noreft", "direft", "nodireft", "consreft", "lobireft", "red", "postblock"])
@torch.no_grad()
def test_interventions_of_one_turn_are_one_computation_without_a_gradient(kind: str) -> None:
    model = adapted("f2+l2", intervention=kind)
    data = {key: value[:2] for key, value in INPUTS.items()}
    with torch.enable_grad():
        expected = model(**data).logits
    assert banks(model) == []
    found = model(**data).logits
    assert len(banks(model)) == 2
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(model(**data).logits, found)
    uneven = model(**INPUTS).logits  # the last row has one token: the terms edit unequally many, one by one
    model.train().eval()
    assert torch.equal(model(**INPUTS).logits, uneven)


@pytest.mark.parametrize("how", ["in place", "load_state_dict", "assigned", "a new one", "data", "hook", "cast"])
@torch.no_grad()
def test_what_is_written_to_a_weight_is_seen(how: str) -> None:
    model, other = adapted("f2+l2"), adapted("f2+l2")
    data = {key: value[:2] for key, value in INPUTS.items()}
    for _ in range(3):
        before = model(**data).logits
    assert len(banks(model)) == 2
    for one in (model, other):
        part = layers(one)[0].interventions("default")[1]
        changed = {key: value + 1 if key == "W" else value.clone() for key, value in part.state_dict().items()}
        if how == "in place":
            part.W.add_(1)
        elif how in ("load_state_dict", "assigned"):
            part.load_state_dict(changed, assign=how == "assigned")
        elif how == "a new one":
            part.W = torch.nn.Parameter(changed["W"])
        elif how == "data":
            for value in (changed["W"] - 5, changed["W"]):
                part.W.data = value
        elif how == "hook":
            part.register_forward_hook(lambda module, args, output: output + 1)
        else:
            part.bfloat16()
    assert not torch.equal(model(**data).logits, before)
    within = 1e-7 if how == "cast" else 1e-12  # W - R of narrow weights is folded in fp32
    torch.testing.assert_close(model(**data).logits, other(**data).logits, rtol=within, atol=within)


@torch.no_grad()
def test_eval_drops_the_copies_of_weights_that_were_written_to_without_a_trace() -> None:
    model, other = adapted("f2+l2"), adapted("f2+l2")
    data = {key: value[:2] for key, value in INPUTS.items()}
    for _ in range(3):
        model(**data)
    for one in (model, other):
        layers(one)[0].interventions("default")[1].W.data.add_(1)
    model.eval()
    torch.testing.assert_close(model(**data).logits, other(**data).logits, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_a_copy_of_a_model_has_no_copies_of_the_weights() -> None:
    model = adapted("f2+l2")
    for _ in range(3):
        expected = model(**INPUTS).logits
    twin = copy.deepcopy(model)
    assert all(layer.turns is None for layer in layers(twin))
    assert torch.equal(twin(**INPUTS).logits, expected)


@torch.no_grad()
def test_dropout_without_a_gradient_still_drops() -> None:
    model = adapted("f2+l2", dropout=0.5)
    data = {key: value[:2] for key, value in INPUTS.items()}
    for layer in layers(model):
        layer.train()
    assert len({float(model(**data).logits.sum()) for _ in range(4)}) == 4


@torch.no_grad()
def test_weights_given_for_one_call_are_used() -> None:
    model = adapted("f2+l2")
    data = {key: value[:2] for key, value in INPUTS.items()}
    for _ in range(3):
        before = model(**data).logits
    given = {name: torch.zeros_like(p) for name, p in model.named_parameters() if name.endswith(".W")}
    found = torch.func.functional_call(model, given, kwargs=data).logits
    assert not torch.allclose(found, before)
    assert torch.equal(model(**data).logits, before)


@torch.no_grad()
def test_an_intervention_that_couples_tokens_finds_its_own_segments_beside_another() -> None:
    model = adapted("all", intervention="reft_r1")
    model.add_adapter("still", ReftConfig(positions="all", layers="all"))  # edits nothing yet
    for part in layers(model)[0].interventions("default"):
        for weight in part.parameters():
            weight.normal_(std=0.5)
    labels = torch.where(torch.arange(8) < 4, -100, IDS)
    data = {key: value[:2] for key, value in INPUTS.items()}
    alone = model(**data, labels=labels[:2]).logits
    for names in (["default", "still"], ["still", "default"]):
        model.base_model.set_adapter(names)
        found = model(**data, labels=labels[:2]).logits  # the other's rows are settled in fp32
        torch.testing.assert_close(found, alone, rtol=1e-6, atol=1e-6)
