"""`ReftTrainer` ends where a plain Trainer ends, whatever the Trainer does around it."""

import dataclasses
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from reuse_cases import GAPS, Tokenizer, collate, examples
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from conftest import tiny_llama
from families import tiny
from forked import Forked, ranks
from reftune import ReftConfig, get_reft_model
from reftune.train.reuse import MemoryStore
from reftune.train.trainer import ReftTrainer

pytestmark = GAPS
NAMES = {field.name for field in dataclasses.fields(TrainingArguments)}
BUCKETS: dict[str, Any] = (  # renamed during 5.x
    {"train_sampling_strategy": "group_by_length"} if "train_sampling_strategy" in NAMES else {"group_by_length": True}
)


def arguments(directory: Path, **settings: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(directory),
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.02,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
    }
    return TrainingArguments(**{**defaults, **settings})


def model_for(base: Any = None, **settings: Any) -> Any:
    base = tiny_llama(dtype=torch.float64) if base is None else base
    defaults: dict[str, Any] = {"r": 3, "layers": [1, 3], "positions": "l2", "task_type": "CAUSAL_LM"}
    torch.manual_seed(1)
    return get_reft_model(base, ReftConfig(**{**defaults, **settings}))


def run(cls: Any, model: Any, directory: Path, **settings: Any) -> tuple[Any, list[str]]:
    """A trainer of the class that has trained, and what it said."""
    own: dict[str, Any] = {"data_collator": collate, "train_dataset": examples(12)}
    for key in ("data_collator", "train_dataset", "eval_dataset", "compute_loss_func", "callbacks", "compute_metrics"):
        if key in settings:
            own[key] = settings.pop(key)
    said: list[str] = []
    if issubclass(cls, ReftTrainer):
        own |= {k: settings.pop(k) for k in ("reuse", "reuse_budget", "reuse_dir") if k in settings}
        own["say"] = said.append
    resume = settings.pop("resume", None)
    trainer = cls(model=model, args=arguments(directory, **settings), **own)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, said


def adapter(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".reft_" in n}


def history(trainer: Any, key: str = "loss") -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def same(one: Any, other: Any, limit: float = 1e-6) -> None:
    assert history(one) == pytest.approx(history(other), rel=limit)
    expected = adapter(other.model)
    assert expected
    for name, value in adapter(one.model).items():
        torch.testing.assert_close(value, expected[name], rtol=limit, atol=limit)


def label_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    logits, targets = outputs.logits[:, :-1], labels[:, 1:]
    summed = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    return summed / num_items_in_batch


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 1, "max_grad_norm": 0.1},
        {"label_smoothing_factor": 0.1},
        {"compute_loss_func": label_loss},
        BUCKETS,
        {"num_train_epochs": 1},
    ],
    ids=["plain", "accumulation", "single rows", "smoothing", "loss function", "buckets", "one epoch"],
)
@pytest.mark.parametrize("positions", ["l2", "f2+l2", "l1+gen"])
def test_it_ends_where_a_plain_trainer_ends(tmp_path: Path, settings: dict[str, Any], positions: str) -> None:
    plain, _ = run(Trainer, model_for(positions=positions), tmp_path, **settings)
    reused, said = run(ReftTrainer, model_for(positions=positions), tmp_path, **settings)
    same(reused, plain)
    assert len(said) == 1
    own = "compute_loss_func" in settings
    assert said[0].startswith("Reuse: logits are computed at the labelled tokens alone") == (not own)
    assert ("Not reused: logits, because the trainer has a loss of its own." in said[0]) == own
    kept = reused.reuse.store
    assert (kept.computed, kept.found > 20) == (
        (12, True) if "num_train_epochs" not in settings else (kept.computed, False)
    )


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "gpt2", "mistral", "qwen3_next"])
def test_families(tmp_path: Path, name: str) -> None:
    plain, _ = run(Trainer, model_for(tiny(name)), tmp_path)
    reused, said = run(ReftTrainer, model_for(tiny(name)), tmp_path)
    same(reused, plain, 1e-5)
    assert ("linear attention" in said[0]) == (name == "qwen3_next")


def test_off_is_the_plain_trainer(tmp_path: Path) -> None:
    plain, _ = run(Trainer, model_for(), tmp_path)
    reused, said = run(ReftTrainer, model_for(), tmp_path, reuse="off")
    assert history(reused) == history(plain)
    assert not said
    assert reused.reuse_plan == "Reuse: nothing, it is off."
    with pytest.raises(ValueError, match='"auto", "off", "memory", "disk" or a store'):
        ReftTrainer(model=model_for(), args=arguments(tmp_path), reuse="yes")


def test_dropout_on_the_edit_is_random_still(tmp_path: Path) -> None:
    """Draws fall on other tokens where a window leaves some out, so only the statement can be tested: it trains."""
    reused, said = run(ReftTrainer, model_for(dropout=0.3), tmp_path, num_train_epochs=6)
    assert history(reused)[-1] < history(reused)[0]
    assert len(said) == 1


