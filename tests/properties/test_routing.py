"""Each row of a batch by its own adapter ≡ each row alone; a mix ≡ its formula."""

import random

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from conftest import tiny_llama
from families import CAUSAL, RECURRENT, tiny
from reftune import ReftConfig, get_reft_model
from reftune.tuner.layer import ReftLayer
from reftune.tuner.mix import Mix

pytestmark = pytest.mark.filterwarnings("ignore:.*reference PyTorch implementation.*", "ignore:.*YaRN.*")
KINDS = ["loreft", "noreft", "consreft", "lobireft", "direft", "nodireft", "red", "reft_r1", "postblock"]
POSITIONS = ["f2+l2", "l1", "all", "mid1", "gen", "l2+gen/2", "f1+l1+gen:2"]


def shake(model, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".reft_" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))


def some_config(dice: random.Random, depth: int) -> ReftConfig:
    kind = dice.choice(KINDS)
    return ReftConfig(
        intervention=kind,
        r=dice.randint(1, 4),
        positions=dice.choice(POSITIONS),
        layers=sorted(dice.sample(range(depth), dice.randint(1, depth))),
        share_weights=dice.random() < 0.5,
        act_fn=dice.choice([None, "gelu"]) if kind in ("loreft", "direft", "nodireft") else None,
        bias=dice.choice(["learned", "none"]) if kind in ("loreft", "noreft", "direft", "red") else "learned",
        init_weights=False,
    )


def with_adapters(base, configs: list[ReftConfig], seed: int = 0):
    model = get_reft_model(base, configs[0], adapter_name="a0")
    for number, config in enumerate(configs[1:], start=1):
        model.add_adapter(f"a{number}", config)
    shake(model, seed)
    return model.eval()


@torch.no_grad()
def alone(model, name: str, run):
    if name == "__base__":
        with model.disable_adapter():
            return run()
    model.set_adapter(name)
    return run()


@pytest.mark.parametrize("seed", range(6))
@torch.no_grad()
def test_every_row_as_alone_whatever_the_adapters(seed: int) -> None:
    dice = random.Random(seed)
    model = with_adapters(tiny_llama(dtype=torch.float64), [some_config(dice, 4) for _ in range(6)], seed)
    names = [dice.choice(["__base__", *(f"a{i}" for i in range(6))]) for _ in range(9)]
    lengths = [dice.randint(1, 7) for _ in names]
    ids = torch.randint(3, 90, (len(names), 7))
    for side in ("left", "right"):
        mask = torch.zeros_like(ids)
        for row, length in enumerate(lengths):
            mask[row, slice(7 - length, None) if side == "left" else slice(length)] = 1
        together = model(ids, attention_mask=mask, adapter_names=names).logits
        for row, name in enumerate(names):
            real = mask[row].bool()
            single = alone(model, name, lambda row=row, real=real: model(ids[row, real][None]).logits[0])
            torch.testing.assert_close(together[row, real], single, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_as_many_names_as_rows(count: int) -> None:
    """Two names for four rows are not two rows each, nor one name one for all, as they are not in PEFT."""
    model = with_adapters(tiny_llama(), [ReftConfig(), ReftConfig(positions="all")])
    with pytest.raises(ValueError, match=f"for {count} rows, but the batch has 4"):
        model(torch.randint(3, 90, (4, 7)), adapter_names=["a0", "a1", "__base__", *["a0"] * 5][:count])


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@torch.no_grad()
def test_as_many_names_as_images(count: int) -> None:
    config = ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=16, patch_size=8
    )
    model = with_adapters(ViTForImageClassification(config), [ReftConfig(positions="all"), ReftConfig(positions="all")])
    pixels, names = torch.randn(4, 3, 16, 16), ["a1", "a0", "__base__", "a0"][:count]
    if count < 4:
        with pytest.raises(ValueError, match=f"for {count} rows, but the batch has 4"):
            model(pixel_values=pixels, adapter_names=names)
        return
    together = model(pixel_values=pixels, adapter_names=names).logits
    for name, row, image in zip(names, together, pixels, strict=True):
        single = alone(model, name, lambda image=image: model(pixel_values=image[None]).logits[0])
        torch.testing.assert_close(row, single, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("settings", [{}, {"use_cache": False}, {"num_beams": 2}], ids=["cache", "none", "beams"])
@torch.no_grad()
def test_every_row_generates_as_alone(seed: int, settings: dict) -> None:
    dice = random.Random(100 + seed)
    model = with_adapters(tiny_llama(dtype=torch.float64), [some_config(dice, 4) for _ in range(4)], seed)
    names = [dice.choice(["__base__", *(f"a{i}" for i in range(4))]) for _ in range(5)]
    ids = torch.randint(3, 90, (len(names), 6))
    mask = torch.ones_like(ids)
    mask[1, :3] = mask[3, :5] = 0
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **settings}
    together = model.generate(input_ids=ids, attention_mask=mask, adapter_names=names, **settings)
    for row, name in enumerate(names):
        kept = mask[row].bool()
        one = {"input_ids": ids[row, kept][None], "attention_mask": mask[row, kept][None]}
        single = alone(model, name, lambda one=one: model.generate(**one, **settings))
        assert together[row, 6:].tolist() == single[0, int(kept.sum()) :].tolist(), name


