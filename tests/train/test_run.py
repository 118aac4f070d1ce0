"""`train`: an adapter from a recipe, resumed exactly, with what was done written beside it."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

import reftune
from reftune.models import load_adapted
from reftune.train import RecipeError, load_recipe, train
from reftune.train.run import last_line, size_words
from reftune.train.starting import StartByRows
from reftune.train.trainer import ReftTrainer


@pytest.fixture
def keys(base_keys: dict[str, Any]) -> dict[str, Any]:
    return base_keys | {"epochs": 2.0}


def _weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def test_train_leaves_an_adapter_a_recipe_and_nothing_of_the_base(keys: dict[str, Any], tmp_path: Path) -> None:
    said: list[Any] = []
    result = train(load_recipe(None, keys), say=said.append)
    assert result.output_dir == tmp_path / "out"
    assert result.size == (tmp_path / "out" / "adapter_model.safetensors").stat().st_size < 10_000
    assert load_recipe(tmp_path / "out" / "recipe.yaml") == load_recipe(None, keys)
    model, _ = load_adapted(str(tmp_path / "out"))
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model(input_ids=ids).logits, result.model(input_ids=ids).logits)
    with result.model.disable_adapter():
        assert not torch.equal(model(input_ids=ids).logits, result.model(input_ids=ids).logits)
    assert "6 examples" in said[0]
    assert not list((tmp_path / "out").glob("tokenizer*"))
    assert re.search(r"in \S*out \([\d.]+ kB\).*reftune chat --adapter \S*out$", last_line(result))


def test_nodireft_starts_by_the_loss_of_some_examples(keys: dict[str, Any], tmp_path: Path) -> None:
    keys |= {"intervention": "nodireft", "positions": "all", "lr": 0.0, "max_steps": 1}
    said: list[Any] = []
    weights = {}
    for rows in (0, 4, 99):
        train(load_recipe(None, keys | {"init_rows": rows, "output_dir": str(tmp_path / str(rows))}), say=said.append)
        weights[rows] = _weights(tmp_path / str(rows))
        assert not any(bool(value.any()) for name, value in weights[rows].items() if name.endswith(".R"))
        assert any(bool(value.any()) for name, value in weights[rows].items() if name.endswith(".b")) == (rows > 0)
    name = next(name for name in weights[0] if name.endswith(".W"))
    assert not torch.equal(weights[4][name], weights[0][name])
    assert not torch.equal(weights[4][name], weights[99][name])
    assert [text for text in said if "starts from" in str(text)] == [
        "What is read starts from the loss of 4 examples.",
        "What is read starts from the loss of 6 examples.",
    ]
    with pytest.raises(RecipeError, match="must be a number of examples, such as 32, but is -1"):
        train(load_recipe(None, keys | {"init_rows": -1, "overwrite": True}))
    with pytest.raises(RecipeError, match=r"a start of reft.intervention \"nodireft\", not of 'loreft'"):
        train(load_recipe(None, keys | {"init_rows": 4, "intervention": "loreft", "overwrite": True}))


def test_the_start_is_made_as_the_steps_are(keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the run's gradient checkpointing, which Trainer switches on late."""
    seen: list[bool] = []
    start = reftune.initialize_reft_weights

    def watched(model: Any, batches: Any) -> None:
        block = model.get_base_model().model.layers[0]
        seen.append(bool(block.gradient_checkpointing))
        start(model, batches)

    monkeypatch.setattr(reftune, "initialize_reft_weights", watched)
    keys |= {"intervention": "nodireft", "positions": "all", "max_steps": 1, "init_rows": 4}
    for checkpointing in (False, True):
        train(
            load_recipe(None, keys | {"gradient_checkpointing": checkpointing, "overwrite": True}), say=lambda _: None
        )
    assert seen == [False, True]
    with pytest.raises(RecipeError, match=r"starts at an edit of zero, which reft.init_weights: false does not"):
        train(load_recipe(None, keys | {"init_weights": False, "overwrite": True}))


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_such_a_start_is_refused_where_weights_lie_in_pieces(engine: str) -> None:
    trainer = SimpleNamespace(is_fsdp_enabled=engine == "fsdp", is_deepspeed_enabled=engine == "deepspeed")
    callback = StartByRows([{}], trainer, print)
    with pytest.raises(RecipeError, match="needs whole weights, and this run shards them: set it to 0"):
        callback.on_train_begin(SimpleNamespace(per_device_train_batch_size=1), SimpleNamespace(global_step=0), None)


