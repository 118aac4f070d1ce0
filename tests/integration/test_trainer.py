"""`transformers.Trainer` with a ReFT model: what it trains, what it saves, and that it resumes to the bit."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_training import Rows, adapter, collate, losses, trainer, with_prompt_mask
from transformers import TrainerCallback, TrainingArguments

from conftest import tiny_llama
from reftune import ReftConfig, get_reft_model
from reftune.interventions.orthogonal import orthonormality_error
from reftune.tuner import batch as batches


def reft(dtype: torch.dtype = torch.float32, **settings: Any) -> PeftModel:
    base = tiny_llama(layers=3, dtype=dtype)
    config = ReftConfig(**{"r": 4, "layers": "all", "task_type": "CAUSAL_LM", **settings})
    torch.manual_seed(1)
    return get_reft_model(base, config)


def test_only_the_adapter_is_trained(tmp_path: Path) -> None:
    model = reft(layers=[0, 1])  # nothing reads what a prefix edits in the last layer
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run = trainer(model, tmp_path, weight_decay=0.1, learning_rate=0.1, max_steps=20)
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    for name, parameter in model.named_parameters():
        trained = ".reft_" in name
        assert parameter.requires_grad == trained
        assert torch.equal(parameter, before[name]) != trained, name
    groups = run.optimizer.param_groups
    optimised = {id(p) for group in groups for p in group["params"]}
    assert optimised == {id(p) for n, p in model.named_parameters() if ".reft_" in n}


def test_rows_are_orthonormal_after_training_at_a_large_learning_rate(tmp_path: Path) -> None:
    model = reft()
    run = trainer(model, tmp_path, weight_decay=0.3, learning_rate=0.5, max_steps=20)
    run.train()
    run.save_model()
    saved = load_file(tmp_path / "adapter_model.safetensors")
    rows = [value for name, value in saved.items() if name.endswith(".R")]
    assert len(rows) == 6
    assert all(orthonormality_error(r) < 1e-5 for r in rows)
    model.eval()(input_ids=torch.tensor([[5, 6, 7, 8]]))
    assert all(orthonormality_error(value) < 1e-5 for name, value in adapter(model).items() if name.endswith(".R"))


def test_checkpoints_hold_kilobytes_and_no_base_weights(tmp_path: Path) -> None:
    model = reft()
    trainer(model, tmp_path, save_strategy="steps", save_steps=3).train()
    expected = sum(p.numel() * 4 for n, p in model.named_parameters() if ".reft_" in n)
    for step in (3, 6):
        directory = tmp_path / f"checkpoint-{step}"
        assert not list(directory.glob("model*")) + list(directory.glob("pytorch_model*"))
        tensors = load_file(directory / "adapter_model.safetensors")
        assert {name.rsplit(".", 1)[-1] for name in tensors} == {"R", "W", "b"}
        assert sum(t.numel() * t.element_size() for t in tensors.values()) == expected
        assert (directory / "adapter_model.safetensors").stat().st_size < expected + 8000
        assert sum(f.stat().st_size for f in directory.iterdir()) < 4 * expected + 60_000  # Adam's state, a few logs
        config = json.loads((directory / "adapter_config.json").read_text())
        assert config["peft_type"] == "REFT"
        assert config["base_model_shape"]["hidden_size"] == 32


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dropout": 0.3},
        {"intervention": "direft", "share_weights": True},
        {"intervention": "nodireft"},
        {"component": "mlp_output", "positions": "prompt"},
    ],
    ids=["loreft", "dropout", "direft", "nodireft", "mlp"],
)
def test_resumed_is_uninterrupted(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Losses and final tensors, bit for bit, with weight decay: what is saved is what the next step begins with."""
    options: dict[str, Any] = {
        "save_strategy": "steps",
        "save_steps": 4,
        "max_steps": 9,
        "weight_decay": 0.1,
        "learning_rate": 0.1,
    }
    whole = trainer(reft(**settings), tmp_path / "whole", **options)
    whole.train()

    resumed = trainer(reft(**settings), tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert losses(resumed)[-5:] == losses(whole)[-5:]
    expected = adapter(whole.model)
    assert expected
    for name, value in adapter(resumed.model).items():
        assert torch.equal(value, expected[name]), name


def test_a_resumed_adapter_that_was_loaded_is_uninterrupted(tmp_path: Path) -> None:
    """The other way to resume: PeftModel.from_pretrained(is_trainable=True) on the checkpoint."""
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4, "max_steps": 9, "learning_rate": 0.1}
    whole = trainer(reft(), tmp_path / "whole", **options)
    whole.train()
    checkpoint = str(tmp_path / "whole" / "checkpoint-4")
    model = PeftModel.from_pretrained(tiny_llama(layers=3), checkpoint, is_trainable=True)
    resumed = trainer(model, tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert losses(resumed)[-5:] == losses(whole)[-5:]


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    model = reft()
    options = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2, "max_steps": 10}
    run = trainer(
        model,
        tmp_path,
        eval_dataset=Rows(8, seed=1),
        load_best_model_at_end=True,
        learning_rate=0.5,  # gets worse on unseen rows
        **options,
    )
    run.train()
    evaluated = {e["step"]: e["eval_loss"] for e in run.state.log_history if "eval_loss" in e}
    best = min(evaluated, key=evaluated.__getitem__)
    assert run.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert best != 10
    saved = load_file(tmp_path / f"checkpoint-{best}" / "adapter_model.safetensors")
    now = {name.replace(".default", ""): value for name, value in adapter(model).items()}
    assert saved.keys() == now.keys()
    assert all(torch.equal(saved[name], now[name]) for name in saved)
    assert run.evaluate()["eval_loss"] == pytest.approx(evaluated[best], rel=1e-6)


