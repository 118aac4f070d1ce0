"""The base model's `forward`, called past the hooks as sentence-transformers calls it, is the model called."""

import inspect

import pytest
import torch
from tests.properties.test_families import adapted, assert_close, padded, prompts
from transformers import BertConfig, BertModel, DynamicCache, LlamaForCausalLM

from conftest import tiny_llama
from families import CAUSAL
from reftune import ReftConfig, get_reft_model
from reftune.tuner.caches import cache_name
from reftune.tuner.layer import ReftLayer

pytestmark = pytest.mark.filterwarnings("ignore:.*reference PyTorch implementation.*", "ignore:.*YaRN.*")
IDS = torch.tensor([[5, 6, 7, 8, 9]])
CACHE = cache_name(tiny_llama())
LABELS = torch.tensor([[-100, -100, -100, 8, 9]])


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_the_same_as_the_call_in_every_family(name: str) -> None:
    model, rng = adapted(name, "forward")
    base = model.get_base_model()
    ids, mask = padded(prompts(rng), "right")
    wanted = model(input_ids=ids, attention_mask=mask)[0][mask.bool()]
    assert_close(base.forward(input_ids=ids, attention_mask=mask)[0][mask.bool()], wanted)
    with model.disable_adapter():
        plain = base.forward(input_ids=ids, attention_mask=mask)[0][mask.bool()]
        assert torch.equal(plain, model(input_ids=ids, attention_mask=mask)[0][mask.bool()])


def test_an_encoder_trains_by_it() -> None:
    settings = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    base = BertModel(BertConfig(vocab_size=60, **settings)).eval()
    model = get_reft_model(base, ReftConfig(positions="f1+l1", init_weights=False, task_type="FEATURE_EXTRACTION"))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    gradients = []
    for run in (model, base.forward):
        model.zero_grad()
        (run(input_ids=IDS.expand(2, -1), attention_mask=mask)[0] * mask[..., None]).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert any(bool(one.any()) for one in gradients[0])


def test_it_counts_the_prompt_by_labels_and_by_the_cache() -> None:
    model = get_reft_model(tiny_llama(), ReftConfig(positions="l2", init_weights=False)).eval()
    base = model.get_base_model()
    assert torch.equal(base.forward(IDS, labels=LABELS).loss, model(IDS, labels=LABELS).loss)
    assert not torch.equal(model(IDS, labels=LABELS).logits, model(IDS).logits)
    cache = DynamicCache()
    base.forward(IDS[:, :3], **{CACHE: cache})
    after = base.forward(IDS[:, 3:], **{CACHE: cache}).logits
    torch.testing.assert_close(after, model(IDS, labels=LABELS).logits[:, 3:])


def test_a_pass_that_fails_leaves_nothing_open() -> None:
    model = get_reft_model(tiny_llama(), ReftConfig(positions="l2", init_weights=False)).eval()
    base = model.get_base_model()
    wanted = model(IDS).logits
    with pytest.raises(IndexError):
        base.forward(torch.tensor([[1000]]))
    with pytest.raises(RuntimeError, match="ran outside a forward pass"):
        base.model.layers[2](torch.zeros(1, 5, 32), position_embeddings=base.model.rotary_emb(wanted, IDS))
    assert torch.equal(base.forward(IDS).logits, wanted)


def test_the_model_is_of_its_class_to_all_who_ask(tmp_path) -> None:
    base, plain = tiny_llama(), tiny_llama()
    model = get_reft_model(base, ReftConfig())
    assert isinstance(base, LlamaForCausalLM)
    assert (str(type(base)), type(base).__qualname__) == (str(LlamaForCausalLM), "LlamaForCausalLM")
    assert inspect.signature(base.forward) == inspect.signature(plain.forward)
    merged = model.unload()
    assert type(merged) is LlamaForCausalLM
    assert not any(isinstance(module, ReftLayer) for module in merged.modules())
    merged.save_pretrained(tmp_path)
    assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path)(IDS).logits, plain(IDS).logits)


def test_a_class_that_somebody_put_before_ours_stays() -> None:
    base = tiny_llama()
    model = get_reft_model(base, ReftConfig())
    base.__class__ = type("FSDPLlamaForCausalLM", (torch.nn.Identity, type(base)), {})
    assert type(model.unload()).__name__ == "FSDPLlamaForCausalLM"
