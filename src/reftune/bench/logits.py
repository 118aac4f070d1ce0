"""Logits of the tokens that are scored, and of no others: the output layer is a fifth of a small model's time.

The model's output layer is handed only the rows of hidden states that predict a label, flattened, so that the logits
are (labelled tokens, vocabulary); under autocast it computes in its own precision. The same for every method.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def labelled_logits(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (N, V) fp32 of the N labelled tokens, the tokens (N,), and the row of each (N,).

    Args:
        model: a causal language model, with an adapter or not.
        batch: input_ids, attention_mask, labels (−100 is not scored) and, for ReFT, prompt_mask; each (B, T).
    """
    labels = batch["labels"]
    predicts = torch.zeros_like(labels, dtype=torch.bool)
    predicts[:, :-1] = labels[:, 1:] != -100
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    if not takes_prompt_mask(model):
        inputs.pop("prompt_mask", None)
    with output_layer(model, predicts):
        logits = model(**inputs | {"use_cache": False}).logits
    rows = predicts.nonzero()[:, 0]
    return logits.float(), labels[:, 1:][predicts[:, :-1]], rows


@contextmanager
def output_layer(model: Any, predicts: Tensor | None = None) -> Iterator[None]:
    """Let the output layer compute outside autocast, on the rows (B, T) that `predicts` marks if it is given.

    Logits in bf16 are 1/8 apart at 20: answers would tie, and the first one win.
    """
    layer = model.get_output_embeddings()
    if layer is None:
        raise ValueError(f"{type(model).__name__} has no output layer to score tokens with: give a causal model.")
    original, mine = layer.forward, layer.__dict__.get("forward")  # accelerate's hooks put a forward of their own there

    def forward(hidden: Tensor) -> Any:
        rows = hidden if predicts is None else hidden[predicts.to(hidden.device)]
        with torch.autocast(hidden.device.type, enabled=False):
            return original(rows.to(next(layer.parameters()).dtype))

    layer.forward = forward
    try:
        yield
    finally:
        if mine is None:
            del layer.__dict__["forward"]
        else:
            layer.forward = mine


def takes_prompt_mask(model: Any) -> bool:
    """Whether an active ReFT adapter reads the `prompt_mask` of a forward pass."""
    from reftune import ReftConfig

    configs = getattr(model, "peft_config", {})
    return any(isinstance(config, ReftConfig) for config in configs.values())