def test_evaluation_takes_the_same_path(tmp_path: Path) -> None:
    settings = {"eval_strategy": "epoch", "eval_dataset": examples(6, seed=9)}
    plain, _ = run(Trainer, model_for(), tmp_path, **settings)
    reused, said = run(ReftTrainer, model_for(), tmp_path, **settings)
    assert history(reused, "eval_loss") == pytest.approx(history(plain, "eval_loss"), rel=1e-6)
    assert len(history(reused, "eval_loss")) == 3
    assert reused.reuse.store.computed == 12 + 6
    assert len(said) == 1
    assert reused.evaluate()["eval_loss"] == pytest.approx(history(plain, "eval_loss")[-1], rel=1e-6)


def test_whole_outputs_are_whole(tmp_path: Path) -> None:
    """compute_metrics and predict see the logits of every token."""
    shapes = []

    def metrics(found: Any) -> dict[str, float]:
        shapes.append(found.predictions.shape)
        return {"size": float(found.predictions.shape[1])}

    rows = examples(4, seed=9)
    reused, _ = run(ReftTrainer, model_for(), tmp_path, eval_dataset=rows, compute_metrics=metrics)
    longest = max(len(row["input_ids"]) for row in rows)
    assert reused.evaluate()["eval_size"] == longest
    assert reused.predict(rows).predictions.shape == (4, longest, 99)
    _, outputs = reused.compute_loss(reused.model, collate(rows), return_outputs=True)
    assert outputs.logits.shape == (4, longest, 99)


@pytest.mark.parametrize("mode", ["memory", "disk"])
def test_resumed_is_uninterrupted_to_the_bit(tmp_path: Path, mode: str) -> None:
    settings = {"save_strategy": "steps", "save_steps": 4, "reuse": mode, "gradient_accumulation_steps": 1}
    whole, _ = run(ReftTrainer, model_for(tiny_llama()), tmp_path / "whole", **settings)
    checkpoint = str(tmp_path / "whole" / "checkpoint-4")
    resumed, _ = run(ReftTrainer, model_for(tiny_llama()), tmp_path / "again", resume=checkpoint, **settings)
    assert history(resumed)[-5:] == history(whole)[-5:]
    expected = adapter(whole.model)
    assert all(torch.equal(value, expected[name]) for name, value in adapter(resumed.model).items())
    if mode == "disk":  # a third run finds everything
        settings["reuse_dir"] = tmp_path / "whole" / "reuse"
        third, _ = run(ReftTrainer, model_for(tiny_llama()), tmp_path / "third", **settings)
        assert third.reuse.store.computed == 0
        assert all(torch.equal(value, expected[name]) for name, value in adapter(third.model).items())


