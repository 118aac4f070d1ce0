"""Shared by the tests of reuse: random examples, the plain computation, and models that compute in fp64 throughout."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from reftune import ReftConfig, get_reft_model
from reftune.data import ReftDataCollator
from reftune.train.reuse import MemoryStore, Reuse
from reftune.tuner.hooks import CHECKPOINTS_CALL

GAPS = pytest.mark.filterwarnings("ignore:Row .* of this batch has several answers")  # labels that are missing
FEWER = int(CHECKPOINTS_CALL)  # an older transformers edits inside a block, which then cannot be skipped


class Tokenizer:
    """What the collator asks of a tokenizer."""

    pad_token_id, eos_token_id = 0, 98


def examples(count: int = 4, seed: int = 0, prompt: int = 14, response: int = 5) -> list[dict[str, list[int]]]:
    """Prompts of 1 to `prompt` tokens with answers of 1 to `response`, some of whose labels are missing."""
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    rows = []
    for _ in range(count):
        before = [number(2, 98) for _ in range(number(1, prompt + 1))]
        answer = [number(2, 98) for _ in range(number(1, response + 1))]
        labels = [token if number(0, 4) or not i else -100 for i, token in enumerate(answer)]
        rows.append({"input_ids": before + answer, "labels": [-100] * len(before) + labels})
    return rows


def collate(rows: Any, **settings: Any) -> dict[str, Tensor]:
    return ReftDataCollator(Tokenizer(), **settings)(rows)


def reft(base: Any, positions: str = "l2", **settings: Any) -> Any:
    """The model with an adapter that edits something from the start, in training mode."""
    torch.manual_seed(1)
    defaults = {"r": 3, "layers": [1, 3], "init_weights": False, "task_type": "CAUSAL_LM"}
    return get_reft_model(base, ReftConfig(**{**defaults, **settings}, positions=positions)).train()


def reuse(model: Any, **settings: Any) -> tuple[Reuse, list[str]]:
    """A `Reuse` with a large memory store, and what it says."""
    said: list[str] = []
    return Reuse(model, settings.pop("store", MemoryStore(10**9)), say=said.append, **settings), said


def computed(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Loss and all gradients of the trained parameters, flat."""
    learns = [p for p in model.parameters() if p.requires_grad]
    loss = model(**inputs).loss
    found = torch.autograd.grad(loss, learns, allow_unused=True)
    whole = [torch.zeros_like(p) if g is None else g for g, p in zip(found, learns, strict=True)]
    return loss.detach(), torch.cat([g.flatten() for g in whole])


def with_reuse(engine: Reuse, inputs: dict[str, Any], keep: bool, **more: Any) -> tuple[Tensor, Tensor]:
    """The same, on the smaller batch."""
    prepared = engine.prepare(inputs, keep)
    assert prepared is not None
    with prepared.active():
        return computed(engine.model, {**prepared.inputs, **more})


@contextmanager
def doubles() -> Iterator[None]:
    """Tensors of fp64 stay so where transformers casts to fp32 (norms, the loss): 1e-10 then means something."""
    to, single = Tensor.to, Tensor.float

    def keep(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.dtype == torch.float64:
            args = tuple(a for a in args if a is not torch.float32)
            kwargs = {k: v for k, v in kwargs.items() if v is not torch.float32}
            if not args and not kwargs:
                return self
        return to(self, *args, **kwargs)

    Tensor.to = keep  # type: ignore[method-assign,assignment]
    Tensor.float = Tensor.double  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        Tensor.to, Tensor.float = to, single  # type: ignore[method-assign]
