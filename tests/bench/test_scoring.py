"""Scores of causal models against plain forward passes, with adapters whose edits depend on where the prompt ends."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.conftest import tiny_llama
from tests.tiny_chat import tiny_tokenizer

from reftune import ReftConfig, get_reft_model
from reftune.bench import scoring
from reftune.bench.logits import labelled_logits
from reftune.data import ReftDataCollator

PROMPTS = [[5, 6, 7, 8, 9], [11, 12], [20, 21, 22, 23]]
CHOICES = [[[30, 31, 98], [32, 98]], [[33], [34, 35]], [[36, 37, 38], [39, 40, 41]]]


def model(kind: str) -> Any:
    base = tiny_llama()
    if kind == "base":
        return base
    if kind == "lora":
        adapted: Any = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    else:
        adapted = get_reft_model(base, ReftConfig(r=2, layers="all", positions=kind, init_weights=False))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return adapted.eval()


@torch.no_grad()
def by_hand(adapted: Any, prompt: list[int], response: list[int]) -> float:
    """Σ log p, one unpadded pass of one row."""
    ids = torch.tensor([prompt + response])
    mask = torch.tensor([[1] * len(prompt) + [0] * len(response)])
    extra = {"prompt_mask": mask} if "REFT" in str(getattr(adapted, "peft_config", "")) else {}
    logs = adapted(input_ids=ids, **extra).logits[0].log_softmax(-1)
    return sum(float(logs[len(prompt) + i - 1, token]) for i, token in enumerate(response))


@pytest.mark.parametrize("kind", ["base", "lora", "f2+l2", "l1+gen", "all", "mid1"])
def test_both_ways_of_scoring_equal_a_plain_pass(kind: str) -> None:
    adapted = model(kind)
    expected = [[by_hand(adapted, p, c) for c in choices] for p, choices in zip(PROMPTS, CHOICES, strict=True)]
    cached = scoring.choice_scores(adapted, PROMPTS, CHOICES, pad_id=0, batch_size=2)
    for row, wanted in zip(cached, expected, strict=True):
        assert row == pytest.approx(wanted, abs=1e-4)
    pairs = [(p, c) for p, choices in zip(PROMPTS, CHOICES, strict=True) for c in choices]
    found = scoring.continuation_scores(adapted, pairs, ReftDataCollator(tiny_tokenizer()), batch_size=4)
    assert [s for s, _ in found] == pytest.approx([s for row in expected for s in row], abs=1e-4)
    assert [n for _, n in found] == [len(c) for _, c in pairs]


def test_prompts_with_fewer_choices_share_a_run() -> None:
    adapted = model("l1")
    choices = [CHOICES[0], CHOICES[1][:1], CHOICES[2]]
    found = scoring.choice_scores(adapted, PROMPTS, choices, pad_id=0, batch_size=8)
    assert [len(row) for row in found] == [2, 1, 2]
    assert found[1] == pytest.approx([by_hand(adapted, PROMPTS[1], [33])], abs=1e-4)


def test_logits_of_labelled_tokens_only_are_the_same_logits_and_gradients() -> None:
    adapted = model("f2+l2")
    rows = [{"input_ids": p + c[0], "labels": [-100] * len(p) + c[0]} for p, c in zip(PROMPTS, CHOICES, strict=True)]
    batch = ReftDataCollator(tiny_tokenizer())(rows)
    logits, tokens, where = labelled_logits(adapted, batch)
    loss = torch.nn.functional.cross_entropy(logits, tokens)
    whole = adapted(**batch).loss
    assert logits.shape == (sum(len(c[0]) for c in CHOICES), 99)
    assert where.tolist() == [0, 0, 0, 1, 2, 2, 2]
    assert loss.item() == pytest.approx(whole.item(), abs=1e-6)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    ours, theirs = torch.autograd.grad(loss, trained), torch.autograd.grad(whole, trained)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert adapted(input_ids=batch["input_ids"]).logits.shape[:2] == batch["input_ids"].shape  # the hook is gone


def test_under_autocast_logits_keep_their_precision() -> None:
    adapted = model("l1")
    rows = [{"input_ids": p + c[0], "labels": [-100] * len(p) + c[0]} for p, c in zip(PROMPTS, CHOICES, strict=True)]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        logits, _, _ = labelled_logits(adapted, ReftDataCollator(tiny_tokenizer())(rows))
        outside = adapted(input_ids=torch.tensor([[5, 6]])).logits
    assert not torch.equal(logits, logits.bfloat16().float())
    assert outside.dtype == torch.bfloat16  # the model is as it was


def test_generation_in_a_batch_is_generation_alone() -> None:
    adapted, tokenizer = model("f1+l2"), tiny_tokenizer()
    together = scoring.generate(adapted, tokenizer, PROMPTS, max_new_tokens=6, batch_size=3)
    alone = [scoring.generate(adapted, tokenizer, [p], max_new_tokens=6)[0] for p in PROMPTS]
    assert together == alone
    assert any(together)
    drawn = scoring.generate(adapted, tokenizer, PROMPTS, max_new_tokens=6, do_sample=True, top_k=40, temperature=0.3)
    assert len(drawn) == 3


def test_a_model_without_an_output_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="no output layer"):
        labelled_logits(tiny_llama().model, {"input_ids": torch.ones(1, 2), "labels": torch.ones(1, 2)})
