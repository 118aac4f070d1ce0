"""Shared by the integration tests: a data set of random prompts with answers, and a Trainer with small settings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from reftune.data import ReftDataCollator

PAD = 0


class Tokenizer:
    """What the collator asks of a tokenizer."""

    pad_token_id, eos_token_id = PAD, 98


class Rows(torch.utils.data.Dataset):
    """`count` prompts of 2 to 6 tokens with answers of 2 to 4."""

    def __init__(self, count: int = 16, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def number(low: int, high: int) -> int:
            return int(torch.randint(low, high, (1,), generator=generator))

        self.rows: list[dict[str, list[int]]] = []
        for _ in range(count):
            prompt = [number(2, 98) for _ in range(number(2, 7))]
            answer = [number(2, 98) for _ in range(number(2, 5))]
            self.rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]


def collate(rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Padded on the right; only the labels say where the prompt ends, as with any collator of transformers."""
    return {k: v for k, v in with_prompt_mask(rows).items() if k != "prompt_mask"}


def with_prompt_mask(rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    """The same with `prompt_mask`."""
    return ReftDataCollator(Tokenizer())(rows)


def arguments(directory: Path, **settings: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(directory),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return TrainingArguments(**{**defaults, **settings})


def trainer(model: Any, directory: Path, **settings: Any) -> Trainer:
    """A Trainer on `Rows()`; `data_collator`, `callbacks` and the like go to it, the rest to its arguments."""
    own = {"data_collator": collate, "train_dataset": Rows()}
    for key in ("data_collator", "callbacks", "eval_dataset", "train_dataset", "compute_loss_func"):
        if key in settings:
            own[key] = settings.pop(key)
    return Trainer(model=model, args=arguments(directory, **settings), **own)


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def adapter(model: Any) -> dict[str, Tensor]:
    """The adapter's tensors, copied."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".reft_" in n}


def batch(seed: int, rows: int = 3, columns: int = 12) -> dict[str, Tensor]:
    """Rows with prompts of different lengths, one of them padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 98, (rows, columns), generator=generator)
    mask, labels = torch.ones_like(ids), ids.clone()
    for row in range(rows):
        labels[row, : 3 + row] = -100
    mask[0, -2:] = 0
    labels[0, -2:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
