"""GLUE on an encoder (or any sequence classifier): train head and method, predict, score with the task's metrics."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from .methods import Counts
from .metrics import glue_scores
from .models import head_modules, load_classifier
from .room import positions
from .runs import Setup, train_method
from .tasks import PairTask, task
from .trained import numbers, put_back, write
from .training import Fit

Result = tuple[Counts, Fit, dict[str, dict[str, float]], dict[str, Any], dict[str, float]]


def run(setup: Setup) -> Result:
    """One run: counts, training, {task: metrics} on the test rows, the selection metrics, seconds."""
    job = setup.job
    (name,) = job.tasks
    found = task(name)
    assert isinstance(found, PairTask)
    started = time.perf_counter()
    dtype, attention = job.settings["dtype"], job.settings["attention"]
    model, tokenizer = load_classifier(job.model, found.labels, job.seed, dtype, attention)
    loaded = time.perf_counter()
    setup.fit_in(positions(model))
    head = head_modules(model)
    rows = encode(setup.parts[name].train, found, tokenizer, setup.train.max_length)
    collator = Collator(tokenizer)
    batch, bf16 = setup.scoring.batch_size, setup.train.bf16
    parts = setup.parts[name]
    held = encode(parts.select, found, tokenizer, setup.train.max_length)
    best = BestEpoch(lambda made: evaluate(made, held, found, collator, batch, bf16)[found.metrics[0].name], setup.work)
    keeping = setup.train.keep == "best"
    model, counts, fitted = train_method(setup, model, rows, collator, head, [best] if keeping else [])
    by_epoch = {"epochs": best.restore(model)} if keeping else {}
    begun, cpu = time.perf_counter(), time.process_time()
    selection = evaluate(model, held, found, collator, batch, bf16)
    metrics: dict[str, dict[str, float]] = {}
    if job.stage == "final":
        test = encode(parts.test, found, tokenizer, setup.train.max_length)
        metrics[name] = evaluate(model, test, found, collator, batch, bf16)
    seconds = {
        "load": loaded - started,
        "evaluate": time.perf_counter() - begun,
        "evaluate_cpu": time.process_time() - cpu,
    }
    score = {"score": selection[found.metrics[0].name], **selection, **by_epoch}
    return counts, fitted, metrics, score, seconds


class BestEpoch(TrainerCallback):
    """Keeps what was trained as it was after the epoch with the highest score (the earliest of equals).

    The copy is a file in `place`, with the score after each epoch, so that a run that goes on from a checkpoint has it.
    """

    def __init__(self, score: Callable[[Any], float], place: Path) -> None:
        self.score, self.file = score, place / "best.pt"

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:  # what a killed run left, which wrote no checkpoint to go on from
            self.file.unlink(missing_ok=True)
        elif state.epoch and float(state.epoch).is_integer() and state.epoch not in self._kept()["scores"]:
            self.on_epoch_end(args, state, control, **kwargs)  # cut off after the checkpoint at this epoch's last step

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        score = self.score(model)
        model.train()
        kept = self._kept()
        if score > kept["score"]:
            kept["score"] = score
            kept["trained"] = numbers(model)
        kept["scores"][round(state.epoch, 2)] = score  # by epoch: one that is run again counts once
        write(self.file, kept)

    def _kept(self) -> dict[str, Any]:
        return torch.load(self.file) if self.file.is_file() else {"score": -math.inf, "scores": {}}

    def restore(self, model: Any) -> list[float]:
        """Put the kept numbers back; returns the scores in the order of the epochs."""
        kept = torch.load(self.file)
        put_back(model, kept["trained"])
        return [score for _, score in sorted(kept["scores"].items())]


class Collator:
    """Rows of a tokenizer with a label, padded; scores as floats, which makes the loss a squared error."""

    def __init__(self, tokenizer: Any) -> None:
        self._pad = tokenizer.pad

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        labels = [row["labels"] for row in rows]
        inputs = [{key: value for key, value in row.items() if key != "labels"} for row in rows]
        kind = torch.float32 if isinstance(labels[0], float) else torch.long
        return {**self._pad(inputs, return_tensors="pt"), "labels": torch.tensor(labels, dtype=kind)}


def encode(rows: list[dict[str, Any]], found: PairTask, tokenizer: Any, max_length: int) -> list[dict[str, Any]]:
    """Rows of GLUE as token ids with `labels`: an int, or a float for a score."""
    encoded = []
    for row in rows:
        texts = [row["sentence1"]] + ([row["sentence2"]] if row.get("sentence2") is not None else [])
        label = float(row["label"]) if found.labels == 1 else int(row["label"])
        encoded.append({**tokenizer(*texts, truncation=True, max_length=max_length), "labels": label})
    return encoded


@torch.no_grad()
def evaluate(
    model: Any, rows: list[dict[str, Any]], found: PairTask, collator: Any, batch_size: int, bf16: bool = False
) -> dict[str, float]:
    """The task's metrics and the mean loss over rows."""
    if not rows:
        return {}
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    predictions: list[float] = [0.0] * len(rows)
    loss = 0.0
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = {key: value.to(model.device) for key, value in collator([rows[i] for i in chosen]).items()}
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            logits = model(**inputs).logits.float()
        values = logits[:, 0] if found.labels == 1 else logits.argmax(-1)
        loss += _loss(logits, batch["labels"]) * len(chosen)
        for i, value in zip(chosen, values.tolist(), strict=True):
            predictions[i] = value
    scores = glue_scores(found.name, predictions, [row["labels"] for row in rows])
    return {**scores, "loss": loss / len(rows)}


def _loss(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Of the data alone: AdaLoRA adds a penalty of its own to the model's."""
    if labels.is_floating_point():
        return float(torch.nn.functional.mse_loss(logits[:, 0], labels))
    return float(torch.nn.functional.cross_entropy(logits, labels))
