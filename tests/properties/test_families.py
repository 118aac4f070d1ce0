"""The properties that make positions right, each over every family, with positions and layers drawn at random."""

import contextlib
import inspect
import random
import warnings

import pytest
import torch
from peft import PeftModel

from families import CAUSAL, RECURRENT, tiny
from reference import columns, greedy, logits
from reftune import ReftConfig, get_reft_model
from reftune.interventions import Intervention
from reftune.sites import find_blocks, find_sites
from reftune.tuner.layer import ReftLayer

pytestmark = pytest.mark.filterwarnings("ignore:.*reference PyTorch implementation.*", "ignore:.*YaRN.*")
EXPRESSIONS = ["f2+l2", "l2", "f3", "mid1+l1", "prompt", "all", "l1+gen", "f1+gen:2", "l2+gen/2", "f7+l7"]
KINDS = ["loreft", "nodireft", "red", "postblock", "consreft", "noreft", "reft_r1"]


def adapted(name: str, salt: str = "", **settings):
    """A model of the family with an adapter that changes the output much; what it edits depends on the names alone."""
    rng = random.Random(name + salt)
    kind = settings.pop("intervention", rng.choice(KINDS))
    config = ReftConfig(
        r=rng.randint(1, 5),
        layers=settings.pop("layers", rng.choice(["mid", "all", [0, -1], "50%-100%"])),
        positions=settings.pop("positions", rng.choice(EXPRESSIONS)),
        intervention=kind,
        share_weights=rng.random() < 0.5,
        init_weights=False,
        task_type="CAUSAL_LM",
        **settings,
    )
    torch.manual_seed(2)
    model = get_reft_model(tiny(name), config)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Intervention):
                for key, parameter in module.named_parameters():
                    if key != "R":
                        parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval(), rng


def prompts(rng: random.Random, rows: int = 3) -> list[list[int]]:
    return [[rng.randrange(2, 90) for _ in range(rng.choice([1, 2, 3, 5, 8, 11]))] for _ in range(rows)]


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    exact = wanted.dtype == torch.float64
    torch.testing.assert_close(found.to(wanted.dtype), wanted, atol=1e-5 if exact else 1e-3, rtol=1e-4)


def padded(rows: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return ids, mask


@pytest.mark.parametrize("name", CAUSAL)
def test_generation_with_cache_equals_without_equals_brute_force(name):
    model, rng = adapted(name)
    prompt = prompts(rng, 1)[0]
    wanted, scores = greedy(model, prompt, 4)
    for use_cache in (True, False):
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=4,
            do_sample=False,
            use_cache=use_cache,
            output_logits=True,
            return_dict_in_generate=True,
        )
        assert out.sequences[0, len(prompt) :].tolist() == wanted, f"use_cache={use_cache}"
        assert_close(torch.cat(out.logits), scores)


@pytest.mark.parametrize("name", [n for n in CAUSAL if n not in RECURRENT])
def test_left_padded_batch_equals_single_rows_in_generation(name):
    model, rng = adapted(name, "left")
    rows = prompts(rng)
    ids, mask = padded(rows, "left")
    out = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    for i, row in enumerate(rows):
        assert out[i, ids.shape[1] :].tolist() == greedy(model, row, 4)[0], f"row {i} of {rows}"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [n for n in CAUSAL if n not in RECURRENT])
def test_padded_forward_equals_unpadded(name, side):
    model, rng = adapted(name, side)
    rows = prompts(rng)
    ids, mask = padded(rows, side)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    takes_positions = "position_ids" in inspect.signature(type(model.get_base_model()).forward).parameters
    extra = {"position_ids": position_ids} if takes_positions else {}
    with torch.no_grad():
        found = model(ids, attention_mask=mask, **extra).logits
    for i, row in enumerate(rows):
        assert_close(found[i][mask[i].bool()], logits(model, row, len(row)))


@pytest.mark.parametrize("name", CAUSAL)
def test_positions_in_training_equal_positions_in_generation(name):
    model, rng = adapted(name, "train")
    prompt = prompts(rng, 1)[0]
    answer, scores = greedy(model, prompt, 4)
    ids = torch.tensor([prompt + answer])
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    model.train()
    out = model(ids, labels=labels, use_cache=False)
    assert_close(out.logits[0, len(prompt) - 1 : -1], scores)
    mask = (labels == -100).long()
    other = model(ids, prompt_mask=mask, use_cache=False)
    assert torch.equal(other.logits, out.logits)

    out.loss.backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".reft_" in key), key
    edited = any(columns(model.peft_config["default"].positions, len(prompt), ids.shape[1]).values())
    if model.peft_config["default"].intervention != "reft_r1":  # its ReLU may be off at every token
        assert edited == any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("name", CAUSAL)
