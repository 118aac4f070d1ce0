"""`initialize_reft_weights`: the outputs stay, the reads follow the gradient, and nothing else of the model changes."""

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import reftune
from conftest import tiny_llama
from integration.tiny_training import batch
from reftune import ReftConfig, get_reft_model, initialize_reft_weights
from reftune.interventions import NodireftIntervention

FOUR = ["attention_input", "attention_output", "mlp_input", "mlp_output"]


BATCHES = [batch(seed, rows=4) for seed in range(4)]


def nodireft(seed: int = 1, hidden: int = 64, **options: Any) -> PeftModel:
    settings = {"intervention": "nodireft", "r": 2, "layers": "all", "positions": "all", "task_type": "CAUSAL_LM"}
    torch.manual_seed(seed)
    return get_reft_model(tiny_llama(layers=3, hidden=hidden), ReftConfig(**{**settings, **options}))


def named(model: PeftModel) -> list[tuple[str, NodireftIntervention]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, NodireftIntervention)]


def edits(model: PeftModel) -> list[NodireftIntervention]:
    return [module for _, module in named(model)]


def reads(model: PeftModel) -> list[Tensor]:
    return [one.W.detach().clone() for one in edits(model)]


def same_directions(one: Tensor, other: Tensor, atol: float = 1e-3) -> bool:
    sign = torch.sign((one * other).sum(1, keepdim=True))
    return torch.allclose(one, sign * other, atol=atol, rtol=1e-2)


def test_reads_are_the_main_directions_of_the_gradient_at_each_site() -> None:
    model = nodireft(component=FOUR, hidden=32)  # so narrow that the sketch leaves nothing out
    assert len(edits(model)) == 12
    seen: dict[int, list[Tensor]] = {}

    def hook(module: Any, args: Any, output: Tensor) -> None:
        output.register_hook(lambda g: seen.setdefault(id(module), []).extend((args[0].detach(), g.detach())))

    handles = [one.register_forward_hook(hook) for one in edits(model)]
    for inputs in BATCHES:
        model(**inputs).loss.backward()
    model.zero_grad()
    for handle in handles:
        handle.remove()
    before = reads(model)
    initialize_reft_weights(model, BATCHES)
    for one, random in zip(edits(model), before, strict=True):
        parts = seen[id(one)]
        h, g = torch.cat(parts[::2]).double(), torch.cat(parts[1::2]).double()
        assert len(h) == sum(int(inputs["attention_mask"].sum()) for inputs in BATCHES)  # no padding among them
        mean = h.mean(0)
        _, _, right = torch.linalg.svd(g.mT @ (h - mean))
        size = (h @ random.double().mT).square().mean().sqrt()
        wanted = right[:2] * (size / ((h - mean) @ right[:2].mT).square().mean(0).sqrt())[:, None]
        assert same_directions(one.W.double(), wanted, atol=1e-3 * float(wanted.abs().max()))
        assert one.b is not None
        torch.testing.assert_close(one.b, -(one.W @ mean.float()), rtol=1e-3, atol=1e-4)
        assert not bool(one.R.any())


@pytest.mark.parametrize("options", [{}, {"component": FOUR}, {"act_fn": "tanh"}, {"positions": "f2+l2"}])
def test_nothing_but_the_reads_changes(options: dict[str, Any]) -> None:
    model = nodireft(**options).eval()
    with torch.no_grad():
        outputs = model(**BATCHES[0]).logits
    model.train()
    model.get_base_model().model.layers[1].eval()  # a mode of its own
    modes = [module.training for module in model.modules()]
    gradient = torch.ones_like(edits(model)[0].R)
    edits(model)[0].R.grad = gradient
    others = {n: p.detach().clone() for n, p in model.named_parameters() if not n.endswith((".W", ".b"))}
    for block in model.get_base_model().model.layers:
        block.self_attn.attention_dropout = 0.1  # draws random numbers
    state = torch.get_rng_state()
    before = reads(model)
    initialize_reft_weights(model, BATCHES)
    assert torch.equal(torch.get_rng_state(), state)
    for block in model.get_base_model().model.layers:
        block.self_attn.attention_dropout = 0.0
    assert [module.training for module in model.modules()] == modes
    assert edits(model)[0].R.grad is gradient
    assert bool((gradient == 1).all())
    assert all(p.grad is None for p in model.parameters() if p is not edits(model)[0].R)
    assert all(torch.equal(p, others[n]) for n, p in model.named_parameters() if n in others)
    stay = [name for name, one in named(model) if torch.equal(one.W, before.pop(0))]
    blind = ["base_model.model.model.layers.2.edit_output.reft_f2.default"]  # whose tokens the loss does not read
    assert stay == (blind if options.get("positions") else [])
    assert not any(one._forward_hooks for one in edits(model))
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**BATCHES[0]).logits, outputs, rtol=0, atol=0)


