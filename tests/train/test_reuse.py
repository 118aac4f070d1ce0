"""Every reuse path has the loss and the gradients of the plain computation; what is not exact is not reused."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reuse_cases import FEWER, GAPS, collate, computed, doubles, examples, reft, reuse, with_reuse

from conftest import tiny_llama
from families import FP32, tiny
from reftune.train.reuse import DiskStore, MemoryStore, make_plan, prefix
from reftune.train.reuse.check import check
from reftune.tuner.caches import cache_name

pytestmark = GAPS
FAMILIES = ["llama", "qwen3", "gemma3_text", "gpt2", "mistral", "qwen3_next", "bloom", "gpt_oss", "mamba"]
WHOLE_STATE = {"qwen3_next", "mamba"}


def assert_equal(found: Any, plain: Any, limit: float) -> None:
    assert abs(found[0] - plain[0]) <= limit * abs(plain[0])
    assert (found[1] - plain[1]).norm() <= limit * plain[1].norm()
    assert plain[1].norm() > 0


@pytest.mark.parametrize("positions", ["l2", "f2+l2", "l1+gen"])
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str, positions: str) -> None:
    model = reft(tiny(name), positions)
    engine, said = reuse(model)
    limit = 1e-5 if name in FP32 else 1e-10
    with doubles():
        for seed in range(2):
            batch = collate(examples(seed=seed))
            plain = computed(model, dict(batch))
            for keep in (False, True, True):  # computed and dropped, computed and kept, found
                assert_equal(with_reuse(engine, batch, keep), plain, limit)
    plan = engine.plan
    assert plan.logits
    assert plan.depth == 2 - FEWER
    assert plan.split == (positions != "f2+l2" and name not in WHOLE_STATE)
    assert engine.store.found >= 8
    assert not said


@st.composite
def batches(draw: Any) -> dict[str, Any]:
    rows = examples(draw(st.integers(1, 4)), draw(st.integers(0, 999)), draw(st.integers(1, 24)))
    batch = collate(
        rows, pad_to_multiple_of=draw(st.sampled_from([None, 8])), padding_side=draw(st.sampled_from(["left", "right"]))
    )
    places = batch["attention_mask"].cumsum(1) - 1
    batch["position_ids"] = places.clamp(min=0)
    return batch


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    batch=batches(),
    positions=st.sampled_from(["l1", "l3", "mid1", "gen", "gen/2", "l2+gen:2", "f1", "all", "f2+l2"]),
    layers=st.sampled_from(["all", [0], [2], [-1], [1, 2]]),
    component=st.sampled_from(
        ["block_output", "block_input", "mlp_output", "attention_output", ["attention_input", "mlp_input"]]
    ),
    name=st.sampled_from(["llama", "mistral", "gpt2"]),
    on_gpu=st.booleans(),
)
def test_any_batch(batch: Any, positions: str, layers: Any, component: Any, name: str, on_gpu: bool) -> None:
    """Also with the heads laid out as they are on an accelerator."""
    model = reft(tiny(name), positions, layers=layers, component=component)
    engine, said = reuse(model)
    with doubles(), patch.object(prefix, "_starts_slowly", lambda device: on_gpu):
        plain_loss, plain = computed(model, dict(batch))
        for keep in (False, True, True):
            loss, gradients = with_reuse(engine, batch, keep)
            assert abs(loss - plain_loss) <= 1e-10 * abs(plain_loss)
            assert (gradients - plain).norm() <= 1e-10 * plain.norm() + 1e-14
    assert not said


def test_only_the_window_is_computed() -> None:
    """Prompt 20, response 4, `l2`: 5 columns (2 suffix, 4 response, the last of which predicts nothing), 5 logits."""
    model = reft(tiny_llama(), "l2")
    row = {"input_ids": list(range(2, 26)), "labels": [-100] * 20 + [1, 2, 3, 4]}
    engine, _ = reuse(model)
    prepared = engine.prepare(collate([row]), keep=True)
    ran: dict[str, Any] = {}
    base = model.get_base_model()
    for name in ("model.layers.0.mlp", "model.layers.1.mlp", "model.layers.2.mlp", "lm_head"):
        base.get_submodule(name).register_forward_hook(lambda m, a, o, n=name: ran.update({n: tuple(o.shape[:2])}))
    with prepared.active():
        model(**prepared.inputs)
    assert ran.pop("model.layers.1.mlp", None) == ((1, 5) if FEWER else None)
    assert ran == {"model.layers.2.mlp": (1, 5), "lm_head": (1, 5)}
    assert prepared.inputs[cache_name(model.get_base_model())].get_seq_length() == 18
    assert base.model.layers[0].__dict__.get("forward") is None
    assert not base.lm_head._forward_pre_hooks


def test_without_selected_logits() -> None:
    """For a trainer whose loss needs the logits of the window."""
    model = reft(tiny("llama"), "l2")
    engine, _ = reuse(model, select=False)
    with doubles():
        batch = collate(examples())
        plain = computed(model, dict(batch))
        for keep in (False, True):
            assert_equal(with_reuse(engine, batch, keep), plain, 1e-10)


def test_what_is_kept_alone_does_not_depend_on_the_batch() -> None:
    model = reft(tiny_llama(), "l2")
    rows = examples(6)
    stores = []
    for order in ([0, 1, 2, 3, 4, 5], [5, 3, 1, 0, 2, 4]):
        engine, _ = reuse(model, alone=True)
        for i in range(0, 6, 3):
            with_reuse(engine, collate([rows[j] for j in order[i : i + 3]]), True)
        stores.append(engine.store.entries)
    assert stores[0].keys() == stores[1].keys()
    assert all(torch.equal(t, stores[1][key][name]) for key, entry in stores[0].items() for name, t in entry.items())


def test_num_items_in_batch_and_rows_without_labels() -> None:
    model = reft(tiny("llama"), "l2")
    engine, _ = reuse(model)
    batch = collate(examples())
    batch["labels"][1] = -100
    with doubles():
        plain = computed(model, {**batch, "num_items_in_batch": 17})
        assert_equal(with_reuse(engine, batch, True, num_items_in_batch=17), plain, 1e-10)


def test_a_prompt_is_shared_by_its_answers_and_by_other_adapters() -> None:
    base = tiny_llama()
    store = MemoryStore(10**9)
    one, _ = reuse(reft(base, "l2"), store=store)
    prompt = list(range(2, 20))
    rows = [{"input_ids": [*prompt, a, 3], "labels": [-100] * len(prompt) + [a, 3]} for a in (40, 41)]
    with_reuse(one, collate(rows[:1]), True)
    kept = store.used
    with_reuse(one, collate(rows[1:]), True)
    assert store.used - kept < kept / 4  # its window's states alone
    base = one.model.unload()
    other, said = reuse(reft(base, "l1+gen", layers=[1, 2]), store=store)
    with_reuse(other, collate(rows), True)
    other, said = reuse(reft(other.model.unload(), "l2", r=1), store=store)
    found = store.found
    with_reuse(other, collate(rows), True)
    assert store.found == found + 2
    assert not said


# -- what is not reused ---------------------------------------------------------------------------------------------


def not_reused(model: Any) -> str:
    return " ".join(make_plan(model).why_not.values())


def test_reasons_are_said() -> None:
    assert "f1+gen edit the prompt from its start" in not_reused(reft(tiny_llama(), "f1+gen"))
    hybrid = make_plan(reft(tiny("qwen3_next"), "l2"))
    assert hybrid.depth == 2 - FEWER
    assert not hybrid.split
    assert "linear attention" in str(hybrid)

    model = reft(tiny_llama(), "l2", modules_to_save=["norm"])
    assert "norm.modules_to_save.default.weight is trained too" in not_reused(model)
    assert make_plan(model).logits
    model = reft(tiny_llama(), "l2")
    model.get_base_model().config.output_router_logits = True
    assert "output_router_logits" in not_reused(model)
    model = reft(tiny_llama(), "l2", intervention="loreft", component="model.embed_tokens.output", layers="all")
    assert make_plan(model).depth == 0
    assert make_plan(model).split
    model = reft(tiny_llama(), "l2")
    with model.disable_adapter():
        assert "no active ReFT adapter" in not_reused(model)
    assert "no active ReFT adapter" in not_reused(tiny_llama())


def test_dropout_in_the_base() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    base = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=4, n_head=4, vocab_size=99, n_positions=64))
    model = reft(base, "l2")
    plan = make_plan(model)
    assert (plan.logits, plan.depth, plan.split) == (True, 0, False)
    assert "random in training mode (transformer.drop: dropout 0.1)" in str(plan)
    assert make_plan(model.eval()).split
    functional = reft(tiny_llama(), "l2")
    functional.get_base_model().model.layers[1].self_attn.attention_dropout = 0.2
    assert "attention_dropout 0.2" in not_reused(functional)


def test_gradient_checkpointing_keeps_the_states_alone() -> None:
    model = reft(tiny("llama"), "l2")
    base = model.get_base_model()
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    engine, _ = reuse(model)
    assert (engine.plan.depth, engine.plan.split) == (2 - FEWER, False)
    assert "checkpointing takes the cache away" in str(engine.plan)
    with doubles():
        batch = collate(examples())
        plain = computed(model, dict(batch))
        for _ in range(2):
            assert_equal(with_reuse(engine, batch, True), plain, 1e-10)


def test_encoders_and_encoder_decoders() -> None:
    from transformers import BertConfig, BertLMHeadModel, T5Config, T5ForConditionalGeneration

    bert = BertLMHeadModel(
        BertConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=32, vocab_size=99)
    )
    assert "no causal language model" in not_reused(reft(bert, "l2"))
    t5 = T5ForConditionalGeneration(T5Config(d_model=32, num_layers=4, num_heads=4, d_kv=8, d_ff=32, vocab_size=99))
    assert "encoder-decoder" in not_reused(reft(t5, "f1"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pixel_values": torch.zeros(4, 3)}, "the batch holds pixel_values"),
        ({"position_ids": torch.zeros(4, 18, dtype=torch.long)}, "packed rows"),
        ({"attention_mask": torch.ones(4, 1, 18, 18)}, "attention mask is not"),
        ({"attention_mask": torch.tensor([[1, 0] * 9] * 4)}, "mask has holes"),
        ({"labels": None}, "no input_ids with labels"),
        ({"adapter_names": ["default"] * 4}, "rows name adapters of their own"),
    ],
)
def test_batches_that_are_computed_whole(change: dict[str, Any], words: str) -> None:
    engine, said = reuse(reft(tiny_llama(), "l2"))
    batch = collate(examples(), pad_to_multiple_of=18)
    assert batch["input_ids"].shape == (4, 18)
    for _ in range(2):
        assert engine.prepare({**batch, **change}, keep=True) is None
    assert len(said) == 1
    assert words in said[0]


def test_left_padding_without_position_ids_is_computed_whole() -> None:
    engine, said = reuse(reft(tiny_llama(), "l2"))
    assert engine.prepare(collate(examples(), padding_side="left"), keep=True) is None
    assert "padded on the left" in said[0]


# -- the first batch computed both ways -----------------------------------------------------------------------------


def test_the_check_agrees_and_leaves_no_trace() -> None:
    model = reft(tiny_llama(), "l2", dropout=0.5)
    engine, _ = reuse(model)
    state = torch.get_rng_state()
    assert check(engine, model, collate(examples()), keep=True) is None
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert model.get_base_model().model.layers[1].edit_output.reft_l2.default.training


def test_the_check_notices_edits_at_the_wrong_place_while_they_are_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    model = reft(tiny_llama(), "l2", init_weights=True)
    engine, _ = reuse(model)

    def shifted(*args: Any) -> Any:
        window = lay_out(*args)
        window.prompt_mask[:, 1] = 0
        return window

    from reftune.train.reuse import engine as module

    lay_out = module.lay_out
    monkeypatch.setattr(module, "lay_out", shifted)
    assert "gradients of its first rows differ" in str(check(engine, model, collate(examples()), keep=True))


def test_the_check_notices_a_wrong_state_and_a_model_that_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    model = reft(tiny_llama(), "l2")
    engine, _ = reuse(model)
    batch = collate(examples())
    with_reuse(engine, batch, True)
    for entry in engine.store.entries.values():
        for tensor in entry.values():
            tensor.mul_(3)
    assert "the loss of its first rows is" in str(check(engine, model, batch, keep=True))

    from reftune.train.reuse import engine as module

    def breaks(*args: Any) -> Any:
        raise RuntimeError("no cache here")

    monkeypatch.setattr(module, "head_cache", breaks)
    assert "does not take it (RuntimeError: no cache here)" in str(check(engine, model, batch, keep=True))


# -- the base has changed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("through_data", [False, True])
def test_a_changed_base_weight_is_noticed(where: str, through_data: bool, tmp_path: Any) -> None:
    model = reft(tiny("llama"), "l2")
    store = MemoryStore(10**9) if where == "memory" else DiskStore(tmp_path, 10**9)
    engine, said = reuse(model, store=store)
    batch = collate(examples())
    with_reuse(engine, batch, True)
    weight = model.get_base_model().model.layers[0].mlp.up_proj.weight
    if through_data:
        weight.data[3, 5] += 0.1
        engine.begin()  # as a trainer does when it begins
    else:
        with torch.no_grad():
            weight[3, 5] += 0.1
    with doubles():
        plain = computed(model, dict(batch))
        assert_equal(with_reuse(engine, batch, True), plain, 1e-7)
    assert store.found == 0
    assert len(said) == 1
    assert "other base weights" in said[0]