@pytest.mark.parametrize("family", sorted(set(CAUSAL) - RECURRENT))
@torch.no_grad()
def test_every_row_as_alone_in_every_family(family: str) -> None:
    base = tiny(family)
    depth = 2
    configs = [ReftConfig(r=r, positions="f1+l1+gen", layers=list(range(depth)), init_weights=False) for r in (1, 2, 3)]
    model = with_adapters(base, configs)
    names = ["a0", "__base__", "a1", "a2", "a0"]
    ids = torch.randint(3, 90, (5, 6))
    together = model(ids, adapter_names=names).logits
    for row, name in enumerate(names):
        single = alone(model, name, lambda row=row: model(ids[row : row + 1]).logits[0])
        torch.testing.assert_close(together[row], single, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("active", ["a0", "a1", "a2"])
@torch.no_grad()
def test_every_row_has_the_modules_that_its_adapter_trained_whole(active: str) -> None:
    whole = [{}, {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["lm_head"], "trainable_token_indices": [5, 6]}]
    configs = [ReftConfig(positions="l1+gen", init_weights=False, **settings) for settings in whole]
    model = with_adapters(tiny_llama(dtype=torch.float64), configs)
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name or ".trainable_tokens_delta." in name:
            parameter.add_(torch.randn_like(parameter))
    names, ids = ["a0", "a2", "__base__", "a1"], torch.tensor([[4, 5, 6]] * 4)
    settings = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2, "pad_token_id": 0, "eos_token_id": None}
    expected = [alone(model, name, lambda: model(ids[:1]).logits[0]) for name in names]
    sequences = [alone(model, name, lambda: model.generate(input_ids=ids[:1], **settings)[0]) for name in names]
    model.set_adapter(active)
    torch.testing.assert_close(model(ids, adapter_names=names).logits, torch.stack(expected))
    assert torch.equal(model.generate(input_ids=ids, adapter_names=names, **settings), torch.stack(sequences))
    torch.testing.assert_close(model(ids[:1]).logits[0], alone(model, active, lambda: model(ids[:1]).logits[0]))


@torch.no_grad()
def test_a_weight_written_to_is_seen_by_the_next_batch() -> None:
    model = with_adapters(tiny_llama(dtype=torch.float64), [ReftConfig(r=2, init_weights=False) for _ in range(3)])
    ids, names = torch.randint(3, 90, (3, 5)), ["a0", "a1", "a2"]
    before = model(ids, adapter_names=names).logits
    shake(model, 5)
    after = model(ids, adapter_names=names).logits
    assert not torch.allclose(before[1], after[1])
    torch.testing.assert_close(after[1], alone(model, "a1", lambda: model(ids[1:2]).logits[0]))
    model.delete_adapter("a1")
    with pytest.raises(ValueError, match="a1"):
        model(ids, adapter_names=names)
    model.add_adapter("a1", ReftConfig(r=1, positions="all", init_weights=False))
    shake(model, 6)
    again = model(ids, adapter_names=names).logits
    torch.testing.assert_close(again[1], alone(model, "a1", lambda: model(ids[1:2]).logits[0]))