class Kill(TrainerCallback):
    """Ends the process, without a word, at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def killed(directory: Path, step: int) -> None:
    """Run in a process of its own."""
    last = sorted(directory.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    resume = str(last[-1]) if last else None
    settings = {"save_strategy": "steps", "save_steps": 2, "reuse": "disk", "callbacks": [Kill(step)]}
    trainer, _ = run(ReftTrainer, model_for(tiny_llama()), directory, resume=resume, **settings)
    trainer.save_model(str(directory / "end"))


@pytest.mark.slow
def test_killed_and_resumed_is_uninterrupted(tmp_path: Path) -> None:
    whole, _ = run(ReftTrainer, model_for(tiny_llama()), tmp_path / "whole", save_strategy="epoch")
    whole.save_model(str(tmp_path / "whole" / "end"))
    for step, code in ((1, -signal.SIGKILL), (5, -signal.SIGKILL), (7, -signal.SIGKILL), (99, 0)):
        process = Forked(killed, tmp_path / "killed", step, log=tmp_path / "log")
        assert process.wait() == code, process.said()[-2000:]
    expected = load_file(tmp_path / "whole" / "end" / "adapter_model.safetensors")
    found = load_file(tmp_path / "killed" / "end" / "adapter_model.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert found.keys() == expected.keys()


def test_a_mismatch_is_said_and_training_is_plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from reftune.train.reuse import engine

    right = engine.head_cache

    def wrong(entries: Any, starts: Any, layers: int) -> Any:
        return right([{name: 3 * tensor for name, tensor in entry.items()} for entry in entries], starts, layers)

    plain, _ = run(Trainer, model_for(), tmp_path)
    monkeypatch.setattr(engine, "head_cache", wrong)
    reused, said = run(ReftTrainer, model_for(), tmp_path)
    assert history(reused) == history(plain)
    assert len(said) == 1
    assert "switched off" in said[0]
    assert "Training goes on plainly" in said[0]


def test_a_first_batch_that_is_computed_whole_compares_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from reftune.train.reuse import engine

    right, calls = engine.head_cache, []

    def wrong(entries: Any, starts: Any, layers: int) -> Any:
        return right([{name: 3 * tensor for name, tensor in entry.items()} for entry in entries], starts, layers)

    def left_first(rows: Any) -> Any:
        calls.append(rows)
        return collate(rows, padding_side="left" if len(calls) == 1 else "right")

    plain, _ = run(Trainer, model_for(), tmp_path, data_collator=left_first)
    calls.clear()
    monkeypatch.setattr(engine, "head_cache", wrong)
    reused, said = run(ReftTrainer, model_for(), tmp_path, data_collator=left_first)
    assert history(reused) == history(plain)
    assert "padded on the left" in said[0]
    assert "switched off" in said[-1]


def test_noise_that_makes_both_ways_differ_is_named(tmp_path: Path) -> None:
    plain, _ = run(Trainer, model_for(), tmp_path, neftune_noise_alpha=5)
    reused, said = run(ReftTrainer, model_for(), tmp_path, neftune_noise_alpha=5)
    assert history(reused) == history(plain)
    assert "random in training mode: model.embed_tokens: neftune_noise_alpha 5" in said[0]


def test_one_store_serves_several_seeds(tmp_path: Path) -> None:
    base, store = tiny_llama(), MemoryStore(10**9)
    for seed in range(3):
        model = model_for(base)
        trainer, _ = run(ReftTrainer, model, tmp_path, reuse=store, seed=seed)
        assert trainer.reuse.store is store
        base = model.unload()
    assert store.computed == 12


def test_a_model_made_anew_is_looked_at_anew(tmp_path: Path) -> None:
    """model_init makes a model for each train()."""
    made = []

    def make() -> Any:
        made.append(model_for(positions="l2" if len(made) < 2 else "f1+l1"))
        return made[-1]

    said: list[str] = []
    trainer = ReftTrainer(
        model_init=make, args=arguments(tmp_path), train_dataset=examples(8), data_collator=collate, say=said.append
    )
    trainer.train()
    first = [step["loss"] for step in trainer.state.log_history if "loss" in step]
    trainer.train()
    assert len(made) == 3
    assert len(said) == 2
    assert "edit the prompt from its start" in said[1]
    assert first != history(trainer)[-len(first) :]


def test_auto_keeps_nothing_for_one_epoch(tmp_path: Path) -> None:
    once, _ = run(ReftTrainer, model_for(), tmp_path, num_train_epochs=1)
    assert once.reuse.store.used == 0
    always, said = run(ReftTrainer, model_for(), tmp_path, num_train_epochs=1, reuse="memory")
    assert always.reuse.store.used > 0
    assert "Kept in memory, at most" in said[0]
    assert re.search(r"12 examples need about [\d.]+ kB\.$", said[0])
    _, said = run(ReftTrainer, model_for(), tmp_path, reuse_budget=1000)
    assert any("budget of 1.0 kB" in text for text in said)


@pytest.mark.parametrize("mixed", [False, True], ids=["bf16 base", "autocast"])
def test_bf16(tmp_path: Path, mixed: bool) -> None:
    dtype = torch.float32 if mixed else torch.bfloat16
    plain, _ = run(Trainer, model_for(tiny_llama(dtype=dtype)), tmp_path, bf16=mixed)
    reused, said = run(ReftTrainer, model_for(tiny_llama(dtype=dtype)), tmp_path, bf16=mixed)
    assert history(reused) == pytest.approx(history(plain), rel=2e-2)
    assert "switched off" not in said[0]
    kept = {t.dtype for entry in reused.reuse.store.entries.values() for t in entry.values()}
    assert mixed or kept == {torch.bfloat16}
    assert all(value.dtype == torch.float32 for value in adapter(reused.model).values())


def test_the_collator_comes_from_the_tokenizer(tmp_path: Path) -> None:
    class Saves(Tokenizer):
        def save_pretrained(self, *args: Any) -> None:
            raise AssertionError("not asked for")

    trainer = ReftTrainer(
        model=model_for(), args=arguments(tmp_path), train_dataset=examples(4), processing_class=Saves()
    )
    assert set(next(iter(trainer.get_train_dataloader()))) >= {"prompt_mask", "labels", "input_ids"}


def two_processes(directory: Path) -> None:
    """Run in each process."""
    trainer, _ = run(
        ReftTrainer, model_for(), directory, per_device_train_batch_size=2, ddp_backend="gloo", reuse="disk",
        reuse_dir=directory / "reuse",
    )  # fmt: skip
    trainer.save_model(str(directory / "saved"))
    if trainer.args.process_index == 0:
        (directory / "losses.json").write_text(json.dumps(history(trainer)))


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_are_one_with_the_double_batch(tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    ranks(two_processes, tmp_path / "two", logs=tmp_path)
    one, _ = run(Trainer, model_for(), tmp_path / "one")
    assert json.loads((tmp_path / "two" / "losses.json").read_text()) == pytest.approx(history(one), rel=1e-6)
    saved = load_file(tmp_path / "two" / "saved" / "adapter_model.safetensors")
    one.save_model(str(tmp_path / "one" / "saved"))  # a save has orthonormal rows
    expected = load_file(tmp_path / "one" / "saved" / "adapter_model.safetensors")
    assert saved.keys() == expected.keys()
    for name, value in saved.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