def test_disabled_equals_base_bit_for_bit_and_loaded_equals_saved(name, tmp_path):
    base = tiny(name)
    ids = torch.randint(2, 90, (2, 6))
    with torch.no_grad():
        plain = base(ids).logits
    model, _ = adapted(name, "save")
    with torch.no_grad():
        edited = model(ids).logits
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, plain)
    assert not torch.allclose(edited, plain)

    model.save_pretrained(tmp_path)
    assert sum(f.stat().st_size for f in tmp_path.rglob("*")) < 40_000
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, edited)
    unloaded = loaded.unload()
    with torch.no_grad():
        assert torch.equal(unloaded(ids).logits, plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unloaded.modules())


@pytest.mark.parametrize("name", [n for n in CAUSAL if n not in RECURRENT | {"bloom", "mpt", "gpt_neo", "falcon"}])
def test_packed_sequences_equal_rows_of_their_own(name):
    model, rng = adapted(name, "packed")
    rows = prompts(rng)
    ids = torch.tensor([[token for row in rows for token in row]])
    position_ids = torch.tensor([[i for row in rows for i in range(len(row))]])
    takes_positions = "position_ids" in inspect.signature(type(model.get_base_model()).forward).parameters
    if not takes_positions:
        pytest.skip("takes no position ids")
    with torch.no_grad(), model.disable_adapter():
        last = model(ids, position_ids=position_ids, use_cache=False).logits[0, -len(rows[-1]) :]
        if not torch.allclose(last, model(torch.tensor(rows[-1:])).logits[0], atol=1e-5):
            pytest.skip("the base itself mixes packed sequences")
    with torch.no_grad():
        found = model(ids, position_ids=position_ids, use_cache=False).logits[0]
    at = 0
    for row in rows:
        assert_close(found[at : at + len(row)], logits(model, row, len(row)))
        at += len(row)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", CAUSAL)
def test_checkpointed_equals_not(name, reentrant):
    model, rng = adapted(name, "checkpoint", intervention="loreft")
    if not model.get_base_model().supports_gradient_checkpointing:
        pytest.skip("the family has no gradient checkpointing")
    ids = torch.tensor([[rng.randrange(2, 90) for _ in range(9)]])
    labels = ids.clone()
    labels[:, :6] = -100
    model.train()

    def step() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        loss = model(ids, labels=labels, use_cache=False).loss
        loss.backward()
        return loss.detach(), {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}

    loss, gradients = step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        again, same = step()
    torch.testing.assert_close(again, loss)
    assert same.keys() == gradients.keys()
    for key, gradient in gradients.items():
        assert_close(same[key], gradient)


def inputs_of_parts(name: str) -> list[str]:
    """Those of attention_input and mlp_input that every block of the family has."""
    found, model = [], tiny(name)
    for component in ("attention_input", "mlp_input"):
        with contextlib.suppress(ValueError):
            find_sites(model, "all", component)
            found.append(component)
    return found


@pytest.mark.parametrize("name", [n for n in CAUSAL if n not in RECURRENT and inputs_of_parts(n)])
def test_edits_of_what_attention_and_feed_forward_read(name):
    component = inputs_of_parts(name)
    kind = random.Random(name).choice([k for k in KINDS if k != "reft_r1"])  # by hand its generated tokens are coupled
    model, rng = adapted(name, "inputs", component=component, layers=[0, 2], intervention=kind)
    paths = {path for path, layer in model.get_base_model().named_modules() if isinstance(layer, ReftLayer)}
    assert paths == {f"{site.path}.edit_input" for c in component for site in find_sites(tiny(name), [0, 2], c)}
    rows = prompts(rng)
    ids, mask = padded(rows, "left")
    out = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    for i, row in enumerate(rows):
        assert out[i, ids.shape[1] :].tolist() == greedy(model, row, 4)[0], f"row {i} of {rows}"


@pytest.mark.parametrize("name", ["llama", "phi", "olmo2", "cohere2"])
@pytest.mark.parametrize("train", [True, False])
def test_such_an_edit_leaves_the_residual_stream_and_the_other_part_alone(name, train):
    model, _ = adapted(name, component="attention_input", layers=[2], positions="all", intervention="nodireft")
    ids, seen = torch.randint(2, 90, (2, 6)), {}
    base = model.get_base_model()
    block = base.get_submodule(find_blocks(base)[2])
    part = base.get_submodule(find_sites(base, 2, "mlp_input")[0].path)
    block.register_forward_hook(lambda m, args, out: seen.update(block=args[0].clone()))  # after all of it has run
    part.register_forward_pre_hook(lambda m, args: seen.update(mlp=args[0].clone()))
    before = model.train(train)(ids).logits
    edited = dict(seen)
    with model.disable_adapter():
        plain = model(ids).logits
    assert not torch.equal(before, plain)
    assert torch.equal(edited["block"], seen["block"])
    assert torch.equal(edited["mlp"], seen["mlp"]) == (name in ("phi", "cohere2"))  # beside attention, not after it