def test_padding_and_batching_do_not_matter() -> None:
    together = {name: torch.cat([inputs[name] for inputs in BATCHES]) for name in BATCHES[0]}
    uneven = [{name: value[part] for name, value in together.items()} for part in (slice(0, 15), slice(15, 16))]
    models = [nodireft() for _ in range(2)]
    for model, batches in zip(models, (BATCHES, uneven), strict=True):
        initialize_reft_weights(model, batches)
    for one, other in zip(*map(reads, models), strict=True):
        assert same_directions(one, other, atol=1e-2)

    left = []
    for inputs in BATCHES:
        turned = {name: value.clone() for name, value in inputs.items()}
        for value in turned.values():
            value[0] = value[0].roll(2)  # the padded row's two columns of padding come first
        left.append(turned)
    made = [nodireft() for _ in range(2)]
    initialize_reft_weights(made[0], BATCHES)
    initialize_reft_weights(made[1], left)
    for one, other in zip(reads(made[0]), reads(made[1]), strict=True):
        assert same_directions(one, other)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
def test_with_gradient_checkpointing(reentrant: bool) -> None:
    plain, saving = nodireft(component=FOUR), nodireft(component=FOUR)
    enable = getattr(saving, "activation_checkpointing_enable", None) or saving.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    saving.enable_input_require_grads()
    initialize_reft_weights(plain, BATCHES)
    runs: list[bool] = []
    saving.get_base_model().model.layers[1].mlp.register_forward_pre_hook(lambda *_: runs.append(True))
    initialize_reft_weights(saving, BATCHES)
    assert len(runs) == 2 * 2 * len(BATCHES)  # twice through, and each time again for the backward
    for one, other in zip(reads(plain), reads(saving), strict=True):
        torch.testing.assert_close(one, other)


def _states_alive(model: PeftModel) -> int:
    states: list[StorageWeakRef] = []
    counts: list[int] = []
    for one in edits(model):
        one.register_forward_pre_hook(lambda _, args: states.append(StorageWeakRef(args[0].untyped_storage())))

    def count(*_: Any) -> None:
        counts.append(sum(not state.expired() for state in states))
        states.clear()

    model.get_base_model().model.register_forward_hook(count)
    initialize_reft_weights(model, BATCHES)
    assert len(set(counts)) == 1
    return counts[0]


def test_gradient_checkpointing_saves_the_states_of_the_sites_too() -> None:
    """What is alive when a forward pass ends and its backward pass has not begun."""
    alive: dict[bool, int] = {}
    for checkpointed in (False, True):
        model = nodireft(component=FOUR)
        if checkpointed:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
            model.enable_input_require_grads()
        alive[checkpointed] = _states_alive(model)
    assert alive == {False: 12, True: 0}


def test_a_base_that_counts_what_it_sees_counts_nothing() -> None:
    model = nodireft()
    norm = torch.nn.BatchNorm1d(64)
    block = model.get_base_model().model.layers[1]
    block.seen = norm
    block.register_forward_hook(lambda module, args, h: norm(h.mT).mT)
    initialize_reft_weights(model, BATCHES)
    assert not bool(norm.num_batches_tracked)
    assert norm.training == model.training


def test_with_an_embedding_that_is_offloaded() -> None:
    made = [nodireft(), nodireft()]
    accelerate.cpu_offload(made[1].get_input_embeddings())
    for model in made:
        initialize_reft_weights(model, BATCHES)
    for one, other in zip(*map(reads, made), strict=True):
        torch.testing.assert_close(one, other)


