"""Reuse inside TRL's SFTTrainer: the keys and values, and the blocks below the first edit; its head is its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_reuse_trainer import adapter, history

from conftest import tiny_llama
from reftune import ReftConfig
from reftune.train.trainer import ReusesFrozenBase

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

pytestmark = [
    pytest.mark.trl,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Padding-free training is enabled:UserWarning"),
]


class ReftSFTTrainer(ReusesFrozenBase, trl.SFTTrainer):
    """As docs/reuse.md shows it."""

    selects_logits = False


@pytest.fixture
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<unk>", *(f"w{i}" for i in range(3, 98)), "<eos>"]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def rows() -> Any:
    generator = torch.Generator().manual_seed(4)

    def words(low: int, high: int) -> str:
        count = int(torch.randint(low, high, (1,), generator=generator))
        return " ".join(f"w{int(i)}" for i in torch.randint(3, 98, (count,), generator=generator))

    return datasets.Dataset.from_list([{"prompt": words(3, 12), "completion": " " + words(1, 5)} for _ in range(8)])


def run(cls: Any, directory: Path, tokenizer: Any, **settings: Any) -> tuple[Any, list[str]]:
    said: list[str] = []
    own = {"say": said.append, "reuse": "memory"} if cls is ReftSFTTrainer else {}
    config = trl.SFTConfig(
        output_dir=str(directory), max_steps=6, per_device_train_batch_size=4, learning_rate=0.02, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, seed=3, bf16=False,
        dataloader_pin_memory=False, dataset_num_proc=None, **settings,
    )  # fmt: skip
    torch.manual_seed(1)
    trainer = cls(
        model=tiny_llama(dtype=torch.float64), args=config, train_dataset=rows(), processing_class=tokenizer,
        peft_config=ReftConfig(r=3, layers=[1, 3], positions="l2", task_type="CAUSAL_LM"), **own,
    )  # fmt: skip
    trainer.train()
    return trainer, said


def test_sft_ends_where_plain_sft_ends(tmp_path: Path, tokenizer: Any) -> None:
    settings = {"activation_checkpointing": False} if hasattr(trl.SFTConfig, "activation_checkpointing") else {}
    settings = settings or {"gradient_checkpointing": False}
    plain, _ = run(trl.SFTTrainer, tmp_path, tokenizer, **settings)
    reused, said = run(ReftSFTTrainer, tmp_path, tokenizer, **settings)
    assert len(said) == 1
    assert "keys and values before the first edited token" in said[0]
    assert "the trainer has a loss of its own" in said[0]
    assert reused.reuse.store.found >= 8
    for key in ("loss", "mean_token_accuracy"):
        assert history(reused, key) == pytest.approx(history(plain, key), rel=1e-6)
    expected = adapter(plain.model)
    for name, value in adapter(reused.model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6)


def test_sft_as_it_comes_checkpoints_and_keeps_the_lower_blocks_alone(tmp_path: Path, tokenizer: Any) -> None:
    plain, _ = run(trl.SFTTrainer, tmp_path, tokenizer)
    reused, said = run(ReftSFTTrainer, tmp_path, tokenizer)
    assert "gradient checkpointing takes the cache away" in said[0]
    assert history(reused) == pytest.approx(history(plain), rel=1e-6)