@torch.no_grad()
def test_what_another_thread_puts_in_between_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_adapters(tiny_llama(dtype=torch.float64), [ReftConfig(r=2, init_weights=False) for _ in range(2)])
    ids = torch.randint(3, 90, (2, 5))
    expected = model(ids, adapter_names=["a0", "a0"]).logits
    model(ids, adapter_names=["a1", "a1"])
    (layer,) = (module for module in model.modules() if isinstance(module, ReftLayer))
    between = layer.routes
    del layer.routes
    monkeypatch.setattr(ReftLayer, "routes", property(lambda self: between, lambda self, value: None), raising=False)
    torch.testing.assert_close(model(ids, adapter_names=["a0", "a0"]).logits, expected)


@torch.no_grad()
def test_names_that_do_not_fit_the_batch_are_an_error() -> None:
    model = with_adapters(tiny_llama(), [ReftConfig(), ReftConfig()])
    with pytest.raises(ValueError, match=r"adapters for 2 rows, but the batch has 3"):
        model(torch.randint(3, 90, (3, 5)), adapter_names=["a0", "a1"])
    with pytest.raises(ValueError, match="a7"):
        model(torch.randint(3, 90, (2, 5)), adapter_names=["a0", "a7"])


@pytest.mark.parametrize("how", ["sum", "sequence"])
@torch.no_grad()
def test_a_mix_is_its_formula(how: str) -> None:
    """At the last block, where nothing comes after that could change the states."""
    configs = [ReftConfig(r=r, layers=[-1], positions="l2", share_weights=True, init_weights=False) for r in (1, 2, 3)]
    model = with_adapters(tiny_llama(dtype=torch.float64), configs)
    states, ids = [], torch.randint(3, 90, (2, 5))
    block = model.get_base_model().model.layers[-1]
    block.register_forward_hook(lambda module, args, output: states.append(output))
    with model.disable_adapter():
        model(ids)
    session = model.base_model.session
    strengths = {"a2": 0.5, "a0": -2.0, "a1": 0.0}
    with session.mixing(Mix(strengths, how)):
        model(ids)
    base, mixed = states
    expected = base.clone()
    for name, strength in strengths.items():
        intervention = block.edit_output.interventions(name)[0]
        read = base if how == "sum" else expected.clone()
        expected[:, -2:] += strength * (intervention(read[:, -2:]) - read[:, -2:])
    torch.testing.assert_close(mixed, expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_a_mix_of_strength_zero_is_the_base_and_one_of_one_is_the_adapter() -> None:
    model = with_adapters(tiny_llama(), [ReftConfig(init_weights=False), ReftConfig(r=2, init_weights=False)])
    ids, session = torch.randint(3, 90, (2, 5)), model.base_model.session
    base, one = alone(model, "__base__", lambda: model(ids).logits), alone(model, "a1", lambda: model(ids).logits)
    model.set_adapter("a0")
    with session.mixing(Mix({"a0": 0.0, "a1": 0})):
        assert torch.equal(model(ids).logits, base)
    for how in ("sum", "sequence"):
        with session.mixing(Mix({"a1": 1.0}, how)):
            torch.testing.assert_close(model(ids).logits, one)
    session.mix = Mix({"a1": 1.0})
    torch.testing.assert_close(model(ids).logits, one)
    session.mix = None
    assert not torch.allclose(model(ids).logits, one)


@pytest.mark.parametrize(("strength", "how"), [(float("nan"), "sum"), ("1", "sum"), (True, "sum"), (1.0, "mean")])
def test_a_mix_that_cannot_be_meant_is_an_error(strength, how) -> None:
    with pytest.raises(ValueError, match=r"strength of adapter 'a' must be a finite number|how must be"):
        Mix({"a": strength}, how)