def test_under_autocast_what_is_read_is_centred_to_the_precision_of_fp32() -> None:
    model = nodireft(layers=[0], component="block_input")  # embeddings: alike with autocast and without
    with torch.autocast("cpu", torch.bfloat16):
        initialize_reft_weights(model, BATCHES)
    (one,) = edits(model)
    inputs = [inputs["input_ids"][inputs["attention_mask"].bool()] for inputs in BATCHES]
    read = model.get_input_embeddings()(torch.cat(inputs)) @ one.W.mT + one.b
    assert bool((read.mean(0).abs() < 1e-4 * read.std(0)).all())


def test_the_first_step_has_more_to_go_by() -> None:
    """Reads of one size, so the gradient in R, which is all that the first step moves, tells where there is more."""
    sizes = {}
    for start in ("random", "gradient"):
        model = nodireft(component=FOUR)
        if start == "gradient":
            initialize_reft_weights(model, BATCHES)
        for inputs in BATCHES:
            model(**inputs).loss.backward()
        sizes[start] = sum(float(one.R.grad.norm()) for one in edits(model) if one.R.grad is not None)
    assert sizes["gradient"] > 1.5 * sizes["random"]


def test_a_saved_adapter_reads_as_it_did(tmp_path: Path) -> None:
    model = nodireft()
    initialize_reft_weights(model, BATCHES)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(layers=3, hidden=64), tmp_path)
    for one, other in zip(reads(model), reads(loaded), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_site_that_sees_one_state_only_stays_random() -> None:
    model = nodireft(positions="f1", layers=[0], component="block_input")
    same = [{**inputs, "input_ids": inputs["input_ids"].index_fill(1, torch.tensor([0]), 5)} for inputs in BATCHES]
    before = reads(model)
    initialize_reft_weights(model, same)
    torch.testing.assert_close(reads(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("bias", ["none", "frozen", "learned"])
def test_what_is_read_is_as_large_as_at_random_with_any_bias(bias: str) -> None:
    model = nodireft(bias=bias, component="block_input", hidden=32)
    embeddings = model.get_input_embeddings().weight
    embeddings.data += embeddings.std() * 3 * torch.randn(32)  # states that lie on one side
    sizes = []
    for started in (False, True):
        if started:
            initialize_reft_weights(model, BATCHES)
        seen: list[Tensor] = []
        (one, *_) = edits(model)
        handle = one.register_forward_hook(lambda module, args, output, to=seen: to.append(args[0]))
        with torch.no_grad():
            for inputs in BATCHES:
                model(**inputs)
        handle.remove()
        h = torch.cat(seen)
        read = h @ one.W.mT if one.b is None else h @ one.W.mT + one.b
        sizes.append(read.square().mean(0).sqrt().detach())
        if started:
            assert (one.b is None) == (bias == "none")
            centred = bool((read.mean(0).abs() < 1e-3 * sizes[1]).all())
            assert centred == (bias != "none")
    torch.testing.assert_close(sizes[1], sizes[0].square().mean().sqrt().expand(2), rtol=1e-2, atol=0)


def test_one_huge_token_does_not_take_all_reads() -> None:
    """A language model's first token may be 100 times as large as the others."""
    plain, huge = nodireft(), nodireft()
    for one in (plain, huge):
        one.get_input_embeddings().weight.data[97] *= 1000  # no batch but the second model's has it
        one.get_base_model().model.layers[0].post_attention_layernorm.weight.data.zero_()
    marked = [{**inputs, "input_ids": inputs["input_ids"].index_fill(1, torch.tensor([0]), 97)} for inputs in BATCHES]
    initialize_reft_weights(plain, BATCHES)
    initialize_reft_weights(huge, marked)
    token = torch.nn.functional.normalize(huge.get_input_embeddings().weight[97], dim=0)
    for one, other in zip(edits(plain), edits(huge), strict=True):
        size = one.W.detach().norm()
        assert 0.5 * size < other.W.detach().norm() < 2 * size
        along = (other.W.detach() @ token).abs() / other.W.detach().norm(dim=1)
        assert bool((along < 0.7).all())


def test_it_keeps_out_of_what_other_adapters_write() -> None:
    model = nodireft(init_weights=False)
    model.add_adapter(
        "tone", ReftConfig(intervention="nodireft", r=2, layers="all", positions="all", orthogonal_to=["default"])
    )
    with torch.no_grad():
        for one in edits(model):
            if bool(one.R.any()):
                one.R.mul_(50)  # the other adapter is most of what there is to see
    model.set_adapter(["default", "tone"])
    before = {id(one): one.W.detach().norm() for one in edits(model)}
    initialize_reft_weights(model, BATCHES, adapter_name="tone")
    for layer in (m for m in model.modules() if isinstance(m, reftune.tuner.ReftLayer)):
        (old,), (new,) = layer.interventions("default"), layer.interventions("tone")
        w, r = new.W.detach(), old.R.detach()
        assert float((w @ r.mT).abs().max()) < 1e-5 * float(w.norm() * r.norm())
        assert w.norm() > 0.2 * before[id(new)]


def test_bad_input() -> None:
    model = nodireft()
    with pytest.raises(ValueError, match=r"no ReFT adapter 'other' in this model. Its adapters: 'default'"):
        initialize_reft_weights(model, BATCHES, adapter_name="other")
    with pytest.raises(ValueError, match="Its adapters: none"):
        initialize_reft_weights(tiny_llama(), BATCHES)
    before = reads(model)
    for batches, words in (
        ((inputs for inputs in BATCHES), "there were 4 and then 0: pass a list"),
        ([], "there were 0 and then 0"),
        ([{"input_ids": BATCHES[0]["input_ids"]}], r"no loss \(do they have labels\?\)"),
        ([{**BATCHES[0], "labels": torch.full_like(BATCHES[0]["labels"], -100)}], "the loss nan"),
    ):
        with pytest.raises(ValueError, match=words):
            initialize_reft_weights(model, batches)
    torch.testing.assert_close(reads(model), before, rtol=0, atol=0)
    assert not any(one._forward_hooks for one in edits(model))
    model.disable_adapter_layers()
    with pytest.raises(ValueError, match=r"adapters are disabled: call model.enable_adapter_layers\(\) first"):
        initialize_reft_weights(model, BATCHES)
    model.enable_adapter_layers()
    model.add_adapter("tone", ReftConfig(intervention="nodireft", layers="all"))
    with pytest.raises(ValueError, match=r"'tone' is not active: call model.set_adapter\('tone'\) first"):
        initialize_reft_weights(model, BATCHES, adapter_name="tone")
    with pytest.raises(ValueError, match="writes something already"):
        initialize_reft_weights(nodireft(init_weights=False), BATCHES)
    with pytest.raises(ValueError, match="LoreftIntervention has no start of this kind"):
        initialize_reft_weights(nodireft(intervention="loreft"), BATCHES)
    with pytest.raises(ValueError, match=r'StackIntervention has no start of this kind.*"nodireft" without stack'):
        initialize_reft_weights(nodireft(stack=[1, 1]), BATCHES)
    overflowing = nodireft()
    before = reads(overflowing)
    edits(overflowing)[1].register_forward_hook(lambda module, args, out: out + (out * 0).sqrt() * 0)
    with pytest.raises(ValueError, match="finite and its gradient is not"):
        initialize_reft_weights(overflowing, BATCHES)
    torch.testing.assert_close(reads(overflowing), before, rtol=0, atol=0)
    composed = nodireft()
    composed.add_adapter("tone", ReftConfig(intervention="nodireft", layers="all", positions="all"))
    with reftune.strength(composed, {"default": 0.5}), pytest.raises(ValueError, match="are composed here"):
        initialize_reft_weights(composed, BATCHES)
    frozen = nodireft()
    frozen.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen, so they are not set anew"):
        initialize_reft_weights(frozen, BATCHES)
    unreached = nodireft(positions="gen/50")
    with pytest.raises(ValueError, match="edits no token of these batches"):
        initialize_reft_weights(unreached, BATCHES)