def test_a_run_with_such_a_start_is_resumed_exactly(keys: dict[str, Any], tmp_path: Path) -> None:
    keys |= {"intervention": "nodireft", "positions": "all", "init_rows": 4, "save": "steps", "save_steps": 2}
    train(load_recipe(None, keys | {"max_steps": 4}), say=lambda _: None)
    whole = _weights(tmp_path / "out")
    (tmp_path / "out" / "checkpoint-4").rename(tmp_path / "gone")
    said: list[Any] = []
    train(load_recipe(None, keys | {"max_steps": 4, "resume": True}), say=said.append)
    assert not any("starts from" in str(text) for text in said)
    assert all(torch.equal(value, whole[name]) for name, value in _weights(tmp_path / "out").items())


def test_the_first_step_shows_which_tokens_are_edited(keys: dict[str, Any], capsys: Any) -> None:
    train(load_recipe(None, keys | {"layers": "all", "max_steps": 1, "template": "plain"}))
    shown = capsys.readouterr().out
    assert "0[+][0] ▸ 0" in shown
    assert "l2: 2 of 5 tokens, layers 0-1" in shown
    assert "step 1/1  loss" in shown


def test_a_resumed_run_ends_as_the_uninterrupted_one(keys: dict[str, Any], tmp_path: Path) -> None:
    keys |= {"save": "steps", "save_steps": 2, "dropout": 0.1, "max_steps": 6}
    train(load_recipe(None, keys), say=lambda _: None)
    whole = _weights(tmp_path / "out")

    again = load_recipe(None, keys | {"output_dir": str(tmp_path / "cut"), "save_total_limit": None})
    train(again, say=lambda _: None)
    (tmp_path / "cut" / "checkpoint-6").rename(tmp_path / "gone")
    said: list[Any] = []
    train(load_recipe(tmp_path / "cut" / "recipe.yaml", {"resume": True}), say=said.append)
    assert "checkpoint-4" in said[0]
    for name, tensor in _weights(tmp_path / "cut").items():
        assert torch.equal(tensor, whole[name]), name
    sizes = [path.stat().st_size for path in (tmp_path / "out" / "checkpoint-6").iterdir()]
    assert sum(sizes) < 60_000  # no base


def test_what_a_killed_process_left_half_written_is_passed_over(keys: dict[str, Any], tmp_path: Path) -> None:
    keys |= {"save": "steps", "save_steps": 2, "max_steps": 5, "save_total_limit": None, "lr_scheduler": "constant"}
    train(load_recipe(None, keys), say=lambda _: None)
    whole = _weights(tmp_path / "out")
    for name in ("checkpoint-5", "checkpoint-6"):
        (tmp_path / "out" / name).mkdir(exist_ok=True)
        (tmp_path / "out" / name / "trainer_state.json").write_text("{" if name == "checkpoint-5" else "[]")
    said: list[Any] = []
    train(load_recipe(None, keys | {"resume": True}), say=said.append)
    assert "checkpoint-4" in said[0]
    assert all(torch.equal(tensor, whole[name]) for name, tensor in _weights(tmp_path / "out").items())

    said.clear()  # resumed when all is done: the same adapter, and not a step more
    result = train(load_recipe(None, keys | {"resume": True}), say=said.append)
    assert "Its 5 steps are done: nothing is left to train." in said
    assert 0 < result.loss < 20
    assert all(torch.equal(tensor, whole[name]) for name, tensor in _weights(tmp_path / "out").items())