def test_accumulated_gradients_are_those_of_the_larger_batch(tmp_path: Path) -> None:
    large = trainer(reft(init_weights=False), tmp_path, per_device_train_batch_size=8, learning_rate=1e-3)
    small = trainer(
        reft(init_weights=False),
        tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        learning_rate=1e-3,
    )
    for run in (large, small):
        run.train()
    assert losses(small) == pytest.approx(losses(large), rel=2e-4)
    expected = adapter(large.model)
    for name, value in adapter(small.model).items():
        torch.testing.assert_close(value, expected[name], rtol=2e-2, atol=2e-4)


class Seen(TrainerCallback):
    """Notes the edited rows of every training forward."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        layer = model.get_base_model().model.layers[0].edit_output

        def note(module: Any, inputs: Any, output: Any) -> None:
            batch = module.session.batch
            self.rows += [
                sorted(found.index.tolist()) for found in batch._found.values() if isinstance(found, batches.Rows)
            ]

        layer.register_forward_hook(note)


@pytest.mark.parametrize("way", ["label_smoothing", "compute_loss_func"])
def test_prompt_mask_stands_in_for_labels_that_the_trainer_takes_away(tmp_path: Path, way: str) -> None:
    plain, masked = Seen(), Seen()
    trainer(reft(), tmp_path, callbacks=[plain]).train()
    options: dict[str, Any] = {"label_smoothing_factor": 0.1}
    if way == "compute_loss_func":

        def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
            shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
            return torch.nn.functional.cross_entropy(outputs.logits.transpose(1, 2), shifted)

        options = {"compute_loss_func": loss}
    run = trainer(reft(), tmp_path, callbacks=[masked], data_collator=with_prompt_mask, **options)
    run.train()
    assert masked.rows == plain.rows
    assert len(plain.rows) > 0
    assert all(loss > 0 for loss in losses(run))


def test_labels_that_the_trainer_takes_away_are_missed(tmp_path: Path) -> None:
    """Without labels and prompt_mask the answer would be taken for prompt, and the wrong tokens trained: a warning."""
    run = trainer(reft(), tmp_path, label_smoothing_factor=0.1)
    with pytest.warns(UserWarning, match="prompt_mask"):
        run.train()


@pytest.mark.parametrize("mixed", [False, True], ids=["bf16_base", "autocast"])
def test_bf16(tmp_path: Path, mixed: bool) -> None:
    """The adapter stays fp32 and orthonormal, on a bf16 base as under autocast."""
    model = reft(torch.float32 if mixed else torch.bfloat16)
    run = trainer(model, tmp_path, bf16=mixed, weight_decay=0.1, max_steps=10, save_strategy="steps", save_steps=5)
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    values = adapter(model)
    assert all(v.dtype == torch.float32 for v in values.values())
    again = trainer(
        reft(torch.float32 if mixed else torch.bfloat16),
        tmp_path / "again",
        bf16=mixed,
        weight_decay=0.1,
        max_steps=10,
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert all(torch.equal(v, values[n]) for n, v in adapter(again.model).items())


def test_the_base_model_is_refused(tmp_path: Path) -> None:
    model = reft()
    with pytest.raises(RuntimeError, match="Pass the PeftModel"):
        trainer(model.get_base_model(), tmp_path).train()
    trainer(model, tmp_path, max_steps=1).train()


def test_an_adapter_loaded_for_inference_is_refused_with_what_to_pass(tmp_path: Path) -> None:
    reft().save_pretrained(str(tmp_path / "adapter"))
    model = PeftModel.from_pretrained(tiny_llama(layers=3), str(tmp_path / "adapter"))
    with pytest.raises(RuntimeError, match="is_trainable=True"):
        trainer(model, tmp_path).train()
    batch = collate([Rows()[0]])
    assert model.eval()(**batch).loss > 0  # evaluation is not training, whatever the gradient mode
    with torch.no_grad():
        assert model.train()(**batch).loss > 0
    trainable = PeftModel.from_pretrained(tiny_llama(layers=3), str(tmp_path / "adapter"), is_trainable=True)
    trainer(trainable, tmp_path, max_steps=1).train()


def test_gradient_checkpointing_through_the_trainer(tmp_path: Path) -> None:
    plain = trainer(reft(component="mlp_output"), tmp_path)
    plain.train()
    names = {f.name for f in dataclasses.fields(TrainingArguments)}
    word = "activation" if "activation_checkpointing" in names else "gradient"
    for reentrant in (True, False):
        options = {f"{word}_checkpointing": True, f"{word}_checkpointing_kwargs": {"use_reentrant": reentrant}}
        run = trainer(reft(component="mlp_output"), tmp_path, **options)
        run.train()
        assert losses(run) == pytest.approx(losses(plain), rel=1e-4)
