"""Torch's default device may be another than the model's, as after `torch.set_default_device("cuda")`.

The meta device stands for one here: nothing can be computed there, so what is made there by mistake ends in an error.
"""

import torch
from reuse_cases import collate, computed, examples, reft, reuse

from conftest import tiny_llama
from reftune import ReftConfig, get_reft_model
from reftune.operations import cost

META = torch.device("meta")


def test_forward_backward_and_generation() -> None:
    model = reft(tiny_llama(), "f2+l2+gen")
    inputs = collate(examples())
    prompt = {name: inputs[name][:, :4] for name in ("input_ids", "attention_mask")}
    wanted = computed(model, inputs)
    told = model.eval().generate(**prompt, max_new_tokens=3, do_sample=False)
    with META:
        again = model.generate(**prompt, max_new_tokens=3, do_sample=False)
        found = computed(model.train(), inputs)
    torch.testing.assert_close(found, wanted)
    assert again.tolist() == told.tolist()


def test_reuse() -> None:
    model = reft(tiny_llama())
    inputs = collate(examples())
    loss, gradients = computed(model, inputs)
    with META:
        engine, _ = reuse(model)
        for _ in range(2):  # computes what it keeps, then finds it
            prepared = engine.prepare(inputs, True)
            assert prepared is not None
            with prepared.active():
                found = computed(model, prepared.inputs)
            torch.testing.assert_close(found[0], loss, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(found[1], gradients, atol=1e-4, rtol=1e-3)


def test_merging() -> None:
    def adapted() -> object:
        config = ReftConfig(
            intervention="nodireft", positions="all", component="mlp_output", init_weights=False, task_type="CAUSAL_LM"
        )
        torch.manual_seed(1)
        return get_reft_model(tiny_llama(), config).eval()

    ids = torch.tensor([[5, 9, 3, 77]])
    with torch.no_grad():
        wanted = adapted()(ids).logits
        model = adapted()
        with META:
            merged = model.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, wanted, atol=1e-4, rtol=1e-4)


def test_cost() -> None:
    model = reft(tiny_llama())
    wanted = cost(model, 8, 4)
    with META:
        assert cost(model, 8, 4) == wanted
