"""Models with a table of positions: what is longer is cut, and told; it was an IndexError after training."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.bench.places import TRAIN, silent
from tests.tiny_chat import tiny_tokenizer
from transformers import AutoConfig, AutoModel, GPT2Config, GPT2LMHeadModel

from reftune.bench import load_grid, run_grid
from reftune.bench.causal import _shortened
from reftune.bench.report import report
from reftune.bench.room import positions, shortened
from reftune.bench.store import read_rows

SIZES: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}


@pytest.mark.parametrize(
    ("kind", "more", "room"),
    [
        ("gpt2", {"n_positions": 48}, 48),
        ("opt", {"max_position_embeddings": 48, "word_embed_proj_dim": 8, "ffn_dim": 8}, 48),
        ("bert", {"max_position_embeddings": 48}, 48),
        ("roberta", {"max_position_embeddings": 50, "pad_token_id": 1}, 48),
        ("xlm-roberta", {"max_position_embeddings": 50, "pad_token_id": 1}, 48),
        ("llama", {"max_position_embeddings": 48, "num_key_value_heads": 1}, None),
        ("gpt_neox", {"max_position_embeddings": 48}, None),
    ],
)
def test_the_room_is_what_the_model_reads(kind: str, more: dict[str, Any], room: int | None) -> None:
    """One token more than told is an IndexError, or the positions are computed."""
    model = AutoModel.from_config(AutoConfig.for_model(kind, **SIZES, **more)).eval()
    assert positions(model) == room
    model(input_ids=torch.full((1, room or 60), 5))
    if room:
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, room + 1), 5))


def test_prompts_lose_their_beginning() -> None:
    assert shortened([[1, 2, 3], [4]], None, 9) == ([[1, 2, 3], [4]], 0)
    assert shortened([[1, 2, 3], [4]], 5, 3) == ([[2, 3], [4]], 1)
    with pytest.raises(ValueError, match=r"Answers of up to 5 tokens leave no room for a prompt: .* positions for 5"):
        shortened([[1]], 5, 5)


@pytest.mark.parametrize(
    ("suite", "task", "scoring"),
    [
        ("commonsense", "arc_easy", {"loglikelihood": True, "generate": True, "max_new_tokens": 8}),
        ("arithmetic", "addsub", {"max_new_tokens": 8}),
        ("instruct", "ultrafeedback", {}),
    ],
)
def test_a_small_models_runs_end(suite: str, task: str, scoring: Any, places: dict[str, str], tmp_path: Path) -> None:
    """The tokenizer has a token a character, so most prompts are too long for 64 positions."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=260, n_positions=64, eos_token_id=2, pad_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer(chat=False).save_pretrained(tmp_path / "gpt2")
    content = {"suite": suite, "tasks": [task], "model": str(tmp_path / "gpt2"), "seeds": [0], "train": TRAIN}
    grid = load_grid(content | {"methods": [{"method": "base"}], "scoring": scoring})
    assert run_grid(grid, tmp_path / "out", data=places["data"], say=silent).failed == {}
    if suite == "commonsense":
        (row,) = read_rows(tmp_path / "out")
        assert row["rows"][task]["prompts_cut"] > 0
        assert f"scored without their beginning: {task} {row['rows'][task]['prompts_cut']}." in report([row])
    trained = load_grid(content | {"methods": [{"method": "loreft", "lrs": [1e-2]}], "scoring": scoring})
    (said,) = run_grid(trained, tmp_path / "trained", data=places["data"], say=silent).failed.values()
    assert "every prompt has 64 tokens or more, and the model has positions for no more." in said


def test_a_classifier_reads_what_it_can(places: dict[str, str], tmp_path: Path) -> None:
    """`train.max_length` beyond the table, and rows that reach so far."""
    from tests.bench.places import write_rows
    from transformers import BertConfig, BertModel

    config = BertConfig(**SIZES | {"vocab_size": 260}, intermediate_size=8, max_position_embeddings=24, pad_token_id=2)
    BertModel(config).save_pretrained(tmp_path / "bert")
    tiny_tokenizer(chat=False).save_pretrained(tmp_path / "bert")
    rows = [{"sentence1": "ab" * 20, "sentence2": "b", "label": i % 2} for i in range(24)]
    write_rows(tmp_path / "data" / "glue" / "rte", train=rows, validation=rows[:16])
    content = {"suite": "glue", "tasks": ["rte"], "model": str(tmp_path / "bert"), "seeds": [0], "train": TRAIN}
    grid = load_grid(content | {"methods": [{"method": "loreft", "lrs": [1e-2]}]})
    assert run_grid(grid, tmp_path / "out", data=str(tmp_path / "data"), say=silent).failed == {}


def test_answers_without_room_are_refused_before_training(
    places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=260, n_positions=64, eos_token_id=2, pad_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer(chat=False).save_pretrained(tmp_path / "gpt2")
    content = {"suite": "arithmetic", "tasks": ["addsub"], "model": str(tmp_path / "gpt2"), "seeds": [0]}
    content |= {"methods": [{"method": "loreft", "lrs": [1e-2]}], "scoring": {"max_new_tokens": 64}, "train": TRAIN}
    monkeypatch.setattr("reftune.bench.causal.train_method", lambda *_: pytest.fail("trained"))
    (said,) = run_grid(load_grid(content), tmp_path / "out", data=places["data"], say=silent).failed.values()
    assert "leave no room for a prompt: the model has positions for 64. Lower scoring.max_new_tokens" in said


def test_the_largest_number_of_cut_prompts_is_told() -> None:
    setup: Any = SimpleNamespace(room=8, lengths={})
    rows = [[1] * 7, [1] * 4, [1]]
    for answer in (5, 2, 0):  # generation, likelihoods, nothing
        _shortened(setup, "arc_easy", rows, answer)
    assert setup.lengths == {"arc_easy": {"prompts_cut": 2}}