def test_an_adapter_is_never_without_its_recipe(keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(self: Any, output_dir: str, *args: Any, **more: Any) -> None:
        assert load_recipe(Path(output_dir) / "recipe.yaml").data.template == "plain"
        raise KeyboardInterrupt

    monkeypatch.setattr(ReftTrainer, "save_model", killed)
    with pytest.raises(KeyboardInterrupt):
        train(load_recipe(None, keys | {"template": "plain"}))


def test_a_new_run_does_not_mix_with_an_older_ones_checkpoints(keys: dict[str, Any]) -> None:
    keys |= {"save": "epoch", "epochs": 1.0}
    train(load_recipe(None, keys), say=lambda _: None)
    with pytest.raises(RecipeError, match="holds checkpoints of an earlier run"):
        train(load_recipe(None, keys), say=lambda _: None)
    with pytest.raises(RecipeError, match="set one of them"):
        train(load_recipe(None, keys | {"resume": True, "overwrite": True}), say=lambda _: None)
    train(load_recipe(None, keys | {"overwrite": True}), say=lambda _: None)


def test_without_dropout_the_frozen_base_can_be_reused(keys: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(keys["model.name"])
    for disabled in (False, True):
        said: list[Any] = []
        base = LlamaForCausalLM.from_pretrained(keys["model.name"], attention_dropout=0.5, attn_implementation="eager")
        recipe = load_recipe(None, keys | {"disable_dropout": disabled, "output_dir": str(tmp_path / str(disabled))})
        train(recipe, say=said.append, loaded=(base, tokenizer))
        told = "\n".join(line for line in said if isinstance(line, str))
        assert ("switched off" in told) is not disabled, told


def test_evaluation_follows_the_recipe(keys: dict[str, Any]) -> None:
    keys |= {"data.eval": keys["data.train"], "epochs": 1.0}
    result = train(load_recipe(None, keys), say=lambda _: None)
    assert result.loss > 0


def test_no_data_is_said_before_a_model_is_loaded(keys: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="names no data"):
        train(load_recipe(None, keys | {"data.train": None, "model.name": "nowhere"}), say=lambda _: None)
    with pytest.raises(ValueError, match="no position"):
        train(load_recipe(None, keys | {"positions": "first2", "model.name": "nowhere"}), say=lambda _: None)


def test_words_for_people() -> None:
    assert size_words(19_400) == "19.4 kB"
    assert size_words(2_500_000) == "2.5 MB"


def test_modules_trained_whole_have_a_rate_of_their_own(keys: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"head_lr is the rate of reft\.modules_to_save, which names none"):
        train(load_recipe(None, keys | {"head_lr": 1e-3}))
    own = keys | {"modules_to_save": ["lm_head"], "max_steps": 2}
    saved = []
    for i, head_lr in enumerate((0.0, 1e-2)):
        train(load_recipe(None, own | {"head_lr": head_lr, "output_dir": str(tmp_path / str(i))}))
        saved.append(_weights(tmp_path / str(i)))
    before = train(load_recipe(None, own | {"lr": 0.0, "head_lr": 0.0, "output_dir": str(tmp_path / "still")}))
    still = _weights(before.output_dir)
    (head,) = [name for name in still if "lm_head" in name]
    assert torch.equal(saved[0][head], still[head])
    assert not torch.equal(saved[1][head], still[head])
    assert any(not torch.equal(saved[0][name], still[name]) for name in still if name != head)


def test_bf16_that_is_slower_than_fp32_is_said(keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reftune.train.precision._has_bf16", lambda: False)
    said: list[str] = []
    train(load_recipe(None, keys | {"train.bf16": True}), say=said.append)
    assert any("no instructions for it" in str(line) for line in said) == (not torch.accelerator.is_available())
