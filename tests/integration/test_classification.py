"""Sequence and token classification: the head is trained and saved with the adapter, and comes back with it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_training import adapter, losses, trainer
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, BertConfig, LlamaConfig

from reftune import ReftConfig, get_reft_model

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 99,
    "pad_token_id": 0,
    "num_labels": 3,
}
KINDS = {
    "llama-sequence": (LlamaConfig, AutoModelForSequenceClassification, "SEQ_CLS", "score"),
    "bert-sequence": (BertConfig, AutoModelForSequenceClassification, "SEQ_CLS", "classifier"),
    "llama-token": (LlamaConfig, AutoModelForTokenClassification, "TOKEN_CLS", "score"),
    "bert-token": (BertConfig, AutoModelForTokenClassification, "TOKEN_CLS", "classifier"),
}


def base(kind: str) -> Any:
    config, auto, _, _ = KINDS[kind]
    torch.manual_seed(0)
    return auto.from_config(config(**SIZES)).eval()


def data(kind: str) -> list[dict[str, Any]]:
    """Eight rows whose class is that of their first token; token classes are the token's own."""
    torch.manual_seed(2)
    ids = torch.randint(2, 98, (8, 7))
    classes = ids % 3
    labels = classes if kind.endswith("token") else classes[:, 0]
    return [
        {"input_ids": i, "attention_mask": torch.ones_like(i), "labels": c} for i, c in zip(ids, labels, strict=True)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_head_and_adapter_are_trained_and_saved_equals_loaded(kind: str, tmp_path: Path) -> None:
    _, _, task, head = KINDS[kind]
    positions = "all" if kind.endswith("token") else "f2+l2"
    config = ReftConfig(r=2, layers=[0], positions=positions, task_type=task, modules_to_save=[head])
    model = get_reft_model(base(kind), config)
    rows = data(kind)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run = trainer(model, tmp_path, train_dataset=rows, data_collator=None, max_steps=15)
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if ".reft_" in n or ".modules_to_save." in n}
    assert any(f"{head}.modules_to_save" in n for n in changed)

    run.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(base(kind), str(tmp_path / "saved")).eval()
    ids = torch.stack([row["input_ids"] for row in rows])
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, base(kind)(input_ids=ids).logits)


def test_resumed_is_uninterrupted_with_a_head(tmp_path: Path) -> None:
    def model() -> PeftModel:
        config = ReftConfig(r=2, layers="all", task_type="SEQ_CLS", dropout=0.1)
        torch.manual_seed(5)
        return get_reft_model(base("bert-sequence"), config)

    options: dict[str, Any] = {"train_dataset": data("bert-sequence"), "data_collator": None, "max_steps": 8}
    whole = trainer(model(), tmp_path / "whole", save_strategy="steps", save_steps=4, **options)
    whole.train()
    resumed = trainer(model(), tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert losses(resumed)[-4:] == losses(whole)[-4:]
    expected = adapter(whole.model)
    assert all(torch.equal(v, expected[n]) for n, v in adapter(resumed.model).items())
